"""Masks from learned thresholds: a unit stays while its score is not below a scalar.

    m_j = 1[d_j ≥ 0],   d = s − t,       backward   ∂m/∂d = σ(d/τ) (1 − σ(d/τ)) / τ

The forward pass sees zeros and ones, the backward pass the slope of a sigmoid of width τ, so that
a threshold learns from units on both sides of it. Far from it the slope is dead: at d = 1
it is 0.21 with τ = 0.5, but 4.5e-4 with τ = 0.1. Once nothing is learned any more, masks are
fixed and brought to a budget unit by unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import require
from secateurs.parts.posynomial import Posynomial


class _Step(torch.autograd.Function):
    """1[d ≥ 0], with the slope of a sigmoid."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(distance)
        ctx.width = width
        return (distance >= 0).to(distance.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (distance,) = ctx.saved_tensors
        level = torch.sigmoid(distance / ctx.width)
        return gradient * level * (1 - level) / ctx.width, None


def threshold_mask(scores: Tensor, threshold: Tensor, width: float = 0.5) -> Tensor:
    """1 where a score reaches the threshold, 0 elsewhere, with a surrogate gradient.

    Where no score does, the best one stays all the same, without a gradient of its own.

    Args:
        scores: (units,); gradients go through them, too, unless they are detached.
        threshold: a scalar.
        width: τ.
    """
    require(width > 0, "width", width, "above 0")
    mask: Tensor = _Step.apply(scores - threshold, width)
    if bool(mask.detach().any()):
        return mask
    best = torch.arange(len(scores), device=scores.device) == scores.detach().argmax()
    return torch.where(best, torch.ones_like(mask), mask)


def relative(norms: Tensor) -> Tensor:
    """Norms divided by their mean: whatever their scale, the mean is 1; zeros where all are 0."""
    mean = norms.mean()
    return norms / torch.where(mean > 0, mean, torch.ones_like(mean))


def counts_of(kept: Sequence[Tensor]) -> np.ndarray:
    """How many units of every mask are on."""
    return np.array([int(k.sum()) for k in kept], dtype=float)


def frozen_masks(margins: Sequence[Tensor]) -> list[Tensor]:
    """Which units are on: those whose margin s − t is not negative, or else the best one."""
    kept = []
    for margin in margins:
        on = margin >= 0
        if not bool(on.any()):
            on = torch.arange(len(margin)) == margin.argmax()
        kept.append(on)
    return kept


def projected(
    kept: Sequence[Tensor],
    margins: Sequence[Tensor],
    cost: Posynomial,
    target: float,
    *,
    fill: bool = True,
) -> list[Tensor]:
    """Units brought to a budget one by one, by their margins.

    While the cost is above, the smallest margin goes, but never the last unit of a gate. With
    `fill`, the largest margins that are off come back where there is room.
    """
    kept = [k.clone() for k in kept]
    order = sorted(
        (float(m), number, unit)
        for number, margin in enumerate(margins)
        for unit, m in enumerate(margin.tolist())
    )
    counts = counts_of(kept)
    for _, number, unit in order:
        if cost.at(counts) <= target:
            break
        if kept[number][unit] and counts[number] > 1:
            kept[number][unit] = False
            counts[number] -= 1
    for _, number, unit in reversed(order) if fill else ():
        if not kept[number][unit]:
            counts[number] += 1
            if cost.at(counts) <= target:
                kept[number][unit] = True
            else:
                counts[number] -= 1
    return kept
