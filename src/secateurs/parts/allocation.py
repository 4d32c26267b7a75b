"""How a budget is spread over tensors.

Two layers. `densities` is a pure function from shapes to a density per tensor (uniform,
uniform+, ER, ERK, ERK+). `allocate_counts` answers the question that every method asks, how
many weights each tensor keeps so that the total is exact, for those and for the allocations
that look at scores (global, LAMP, ratios of SNIP or GraSP) or are given (explicit).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import ceil, prod
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import InputError, require, unknown
from secateurs.parts.prunable import matches_any, sizes
from secateurs.parts.topk import select_largest

Shapes = Mapping[str, Sequence[int]]
Name = TypeVar("Name", bound=str | tuple[str, ...])

SHAPE_METHODS = ("uniform", "uniform+", "er", "erk", "erk+")
SCORE_METHODS = ("global", "lamp")
METHODS = SHAPE_METHODS + SCORE_METHODS


def densities(
    shapes: Shapes,
    density: float,
    method: str = "erk",
    *,
    power: float = 1.0,
    keep_dense: Collection[str] = (),
    fc: str | None = None,
    fc_density: float = 1.0,
) -> dict[str, float]:
    """Density per tensor, with the sum of density times size equal to the budget.

    Args:
        shapes: weight shapes by name in network order, (out, in, *kernel).
        density: kept fraction of all weights, in (0, 1].
        method: ``uniform``; ``uniform+`` (first tensor dense, last at least 0.2, Gale et al.
            2019 as in arXiv 2202.02643); ``er`` (n_in + n_out)/(n_in n_out); ``erk`` (sum of
            all dimensions over their product, Evci et al., arXiv 1911.11134); ``erk+`` (last
            layer taken out of the budget at `fc_density`).
        power: exponent of the raw ER and ERK probabilities.
        keep_dense: regular expressions of tensors that stay dense within the budget.
        fc: name of the last layer for ``erk+`` and ``uniform+``; the last tensor when None.

    Raises:
        InputError: density outside (0, 1], unknown method, or dense tensors above the budget
            (the message says the smallest density that is feasible).
    """
    require(0 < density <= 1, "density", density, "a fraction in (0, 1]")
    if method not in SHAPE_METHODS:
        raise unknown("allocation", method, SHAPE_METHODS)
    names = list(shapes)
    if fc is not None and fc not in shapes:
        raise unknown("fc", fc, names)
    last = fc or names[-1]
    fixed = {name: 1.0 for name in names if matches_any(name, list(keep_dense))}
    if method == "uniform+":
        fixed[names[0]] = 1.0
        if density < 0.2 and last not in fixed:
            fixed[last] = 0.2
    if method == "erk+":
        require(0 < fc_density <= 1, "fc_density", fc_density, "a fraction in (0, 1]")
        fixed[last] = fc_density
    if density == 1:
        return dict.fromkeys(names, 1.0)
    raw = {name: _raw(shapes[name], method) ** power for name in names if name not in fixed}
    return _fill(shapes, density, raw, fixed)


def _raw(shape: Sequence[int], method: str) -> float:
    if method == "er":
        return (shape[0] + shape[1]) / (shape[0] * shape[1])
    if method in ("erk", "erk+"):
        return sum(shape) / prod(shape)
    return 1.0


def _fill(
    shapes: Shapes, density: float, raw: Mapping[str, float], fixed: Mapping[str, float]
) -> dict[str, float]:
    """p = min(1, ε · raw) for the free tensors, with ε chosen so that the total is exact."""
    size = {name: prod(shape) for name, shape in shapes.items()}
    total = sum(size.values())
    spent = sum(fixed[name] * size[name] for name in fixed)
    left = density * total - spent
    if left < 0 or (left == 0) == bool(raw):
        raise InputError(
            "density", density, f"at least {spent / total:.6g}, what the dense tensors take"
        )
    full: set[str] = set()
    while free := [name for name in raw if name not in full]:
        weight = sum(raw[name] * size[name] for name in free)
        scale = (left - sum(size[name] for name in full)) / weight
        top = max(raw[name] for name in free)
        if scale * top <= 1:
            break
        full |= {name for name in free if raw[name] == top}
    else:
        if sum(size[n] for n in full) + spent < density * total * (1 - 1e-12):
            raise InputError("density", density, "a budget that the tensors can take up")
        scale = 0.0
    free_density = {n: 1.0 if n in full else scale * raw[n] for n in raw}
    return {name: fixed[name] if name in fixed else free_density[name] for name in shapes}


def counts_from_densities(
    density: Mapping[Name, float], size: Mapping[Name, int], keep: int
) -> dict[Name, int]:
    """Whole numbers of kept weights that sum to `keep` (largest remainder, names break ties)."""
    counts = {n: min(size[n], int(density[n] * size[n] + 1e-9)) for n in density}
    remainder = {n: density[n] * size[n] - counts[n] for n in density}
    missing = keep - sum(counts.values())
    step = 1 if missing > 0 else -1
    while missing:
        movable = [n for n in counts if 0 <= counts[n] + step <= size[n]]
        if not movable:
            raise InputError("keep", keep, f"0 to {sum(size.values())} weights")
        movable.sort(key=lambda n: (-step * remainder[n], n))
        for name in movable[: abs(missing)]:
            counts[name] += step
            remainder[name] -= step
            missing -= step
    return counts


def lamp_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LAMP: s(u) = w_u² / Σ_{v: |w_v| ≥ |w_u|} w_v², per tensor (Lee et al., arXiv 2010.07611).

    Among equal weights the sum is over the later ones, so one of each tensor scores 1.

    Args:
        scores: weights or magnitudes by name; −inf marks a weight that is gone and stays last.
    """
    out = {}
    for name, score in scores.items():
        gone = score.detach() == -torch.inf
        squares = score.detach().double().masked_fill(gone, 0.0).square().reshape(-1)
        order = squares.argsort(stable=True)
        tail = squares[order].flip(0).cumsum(0).flip(0)
        lamp = torch.empty_like(squares)
        lamp[order] = squares[order] / tail.clamp_min(torch.finfo(torch.float64).tiny)
        out[name] = lamp.reshape(score.shape).masked_fill(gone, -torch.inf)
    return out


