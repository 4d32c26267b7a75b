"""Which units stay: the lowest scores go until a cost is down to its target.

All groups are ranked together (``global``) or lose the same share each (``local``). The cost is
evaluated from the axes for every candidate, so the interplay of groups is exact; it falls with
every unit, so the fewest removals are found by halving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import InputError, require
from secateurs.structure.axes import Structure
from secateurs.structure.dimensions import Axis

Cost = Callable[[Callable[[Axis], int]], float]
Kept = dict[Axis, np.ndarray]


@dataclass(frozen=True)
class Limits:
    """What no choice may go below.

    Attributes:
        max_ratio: largest share of a group that goes.
        least: units that stay in every group at least.
        round_to: kept counts are multiples of this, where a group has so many units.
    """

    max_ratio: float = 1.0
    least: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        require(0 < self.max_ratio <= 1, "max_ratio", self.max_ratio, "a share in (0, 1]")
        require(self.least >= 1, "least", self.least, "at least 1 unit")
        require(self.round_to >= 1, "round_to", self.round_to, "at least 1")

    def floor(self, size: int) -> int:
        """Units of a group of `size` that stay in any case."""
        lowest = max(self.least, size - int(self.max_ratio * size + 1e-9))
        return min(size, -(-lowest // self.round_to) * self.round_to)

    def rounded(self, size: int, kept: int) -> int:
        """`kept` rounded down to a multiple, not below the floor; whole groups stay whole."""
        if kept == size:
            return size
        return max(self.floor(size), kept // self.round_to * self.round_to)


@dataclass(frozen=True)
class Choice:
    """Units that stay, by axis, and the cost before and after the last unit went."""

    kept: Kept
    cost: float
    cost_before_last: float


def chosen(kept: Kept, cost: Cost) -> Choice:
    """The choice of units that something else than a budget decided on.

    The cost before the last unit is that with one unit more, of the axis where it costs most.
    """

    def cost_with(more: Axis | None) -> float:
        return cost(lambda a: (len(kept[a]) if a in kept else a.size) + (a is more))

    return Choice(kept, cost_with(None), max(map(cost_with, [None, *kept])))


def choose(
    structure: Structure,
    scores: Mapping[str, Tensor],
    cost: Cost,
    target: float,
    *,
    scope: Literal["global", "local"] = "global",
    limits: Limits | None = None,
) -> Choice:
    """The fewest removals, lowest scores first, that bring `cost` down to `target`.

    Args:
        scores: a score per unit of every group that may be shortened.
        cost: of kept counts by axis.

    Raises:
        InputError: the target is below what the floors allow.
    """
    limits = limits or Limits()
    order = {
        n: torch.argsort(scores[n].cpu(), descending=True, stable=True).numpy() for n in scores
    }
    size = {n: len(o) for n, o in order.items()}
    counts_at: _Global | _Local = (
        _Global(scores, limits) if scope == "global" else _Local(size, limits)
    )
    axis = {structure[n].axis: n for n in scores}

    def cost_at(step: int) -> float:
        kept = counts_at(step)
        return cost(lambda a: kept[axis[a]] if a in axis else a.size)

    last = counts_at.steps
    if cost_at(last) > target:
        raise InputError(
            "budget", round(target), f"at least {round(cost_at(last))}, what the floors leave"
        )
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        if cost_at(middle) <= target:
            high = middle
        else:
            low = middle + 1
    kept = counts_at(low)
    units = {structure[n].axis: np.sort(order[n][: kept[n]]) for n in scores if kept[n] < size[n]}
    return Choice(units, cost_at(low), cost_at(max(low - 1, 0)))


class _Global:
    """Kept counts after so many removals in the order of all scores."""

    def __init__(self, scores: Mapping[str, Tensor], limits: Limits) -> None:
        self.limits = limits
        self.names = list(scores)
        self.size = {n: scores[n].numel() for n in scores}
        removable, owner = [], []
        for number, name in enumerate(self.names):
            free = self.size[name] - limits.floor(self.size[name])
            lowest = torch.sort(scores[name].cpu().double(), stable=True).values[:free]
            removable.append(lowest.numpy())
            owner.append(np.full(free, number))
        values, owners = np.concatenate(removable), np.concatenate(owner)
        self.order = owners[np.argsort(values, kind="stable")]
        self.steps = len(self.order)

    def __call__(self, step: int) -> dict[str, int]:
        gone = np.bincount(self.order[:step], minlength=len(self.names))
        return {
            n: self.limits.rounded(self.size[n], self.size[n] - int(g))
            for n, g in zip(self.names, gone, strict=True)
        }


class _Local:
    """Kept counts when every group loses the same share, in thousandths."""

    steps = 1000

    def __init__(self, size: Mapping[str, int], limits: Limits) -> None:
        self.size, self.limits = size, limits

    def __call__(self, step: int) -> dict[str, int]:
        share = step / self.steps
        return {
            n: self.limits.rounded(s, max(self.limits.floor(s), s - round(share * s)))
            for n, s in self.size.items()
        }
