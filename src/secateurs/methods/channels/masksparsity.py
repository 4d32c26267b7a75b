"""MaskSparsity: the pull towards zero on the scales of those channels alone that are to go.

Paper: "Pruning-aware Sparse Regularization for Network Pruning", Machine Intelligence Research
2023, arXiv 2201.06776. Network slimming pulls at all scales γ and so under-fits what it keeps.
Here it is first decided what goes, D = 1 − K, and the network is then trained anew with

    ∂L/∂γ gets   s · D ⊙ sign(γ)        (or s · D ⊙ γ; or s · γ only where |γ| < rate · s)

so that the doomed channels are at zero when they are cut, and the others have trained freely:
baseline → mask → masked training → removal, batch norm taken anew → fine-tuning, taken anew.

 - The mask (``criterion``): |γ| after a training with the pull on all scales (the paper's way to
   one), |γ| of the baseline, L1 norms of the weights, or chance: the paper says that it may come
   from anything.
 - How much goes (``rule``): what the ``budget`` asks. Or the paper's two thresholds, for which the
   budget is only reported: ``fixed`` θ, and ``optimal`` (OT), the θ below which a layer has the
   share δ of its Σγ². There scales that are tied to one axis (the stream of residual blocks) vote:
   each proposes a set, and the units with t votes or more go, for the largest t that gives as many
   as the least that one of them proposes. Under a budget their scores are averaged, for votes are
   not monotone in a threshold. Groups come from the traced axes; depthwise convolutions are tied
   to their inputs and take part like any other.
 - The masked run starts from the ``baseline``; the released code's README passes another
   checkpoint (``start=current``: from the sparse one), its script this one.
 - What is cut is the mask (``cut=mask``); the released pipeline takes its thresholds anew after
   the masked run (``cut=again``), so that what did not shrink survives.
 - The term is added after the backward pass, so that clipping does not see it and momentum does.

The quality before is that of the baseline. With momentum μ a scale moves by rate · s / (1 − μ) a
step; where the steps add up to less than three times the largest doomed γ, the outcome says so.

On the digits (`tests/replicas/test_masksparsity.py`), 35 % of the multiply-accumulates: cut, before
any fine-tuning, 0.975 against 0.455 without a pull and 0.221 with network slimming's; from the
baseline's 0.957, and level with a small network from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.analysis.recalibration import recalibrate
from secateurs.errors import require
from secateurs.method import Procedure
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.prunable import check_finite, prunable_parameters
from secateurs.parts.saliency import Probe, magnitude
from secateurs.parts.scales import Pull, add_pull_, norm_scales
from secateurs.registry import Paper, Tags, register
from secateurs.settings import TrainSettings, option
from secateurs.state import model_state
from secateurs.structure.axes import Structure
from secateurs.structure.choice import Choice, Limits, choose, chosen
from secateurs.structure.cost import StructureCost, structure_cost
from secateurs.structure.dimensions import Kept, kept_indices
from secateurs.structure.removal import promise_of, remove
from secateurs.structure.scores import (
    Aggregate,
    UnitScores,
    scale_scores,
    scale_slices,
    unit_scores,
)
from secateurs.structure.trace import trace
from secateurs.task import Task
from secateurs.training.keeping import BeforeStep
from secateurs.training.loop import Attach, fit_once, total_steps
from secateurs.training.order import mix, steps_per_epoch
from secateurs.workspace import Workspace

DEAD, FAINT = 1e-3, 1e-18
"""Of optimal thresholding: a layer whose largest |γ| is below DEAD goes whole; no |γ| counts as
smaller than FAINT."""
ROOM = 3.0
"""The way that the pull must be able to go, as a multiple of the largest doomed |γ|."""


@register(
    "masksparsity",
    paper=Paper(
        "Pruning-aware Sparse Regularization for Network Pruning",
        "Machine Intelligence Research",
        2023,
        "2201.06776",
    ),
    tags=Tags("S", "channel+neuron+group", "PAT+PDT", "bn+mag+rand", learn="sr"),
    budgets=("macs", "params", "sparsity", "density"),
)
@dataclass(frozen=True)
class MaskSparsity(Procedure):
    """Decide what goes, pull only that to zero while training, cut it, fine-tune."""

    needs: ClassVar[tuple[str, ...]] = ("training", "inputs", "norm-scales")

    strength: float = option(5e-4, "s of the pull (2e-4 for the paper's mildest mask)")
    kind: Pull = option("l1", "the pull: sign(γ), γ, or γ near zero and sign(γ) elsewhere")
    criterion: Literal["sparse", "scales", "l1", "random"] = option(
        "sparse", "the mask: |γ| after a pull on all, |γ| or L1 norms of the baseline, or chance"
    )
    scope: Literal["global", "local"] = option(
        "global", "rank all channels together, or take the same share of every axis (uniform)"
    )
    rule: Literal["budget", "fixed", "optimal"] = option(
        "budget", "how much goes: what the budget asks, |γ| up to theta, or by delta a layer (OT)"
    )
    theta: float = option(0.01, "of rule=fixed: the threshold (0.001 for the mildest mask)")
    delta: float = option(1e-4, "of rule=optimal: the share of a layer's Σγ² that goes")
    aggregate: Aggregate = option("mean", "under a budget, of the |γ| that are tied to one axis")
    least: int = option(1, "units that stay in every layer at least", "units")
    trained: bool = option(False, "the model is the baseline already: do not train it first")
    start: Literal["baseline", "current"] = option(
        "baseline", "weights that the masked run starts from: the baseline's, or the sparse ones"
    )
    cut: Literal["mask", "again"] = option(
        "mask", "what is removed: the mask, or what the rule says after the masked run"
    )
    recalibration: int = option(
        8192, "samples that batch norm is taken anew from; 0: not", "samples"
    )

    def __post_init__(self) -> None:
        require(self.strength >= 0, "strength", self.strength, "0 or more")
        require(self.theta >= 0, "theta", self.theta, "0 or more")
        require(0 < self.delta < 1, "delta", self.delta, "a share in (0, 1)")
        require(self.recalibration >= 0, "recalibration", self.recalibration, "0 or more samples")
        require(
            self.rule == "budget" or self.criterion in ("sparse", "scales"),
            "rule", self.rule, f"budget with criterion={self.criterion}: thresholds are of scales",
        )  # fmt: skip
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
        check_finite(norm_scales(model))
        self._mask(model, task, budget, seed)  # refuses a budget that no training can reach

        def train(name: str, doomed: Mapping[str, Tensor] | None = None) -> dict[str, float]:
            """By ``task.training``, pulled at `doomed`; without it at nothing."""
            attach = None if doomed is None else self._pulling(doomed)
            fit_once(model, task, task.training, seed=seed, work=work, name=name, attach=attach)
            return task.measure(model)

        rows = {"baseline": task.measure(model) if self.trained else train("baseline")}
        baseline = model_state(model)
        if self.criterion == "sparse":
            scales = norm_scales(model)
            rows["sparse"] = train(
                "sparse", {n: torch.ones_like(s).bool() for n, s in scales.items()}
            )
        mask = self._mask(model, task, budget, seed)
        if self.start == "baseline":
            model.load_state_dict(baseline)
        outcome = Outcome(model, metrics_before=rows["baseline"])
        outcome.notes += self._short_of_room(model, task, mask.doomed)
        rows["masked"] = train("masked", mask.doomed)
        outcome.tables["scales"] = _sizes(norm_scales(model), mask.doomed)
        again = self._mask(model, task, budget, seed, mask if self.cut == "mask" else None)
        remove(outcome, again.structure, again.choice)
        outcome.promise = promise_of(budget, again.cost, again.choice)
        self._recalibrate(outcome.model, task, seed)
        rows["removal"] = task.measure(outcome.model)
        fit_once(outcome.model, task, task.finetuning, seed=seed, work=work, name="finetune")
        self._recalibrate(outcome.model, task, seed)
        rows["fine-tuning"] = outcome.metrics_after = task.measure(outcome.model)
        outcome.history = [{"stage": stage, **metrics} for stage, metrics in rows.items()]
        return outcome

    def _pulling(self, doomed: Mapping[str, Tensor]) -> Attach:
        """Hangs the pull at `doomed` on an optimizer."""

        def attach(net: nn.Module, optimizer: torch.optim.Optimizer, _: int) -> list[BeforeStep]:
            scales = norm_scales(net)

            def act() -> None:
                rate = float(optimizer.param_groups[0]["lr"])
                add_pull_(scales, self.strength, doomed=doomed, kind=self.kind, rate=rate)

            return [BeforeStep(optimizer, act)]

        return attach

    def _mask(
        self, model: nn.Module, task: Task, budget: Budget, seed: int, known: Mask | None = None
    ) -> Mask:
        """What stays of the model as it is, by the criterion and the rule, or what is known."""
        structure = Structure(trace(model, task.example_inputs))
        scales = norm_scales(model)
        scores = scale_scores(structure, scales, self.aggregate)
        cost = structure_cost(structure, budget, task.example_inputs)
        if known is not None:
            kept = {structure[n].axis: units for n, units in known.kept.items()}
            choice = Choice(kept, known.choice.cost, known.choice.cost_before_last)
        elif self.rule == "budget":
            ranked = self._ranked(structure, model, scores, seed)
            limits = Limits(least=self.least)
            choice = choose(
                structure, ranked, cost.of, cost.target, scope=self.scope, limits=limits
            )
        else:
            choice = self._below_thresholds(structure, scales, scores, cost)
        return Mask(structure, cost, choice, doomed_scales(structure, choice.kept, scales))

    def _ranked(
        self, structure: Structure, model: nn.Module, scores: UnitScores, seed: int
    ) -> UnitScores:
        """A score a unit of the axes that scales run over."""
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(mix(seed, 313))
            return {n: torch.rand(len(s), generator=generator) for n, s in scores.items()}
        if self.criterion == "l1":
            weights = magnitude(Probe(model, prunable_parameters(model)))
            return {n: s for n, s in unit_scores(structure, weights).items() if n in scores}
        return scores

    def _below_thresholds(
        self,
        structure: Structure,
        scales: Mapping[str, Tensor],
        scores: UnitScores,
        cost: StructureCost,
    ) -> Choice:
        """What the paper's thresholds leave, whatever the budget."""
        kept = {}
        for name, score in scores.items():
            group = structure[name]
            proposals = torch.stack(
                [self._proposed(s) for s in scale_slices(structure, group, scales)]
            )
            gone = spared(majority(proposals), score, self.least)
            kept[group.axis] = np.flatnonzero(~gone.cpu().numpy())
        return chosen(kept, cost.of)

    def _proposed(self, scale: Tensor) -> Tensor:
        """Units that one scale would have go."""
        theta = self.theta if self.rule == "fixed" else optimal_threshold(scale, self.delta)
        return spared(scale <= theta, scale, self.least)

    def _short_of_room(
        self, model: nn.Module, task: Task, doomed: Mapping[str, Tensor]
    ) -> list[str]:
        """A note if the steps of the masked run are too few for the pull to reach zero."""
        scales = norm_scales(model)
        largest = max((float(scales[n].detach().abs()[d].max()) for n, d in doomed.items()),
                      default=0.0)  # fmt: skip
        way = self.strength * reach(task.training, total_steps(task, task.training))
        sized = self.kind != "l2" and task.training.optimizer == "sgd"
        if not sized or way == 0 or way >= ROOM * largest:
            return []
        return [
            f"the pull can move a scale by {way:.3g} in all steps of the masked run, and the "
            f"largest doomed one is {largest:.3g}: take more steps, or a strength of at least "
            f"{self.strength * ROOM * largest / way:.2g}"
        ]

    def _recalibrate(self, model: nn.Module, task: Task, seed: int) -> None:
        if self.recalibration:
            loader = task.training_loader()
            wanted = -(-self.recalibration // (loader.batch_size or 1))
            count = min(wanted, steps_per_epoch(loader))
            recalibrate(model, loader, count, split=task.unpack, seed=seed)


@dataclass(frozen=True)
class Mask:
    """What stays and what goes.

    Attributes:
        structure, cost: of the model that was looked at.
        choice: units that stay.
        doomed: True = goes, of every scale of which something goes.
    """

    structure: Structure
    cost: StructureCost
    choice: Choice
    doomed: dict[str, Tensor]

    @property
    def kept(self) -> dict[str, np.ndarray]:
        """Units that stay, by the name of the axis."""
        names = {group.axis: name for name, group in self.structure.items()}
        return {names[axis]: units for axis, units in self.choice.kept.items()}


def doomed_scales(
    structure: Structure, kept: Kept, scales: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """D, by scale: True at the elements whose units go; scales that stay whole are left out."""
    found = {}
    for name, scale in scales.items():
        stay = kept_indices(structure.trace.tensors[name][0], kept)
        if len(stay) < len(scale):
            gone = torch.ones(len(scale), dtype=torch.bool)
            gone[torch.from_numpy(stay)] = False
            found[name] = gone
    return found


def optimal_threshold(scale: Tensor, delta: float) -> float:
    """The θ below which the |γ| of one layer have the share `delta` of the sum of their squares.

    It lies halfway between the last value below and the first above; 0 where the smallest is too
    much already, 1 (the whole layer) where even the largest is below 1e-3.
    """
    rising = scale.detach().abs().double().clamp_min(FAINT).sort().values
    if float(rising[-1]) < DEAD:
        return 1.0
    share = rising.square().cumsum(0) / rising.square().sum()
    first = int((share > delta).nonzero()[0])
    return float(rising[first - 1 : first + 1].mean()) if first else 0.0


def majority(proposals: Tensor) -> Tensor:
    """The units that go, of what each member of a group proposes, (members, units).

    Those with t votes or more, for the largest t that gives as many as the most modest proposal.
    """
    ballots = proposals.sum(0)
    modest = int(proposals.sum(1).min())
    for least in range(len(proposals), 0, -1):
        if int((ballots >= least).sum()) >= modest:
            return ballots >= least
    raise AssertionError("all proposals together have as many as one of them")


def spared(gone: Tensor, scale: Tensor, least: int) -> Tensor:
    """`gone` without the units of the largest scales where fewer than `least` would stay."""
    if int((~gone).sum()) >= least:
        return gone
    largest = torch.argsort(scale.abs(), descending=True, stable=True)[:least]
    spare = torch.ones_like(gone)
    spare[largest] = False
    return spare


def reach(settings: TrainSettings, steps: int) -> float:
    """How far a gradient of 1 carries a weight in a training by SGD: Σ rate / (1 − momentum)."""
    return sum(settings.rate_at(t, steps) for t in range(steps)) / (1 - settings.momentum)


def _sizes(scales: Mapping[str, Tensor], doomed: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The largest doomed |γ| of every scale, and the mean of the kept ones."""
    rows = []
    for name, gone in doomed.items():
        size, here = scales[name].detach().abs(), gone.to(scales[name].device)
        kept = float(size[~here].mean())
        rows.append({"scale": name, "doomed": int(gone.sum()), "largest": float(size[here].max()),
                     "mean of the kept": kept})  # fmt: skip
    return rows
