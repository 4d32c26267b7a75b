"""Prune and regrow: exchange connections at a constant number of them (RigL, GraNet, ...)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateurs.parts.topk import select_largest


def prune_and_regrow(weight: Tensor, mask: Tensor, growth: Tensor, rate: float) -> Tensor:
    """The mask after dropping the smallest weights and growing as many by `growth`.

    c = ceil(rate · kept) survivors of least |w| are dropped; then as many positions that are
    not kept now, those dropped a moment ago included, are grown where `growth` is largest.

    Args:
        weight: any shape.
        mask: True = keep, same shape.
        growth: score of a connection to grow, such as |∂L/∂w|; same shape.
        rate: exchanged share of the kept weights, in [0, 1).

    Returns:
        A mask with exactly as many kept weights as `mask`.
    """
    kept = int(mask.sum())
    exchanged = min(math.ceil(rate * kept), kept)
    if exchanged == 0:
        return mask.clone()
    gone = weight.new_full((), -1.0)
    survivors = select_largest([torch.where(mask, weight.abs(), gone)], kept - exchanged)[0]
    candidates = torch.where(survivors, growth.new_full((), -1.0), growth.abs())
    grown = select_largest([candidates], exchanged)[0]
    return survivors | grown
