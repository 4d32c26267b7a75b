"""The examples run, in short."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_compress_a_model(tmp_path: Path) -> None:
    outcome = load("compress_a_model").main(epochs=1, out=str(tmp_path))
    assert outcome.promise.kept


def test_compare_methods(tmp_path: Path) -> None:
    board = load("compare_methods").main(epochs=0.5, out=str(tmp_path))
    labels = {row["label"] for row in board}
    assert {"random-pruning", "global-mp", "small-dense", "granet from 50 %"} <= labels


@pytest.mark.parametrize("method", ["global-mp", "gmp", "lottery-ticket"])
def test_audit_a_method(method: str) -> None:
    rows = load("audit_a_method").main(method, epochs=0.3, seeds=1)
    assert [row["arm"] for row in rows] == ["finetune", "scratch-e", "scratch-b"]
