"""Scores of whole units: any score per parameter, summed up over everything that goes together.

For unit c of a group, S_c = AGG over its slices of the score of that slice, where a slice is
what one dimension of one parameter holds of the unit, and its score the sum of the scores of its
elements; then NORM inside the group makes groups comparable (SPA, arXiv 2403.18955).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from secateurs.errors import InputError, described, unknown
from secateurs.structure.arguments import argument
from secateurs.structure.axes import Group, Structure
from secateurs.structure.dimensions import Dim, units_of

Aggregate = Literal["sum", "mean", "max", "prod"]
Normalize = Literal["none", "sum", "mean", "max", "l2", "gaussian"]
UnitScores = dict[str, Tensor]
"""Group -> one score a unit, float64; higher means keep."""


def unit_scores(
    structure: Structure,
    elements: Mapping[str, Tensor],
    aggregate: Aggregate = "sum",
    normalize: Normalize = "mean",
) -> UnitScores:
    """Scores of the units of all free groups from scores of single parameters.

    Args:
        elements: a score per parameter, in the parameter's shape; parameters that are missing
            do not count.
        aggregate: over the slices of a unit; ``mean`` divides by the number of slices.
        normalize: inside a group; ``gaussian`` is (S − mean) / (std + 1e-8).
    """
    found = {}
    for group in structure.free:
        slices = slice_scores(structure, group, elements)
        if slices:
            found[group.name] = normalized(aggregated(slices, aggregate), normalize)
    return found


def scale_scores(
    structure: Structure, scales: Mapping[str, Tensor], aggregate: Aggregate = "mean"
) -> UnitScores:
    """|γ| of the units of all free groups that a normalisation scale runs over.

    Where a scale holds several elements of a unit (a norm over flattened positions), their mean
    counts.

    Args:
        scales: γ by parameter name, such as `secateurs.parts.scales.norm_scales`.
        aggregate: over the scales that are tied to one axis.

    Raises:
        InputError: no scale runs over a free group.
    """
    found = {}
    for group in structure.free:
        if slices := scale_slices(structure, group, scales):
            found[group.name] = aggregated(slices, aggregate)
    if not found:
        raise InputError(
            "model",
            described(f"{len(structure)} axes, no scale along one that can be shortened"),
            "a model whose normalisation layers run over free axes",
        )
    return found


def scale_slices(structure: Structure, group: Group, scales: Mapping[str, Tensor]) -> list[Tensor]:
    """|γ| of the units of one group, (units,) for each scale that runs over it."""
    magnitudes = {n: s.detach().abs() for n, s in scales.items()}
    ones = {n: torch.ones_like(m) for n, m in magnitudes.items()}
    sums = slice_scores(structure, group, magnitudes)
    counts = slice_scores(structure, group, ones)
    return [s / c for s, c in zip(sums, counts, strict=True)]


def slice_scores(
    structure: Structure, group: Group, elements: Mapping[str, Tensor]
) -> list[Tensor]:
    """The score of every slice, (units,) each."""
    slices = []
    for name, place in group.slices:
        if (score := elements.get(name)) is None:
            continue
        others = [p for p in range(score.ndim) if p != place]
        along = score.double().sum(others) if others else score.double()
        slices.append(unit_sums(structure.trace.tensors[name][place], group, along))
    return slices


def unit_sums(dim: Dim, group: Group, values: Tensor) -> Tensor:
    """Values along a dimension summed up by the unit of a group that they belong to.

    Args:
        values: (size of `dim`,).

    Returns:
        (units,), float64.
    """
    owner = torch.from_numpy(units_of(dim, group.axis)).to(values.device)
    owned = owner >= 0
    total = torch.zeros(group.size, dtype=torch.float64, device=values.device)
    return total.index_add_(0, owner[owned], values.double()[owned])


def producers(structure: Structure, group: Group) -> list[tuple[str, int]]:
    """(weight, dimension) of every layer that makes the units of a group.

    Of a weight that is multiplied, that is any dimension that is not summed over.
    """
    found = structure.trace
    contracted, multiplied = set(), set()
    for meeting in found.notes.contractions:
        operand = argument(meeting.node, meeting.argument.partition(".")[0])
        name = found.same.get(str(getattr(operand, "target", None)))
        if name is not None:
            multiplied.add(name)
            contracted.add((name, meeting.place))
    return [s for s in group.slices if s[0] in multiplied and s not in contracted]


def aggregated(slices: Sequence[Tensor], aggregate: Aggregate = "sum") -> Tensor:
    """One score a unit from the scores of its slices.

    Raises:
        InputError: an unknown aggregate.
    """
    stacked = torch.stack(list(slices))
    match aggregate:
        case "sum":
            return stacked.sum(0)
        case "mean":
            return stacked.mean(0)
        case "max":
            return stacked.amax(0)
        case "prod":
            return stacked.prod(0)
    raise unknown("aggregate", aggregate, get_args(Aggregate))


def normalized(scores: Tensor, normalize: Normalize = "mean") -> Tensor:
    """Scores of one group made comparable with those of others.

    Raises:
        InputError: an unknown rule.
    """
    match normalize:
        case "none":
            return scores
        case "sum":
            return scores / _divisor(scores.sum())
        case "mean":
            return scores / _divisor(scores.mean())
        case "max":
            return scores / _divisor(scores.amax())
        case "l2":
            return scores / _divisor(torch.linalg.vector_norm(scores))
        case "gaussian":
            return (scores - scores.mean()) / (scores.std(unbiased=False) + 1e-8)
    raise unknown("normalize", normalize, get_args(Normalize))


def _divisor(value: Tensor) -> Tensor:
    """Its magnitude, so that signed scores keep their order; 1 where it is 0."""
    return torch.where(value == 0, torch.ones_like(value), value.abs())
