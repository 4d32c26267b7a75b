"""Pruning by explaining: filters go through which the least evidence for the true class flows.

Paper: "Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning", Pattern
Recognition 115 (2021), arXiv 1912.08881. Some labelled reference samples are explained by
layer-wise relevance propagation (`secateurs.analysis.relevance`); filter j of a layer scores

    r_j = Σ_samples Σ_space R_j        then   r_j ← r_j / |Σ_j r_j|   within the layer,

with R the relevance at the layer's output, before its own rule. All filters of all layers are
ranked together; the lowest go, ``step`` of the original number at a time, relevance being taken
anew after each, until the budget is met. The output layer is never scored.

Where the paper's codes disagree: for VGG they sum relevance with its sign and divide by the
layer's sum (the defaults here), for ResNets they sum |R| and do not divide, under other rules
(``composite=resnet``). Seeds are 1 at the label, or its logit. Criteria beside relevance, as there:
``weight`` Σ|W_j| ÷ the layer's sum; ``taylor`` |mean(output · gradient)| and ``gradient``
|mean(gradient)| ÷ the layer's L2 norm, the mean over samples and space taken before the absolute
value; and ``random``.

Decided here: the divisor is the magnitude of the layer's sum, so that a negative one (possible with
logit seeds) does not turn the order. Layers whose filters are coupled (residual sums) are one
group, whose scores are the mean over its layers. Removal is real (at once at the end where nothing
is trained between steps: till then what went is zero everywhere, which scores the same), so the
constant that a batch norm still emitted behind a masked filter is gone too, and the network is
fused and explained anew at every step; the ResNet code explains a copy whose weights grow stale.
No layer loses its last filter. The steps end at the budget itself, where the code ends at whole
steps. What the codes of sequential models call epsilon and z is z+. Fine-tuning between steps is
``epochs_between`` (the paper: 10, or none at all), at the end it is the recovery.

A network with an operation that has no rule (attention, LayerNorm) is refused by name.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from secateurs.analysis.relevance import (
    Rule,
    Rules,
    Seed,
    output_magnitudes,
    output_place,
    relevance,
    responses,
)
from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, described, require
from secateurs.method import Pruner
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.prunable import prunable_parameters
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.structure.axes import Counts, Structure
from secateurs.structure.choice import Choice, Cost, Kept, Limits, choose
from secateurs.structure.cost import structure_cost, units_cost
from secateurs.structure.dimensions import counts_of, plain_axes
from secateurs.structure.masking import exact, masked
from secateurs.structure.removal import promise_of, remove
from secateurs.structure.scores import Normalize, UnitScores, aggregated, normalized, unit_sums
from secateurs.structure.trace import Trace, trace
from secateurs.task import Task
from secateurs.training.batches import class_balanced
from secateurs.training.loop import fit_once
from secateurs.training.order import mix
from secateurs.workspace import Workspace

Criterion = Literal["relevance", "weight", "taylor", "gradient", "random"]
COMPOSITES: dict[str, tuple[Rule, Rule, Rule | None]] = {
    "sequential": ("z+", "z+", None),
    "resnet": ("beta0", "epsilon", "zB"),
}
"""Rules of convolutions, of linear layers, and of the first layer."""

DIVISORS: dict[str, Normalize] = {
    "relevance": "sum", "weight": "sum", "taylor": "l2", "gradient": "l2", "random": "none",
}  # fmt: skip
"""What the scores of a layer are divided by."""

References = list[tuple[Tensor, Tensor]]
"""Batches of one size, (inputs, labels); where there are fewer labels, the rest is padding."""


@register(
    "pruning-by-explaining",
    paper=Paper(
        "Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning",
        "Pattern Recognition",
        2021,
        "1912.08881",
    ),
    tags=Tags("S", "channel+neuron+group", "PAT", "rel+mag+sens+rand", rounds="iterative"),
    budgets=("macs", "params", "sparsity", "density", "keep"),
)
@dataclass(frozen=True)
class PruningByExplaining(Pruner):
    """Remove the filters that a few explained samples do not need."""

    needs: ClassVar[tuple[str, ...]] = ("batches", "inputs")

    criterion: Criterion = option("relevance", "what ranks filters")
    samples: int = option(10, "labelled reference samples of every class", "samples")
    step: float = option(
        0.05, "share of the original filters that goes before scores are taken anew"
    )
    epochs_between: float = option(0.0, "fine-tuning after every step (the paper: 10)", "epochs")
    composite: Literal["sequential", "resnet"] = option(
        "sequential", "rules of the layers: z+ everywhere, or beta0, epsilon and zB"
    )
    rule: Rule | None = option(None, "of convolutions, where not the composite's")
    linear_rule: Rule | None = option(None, "of linear layers, likewise")
    first_rule: Rule | None = option(None, "of the first layer, likewise")
    alpha: float = option(1.0, "α of alpha-beta; β = 1 − α")
    epsilon: float = option(1e-6, "stabiliser of epsilon, zB, averages and sums")
    low: float | None = option(None, "of zB: the smallest value of an input")
    high: float | None = option(None, "of zB: the largest")
    seeds: Seed = option("onehot", "relevance at the true class: 1, or its logit")
    reduce: Literal["signed", "abs"] = option("signed", "sum relevance, or its magnitude")
    normalize: Literal["layer_sum", "none"] = option("layer_sum", "what relevance is divided by")
    least: int = option(1, "filters that stay in every layer at least", "filters")
    at_once: int = option(64, "reference samples of one pass", "samples")

    def __post_init__(self) -> None:
        self.rules()
        Limits(least=self.least)
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(0 < self.step <= 1, "step", self.step, "a share in (0, 1]")
        require(self.epochs_between >= 0, "epochs_between", self.epochs_between, "0 or more")
        require(self.at_once >= 1, "at_once", self.at_once, "at least 1")

    def rules(self) -> Rules:
        """The rule of every layer."""
        conv, linear, first = COMPOSITES.get(self.composite, COMPOSITES["sequential"])
        return Rules(
            self.rule or conv, self.linear_rule or linear, self.first_rule or first,
            self.alpha, self.epsilon, self.low, self.high,
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
        if task is None:
            raise InputError("task", None, "a Task: relevance is that of labelled samples")
        prunable_parameters(model)  # refuses what has no weights, or NaN in them
        training, outcome = model.training, Outcome(model)
        references = self._references(task, seed, device_of(model))
        structure = Structure(trace(model, references[0][0]))
        dense, axes = structure_cost(structure, budget, task.example_inputs), len(structure.free)
        size = max(1, int(self.step * units_cost(structure)(lambda axis: axis.size)))
        kept: Kept = {}
        for number in itertools.count():
            with masked(structure, kept):
                scores = self._scores(structure, task, references, mix(seed, number))
            own = structure_cost(structure, budget, task.example_inputs)
            # an axis of one unit is none, but the unit is there
            single = axes - len(structure.free) if budget.kind == "keep" else 0
            choice = self._choose(structure, scores, own.of, dense.target, single, size, kept)
            last, kept = choice.cost <= dense.target, choice.kept
            outcome.history.append({"step": number + 1, "cost": choice.cost})
            if not (last or self.epochs_between) and exact(kept):
                continue  # scores under masks are those of the smaller network
            remove(outcome, structure, choice)
            if last:
                break
            self._train(outcome.model, task, number, seed, work)
            structure, kept = Structure(trace(outcome.model, references[0][0])), {}
        outcome.promise = promise_of(budget, dense, choice)
        outcome.notes = list(dict.fromkeys(outcome.notes))
        outcome.model.train(training)
        return outcome

    def _train(
        self, model: nn.Module, task: Task, number: int, seed: int, work: Workspace | None
    ) -> None:
        """By ``task.finetuning``, for `epochs_between`."""
        if self.epochs_between:
            settings = replace(task.finetuning, epochs=self.epochs_between, steps=None)
            fit_once(model, task, settings, seed=seed, work=work, name=f"step-{number}")

    def _references(self, task: Task, seed: int, device: torch.device) -> References:
        """Labelled samples in batches of one size; the last is filled up with others' inputs."""
        [(inputs, labels)] = to_device(class_balanced(task, seed, self.samples), device)
        size = min(self.at_once, len(labels))
        missing = -len(labels) % size
        parts = torch.cat([inputs, inputs[:missing]]).split(size)
        return list(zip(parts, labels.split(size), strict=True))

    def _choose(
        self,
        structure: Structure,
        scores: UnitScores,
        cost: Cost,
        target: float,
        single: int,
        size: int,
        kept: Kept,
    ) -> Choice:
        """What stays of what is `kept`: down to the target, or `size` units fewer if need be."""
        limits = Limits(least=self.least)
        for name, score in scores.items():
            if (left := kept.get(structure[name].axis)) is not None:
                gone = torch.ones(len(score), dtype=torch.bool)
                gone[torch.from_numpy(left)] = False
                score[gone] = -torch.inf

        def whole_cost(counts: Counts) -> float:
            return cost(counts) + single

        units = units_cost(structure)
        present = units(counts_of(kept))
        choice = choose(structure, scores, whole_cost, target, limits=limits)
        if present - units(counts_of(choice.kept)) <= size:
            return choice
        few = choose(structure, scores, units, present - size, limits=limits)
        return replace(few, cost=whole_cost(counts_of(few.kept)))

    def _scores(
        self, structure: Structure, task: Task, references: References, seed: int
    ) -> UnitScores:
        """One score a unit: the mean over the layers that make it, each normalised."""
        layers = self._by_layer(structure, task, references, seed)
        found = {}
        for group in structure.free:
            shares = [
                unit_sums(structure.trace.dims[node][output_place(node)], group, score)
                for node, score in layers.items()
                if group.axis in plain_axes(structure.trace.dims[node][output_place(node)])
            ]
            if shares:
                found[group.name] = aggregated(shares, "mean")
        if not found:
            raise InputError(
                "model",
                described(f"{len(structure)} axes, none along filters that can be removed"),
                "a model whose convolutions or linear layers have free axes",
            )
        return found

    def _by_layer(
        self, structure: Structure, task: Task, references: References, seed: int
    ) -> dict[fx.Node, Tensor]:
        """A score a filter of every layer, (filters,) each, normalised within the layer."""
        trace_, divisor = structure.trace, DIVISORS[self.criterion]
        match self.criterion:
            case "relevance":
                sums = self._relevances(trace_, references)
                divisor = "none" if self.normalize == "none" else divisor
            case "taylor" | "gradient":
                sums = self._sensitivities(trace_, task, references)
            case "weight":
                sums = output_magnitudes(trace_)
            case _:
                stream = torch.Generator().manual_seed(seed)
                sums = {
                    node: torch.rand(len(s), generator=stream, dtype=torch.float64)
                    for node, s in output_magnitudes(trace_).items()
                }
        return {node: normalized(score, divisor) for node, score in sums.items()}

    def _relevances(self, found: Trace, references: References) -> dict[fx.Node, Tensor]:
        """Σ R, or Σ |R|, over samples and space."""
        sums: dict[fx.Node, Tensor] = {}
        for inputs, labels in references:
            explained = relevance(found, inputs, labels, self.rules(), self.seeds)
            for node, value in explained.layers.items():
                own = value.abs() if self.reduce == "abs" else value
                sums[node] = sums.get(node, 0) + over_filters(node, own)
        return sums

    def _sensitivities(
        self, found: Trace, task: Task, references: References
    ) -> dict[fx.Node, Tensor]:
        """|mean(output · gradient)| or |mean(gradient)|, averaged before the absolute value."""
        sums: dict[fx.Node, Tensor] = {}
        for inputs, labels in references:

            def loss(logits: Tensor, labels: Tensor = labels) -> Tensor:
                return task.loss(logits[: len(labels)], labels) * len(labels)

            for node, (output, gradient) in responses(found, inputs, loss).items():
                own = output * gradient if self.criterion == "taylor" else gradient
                sums[node] = sums.get(node, 0) + over_filters(node, own)
        samples = sum(len(labels) for _, labels in references)
        return {node: (s / (samples * positions(node))).abs() for node, s in sums.items()}


def over_filters(node: fx.Node, values: Tensor) -> Tensor:
    """Values in the shape of a layer's output, summed up by filter, in float64."""
    place = output_place(node)
    others = [p for p in range(values.ndim) if p != place]
    return values.double().sum(others)


def positions(node: fx.Node) -> int:
    """Values that a layer gives for a filter and a sample."""
    shape = node.meta["val"].shape
    return int(shape.numel() // (shape[0] * shape[output_place(node)]))
