"""PAGCP: layer after layer loses filters until any task's loss has risen by its allowance.

Paper: "Performance-aware Approximation of Global Channel Pruning for Multitask CNNs", TPAMI
2023, arXiv 2303.11923. For a trained model that serves K tasks, with losses ℓ_k on calibration
samples. A round q:

 1. B_k, the losses of the model as it is; L units, a unit being an axis: the filters of a layer,
    or of all layers that a residual sum couples. Δ_u: MACs that 30 % of unit u's filters cost.
 2. θ = r_q, the share by which the first unit may raise a loss; it becomes λθ with every unit that
    was pruned. λ = 1, or (``solve``) such that Π_{i<L} (1 + r_q λ^i) = T_q, what a whole round may
    make of a loss. r_q and T_q grow by their slopes.
 3. From the largest Δ (λ ≤ 1; from the smallest where λ > 1), a unit loses its int(ρN) filters of
    the smallest norm, ρ = 0.05, 0.10, ..., 0.95, until max_k ℓ_k / B_k > 1 + θ. The last ρ before
    stays removed for all later units, and B_k ← max(B_k, ℓ_k).
 4. e_u = rise of the total loss / MACs saved; the int(topk · L) units of the smallest e_u are
    pruned by their ρ, in the same order, and the model is fine-tuned.

A filter's norm is Σ|w|, of a coupled unit the sum over its layers of mean |w|. Rounds go on until
the budget is met; the last gives filters back, of the least efficient units first, as long as it
stays met. A round that comes less than its part nearer to the budget (what is missing, over the
rounds that are left) goes again with r and T − 1 raised by one factor, the least that does, for
that part alone. With ``stop=allowance`` it does not: the paper's own rule ends the pruning, and
the budget is only what it need not go below.

A unit of which all ratios pass is pruned at 0.95 at once and later units see it; the public code
forgets it until the end. Ratios that remove nothing are skipped; in the code they shift what was
accepted. Both as in the code with ``published``. Decided here: exactly int(ρN) filters go, ties by
position; Δ and the MACs of e_u follow from the traced sizes. Candidates are evaluated under zeros,
which give the losses of the smaller model; where a statistic (LayerNorm, GroupNorm) runs over the
filters, on a shortened copy. Calibration samples are the first of the training set under the seed:
the code takes the validation set, which leaks (``calibrate=evaluation``). Best is a held-out part
of the training data, by name. A loss near zero rises by any factor at once; ``floor`` is the least
B_k. At least one unit is pruned, however small topk is.

Measured: after one round the worst of two tasks suffers less than under uniform or global L1; at a
far budget in few rounds it is much worse than either, for allowances then come near the loss of
chance, under which a whole layer passes (tests/replicas/test_pagcp.py). Take more ``rounds``, or a
smaller ``max_ratio``.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from secateurs.errors import InputError, described, require
from secateurs.method import Pruner
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.prunable import matches_any, prunable_parameters
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.structure.axes import Group, Structure
from secateurs.structure.choice import Choice, Cost, Kept
from secateurs.structure.cost import StructureCost, structure_cost
from secateurs.structure.masking import exact, masked, zeroed
from secateurs.structure.removal import promise_of, remove
from secateurs.structure.rewrite import current_tensors
from secateurs.structure.scores import producers, unit_sums
from secateurs.structure.surgery import shorten
from secateurs.structure.trace import trace
from secateurs.task import Task
from secateurs.training.loop import fit_once
from secateurs.training.order import batches_from, steps_per_epoch
from secateurs.workspace import Workspace

Removed = dict[str, np.ndarray]
"""Units of an axis that went, by its name, in the order in which the axes were visited."""

Losses = dict[str, float]


def solve_decay(first: float, units: int, factor: float) -> float:
    """λ > 0 with Π_{i<units} (1 + first · λ^i) = factor, which rises with λ.

    Raises:
        InputError: no λ reaches it: the factor is not above 1 + first, or there is one unit.
    """
    require(units > 1, "solve", units, "two or more units")
    require(factor > 1 + first, "total_factor", factor, f"above 1 + first_drop = {1 + first:g}")

    def excess(decay: float) -> float:
        return math.fsum(math.log1p(first * decay**i) for i in range(units)) - math.log(factor)

    low, high = 0.0, 1.0
    while excess(high) < 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2


def visiting_order(saved: Mapping[str, float], decay: float) -> list[str]:
    """The units, those that save most MACs first; last where allowances grow."""
    sign = -1 if decay <= 1 else 1
    return sorted(saved, key=lambda unit: sign * saved[unit])


@dataclass(frozen=True)
class Visit:
    """What a round decided for a unit.

    Attributes:
        unit: its axis.
        ratio: the share that went; 0 where none was accepted.
        count: filters of it.
        allowance: θ, the share by which any loss might rise.
        losses: at the accepted ratio.
        rise: of the total loss over the largest before.
        tried: (ratio, losses) of every evaluation.
    """

    unit: str
    ratio: float
    count: int
    allowance: float
    losses: Losses
    rise: float
    tried: list[tuple[float, Losses]] = field(repr=False)


def visit_units(
    order: Sequence[str],
    size: Mapping[str, int],
    lowest: Callable[[str, Removed], np.ndarray],
    evaluate: Callable[[Removed], Losses],
    *,
    ratios: Sequence[float],
    first: float,
    decay: float,
    floor: float = 0.0,
    published: bool = False,
) -> list[Visit]:
    """Step 3: the largest share of every unit that its allowance lets go, one after the other.

    Args:
        lowest: the filters of a unit from the smallest norm on, when others are removed.
        evaluate: losses by task when units are removed.
        published: as the public code: a unit of which all ratios pass is pruned at the end alone,
            and the ratio that was accepted is looked up in a list in which those that remove
            nothing are missing.

    Raises:
        InputError: a loss is not finite, or not above 0, before anything is removed.
    """
    base = {task: max(loss, floor) for task, loss in evaluate({}).items()}
    for task, loss in base.items():
        usable = math.isfinite(loss) and loss > 0
        require(usable, f"loss {task}", loss, "a finite loss above 0, or floor=LEAST")
    total, allowance, removed, visits = sum(base.values()), first, Removed(), []
    for unit in order:
        order_of_unit, best, tried = lowest(unit, removed), (0.0, 0, Losses()), []
        for ratio in ratios:
            count = removable(ratio, size[unit])
            if count == best[1]:
                continue  # nothing, or no more than before
            losses = evaluate({**removed, unit: order_of_unit[:count]})
            tried.append((ratio, losses))
            if not all(losses[task] <= (1 + allowance) * base[task] for task in base):
                break  # NaN is above everything
            best = (ratio, count, losses)
        ratio, count, losses = best
        rise = sum(losses.values()) - total if count else 0.0
        forgotten = published and count == removable(ratios[-1], size[unit])
        found = _shifted(ratio, count, ratios, size[unit]) if published else (ratio, count)
        visits.append(Visit(unit, found[0], found[1], allowance, losses, rise, tried))
        if count and not forgotten:
            removed[unit] = order_of_unit[:count]
            base = {task: max(loss, losses[task]) for task, loss in base.items()}
            total, allowance = max(total, total + rise), allowance * decay
    return visits


def _shifted(ratio: float, count: int, ratios: Sequence[float], size: int) -> tuple[float, int]:
    """The ratio, and its filters, at which the public code looks up what was accepted."""
    passed = sum(0 < removable(r, size) <= count for r in ratios)
    return (ratios[passed - 1], removable(ratios[passed - 1], size)) if passed else (ratio, count)


def efficient(visits: Sequence[Visit], saved: Mapping[str, float], topk: float) -> dict[str, float]:
    """Step 4: e_u of the accepted units that are pruned, the most efficient first.

    Args:
        saved: MACs by accepted unit.
        topk: share of all units that may be pruned, at least one.
    """
    rates = {v.unit: v.rise / (saved[v.unit] + 1e-20) for v in visits if v.count}
    kept = sorted(rates, key=rates.__getitem__)[: max(1, int(topk * len(visits) + 1e-9))]
    return {unit: rates[unit] for unit in kept}


def within(
    counts: Mapping[str, int], cost: Callable[[Mapping[str, int]], float], target: float
) -> dict[str, int]:
    """Removals with as many given back as the target allows, from the last unit on.

    Args:
        counts: filters to be removed by unit, the least efficient last.
        cost: of such removals; at most `target` for all of them.
    """
    left = dict(counts)
    for unit in reversed(list(counts)):
        low, high = 0, left[unit]
        while low < high:
            middle = (low + high) // 2
            if cost({**left, unit: middle}) <= target:
                high = middle
            else:
                low = middle + 1
        left[unit] = low
    return {unit: count for unit, count in left.items() if count}


@register(
    "pagcp",
    paper=Paper(
        "Performance-aware Approximation of Global Channel Pruning for Multitask CNNs",
        "TPAMI",
        2023,
        "2303.11923",
    ),
    tags=Tags("S", "channel+neuron+group", "PAT", "mag+loss", rounds="iterative"),
    budgets=("macs", "params", "sparsity", "density"),
)
@dataclass(frozen=True)
class PerformanceAwareChannelPruning(Pruner):
    """Prune layer after layer as far as no task's loss rises beyond its allowance."""

    needs: ClassVar[tuple[str, ...]] = ("training", "inputs")

    first_drop: float = option(0.05, "r: share by which the first layer may raise a loss")
    drop_slope: float = option(0.0, "what r grows by with every round")
    solve: bool = option(False, "let allowances decay so that a round makes total_factor of a loss")
    total_factor: float = option(5.0, "T: what a round may make of a loss, as a factor")
    factor_slope: float = option(0.0, "what T grows by with every round")
    topk: float = option(1.0, "share of the layers that are pruned, the most efficient")
    norm: Literal["l1", "l2"] = option("l1", "of a filter; the smallest go")
    spacing: float = option(0.05, "between the ratios that are tried")
    max_ratio: float = option(0.95, "largest ratio that is tried in a round")
    probe: float = option(0.3, "share of a layer whose MACs decide when it is visited")
    rounds: int = option(5, "rounds of pruning, at most", "rounds")
    stop: Literal["budget", "allowance"] = option(
        "budget", "when to end: at the budget, or before it where the allowance lets nothing go"
    )
    calibrate: str = option(
        "training", "samples for the losses: of training, evaluation, or the name of a data set"
    )
    batches: int | None = option(10, "batches of them; none for all", "batches")
    floor: float = option(0.0, "losses are taken to be at least this before they are compared")
    published: bool = option(False, "what the public code does where it is at odds with the paper")
    exclude: tuple[str, ...] = option((), "regular expressions of axes to leave whole")

    def __post_init__(self) -> None:
        require(self.first_drop > 0, "first_drop", self.first_drop, "above 0")
        require(self.drop_slope >= 0, "drop_slope", self.drop_slope, "0 or more")
        require(self.total_factor > 1, "total_factor", self.total_factor, "above 1")
        require(self.factor_slope >= 0, "factor_slope", self.factor_slope, "0 or more")
        for later in (0, self.rounds - 1):
            least = 1 + self.first_drop + later * self.drop_slope
            factor = self.total_factor + later * self.factor_slope
            reachable = not self.solve or factor > least
            require(reachable, "total_factor", factor, f"above 1 + the first drop = {least:g}")
        require(0 < self.topk <= 1, "topk", self.topk, "a share in (0, 1]")
        require(0 < self.spacing <= self.max_ratio, "spacing", self.spacing, "in (0, max_ratio]")
        require(self.max_ratio < 1, "max_ratio", self.max_ratio, "below 1")
        require(0 < self.probe < 1, "probe", self.probe, "a share in (0, 1)")
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.batches is None or self.batches >= 1, "batches", self.batches, "at least 1")
        require(self.floor >= 0, "floor", self.floor, "0 or more")

    @property
    def ratios(self) -> list[float]:
        """0.05, 0.10, ..., 0.95."""
        count = int(self.max_ratio / self.spacing + 1e-9)
        return [round(self.spacing * k, 12) for k in range(1, count + 1)]

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
            raise InputError("task", None, "a Task: pagcp looks at its losses")
        prunable_parameters(model)  # refuses what has no weights, or NaN in them
        training, outcome, rows = model.training, Outcome(model), []
        calibration = self._calibration(task, seed)
        trial = self._trial(model, task, calibration)
        dense = structure_cost(trial.structure, budget, task.example_inputs)
        if self.stop == "budget":
            self._refuse_unreachable(trial, budget, dense)
        for number in itertools.count():
            if number:
                name = f"round-{number}"
                fit_once(outcome.model, task, task.finetuning, seed=seed, work=work, name=name)
                trial = self._trial(outcome.model, task, calibration)
            cost = structure_cost(trial.structure, budget, task.example_inputs).of
            plan = self._plan(trial, cost, dense.target, number)
            rows += [{"round": number + 1, **row} for row in plan.rows]
            remove(outcome, trial.structure, plan.choice)
            outcome.history.append(
                {"round": number + 1, "first_drop": plan.first, "decay": plan.decay,
                 "cost": plan.choice.cost, **{f"{k} loss": v for k, v in plan.losses.items()}}
            )  # fmt: skip
            over = self.stop == "allowance" and number + 1 >= self.rounds
            if plan.choice.cost <= dense.target or not plan.choice.kept or over:
                break
        outcome.tables["allocation"] = rows
        outcome.promise = promise_of(budget, dense, plan.choice)
        outcome.notes = list(dict.fromkeys(outcome.notes))
        outcome.model.train(training)
        return outcome

    def _calibration(self, task: Task, seed: int) -> list[Any]:
        """Batches for the losses."""
        if self.calibrate == "evaluation":
            return list(itertools.islice(task.evaluate, self.batches))
        loader = task.training_loader()
        if self.calibrate != "training":
            from secateurs.zoo.datasets import load_data

            loader, _ = load_data(self.calibrate).loaders(seed=seed)
        count = steps_per_epoch(loader)
        count = count if self.batches is None else min(self.batches, count)
        return [batch for batch, _ in itertools.islice(batches_from(loader, seed, 0), count)]

    def _trial(self, model: nn.Module, task: Task, calibration: list[Any]) -> Trial:
        structure = Structure(trace(model, task.example_inputs))
        units = {
            g.name: g
            for g in structure.free
            if producers(structure, g) and not matches_any(g.name, self.exclude)
        }
        if not units:
            raise InputError(
                "model",
                described(f"{len(structure)} axes, none of them to be shortened"),
                "a model whose layers have free axes",
            )
        return Trial(structure, units, task, calibration, self.norm)

    def _refuse_unreachable(self, trial: Trial, budget: Budget, cost: StructureCost) -> None:
        axes = {group.axis for group in trial.units.values()}
        least = cost.of(lambda axis: 1 if axis in axes else axis.size)
        if least > cost.target:
            raise InputError(
                "budget", str(budget), f"at least {round(least)}, what a filter a layer leaves"
            )

    def _plan(self, trial: Trial, cost: Cost, target: float, number: int) -> Plan:
        """Steps 1 to 4 of a round, its allowance widened where the budget demands it."""
        now = cost(lambda axis: axis.size)
        goal = now - (now - target) / max(1, self.rounds - number)

        def costs(given: Mapping[str, int]) -> float:
            sizes = {trial.units[u].axis: trial.sizes[u] - c for u, c in given.items()}
            return cost(lambda axis: sizes.get(axis, axis.size))

        def allocated(wider: float) -> Allocation:
            return self._allocate(trial, number, wider)

        wider, found = 1.0, allocated(1.0)
        widened = self.stop == "budget" and costs(found.counts) > goal
        if widened:
            most = removable_everywhere(self.ratios[-1], trial.sizes)
            while costs(found.counts) > goal and found.accepted != most and wider < WIDEST:
                wider *= 2
                found = allocated(wider)
            low, high = wider / 2, wider
            for _ in range(REFINEMENTS):
                middle = math.sqrt(low * high)
                less = allocated(middle)
                if costs(less.counts) <= goal:
                    high, found = middle, less
                else:
                    low = middle
        counts, order, visits, rates = found.counts, found.order, found.visits, found.rates
        least = goal if widened else target
        if costs(counts) <= least:
            counts = within(counts, costs, least)
        removed = trial.removed(order, counts)
        before = [costs({**counts, unit: count - 1}) for unit, count in counts.items()]
        reached = costs(counts)
        choice = Choice(trial.kept(removed), reached, min(before, default=reached))
        rows = [
            {
                "axis": v.unit,
                "allowance": v.allowance,
                "ratio": v.ratio,
                "accepted": v.count,
                "rise per MAC": rates.get(v.unit),
                "removed": counts.get(v.unit, 0),
            }
            for v in visits
        ]
        return Plan(choice, found.first, found.decay, trial.losses(removed), rows)

    def _allocate(self, trial: Trial, number: int, wider: float) -> Allocation:
        """Steps 1 to 4 with allowances that are `wider` by a factor."""
        first = wider * (self.first_drop + number * self.drop_slope)
        factor = 1 + wider * (self.total_factor - 1 + number * self.factor_slope)
        count = len(trial.units)
        decay = solve_decay(first, count, factor) if self.solve and count > 1 else 1.0
        order = visiting_order(trial.probed(self.probe), decay)
        visits = visit_units(
            order, trial.sizes, trial.lowest, trial.losses,
            ratios=self.ratios, first=first, decay=decay, floor=self.floor,
            published=self.published,
        )  # fmt: skip
        rates = efficient(visits, trial.saved(visits), self.topk)
        return Allocation(first, decay, order, visits, rates)


