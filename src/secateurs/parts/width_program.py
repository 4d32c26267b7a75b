"""Widths under limits: a geometric program.

    maximise Σ_v c_v log r_v   subject to   f_k(r) ≤ B_k,   low_v ≤ r_v ≤ high_v

with posynomials f_k. In u = log r the objective is linear and every constraint convex, so the
best value is unique. It is solved by scipy's SLSQP on log f_k(exp u) ≤ log B_k, and what comes
out is certified: at the optimum c is a combination, with multipliers of 0 or more, of the
gradients of what is tight. Widths are then rounded down, and what is left of the limits is spent
unit by unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateurs.errors import InputError, SecateursError, require
from secateurs.parts.posynomial import Posynomial

Limit = tuple[Posynomial, float]
"""A cost and what it may be at most."""

TOLERANCE = 1e-4
"""What the certificate may miss, relative to the objective's gradient."""


@dataclass(frozen=True)
class Widths:
    """The solution of a program.

    Attributes:
        factors: r, (variables,).
        multipliers: what Σ c log r would gain were log B_k larger by so much, a limit a number.
        gap: what the certificate misses, relative to |c|.
    """

    factors: np.ndarray
    multipliers: tuple[float, ...]
    gap: float


def solve_widths(
    gains: np.ndarray, limits: Sequence[Limit], low: np.ndarray, high: np.ndarray
) -> Widths:
    """The widths of largest Σ gains · log r within limits.

    Args:
        gains: c, (variables,), 0 or more.
        low, high: bounds of r, above 0.

    Raises:
        InputError: a limit below the cost of the lower bounds.
        SecateursError: the solver stopped at no optimum.
    """
    require(bool((gains >= 0).all()), "gains", gains.tolist(), "numbers of 0 or more")
    require(bool(((low > 0) & (low <= high)).all()), "low", low.tolist(), "above 0, up to high")
    _refuse_impossible(limits, low)
    if all(cost.at(high) <= most for cost, most in limits):
        return Widths(high.copy(), (0.0,) * len(limits), 0.0)
    lowest, highest = np.log(low), np.log(high)
    u = _solved(gains, limits, lowest, highest)
    multipliers, gap = _certificate(gains, limits, u, lowest, highest)
    if gap > TOLERANCE:
        raise SecateursError(f"the widths found are not the best ones: gap {gap:.2g}")
    return Widths(np.clip(np.exp(u), low, high), multipliers, gap)


def _refuse_impossible(limits: Sequence[Limit], low: np.ndarray) -> None:
    for cost, most in limits:
        if cost.at(low) > most * (1 + 1e-12):
            raise InputError("limit", most, f"at least {cost.at(low):.6g}, the narrowest widths")


