"""What the survivors of random dropping are divided by.

Of an output h = Σ c_j every term is kept with probability 1 - p and divided by q. With S = Σ c_j
and Q = Σ c_j²,

    E (h - ĥ)² = (S - (1-p) S/q)² + p(1-p) Q/q²,     least at q* = (1-p) + p Q/S²,
    P(|h - ĥ| > t) <= 2 exp( -t² (1-p)² / (Φ(p) Q) )     at q = 1-p,
    Φ(p) = (1-2p) / ln((1-p)/p).

The division by 1-p (DARE) is unbiased; a larger q trades a bias for less noise. Bound and
analytic rule are of "DARE the Extreme", arXiv 2410.09344; the mean square and its minimum were
derived for this library.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from secateurs.errors import require

HIGHEST, STEP = 0.998, 0.001
"""The analytic rule's grid ends here, and its step."""


def phi(p: float) -> float:
    """Φ(p), symmetric about its largest value 1/2 at p = 1/2, and 0 at both ends."""
    require(0 <= p <= 1, "p", p, "a drop rate in [0, 1]")
    away = 1 - 2 * p
    if away == 0:
        return 0.5
    # ln((1-p)/p) = 2 artanh(1-2p), which does not cancel near p = 1/2
    return 0.0 if abs(away) == 1 else away / (2 * math.atanh(away))


def error_bound(squares: float, p: float, gamma: float = 0.05) -> float:
    """What |h - ĥ| of DARE exceeds with probability gamma at most, for Q = `squares`."""
    require(0 <= p < 1, "p", p, "a drop rate in [0, 1)")
    require(0 < gamma < 1, "gamma", gamma, "a probability in (0, 1)")
    return math.sqrt(phi(p) * squares * math.log(2 / gamma)) / (1 - p)


def expected_square(total: float, squares: float, p: float, q: float) -> float:
    """E (h - ĥ)² for S = `total` and Q = `squares`."""
    return (total - (1 - p) * total / q) ** 2 + p * (1 - p) * squares / q**2


def least_error_q(total: float, squares: float, p: float) -> float:
    """The q of the least E (h - ĥ)²; never below 1 - p."""
    require(total != 0, "total", total, "a sum that is not 0: without one, a larger q is better")
    return (1 - p) + p * squares / total**2


def row_q(
    contributions: Tensor,
    p: float,
    eta: float,
    *,
    gamma: float = 0.05,
    stop: float = 0.8,
    mode: Literal["exact", "release"] = "exact",
    absolute: bool = True,
) -> Tensor:
    """The analytic q of every output of a layer, from what its inputs contribute on average.

    Over q in {1-p, 1-p + 0.001, ..., 0.998}, the least

        |f(q)|,   f(q) = η (1 - (1-p)/q) S + η² Φ(p) Q / (4q²) + ln(2/γ);

    of equal ones the largest q.

    Args:
        contributions: (outputs, inputs), δ_ij x̄_j; a bias is one more input.
        eta: η.
        gamma: the probability with which the bound may fail.
        mode: ``exact`` in float64. ``release``, as the authors' code has it: in float16, row by
            row the latest q that is no worse than all before; a row is flagged the first time
            that it does not improve, and the scan ends for all when a share `stop` is flagged.
            Ties of rounding flag rows long before the minimum; published η were tuned with that.
        absolute: False takes the least f instead of the least |f|, which with S < 0 may be where
            f crosses 0.

    Returns:
        (outputs,), float64.
    """
    require(0 <= p < 1, "p", p, "a drop rate in [0, 1)")
    half = mode == "release"
    terms = contributions.to(torch.float16 if half else torch.float64)
    total, squares = terms.sum(1), terms.square().sum(1)
    spread, certainty = eta**2 * phi(p), math.log(2 / gamma)
    best = torch.full_like(total, 10_000.0 if half else math.inf)
    chosen = torch.full_like(total, 1 - p, dtype=torch.float64)
    flagged = torch.zeros_like(total, dtype=torch.bool)
    for step in range(math.floor((HIGHEST - (1 - p)) / STEP + 1e-9) + 1):
        q = (1 - p) + step * STEP
        bias = (1 - (1 - p) / q) * total
        value = eta * bias + (spread * squares / (4 * q**2) + certainty)
        value = value.abs() if absolute else value
        better = value <= best
        flagged |= value >= best
        best = torch.where(better, value, best)
        chosen[better] = q
        if half and flagged.double().mean() >= stop:
            break
    return chosen


@dataclass(frozen=True)
class Grid:
    """A coarse search and a fine one around its best value.

    Attributes:
        low, high: the range.
        step: of the coarse grid.
        decay: the fine step is so much of the coarse one.
        patience: a grid is left after more consecutive values without improvement than this.
    """

    low: float
    high: float
    step: float = 0.05
    decay: float = 0.1
    patience: int = 3

    def __post_init__(self) -> None:
        require(0 < self.low <= self.high, "low", self.low, f"above 0, at most {self.high:g}")
        require(self.step > 0, "step", self.step, "above 0")
        require(0 < self.decay < 1, "decay", self.decay, "a factor in (0, 1)")
        require(self.patience >= 0, "patience", self.patience, "0 or more")

    def search(self, score: Callable[[float], float]) -> tuple[float, list[dict[str, Any]]]:
        """The value of the highest score, of equal ones the later, and all that was tried.

        The fine grid lies between the coarse neighbours of the best coarse value.
        """
        tried: list[dict[str, Any]] = []
        self._walk("coarse", self.low, self.high, self.step, score, tried)
        middle = _best(tried)["value"]
        fine = self.step * self.decay
        low = max(self.low + fine, middle - self.step + fine)
        self._walk("fine", low, min(middle + self.step - fine, self.high), fine, score, tried)
        return _best(tried)["value"], tried

    def _walk(
        self,
        grid: str,
        low: float,
        high: float,
        step: float,
        score: Callable[[float], float],
        tried: list[dict[str, Any]],
    ) -> None:
        known = {row["value"]: row["score"] for row in tried}
        best, misses = -math.inf, 0
        for number in range(math.floor((high - low) / step + 1e-9) + 1):
            value = round(low + number * step, 12)
            found = known[value] if value in known else score(value)
            tried.append({"grid": grid, "value": value, "score": found})
            if found >= best:
                best, misses = found, 0
            else:
                misses += 1
            if misses > self.patience:
                return


def _best(tried: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return max(enumerate(tried), key=lambda row: (row[1]["score"], row[0]))[1]


def mean_without(values: Sequence[float], outliers: int) -> float:
    """The mean, after the value farthest from it was taken out, so many times."""
    left = list(values)
    for _ in range(outliers):
        middle = statistics.fmean(left)
        left.remove(max(left, key=lambda v: abs(v - middle)))
    return statistics.fmean(left)


def spread(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A number for every tensor from those of some weights.

    A bias takes its weight's; what has none (embeddings, norms) the mean of all.
    """
    mean = sum(found.values()) / len(found)
    weights = {name: name.removesuffix("bias") + "weight" for name in names}
    return {name: found.get(name, found.get(weights[name], mean)) for name in names}