WIDEST = 1e9
"""Factor beyond which no allowance is widened."""
REFINEMENTS = 4
"""Halvings, on a logarithmic scale, of the interval in which the least allowance lies."""


def removable(ratio: float, size: int) -> int:
    """Filters that a ratio takes from a layer: int(ρN), never the last."""
    return min(int(ratio * size + 1e-9), size - 1)


def removable_everywhere(ratio: float, sizes: Mapping[str, int]) -> dict[str, int]:
    """The same for every layer."""
    return {unit: removable(ratio, size) for unit, size in sizes.items()}


@dataclass(frozen=True)
class Allocation:
    """What the visits of a round gave under an allowance, and what of it is efficient."""

    first: float
    decay: float
    order: list[str]
    visits: list[Visit]
    rates: dict[str, float]

    @property
    def accepted(self) -> dict[str, int]:
        """Filters that may go, by unit."""
        return {visit.unit: visit.count for visit in self.visits}

    @property
    def counts(self) -> dict[str, int]:
        """Those that go, the most efficient units first."""
        accepted = self.accepted
        return {unit: accepted[unit] for unit in self.rates}


@dataclass(frozen=True)
class Plan:
    """What a round removes, the allowance and decay it had, the losses after, and its table."""

    choice: Choice
    first: float
    decay: float
    losses: Losses
    rows: list[dict[str, Any]]


