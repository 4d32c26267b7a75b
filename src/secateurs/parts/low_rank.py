"""Kernels of low rank: as matrices, cut to a rank, priced by what the two thin layers cost.

A kernel W (N, C, kh, kw), N outputs, is one matrix or a stack of them:

    NC   M = W as (N, C·kh·kw)               kh x kw to r channels, then 1x1
    VH   M[(c, i), (n, j)] = W[n, c, i, j]   kh x 1 to r channels, then 1 x kw
    ND   M_n = W[n] as (C, kh·kw), of each   1x1 to r channels an output, then kh x kw over the
         output                              channels of each output alone

(arXiv 1812.02402, 2004.14566; ND is the network decoupling of arXiv 1808.05517.) A linear weight
(N, C) is a 1x1 kernel, for which NC is the matrix itself. Singular value decompositions are made
in float32 at least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateurs.errors import InputError, require, unknown

Mode = Literal["NC", "VH", "ND"]
MODES: tuple[Mode, ...] = ("NC", "VH", "ND")

Shape = tuple[int, int, int, int]
"""(N, C, kh, kw) of a kernel."""


def kernel_shape(shape: Sequence[int]) -> Shape:
    """(N, C, kh, kw) of a weight: of a linear one (N, C) the kernel is 1x1.

    Raises:
        InputError: neither two nor four dimensions.
    """
    require(len(shape) in (2, 4), "weight", tuple(shape), "(N, C) or (N, C, kh, kw)")
    outputs, inputs, height, width = (*shape, 1, 1)[:4]
    return outputs, inputs, height, width


def matricise(weight: Tensor, mode: Mode) -> Tensor:
    """The stack of matrices of a weight: (1, rows, columns), for ND (N, C, kh·kw)."""
    n, c, kh, kw = kernel_shape(weight.shape)
    if mode == "NC":
        return weight.reshape(1, n, c * kh * kw)
    if mode == "VH":
        spread = weight.reshape(n, c, kh, kw).permute(1, 2, 0, 3)
        return spread.reshape(1, c * kh, n * kw)
    if mode == "ND":
        return weight.reshape(n, c, kh * kw)
    raise unknown("mode", mode, MODES)


def dematricise(matrices: Tensor, mode: Mode, shape: Sequence[int]) -> Tensor:
    """The weight of `shape` whose stack of matrices this is: the inverse of `matricise`."""
    n, c, kh, kw = kernel_shape(shape)
    if mode == "VH":
        return matrices.reshape(c, kh, n, kw).permute(2, 0, 1, 3).reshape(tuple(shape))
    if mode in MODES:
        return matrices.reshape(tuple(shape))
    raise unknown("mode", mode, MODES)


def full_rank(shape: Sequence[int], mode: Mode) -> int:
    """The largest rank that a matrix of the stack can have."""
    n, c, kh, kw = kernel_shape(shape)
    sides = {"NC": (n, c * kh * kw), "VH": (c * kh, n * kw), "ND": (c, kh * kw)}
    return min(sides[mode])


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of a weight's matrices.

    Attributes:
        left: (stack, rows, k), orthonormal columns.
        values: (stack, k), falling.
        right: (stack, k, columns), orthonormal rows.
        mode, shape, dtype: of the weight that was decomposed.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    mode: Mode
    shape: tuple[int, ...]
    dtype: torch.dtype

    def truncated(self, ranks: Tensor | int) -> Tensor:
        """The weight with `ranks` triplets kept: one number, or one a matrix of the stack."""
        kept = self.values * self._kept(ranks)
        return self._weight((self.left * kept[:, None]) @ self.right)

    def nuclear_subgradient(self, ranks: Tensor | int) -> Tensor:
        """G = U_k V_kᵀ as a weight: a sub-gradient of Σσ, the nuclear norm, at `truncated`."""
        kept = self._kept(ranks).to(self.values.dtype)
        return self._weight((self.left * kept[:, None]) @ self.right)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(stack, rows, rank) and (stack, rank, columns), whose product is `truncated(rank)`.

        The values go half into each, for VH all into the second, as in the public code.
        """
        require(1 <= rank <= self.values.shape[1], "rank", rank, f"1 to {self.values.shape[1]}")
        left, right = self.left[..., :rank], self.right[:, :rank]
        values = self.values[:, :rank]
        if self.mode == "VH":
            return left, values[..., None] * right
        roots = values.sqrt()
        return left * roots[:, None], roots[..., None] * right

    def _kept(self, ranks: Tensor | int) -> Tensor:
        most = self.values.shape[1]
        wanted = torch.as_tensor(ranks, device=self.values.device)
        inside = bool((wanted >= 1).all()) and bool((wanted <= most).all())
        require(inside, "rank", wanted.tolist(), f"1 to {most}")
        places = torch.arange(most, device=self.values.device)
        return places < wanted.expand(len(self.values))[:, None]

    def _weight(self, matrices: Tensor) -> Tensor:
        return dematricise(matrices, self.mode, self.shape).to(self.dtype)


@torch.no_grad()
def spectrum(weight: Tensor, mode: Mode) -> Spectrum:
    """Decompose a weight.

    Raises:
        torch.linalg.LinAlgError: the decomposition failed, as it does on NaN and Inf.
    """
    matrices = matricise(weight.detach(), mode)
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    return Spectrum(left, values, right, mode, tuple(weight.shape), weight.dtype)


