"""Differences of fine-tuned weights to their base, and the choice of those that stay.

A difference is taken in float32 (float64 where a weight is float64), whatever the dtype of the
weights: in half precision small ones would be lost. Units of a structure are entries, rows
(dimension 0) or columns (dimension 1); a tensor of one dimension has entries only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from secateurs.errors import InputError, described, require
from secateurs.parts.topk import select_largest

Structure = Literal["none", "row", "column"]


@dataclass(frozen=True)
class Difference:
    """What tells a fine-tuned state dict from its base.

    Attributes:
        values: tensor minus the base's, dense, over the rows that both have; only of tensors
            that differ.
        whole: other tensors that are not the base's, as they are.
        rows: of the tensors compared, the rows that the base has not.
        tied: second names of tensors that share their memory with the first.
    """

    values: dict[str, Tensor]
    whole: dict[str, Tensor]
    rows: dict[str, Tensor]
    tied: dict[str, str]


def difference(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], names: Collection[str]
) -> Difference:
    """Compare two state dicts.

    Args:
        names: tensors of which the difference is taken; all others come whole.

    Raises:
        InputError: a tensor that one of the two has not, or of another shape in the two unless
            the fine-tuned one has more rows.
    """
    for name in base:
        if name not in tuned:
            raise InputError("model", described(f"no tensor {name!r}"), "all tensors of the base")
    values, whole, rows = {}, {}, {}
    tied = tied_names(tuned)
    for name, tensor in tuned.items():
        if name in tied:
            continue
        if name not in names:
            if name not in base or not same_bits(base[name], tensor):
                whole[name] = tensor.detach().clone()
            continue
        if name not in base:
            raise InputError("base", described(f"no tensor {name!r}"), "all tensors of the model")
        before, common = base[name], _common_rows(name, base[name], tensor)
        if common.shape != tensor.shape:
            rows[name] = tensor[len(common) :].detach().clone()
        if not same_bits(before, common):
            wide = widened(before.dtype, tensor.dtype)
            values[name] = common.detach().to(wide) - before.detach().to(common.device, wide)
    return Difference(values, whole, rows, tied)


def _common_rows(name: str, base: Tensor, tuned: Tensor) -> Tensor:
    if base.shape == tuned.shape:
        return tuned
    fits = base.ndim == tuned.ndim > 0 and base.shape[1:] == tuned.shape[1:]
    if not (fits and len(tuned) > len(base)):
        raise InputError(
            f"weights {name}",
            described(f"shape {tuple(tuned.shape)}"),
            f"shape {tuple(base.shape)}, the base's, or more rows",
        )
    return tuned[: len(base)]


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Later names of tensors that are the same memory in the same shape, to the first name."""
    first: dict[tuple[int, torch.Size], str] = {}
    tied = {}
    for name, tensor in state.items():
        if tensor.numel():
            owner = first.setdefault((tensor.data_ptr(), tensor.shape), name)
            if owner != name:
                tied[name] = owner
    return tied


def widened(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which differences are taken and added: float64 among float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal to the bit, dtype and shape included."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, two)]
    return torch.equal(flat[0], flat[1].to(flat[0].device))


def unit_shape(shape: torch.Size, structure: Structure) -> tuple[int, ...]:
    """The shape that has one number a unit and broadcasts over the tensor."""
    if structure == "none" or len(shape) < 2:
        return tuple(shape)
    kept = 0 if structure == "row" else 1
    return tuple(size if axis == kept else 1 for axis, size in enumerate(shape))


def random_masks(
    values: Mapping[str, Tensor],
    p: float,
    generator: torch.Generator,
    structure: Structure = "none",
) -> dict[str, Tensor]:
    """Masks (True = keep) in which every unit stays with probability 1 - p.

    Args:
        generator: on the CPU, so that a seed gives the same masks on any device.

    Raises:
        InputError: p outside [0, 1).
    """
    require(0 <= p < 1, "p", p, "a drop rate in [0, 1)")
    masks = {}
    for name, value in values.items():
        units = torch.rand(unit_shape(value.shape, structure), generator=generator) >= p
        masks[name] = units.expand(value.shape).contiguous().to(value.device)
    return masks


def largest_masks(
    scores: Mapping[str, Tensor], counts: Mapping[str, int], structure: Structure = "none"
) -> dict[str, Tensor]:
    """Masks that keep, in every tensor, so many units of the largest score.

    Args:
        scores: of the entries, 0 or more; a row or column scores their sum.
        counts: units to keep by tensor.
    """
    masks = {}
    for name, score in scores.items():
        shape = unit_shape(score.shape, structure)
        axes = tuple(a for a, size in enumerate(score.shape) if shape[a] != size)
        units = score.sum(axes, keepdim=True) if axes else score
        chosen = select_largest([units.reshape(shape)], counts[name])[0]
        masks[name] = chosen.expand(score.shape).contiguous()
    return masks


def units_of(shape: torch.Size, structure: Structure) -> int:
    """How many units a tensor has."""
    return prod(unit_shape(shape, structure))


def low_rank_delta(
    down: Tensor, up: Tensor, scale: float = 1.0, kept: Tensor | None = None, q: float = 1.0
) -> Tensor:
    """The difference that a low-rank adapter makes, scale/q · up diag(kept) down, in float32.

    Args:
        down: (rank, inputs), LoRA's A.
        up: (outputs, rank), LoRA's B.
        scale: LoRA's alpha / rank.
        kept: bool (rank,); ranks that stay. All where None.
        q: what the surviving ranks are divided by.

    Returns:
        (outputs, inputs).

    Raises:
        InputError: shapes that do not fit each other, or q not above 0.
    """
    rank = down.shape[0]
    fits = down.ndim == up.ndim == 2 and up.shape[1] == rank
    fits = fits and (kept is None or tuple(kept.shape) == (rank,))
    shown = described(f"shapes {tuple(down.shape)} and {tuple(up.shape)}")
    require(fits, "adapter", shown, "(rank, inputs) and (outputs, rank), and a bool a rank")
    require(q > 0, "q", q, "above 0")
    wide = widened(down.dtype, up.dtype)
    ranks = torch.ones(rank, dtype=torch.bool, device=down.device) if kept is None else kept
    return (up.to(wide)[:, ranks] @ down.to(wide)[ranks]) * (scale / q)
