"""Exact selection of the largest scores over many tensors, ties broken by position.

Nothing is concatenated and nothing is sorted whole. For large inputs a sample of the scores
brackets the wanted one; one pass counts what lies above the bracket and gathers what lies
inside it, and the exact answer is found among the few gathered. Memory beyond the input is a
few chunks.

The tie rule: among equal scores, the earlier tensor and the lower index in it are kept first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateurs.errors import require

Transform = Callable[[Tensor], Tensor]
SMALL = 1 << 22
"""Up to this many scores (16 MB in float32) are simply put side by side."""


@dataclass(frozen=True)
class Cut:
    """Where to cut: keep all scores above `value` and the first `ties` that equal it."""

    value: float
    ties: int


def identity(scores: Tensor) -> Tensor:
    """The scores as they are."""
    return scores


def find_cut(tensors: Sequence[Tensor], keep: int, transform: Transform = identity) -> Cut:
    """The score of rank `keep` (1 = largest) over all `tensors`, exactly.

    Args:
        tensors: any shapes; NaN is not allowed.
        keep: how many to keep, 0 to the number of elements.
        transform: applied chunk by chunk, such as `torch.abs` for magnitudes.
    """
    total = sum(t.numel() for t in tensors)
    require(0 <= keep <= total, "keep", keep, f"0 to {total}")
    if keep == 0:
        return Cut(float("inf"), 0)
    flat = torch.cat([transform(t.detach().reshape(-1)) for t in tensors])
    value = flat.kthvalue(total - keep + 1).values
    above = int((flat > value).sum())
    return Cut(value.item(), keep - above)


def select_largest(
    tensors: Sequence[Tensor], keep: int, transform: Transform = identity
) -> list[Tensor]:
    """Bool tensors that are True at exactly `keep` of the largest scores."""
    cut = find_cut(tensors, keep, transform)
    return masks_above(tensors, cut, transform)


def masks_above(
    tensors: Sequence[Tensor], cut: Cut, transform: Transform = identity
) -> list[Tensor]:
    """The masks that a `Cut` describes."""
    masks, ties = [], cut.ties
    for tensor in tensors:
        scores = transform(tensor.detach())
        mask = scores > cut.value
        if ties > 0:
            equal = (scores == cut.value).reshape(-1).nonzero().reshape(-1)[:ties]
            mask.view(-1)[equal] = True
            ties -= equal.numel()
        masks.append(mask)
    return masks
