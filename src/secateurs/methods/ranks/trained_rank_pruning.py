"""Trained rank pruning: kernels are cut to low rank while they train, and factorised at the end.

Paper: "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", IJCAI 2020, arXiv 2004.14566
(EMC2 2019: arXiv 1812.02402). Before every m-th iteration each kernel W, taken as a matrix, is
replaced by its truncated singular value decomposition, and training goes on from there:

    W ← U_k Σ_k V_kᵀ,   k the smallest with  Σ_{i≤k} σ_i² ≥ T Σ σ_i²
    ∂L/∂W  gets  λ · U_k V_kᵀ   in the same iteration: a sub-gradient of the nuclear norm Σσ

Steps lift W off the low rank (momenta are not cut), the next cut puts it back. At the end two thin
layers take the place of each kernel (`secateurs.structure.factorised`), with next to no loss.

Ranks by the budget. The paper fixes T, and what the network then costs is found out. Here T is what
the budget leaves: all layers have one energy share, the largest for which the factorised network
costs no more, found anew at every cut from the spectra of that moment, and once more at the end.
What one more rank would have exceeded goes to the next layers in that order, so the cost is short
of the budget by less than the cheapest refused rank. That is within 1 % in networks of some width
(a rank of one layer of ResNet-20 is 0.1 to 0.4 % of its MACs, of ND 0.7 to 1 %), not in small ones.
A layer stays dense where two thin ones would cost no less, counted in
what the budget counts: with strides, VH and ND save fewer MACs than weights.

The paper's own way is ``projection=energy:0.98``, ``final=energy:0.99`` (0.95 for VH) and a budget
that is then an upper bound, ``macs=1`` for none. One energy share applied again and again is no
projection: of k equal values it leaves ⌈Tk⌉, and fewer the next time, until 1/k ≥ 1 − T. So a fixed
T also says at which ranks to end (9 for a flat spectrum and 0.9), and a shorter period ends lower.
With ``final=budget`` a fixed T cuts no further than the budget; where it has not come that far when
training ends, the last cut is a large one, and accuracy is lost (0.24 instead of 0.98 at a quarter
of the MACs with T = 0.98): therefore ``projection=budget``.

Where the public code differs: it counts iterations from 0 in every epoch (``count=epoch``); it cuts
every iteration, 5 in its script (the paper: 20, unconfirmed); it ends with the values above 0.05
(``final=value:0.05``, for ND energy:0.85), replaces convolutions always, and those with strides
only for ND; it passes over decompositions that fail, which here is an error. Convolutions with
groups stay as they are. In networks without convolutions the linear layers but the last are taken.
The 4 epochs of retraining that the code offers are ``recover="finetune"``.

Measured on the digits (tests/replicas/test_trained_rank_pruning.py): 0.991 at half of the MACs and
0.969 at a fifth, where the dense network has 0.990 and, cut to these ranks afterwards, 0.540 and
0.110. VGG-16 at half of the MACs on one thread (benchmarks/low_rank.py): NC takes 0.73 of the dense
time, VH 0.65, ND 1.6, as depthwise convolutions wait for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.devices import to_device
from secateurs.errors import DivergedError, InputError, described, require
from secateurs.method import Procedure
from secateurs.outcome import Outcome, Promise
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import count_macs
from secateurs.parts.low_rank import (
    Mode,
    RankPrice,
    Ranks,
    Spectrum,
    parse_rule,
    ranks_within,
    spectrum,
)
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.state import Tree
from secateurs.structure.factorised import Factorised, Site, sites
from secateurs.structure.substitution import substitute
from secateurs.task import Task
from secateurs.training.keeping import StepHooks
from secateurs.training.loop import fit_once
from secateurs.training.order import steps_per_epoch
from secateurs.workspace import Workspace

BUDGET = "budget"

Choose = Callable[[Mapping[str, Spectrum]], Mapping[str, Tensor]]
"""Decompositions by layer -> the rank of each matrix."""


class LowRankTraining(StepHooks):
    """Cuts weights to low rank before every `period`-th iteration of any training loop.

    Args:
        optimizer: over the weights.
        weights: by name; cut at once, as iteration 0 begins.
        modes: how each is a matrix.
        choose: the ranks to keep.
        period: iterations from one cut to the next.
        cycle: iterations after which they are counted from 0 again.
        nuclear: λ; λ·UₖVₖᵀ is added to the gradients of an iteration that began with a cut.
        project: false only adds that, and cuts nothing.
        total: iterations of the training; None where that is not known.

    Raises:
        DivergedError: a weight cannot be decomposed (NaN or Inf).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Mapping[str, nn.Parameter],
        modes: Mapping[str, Mode],
        choose: Choose,
        *,
        period: int = 20,
        cycle: int | None = None,
        nuclear: float = 0.0,
        project: bool = True,
        total: int | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.weights, self.modes, self.choose = dict(weights), dict(modes), choose
        self.period, self.cycle, self.total = period, cycle, total
        self.nuclear, self.project = nuclear, project
        self.pulls: dict[str, Tensor] = {}
        self._begin_iteration()

    def _begin_iteration(self) -> None:
        self.pulls = {}
        iteration = self.step if self.cycle is None else self.step % self.cycle
        if iteration % self.period or self.step == self.total:
            return
        found = decomposed(self.weights, self.modes)
        ranks = self.choose(found)
        with torch.no_grad():
            for name, weight in self.weights.items():
                # a layer that stays dense keeps its very weights
                if self.project and bool((ranks[name] < found[name].values.shape[1]).any()):
                    weight.copy_(found[name].truncated(ranks[name]))
                if self.nuclear and weight.requires_grad:
                    self.pulls[name] = found[name].nuclear_subgradient(ranks[name])

    def before_step(self) -> None:
        for name, pull in self.pulls.items():
            gradient = self.weights[name].grad
            if gradient is None:
                raise InputError(name, described("no gradient"), "a backward pass before the step")
            gradient.add_(pull, alpha=self.nuclear)

    def after_step(self) -> None:
        self._begin_iteration()

    def state_dict(self) -> Tree:
        return {**super().state_dict(), "pulls": self.pulls}

    def load_state_dict(self, state: Tree) -> None:
        super().load_state_dict(state)
        device = next(iter(self.weights.values())).device
        self.pulls = to_device(state["pulls"], device)