def largest_by_name(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Masks of the `keep` largest scores over all tensors.

    Ties go by name and position, so the order in which tensors are listed changes nothing.
    """
    names = sorted(scores)
    masks = dict(zip(names, select_largest([scores[n] for n in names], keep), strict=True))
    return {name: masks[name] for name in scores}


def kept_shares(scores: Mapping[str, Tensor], keep: int) -> dict[str, float]:
    """Density of each tensor when the `keep` largest scores over all of them stay."""
    masks = largest_by_name(scores, keep)
    return {n: int(m.sum()) / m.numel() for n, m in masks.items()}


def with_floor(counts: Mapping[str, int], size: Mapping[str, int], floor: int) -> dict[str, int]:
    """The counts with at least ``min(floor, size)`` a tensor, taken from the others in
    proportion to what they hold above the floor; the total stays.

    Raises:
        InputError: the floors alone are more than the total.
    """
    lowest = {n: min(floor, size[n]) for n in counts}
    total = sum(counts.values())
    if sum(lowest.values()) > total:
        raise InputError(
            "floor", floor, f"a floor whose sum over tensors is at most {total} weights"
        )
    raised = {n: max(counts[n], lowest[n]) for n in counts}
    excess = sum(raised.values()) - total
    spare = {n: raised[n] - lowest[n] for n in counts}
    room = sum(spare.values())
    if excess == 0:
        return raised
    share = {n: (raised[n] - excess * spare[n] / room) / size[n] for n in counts}
    return counts_from_densities(share, size, total)


def allocate_counts(
    scores: Mapping[str, Tensor],
    keep: int,
    method: str | Mapping[str, float] = "global",
    *,
    floor: int = 0,
    **options: object,
) -> dict[str, int]:
    """How many weights each tensor keeps; the sum is exactly `keep`.

    Args:
        scores: saliency by name, in network order; its shapes are the weights' shapes.
        keep: weights to keep over all tensors.
        method: one of `METHODS`, or an explicit density by name (such as the ratios of SNIP
            or GraSP, `secateurs.parts.saliency`).
        floor: least number of weights in any tensor.
        options: further arguments of `densities`.
    """
    size = sizes(scores)
    total = sum(size.values())
    require(0 <= keep <= total, "keep", keep, f"0 to {total} weights")
    if not isinstance(method, str):
        missing = [n for n in scores if n not in method]
        require(not missing, "allocation", sorted(method), f"a density for each of {missing}")
        counts = counts_from_densities({n: method[n] for n in scores}, size, keep)
    elif method == "global":
        counts = {n: int(m.sum()) for n, m in largest_by_name(scores, keep).items()}
    elif method == "lamp":
        ranked = largest_by_name(lamp_scores(scores), keep)
        counts = {n: int(m.sum()) for n, m in ranked.items()}
    elif method in SHAPE_METHODS:
        shapes = {n: tuple(s.shape) for n, s in scores.items()}
        share = (
            densities(shapes, keep / total, method, **options)  # type: ignore[arg-type]
            if keep
            else dict.fromkeys(scores, 0.0)
        )
        counts = counts_from_densities(share, size, keep)
    else:
        raise unknown("allocation", method, METHODS)
    return with_floor(counts, size, floor) if floor else counts


def per_tensor_masks(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """In each tensor, the mask of its `counts` largest scores."""
    return {n: select_largest([scores[n]], counts[n])[0] for n in scores}


def water_fill(
    scores: Mapping[Name, float],
    sizes: Mapping[Name, int],
    sparsity: float,
    max_sparsity: float | None = None,
) -> dict[Name, float]:
    """A sparsity per group: all keep a floor, the rest is handed out by score (ECoFLaP).

    The int((1 − sparsity) · Σ size) weights that stay begin with ⌈(1 − max_sparsity) · size⌉ in
    every group; what is left goes round after round as ⌈s / Σs · rest⌉, full groups dropping
    out. What the rounding handed out too much is taken back from the largest group. (The
    published code adds it once more, and misses the budget by up to twice the number of groups.)

    Args:
        scores: importance of a group, 0 or more; all zero means the same sparsity everywhere.
        sizes: weights of a group.
        sparsity: of all groups together, in [0, 1).
        max_sparsity: of any group, exceeded by less than a weight where whole weights do not
            allow it; `default_cap` of `sparsity` by default.

    Raises:
        InputError: a cap below `sparsity` or 1 and above, a score that is negative or NaN.

    Source: arXiv 2310.02998.
    """
    require(0 <= sparsity < 1, "sparsity", sparsity, "a fraction in [0, 1)")
    cap = default_cap(sparsity) if max_sparsity is None else max_sparsity
    require(sparsity <= cap < 1, "max_sparsity", cap, f"{sparsity:g}, the sparsity, up to below 1")
    for name, score in scores.items():
        valid = score >= 0 and score != float("inf")
        require(valid, f"scores {name}", score, "a finite number, 0 or more")
    size = {name: sizes[name] for name in scores}
    # 0.1 · 1000 may be a hair above 100, or below it
    keep = int((1 - sparsity) * sum(size.values()) + 1e-6)
    floor = {n: ceil((1 - cap) * size[n] - 1e-6) for n in size}
    if not any(scores.values()) or sum(floor.values()) > keep:
        kept = counts_from_densities(dict.fromkeys(size, 1 - sparsity), size, keep)
    else:
        kept = _filled(scores, size, floor, keep)
    return {n: 1 - kept[n] / size[n] for n in size}


def fill_log_densities(
    costs: Sequence[Sequence[float]], limits: Sequence[float], cap: float = 1.0
) -> tuple[list[float], list[float]]:
    """Densities of largest Σ log p within one or two limits Σ_l cost_l · p_l ≤ limit.

    p_l = min(cap, 1 / Σ_k μ_k cost_kl), multipliers μ ≥ 0: under one limit, tensors that are not
    full keep the same amount 1/μ each, whatever their size.

    Args:
        costs: by limit, of every tensor when whole, above 0.
        cap: largest density; infinity for none.

    Returns:
        The densities, and the multiplier of every limit (0 where it is slack).

    Raises:
        InputError: none or more than two limits, a limit or cost that is not above 0.

    Source: arXiv 2203.02549, equation of SynExp.
    """
    require(len(limits) in (1, 2), "limits", list(limits), "one or two")
    require(len(costs) == len(limits), "costs", len(costs), f"costs for {len(limits)} limits")
    cost = np.array(costs, dtype=float)
    for value in (*cost.ravel().tolist(), *limits):
        require(0 < value < float("inf"), "costs and limits", value, "finite numbers above 0")
    require(cap > 0, "cap", cap, "above 0")

    def shares(multipliers: Sequence[float]) -> np.ndarray:
        price = np.array(multipliers) @ cost
        with np.errstate(divide="ignore"):
            return np.minimum(cap, 1 / price)

    def least(number: int, others: Callable[[float], list[float]]) -> list[float]:
        """The multipliers with the smallest own one under which a limit holds."""

        def spent(own: float) -> float:
            return float(cost[number] @ shares(others(own)))

        if spent(0.0) <= limits[number]:
            return others(0.0)
        # 1/(μ cost) alone spends a unit of 1/μ per tensor
        low, high = 0.0, cost.shape[1] / limits[number]
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) > limits[number] else (low, middle)
        return others(high)

    if len(limits) == 1:
        multipliers = least(0, lambda own: [own])
    else:
        multipliers = least(1, lambda second: least(0, lambda first: [first, second]))
    return shares(multipliers).tolist(), multipliers


def default_cap(sparsity: float) -> float:
    """0.1 above the sparsity, and at most half of the way from there to 1."""
    return min(sparsity + 0.1, (1 + sparsity) / 2)


def _filled(
    scores: Mapping[Name, float], size: Mapping[Name, int], floor: Mapping[Name, int], keep: int
) -> dict[Name, int]:
    kept = dict(floor)
    while (rest := keep - sum(kept.values())) > 0:
        open_ones = [n for n in kept if kept[n] < size[n]]
        weight = {n: float(scores[n]) for n in open_ones}
        if not any(weight.values()):
            weight = {n: float(size[n]) for n in open_ones}
        total = sum(weight.values())
        for name in open_ones:
            more = ceil(weight[name] / total * rest - 1e-9)
            kept[name] = min(size[name], kept[name] + more)
    excess = -rest
    for name in sorted(kept, key=lambda n: -kept[n]):
        back = min(excess, kept[name] - floor[name])
        kept[name] -= back
        excess -= back
    return kept


CFSP_SCALE = 13.1072
"""The published code divides sums over 128 sequences of 1024 tokens by 10000; of means over
tokens, that is this factor."""


def sigmoid_weights(scores: Tensor, alpha: float = 1.0, scale: float = CFSP_SCALE) -> Tensor:
    """w = σ(alpha · scale · (score − mean score)), float64 (CFSP, arXiv 2409.13199)."""
    scores = scores.double()
    require(bool(torch.isfinite(scores).all()), "scores", scores.tolist(), "finite numbers")
    return torch.sigmoid(alpha * scale * (scores - scores.mean()))


def sigmoid_allocation(
    scores: Tensor,
    prune_ratio: float,
    alpha: float = 1.0,
    scale: float = CFSP_SCALE,
    margin: float = 1.05,
    sizes: Tensor | None = None,
) -> Tensor:
    """Share that stays of every block: k = (w / mean w) · (1 − prune_ratio), with w of
    `sigmoid_weights`.

    Where the largest would reach 1, the spread of w is first narrowed until it is just below:
    w ← mean w + f (w − mean w), f = mean w · p / (1 − p) / (max w − mean w) / margin.

    Args:
        scores: (blocks,), importance a token; higher keeps more.
        prune_ratio: p, share of all units that goes, in [0, 1).
        alpha: 0 is the same share everywhere.
        margin: above 1.
        sizes: (blocks,), units of every block, over which the mean is then taken; all equal by
            default.

    Returns:
        (blocks,), float64, of mean 1 − p.

    Source: arXiv 2409.13199 and its code, with the constant that does not depend on the number
    of tokens.
    """
    require(0 <= prune_ratio < 1, "prune_ratio", prune_ratio, "a share in [0, 1)")
    require(alpha >= 0, "alpha", alpha, "0 or more")
    require(margin >= 1, "margin", margin, "1 or more")
    weight = sigmoid_weights(scores, alpha, scale)
    size = torch.ones_like(weight) if sizes is None else sizes.double()
    mean, largest = (weight * size).sum() / size.sum(), weight.max()
    left = 1 - prune_ratio
    if largest > mean and largest / mean * left >= 1:
        factor = mean * (1 / left - 1) / (largest - mean) / margin
        weight = mean + (weight - mean) * factor
    return weight / mean * left


def importance_ranks(weights: Tensor, mean_rank: float = 8) -> list[int]:
    """A rank per block in proportion to its weight, at least 1 (CFSP's recovery by LoRA).

    r = mean_rank · w / mean w, in whole numbers whose total is mean_rank · blocks where the
    least of 1 allows it.

    Args:
        weights: (blocks,), above 0, such as `sigmoid_weights`.
    """
    require(mean_rank >= 1, "mean_rank", mean_rank, "at least 1")
    weights = weights.double()
    valid = weights.numel() > 0 and bool((weights > 0).all() & torch.isfinite(weights).all())
    require(valid, "weights", weights.tolist(), "finite numbers above 0")
    total = round(mean_rank * len(weights))
    names = [f"{place:09}" for place in range(len(weights))]
    share = dict(zip(names, (weights / weights.sum()).tolist(), strict=True))
    ranks = counts_from_densities(share, dict.fromkeys(names, total), total)
    return list(with_floor(ranks, dict.fromkeys(names, total), 1).values())
