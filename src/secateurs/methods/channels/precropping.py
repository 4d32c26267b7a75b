"""PreCrop and PreConfig: the widths of a network, chosen before it is trained.

Paper: "Structured Pruning is All You Need for Pruning CNNs at Initialization", arXiv 2203.02549.
SynFlow's objective, the sum over all paths from input to output, has the expectation
Π_l N_l · Π_l c_l p_l over random weights and masks of density p_l: it depends on how much of a
layer stays, not on what. So the densities alone are chosen,

    max Σ_l log p_l   s.t.   Σ_l α_l p_l ≤ B_params,   Σ_l β_l p_l ≤ B_macs,   0 < p_l ≤ 1,

the layers are cropped to narrower dense ones, and the small network is trained from scratch.
PreConfig drops p_l ≤ 1: layers may become wider, at equal cost.

No code is public, and how densities become widths could only be read from reviews. Ours:
``coupling="widths"``: every free axis v of the traced model has one factor r_v, a layer's density
is the product of those of its weight (r_in · r_out; r of a depthwise one), and the limits count
all parameters or MACs, biases and norms too. In u = log r that is a geometric program
(`secateurs.parts.width_program`); concatenated inputs count as the mean of their logarithms.
``coupling="sqrt"`` is the literal reading: densities first, by water-filling, then a factor of
p^(1/k) for each of the k free axes of a layer, the least where layers share one, so that none is
denser than it should be. Densities of SNIP, GraSP or SynFlow (`density_source`) become widths by
least squares in log space. Factors are rounded down, and what is left of the limits is spent
step by step where it brings most. The limits are never exceeded.

Fresh weights are drawn as the task's own function draws them, with the spread brought to the new
number of inputs (`secateurs.training.fresh`); without such a function, layer by layer as their
classes do. The model's own weights are then of no account. Choosing makes no forward pass with
weights beyond the trace, but for SNIP, GraSP and SynFlow, which look at them.

Measured on the digits (tests/replicas/test_precropping.py): at 2 % of the parameters 0.964, a
uniformly narrower network 0.936, roots of densities 0.962, densities of SynFlow 0.956; but
channels chosen by L1 0.975, random ones 0.959. At 10 % it is a tie. Every layer being worth the
same, a limit on parameters leaves early layers wide: for speed, limit the MACs.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from secateurs.errors import InputError, described, require
from secateurs.method import Pruner
from secateurs.outcome import Outcome, Promise
from secateurs.parts.allocation import fill_log_densities
from secateurs.parts.budgets import Budget
from secateurs.parts.prunable import matches_any, prunable_parameters
from secateurs.parts.width_program import (
    Limit,
    cheapest_step,
    nearest_shares,
    solve_widths,
    spend,
    within,
)
from secateurs.registry import Paper, Tags, create, register
from secateurs.settings import option
from secateurs.structure.axes import Group, Structure
from secateurs.structure.choice import Limits
from secateurs.structure.cost import StructureCost, structure_cost
from secateurs.structure.dimensions import Axis, Dim, plain_axes, size_of
from secateurs.structure.polynomial import cost_polynomial, log_share, polynomial
from secateurs.structure.removal import remake
from secateurs.structure.trace import trace
from secateurs.task import Task
from secateurs.training.fresh import redraw
from secateurs.workspace import Workspace


@dataclass(frozen=True)
class Plan:
    """The widths that were chosen.

    Attributes:
        groups: the axes, in the order of all that follows.
        factors: r before rounding.
        widths: units of every axis.
        aims: density by weight that the widths were to meet; empty where they are chosen at once.
        densities: share that stays, by weight.
        multipliers: of the limits, the budget's first; 0 where a limit is slack.
        cost: of the widths, in the terms of the budget.
        step: what the cheapest wider width would add to it; None where none is wider.
    """

    groups: list[Group]
    factors: np.ndarray
    widths: np.ndarray
    aims: dict[str, float]
    densities: dict[str, float]
    multipliers: tuple[float, ...]
    cost: float
    step: float | None


@register(
    "precropping",
    paper=Paper(
        "Structured Pruning is All You Need for Pruning CNNs at Initialization",
        "arXiv",
        2022,
        "2203.02549",
    ),
    tags=Tags("S", "channel+neuron+head", "PBT", "none+sens", supervision="none+sup"),
    budgets=("macs", "params"),
)
@dataclass(frozen=True)
class PreCropping(Pruner):
    """Widths by a convex program, from the architecture alone; then training from scratch."""

    needs: ClassVar[tuple[str, ...]] = ("inputs",)

    second_limit: str = option("", "a limit beside the budget, such as macs=0.5 or params=1.0")
    density_source: Literal["synexp", "synflow", "snip", "grasp"] = option(
        "synexp", "what says how much of a layer stays; all but synexp look at weights"
    )
    allow_expand: bool = option(False, "PreConfig: layers may become wider than they were")
    max_expand: float = option(4.0, "of PreConfig: largest factor of a width")
    coupling: Literal["widths", "sqrt"] = option(
        "widths", "choose the widths at once, or densities first and roots of them"
    )
    iterations: int = option(100, "of SynFlow: times that the score is taken", "rounds")
    batches: int = option(1, "of SNIP and GraSP: training batches", "batches")
    round_to: int = option(1, "widths are multiples of this, where they are not whole", "units")
    min_width: int = option(1, "units that stay of every axis at least", "units")
    init: Literal["fresh", "slice"] = option(
        "fresh", "draw the weights anew, or keep those of the first units"
    )
    exclude: tuple[str, ...] = option((), "regular expressions of axes to leave as they are")

    def __post_init__(self) -> None:
        require(self.max_expand >= 1, "max_expand", self.max_expand, "at least 1")
        require(self.iterations >= 1, "iterations", self.iterations, "at least 1")
        require(self.batches >= 1, "batches", self.batches, "at least 1")
        Limits(least=self.min_width, round_to=self.round_to)
        sliced = self.init == "slice" and self.allow_expand
        require(not sliced, "init", self.init, "fresh with allow_expand: new units have no weights")
        if self.second_limit:
            kind = Budget.parse(self.second_limit).kind
            require(kind in self.budgets, "second_limit", self.second_limit, "macs= or params=")

    def accept(self, budget: str | Budget) -> Budget:
        parsed = super().accept(budget)
        if self.second_limit:
            other = Budget.parse(self.second_limit)
            kinds = f"a budget of another kind than {parsed.kind}, which the first limit has"
            require(other.kind != parsed.kind, "second_limit", self.second_limit, kinds)
        return parsed

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
            raise InputError("task", None, "a Task: precropping traces the model on its inputs")
        structure = Structure(trace(model, task.example_inputs))
        plan = self.plan(structure, budget, task, seed=seed)
        asked = _cost(structure, budget).target
        outcome = Outcome(model=model)
        outcome.tables["widths"] = [
            {"axis": g.name, "units": g.size, "factor": float(r), "width": int(n)}
            for g, r, n in zip(plan.groups, plan.factors, plan.widths, strict=True)
        ]
        outcome.tables["densities"] = [
            {"weight": n, "aimed": plan.aims.get(n), "density": d}
            for n, d in plan.densities.items()
        ]
        left, step = asked - plan.cost, plan.step
        if step is None or left >= step:
            held = "every width is at its largest" if step is None else f"{self.second_limit} holds"
            outcome.notes.append(f"{budget} is not used up: {held}")
        tolerance = max(left, step or 0.0, 1e-12)
        outcome.promise = Promise(budget.kind, asked, plan.cost, tolerance)
        remake(outcome, structure, dict(zip(_axes(plan.groups), plan.widths.tolist(), strict=True)))
        if self.init == "fresh":
            redraw(outcome.model, task, seed)
        return outcome

    def plan(
        self, structure: Structure, budget: Budget, task: Task | None = None, *, seed: int = 0
    ) -> Plan:
        """The widths for a traced model, which stays as it is; it may be on the meta device.

        Args:
            task: batches and loss, for the densities of SNIP and GraSP.

        Raises:
            InputError: no free axis, a limit below the cost of the narrowest widths, or above
                that of the model where widths may not grow.
        """
        model = structure.trace.model
        dims = {n: _weight_dim(structure, n) for n in prunable_parameters(model)}
        groups = self._groups(structure, dims)
        place = {axis: number for number, axis in enumerate(_axes(groups))}
        layers = {n: share for n, dim in dims.items() if (share := log_share(dim, place))}
        incidence = np.zeros((len(layers), len(groups)))
        for row, share in enumerate(layers.values()):
            incidence[row, list(share)] = list(share.values())
        gains = incidence.sum(0)
        limits = self._limits(structure, budget, groups)
        sizes = np.array([g.size for g in groups], dtype=float)
        shares = [(cost.scaled(sizes), most) for cost, most in limits]
        rule = Limits(least=self.min_width, round_to=self.round_to)
        low = np.array([rule.floor(g.size) for g in groups]) / sizes
        high = np.full(len(groups), self.max_expand if self.allow_expand else 1.0)
        aims: dict[str, float] = {}
        multipliers = [0.0] * len(limits)
        if self.density_source == "synexp" and self.coupling == "widths":
            solved = solve_widths(gains, shares, low, high)
            factors, multipliers = solved.factors, list(solved.multipliers)
        else:
            if self.density_source == "synexp":
                aims, multipliers = self._filled(structure, budget, dims, list(layers))
            else:
                aims = self._masked(structure, budget, list(layers), task, seed)
            p = np.array(list(aims.values()))
            if self.coupling == "widths":
                factors = nearest_shares(incidence, p, shares, low, high)
            else:
                factors = within(shares, low, np.clip(_roots(incidence, p), low, high))
        tops = [int(h * g.size + 1e-9) for h, g in zip(high, groups, strict=True)]

        def wider(v: int, width: int) -> int | None:
            following = (width // self.round_to + 1) * self.round_to
            if width < groups[v].size < following:
                following = groups[v].size
            return following if following <= tops[v] else None

        start = [
            rule.rounded(g.size, int(r * g.size + 1e-9))
            for r, g in zip(factors, groups, strict=True)
        ]
        widths = spend(np.array(start), gains, limits, wider)
        kept = {n: polynomial([dims[n]], _axes(groups)).at(widths) for n in layers}
        return Plan(
            groups, factors, widths, aims, {n: k / size_of(dims[n]) for n, k in kept.items()},
            tuple(multipliers), limits[0][0].at(widths), cheapest_step(widths, limits[0][0], wider),
        )  # fmt: skip

    def _groups(self, structure: Structure, dims: Mapping[str, Dim]) -> list[Group]:
        """The free axes that scored weights lie on."""
        scored = {axis for dim in dims.values() for axis in plain_axes(dim)}
        found = [
            g for g in structure.free
            if g.axis in scored and not (self.exclude and matches_any(g.name, self.exclude))
        ]  # fmt: skip
        if not found:
            nothing = described(f"{len(structure)} axes, none to give another size")
            raise InputError("model", nothing, "a model with free axes along its weights")
        return found

    def _limits(self, structure: Structure, budget: Budget, groups: Sequence[Group]) -> list[Limit]:
        """The budget and the second limit, in counts of units."""
        limits = []
        for one in self._budgets(budget):
            cost = _cost(structure, one)
            if not self.allow_expand and cost.target > cost.whole * (1 + 1e-9):
                raise InputError(
                    "budget", str(one), f"{one.kind} up to {cost.whole:.0f}, or allow_expand"
                )
            kind: Any = one.kind
            limits.append((cost_polynomial(structure, kind, _axes(groups)), cost.target))
        return limits

    def _budgets(self, budget: Budget) -> list[Budget]:
        return [budget, *([Budget.parse(self.second_limit)] if self.second_limit else [])]

    def _filled(
        self, structure: Structure, budget: Budget, dims: Mapping[str, Dim], layers: list[str]
    ) -> tuple[dict[str, float], list[float]]:
        """Densities by water-filling, every limit taken as a share of the layers' own cost."""
        costs, most = [], []
        for one in self._budgets(budget):
            cost = _cost(structure, one)
            own = _weight_macs(structure) if one.kind == "macs" else {}
            costs.append([max(own.get(n, 0), 1) if own else size_of(dims[n]) for n in layers])
            most.append(cost.target / cost.whole * sum(costs[-1]))
        p, multipliers = fill_log_densities(costs, most, math.inf if self.allow_expand else 1.0)
        return dict(zip(layers, p, strict=True)), multipliers

    def _masked(
        self, structure: Structure, budget: Budget, layers: list[str], task: Task | None, seed: int
    ) -> dict[str, float]:
        """Densities of a mask over all weights, at the share that the budget asks for."""
        cost = _cost(structure, budget)
        rounds = self.iterations if self.density_source == "synflow" else 1
        options = {"saliency": self.density_source, "iterations": rounds, "batches": self.batches}
        twin = copy.deepcopy(structure.trace.model)
        share = Budget("density", min(cost.target / cost.whole, 1.0))
        masks = create("one-shot", options).prune(twin, share, task, seed=seed).masks
        return {n: max(float(masks[n].double().mean()), 1 / masks[n].numel()) for n in layers}


def _axes(groups: Sequence[Group]) -> list[Axis]:
    return [g.axis for g in groups]


def _cost(structure: Structure, budget: Budget) -> StructureCost:
    """For the inputs that the model was traced on."""
    return structure_cost(structure, budget, structure.trace.args or structure.trace.kwargs)


def _weight_dim(structure: Structure, name: str) -> Dim:
    """All dimensions of a weight as one."""
    found = structure.trace
    return tuple(a for dim in found.tensors[found.same[name]] for a in dim)


def _weight_macs(structure: Structure) -> dict[str, int]:
    """Multiply-accumulates by the weight that they read."""
    found, total = structure.trace, Counter[str]()
    for node, dim in found.notes.macs:
        for operand in node.all_input_nodes:
            if operand.op == "get_attr" and str(operand.target) in found.same:
                total[found.same[str(operand.target)]] += size_of(dim)
    return total


def _roots(incidence: np.ndarray, densities: np.ndarray) -> np.ndarray:
    """p^(1/k) for the k axes of a layer; the least, where layers share an axis."""
    roots = densities ** (1 / incidence.sum(1))
    return np.array([roots[incidence[:, v] > 0].min() for v in range(incidence.shape[1])])
