"""Small-dense: a narrower network of the same family and parameter count, from scratch.

The baseline of "To prune, or not to prune" (arXiv 1710.01878): is a large network pruned to so
many weights better than a small dense one that has as many from the start? It is in every
benchmark matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from secateurs.devices import device_of
from secateurs.errors import InputError
from secateurs.method import Procedure
from secateurs.outcome import Outcome, Promise
from secateurs.parts.budgets import Budget
from secateurs.parts.prunable import fixed_parameters, prunable_parameters
from secateurs.registry import Tags, register
from secateurs.task import Task, seeded
from secateurs.training.loop import fit_once
from secateurs.workspace import Workspace


def width_for(resize: Callable[[float], nn.Module], parameters: int, *, steps: int = 40) -> float:
    """The width multiplier whose model comes closest to a parameter count, from below.

    Models are built without memory (on the meta device) and bisected.

    Raises:
        InputError: even the narrowest model has more parameters.
    """

    if size_at(resize, 1.0) <= parameters:
        return 1.0
    low, high = 0.0, 1.0
    best: float | None = None
    for _ in range(steps):
        middle = (low + high) / 2
        if size_at(resize, middle) <= parameters:
            low = best = middle
        else:
            high = middle
    if best is None:
        least = size_at(resize, low + 1e-9)
        raise InputError("budget", parameters, f"at least {least} parameters for this family")
    return best


def size_at(resize: Callable[[float], nn.Module], width: float) -> int:
    """Parameters of the family's member at a width."""
    with torch.device("meta"):
        return sum(p.numel() for p in resize(width).parameters())


def next_size(resize: Callable[[float], nn.Module], width: float, parameters: int) -> int:
    """Parameters of the next larger member of the family."""
    step = 2.0**-12
    while (larger := size_at(resize, width + step)) <= parameters:
        step *= 2
    return larger


@register(
    "small-dense",
    paper=None,
    tags=Tags("S", "network", "PBT", "none", supervision="sup"),
    budgets=("sparsity", "density", "params"),
)
@dataclass(frozen=True)
class SmallDense(Procedure):
    """Train the widest dense model of the family that has no more non-zero parameters."""

    needs = ("training", "resize")

    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        params = prunable_parameters(model)
        fixed = fixed_parameters(model, params)
        total = sum(p.numel() for p in params.values())
        allowed = fixed + budget.kept(total, fixed)
        resize = task.resize
        assert resize is not None
        width = width_for(resize, allowed)
        small = seeded(lambda: resize(width), seed).to(device_of(model))
        fit_once(small, task, task.training, seed=seed, work=work)
        parameters = sum(p.numel() for p in small.parameters())
        wider = next_size(resize, width, parameters)
        return Outcome(
            model=small,
            source={"width": width},
            promise=Promise("params", allowed, parameters, max(wider - parameters, 1)),
            tables={
                "the small network": [
                    {"width": width, "parameters": parameters, "allowed": allowed}
                ]
            },
        )