def decomposed(weights: Mapping[str, Tensor], modes: Mapping[str, Mode]) -> dict[str, Spectrum]:
    """The decomposition of every weight; a failure names the layer."""
    found = {}
    for name, weight in weights.items():
        try:
            found[name] = spectrum(weight, modes[name])
        except torch.linalg.LinAlgError as error:
            raise DivergedError(f"{name}: no singular value decomposition ({error})") from None
    return found


@register(
    "trained-rank-pruning",
    paper=Paper(
        "TRP: Trained Rank Pruning for Efficient Deep Neural Networks", "IJCAI", 2020, "2004.14566"
    ),
    tags=Tags("S", "rank", "PDT", "mag", learn="sr", recovery="none", rounds="gradual"),
    budgets=("macs", "params", "sparsity", "density"),
)
@dataclass(frozen=True)
class TrainedRankPruning(Procedure):
    """Train on kernels of low rank, then put two thin layers in the place of each."""

    mode: Mode = option("NC", "how a kernel is a matrix: by channels, by space, by filter")
    projection: str = option(
        "budget",
        "ranks of the cuts while training: what the budget pays, or energy:T, linear:R, value:V",
    )
    final: str = option("budget", "ranks at the end: what the budget pays, or a rule as above")
    period: int = option(20, "iterations from one cut to the next", "steps")
    count: Literal["training", "epoch"] = option(
        "training", "what iterations are counted in; the public code starts anew every epoch"
    )
    nuclear: float = option(0.0, "λ of the nuclear norm: 3e-4 where the paper uses it")
    project: bool = option(True, "false cuts nothing while training: only the nuclear norm acts")
    layers: Literal["auto", "convolutions", "linear", "all"] = option(
        "auto", "auto: the convolutions, or in a network without any the linear layers"
    )
    skip_first: bool = option(True, "leave the first convolution as it is")
    skip_pointwise: bool = option(True, "leave 1x1 convolutions as they are")
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave as they are")

    def __post_init__(self) -> None:
        for text in (self.projection, self.final):
            if text != BUDGET:
                parse_rule(text)
        require(self.period >= 1, "period", self.period, "at least 1 step")
        require(self.nuclear >= 0, "nuclear", self.nuclear, "0 or more")

    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        plan = self.plan(model, task.example_inputs, budget)
        self._train(model, task, plan, seed, work)
        outcome = Outcome(model, metrics_before=task.measure(model))
        step = self.factorise(outcome, plan)
        outcome.promise = plan.promise(outcome.model, task.example_inputs, step)
        outcome.metrics_after = task.measure(outcome.model)
        outcome.history = [
            {"stage": "training", **outcome.metrics_before},
            {"stage": "factorisation", **outcome.metrics_after},
        ]
        return outcome

    def plan(self, model: nn.Module, example_inputs: Any, budget: Budget) -> Plan:
        """The layers, what their ranks cost, and what they may cost.

        Raises:
            InputError: there is no such layer, or rank 1 everywhere is above the budget.
        """
        prunable = self.prunable(model)  # refuses what has no weights, or NaN in them
        found = {
            name: site
            for name, site in sites(model, example_inputs).items()
            if f"{name}.weight" in prunable
        }
        chosen = self._chosen(found, classifier=_last_linear(found))
        if not chosen:
            raise InputError(
                "model",
                described(f"{type(model).__name__} without a layer that may be of low rank"),
                "convolutions beyond the first and 1x1 ones (skip_first, skip_pointwise), or "
                "linear layers beyond the last (layers=linear)",
            )
        return Plan.of(model, chosen, self.mode, example_inputs, budget, self.is_bound)

    @property
    def is_bound(self) -> bool:
        """Whether the budget decides on ranks; else rules do, and it is an upper bound."""
        return BUDGET in (self.projection, self.final)

    def _chosen(self, found: Mapping[str, Site], classifier: str | None) -> dict[str, Site]:
        convolutions = [
            name
            for name, site in found.items()
            if isinstance(site.layer, nn.Conv2d)
            and not (self.skip_pointwise and site.layer.kernel_size == (1, 1))
        ]
        linear = [
            name
            for name, site in found.items()
            if isinstance(site.layer, nn.Linear) and name != classifier
        ]
        if self.layers == "linear" or (self.layers == "auto" and not convolutions):
            names = linear
        else:
            names = convolutions[1:] if self.skip_first else convolutions
            names += linear if self.layers == "all" else []
        return {name: site for name, site in found.items() if name in names}

    def _train(
        self, model: nn.Module, task: Task, plan: Plan, seed: int, work: Workspace | None
    ) -> None:
        rule = None if self.projection == BUDGET else parse_rule(self.projection)

        def choose(found: Mapping[str, Spectrum]) -> dict[str, Tensor]:
            """A rule does not cut below what the budget pays, if that decides in the end."""
            values = {name: own.values for name, own in found.items()}
            if rule is not None and self.final != BUDGET:
                return {name: rule.ranks(own) for name, own in values.items()}
            paid = plan.within(values).by_name
            if rule is None:
                return {n: torch.full((len(own),), paid[n]) for n, own in values.items()}
            return {n: rule.ranks(own).clamp(min=paid[n]) for n, own in values.items()}

        def attach(
            net: nn.Module, optimizer: torch.optim.Optimizer, total: int
        ) -> list[LowRankTraining]:
            weights = {name: net.get_parameter(f"{name}.weight") for name in plan.sites}
            hook = LowRankTraining(
                optimizer, weights, plan.modes, choose,
                period=self.period, nuclear=self.nuclear, project=self.project, total=total,
                cycle=steps_per_epoch(task.training_loader()) if self.count == "epoch" else None,
            )  # fmt: skip
            return [hook]

        fit_once(model, task, task.training, seed=seed, work=work, attach=attach)

    def factorise(self, outcome: Outcome, plan: Plan) -> int:
        """Exchange the layers of the outcome's model, wherever two thin ones cost less.

        Returns:
            The cost of the rank that the budget did not pay, or where a rule decided, of the
            dearest one.
        """
        weights = {name: site.layer.weight for name, site in plan.sites.items()}
        found = decomposed(weights, plan.modes)
        if self.final == BUDGET:
            paid = plan.within({name: own.values for name, own in found.items()})
            ranks, step = paid.by_name, paid.step
        else:
            rule = parse_rule(self.final)
            ranks = {name: int(rule.ranks(own.values).max()) for name, own in found.items()}
            step = max(price.a_rank for price in plan.prices.values())
        layers, rows = {}, []
        for name, site in plan.sites.items():
            price, rank = plan.prices[name], ranks[name]
            cheaper = price.is_cheaper(rank)
            if cheaper:
                layers[name] = Factorised.of(site.layer, found[name], rank)
            energy = found[name].values.double().square()
            rows.append(
                {
                    "layer": name,
                    "mode": plan.modes[name],
                    "rank": rank if cheaper else price.most,
                    "full rank": price.most,
                    "energy": float(energy[:, :rank].sum() / energy.sum()) if cheaper else 1.0,
                    "cost": price.at(rank) / price.dense,
                }
            )
        outcome.surgery.append(substitute(outcome.model, layers))
        outcome.tables["ranks"] = rows
        if stayed := [name for name in plan.sites if name not in layers]:
            outcome.notes.append("dense, as two layers cost no less: " + ", ".join(stayed))
        return step


