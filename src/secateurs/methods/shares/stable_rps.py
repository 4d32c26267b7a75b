"""STABLE-RPS: at initialisation all weights are made to read from one small array, then trained.

Paper: "In defense of parameter sharing for model-compression", ICLR 2024, arXiv 2310.11611; ROAST,
which it makes stable, is arXiv 2207.10702. The n weights of linear layers, convolutions and
embeddings are read from an array ψ of m < n numbers, uniform in (−σ₀, σ₀) at first:

    W_l = λ_l · G_l ⊙ ψ[h],   λ_l = std(W_l at initialisation) / σ₀,   G signs
    h(i) = (u(⌊i/m⌋) + i mod m) mod m          "random fold" over the locations i of all layers
    ψ.grad ← ψ.grad / (γ + 1e-6),  γ_i = (Σλ)² / (n_i + 0.001)  over the n_i weights of slot i

Biases start from zero and stay, as norms do. The fold is one to one at m = n, so nothing is lost
there; the division makes a weight move by the mean of the gradients of its slot, whatever σ₀ is.
It is hung on the optimizer (`secateurs.training.shared_gradients`) in every training that `prune`
drives; who trains in a loop of their own calls `rescale_gradients(model, optimizer)`, or has ROAST.
As updates are means, rates of about ten times the dense network's are wanted at high compression.

What falls is what is stored: parameters, gradients, momenta. Multiplications do not, and gathering
weights at every pass costs time: `tags` say so and so does a note in the outcome. ``params`` and
``bytes`` count the array, biases, norms and buffers; ``density`` and ``sparsity`` are m / n.
`secateurs.structure.shared.unshare` gives the plain network back.

Where the public code differs: it draws the hash of slots anew for every module, so the map is not
one to one at m = n, and 10 to 32 % of the slots stay unused (``per_module=true``); it keeps slots
and signs in memory, here they are computed (``cache=true``). A uniform array has the deviation
σ₀/√3, so weights start with 1/√3 of theirs; that is kept, and ``exact_std=true`` undoes it. γ is
that of the code, with its other modes v2 to v5; what the paper prints was not confirmed. Under Adam
the division does nothing, and σ₀ is a learning rate.

Measured on the digits (tests/replicas/test_stable_rps.py): at a 50th of the weights 0.967, where
SynFlow has 0.869 and a small dense network 0.931; at a 200th 0.899, 0.444 and 0.316; dense 0.987.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, require
from secateurs.method import Pruner
from secateurs.outcome import Outcome, Promise
from secateurs.parts.allocation import counts_from_densities
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import dense_bytes
from secateurs.parts.hashing import PRIME, GradScale, UniversalHash
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.structure.shared import (
    Map,
    Place,
    Shareable,
    SharedArray,
    memory_report,
    place_of,
    share,
    shareable,
)
from secateurs.task import Task
from secateurs.training.order import mix
from secateurs.workspace import Workspace

SLOTS, SIGNS, VALUES = 0, 1, 2
"""What a seed is drawn for."""


@register(
    "stable-rps",
    paper=Paper(
        "In defense of parameter sharing for model-compression", "ICLR", 2024, "2310.11611"
    ),
    tags=Tags("-", "share", "PBT", "rand", supervision="none"),
    budgets=("params", "bytes", "density", "sparsity"),
)
@dataclass(frozen=True)
class StableRPS(Pruner):
    """Many weights, one stored number: memory falls, multiplications do not."""

    scope: Literal["global", "local"] = option("global", "one array for all layers, or one each")
    map: Map = option("fold", "how a weight finds its slot: random fold, own hash, tiles of ROAST")
    block: tuple[int, int] = option((32, 32), "for tile: its inputs and outputs", "weights")
    per_module: bool = option(
        False, "a hash for every layer, as in the public code; else one over all locations"
    )
    initial: float = option(0.04, "σ₀: the array starts uniform in (−σ₀, σ₀)")
    exact_std: bool = option(
        False, "start with the standard deviation of the given weights; else with 1/√3 of it"
    )
    grad_scale: GradScale = option("v1", "what gradients of the array are divided by; none: ROAST")
    min_size: int = option(0, "parameters that a layer must have to share", "parameters")
    cache: bool = option(False, "keep slots and signs in memory: faster, 5 bytes a weight")
    exclude: tuple[str, ...] = option((), "regular expressions of weights not to share")

    def __post_init__(self) -> None:
        require(self.initial > 0, "initial", self.initial, "above 0")
        require(self.min_size >= 0, "min_size", self.min_size, "0 or more")
        require(min(self.block) >= 1, "block", self.block, "two sizes of at least 1")
        require(
            self.scope == "global" or self.grad_scale == "none",
            "grad_scale", self.grad_scale, "none with scope=local: it is defined for one array",
        )  # fmt: skip

    def prune(
        self,
        model: nn.Module,
        budget: Budget,
        task: Task | None = None,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        found = shareable(model, exclude=self.exclude, min_size=self.min_size)
        slots = self._slots(model, found, budget)
        before = sum(p.numel() for p in model.parameters()), dense_bytes(model)
        places = self._places(found, slots, seed)
        arrays = {
            number: self._array(found[0].weight, size, mix(seed, VALUES, number))
            for number, size in slots.items()
        }
        outcome = Outcome(model)
        outcome.surgery.append(share(model, places, arrays, cache=self.cache))
        outcome.promise = promise_of(budget, model, before, found, sum(slots.values()))
        outcome.tables["memory"] = [memory_report(model)]
        outcome.notes.append("no multiplication is saved: weights are gathered at every pass")
        return outcome

    def _slots(self, model: nn.Module, found: list[Shareable], budget: Budget) -> dict[int, int]:
        """Slots of every array, from what the budget leaves for all of them."""
        sizes = {number: own.weight.numel() for number, own in enumerate(found)}
        total = sum(sizes.values())
        fixed = sum(p.numel() for p in model.parameters()) - total
        if budget.kind == "bytes":
            width = found[0].weight.element_size()
            whole = dense_bytes(model)
            asked = budget.value * whole if budget.relative else budget.value
            kept = min(total, int((asked - (whole - width * total)) // width))
        else:
            kept = budget.kept(total, fixed)
        least = 1 if self.scope == "global" else len(found)
        if kept < least:
            raise InputError(
                "budget", str(budget),
                f"one that leaves at least {least} of the {total} weights that may be shared; the "
                f"{fixed} other parameters stay",
            )  # fmt: skip
        slots = {0: kept}
        if self.scope == "local":
            even = dict.fromkeys(map(str, sizes), kept / total)
            counts = counts_from_densities(even, {str(n): s for n, s in sizes.items()}, kept)
            slots = {number: max(1, counts[str(number)]) for number in sizes}
        for size in slots.values():
            require(size < PRIME, "budget", str(budget), f"one of fewer than {PRIME} slots")
            area = math.prod(self.block) if self.map == "tile" else 0
            require(size > area, "block", self.block, f"a tile smaller than the {size} slots")
        return slots

    def _places(
        self, found: list[Shareable], slots: dict[int, int], seed: int
    ) -> list[tuple[Shareable, Place]]:
        """Locations follow each other in module order; the plan of the outcome has them."""
        places, offset, tiles = [], 0, 0
        for number, own in enumerate(found):
            array = number if self.scope == "local" else 0
            hashed = number + 1 if self.per_module or self.scope == "local" else 0
            place = place_of(
                own, array=array, size=slots[array], offset=offset, tiles=tiles,
                scale=self._scale(own.weight), map=self.map, block=self.block,
                u=UniversalHash.drawn(mix(seed, SLOTS, hashed)),
                g=UniversalHash.drawn(mix(seed, SIGNS, number)),
            )  # fmt: skip
            places.append((own, place))
            offset, tiles = offset + place.count, tiles + place.tile_rows
        return places

    def _scale(self, weight: Tensor) -> float:
        """λ: the standard deviation of the weight as it is now, over that of the array."""
        base = self.initial / math.sqrt(3) if self.exact_std else self.initial
        std = float(weight.detach().double().std()) if weight.numel() > 1 else 0.0
        if self.scope == "local" or std == 0.0:
            std = 1 / math.sqrt(weight[0].numel())
        return std / base

    def _array(self, like: Tensor, size: int, seed: int) -> SharedArray:
        drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values: Any = (2 * drawn - 1) * self.initial
        return SharedArray(values.to(like.device, like.dtype), self.grad_scale)


def promise_of(
    budget: Budget,
    model: nn.Module,
    before: tuple[int, int],
    found: list[Shareable],
    slots: int,
) -> Promise:
    """The budget as asked and as the model stores it; the tolerance is one number.

    ``density`` and ``sparsity`` are of the weights that may be shared.
    """
    parameters, stored = before
    total = sum(own.weight.numel() for own in found)
    if budget.kind in ("density", "sparsity"):
        density = slots / total
        reached = 1 - density if budget.kind == "sparsity" else density
        return Promise(budget.kind, budget.value, reached, 1 / total)
    if budget.kind == "bytes":
        asked = budget.value * stored if budget.relative else budget.value
        return Promise("bytes", asked, dense_bytes(model), found[0].weight.element_size())
    asked = budget.value * parameters if budget.relative else budget.value
    return Promise("params", asked, sum(p.numel() for p in model.parameters()), 1)
