"""Pruners that look at one layer at a time: a matrix, and what it is fed.

Magnitude, Wanda and SparseGPT differ in one function, `prune_layer`. What they share is here:
which layers (those in the blocks of `secateurs.calibration.blocks`; embeddings and heads stay),
how the budget reaches them, the patterns, the walk. A layer's weight is taken as matrices
(groups, out, d), as `secateurs.calibration.moments` has them.

Experts of a mixture that are one parameter (`secateurs.parts.experts`) are pruned one by one, each
as a linear layer with the same share, on the tokens that the router sent to it
(`secateurs.calibration.experts`). One that got none is pruned by magnitude, and named; so is a
block that no calibration input reaches, such as the vision tower of a model that is calibrated on
text alone. What `exclude` leaves dense need not be reached.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from secateurs.calibration.blocks import find_blocks, owner_of
from secateurs.calibration.experts import Fed, watching
from secateurs.calibration.moments import (
    Moments,
    is_known,
    outputs_first,
    weight_from_matrices,
    weight_matrices,
)
from secateurs.calibration.walk import Visit, Weights, walk
from secateurs.errors import InputError, described, require
from secateurs.method import Pruner, masked_outcome
from secateurs.outcome import Outcome
from secateurs.parts.allocation import counts_from_densities
from secateurs.parts.budgets import Budget
from secateurs.parts.experts import (
    are_experts,
    expert_matrices,
    inputs_come_first,
    says_layout,
)
from secateurs.parts.masks import Masks
from secateurs.parts.patterns import NM, Pattern, Unstructured, best_units, fitting, parse_pattern
from secateurs.parts.prunable import prunable_parameters
from secateurs.parts.topk import select_largest
from secateurs.settings import option
from secateurs.task import Split, Task, split_batch
from secateurs.training.batches import calibration_batches
from secateurs.workspace import Workspace

Scope = Literal["row", "matrix"]
Statistic = Literal["none", "squares", "products"]

UNREACHED = "no calibration input reached it; pruned by magnitude"
UNSEEN = "no product with it was seen; pruned by magnitude"
ASSUMED = "taken as (experts, outputs, inputs), which nothing says"


@dataclass(frozen=True)
class Removal:
    """What a layer must come down to.

    Attributes:
        keep: weights that stay.
        pattern: of what goes; for `NM`, `keep` follows from it.
    """

    keep: int
    pattern: Pattern | NM


@dataclass(frozen=True)
class Pruned:
    """A layer after it was pruned.

    Attributes:
        weight: (groups, out, d).
        mask: the same shape, True = keep.
        note: what a reader should know; "" if nothing.
    """

    weight: Tensor
    mask: Tensor
    note: str = ""


@dataclass(frozen=True)
class LayerwisePruner(Pruner):
    """Every layer of every block by itself, in the order in which the model runs them."""

    statistic: ClassVar[Statistic] = "none"
    """What `prune_layer` asks to know of a layer's inputs."""

    pattern: str = option("unstructured", "unstructured, block:RxC, or N:M by the budget")
    samples: int = option(128, "calibration inputs", "samples")
    batch: int = option(8, "samples that run at once", "samples")
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.batch >= 1, "batch", self.batch, "at least 1")

    @abstractmethod
    def prune_layer(self, weight: Tensor, removal: Removal, moments: Moments | None) -> Pruned:
        """Prune one layer.

        Args:
            weight: (groups, out, d).
            moments: of its inputs, as `statistic` says; None where it asks for none.
        """

    def prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Weights of layers inside blocks; where the inputs count, of those that say theirs."""
        modules = dict(model.named_modules())
        inside = {
            name: parameter
            for name, parameter in self._inside(model).items()
            if self.statistic == "none"
            or is_known(holder := modules[name.rpartition(".")[0]])
            or are_experts(holder, name, parameter)
        }
        kinds = "Linear or convolution layers in its blocks"
        require(bool(inside), "model", described(f"{type(model).__name__} without any"), kinds)
        return inside

    def _inside(self, model: nn.Module) -> dict[str, nn.Parameter]:
        blocks = find_blocks(model)
        found = prunable_parameters(model, exclude=self.exclude)
        return {n: p for n, p in found.items() if owner_of(n, blocks) is not None}

    def prune(
        self,
        model: nn.Module,
        budget: Budget,
        task: Task | None = None,
        *,
        seed: int = 0,
        work: Workspace | None = None,
        densities: Mapping[str, float] | None = None,
    ) -> Outcome:
        """As `Pruner.prune`; `densities` by weight, of an allocation, instead of all the same."""
        params = outputs_first(model, self.prunable(model))
        removals, notes = self.removals(params, budget, densities)
        if hidden := [name for name in self._inside(model) if name not in params]:
            notes.append(f"left dense, their inputs cannot be seen: {', '.join(hidden)}")
        masks, more = self.apply(model, removals, self.batches(task, seed), work=work)
        unit = largest_unit(params, removals)
        return masked_outcome(model, Masks(masks), notes=[*notes, *more], unit=unit)

    def batches(self, task: Task | None, seed: int) -> list[Any]:
        """Calibration inputs; none where the method looks at none.

        Raises:
            InputError: the task has fewer than `samples`.
        """
        if self.statistic == "none":
            return []
        if task is None:
            raise InputError("task", None, f"a Task: {self.name} looks at what layers are fed")
        return self.inputs_of(task.training_loader(), seed, task.unpack)

    def inputs_of(
        self, loader: DataLoader[Any], seed: int, unpack: Split = split_batch
    ) -> list[Any]:
        """The first `samples` of a loader under a seed, in batches of `batch`.

        Raises:
            InputError: there are fewer.
        """
        return calibration_batches(loader, self.samples, self.batch, seed, unpack)

    def removals(
        self,
        params: Mapping[str, Tensor],
        budget: Budget,
        densities: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Removal], list[str]]:
        """What each weight comes down to, and notes on those that are left dense.

        Args:
            params: weights by name, as `outputs_first` gives them.
            densities: by name, from an allocation; all the same by default.
        """
        pattern = parse_pattern(self.pattern)
        if budget.kind == "n:m":
            fixed = NM(budget.n, budget.m)
            fits, notes = fitting(params, fixed)
            return {
                n: Removal(p.numel() * budget.n // budget.m, fixed) for n, p in fits.items()
            }, notes
        if isinstance(pattern, NM):
            raise InputError("budget", str(budget), f"{pattern}, the density of the pattern")
        size = {n: p.numel() for n, p in params.items()}
        keep = budget.kept(sum(size.values()), 0)
        share = densities or dict.fromkeys(size, keep / sum(size.values()))
        counts = counts_from_densities({n: share[n] for n in size}, size, keep)
        return {n: Removal(count, pattern) for n, count in counts.items()}, []

    def apply(
        self,
        model: nn.Module,
        removals: Mapping[str, Removal],
        batches: Sequence[Any],
        *,
        weights: Weights | None = None,
        work: Workspace | None = None,
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Prune the weights that `removals` names, in place, block by block."""
        masks: dict[str, Tensor] = {}
        notes: list[str] = []
        work, blocks = work or Workspace(), find_blocks(model)
        total = len({owner_of(name, blocks) for name in removals})
        with work.progress(f"{self.name}: blocks", total) as advance:
            for visit in self.visits(model, removals, batches, weights):
                found, more = self.prune_block(visit, removals)
                masks.update(found)
                notes += more
                advance(visit.index + 1)
        # in the order of the model, and dense where an expert or a tower was never reached
        return {name: masks[name] for name in removals}, notes

    def visits(
        self,
        model: nn.Module,
        removals: Collection[str],
        batches: Sequence[Any],
        weights: Weights | None = None,
    ) -> Iterator[Visit]:
        """The blocks with something to remove, with what they are fed where it is looked at."""
        blocks = find_blocks(model)
        owners = {owner_of(name, blocks) for name in removals}
        only = [name for name in blocks if name in owners]
        if self.statistic != "none":
            yield from walk(model, batches, only=only, unreached=True, weights=weights)
            return
        for index, name in enumerate(only):
            if weights is None or weights.wanted(name):
                with weights.held(name) if weights is not None else nullcontext():
                    yield Visit(name, index, len(only), blocks[name], ())

    def prune_block(
        self, visit: Visit, removals: Mapping[str, Removal]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Prune the layers of one block in place; masks in the shapes of the weights."""
        own = {n: p for n, p in named_weights(visit).items() if n in removals}
        modules = {f"{visit.name}.{n}".strip("."): m for n, m in visit.block.named_modules()}
        holders = {n: modules[n.rpartition(".")[0]] for n in own}
        experts = {n: p for n, p in own.items() if are_experts(holders[n], n, p)}
        layers = {n: n.rpartition(".")[0] for n in own if n not in experts}
        seen: dict[str, Moments] = {}
        fed: dict[str, Fed] = {}
        if self.statistic != "none":
            products = self.statistic == "products"
            with watching(visit.block, experts, products=products) as fed:
                seen = visit.moments(layers.values(), products=products)
        masks: dict[str, Tensor] = {}
        reached = self.statistic == "none" or bool(visit.calls)
        notes = [] if reached else [f"{visit.name}: {UNREACHED}"]
        for name, parameter in own.items():
            if name in experts:
                masks[name], note = self._prune_experts(
                    parameter, holders[name], removals[name], fed.pop(name, Fed())
                )
            else:
                masks[name], note = self._prune_one(
                    parameter, holders[name], removals[name], seen.pop(layers[name], None)
                )
            if note and (reached or note != UNREACHED):
                notes.append(f"{name}: {note}")
        return masks, notes

    def _prune_matrices(
        self, weight: Tensor, removal: Removal, moments: Moments | None, unfed: str = UNREACHED
    ) -> Pruned:
        """By the method, or by magnitude and with a note where it would need moments."""
        if moments is not None or self.statistic == "none":
            return self.prune_layer(weight, removal, moments)
        mask = mask_of(weight.abs(), removal, "matrix")
        return Pruned(weight * mask, mask, unfed)

    @torch.no_grad()
    def _prune_one(
        self, parameter: nn.Parameter, module: nn.Module, removal: Removal, moments: Moments | None
    ) -> tuple[Tensor, str]:
        if not is_known(module):
            made = self.prune_layer(parameter.flatten(1)[None], removal, moments)
            parameter.copy_(made.weight.reshape(parameter.shape))
            return made.mask.reshape(parameter.shape), made.note
        weight = weight_matrices(module)
        if isinstance(removal.pattern, NM) and parameter.ndim > 2:
            # groups run along the channels, kernel position by kernel position
            order = torch.arange(weight.shape[2], device=weight.device)
            order = order.view(parameter.shape[1], -1).t().reshape(-1)
            moments = None if moments is None else moments.in_order(order)
            moved = self._prune_matrices(weight[..., order], removal, moments)
            back = order.argsort()
            made = Pruned(moved.weight[..., back], moved.mask[..., back], moved.note)
        else:
            made = self._prune_matrices(weight, removal, moments)
        parameter.copy_(weight_from_matrices(module, made.weight))
        return weight_from_matrices(module, made.mask), made.note

    @torch.no_grad()
    def _prune_experts(
        self, parameter: nn.Parameter, module: nn.Module, removal: Removal, fed: Fed
    ) -> tuple[Tensor, str]:
        """Prune the experts of one parameter, each as a layer of its own with the same share."""
        inputs_first = fed.inputs_first
        if inputs_first is None:
            inputs_first = inputs_come_first(module)
        mask = torch.ones_like(parameter, dtype=torch.bool)
        matrices = expert_matrices(parameter, inputs_first=inputs_first)
        own_masks = expert_matrices(mask, inputs_first=inputs_first)
        unfed = UNREACHED if fed.moments else UNSEEN
        told: list[tuple[int, str]] = []
        if isinstance(removal.pattern, NM) and not removal.pattern.fits(matrices.shape[1:]):
            return mask, f"left dense, {removal.pattern.m} does not divide the input dimension"
        left = removal.keep
        for number, matrix in enumerate(matrices):
            share = left // (len(matrices) - number)  # what rounding to blocks left, evenly
            own = Removal(min(max(share, 0), matrix.numel()), removal.pattern)
            moments = fed.moments.pop(number, None)
            made = self._prune_matrices(matrix[None].contiguous(), own, moments, unfed)
            matrix.copy_(made.weight[0])
            own_masks[number] = made.mask[0]
            left -= int(made.mask.sum())
            if made.note:
                told.append((number, made.note))
        single = isinstance(removal.pattern, Unstructured) and getattr(self, "scope", "") != "row"
        known = fed.inputs_first is not None or says_layout(module)
        assumed = [] if known or single else [ASSUMED]
        return mask, "; ".join([*assumed, *_by_expert(told)])


def _by_expert(told: Sequence[tuple[int, str]]) -> Iterator[str]:
    """Notes on experts; those that differ in their numbers alone are told once."""
    alike: dict[str, list[tuple[int, str]]] = {}
    for number, note in told:
        alike.setdefault(re.sub(r"[\d.]+", "", note), []).append((number, note))
    for listed in alike.values():
        numbers = ", ".join(str(number) for number, _ in listed)
        differ = "" if len({note for _, note in listed}) == 1 else " (the first of them)"
        yield f"{'experts' if len(listed) > 1 else 'expert'} {numbers}: {listed[0][1]}{differ}"


def mask_of(scores: Tensor, removal: Removal, scope: Scope) -> Tensor:
    """Which weights of a layer stay.

    Args:
        scores: (groups, out, d).
        scope: compare within each output row, whose counts then differ by one at most, or all.
    """
    matrix = scores.flatten(0, 1)
    if isinstance(removal.pattern, NM):
        return removal.pattern.mask(matrix).reshape(scores.shape)
    if not isinstance(removal.pattern, Unstructured):
        units = {"": removal.pattern.pool(matrix)}
        sizes = {"": removal.pattern.unit_sizes(matrix.shape)}
        kept = best_units(units, sizes, removal.keep)[""]
        return removal.pattern.expand(kept, matrix.shape).reshape(scores.shape)
    if scope == "matrix":
        return select_largest([matrix], removal.keep)[0].reshape(scores.shape)
    rows = len(matrix)
    ends = [removal.keep * row // rows for row in range(rows + 1)]
    counts = torch.tensor([b - a for a, b in pairwise(ends)])
    order = matrix.argsort(dim=1, descending=True, stable=True)
    stays = torch.arange(matrix.shape[1]) < counts[:, None]
    mask = torch.zeros(matrix.shape, dtype=torch.bool, device=matrix.device)
    return mask.scatter_(1, order, stays.to(matrix.device)).reshape(scores.shape)


def named_weights(visit: Visit) -> dict[str, nn.Parameter]:
    """Parameters of a block by their names in the whole model."""
    return {f"{visit.name}.{n}".strip("."): p for n, p in visit.block.named_parameters()}


def largest_unit(params: Mapping[str, Tensor], removals: Mapping[str, Removal]) -> int:
    """Weights of the largest unit of weights as `outputs_first` gives them."""
    return max(
        1 if isinstance(r.pattern, NM) else int(r.pattern.unit_sizes(params[n].shape).max())
        for n, r in removals.items()
    )
