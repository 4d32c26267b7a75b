"""CFSP: how far every block turns its hidden state, then which of its neurons are loud.

Paper: "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation
Information", COLING 2025, arXiv 2409.13199 (abstract; this follows the code at b2d5b13). One
forward pass, no gradients. Coarse: a block's importance is the mean over tokens of

    arccos(cos(x_in, x_out)) / π

between the residual stream before and behind it, and the share of its feed-forward neurons that
stays grows with it (`secateurs.parts.allocation.sigmoid_allocation`). Fine: of the neurons of a
block stay those of largest activation, n_j = sqrt(E a_j²), a being what the layer behind them
is fed. The neurons are then taken out; attention, norms, embeddings and heads are never touched.

The published score is (Σ over down, up, gate of mean_i R_ij) · n_j^c, R_ij being |W_ij| n_j^b
over its sum over i: that mean is 1/D whatever the weights, so the score is 3/D · n_j^c, and
`act` is that. `relative-out` divides by the sum over j instead, which the formula seems to mean.

Differences from the code: importance is a mean over tokens, so that the number of calibration
tokens does not count; identity blocks have an angle, 0; counts are exact, where thresholds keep
one neuron more and ties; no multiple of `round_to` is ever 0 (which kept everything). With
layers of different widths the mean share is taken over neurons. `sequential` measures the
activations of a block behind the pruned ones before it, which the paper does not.

The budget is of the whole model (macs, params, sparsity, density), or of the neurons: keep=0.8.
For its recovery the paper gives important blocks more rank in LoRA, in proportion to the same
sigmoid (nothing of it was released): ``recover="lora"``, or ``perp``, do that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from secateurs.calibration.block_change import Change, Metric
from secateurs.calibration.blocks import find_blocks
from secateurs.calibration.feed_forward import (
    FeedForward,
    columns,
    fed,
    feed_forward,
    layer_names,
    owners,
    silence,
)
from secateurs.calibration.moments import Moments
from secateurs.calibration.walk import Visit, walk
from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, described, require, unknown
from secateurs.method import Pruner
from secateurs.outcome import Outcome, Promise
from secateurs.parts.allocation import (
    CFSP_SCALE,
    counts_from_densities,
    sigmoid_allocation,
    sigmoid_weights,
    with_floor,
)
from secateurs.parts.budgets import Budget
from secateurs.parts.prunable import matches_any, prunable_parameters
from secateurs.parts.saliency import uniform_like
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.structure.axes import Structure
from secateurs.structure.choice import Choice
from secateurs.structure.cost import structure_cost
from secateurs.structure.removal import promise_of, remove
from secateurs.structure.trace import trace
from secateurs.task import Task
from secateurs.training.batches import calibration_batches
from secateurs.workspace import Workspace

Fine = Literal["act", "act-weight", "wanda", "magnitude", "relative-out", "random"]
BLIND: tuple[Fine, ...] = ("magnitude", "random")
"""Scores that look at no activation."""


@register(
    "cfsp",
    paper=Paper(
        "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine "
        "Activation Information",
        "COLING",
        2025,
        "2409.13199",
    ),
    tags=Tags("S", "neuron", "PTP", "act+mag+rand", supervision="none", recovery="none"),
    budgets=("params", "macs", "sparsity", "density", "keep"),
)
@dataclass(frozen=True)
class CFSP(Pruner):
    """Feed-forward neurons by their activation, more of them in blocks that turn the stream."""

    needs: ClassVar[tuple[str, ...]] = ("inputs",)

    metric: Metric = option(
        "angular", "importance of a block, from its input and output; constant: all the same"
    )
    alpha: float = option(1.0, "how far the shares of the blocks go apart; 0: not at all")
    margin: float = option(1.05, "how far below 1 the largest share stays, where it would reach it")
    score: Fine = option("act", "of a neuron: its activation, its weights, or both")
    b: float = option(1.0, "of relative-out: exponent of the activation beside the weights")
    c: float = option(1.0, "of act and relative-out: exponent of the activation")
    round_to: int = option(1, "neurons of a layer that stay are multiples of this", "neurons")
    sequential: bool = option(False, "measure activations behind blocks that are pruned already")
    samples: int = option(128, "calibration inputs", "samples")
    batch: int = option(8, "calibration inputs that run at once", "samples")
    exclude: tuple[str, ...] = option((), "regular expressions of axes to leave whole")

    def __post_init__(self) -> None:
        require(self.alpha >= 0, "alpha", self.alpha, "0 or more")
        require(self.margin >= 1, "margin", self.margin, "1 or more")
        require(self.b >= 0, "b", self.b, "0 or more")
        require(self.c >= 0, "c", self.c, "0 or more")
        require(self.round_to >= 1, "round_to", self.round_to, "at least 1")
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.batch >= 1, "batch", self.batch, "at least 1")

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
            raise InputError("task", None, "a Task: cfsp looks at activations")
        prunable_parameters(model)  # refuses what has no weights, or NaN in them
        training = model.training
        structure = Structure(trace(model, task.example_inputs))
        layers = self.layers(structure, model)
        loader = task.training_loader()
        batches = calibration_batches(loader, self.samples, self.batch, seed, task.unpack)
        batches = to_device(batches, device_of(model))
        importance, moments = measure(model, batches, layers, self.metric)
        layers, unseen = self._seen(model, layers, moments)
        widths = Widths(self, layers, importance)
        counts, promise = widths.within(budget, structure, task)
        if self.sequential:
            kept = self._kept_in_order(structure, model, batches, layers, counts, moments, seed)
        else:
            scores = {x.name: self.scores(structure, x, moments, seed) for x in layers}
            kept = {n: largest(s, counts[n]) for n, s in scores.items()}
        notes = [*self._notes(model, layers, counts), *unseen]
        outcome = Outcome(model=model, promise=promise, notes=notes)
        units = {x.group.axis: kept[x.name].numpy() for x in layers if counts[x.name] < x.size}
        remove(outcome, structure, Choice(units, 0, 0))
        outcome.tables["blocks"] = widths.table(counts)
        outcome.rank_weights = widths.rank_weights
        outcome.model.train(training)
        return outcome

    def layers(self, structure: Structure, model: nn.Module) -> list[FeedForward]:
        """The feed-forward layers that may be narrowed.

        Raises:
            InputError: there is none, or one has fewer neurons than `round_to`.
        """
        found = [x for x in feed_forward(structure, model) if not matches_any(x.name, self.exclude)]
        if not found:
            raise InputError(
                "model", described(f"{type(model).__name__} without feed-forward neurons"),
                "a model whose blocks have feed-forward layers that can be narrowed",
            )  # fmt: skip
        for layer in found:
            accepted = f"at most {layer.size}, the neurons of {layer.name}"
            require(self.round_to <= layer.size, "round_to", self.round_to, accepted)
        return found

    def _seen(
        self, model: nn.Module, layers: Sequence[FeedForward], moments: Mapping[str, Moments]
    ) -> tuple[list[FeedForward], list[str]]:
        """Layers of whose activations something is known, and a note on the others.

        Raises:
            InputError: there are others only.
        """
        if self.score in BLIND:
            return list(layers), []
        seen = [x for x in layers if any(n in moments for n in layer_names(x))]
        unseen = [x.name for x in layers if x not in seen]
        if not seen:
            raise InputError(
                "model", described(f"{type(model).__name__}, no activation of which was seen: "
                + ", ".join(unseen)), f"feed-forward layers that are called, or score={BLIND[0]}",
            )  # fmt: skip
        why = "left whole, no calibration input was seen to reach what they are fed to"
        return seen, [f"{why}: {', '.join(unseen)}"] if unseen else []

    def scores(
        self, structure: Structure, layer: FeedForward, moments: Mapping[str, Moments], seed: int
    ) -> Tensor:
        """A score per neuron, (neurons,), float64."""
        if self.score == "random":
            return uniform_like(torch.empty(layer.size), seed, layer.name)
        behind = [c for name in layer.behind for c in columns(structure, layer.group, name)]
        before = [c for name in layer.before for c in columns(structure, layer.group, name)]
        activation = activations(structure, layer, moments)
        return neuron_scores(self.score, activation, behind, before, self.b, self.c)

    def _kept_in_order(
        self,
        structure: Structure,
        model: nn.Module,
        batches: Sequence[Any],
        layers: Sequence[FeedForward],
        counts: Mapping[str, int],
        before: Mapping[str, Moments],
        seed: int,
    ) -> dict[str, Tensor]:
        """Block by block, the neurons that go being silenced before the next is looked at.

        Args:
            before: moments in the dense model, for what a pruned one no longer reaches.
        """
        kept: dict[str, Tensor] = {}
        for visit in walk(model, batches):
            own = [x for x in layers if x.block == visit.name]
            moments = visit.moments(fed(own), products=False)
            for layer in own:
                scores = self.scores(structure, layer, {**before, **moments}, seed)
                kept[layer.name] = largest(scores, counts[layer.name])
                silence(structure, layer, kept[layer.name])
        return kept

    def _notes(
        self,
        model: nn.Module,
        layers: Sequence[FeedForward],
        counts: Mapping[str, int],
    ) -> list[str]:
        total = sum(x.size for x in layers)
        notes = [f"{sum(counts.values())} of {total} feed-forward neurons stay"]
        narrowed = {x.block for x in layers}
        if whole := [name for name in find_blocks(model) if name not in narrowed]:
            notes.append("blocks without feed-forward neurons to remove: " + ", ".join(whole))
        return notes


# --- coarse: blocks ---------------------------------------------------------------------------


def block_importance(
    model: nn.Module, batches: Sequence[Any], metric: Metric = "angular"
) -> dict[str, float]:
    """`token_change` of every block, the mean over all tokens.

    Args:
        batches: inputs as the model takes them.

    Raises:
        InputError: a block whose output has another shape than its input.
    """
    return {visit.name: _importance(visit, (), metric)[0] for visit in walk(model, batches)}


def measure(
    model: nn.Module, batches: Sequence[Any], layers: Sequence[FeedForward], metric: Metric
) -> tuple[dict[str, float], dict[str, Moments]]:
    """Importance by block, and moments of what layers behind neurons are fed, on the model as it
    is. Of a single block the importance says nothing, and is not taken."""
    importance: dict[str, float] = {}
    moments: dict[str, Moments] = {}
    if len({x.block for x in layers}) == 1:
        metric = "constant"
    for visit in walk(model, batches):
        own = [x for x in layers if x.block == visit.name]
        if own:
            importance[visit.name], seen = _importance(visit, own, metric)
            moments.update(seen)
    return importance, moments


def _importance(
    visit: Visit, layers: Sequence[FeedForward], metric: Metric
) -> tuple[float, dict[str, Moments]]:
    """One run of the block gives both."""
    change = Change(visit.name, metric)
    with change.of(visit.block):
        moments = visit.moments(fed(layers), products=False)
    return change.mean, moments


@dataclass(frozen=True)
class Widths:
    """How many neurons stay in every layer, as a function of how many stay in all."""

    method: CFSP
    layers: Sequence[FeedForward]
    importance: Mapping[str, float]

    @cached_property
    def neurons(self) -> dict[str, int]:
        """Of every block."""
        counted: Counter[str] = Counter()
        for layer in self.layers:
            counted[layer.block] += layer.size
        return dict(counted)

    @property
    def total(self) -> int:
        return sum(self.neurons.values())

    def shares(self, keep: int) -> dict[str, float]:
        """The share that stays of every block."""
        sizes = torch.tensor(list(self.neurons.values()))
        ratio, how = 1 - keep / self.total, self.method
        found = sigmoid_allocation(self._scores, ratio, how.alpha, CFSP_SCALE, how.margin, sizes)
        return dict(zip(self.neurons, found.tolist(), strict=True))

    def counts(self, keep: int) -> dict[str, int]:
        """Neurons that stay of every layer: `keep` in all, unless they are to be multiples."""
        share, of = self.shares(keep), self.method.round_to
        if of > 1:
            return {x.name: nearest_multiple(x.size, share[x.block], of) for x in self.layers}
        size = {x.name: x.size for x in self.layers}
        exact = counts_from_densities({x.name: share[x.block] for x in self.layers}, size, keep)
        return with_floor(exact, size, 1)

    def within(
        self, budget: Budget, structure: Structure, task: Task
    ) -> tuple[dict[str, int], Promise]:
        """The counts under a budget, and its promise.

        Raises:
            InputError: a budget below what one neuron a layer leaves.
        """
        least = len(self.layers)
        if budget.kind == "keep":
            keep = round(budget.value * self.total)
            require(keep >= least, "budget", str(budget), f"at least {least} of {self.total}")
            counts = self.counts(keep)
            unit = 1 if self.method.round_to == 1 else self.method.round_to * least / 2 + 1
            reached = sum(counts.values()) / self.total
            return counts, Promise("keep", budget.value, reached, unit / self.total)
        cost = structure_cost(structure, budget, task.example_inputs)
        axes = {x.group.axis: x.name for x in self.layers}

        def cost_at(keep: int) -> float:
            counts = self.counts(keep)
            return cost.of(lambda a: counts[axes[a]] if a in axes else a.size)

        if cost_at(least) > cost.target:
            most = "at most" if cost.removed else "at least"
            what = f"{most} {cost.reached(cost_at(least)):g}: only feed-forward neurons go"
            raise InputError("budget", str(budget), what)
        low, high = least, self.total + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost_at(middle) <= cost.target else (low, middle)
        choice = Choice({}, cost_at(low), cost_at(min(high, self.total)))
        return self.counts(low), promise_of(budget, cost, choice)

    def table(self, counts: Mapping[str, int]) -> list[dict[str, Any]]:
        """Blocks with importance, share and neurons."""
        metric = self.method.metric
        title = {"angular": "angle"}.get(metric, metric)
        known = metric != "constant" and len(self.neurons) > 1
        rows = []
        for block, neurons in self.neurons.items():
            kept = sum(counts[x.name] for x in self.layers if x.block == block)
            rows.append(
                {
                    "block": block or "model",
                    **({title: self.importance[block]} if known else {}),
                    "keep": kept / neurons,
                    "neurons": kept,
                    "of": neurons,
                }
            )
        return rows

    @property
    def rank_weights(self) -> dict[str, float]:
        """Of every block, for the adapters of a recovery."""
        weights = sigmoid_weights(self._scores, self.method.alpha)
        return dict(zip(self.neurons, weights.tolist(), strict=True))

    @property
    def _scores(self) -> Tensor:
        return torch.tensor([self.importance[b] for b in self.neurons], dtype=torch.float64)


def nearest_multiple(width: int, share: float, of: int) -> int:
    """The multiple of `of` that is nearest to share · width, at least one and at most the width."""
    return min(width, max(of, int((width * share + of / 2) / of) * of))


# --- fine: neurons ----------------------------------------------------------------------------


def activations(structure: Structure, layer: FeedForward, moments: Mapping[str, Moments]) -> Tensor:
    """sqrt(E a²) of every neuron, (neurons,), float64; 0 where no input reached it."""
    total = torch.zeros(layer.size, dtype=torch.float64)
    for name in layer.behind:
        owner, _ = owners(structure, layer.group, name)
        seen = moments.get(name.rpartition(".")[0])
        if seen is not None:
            total.index_add_(0, owner[owner >= 0], seen.squares.flatten().cpu()[owner >= 0])
    return (total / len(layer.behind)).sqrt()


def neuron_scores(
    kind: Fine,
    activation: Tensor,
    behind: Sequence[Tensor],
    before: Sequence[Tensor] = (),
    b: float = 1.0,
    c: float = 1.0,
) -> Tensor:
    """A score per neuron.

    act n^c; act-weight n · ‖W_j‖; wanda n · mean_i |W_ij|; magnitude ‖W_j‖; relative-out
    Σ_W mean_i R_ij · n^c (`relative_scores`).

    Args:
        activation: (neurons,), n.
        behind, before: matrices (D, neurons) that read the neurons and that make them.
    """
    activation = activation.double()
    stacked = torch.cat([w.to(activation.device) for w in behind])
    match kind:
        case "act":
            return activation**c
        case "act-weight":
            return activation * stacked.norm(dim=0)
        case "wanda":
            return activation * stacked.abs().mean(0)
        case "magnitude":
            return stacked.norm(dim=0)
        case "relative-out":
            return relative_scores([*behind, *before], activation, b, c, "output")
    raise unknown("score", kind, get_args(Fine))


def relative_scores(
    weights: Sequence[Tensor],
    activation: Tensor,
    b: float = 1.0,
    c: float = 1.0,
    over: Literal["neuron", "output"] = "neuron",
) -> Tensor:
    """Σ_W mean_i R_ij · n_j^c, with R_ij = |W_ij| n_j^b over its sum along i (``neuron``, as in
    the published code, which leaves 1/D of each matrix) or along j (``output``).

    Args:
        weights: matrices (D, neurons).
        activation: (neurons,).
    """
    total = torch.zeros_like(activation)
    for weight in weights:
        loud = weight.abs().to(activation) * activation**b
        share = loud / loud.sum(0 if over == "neuron" else 1, keepdim=True)
        total += share.nan_to_num(0.0).mean(0)
    return total * activation**c


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores in ascending order; of ties the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values.cpu()
