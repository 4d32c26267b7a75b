"""GraNet: gradual magnitude pruning with zero-cost neuroregeneration.

Paper: "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021,
arXiv 2106.10404. Every ΔT steps
 a. cut all layers together to the cubic ramp (one global threshold on |w|), then
 b. in every layer drop the r · nnz smallest weights and grow as many where the gradient of the
    current batch is largest; r falls from r_0 to 0.005 along a half cosine over the training.
Start dense (`initial=0`) or from a random ERK network (`initial=0.5`), which then never holds
more than that share of the weights. With `regrow_rate=0` it is global gradual pruning, with
`initial` equal to the target it is RigL, with both it is static sparse training.

A weight dropped and grown again at once keeps value and momentum; one that the cut zeroed
starts from 0. Gradients must be dense, so masks are never in the forward pass. Counts are
exact; the public code cuts by a strict threshold, which with ties removes more. The ramp's
last step stops short of the target in the public code; here it lands on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from secateurs.errors import InputError, require
from secateurs.method import TrainingPruner
from secateurs.parts.allocation import (
    allocate_counts,
    counts_from_densities,
    largest_by_name,
    per_tensor_masks,
)
from secateurs.parts.prunable import sizes
from secateurs.parts.regrowth import prune_and_regrow
from secateurs.parts.saliency import Probe, random
from secateurs.parts.schedules import CosineDecay, Cubic
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.training.attachment import Attachment
from secateurs.training.ramp import ramp_steps


@register(
    "granet",
    paper=Paper(
        "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        "NeurIPS",
        2021,
        "2106.10404",
    ),
    tags=Tags("U", "weight", "PDT", "mag+sens", rounds="gradual"),
    budgets=("sparsity", "density", "params"),
)
@dataclass(frozen=True)
class GraNet(TrainingPruner):
    """Prune globally along a ramp, regenerate per layer at every update to the end."""

    gradients = "dense"
    optimizer_state = "zeroed"

    initial: float = option(0.0, "sparsity at the start; 0.5 is the paper's sparse-to-sparse")
    begin: float = option(0.0, "start of the ramp: fraction of training, or a step above 1")
    end: float = option(0.5, "end of the ramp: fraction of training, or a step above 1")
    frequency: int = option(1000, "steps between updates; lowered to give 20 updates", "steps")
    regrow_rate: float = option(0.5, "share of a layer's weights exchanged at first")
    regrow_floor: float = option(0.005, "share exchanged at the end of training")
    growth: Literal["gradient", "random"] = option("gradient", "where connections grow")
    scope: Literal["global", "layer"] = option("global", "rank all layers together, or each")
    start_allocation: Literal["erk", "er", "uniform"] = option(
        "erk", "densities of the random start when initial is above 0"
    )
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        require(0 <= self.initial < 1, "initial", self.initial, "a sparsity in [0, 1)")
        require(0 <= self.regrow_rate < 1, "regrow_rate", self.regrow_rate, "a share in [0, 1)")
        require(0 <= self.regrow_floor < 1, "regrow_floor", self.regrow_floor, "a share in [0, 1)")
        require(self.frequency >= 1, "frequency", self.frequency, "at least 1 step")

    def start(self, at: Attachment) -> None:
        if self.initial > at.sparsity:
            raise InputError(
                "initial", self.initial, f"at most the sparsity asked for, {at.sparsity:g}"
            )
        ramp_steps(self.begin, self.end, self.frequency, at.total_steps)
        if self.initial > 0:
            keep = at.masks.total - round(self.initial * at.masks.total)
            counts = allocate_counts(at.params, keep, self.start_allocation)
            scores = random(Probe(at.model, at.params, generator=at.generator))
            at.masks.update(per_tensor_masks(scores, counts))

    def before_step(self, at: Attachment) -> None:
        if not self._due(at, at.step + 1) or self._rate(at, at.step + 1) == 0:
            return
        if self.growth == "random":
            at.extra["growth"] = random(Probe(at.model, at.params, generator=at.generator))
            return
        for name, parameter in at.params.items():
            if parameter.grad is None:
                raise InputError(name, None, "a gradient at every update: GraNet grows by it")
        at.extra["growth"] = {n: p.grad.abs() for n, p in at.params.items() if p.grad is not None}

    def after_step(self, at: Attachment) -> None:
        if not self._due(at, at.step):
            return
        self._cut(at)
        growth = at.extra.pop("growth", None)
        if growth is None:
            return
        at.apply()
        rate = self._rate(at, at.step)
        at.masks.update(
            {
                name: prune_and_regrow(p.detach(), at.masks[name], growth[name], rate)
                for name, p in at.params.items()
            }
        )

    def _period(self, at: Attachment) -> int:
        return ramp_steps(self.begin, self.end, self.frequency, at.total_steps)[2]

    def _due(self, at: Attachment, step: int) -> bool:
        first, last, period = ramp_steps(self.begin, self.end, self.frequency, at.total_steps)
        return step == last or (first <= step < at.total_steps and (step - first) % period == 0)

    def _rate(self, at: Attachment, step: int) -> float:
        if self.regrow_rate == 0:
            return 0.0
        return CosineDecay(self.regrow_rate, at.total_steps, self.regrow_floor)(step)

    def _cut(self, at: Attachment) -> None:
        first, last, period = ramp_steps(self.begin, self.end, self.frequency, at.total_steps)
        total, now = at.masks.total, at.masks.kept
        ramp = Cubic(at.sparsity, first, last, self.initial, period)
        keep = at.keep if at.step >= last else total - round(ramp(at.step) * total)
        if keep >= now:
            return
        scores = {n: p.detach().abs().masked_fill(~at.masks[n], -1.0) for n, p in at.params.items()}
        if self.scope == "global":
            at.masks.update(largest_by_name(scores, keep))
            return
        kept = at.masks.kept_by_tensor()
        size = sizes(at.params)
        counts = counts_from_densities(
            {n: kept[n] * keep / now / size[n] for n in kept}, size, keep
        )
        at.masks.update(per_tensor_masks(scores, counts))

    def finish(self, at: Attachment) -> None:
        at.extra.pop("growth", None)
