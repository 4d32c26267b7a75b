"""A TrainingPruner works, unchanged, in a bare loop, transformers.Trainer and Lightning."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(outcome, sparsity: float) -> None:
    assert outcome.masks.sparsity == pytest.approx(sparsity, abs=1 / outcome.masks.total)
    params = dict(outcome.model.named_parameters())
    for name, mask in outcome.masks.items():
        assert torch.equal(params[name] != 0, mask.to(params[name].device))


@pytest.mark.parametrize("method", ["gmp", "granet", "global-mp-gradual"])
def test_bare_loop(method: str) -> None:
    check(load("bare_loop").main(method, steps=60), 0.9)


@pytest.mark.parametrize("method", ["gmp", "granet"])
def test_transformers_trainer(method: str) -> None:
    pytest.importorskip("transformers")
    check(load("transformers_trainer").main(method, steps=40), 0.8)


@pytest.mark.parametrize("method", ["gmp", "granet"])
def test_lightning(method: str) -> None:
    pytest.importorskip("lightning")
    check(load("lightning_module").main(method, steps=40), 0.9)
