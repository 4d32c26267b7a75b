"""LoRAPrune: adapters are trained, and what they say of a frozen weight decides which units go.

Paper: "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", ACL Findings 2024,
arXiv 2305.18403. Heads (with all rows and columns that belong to them) and feed-forward neurons
are masked while LoRA trains, and removed at its end. The gradient of W is never formed; before
every update it is taken from the adapter W + s B A,

    ĝ = ∂B A + B ∂A − ∂B ∂A        what a step of size 1 takes from B A,

an element's score is |ĝ (W + s B A)| (the paper's text squares it, its code does not), a unit's the
sum over its elements in a matrix, divided by that matrix's norm over units, and summed over the
matrices; an average with decay 0.9 over the updates ranks the units of a layer. The share that is
masked follows a cubic ramp and is the same in every layer: int(units · ratio). The first tenth of
the blocks and the last one are trained but not pruned.

Which rows and columns a unit has is read from the traced model: query heads that share a key-value
head go with it. The released code scores loss-scaled gradients, knows 32 heads of 128 only, and
stops one update before its ramp reaches the ratio, so that it removes a unit too few; here the
last update is at the ratio. The ratio is the least that meets the budget. Ends are those of every
encoder, decoder or tower.

Of a `peft.PeftModel` the user's own LoRA goes on: its layers, ranks, scales, dropout, A and B; what
has no adapter there is not looked at. The result is the smaller model with the adapters merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.calibration.blocks import find_blocks, owner_of, sub_networks
from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, described, require
from secateurs.method import Procedure
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.prunable import prunable_parameters
from secateurs.parts.saliency import uniform_like
from secateurs.parts.schedules import Cubic
from secateurs.registry import Paper, Tags, register
from secateurs.settings import TrainSettings, option
from secateurs.state import Tree
from secateurs.structure.axes import Group, Structure
from secateurs.structure.choice import Choice
from secateurs.structure.cost import StructureCost, structure_cost
from secateurs.structure.dimensions import Axis, units_of
from secateurs.structure.removal import promise_of, remove
from secateurs.structure.rewrite import difference
from secateurs.structure.trace import trace
from secateurs.task import Task
from secateurs.training import adapters as low_rank
from secateurs.training import peft_adapters
from secateurs.training.adapters import AdaptedLayer
from secateurs.training.keeping import StepHooks
from secateurs.training.loop import fit_once, total_steps
from secateurs.workspace import Workspace

Metric = Literal["lora", "grad", "magnitude", "random"]
AGREE = 1e-3
"""Relative difference of the removed from the masked model that is worth a note, in float32."""
ROUNDINGS = 4
"""In half precision it is so many roundings: merging rounds the weights once more."""


@dataclass(frozen=True)
class Member:
    """Rows or columns of an adapted layer that belong to the units of a group.

    Attributes:
        layer: its name.
        place: 0 for rows (the layer makes the units), 1 for columns (it takes them).
        owner: unit of every row or column; −1 where it belongs to none.
    """

    layer: str
    place: int
    owner: Tensor


@dataclass(frozen=True)
class Units:
    """Units that are ranked together: the heads or the neurons of a layer.

    Attributes:
        name: of the axis.
        size: how many there were.
        protected: whether they all stay.
    """

    name: str
    role: str
    size: int
    members: tuple[Member, ...]
    protected: bool

    def removed(self, ratio: float) -> int:
        """How many go at a ratio."""
        return 0 if self.protected else int(self.size * ratio + 1e-9)


def lora_gradient(down: Tensor, up: Tensor, ddown: Tensor, dup: Tensor) -> Tensor:
    """∂B A + B ∂A − ∂B ∂A, (out, in): the gradient of a weight that its adapter tells.

    Args:
        down, ddown: A and its gradient, (r, in).
        up, dup: B and its gradient, (out, r).
    """
    return dup @ down + up @ ddown - dup @ ddown


@torch.no_grad()
def sensitivity(layer: AdaptedLayer, metric: Metric, name: str = "layer", seed: int = 0) -> Tensor:
    """|ĝ (W + s B A)| of every element, (out, in).

    Args:
        metric: ĝ from the adapter, the gradient of W itself, 1, or a fixed random number that
            takes the whole score's place.

    Raises:
        InputError: a gradient that is not there.
    """
    weight = layer.effective_weight()
    if metric == "random":
        return uniform_like(weight, seed, name).to(weight)
    if metric == "magnitude":
        return weight.abs()
    wanted = (layer.base.weight,) if metric == "grad" else (layer.down, layer.up)
    grads = [w.grad for w in wanted if isinstance(w, Tensor) and w.grad is not None]
    if len(grads) < len(wanted):
        raise InputError(f"gradient of {name}", None, f"a backward pass before metric={metric}")
    if metric == "lora":
        return (lora_gradient(layer.down, layer.up, *grads) * weight).abs()
    return (low_rank.matrix_of(layer.base, grads[0]).to(weight) * weight).abs()


def unit_sums(scores: Tensor, member: Member, size: int, *, normalize: bool = True) -> Tensor:
    """One score a unit from those of a matrix's elements, (size,).

    Args:
        normalize: divide by the norm over the units, so that matrices count alike.
    """
    along = scores.float().sum(1 - member.place)
    owner = member.owner.to(along.device)
    sums = along.new_zeros(size).index_add_(0, owner[owner >= 0], along[owner >= 0])
    return sums / (sums.norm() + 1e-8) if normalize else sums


class Pruning(StepHooks):
    """Scores and masks units before every update of the adapters.

    Args:
        layers: the adapters, with masks of their outputs.
        units: what is ranked.
        ramp: the ratio by update, counted from 1.

    Attributes:
        scores, kept: of every group's units.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layers: Mapping[str, AdaptedLayer],
        units: Sequence[Units],
        ramp: Cubic,
        metric: Metric = "lora",
        decay: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer)
        self.layers, self.units, self.ramp = layers, units, ramp
        self.metric, self.decay, self.seed = metric, decay, seed
        device = next(iter(layers.values())).down.device
        self.scores = {u.name: torch.zeros(u.size, device=device) for u in units}
        self.kept = {u.name: torch.ones(u.size, dtype=torch.bool, device=device) for u in units}
        if metric == "grad":
            for layer in layers.values():
                # after the optimizer was made, which therefore leaves it as it is
                layer.base.get_parameter("weight").requires_grad_(True)

    def before_step(self) -> None:
        self.take_scores()
        if self.ramp.updates(self.step + 1):
            self.refresh(self.ramp(self.step + 1))

    @torch.no_grad()
    def take_scores(self) -> None:
        """Move the averages towards the scores of these gradients, unless one is NaN."""
        found = {name: torch.zeros_like(score) for name, score in self.scores.items()}
        for name, layer in self.layers.items():
            # one matrix at a time: all of them would be a second model
            own = [(u, m) for u in self.units for m in u.members if m.layer == name]
            matrix = sensitivity(layer, self.metric, name, self.seed) if own else None
            for group, member in own:
                assert matrix is not None
                found[group.name] += unit_sums(matrix, member, group.size)
            if self.metric == "grad":
                layer.base.get_parameter("weight").grad = None
        if any(bool(score.isnan().any()) for score in found.values()):
            return
        for name, score in found.items():
            self.scores[name].mul_(self.decay).add_(score, alpha=1 - self.decay)

    def refresh(self, ratio: float) -> None:
        """Mask the lowest units of every group; what is masked stays so."""
        for group in self.units:
            score = self.scores[group.name].masked_fill(~self.kept[group.name], -1.0)
            lowest = torch.argsort(score, stable=True)[: group.removed(ratio)]
            self.kept[group.name][lowest] = False
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Bring the masks to the outputs of the layers that make the units."""
        for group in self.units:
            for member in group.members:
                if member.place == 0:
                    outputs = self.layers[member.layer].outputs
                    assert outputs is not None
                    owner = member.owner.to(outputs.device)
                    gone = ~self.kept[group.name][owner.clamp_min(0)] & (owner >= 0)
                    outputs.masked_fill_(gone, 0)

    def finish(self) -> None:
        self.refresh(self.ramp.final)  # changes nothing but after a training without updates

    def state_dict(self) -> Tree:
        return {**super().state_dict(), "scores": self.scores, "kept": self.kept}

    def load_state_dict(self, state: Tree) -> None:
        super().load_state_dict(state)
        for name in self.scores:
            self.scores[name].copy_(state["scores"][name])
            self.kept[name].copy_(state["kept"][name])
        self.apply()


@register(
    "loraprune",
    paper=Paper(
        "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
        "ACL Findings",
        2024,
        "2305.18403",
    ),
    tags=Tags("S", "head+neuron", "PAT", "sens", fusion="peft", recovery="peft", rounds="gradual"),
    budgets=("macs", "params", "sparsity", "density"),
)
@dataclass(frozen=True)
class LoRAPrune(Procedure):
    """Train LoRA and meanwhile mask, then remove, heads and neurons by its own gradients."""

    needs: ClassVar[tuple[str, ...]] = ("training", "inputs")
    takes_adapters: ClassVar[bool] = True

    rank: int = option(8, "of the adapters; a peft model brings its own")
    alpha: float = option(16.0, "adapters are multiplied by alpha / rank")
    dropout: float = option(0.05, "of what the adapters are given")
    lr: float = option(1e-4, "learning rate of AdamW")
    weight_decay: float = option(0.0, "of AdamW")
    steps: int | None = option(None, "updates; those of the finetuning", "steps")
    clip_norm: float | None = option(1.0, "clip the gradient norm to this")
    metric: Metric = option(
        "lora", "scores by the adapter's gradients, those of W, |w| alone, or at random"
    )
    initial: float = option(0.0, "ratio at the start of the ramp")
    warmup: float = option(0.1, "share of the updates before the ramp")
    cooldown: float = option(0.1, "share of the updates after the ramp")
    every: int = option(10, "updates between two changes of the masks", "steps")
    decay: float = option(0.9, "of the average of the scores")
    protect_first: float = option(0.1, "share of the blocks, from the first on, that stay whole")
    protect_last: int = option(1, "blocks at the end that stay whole", "blocks")

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a share in [0, 1)")
        require(self.steps is None or self.steps >= 0, "steps", self.steps, "0 or more")
        require(0 <= self.initial < 1, "initial", self.initial, "a ratio in [0, 1)")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more")
        require(self.cooldown >= 0, "cooldown", self.cooldown, "0 or more")
        flat = self.warmup + self.cooldown
        require(flat < 1, "cooldown", self.cooldown, "with warmup less than 1 in all")
        require(self.every >= 1, "every", self.every, "at least 1 step")
        require(0 <= self.decay < 1, "decay", self.decay, "a share in [0, 1)")
        require(0 <= self.protect_first <= 1, "protect_first", self.protect_first, "in [0, 1]")
        require(self.protect_last >= 0, "protect_last", self.protect_last, "0 or more blocks")

    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        model, own = peft_adapters.detach(model)
        prunable_parameters(model)  # refuses what has no weights, or NaN in them
        device = device_of(model)
        inputs = to_device(task.example_inputs, device)
        structure = Structure(trace(model, inputs))
        names = list(own) or adapted_layers(model)
        units, notes = self.units(structure, model, names)
        cost = structure_cost(structure, budget, task.example_inputs)
        ratio, reached, before_last = least_ratio(structure, units, cost)
        settings = self.settings(task)
        ramp = self.ramp(ratio, settings.steps or 0)
        with low_rank.frozen(model):
            layers = low_rank.wrap(
                model, names, "lora",
                {n: lora.rank for n, lora in own.items()} or self.rank,
                {n: lora.alpha for n, lora in own.items()} or self.alpha,
                dropout={n: lora.dropout for n, lora in own.items()} or self.dropout,
                outputs=True, seed=seed,
            )  # fmt: skip
            peft_adapters.adopt(layers, own)

            def attach(_: nn.Module, optimizer: torch.optim.Optimizer, __: int) -> list[Pruning]:
                return [Pruning(optimizer, layers, units, ramp, self.metric, self.decay, seed)]

            trained = fit_once(
                model, task, settings, seed=seed, work=work, name="loraprune", attach=attach
            )
            masked = task.measure(model)
            expected = outputs_in_eval(model, task, inputs)
            low_rank.merge(model)
        kept = trained.hooks[0]["kept"]
        structure = Structure(trace(model, to_device(inputs, device_of(model))))
        chosen = {
            structure[u.name].axis: np.flatnonzero(kept[u.name].cpu().numpy())
            for u in units
            if not bool(kept[u.name].all())
        }
        choice = Choice(chosen, reached, before_last)
        if own:
            notes.append(f"LoRA of peft on {len(own)} layers was trained on and merged")
        outcome = Outcome(model, notes=notes)
        remove(outcome, structure, choice)
        gap = difference(outputs_in_eval(outcome.model, task, inputs), expected)
        if gap > max(AGREE, ROUNDINGS * torch.finfo(expected.dtype).eps):
            outcome.notes.append(
                f"the model without the masked units differs from the masked one by {gap:.2g}: "
                "what follows them does not leave zeros alone"
            )
        outcome.promise = promise_of(budget, cost, choice)
        outcome.history = [{"stage": "masked", "ratio": ratio, **masked}]
        return outcome

    def settings(self, task: Task) -> TrainSettings:
        """The training of the adapters."""
        steps = total_steps(task, task.finetuning) if self.steps is None else self.steps
        return TrainSettings(
            steps=steps,
            optimizer="adamw",
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule="linear",
            clip_norm=self.clip_norm,
            precision=task.finetuning.precision,
        )

    def ramp(self, ratio: float, steps: int) -> Cubic:
        """The ratio by update.

        Raises:
            InputError: it begins above where it ends.
        """
        require(self.initial <= ratio, "initial", self.initial, f"at most {ratio:g}, the last one")
        begin, end = int(self.warmup * steps), steps - int(self.cooldown * steps)
        return Cubic(ratio, begin, end, self.initial, self.every)

    def units(
        self, structure: Structure, model: nn.Module, names: Sequence[str]
    ) -> tuple[list[Units], list[str]]:
        """Heads and neurons of adapted layers, and notes on those that cannot be masked.

        Raises:
            InputError: there are none that may go.
        """
        blocks = find_blocks(model)
        whole = self.protected(model, blocks)
        found, notes = [], []
        for group in structure.free:
            if group.role not in ("head", "neuron"):
                continue
            members = members_of(structure, group, names)
            if reason := obstacle(group, members, names):
                notes.append(f"{group.name} stays whole: {reason}")
                continue
            ends = any(owner_of(m.layer, blocks) in whole for m in members)
            found.append(Units(group.name, group.role, group.size, members, ends))
        found = [u for u in found if not shares_a_head(u, found)]
        if all(u.protected for u in found):
            raise InputError(
                "model", described(f"{len(found)} groups of heads or neurons, all protected"),
                "a model with heads or neurons in blocks between the first and the last",
            )  # fmt: skip
        return found, notes

    def protected(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> set[str]:
        """The first and last blocks of every encoder, decoder or tower.

        A single block is neither the first nor the last one.
        """
        networks = sub_networks(model, blocks)
        found: set[str] = set()
        for network in set(networks.values()):
            own = [block for block in blocks if networks[block] == network]
            if len(own) > 1:
                first, last = int(self.protect_first * len(own)), len(own) - self.protect_last
                found.update(own[:first], own[max(0, last) :])
        return found


def adapted_layers(model: nn.Module) -> list[str]:
    """Linear layers inside the blocks whose weights are nobody else's."""
    blocks = find_blocks(model)
    linear = [
        name
        for name, layer in model.named_modules()
        if name
        and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")
        and owner_of(name, blocks) is not None
    ]
    bad = low_rank.obstacles(model, linear)
    found = [name for name in linear if name not in bad]
    require(bool(found), "model", described(f"{type(model).__name__} without linear layers"),
            "a model with linear layers in its blocks")  # fmt: skip
    return found


