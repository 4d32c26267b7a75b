"""The PQ index: how unequal the magnitudes of a vector are, from 0 to nearly 1.

Source: "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023, arXiv 2302.05601.
I_{p,q}(w) = 1 − d^(1/q − 1/p) ‖w‖_p / ‖w‖_q = 1 − M_p / M_q with the power means
M_r = (mean |w|^r)^(1/r). Computed from means of scaled magnitudes in float64: the sums of the
public code overflow float32 at about 10^4 weights for p = 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateurs.errors import require

Scope = Literal["global", "layer", "neuron"]


def check_norms(p: float, q: float) -> None:
    """Raise `InputError` unless 0 < p < q."""
    require(p > 0, "p", p, "above 0")
    require(q > p, "q", q, f"above p = {p}")


def pq_index(
    weights: Tensor,
    p: float = 0.5,
    q: float = 1.0,
    mask: Tensor | None = None,
    dim: int | None = None,
) -> Tensor:
    """The index of the surviving entries, float64.

    Args:
        weights: any shape.
        p, q: 0 < p < q.
        mask: True = survivor; d counts survivors only, exact zeros among them included.
        dim: entries along this dimension form one vector each; all together when None.

    Returns:
        A scalar, or the shape of `weights` without `dim`. A vector without survivors, or with
        zeros only, has index 0.
    """
    check_norms(p, q)
    require(bool(torch.isfinite(weights).all()), "weights", "NaN or Inf", "finite weights")
    size = weights.detach().double().abs()
    alive = torch.ones_like(size) if mask is None else mask.double()
    if dim is None:
        size, alive, dim = size.reshape(-1), alive.reshape(-1), 0
    size = size * alive
    largest = size.amax(dim, keepdim=True) if size.shape[dim] else size.sum(dim, keepdim=True)
    scaled = size / torch.where(largest > 0, largest, torch.ones_like(largest))
    count = alive.sum(dim)

    def power_mean(r: float) -> Tensor:
        # 0^r is 0 for survivors that are zero and for the removed, which `count` leaves out
        mean = scaled.pow(r).sum(dim) / count.clamp_min(1)
        return torch.exp(mean.clamp_min(torch.finfo(torch.float64).tiny).log() / r)

    index = 1 - power_mean(p) / power_mean(q)
    usable = (count > 0) & (largest.squeeze(dim) > 0)
    return torch.where(usable, index.clamp_min(0.0), torch.zeros_like(index))


def pq_keep_bound(index: float, count: int, p: float, q: float, eta: float = 0.0) -> float:
    """Least number of the largest entries that hold their share, a real number.

    r ≥ d (1 + η)^(−q/(q − p)) (1 − I)^(pq/(q − p)), if keeping r entries leaves
    Σ_removed |w|^p ≤ η Σ_kept |w|^p.
    """
    check_norms(p, q)
    require(eta >= 0, "eta", eta, "0 or more")
    return float(count * (1 + eta) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p)))


def pq_prune_count(
    index: float,
    count: int,
    p: float,
    q: float,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
) -> int:
    """How many of `count` survivors SAP removes: floor(d · clamp(γ (1 − m/d), 0, β))."""
    if count == 0:
        return 0
    bound = pq_keep_bound(index, count, p, q, eta)
    # the bound is exact for equal magnitudes; rounding must not push it to the next integer
    keep = math.ceil(bound - 1e-9 * count)
    ratio = min(max(gamma * (1 - keep / count), 0.0), beta)
    return math.floor(count * ratio + 1e-9)


@dataclass
class PQIMonitor:
    """Follows the index over rounds: it falls, rises past the compressibility limit, collapses.

    Attributes:
        history: one index of all surviving weights a record.
        layers: the same a tensor.
    """

    p: float = 0.5
    q: float = 1.0
    history: list[float] = field(default_factory=list)
    layers: list[dict[str, float]] = field(default_factory=list)

    def record(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float:
        """Add the index of these weights under these masks."""
        alive = torch.cat([weights[n][m].reshape(-1) for n, m in masks.items()])
        self.history.append(float(pq_index(alive, self.p, self.q)))
        self.layers.append(
            {n: float(pq_index(weights[n], self.p, self.q, m)) for n, m in masks.items()}
        )
        return self.history[-1]

    @property
    def phase(self) -> Literal["regularising", "rising", "collapsing"]:
        """Where on its curve the index is: before its minimum, past it, or falling after."""
        if len(self.history) < 2:
            return "regularising"
        lowest = self.history.index(min(self.history))
        tail = self.history[lowest:]
        peak = max(tail)
        if tail[-1] > tail[0] and tail[-1] >= peak:
            return "rising"
        first_rise = next(
            (i for i in range(1, len(self.history)) if self.history[i] > self.history[i - 1]), None
        )
        if first_rise is not None and self.history[-1] < max(self.history[first_rise:]):
            return "collapsing"
        return "regularising"
