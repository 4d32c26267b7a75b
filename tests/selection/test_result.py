"""The answer: counts, reasons, balance, examples, the file; and what `select` passes on."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.selection.result import Selection, balance, read_selection
from secateurs.selection.score_table import ScoreTable
from secateurs.selection.sources import from_arrays
from secateurs.settings import option


@pytest.fixture
def source():
    rows = np.random.default_rng(0).normal(size=(10, 3))
    labels = np.array(["cat", "dog"] * 5)
    return from_arrays(rows, np.arange(100, 110), labels, {"clip": np.arange(10.0)}, rows=4)


@pytest.fixture
def made(source):
    keep = [np.array([1, 0, 0, 1], bool), np.array([0, 0, 1, 0], bool), np.array([0, 1], bool)]
    scores = [np.arange(4.0), np.arange(4.0), np.arange(2.0)]
    duplicates = [np.array([0, 1, 0, 0], bool), np.zeros(4, bool), np.zeros(2, bool)]
    filtered = [np.zeros(4, bool), np.zeros(4, bool), np.array([1, 0], bool)]
    clusters = [np.array(c, np.int32) for c in ([0, 0, 1, 1], [1, 1, 1, 0], [0, 0])]
    distances = [s.astype(np.float32) for s in scores]
    return Selection.of(source, keep, scores, duplicates=duplicates, filtered=filtered,
                        clusters=clusters, distances=distances)  # fmt: skip


def test_counts_and_groups(made):
    assert made.ids.tolist() == [100, 103, 106, 109]
    assert made.indices.tolist() == [0, 3, 6, 9]
    assert (made.kept, made.total) == (4, 10)
    counts = [made.count(r) for r in ("kept", "pruned", "duplicate", "filtered")]
    assert counts == [4, 4, 1, 1]
    assert made.by_class() == [
        {"class": "cat", "rows": 5, "kept": 2}, {"class": "dog", "rows": 5, "kept": 2},
    ]  # fmt: skip
    assert [(r["rows"], r["kept"]) for r in made.by_cluster()] == [(5, 2), (5, 2)]
    told = made.as_dict()
    assert told["balance"] == {"before": 1.0, "after": 1.0}
    assert (told["duplicate"], told["filtered"], told["pruned"]) == (1, 1, 4)


def test_balance_is_the_entropy_over_its_largest_value():
    assert balance([5, 5, 5]) == pytest.approx(1)
    assert balance([9, 0, 0]) == 0
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert balance([3, 1]) == pytest.approx(expected)
    assert balance([4]) is None
    assert balance([0, 0]) is None


def test_examples_are_the_nearest_and_the_farthest(made):
    first, second = made.examples(each=2)
    assert [e["id"] for e in first["nearest"]] == [100, 108]
    assert [e["id"] for e in first["farthest"]] == [107, 101]
    assert [e["keep"] for e in second["nearest"]] == [False, False]
    assert [(e["row"], e["distance"]) for e in second["farthest"]] == [(3, 3.0), (2, 2.0)]


def test_the_file_has_everything_or_what_is_kept(made, tmp_path):
    pytest.importorskip("pyarrow")
    columns = read_selection(made.write(tmp_path / "a.parquet"))
    assert columns["id"].tolist() == list(range(100, 110))
    assert columns["reason"].tolist() == [
        "kept", "duplicate", "pruned", "kept", "pruned", "pruned", "kept", "pruned", "filtered",
        "kept",
    ]  # fmt: skip
    assert columns["clip"].tolist() == list(range(10))
    assert columns["label"][1] == "dog"
    assert columns["cluster"].tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    short = read_selection(made.write(tmp_path / "b.parquet", only_kept=True))
    assert short["id"].tolist() == made.ids.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]
    with pytest.raises(InputError, match="a file that ends in .parquet"):
        made.write(tmp_path / "a.csv")
    with pytest.raises(InputError, match="an existing file"):
        read_selection(tmp_path / "none.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="a whole parquet file"):
        read_selection(tmp_path / "torn.parquet")


@dataclass(frozen=True)
class Nearest(sc.Selector):
    """Rows nearest to a target: a method that needs all there is to need, not registered."""

    power: float = option(1.0, "of the distance")

    name = "nearest"
    budgets = ("keep",)
    needs = ("embeddings", "labels", "scores", "target", "training")

    def select(self, source, keep, task=None, *, target=None, seed=0, work=None):
        assert task is not None
        aim = torch.cat(list(target.vectors(0))).mean(0)
        scores = [torch.cat(list(source.vectors(n))) @ aim for n in range(len(source.shards))]
        scores = [s.numpy() for s in scores]
        table = ScoreTable(scores, lambda n: source.narrow(n).ids)
        return Selection.of(source, table.largest(keep.kept_samples(source.rows)), scores)


def test_what_a_method_needs_is_passed_on_or_asked_for(source):
    data = TensorDataset(torch.ones(10, 3), torch.zeros(10, dtype=torch.long))
    task = sc.classification(lambda: nn.Linear(3, 2), DataLoader(data), DataLoader(data))
    given = {"task": task, "target": np.ones((2, 3))}
    selection = sc.select(source, Nearest(), 0.5, **given)
    rows = np.concatenate([s.vectors for s in source.shards])
    cosine = rows.sum(1) / np.linalg.norm(rows, axis=1)
    assert set(selection.indices) == set(np.argsort(-cosine)[:5])
    assert (selection.method, selection.budget) == ("nearest", "keep=0.5")
    with pytest.raises(InputError, match="target: got None; accepted: the rows to select for"):
        sc.select(source, Nearest(), 0.5, task)
    with pytest.raises(InputError, match="task: got None"):
        sc.select(source, Nearest(), 0.5, target=np.ones((2, 3)))
    with pytest.raises(InputError, match="labels: got None"):
        sc.select(rows, Nearest(), 0.5, scores={"x": cosine}, **given)
    with pytest.raises(InputError, match="scores: got None"):
        sc.select(rows, Nearest(), 0.5, labels=[0] * 10, **given)
    with pytest.raises(InputError, match="options"):
        sc.select(source, Nearest(), 0.5, power=2.0, **given)
