"""Deltas on the command line: fine-tune, keep a tenth of the difference, merge it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import secateurs as sc
from secateurs.cli import main
from secateurs.deploy.delta_file import DELTA, base_hash
from secateurs.parts.deltas import same_bits
from secateurs.zoo.catalog import base_model


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, [str(w) for w in words])


def done(*words: object) -> dict[str, Any]:
    result = invoke(*words, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return sc.load(folder).model.state_dict()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs: a base, two fine-tunes of it, and the pruned deltas of both."""
    root = tmp_path_factory.mktemp("runs")

    def train(name: str, model: object, more: str) -> None:
        recipe = root / f"{name}.yaml"
        recipe.write_text(
            f"model: {model}\ndata: digits\nlatency: false\nthreads: 1\n"
            f"training: {{epochs: 0.5{more}}}\nstages: [train]\n"
        )
        done("run", recipe, "--out", root / name)

    train("base", "zoo:mlp?hidden=16", "")
    train("one", root / "base", ", lr: 0.01")
    train("two", root / "base", ", optimizer: adamr, lr: 0.01, weight_decay: 0.1")
    for number, name in enumerate(("one", "two")):
        done(
            "prune", root / name, "--base", root / "base", "--data", "digits", "--method", "darex",
            "--budget", "sparsity=0.9", "--q", "0.3", "--seed", number, "--no-latency",
            "--threads", 1, "--out", root / f"{name}-delta",
        )  # fmt: skip
    return root


def test_a_delta_is_merged_back_to_the_bit(runs: Path, tmp_path: Path) -> None:
    answer = done("merge", runs / "base", runs / "one-delta", "--out", tmp_path / "merged")
    found, expected = weights(tmp_path / "merged"), weights(runs / "one-delta")
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
    assert answer["base"] == base_hash(weights(runs / "base"))
    (row,) = answer["deltas"]
    assert row["bytes"] == (runs / "one-delta" / "outcome" / DELTA).stat().st_size
    assert invoke("inspect", tmp_path / "merged", "--data", "digits").exit_code == 0


def test_a_run_with_a_delta_says_what_it_did(runs: Path) -> None:
    again = done("resume", runs / "one-delta")
    assert again["promise"]["reached"] == pytest.approx(0.9, abs=0.05)
    dense = sc.load(runs / "one").metrics_after
    assert again["metrics_before"] == dense
    assert "base: " in (runs / "one-delta" / "recipe.yaml").read_text()
    assert (runs / "one-delta" / "report.html").is_file()


def test_several_deltas_are_summed(runs: Path, tmp_path: Path) -> None:
    files = [runs / f"{name}-delta" / "outcome" / DELTA for name in ("one", "two")]
    done("merge", runs / "base", *files, "--out", tmp_path / "both")
    expected = sc.merge(weights(runs / "base"), [sc.load_delta(file) for file in files])
    found = weights(tmp_path / "both")
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
    told = invoke("merge", runs / "base", files[0], files[0], "--out", tmp_path / "twice").output
    assert "deltas of one seed (0)" in told


def test_over_another_base_it_is_refused_and_both_are_named(runs: Path, tmp_path: Path) -> None:
    result = invoke("merge", runs / "one", runs / "two-delta", "--out", tmp_path / "wrong")
    assert result.exit_code == 2
    for name in ("base", "one"):
        assert base_hash(weights(runs / name))[:12] in result.stderr
    assert not (tmp_path / "wrong").exists()


def test_another_architecture_is_refused(runs: Path, tmp_path: Path) -> None:
    wide = runs / "wide.yaml"
    wide.write_text("model: zoo:mlp?hidden=20\ndata: digits\nlatency: false\n"
                    "training: {epochs: 0.1}\nstages: [train]\n")  # fmt: skip
    done("run", wide, "--out", tmp_path / "wide")
    result = invoke(
        "prune", runs / "one", "--base", tmp_path / "wide", "--data", "digits", "--method",
        "darex", "--budget", "sparsity=0.9", "--no-latency", "--out", tmp_path / "refused",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "weights features.fc1.weight: got shape (16, 64)" in result.stderr


def test_a_model_of_transformers_with_added_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.GPT2LMHeadModel(config)
        base.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in base.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        base.resize_token_embeddings(22)
    before = base_model(f"hf:{tmp_path / 'base'}")
    outcome = sc.prune(base, "darex", "sparsity=0.9", base=before, q="dare", include=("mlp",))
    sc.save(outcome, tmp_path / "delta")
    done("merge", f"hf:{tmp_path / 'base'}", tmp_path / "delta", "--out", tmp_path / "merged")
    read = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged" / "transformers")
    assert read.config.vocab_size == 22
    expected = outcome.model.state_dict()
    assert all(same_bits(t, expected[n]) for n, t in read.state_dict().items())


def test_a_benchmark_names_the_base_with_the_method(runs: Path) -> None:
    from secateurs.runs.matrix import Matrix

    matrix = Matrix.parse(
        f"model: {runs / 'one'}\ndata: digits\nbudgets: [sparsity=0.9]\nbaselines: false\n"
        f"methods: [{{method: darex, q: dare, base: {runs / 'base'}}}]\n"
    )
    (cell,) = matrix.cells
    assert cell.stage.base == str(runs / "base")
    assert cell.stage.options == {"q": "dare"}


def test_a_merge_that_is_killed_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    from secateurs.deploy import merged_folder

    model = torch.nn.Linear(2, 2)

    def die(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", die, raising=False)
    monkeypatch.setattr(merged_folder, "merge", lambda state, _: state)
    with pytest.raises(KeyboardInterrupt):
        merged_folder.save_merged(model, [], tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []
