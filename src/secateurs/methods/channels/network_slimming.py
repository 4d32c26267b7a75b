"""Network slimming: scales of batch norm are driven to zero, and their channels go.

Paper: "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, arXiv
1708.06519. Train with a sub-gradient descent on

    L = Σ loss + λ Σ |γ|        so   ∂L/∂γ gets   λ · sign(γ),   0 at γ = 0

over the scales γ of all normalisation layers; one threshold over all |γ| then says which channels
go; fine-tune what is left. λ is 1e-4 for VGG, 1e-5 for ResNets and DenseNets.

The term is added to the gradient after the backward pass, so clipping does not see it and momentum
does, as in the authors' code. They cut a percentage of all channels; here the threshold is the
one that meets the budget. They let a network whose channels are added up (pre-activation ResNets)
select its inputs by an index layer; here all scales tied to one axis are aggregated, and the axis
is shortened everywhere. The quality before is that of the network after its training with λ.
A threshold that would take the last channel of a layer is an error, as there is no network left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, require
from secateurs.method import Procedure
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.prunable import check_finite, prunable_parameters
from secateurs.parts.scales import add_l1_subgradient_, norm_scales
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.structure.axes import Structure
from secateurs.structure.choice import Choice, Limits, choose
from secateurs.structure.cost import StructureCost, structure_cost
from secateurs.structure.removal import promise_of, remove
from secateurs.structure.scores import Aggregate, scale_scores
from secateurs.structure.trace import trace
from secateurs.task import Task
from secateurs.training.keeping import BeforeStep
from secateurs.training.loop import fit_once
from secateurs.workspace import Workspace


@register(
    "network-slimming",
    paper=Paper(
        "Learning Efficient Convolutional Networks through Network Slimming",
        "ICCV",
        2017,
        "1708.06519",
    ),
    tags=Tags("S", "channel+neuron+group", "PDT", "bn", learn="sr"),
    budgets=("macs", "params", "sparsity", "density"),
)
@dataclass(frozen=True)
class NetworkSlimming(Procedure):
    """Train with an L1 pull on the scales of the norms, cut the channels of the smallest."""

    needs: ClassVar[tuple[str, ...]] = ("training", "inputs", "norm-scales")

    strength: float = option(1e-4, "λ of the pull on |γ|: 1e-4 for VGG, 1e-5 for ResNets")
    initial: float | None = option(
        None, "value that every γ starts from (the paper: 0.5); as the model has it by default"
    )
    aggregate: Aggregate = option("mean", "of the |γ| that are tied to one axis")
    empty: Literal["raise", "floor"] = option(
        "raise", "where the threshold would empty a layer: refuse, or leave it the least units"
    )
    least: int = option(1, "units that stay in every layer at least", "units")

    def __post_init__(self) -> None:
        require(self.strength >= 0, "strength", self.strength, "0 or more")
        require(self.initial is None or self.initial > 0, "initial", self.initial, "above 0")
        Limits(least=self.least)

    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        prunable_parameters(model)  # refuses what has no weights, or NaN in them
        scales = norm_scales(model)
        check_finite(scales)
        self._choose(model, task, budget)  # refuses a budget that no training can reach
        if self.initial is not None:
            with torch.no_grad():
                for scale in scales.values():
                    scale.fill_(self.initial)
        self._train(model, task, seed, work)
        outcome = Outcome(model, metrics_before=task.measure(model))
        structure, scores, cost, choice = self._choose(model, task, budget)
        threshold = highest_removed(structure, scores, choice)
        if self.empty == "raise":
            refuse_emptied(budget, scores, threshold)
        remove(outcome, structure, choice)
        outcome.promise = promise_of(budget, cost, choice)
        cut = task.measure(outcome.model)
        fit_once(outcome.model, task, task.finetuning, seed=seed, work=work, name="finetune")
        outcome.metrics_after = task.measure(outcome.model)
        outcome.history = [
            {"stage": "sparse training", "threshold": None, **outcome.metrics_before},
            {"stage": "removal", "threshold": threshold, **cut},
            {"stage": "fine-tuning", "threshold": None, **outcome.metrics_after},
        ]
        return outcome

    def _train(self, model: nn.Module, task: Task, seed: int, work: Workspace | None) -> None:
        """By ``task.training``, with the sub-gradient of λ Σ|γ| added to every gradient."""

        def attach(net: nn.Module, optimizer: torch.optim.Optimizer, _: int) -> list[BeforeStep]:
            scales = norm_scales(net)
            return [BeforeStep(optimizer, lambda: add_l1_subgradient_(scales, self.strength))]

        fit_once(model, task, task.training, seed=seed, work=work, name="sparse", attach=attach)

    def _choose(
        self, model: nn.Module, task: Task, budget: Budget
    ) -> tuple[Structure, dict[str, Tensor], StructureCost, Choice]:
        """The axes, |γ| of their units, what the budget counts, and the units that stay."""
        structure = Structure(trace(model, task.example_inputs))
        scores = scale_scores(structure, norm_scales(model), self.aggregate)
        cost = structure_cost(structure, budget, task.example_inputs)
        choice = choose(structure, scores, cost.of, cost.target, limits=Limits(least=self.least))
        return structure, scores, cost, choice


def highest_removed(
    structure: Structure, scores: Mapping[str, Tensor], choice: Choice
) -> float | None:
    """The threshold: the largest score of all units that go; None where none goes."""
    removed = []
    for name, score in scores.items():
        kept = choice.kept.get(structure[name].axis)
        if kept is not None:
            gone = torch.ones(len(score), dtype=torch.bool)
            gone[torch.from_numpy(kept)] = False
            removed.append(float(score.cpu()[gone].max()))
    return max(removed, default=None)


def refuse_emptied(budget: Budget, scores: Mapping[str, Tensor], threshold: float | None) -> None:
    """Raise `InputError` naming the layers of which no score is above the threshold."""
    if threshold is None:
        return
    emptied = [name for name, score in scores.items() if float(score.max()) <= threshold]
    if emptied:
        raise InputError(
            "budget",
            str(budget),
            f"one that leaves something of {', '.join(emptied)}, whose largest |γ| is not above "
            f"the threshold of {threshold:.3g}; or empty=floor, which spares the least units",
        )