def members_of(structure: Structure, group: Group, names: Sequence[str]) -> tuple[Member, ...]:
    """The rows and columns of adapted layers that a group runs over."""
    members = []
    adapted = set(names)
    for tensor, place in group.slices:
        layer, _, local = tensor.rpartition(".")
        if layer in adapted and local == "weight":
            owner = units_of(structure.trace.tensors[tensor][place], group.axis)
            transposed = type(structure.trace.model.get_submodule(layer)).__name__ == "Conv1D"
            members.append(
                Member(layer, 1 - place if transposed else place, torch.from_numpy(owner))
            )
    return tuple(members)


def obstacle(group: Group, members: Sequence[Member], names: Sequence[str]) -> str:
    """Why masking a unit's rows is not the same as removing it; "" if it is."""
    if group.normalized:
        return f"{group.normalized[0]} is taken over it"
    if not any(m.place == 0 for m in members):
        return "no layer with an adapter makes it"
    others = [n for n, _ in group.slices if n.rpartition(".")[0] not in set(names)]
    # a table of biases by head is added to scores whose values are masked
    if others and group.role != "head":
        return f"{others[0]} belongs to it and has no adapter"
    return ""


def shares_a_head(units: Units, others: Sequence[Units]) -> bool:
    """Whether these are the query heads of one key-value head, which goes as a whole."""
    own = {m.layer for m in units.members}
    return units.role == "head" and any(
        own < {m.layer for m in other.members} for other in others if other.role == "head"
    )