@dataclass(frozen=True)
class EnergyRule:
    """The fewest values whose squares have a share of the sum of all squares."""

    share: float

    def __post_init__(self) -> None:
        require(0 < self.share < 1, "energy", self.share, "a share in (0, 1)")

    def ranks(self, values: Tensor) -> Tensor:
        """(…, k) falling values -> (…) ranks of at least 1."""
        held = energy_before(values)
        return (held < self.share).sum(-1).clamp(min=1)


@dataclass(frozen=True)
class LinearRule:
    """A share of all values, rounded down."""

    rate: float

    def __post_init__(self) -> None:
        require(0 < self.rate <= 1, "linear", self.rate, "a rate in (0, 1]")

    def ranks(self, values: Tensor) -> Tensor:
        """(…, k) falling values -> (…) ranks of at least 1."""
        rank = max(1, int(values.shape[-1] * self.rate))
        return torch.full(values.shape[:-1], rank, device=values.device)


@dataclass(frozen=True)
class ValueRule:
    """The leading values that are at least so large."""

    least: float

    def __post_init__(self) -> None:
        require(self.least >= 0, "value", self.least, "0 or more")

    def ranks(self, values: Tensor) -> Tensor:
        """(…, k) falling values -> (…) ranks of at least 1."""
        return (values >= self.least).int().cumprod(-1).sum(-1).clamp(min=1)


RankRule = EnergyRule | LinearRule | ValueRule
_RULES: dict[str, type[RankRule]] = {
    "energy": EnergyRule,
    "linear": LinearRule,
    "value": ValueRule,
}


def parse_rule(text: str) -> RankRule:
    """A rule as people write it: ``energy:0.9``, ``linear:0.25`` or ``value:0.05``.

    Raises:
        InputError: another kind, or a number that the kind does not take.
    """
    kind, _, number = text.partition(":")
    if kind not in _RULES:
        raise unknown("rule", text, [f"{kind}:NUMBER" for kind in _RULES])
    try:
        value = float(number)
    except ValueError:
        raise InputError("rule", text, f"{kind}:NUMBER") from None
    return _RULES[kind](value)


def energy_before(values: Tensor) -> Tensor:
    """Share of the energy Σσ² that the values before each one hold, in float64.

    A matrix of zeros holds all of it in nothing: its first share is 0 and the rest are 1.
    """
    squares = values.double().square()
    sums = squares.cumsum(-1)
    total = sums[..., -1:]
    shares = torch.where(total > 0, sums / total, torch.ones_like(sums))
    return torch.cat([torch.zeros_like(total), shares[..., :-1]], -1)


@dataclass(frozen=True)
class RankPrice:
    """What a layer costs by its rank: `a_rank` each, or `dense` where that is no more.

    Attributes:
        dense: cost of the layer as it is.
        a_rank: of the two thin layers together, for every rank.
        most: the full rank.
    """

    dense: int
    a_rank: int
    most: int

    def at(self, rank: int) -> int:
        """The cost with this rank: the dense layer stays where two are no cheaper."""
        return min(self.dense, self.a_rank * rank)

    def is_cheaper(self, rank: int) -> bool:
        """Whether two thin layers cost less than the dense one."""
        return self.a_rank * rank < self.dense


def weights_a_rank(shape: Sequence[int], mode: Mode) -> tuple[int, int]:
    """Weights of the first and of the second thin layer for every rank."""
    n, c, kh, kw = kernel_shape(shape)
    counts = {"NC": (c * kh * kw, n), "VH": (c * kh, n * kw), "ND": (n * c, n * kh * kw)}
    if mode not in counts:
        raise unknown("mode", mode, MODES)
    return counts[mode]


@dataclass(frozen=True)
class Ranks:
    """Ranks that meet a budget.

    Attributes:
        by_name: rank of each layer; the full one where the layer stays dense.
        cost: of all layers together.
        step: the least that one more rank would have cost; 0 where all have their full rank.
    """

    by_name: dict[str, int]
    cost: int
    step: int


def ranks_within(
    values: Mapping[str, Tensor], prices: Mapping[str, RankPrice], target: float
) -> Ranks:
    """The ranks of one energy share for all layers, the largest share that `target` pays.

    A layer gets its rank k + 1 when the share is above the energy of its first k values (of a
    stack of matrices: of the one where that is least, as all get the rank of the most demanding).
    So the ranks are granted in the order of that energy, which is what bisecting the share does.
    What is left when a rank is too dear goes to the next ones in order that can be paid, so one
    rank of the cheapest layer is what the cost may be short of the target by.

    Args:
        values: (stack, k) falling singular values by layer.
        target: what all layers together may cost.

    Raises:
        InputError: rank 1 everywhere costs more.
    """
    ranks = dict.fromkeys(values, 1)
    cost = sum(prices[name].at(1) for name in ranks)
    if cost > target:
        raise InputError("budget", f"{target:.6g} for the layers of low rank", f"at least {cost}")
    steps = []
    for place, (name, own) in enumerate(values.items()):
        held = energy_before(own).amin(0).tolist()
        steps += [(energy, place, rank, name) for rank, energy in enumerate(held) if rank >= 1]
    refused: dict[str, int] = {}
    for _, _, rank, name in sorted(steps):
        if name in refused:
            continue
        more = prices[name].at(rank + 1) - prices[name].at(rank)
        if cost + more > target:
            refused[name] = more
        else:
            ranks[name], cost = rank + 1, cost + more
    return Ranks(ranks, cost, min(refused.values(), default=0))