def _last_linear(found: Mapping[str, Site]) -> str | None:
    linear = [name for name, site in found.items() if isinstance(site.layer, nn.Linear)]
    return linear[-1] if linear else None


@dataclass(frozen=True)
class Plan:
    """The layers that come to low rank, and the budget in the currency of their prices.

    Attributes:
        sites, modes, prices: by layer.
        budget: as it was asked for.
        bound: whether ranks follow from the budget, or a rule decides and the budget is an
            upper bound.
        whole: what the dense model costs, in MACs or parameters.
        target: what the budget leaves of that.
    """

    sites: dict[str, Site]
    modes: dict[str, Mode]
    prices: dict[str, RankPrice]
    budget: Budget
    bound: bool
    whole: int
    target: float

    @staticmethod
    def of(
        model: nn.Module,
        chosen: Mapping[str, Site],
        mode: Mode,
        example_inputs: Any,
        budget: Budget,
        bound: bool,
    ) -> Plan:
        """Count what there is, and refuse a budget that no ranks can reach."""
        counted = "macs" if budget.kind == "macs" else "params"
        modes = {name: _mode_of(site, mode) for name, site in chosen.items()}
        prices = {name: site.price(modes[name], counted) for name, site in chosen.items()}
        whole = cost_of(model, counted, example_inputs)
        share = 1 - budget.value if budget.kind == "sparsity" else budget.value
        target = share * whole if budget.relative else budget.value
        plan = Plan(dict(chosen), modes, prices, budget, bound, whole, target)
        least = plan.fixed + sum(price.at(1) for price in prices.values())
        if plan.bound and least > target:
            raise InputError(
                "budget", str(budget),
                f"at least {least / whole:.4f} of the {counted}: the layers that may be of low "
                f"rank are {1 - plan.fixed / whole:.2f} of them",
            )  # fmt: skip
        return plan

    @property
    def fixed(self) -> int:
        """Cost of everything but the layers that come to low rank."""
        return self.whole - sum(price.dense for price in self.prices.values())

    def within(self, values: Mapping[str, Tensor]) -> Ranks:
        """The ranks that the budget pays, from singular values."""
        return ranks_within(values, self.prices, self.target - self.fixed)

    def promise(self, model: nn.Module, example_inputs: Any, step: int) -> Promise:
        """The budget as asked and as counted in the factorised model.

        Args:
            step: the tolerance, in MACs or parameters. Below an upper bound all is well.
        """
        counted = "macs" if self.budget.kind == "macs" else "params"
        cost = cost_of(model, counted, example_inputs)
        unit = float(step if self.bound else max(step, self.target - cost))
        if self.budget.kind in ("sparsity", "density"):
            reached = cost / self.whole
            reached = 1 - reached if self.budget.kind == "sparsity" else reached
            return Promise(self.budget.kind, self.budget.value, reached, unit / self.whole)
        return Promise(self.budget.kind, self.target, cost, unit)


def _mode_of(site: Site, mode: Mode) -> Mode:
    """Kernels of one position are one matrix however one looks at them."""
    layer = site.layer
    point = isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
    return "NC" if point else mode


def cost_of(model: nn.Module, counted: str, example_inputs: Any) -> int:
    """MACs or parameters of a model."""
    if counted == "macs":
        return sum(count_macs(model, example_inputs).values())
    return sum(p.numel() for p in model.parameters())
