"""How a total is shared out between groups that each hold so much and no more.

The quadratic programme

    min ½ Σ (x_j − t_j)²   subject to   Σ x_j = total,  low_j ≤ x_j ≤ high_j

is the projection of t on a box cut by a plane. Its KKT conditions say x_j = clip(t_j + ν, low_j,
high_j) with one ν for all j. The sum of the clipped values is piecewise linear in ν and does not
fall, so the right piece is found by sorting the 2k breakpoints and ν on it in closed form: the
exact solution in O(k log k), without a solver and without a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from secateurs.errors import require

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


def quota_floor(share: float, total: int, groups: int) -> int:
    """The whole part of a share of an equal quota; the share counts as it is written in decimals,
    so that 0.57 of 100 is 57 (as floats, 56.99999999999999)."""
    return math.floor(Fraction(repr(float(share))) * total / groups)


def project_on_box(
    target: Sequence[float] | Floats,
    low: Sequence[float] | Floats,
    high: Sequence[float] | Floats,
    total: float,
) -> Floats:
    """The nearest point to `target` within the box whose entries sum to `total`, exactly.

    Args:
        target, low, high: (k,), finite, with low ≤ high.

    Raises:
        InputError: the sum of the lows is above the total, or that of the highs below it.
    """
    t, a, b = (np.asarray(x, dtype=np.float64) for x in (target, low, high))
    require(bool(np.isfinite(t).all()), "target", t.tolist(), "finite numbers")
    require(bool((a <= b).all()), "low", a.tolist(), "at most high, everywhere")
    lowest, highest = float(a.sum()), float(b.sum())
    require(lowest <= total <= highest, "total", total, f"{lowest:g} to {highest:g}")
    if total == highest:
        return b.copy()
    # slope of the sum over ν: +1 where an entry leaves its low, −1 where it meets its high
    breaks = np.concatenate([a - t, b - t])
    slope = np.repeat([1.0, -1.0], len(t))
    order = np.argsort(breaks, kind="stable")
    breaks, free = breaks[order], np.cumsum(slope[order])
    sums = lowest + np.concatenate([[0.0], np.cumsum(free[:-1] * np.diff(breaks))])
    piece = int(np.searchsorted(sums, total, side="right")) - 1
    x: Floats = np.clip(t + breaks[piece], a, b)
    inside = (t + breaks[piece] < b) & (t + breaks[piece] >= a)
    if inside.any():  # what rounding has left of the total, over those that may move
        x[inside] += (total - x.sum()) / inside.sum()
    return np.clip(x, a, b)


def box_quotas(
    weights: Sequence[float] | Floats,
    sizes: Sequence[int] | Counts,
    total: int,
    low: Sequence[int] | Counts | None = None,
) -> Counts:
    """Whole quotas that sum to `total`, nearest to ``weights / Σ weights · total``.

    The projection is rounded down, and what is missing goes to the largest fractional parts,
    the smaller index first.

    Args:
        weights: (k,), 0 or more.
        sizes: (k,), what a group holds at most.
        low: (k,), what it keeps at least; 1 where it holds anything, by default.

    Raises:
        InputError: the least quotas are more than the total, or the sizes are less.

    Source: arXiv 2401.04578, section 3 (density-based pruning).
    """
    w, m = np.asarray(weights, dtype=np.float64), np.asarray(sizes, dtype=np.int64)
    least = np.minimum(1, m) if low is None else np.asarray(low, dtype=np.int64)
    require(bool((w >= 0).all()) and w.sum() > 0, "weights", w.tolist(), "0 or more, not all 0")
    require(bool((least >= 0).all()), "low", least.tolist(), "0 or more")
    box = least.astype(np.float64), m.astype(np.float64)
    shares = project_on_box(w / w.sum() * total, *box, total)
    floor = np.floor(shares + 1e-9).astype(np.int64)
    rest = np.where(floor < m, shares - floor, -np.inf)
    missing = total - int(floor.sum())
    floor[np.argsort(-rest, kind="stable")[:missing]] += 1
    return floor
