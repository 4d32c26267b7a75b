"""Thresholds that learn while a network trains: units below theirs are switched off.

A `Gate` is one threshold: what its units are scored by, and where they act. Its mask multiplies
the output of a layer, or the input of every layer that reads the units. The thresholds are no
parameters of the model: they have a rule of their own (plain gradient descent, no momentum, no
decay), and `LearnedThresholds` makes their step with the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.parts.bypass import image_dimensions
from secateurs.parts.posynomial import Posynomial
from secateurs.parts.thresholds import relative, threshold_mask
from secateurs.state import Tree
from secateurs.training.keeping import StepHooks

START = 0.95
"""A threshold begins at this share of the lowest score: nothing is off, the slope is alive."""


@dataclass(frozen=True)
class Gate:
    """The units under one threshold.

    Attributes:
        name: for people.
        size: units.
        scored_by: (parameter, unit of each of its rows; −1 for none).
        outputs: layers whose output units these are.
        inputs: layer -> the unit that each of its inputs belongs to; −1 for none.
    """

    name: str
    size: int
    scored_by: tuple[tuple[str, Tensor], ...]
    outputs: tuple[str, ...] = ()
    inputs: tuple[tuple[str, Tensor], ...] = ()

    def scores(self, model: nn.Module, norm: Literal["l1", "l2"]) -> Tensor:
        """(size,), of mean 1: the mean of relative norms over what scores the units."""
        found = []
        for name, units in self.scored_by:
            weight = model.get_parameter(name).detach()
            rows = weight.reshape(len(weight), -1)
            sums = (rows.abs() if norm == "l1" else rows.square()).sum(1)
            owner = units.to(weight.device)
            of_units = sums.new_zeros(self.size).index_add_(0, owner[owner >= 0], sums[owner >= 0])
            found.append(relative(of_units if norm == "l1" else of_units.sqrt()))
        return torch.stack(found).mean(0)


@dataclass(frozen=True)
class Rule:
    """How thresholds learn.

    Attributes:
        cost: of how many units of every gate are on.
        whole: the cost of the model as it was.
        allowed: update number -> share of it that may be spent then.
        strength: λ of the penalty λ · max(0, share − allowed).
        rate: learning rate of the thresholds.
        width: τ of the surrogate gradient.
        norm: of the scores.
    """

    cost: Posynomial
    whole: float
    allowed: Callable[[int], float]
    strength: float = 4.0
    rate: float = 0.02
    width: float = 0.5
    norm: Literal["l1", "l2"] = "l1"


class LearnedThresholds(StepHooks):
    """Switches units of a model on and off, and learns where.

    Args:
        model: its layers get hooks, which `remove` takes off.
        first_step: updates made before this optimizer was.
        thresholds: to begin with; `START` of the lowest scores by default.

    Attributes:
        thresholds: a scalar a gate.
        most: the largest share that was spent at any step since the hooks were set.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        gates: Sequence[Gate],
        rule: Rule,
        *,
        first_step: int = 0,
        thresholds: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.model, self.gates, self.rule, self.first_step = model, gates, rule, first_step
        begun = thresholds or [START * g.scores(model, rule.norm).min() for g in gates]
        self.thresholds = [t.detach().clone().requires_grad_() for t in begun]
        self.most = 0.0
        self._layer_hooks = list(self._hang())

    def mask(self, number: int) -> Tensor:
        """The mask of a gate for the weights as they are, with its surrogate gradient."""
        scores = self.gates[number].scores(self.model, self.rule.norm)
        return threshold_mask(scores, self.thresholds[number], self.rule.width)

    def margins(self) -> list[Tensor]:
        """s − t of every unit."""
        return [
            g.scores(self.model, self.rule.norm) - t.detach()
            for g, t in zip(self.gates, self.thresholds, strict=True)
        ]

    def share(self) -> Tensor:
        """What the units that are on cost, as a share of the whole, with its gradient."""
        counts = torch.stack([self.mask(i).sum() for i in range(len(self.gates))])
        return self.rule.cost(counts.double()) / self.rule.whole

    def penalty(self) -> Tensor:
        """λ · max(0, share − allowed now); the share is noted."""
        share = self.share()
        self.most = max(self.most, float(share.detach()))
        excess = share - self.rule.allowed(self.first_step + self.step)
        return self.rule.strength * excess.clamp_min(0)

    def before_step(self) -> None:
        self.penalty().backward()
        with torch.no_grad():
            for threshold in self.thresholds:
                if threshold.grad is not None:
                    threshold.sub_(self.rule.rate * threshold.grad).clamp_min_(0)
                threshold.grad = None

    def state_dict(self) -> Tree:
        """Step, thresholds, and the largest share so far."""
        learned = [t.detach().clone() for t in self.thresholds]
        return {**super().state_dict(), "thresholds": learned, "most": self.most}

    def load_state_dict(self, state: Tree) -> None:
        super().load_state_dict(state)
        self.most = state["most"]
        with torch.no_grad():
            for own, saved in zip(self.thresholds, state["thresholds"], strict=True):
                own.copy_(saved)

    def remove(self) -> None:
        """Take the hooks off the optimizer and the layers."""
        super().remove()
        for handle in self._layer_hooks:
            handle.remove()
        self._layer_hooks = []

    def _hang(self) -> Any:
        read: dict[str, list[tuple[int, Tensor]]] = {}
        for number, gate in enumerate(self.gates):
            for path in gate.outputs:
                layer = self.model.get_submodule(path)
                yield layer.register_forward_hook(
                    lambda module, _, output, i=number: output * self._along(module, self.mask(i))
                )
            for path, units in gate.inputs:
                read.setdefault(path, []).append((number, units))
        for path, masks in read.items():
            yield self.model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, masks=masks: (self._masked(module, args[0], masks), *args[1:])
            )

    def _masked(
        self, layer: nn.Module, inputs: Tensor, masks: Sequence[tuple[int, Tensor]]
    ) -> Tensor:
        for number, units in masks:
            owner = units.to(inputs.device)
            chosen = self.mask(number)[owner.clamp_min(0)]
            on = torch.where(owner >= 0, chosen, torch.ones_like(chosen))
            inputs = inputs * self._along(layer, on)
        return inputs

    @staticmethod
    def _along(layer: nn.Module, mask: Tensor) -> Tensor:
        """A mask in the shape that multiplies the channels of a layer's input or output."""
        return mask.view(-1, *[1] * image_dimensions(layer))


def shortened_state(
    state: Tree, model: nn.Module, cut: Mapping[str, Mapping[str, Sequence[int]]]
) -> Tree:
    """The state of an optimizer over the trainable parameters of `model`, after some were cut.

    Whatever has a parameter's old shape (momenta, averages of squares) keeps what its units had.

    Args:
        model: after the surgery; its parameters are the same, in the same order.
        cut: kept indices by parameter and dimension, as plans of surgery have them.
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    kept: dict[Any, dict[str, Any]] = {}
    for number, slots in state["state"].items():
        kept[number] = dict(slots)
        for slot, value in slots.items():
            if isinstance(value, Tensor) and value.ndim:
                for place, indices in cut.get(names[number], {}).items():
                    chosen = torch.tensor(list(indices), device=value.device)
                    value = value.index_select(int(place), chosen)
                kept[number][slot] = value
    return {**state, "state": kept}
