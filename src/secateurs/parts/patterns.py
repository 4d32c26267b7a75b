"""The shape a mask must have: single weights, N:M groups, blocks, rows.

A pattern turns a tensor of scores into one score per unit (`pool`) and a decision per unit
back into a mask (`expand`). N:M fixes how many units each group keeps; the others leave the
count to an allocation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from secateurs.errors import InputError, described, require

T = TypeVar("T", bound=Tensor)

RANKED = 16
"""Groups up to so long are ranked by comparing all pairs, longer ones are sorted."""


class Pattern(Protocol):
    """What all patterns answer."""

    def pool(self, scores: Tensor) -> Tensor:
        """One score per unit, 1-D, from scores of a tensor's shape."""
        ...

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """A bool mask of `shape` from one bool per unit."""
        ...

    def unit_sizes(self, shape: torch.Size) -> Tensor:
        """How many weights each unit holds, 1-D int64."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Every weight is a unit."""

    def pool(self, scores: Tensor) -> Tensor:
        return scores.reshape(-1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.reshape(shape)

    def unit_sizes(self, shape: torch.Size) -> Tensor:
        return torch.ones(shape.numel(), dtype=torch.int64)

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block:
    """Tiles of `rows` x `cols` in the matrix (output, everything else); edges hold fewer.

    A tile's score is the mean (`avg`) or the largest (`max`) score inside it.
    """

    rows: int
    cols: int
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        require(self.rows >= 1 and self.cols >= 1, "block", (self.rows, self.cols), "sizes >= 1")
        require(self.pooling in ("avg", "max"), "pool", self.pooling, "avg or max")

    def _grid(self, shape: torch.Size) -> tuple[int, int]:
        matrix = _matrix_shape(shape)
        return -(-matrix[0] // self.rows), -(-matrix[1] // self.cols)

    def pool(self, scores: Tensor) -> Tensor:
        rows, cols = _matrix_shape(scores.shape)
        padded = scores.reshape(1, 1, rows, cols)
        pad = (0, -cols % self.cols, 0, -rows % self.rows)
        window = (self.rows, self.cols)
        if self.pooling == "max":
            padded = F.pad(padded, pad, value=-torch.inf)
            return F.max_pool2d(padded, window).reshape(-1)
        total = F.avg_pool2d(F.pad(padded, pad), window, divisor_override=1).reshape(-1)
        return total / self.unit_sizes(scores.shape).to(total)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        rows, cols = _matrix_shape(shape)
        tiles = kept.reshape(self._grid(shape))
        full = tiles.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)
        return full[:rows, :cols].reshape(shape)

    def unit_sizes(self, shape: torch.Size) -> Tensor:
        rows, cols = _matrix_shape(shape)
        grid = self._grid(shape)
        heights = torch.full((grid[0],), self.rows)
        widths = torch.full((grid[1],), self.cols)
        heights[-1] -= -rows % self.rows
        widths[-1] -= -cols % self.cols
        return (heights[:, None] * widths[None, :]).reshape(-1)

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}" + ("" if self.pooling == "avg" else ":max")


@dataclass(frozen=True)
class Row:
    """All weights of one output unit (a neuron or a filter); its score is their sum.

    With magnitude scores that is the L1 norm of the filter (Li et al., arXiv 1608.08710).
    """

    def pool(self, scores: Tensor) -> Tensor:
        return scores.reshape(scores.shape[0], -1).sum(1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        return kept.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()

    def unit_sizes(self, shape: torch.Size) -> Tensor:
        return torch.full((shape[0],), shape.numel() // shape[0])

    def __str__(self) -> str:
        return "row"


@dataclass(frozen=True)
class NM:
    """In every group of `m` consecutive inputs of an output, exactly `n` weights stay.

    Groups run along the input channels (dimension 1), kernel position by kernel position, as
    the sparse tensor cores ask for.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        require(0 < self.n <= self.m, "pattern", f"{self.n}:{self.m}", "N:M with 0 < N <= M")

    def fits(self, shape: torch.Size) -> bool:
        """Whether dimension 1 divides into groups of m."""
        return len(shape) >= 2 and shape[1] % self.m == 0

    def groups(self, scores: Tensor) -> Tensor:
        """Scores as rows of one group each: (number of groups, m)."""
        if not self.fits(scores.shape):
            raise InputError(
                "pattern",
                str(self),
                f"an input dimension that {self.m} divides, not the shape {tuple(scores.shape)}",
            )
        return scores.movedim(1, -1).reshape(-1, self.m)

    def mask(self, scores: Tensor) -> Tensor:
        """The mask that keeps the n largest scores of each group, earlier ones on ties."""
        groups = self.groups(scores)
        if self.m <= RANKED:
            kept = _ranks(groups) < self.n
        else:
            order = groups.argsort(dim=1, descending=True, stable=True)
            kept = torch.zeros_like(groups, dtype=torch.bool)
            kept.scatter_(1, order[:, : self.n], True)
        moved = scores.movedim(1, -1).shape
        return kept.reshape(moved).movedim(-1, 1).contiguous()

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def _ranks(groups: Tensor) -> Tensor:
    """How many of its group are larger than each number, equal ones before it counting too.

    Comparing columns is many times faster than sorting millions of short rows.
    """
    columns = groups.t().contiguous()
    ranks = torch.zeros(columns.shape, dtype=torch.uint8, device=columns.device)
    for later in range(1, len(columns)):
        for earlier in range(later):
            wins = columns[later] > columns[earlier]
            ranks[earlier] += wins
            ranks[later] += ~wins
    return ranks.t()


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    if len(shape) < 2:
        raise InputError("pattern", described(f"a tensor of shape {tuple(shape)}"), "2-D or more")
    return shape[0], shape[1:].numel()


def parse_pattern(text: str) -> Pattern | NM:
    """A pattern by name: ``unstructured``, ``row``, ``block:RxC``, ``block:RxC:max``, ``N:M``."""
    if text == "unstructured":
        return Unstructured()
    if text == "row":
        return Row()
    if match := re.fullmatch(r"block:(\d+)x(\d+)(?::(avg|max))?", text):
        pooling: Literal["avg", "max"] = "max" if match[3] == "max" else "avg"
        return Block(int(match[1]), int(match[2]), pooling)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    raise InputError("pattern", text, "unstructured, row, block:RxC, block:RxC:max or N:M")


def best_units(
    units: Mapping[str, Tensor], sizes: Mapping[str, Tensor], keep: int
) -> dict[str, Tensor]:
    """The best units, in order of score, whose weights come closest to `keep` in all."""
    names = sorted(units)
    flat = torch.cat([units[n] for n in names])
    order = flat.argsort(descending=True, stable=True)
    weights = torch.cat([sizes[n] for n in names])[order.cpu()].cumsum(0)
    with_none = torch.cat([weights.new_zeros(1), weights])
    count = int((with_none - keep).abs().argmin())
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[order[:count]] = True
    parts = chosen.split([units[n].numel() for n in names])
    masks = dict(zip(names, parts, strict=True))
    return {n: masks[n] for n in units}


def fitting(params: Mapping[str, T], pattern: NM) -> tuple[dict[str, T], list[str]]:
    """The weights whose input dimension the pattern divides, and a note on the others.

    Raises:
        InputError: there is none.
    """
    fits = {n: p for n, p in params.items() if pattern.fits(p.shape)}
    if not fits:
        raise InputError("budget", str(pattern), f"a model with inputs that {pattern.m} divides")
    dense = [n for n in params if n not in fits]
    note = f"left dense, {pattern.m} does not divide the input dimension: {', '.join(dense)}"
    return fits, [note] if dense else []
