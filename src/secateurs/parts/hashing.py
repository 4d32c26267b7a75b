"""Which slot of a small array a weight is: universal hashes, maps by fold, hash and tile.

    u(x)     = ((a·x + b·x² + c) mod P) mod size          P = 2038074743, a prime
    u(x, y)  = ((a·x + b·y + c) mod P) mod size

Weights have locations 0 … n − 1, the slots are 0 … m − 1. All is exact in int64 for locations of
any size, on every device: x is taken modulo P first, so no product passes 2⁶². The `fold` map is
that of arXiv 2310.11611, `independent` that of HashedNets (arXiv 1504.04788), `tiled` that of ROAST
(arXiv 2207.10702).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateurs.errors import require

PRIME = 2038074743
"""Of the public code; arrays must be shorter."""

GradScale = Literal["v1", "v2", "v3", "v4", "v5", "none"]


@dataclass(frozen=True)
class UniversalHash:
    """A random function of integers.

    Attributes:
        a, b, c: odd, in (1, P).
    """

    a: int
    b: int
    c: int

    def __post_init__(self) -> None:
        for value in (self.a, self.b, self.c):
            require(1 < value < PRIME and value % 2 == 1, "hash", value, f"odd, in (1, {PRIME})")

    @staticmethod
    def drawn(seed: int) -> UniversalHash:
        """The function that a seed draws."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(2, PRIME - 1, (3,), generator=generator).tolist()
        return UniversalHash(*(value | 1 for value in drawn))

    def __call__(self, x: Tensor, size: int) -> Tensor:
        """u(x) in [0, size), for int64 `x` of at least 0."""
        return self._residues(x) % size

    def of_pair(self, x: Tensor, y: Tensor, size: int) -> Tensor:
        """u(x, y) in [0, size); `x` and `y` are broadcast."""
        return (self.a * (x % PRIME) + self.b * (y % PRIME) + self.c) % PRIME % size

    def signs(self, x: Tensor) -> Tensor:
        """−1 or +1 for every x, int8: the last bit of the residue."""
        return (self._residues(x) & 1).to(torch.int8) * 2 - 1

    def _residues(self, x: Tensor) -> Tensor:
        x = x % PRIME
        squares = x * x % PRIME
        return (self.a * x % PRIME + self.b * squares % PRIME + self.c) % PRIME


def fold(locations: Tensor, size: int, u: UniversalHash) -> Tensor:
    """Every chunk of `size` locations is the whole array, rotated by u(chunk).

    One to one where there are as many locations as slots; else loads differ by one at most.
    """
    chunks = locations // size
    return (u(chunks, size) + locations % size) % size


def independent(locations: Tensor, size: int, u: UniversalHash) -> Tensor:
    """A random slot for every location."""
    return u(locations, size)


def tiled(
    rows: Tensor, columns: Tensor, size: int, u: UniversalHash, block: tuple[int, int]
) -> Tensor:
    """A random place for every tile; inside, the tile's entries follow each other row by row.

    The public code takes the place modulo size − area, so that the last slot is never used; here
    it is size − area + 1.
    """
    height, width = block
    start = u.of_pair(rows // height, columns // width, size - height * width + 1)
    return start + rows % height * width + columns % width


def loads(slots: Iterable[Tensor], size: int) -> Tensor:
    """How many weights every slot stands for, (size,) int64."""
    total: Tensor | int = 0
    for own in slots:
        total = total + torch.bincount(own.flatten(), minlength=size)
    return torch.as_tensor(total)


def gradient_divisors(
    slots: Iterable[tuple[Tensor, float]], size: int, mode: GradScale = "v1"
) -> Tensor:
    """γ of every slot, float64, from the slots of each layer's weights and the layer's scale λ.

        v1  (Σλ)² / (n + 0.001)    v2  Σλ    v3  Σλ / n    v4  √Σλ²    v5  Σλ²

    over the n weights of the slot. With one λ everywhere, dividing the slot's gradient by v1 makes
    its weights move by the mean of their (signed) gradients, whatever λ is.
    """
    n = squares = scales = torch.zeros((), dtype=torch.float64)
    for own, scale in slots:
        count = torch.bincount(own.flatten(), minlength=size).double()
        n = n.to(count.device) + count
        scales = scales.to(count.device) + scale * count
        squares = squares.to(count.device) + scale**2 * count
    if mode == "none":
        return torch.ones_like(n)
    return {
        "v1": scales.square() / (n + 1e-3),
        "v2": scales,
        "v3": scales / n.clamp(min=1),
        "v4": squares.sqrt(),
        "v5": squares,
    }[mode]
