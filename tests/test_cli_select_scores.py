"""`secateurs select` by scores, by prototypes, by trainings of a named task, and for a target."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from sklearn.datasets import load_digits

import secateurs as sc
from secateurs.cli import main
from secateurs.selection.result import read_selection
from secateurs.zoo.catalog import make_task

pytest.importorskip("pyarrow")

NAME = "neural-scaling-data-pruning"


def select(*words: object) -> Result:
    return CliRunner().invoke(main, ["select", *(str(w) for w in words), "--threads", "1"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    images, labels = load_digits(return_X_y=True)
    path = tmp_path / "digits.npz"
    hardness = np.random.default_rng(0).random(len(images))
    np.savez(path, embeddings=images.astype(np.float32), labels=labels, hardness=hardness)
    return path


def told(*words: object) -> dict:
    result = select(*words, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("metric", ["prototypes", "supervised-prototypes", "random"])
def test_by_embeddings_and_labels(rows: Path, tmp_path: Path, metric: str) -> None:
    out = tmp_path / "kept.parquet"
    words = ("--method", "neural-scaling", "--metric", metric, "--keep", 0.2, "--out", out)
    assert told(rows, *words)["kept"] == 359
    images, labels = load_digits(return_X_y=True)
    here = sc.select(images.astype(np.float32), NAME, 0.2, labels=labels, metric=metric)
    assert np.array_equal(here.mask, read_selection(out)["keep"])


def test_by_a_column_of_scores(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.parquet"
    told(rows, "--method", NAME, "--metric", "column", "--column", "hardness", "--order", "easy",
         "--class-floor", 0, "--keep", 0.1, "--out", out)  # fmt: skip
    columns = read_selection(out)
    assert columns["hardness"][columns["keep"]].max() < columns["hardness"][~columns["keep"]].min()


def test_by_trainings_of_a_named_task(tmp_path: Path) -> None:
    out, model = tmp_path / "kept.parquet", "zoo:mlp?hidden=8"
    words = ("digits?limit=200", "--model", model, "--method", NAME, "--metric", "el2n")
    words = (*words, "--runs", 1, "--epoch", 1, "--keep", 0.2, "--seed", 3, "--out", out)
    found = told(*words)
    assert (found["rows"], found["kept"]) == (200, 40)
    assert len(found["classes"]) == 10
    task = make_task(model, "digits?limit=200", seed=3)
    here = sc.select(task.train.dataset, NAME, 0.2, task, metric="el2n", runs=1, epoch=1.0, seed=3)
    assert np.array_equal(here.mask, read_selection(out)["keep"])
    assert [p.name for p in tmp_path.iterdir()] == ["kept.parquet"], "work is left behind"


def test_a_metric_that_trains_asks_for_a_model(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.parquet"
    result = select(rows, "--method", NAME, "--metric", "el2n", "--keep", 0.2, "--out", out)
    assert result.exit_code == 2
    assert "model: got None; accepted: --model, as neural-scaling-data-pruning" in result.output
    result = select("digit", "--model", "zoo:mlp", "--method", NAME, "--metric", "el2n",
                    "--keep", 0.2, "--out", out)  # fmt: skip
    assert result.exit_code == 2
    assert "did you mean 'digits'" in result.output


def test_classes_for_a_target(rows: Path, tmp_path: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    out, target = tmp_path / "kept.parquet", tmp_path / "target.npy"
    np.save(target, images[np.isin(labels, [3, 8])].astype(np.float32))
    words = ("--method", "dp4tl", "--keep", 0.2, "--target", target, "--out", out)
    found = told(rows, *words)
    columns = read_selection(out)
    assert set(columns["label"][columns["keep"]]) == {3, 8}
    assert found["kept"] == int(np.isin(labels, [3, 8]).sum())
    np.save(target, np.eye(10, dtype=np.float32)[[1, 1, 7]])
    told(rows, *words, "--mapping", "label")
    columns = read_selection(out)
    assert set(columns["label"][columns["keep"]]) == {1, 7}
