"""One-shot pruning put together from parts: a saliency, an allocation, a pattern.

Not a paper but the composition that many papers are: magnitude with uniform or LAMP
allocation, SNIP, GraSP and SynFlow at initialisation, Taylor scores, 2:4 by magnitude, blocks,
L1 filters. With several `iterations` the density falls geometrically and the score is taken
anew each time, as SynFlow asks (100 in its paper).

Experts that are one array are cut weight by weight only; other patterns leave them dense, with a
note (`magnitude` has patterns in each expert's matrix).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described, require
from secateurs.method import Pruner, masked_outcome, weights_to_keep
from secateurs.outcome import Outcome
from secateurs.parts.allocation import (
    allocate_counts,
    largest_by_name,
    per_tensor_masks,
)
from secateurs.parts.budgets import Budget
from secateurs.parts.experts import are_experts
from secateurs.parts.masks import Masks
from secateurs.parts.patterns import (
    NM,
    Pattern,
    Unstructured,
    best_units,
    fitting,
    parse_pattern,
)
from secateurs.parts.saliency import Probe, saliency
from secateurs.parts.schedules import Exponential
from secateurs.registry import Tags, register
from secateurs.settings import option
from secateurs.task import Task
from secateurs.training.batches import some_batches
from secateurs.workspace import Workspace


@register(
    "one-shot",
    paper=None,
    tags=Tags("U+SS", "weight+nm+block+filter", "PBT+PAT", "mag+sens+rand"),
    budgets=("sparsity", "density", "params", "n:m"),
)
@dataclass(frozen=True)
class OneShot(Pruner):
    """Score once (or a few times), spread the budget, cut."""

    saliency: Literal["magnitude", "random", "weight-gradient", "snip", "grasp", "synflow"] = (
        option("magnitude", "score of a weight")
    )
    allocation: Literal["global", "uniform", "uniform+", "er", "erk", "lamp"] = option(
        "global", "how the budget is spread over tensors"
    )
    pattern: str = option(
        "unstructured", "unstructured, row, block:RxC, block:RxC:max, or N:M by the budget"
    )
    iterations: int = option(1, "times that the score is taken, at falling density")
    batches: int = option(1, "training batches for scores that need gradients", "batches")
    floor: int = option(0, "least weights a tensor keeps", "weights")
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        require(self.iterations >= 1, "iterations", self.iterations, "at least 1")
        require(self.batches >= 1, "batches", self.batches, "at least 1")
        require(self.floor >= 0, "floor", self.floor, "0 or more weights")
        require(
            self.floor == 0 or self.pattern == "unstructured",
            "floor",
            self.floor,
            "0 for all patterns but unstructured",
        )
        require(
            not (self.allocation == "lamp" and self.saliency == "grasp"),
            "allocation",
            self.allocation,
            "another one for grasp, whose scores have a sign that LAMP does not see",
        )

    def prune(
        self,
        model: nn.Module,
        budget: Budget,
        task: Task | None = None,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        params = self.prunable(model)
        pattern = self._pattern(budget)
        notes: list[str] = []
        if not isinstance(pattern, Unstructured):
            params, notes = without_experts(model, params)
        if isinstance(pattern, NM):
            params, more = fitting(params, pattern)
            notes += more
        probe = self._probe(model, params, task, seed)
        if isinstance(pattern, NM):
            scores = saliency(self.saliency)(probe)
            return masked_outcome(
                model, Masks({n: pattern.mask(s) for n, s in scores.items()}), notes=notes
            )
        total = sum(p.numel() for p in params.values())
        keep = weights_to_keep(model, params, budget)
        masks: Mapping[str, Tensor] = Masks.ones_like(params)
        falling = Exponential(1 - keep / total, 0, self.iterations) if keep else None
        for iteration in range(1, self.iterations + 1):
            last = iteration == self.iterations or falling is None
            now = keep if last else total - round(falling(iteration) * total)  # type: ignore[misc]
            masks = self._cut(self._scores(probe, masks), now, pattern)
            if last:
                break
        return masked_outcome(model, Masks(masks), notes=notes, unit=largest_unit(params, pattern))

    def _pattern(self, budget: Budget) -> Pattern | NM:
        pattern = parse_pattern(self.pattern)
        if budget.kind == "n:m":
            require(
                isinstance(pattern, Unstructured) or str(pattern) == str(budget),
                "pattern",
                self.pattern,
                f"unstructured or {budget} with the budget {budget}",
            )
            return NM(budget.n, budget.m)
        if isinstance(pattern, NM):
            raise InputError("budget", str(budget), f"{pattern}, the density of the pattern")
        return pattern

    def _probe(
        self, model: nn.Module, params: Mapping[str, nn.Parameter], task: Task | None, seed: int
    ) -> Probe:
        driven = self.saliency in ("weight-gradient", "snip", "grasp")
        if (driven or self.saliency == "synflow") and task is None:
            raise InputError("task", None, f"a Task: {self.saliency} runs the model")
        return Probe(
            model,
            params,
            some_batches(task, seed, self.batches) if task is not None and driven else (),
            task.batch_loss if task is not None else None,
            task.example_inputs if task is not None else None,
            torch.Generator().manual_seed(seed),
        )

    def _scores(self, probe: Probe, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores under the present masks; what is gone ranks last."""
        from dataclasses import replace

        scores = saliency(self.saliency)(replace(probe, masks=masks))
        return {n: s.masked_fill(~masks[n], -torch.inf) for n, s in scores.items()}

    def _cut(self, scores: Mapping[str, Tensor], keep: int, pattern: Pattern) -> dict[str, Tensor]:
        if isinstance(pattern, Unstructured):
            if self.allocation == "global" and not self.floor:
                return largest_by_name(scores, keep)
            counts = allocate_counts(scores, keep, self.allocation, floor=self.floor)
            return per_tensor_masks(scores, counts)
        units = {n: pattern.pool(s) for n, s in scores.items()}
        sizes = {n: pattern.unit_sizes(s.shape) for n, s in scores.items()}
        if self.allocation == "global":
            kept = best_units(units, sizes, keep)
        else:
            counts = allocate_counts(scores, keep, self.allocation, floor=self.floor)
            kept = {n: best_units({n: units[n]}, {n: sizes[n]}, counts[n])[n] for n in units}
        return {n: pattern.expand(kept[n], scores[n].shape) for n in scores}


def without_experts(
    model: nn.Module, params: Mapping[str, nn.Parameter]
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The weights that are matrices or kernels, and a note on the experts among the others.

    Raises:
        InputError: all are experts.
    """
    owners = {n: model.get_submodule(n.rpartition(".")[0]) for n in params}
    left = {n: p for n, p in params.items() if not are_experts(owners[n], n, p)}
    dense = [n for n in params if n not in left]
    require(bool(left), "pattern", described("nothing but experts"), "unstructured, or magnitude")
    note = f"left dense, experts have patterns with magnitude only: {', '.join(dense)}"
    return left, [note] if dense else []


def largest_unit(params: Mapping[str, nn.Parameter], pattern: Pattern) -> int:
    """Weights of the largest unit of a pattern."""
    return max(int(pattern.unit_sizes(p.shape).max()) for p in params.values())