class Trial:
    """A traced model as it would be if units were removed; it stays as it is.

    Attributes:
        units: the axes that may be shortened, by name.
    """

    def __init__(
        self,
        structure: Structure,
        units: dict[str, Group],
        task: Task,
        calibration: list[Any],
        norm: Literal["l1", "l2"],
    ) -> None:
        self.structure, self.units, self.task = structure, units, task
        self.calibration, self.power = calibration, 1 if norm == "l1" else 2
        self.made_by = {name: producers(structure, group) for name, group in units.items()}
        self._known: dict[tuple[tuple[str, int], ...], Losses] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """Filters by unit."""
        return {name: group.size for name, group in self.units.items()}

    def kept(self, removed: Removed) -> Kept:
        """What stays, by axis."""
        return {
            self.units[name].axis: np.setdiff1d(np.arange(self.units[name].size), gone)
            for name, gone in removed.items()
        }

    def losses(self, removed: Removed) -> Losses:
        """Of every task on the calibration samples; known ones are not evaluated again."""
        # norms follow from what went before, so counts in their order say all
        key = tuple((name, len(gone)) for name, gone in removed.items())
        if key not in self._known:
            self._known[key] = self._evaluated(self.kept(removed))
        return self._known[key]

    def _evaluated(self, kept: Kept) -> Losses:
        model = self.structure.trace.model
        if exact(kept):
            with masked(self.structure, kept):
                return self.task.measure_losses(model, self.calibration)
        inputs = self.structure.trace.args or self.structure.trace.kwargs
        own = Structure(trace(copy.deepcopy(model), inputs))
        names = {group.axis: group.name for group in self.structure.values()}
        shorter = shorten(own.trace, {own[names[a]].axis: u for a, u in kept.items()}, check=False)
        return self.task.measure_losses(shorter.model, self.calibration)

    def lowest(self, unit: str, removed: Removed) -> np.ndarray:
        """The filters of a unit by norm: the sum over its layers of mean |w| (or of its root
        mean square), over the weights that are left."""
        group, kept = self.units[unit], self.kept(removed)
        tensors, score = current_tensors(self.structure.trace), torch.zeros(self.units[unit].size)
        score = score.double()
        for name, place in self.made_by[unit]:
            dims = self.structure.trace.tensors[name]
            weight = tensors[name].detach().double().cpu()
            others = [p for p in range(weight.ndim) if p != place]
            sums = (
                unit_sums(dims[place], group, zeroed(values, dims, kept).sum(others))
                for values in (weight.abs() ** self.power, torch.ones_like(weight))
            )
            total, count = sums
            score += (total / count) ** (1 / self.power)
        return torch.argsort(score, stable=True).numpy()

    def removed(self, order: Sequence[str], counts: Mapping[str, int]) -> Removed:
        """The smallest filters of some units, norms being taken as the units are visited."""
        found: Removed = {}
        for unit in order:
            if counts.get(unit):
                found[unit] = self.lowest(unit, found)[: counts[unit]]
        return found

    def probed(self, share: float) -> dict[str, float]:
        """Δ: MACs that a share of every unit's filters costs in the model as it is."""
        return {
            name: self._macs({}) - self._macs({name: int(share * group.size + 1e-9)})
            for name, group in self.units.items()
        }

    def saved(self, visits: Sequence[Visit]) -> dict[str, float]:
        """MACs that every accepted unit saves when those before it are pruned."""
        counts: dict[str, int] = {}
        found = {}
        for visit in visits:
            if visit.count:
                before = self._macs(counts)
                counts[visit.unit] = visit.count
                found[visit.unit] = before - self._macs(counts)
        return found

    def _macs(self, counts: Mapping[str, int]) -> float:
        left = {self.units[name].axis: self.sizes[name] - c for name, c in counts.items()}
        return self.structure.macs(lambda axis: left.get(axis, axis.size))
