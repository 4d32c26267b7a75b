"""Curves of distortion over cost: how much each tensor gives up so that all lose least.

A `Curve` says, for rising numbers of removed units, what is saved and what is lost. Two ways to
stop on several curves at a common budget: where a unit of cost loses the same everywhere
(`lagrangian`), and where the curves are equally steep (`equal_slopes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from secateurs.errors import require


@dataclass(frozen=True)
class Curve:
    """What one tensor loses as it gives up more; all of the same length, one entry a point.

    Attributes:
        share: fraction of the units that is removed, rising from 0.
        units: removed units, int64, rising from 0.
        saved: cost that goes with them, float64, rising from 0.
        loss: distortion, float64.
        last: the furthest point that may be taken.
    """

    share: Tensor
    units: Tensor
    saved: Tensor
    loss: Tensor
    last: int

    @property
    def most(self) -> float:
        """The largest cost that may be saved."""
        return float(self.saved[self.last])


def envelope(values: Tensor) -> Tensor:
    """The smallest curve above `values` that never falls, along the last dimension."""
    return values.cummax(-1).values


def moving_average(values: Tensor, weight: float) -> Tensor:
    """Bias-corrected exponential average along the last dimension; `weight` 0 changes nothing.

    m_i = weight · m_{i−1} + (1 − weight) · y_i, divided by 1 − weight^(i+1).
    """
    require(0 <= weight < 1, "smooth", weight, "a weight in [0, 1)")
    last, out = torch.zeros_like(values[..., 0]), []
    for i in range(values.shape[-1]):
        last = weight * last + (1 - weight) * values[..., i]
        out.append(last / (1 - weight ** (i + 1)))
    return torch.stack(out, -1)


def slopes(x: Tensor, y: Tensor, half: int = 4) -> Tensor:
    """dy/dx by a five-point stencil of half width h, narrower towards the ends.

    (−y[i+h] + 8 y[i+h/2] − 8 y[i−h/2] + y[i−h]) / (6 (x[i+h] − x[i])), exact for cubics on a
    uniform grid; two points where h would be below 2.

    Args:
        x, y: (points,), at least two.
        half: an even number.
    """
    require(half >= 2 and half % 2 == 0, "half", half, "an even number, 2 or more")
    count = len(y)
    require(count >= 2, "points", count, "at least 2")
    out = torch.empty_like(y)
    for i in range(count):
        h = min(half, i, count - 1 - i) // 2 * 2
        if h >= 2:
            m = h // 2
            rise = -y[i + h] + 8 * y[i + m] - 8 * y[i - m] + y[i - h]
            out[i] = rise / (6 * (x[i + h] - x[i]))
        else:
            low, high = (i, i + 1) if i == 0 else (i - 1, min(i + 1, count - 1))
            out[i] = (y[high] - y[low]) / (x[high] - x[low])
    return out


def lower_hull(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the corners of the lower convex hull of points with rising x, ends included.

    Of points at the same x the lowest counts.
    """
    corners: list[int] = []
    for i in range(len(x)):
        if corners and x[i] == x[corners[-1]]:
            if y[i] >= y[corners[-1]]:
                continue
            corners.pop()
        while len(corners) >= 2 and not _turns_up(x, y, (corners[-2], corners[-1], i)):
            corners.pop()
        corners.append(i)
    return corners


def _turns_up(x: Sequence[float], y: Sequence[float], points: tuple[int, int, int]) -> bool:
    a, b, c = points
    return (y[b] - y[a]) * (x[c] - x[b]) < (y[c] - y[b]) * (x[b] - x[a])


def lagrangian(curves: Mapping[str, Curve], saving: float) -> dict[str, int]:
    """Units that each tensor gives up so that `saving` is reached at the least total loss.

    Minimises Σ loss + λ Σ remaining cost. For every λ the minimum lies on corners of the lower
    convex hulls, and as λ rises their edges are passed in order of loss per cost; so the λ of
    the budget, to which a bisection would come, is found by sorting the edges. The edge on
    which the budget lies is followed to the unit that comes closest.

    Raises:
        InputError: the curves together cannot save so much.
    """
    check_saving(curves, saving)
    edges = []
    for name, curve in curves.items():
        x, y = curve.saved[: curve.last + 1].tolist(), curve.loss[: curve.last + 1].tolist()
        corners = lower_hull(x, y)
        for place, (a, b) in enumerate(pairwise(corners)):
            edges.append(((y[b] - y[a]) / (x[b] - x[a]), name, place, a, b))
    given = dict.fromkeys(curves, 0)
    left = saving
    for _, name, _, a, b in sorted(edges):
        if left <= 0:
            break
        curve = curves[name]
        step = float(curve.saved[b] - curve.saved[a])
        start, end = int(curve.units[a]), int(curve.units[b])
        given[name] = end if step <= left else start + round((end - start) * left / step)
        left -= step
    return given


def equal_slopes(
    curves: Mapping[str, Curve],
    saving: float,
    *,
    tolerance: float,
    half: int = 4,
    steps: int = 40,
) -> dict[str, int]:
    """Units that each gives up so that all curves are equally steep in the removed fraction.

    Each stops at the point whose slope is nearest to 2^s, not beyond its last; s is bisected in
    [−100, 100] until the saving is met within `tolerance`, in units of cost. Curves that are not
    convex may never come so close: what came closest is returned.

    Raises:
        InputError: the curves together cannot save so much.
    """
    check_saving(curves, saving)
    best = dict.fromkeys(curves, 0)
    nearest = abs(saving)
    steep = {n: slopes(c.share, c.loss, half) for n, c in curves.items()}
    low, high = -100.0, 100.0
    for _ in range(steps):
        if nearest <= tolerance:
            break
        middle = (low + high) / 2
        stops = {
            n: min(int((steep[n] - 2.0**middle).abs().argmin()), c.last) for n, c in curves.items()
        }
        saved = sum(float(c.saved[stops[n]]) for n, c in curves.items())
        if abs(saved - saving) < nearest:
            nearest = abs(saved - saving)
            best = {n: int(c.units[stops[n]]) for n, c in curves.items()}
        low, high = (middle, high) if saved < saving else (low, middle)
    return best


def check_saving(curves: Mapping[str, Curve], saving: float) -> None:
    """Raise `InputError` where all curves at their last points save less than `saving`."""
    most = sum(c.most for c in curves.values())
    require(saving <= most * (1 + 1e-9), "saving", saving, f"at most {most:.6g}")