def least_ratio(
    structure: Structure, units: Sequence[Units], cost: StructureCost
) -> tuple[float, float, float]:
    """The least ratio that meets a budget, the cost there, and at the ratio before it.

    Raises:
        InputError: not even the largest does.
    """
    axis: dict[Axis, Units] = {structure[u.name].axis: u for u in units}
    free = [u for u in units if not u.protected]
    ratios = sorted({k / u.size for u in free for k in range(u.size)})

    def at(place: int) -> float:
        ratio = ratios[place]
        return cost.of(lambda a: a.size - axis[a].removed(ratio) if a in axis else a.size)

    low, high = 0, len(ratios) - 1
    if at(high) > cost.target:
        least = f"at least {round(at(high))}, what a unit of every group leaves"
        raise InputError("budget", round(cost.target), least)
    while low < high:
        middle = (low + high) // 2
        if at(middle) <= cost.target:
            high = middle
        else:
            low = middle + 1
    return ratios[low], at(low), at(max(low - 1, 0))


@torch.no_grad()
def outputs_in_eval(model: nn.Module, task: Task, inputs: Any) -> Tensor:
    """The first tensor that the model gives for some inputs."""
    device = device_of(model)
    training = model.training
    model.eval()
    output = task.forward(model, to_device(inputs, device))
    model.train(training)
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))
