"""SPA: structurally prune anything, at any time. OBSPA: without training.

Paper: "Structurally Prune Anything: Any Architecture, Any Framework, Any Time", arXiv
2403.18955. All that hangs together (residual adds, concatenations, groups, heads) is found by
`secateurs.structure`; a score per parameter becomes a score per unit,

    S_c = AGG over slices of c (Σ score of the slice's elements),   then NORM inside its group;

the lowest units of all groups go until the budget is met. Three times:

 - ``before`` training: SNIP, GraSP or CroP at initialisation, then train;
 - ``after`` training: magnitude or Taylor, then fine-tune;
 - ``no-training``: OBSPA. A unit's score is what its removal costs its consumers after
   compensation, 1/2 tr(W_P [H⁻¹]_PP⁻¹ W_Pᵀ), and every consumer is then adapted,
   W_K ← W H_{:,K} (H_KK)⁻¹, in the order of execution, with H from training samples (ID),
   another data set (OOD) or noise (no data). Batch-norm statistics are taken anew, but not
   from noise.

Where card and paper are silent: the paper's graph is ONNX, ours is torch.export's; the text on
CroP (Rachwan et al., ICML 2022) could not be reached, so it is |θ · Hg|, the magnitude of
GraSP's score. The card's noise is uniform over the input range; on photographs it leaves deep
layers with statistics they never see, so the default has the spectrum of natural images.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from secateurs.analysis.recalibration import recalibrate
from secateurs.calibration.compensation import compensate, removal_costs
from secateurs.errors import InputError, described, require
from secateurs.method import Pruner
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.prunable import prunable_parameters
from secateurs.parts.saliency import Probe, grasp, magnitude, snip, weight_gradient
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.structure.axes import Group, Structure
from secateurs.structure.choice import Choice, Limits, choose
from secateurs.structure.cost import structure_cost
from secateurs.structure.removal import promise_of, remove
from secateurs.structure.scores import Aggregate, Normalize, aggregated, normalized, unit_scores
from secateurs.structure.trace import trace
from secateurs.task import Task
from secateurs.training.batches import calibration_inputs, noise_like, some_batches
from secateurs.workspace import Workspace

Criterion = Literal["auto", "l1", "l2", "taylor", "snip", "grasp", "crop", "obs", "random"]
TIMES = {"before": "PBT", "after": "PAT", "no-training": "PTP"}
USUAL = {"before": "snip", "after": "l1", "no-training": "obs"}


@register(
    "spa",
    paper=Paper(
        "Structurally Prune Anything: Any Architecture, Any Framework, Any Time",
        "arXiv",
        2024,
        "2403.18955",
    ),
    tags=Tags("S", "channel+neuron+head+group", "PAT+PBT+PTP", "mag+sens+loss+rand"),
    budgets=("macs", "params", "sparsity", "density", "latency"),
)
@dataclass(frozen=True)
class StructurallyPruneAnything(Pruner):
    """Coupled channels, heads and neurons of any architecture, before or after training."""

    needs: ClassVar[tuple[str, ...]] = ("inputs",)

    when: Literal["after", "before", "no-training"] = option(
        "after", "after training with fine-tuning, before it, or after it without training"
    )
    criterion: Criterion = option("auto", "auto: l1 after, snip before, obs without training")
    aggregate: Aggregate = option("sum", "of a unit's scores over the slices that it couples")
    normalize: Normalize = option("mean", "of the scores inside a group")
    scope: Literal["global", "local"] = option(
        "global", "rank all units together, or take the same share of every group"
    )
    roles: tuple[Literal["channel", "neuron", "head", "head width", "width"], ...] = option(
        (), "kinds of axes to shorten; all of them when none is named"
    )
    exclude: tuple[str, ...] = option((), "regular expressions of axes to leave whole")
    max_ratio: float = option(1.0, "largest share of a group that goes")
    least: int = option(1, "units that stay in every group at least", "units")
    round_to: int = option(1, "kept counts are multiples of this", "units")
    rounds: int = option(1, "equal steps, the scores taken anew at each", "rounds")
    batches: int = option(1, "training batches for scores that need gradients", "batches")
    inputs: str = option(
        "training", "of OBSPA: training (ID), noise (no data), or the name of a data set (OOD)"
    )
    noise: Literal["natural", "uniform"] = option(
        "natural", "of OBSPA without data: images with the spectrum of photographs, or white ones"
    )
    samples: int = option(128, "of OBSPA: inputs to take second moments of", "samples")
    damping: float = option(0.01, "of OBSPA: share of the mean diagonal added to the Hessian")
    compensation: bool = option(True, "of OBSPA: adapt the consumers of what goes")
    recalibration: bool = option(True, "of OBSPA: take batch-norm statistics anew")

    def __post_init__(self) -> None:
        self.limits()
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.batches >= 1, "batches", self.batches, "at least 1")
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.damping >= 0, "damping", self.damping, "0 or more")
        require(
            self.criterion != "obs" or self.when == "no-training",
            "criterion", self.criterion, "obs only with when=no-training",
        )  # fmt: skip

    @property
    def time(self) -> str:
        return TIMES[self.when]

    def limits(self) -> Limits:
        """What no group may go below."""
        return Limits(self.max_ratio, self.least, self.round_to)

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
            raise InputError("task", None, "a Task: spa traces the model on its example inputs")
        prunable_parameters(model)  # refuses what has no weights, or NaN in them
        training = model.training
        outcome = Outcome(model=model)
        inputs = self._inputs(task, seed)
        dense = structure_cost(Structure(trace(model, inputs)), budget, task.example_inputs)
        for step in range(1, self.rounds + 1):
            # a structure is of the model as it is: after a round it has to be found anew
            structure = Structure(trace(outcome.model, inputs))
            cost = structure_cost(structure, budget, task.example_inputs)
            target = dense.whole + (dense.target - dense.whole) * step / self.rounds
            scores = self._scores(structure, outcome.model, task, seed, outcome)
            choice = choose(
                structure, scores, cost.of, target, scope=self.scope, limits=self.limits()
            )
            self._cut(outcome, structure, choice)
        outcome.promise = promise_of(budget, dense, choice)
        if self.when == "no-training" and self.recalibration and self.inputs == "training":
            recalibrate(outcome.model, task.training_loader(), self._batches(task), seed=seed)
        outcome.notes = list(dict.fromkeys(outcome.notes))
        outcome.model.train(training)
        return outcome

    def _cut(self, outcome: Outcome, structure: Structure, choice: Choice) -> None:
        if self.when == "no-training" and self.compensation:
            outcome.notes += compensate(structure, choice.kept, self.damping)
        remove(outcome, structure, choice)

    def _inputs(self, task: Task, seed: int) -> Any:
        """What the model is traced on: for OBSPA all calibration inputs at once."""
        if self.when != "no-training":
            return task.example_inputs
        if self.inputs == "noise":
            return noise_like(task.example_inputs, self.samples, seed, self.noise)
        if self.inputs == "training":
            return calibration_inputs(task.training_loader(), self.samples, seed, task.unpack)
        from secateurs.zoo.datasets import load_data

        loader, _ = load_data(self.inputs).loaders(seed=seed)
        return calibration_inputs(loader, self.samples, seed)

    def _batches(self, task: Task) -> int:
        return max(1, -(-self.samples // (task.training_loader().batch_size or 1)))

    def _groups(self, structure: Structure) -> list[Group]:
        wanted = [
            g
            for g in structure.free
            if (not self.roles or g.role in self.roles)
            and not any(re.search(pattern, g.name) for pattern in self.exclude)
        ]
        if not wanted:
            raise InputError(
                "model",
                described(f"{len(structure)} axes, none of them to be shortened"),
                "a model with free axes of the wanted roles",
            )
        return wanted

    def _scores(
        self, structure: Structure, model: nn.Module, task: Task, seed: int, outcome: Outcome
    ) -> dict[str, Tensor]:
        wanted = {g.name for g in self._groups(structure)}
        criterion = USUAL[self.when] if self.criterion == "auto" else self.criterion
        if criterion == "random":
            generator = torch.Generator().manual_seed(seed)
            return {
                n: torch.rand(structure[n].size, generator=generator, dtype=torch.float64)
                for n in structure
                if n in wanted
            }
        if criterion == "obs":
            costs, notes = removal_costs(structure, self.damping)
            outcome.notes += notes
            scores = {
                n: normalized(aggregated(slices, self.aggregate), self.normalize)
                for n, slices in costs.items()
            }
        else:
            elements = self._elements(criterion, model, task, seed)
            scores = unit_scores(structure, elements, self.aggregate, self.normalize)
        return {n: s for n, s in scores.items() if n in wanted}

    def _elements(
        self, criterion: str, model: nn.Module, task: Task, seed: int
    ) -> Mapping[str, Tensor]:
        """A score per parameter."""
        parameters = dict(model.named_parameters())
        if criterion in ("l1", "l2"):
            found = magnitude(Probe(model, parameters))
            return found if criterion == "l1" else {n: s.square() for n, s in found.items()}
        batches = some_batches(task, seed, self.batches)
        probe = Probe(
            model, parameters, batches, task.batch_loss,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        if criterion == "taylor":
            return weight_gradient(probe)
        if criterion == "snip":
            return snip(probe)
        found = grasp(probe)
        return found if criterion == "grasp" else {n: s.abs() for n, s in found.items()}
