"""Gradual magnitude pruning: every Δt steps each layer is cut to a cubic ramp.

Paper: "To prune, or not to prune: exploring the efficacy of pruning for model compression",
arXiv 1710.01878, equation 1: s_t = s_f + (s_i − s_f)(1 − (t − t_0)/(nΔt))³.

Each layer keeps the round(n(1 − s_t)) weights of largest stored magnitude. In the original
code the stored value of a removed weight is not zeroed: it stays frozen at what it was when it
was cut, and may come back when a survivor shrinks below it (`revive="frozen"`). The Keras port
zeroes it, so it practically never does; here `revive="never"` means never. The forward pass
always sees zeros; the frozen values are held aside. The update of a removed weight is masked
too, momentum included. A last update at the end of the ramp makes the target exact whatever the
frequency (the original may stop just short of it).

`scope="global"` ranks all layers together, which later papers also call GMP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateurs.errors import InputError, require
from secateurs.method import TrainingPruner
from secateurs.parts.allocation import counts_from_densities, largest_by_name
from secateurs.parts.patterns import Block
from secateurs.parts.prunable import matches_any, sizes
from secateurs.parts.schedules import Cubic, Schedule
from secateurs.parts.topk import select_largest
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.training.attachment import Attachment
from secateurs.training.ramp import ramp_steps


def kept_at(progress: float, size: int, initial: float, final_kept: int) -> int:
    """Weights that a layer keeps when `progress` (0 to 1) of the ramp is done."""
    first = initial * size
    removed = first + progress * (size - final_kept - first)
    return round(size - removed)


@register(
    "gmp",
    paper=Paper(
        "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        "ICLR workshop",
        2018,
        "1710.01878",
    ),
    tags=Tags("U", "weight+block", "PDT", "mag", rounds="gradual"),
    budgets=("sparsity", "density", "params"),
)
@dataclass(frozen=True)
class GradualMagnitudePruning(TrainingPruner):
    """Cubic ramp, same sparsity in every pruned layer."""

    initial: float = option(0.0, "sparsity at the start of the ramp")
    begin: float = option(0.0, "start of the ramp: fraction of training, or a step above 1")
    end: float = option(0.75, "end of the ramp: fraction of training, or a step above 1")
    frequency: int = option(100, "steps between updates; lowered to give 20 updates", "steps")
    power: float = option(3.0, "exponent of the ramp; 1 is linear")
    scope: Literal["layer", "global"] = option("layer", "rank within layers, or all together")
    revive: Literal["frozen", "never"] = option(
        "frozen", "whether a removed weight keeps its value aside and may return"
    )
    overrides: dict[str, float] = option(
        {}, "own final sparsity of weights whose name matches a regular expression"
    )
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")
    block: tuple[int, int] = option((1, 1), "tile of linear weights that goes as one (rows, cols)")
    pool: Literal["avg", "max"] = option("avg", "score of a tile: mean or largest |w|")

    def __post_init__(self) -> None:
        Schedule(0.0, initial=self.initial)
        Block(*self.block, self.pool)
        require(self.power > 0, "power", self.power, "above 0")
        require(self.frequency >= 1, "frequency", self.frequency, "at least 1 step")
        for pattern, value in self.overrides.items():
            require(0 <= value < 1, f"overrides {pattern}", value, "a sparsity in [0, 1)")
        require(
            self.block == (1, 1) or self.scope == "layer", "scope", self.scope, "layer, for blocks"
        )

    def start(self, at: Attachment) -> None:
        require(self.initial <= at.sparsity, "initial", self.initial, f"at most {at.sparsity:g}")
        at.extra["counts"] = self._final_counts(at)
        if self.revive == "frozen":
            at.extra["shadow"] = {n: torch.zeros_like(p) for n, p in at.params.items()}
        self._update(at)

    def after_step(self, at: Attachment) -> None:
        self._update(at)

    def finish(self, at: Attachment) -> None:
        at.extra.pop("shadow", None)

    def _final_counts(self, at: Attachment) -> dict[str, int]:
        """Kept weights of each layer at the end: overrides as given, the rest at one density."""
        size = sizes(at.params)
        own = {n: 1 - s for n, s in self._overridden(size).items()}
        taken = sum(round(own[n] * size[n]) for n in own)
        free = sum(size[n] for n in size if n not in own)
        if not 0 <= at.keep - taken <= free:
            raise InputError(
                "overrides", self.overrides, f"sparsities that leave room for {at.keep} weights"
            )
        rest = (at.keep - taken) / free if free else 0.0
        return counts_from_densities({n: own.get(n, rest) for n in size}, size, at.keep)

    def _overridden(self, size: Mapping[str, int]) -> dict[str, float]:
        found: dict[str, float] = {}
        for pattern, sparsity in self.overrides.items():
            matching = [name for name in size if matches_any(name, [pattern])]
            if not matching:
                raise InputError("overrides", pattern, "a pattern of one of " + ", ".join(size))
            for name in matching:
                if name in found:
                    raise InputError("overrides", pattern, f"one pattern that matches {name}")
                found[name] = sparsity
        return found

    def _update(self, at: Attachment) -> None:
        begin, end, frequency = ramp_steps(self.begin, self.end, self.frequency, at.total_steps)
        schedule = Cubic(0.0, begin, end, frequency=frequency, power=self.power)
        if not schedule.updates(at.step):
            return
        progress = schedule.share(at.step)
        stored = self._stored(at)
        counts = {
            name: kept_at(progress, weight.numel(), self.initial, at.extra["counts"][name])
            for name, weight in stored.items()
        }
        self._change(at, stored, self._rank(at, stored, counts))

    def _stored(self, at: Attachment) -> dict[str, Tensor]:
        """Values by which weights are ranked: survivors as they are, others as frozen."""
        shadow = at.extra.get("shadow")
        if shadow is None:
            return {n: p.detach() for n, p in at.params.items()}
        return {n: p.detach() + shadow[n] for n, p in at.params.items()}

    def _rank(
        self, at: Attachment, stored: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        scores = {n: w.abs() for n, w in stored.items()}
        if self.revive == "never":
            # behind survivors that happen to be zero
            scores = {n: s.masked_fill(~at.masks[n], -1.0) for n, s in scores.items()}
        if self.scope == "global":
            return largest_by_name(scores, sum(counts.values()))
        return {n: self._layer_mask(scores[n], counts[n]) for n in scores}

    def _layer_mask(self, scores: Tensor, kept: int) -> Tensor:
        if self.block == (1, 1) or scores.ndim != 2:
            return select_largest([scores], kept)[0]
        tiles = Block(*self.block, self.pool)
        units = tiles.pool(scores)
        share = kept / scores.numel()
        chosen = select_largest([units], round(share * units.numel()))[0]
        return tiles.expand(chosen, scores.shape)

    def _change(
        self, at: Attachment, stored: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> None:
        if shadow := at.extra.get("shadow"):
            with torch.no_grad():
                for name, mask in masks.items():
                    at.params[name].copy_(stored[name] * mask)
                    shadow[name] = stored[name] * ~mask
        at.masks.update(masks)