def _solved(
    gains: np.ndarray, limits: Sequence[Limit], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    from scipy.optimize import minimize

    scale = max(float(gains.max()), 1e-300)

    def room(cost: Posynomial, most: float) -> dict[str, Any]:
        return {
            "type": "ineq",
            "fun": lambda u: np.log(most) - cost.log_at(u)[0],
            "jac": lambda u: -cost.log_at(u)[1],
        }

    found = minimize(
        lambda u: (-float(gains @ u) / scale, -gains / scale),
        _towards(limits, low, high),
        jac=True,
        method="SLSQP",
        bounds=list(zip(low, high, strict=True)),
        constraints=[room(cost, most) for cost, most in limits],
        options={"maxiter": 1000, "ftol": 1e-13},
    )
    return _towards(limits, low, np.clip(found.x, low, high))


def _fits(limits: Sequence[Limit], u: np.ndarray) -> bool:
    return all(cost.log_at(u)[0] <= np.log(most) for cost, most in limits)


def _towards(limits: Sequence[Limit], low: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The point furthest from `low` on the way to `u` that is within limits; logarithms."""
    if _fits(limits, u):
        return u
    inside, outside = 0.0, 1.0
    for _ in range(60):
        middle = (inside + outside) / 2
        fits = _fits(limits, low + middle * (u - low))
        inside, outside = (middle, outside) if fits else (inside, middle)
    return low + inside * (u - low)


def _certificate(
    gains: np.ndarray, limits: Sequence[Limit], u: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[tuple[float, ...], float]:
    """Multipliers of the limits, and how far c is from the cone of what is tight at u."""
    from scipy.optimize import nnls

    count = len(u)
    columns = np.zeros((count, len(limits) + 2 * count))
    for number, (cost, most) in enumerate(limits):
        value, gradient = cost.log_at(u)
        if value >= np.log(most) - 1e-6:
            columns[:, number] = gradient
    for v in range(count):
        columns[v, len(limits) + v] = float(u[v] >= high[v] - 1e-6)
        columns[v, len(limits) + count + v] = -float(u[v] <= low[v] + 1e-6)
    weights, residual = nnls(columns, gains)
    return tuple(weights[: len(limits)].tolist()), float(residual / np.linalg.norm(gains))


def spend(
    widths: np.ndarray,
    gains: np.ndarray,
    limits: Sequence[Limit],
    wider: Callable[[int, int], int | None],
) -> np.ndarray:
    """Widen one variable after the other while the limits allow it, the best bargain first.

    A bargain is c_v · Δ log n_v over what the step costs, as a share of the limits.

    Args:
        widths: whole numbers within limits.
        wider: (variable, width) -> its next larger width, or None.

    Returns:
        Widths that no single step can widen.
    """
    widths = widths.astype(float).copy()
    while True:
        now = [cost.at(widths) for cost, _ in limits]
        best: tuple[float, int, float] | None = None
        for v in range(len(widths)):
            following = wider(v, round(widths[v]))
            if following is None:
                continue
            tried = widths.copy()
            tried[v] = following
            then = [cost.at(tried) for cost, _ in limits]
            if any(value > most for value, (_, most) in zip(then, limits, strict=True)):
                continue
            price = sum((b - a) / most for a, b, (_, most) in zip(now, then, limits, strict=True))
            bargain = gains[v] * np.log(following / widths[v]) / max(price, 1e-300)
            if best is None or bargain > best[0] * (1 + 1e-12):
                best = (bargain, v, following)
        if best is None:
            return widths.astype(int)
        widths[best[1]] = best[2]


def cheapest_step(
    widths: np.ndarray, cost: Posynomial, wider: Callable[[int, int], int | None]
) -> float | None:
    """What the cheapest wider width would add to a cost; None where no width is wider."""
    steps = []
    for v, width in enumerate(widths.tolist()):
        if (following := wider(v, width)) is not None:
            tried = widths.astype(float)
            tried[v] = following
            steps.append(cost.at(tried) - cost.at(widths.astype(float)))
    return min(steps, default=None)


def within(limits: Sequence[Limit], low: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The factors, brought towards the lower bounds until they are within limits.

    Raises:
        InputError: a limit below the cost of the lower bounds.
    """
    _refuse_impossible(limits, low)
    return np.exp(_towards(limits, np.log(low), np.log(factors)))


def nearest_shares(
    incidence: np.ndarray,
    densities: np.ndarray,
    limits: Sequence[Limit],
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """Factors whose products come closest to given densities, as wide as the limits allow.

    Σ_l (Σ_v A_lv log r_v − log p_l − s)² is least, with the largest s that is within limits: the
    densities of a mask cannot all be met by widths, their proportions can.

    Args:
        incidence: A, (layers, variables): how often a width is a factor of a layer's weights.
        densities: p, (layers,), above 0.
    """
    from scipy.optimize import lsq_linear

    lowest, highest = np.log(low), np.log(high)
    wanted = np.log(densities)
    # what no layer decides is as wide as the rest of its layers: the shortest vector
    ridge = 1e-4 * np.eye(incidence.shape[1])

    def solved(shift: float) -> np.ndarray:
        target = np.concatenate([wanted + shift, np.zeros(incidence.shape[1])])
        fixed = highest - lowest < 1e-12
        u = highest.copy()
        if not fixed.all():
            matrix = np.concatenate([incidence, ridge])
            rest = target - matrix[:, fixed] @ u[fixed]
            bounds = (lowest[~fixed], highest[~fixed])
            u[~fixed] = lsq_linear(matrix[:, ~fixed], rest, bounds, tol=1e-12).x
        return np.clip(u, lowest, highest)

    _refuse_impossible(limits, low)
    span = float(np.abs(wanted).max() + np.abs(lowest).sum() + np.abs(highest).sum()) + 1.0
    inside, outside = -span, span
    if _fits(limits, solved(outside)):
        return np.exp(solved(outside))
    for _ in range(50):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if _fits(limits, solved(middle)) else (inside, middle)
    return np.exp(_towards(limits, lowest, solved(inside)))
