"""LAPP: filters go while the network trains from scratch, by a threshold learned in every layer.

Paper: "LAPP: Layer Adaptive Progressive Pruning for Compressing CNNs from Scratch", arXiv
2309.14157. Every layer has a threshold t; its filter j is on while its relative norm reaches it,

    m_j = 1[s_j ≥ t],   s_j = ‖W_j‖ / mean_i ‖W_i‖,   ∂m/∂(s − t) = σ'((s − t)/τ) / τ,

and task loss and cost move the thresholds together, while a ramp brings down what may be spent:

    L = L_task + λ · max(0, F/F_0 − ρ(t)),   ρ(t) = 1 − (1 − ρ) · min(1, t / (ramp · T_p)).

After T_p steps the structure is fixed, the filters that are off are removed, and the training
goes on with the momenta of what is left. Before it begins, every layer gets a bypass at its full
output width (`secateurs.parts.bypass`), so a layer that loses all filters but one still passes
everything on. F counts the bypasses, F_0 is the network without them.

Only the abstract could be read: equations and defaults are those of our card. Ours besides:

 - Linear layers between hidden widths are layers, too; their bypass is a grouped linear layer.
   Left whole are, by default, the convolution of the input, 1x1 shortcut projections, always
   grouped convolutions and what makes the model's output.
 - Without a bypass a unit is an axis of the traced model: one threshold for all that is tied to
   it, its score the mean over the layers that make it. Its mask stands where the unit is read and
   not behind the convolution: what BatchNorm makes of a zero is not zero, and the shortened
   network would compute something else.
 - At the freeze the cost is brought to the budget: units with the smallest margin s − t go while
   it is above, and those that missed by least come back while there is room (``project``).
 - The thresholds are not averaged over processes, and gradients must not be scaled (fp16).
 - Where a model without bypass has to be handed back as a graph, momenta are not kept.

Measured on the digits (tests/replicas/test_lapp.py): at 30 % of the MACs 0.983 with and 0.985
without a bypass, dense 0.993; at 12 % 0.938 and 0.974. At equal real cost the bypass is no gain,
as the cost then falls in proportion to the filters and not with their square; random filters,
removed before the training, are as good as learned ones there. What the bypass does is to carry
layers of one or two filters: the same filters without it reach 0.468 at 12 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from secateurs.errors import InputError, described, require
from secateurs.method import Procedure
from secateurs.outcome import Outcome, Promise
from secateurs.parts.budgets import Budget
from secateurs.parts.bypass import bypass_weights
from secateurs.parts.posynomial import Posynomial, Term
from secateurs.parts.prunable import matches_any, prunable_parameters
from secateurs.parts.thresholds import counts_of, frozen_masks, projected
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.state import Tree
from secateurs.structure.axes import Group, Structure
from secateurs.structure.bypassed import Bypassed
from secateurs.structure.choice import Choice
from secateurs.structure.cost import StructureCost, structure_cost
from secateurs.structure.dimensions import is_frozen, plain_axes, size_of, units_of
from secateurs.structure.layers import (
    consumers,
    grouped,
    is_projection,
    is_stem,
    scale_behind,
    weighted_layers,
)
from secateurs.structure.polynomial import cost_polynomial
from secateurs.structure.removal import remove
from secateurs.structure.substitution import substitute
from secateurs.structure.trace import trace
from secateurs.task import Task
from secateurs.training.loop import fit_once, total_steps
from secateurs.training.order import mix, steps_per_epoch
from secateurs.training.thresholds import Gate, LearnedThresholds, Rule, shortened_state
from secateurs.workspace import Workspace


@register(
    "lapp",
    paper=Paper(
        "LAPP: Layer Adaptive Progressive Pruning for Compressing CNNs from Scratch",
        "arXiv",
        2023,
        "2309.14157",
    ),
    tags=Tags("S", "filter+channel+neuron", "PDT", "mag+learned", learn="thr", rounds="gradual"),
    budgets=("macs", "params"),
)
@dataclass(frozen=True)
class LAPP(Procedure):
    """Learned thresholds switch filters off in the first part of one training from scratch."""

    needs: ClassVar[tuple[str, ...]] = ("training", "inputs")

    bypass: Literal["dw+gpw", "none"] = option(
        "dw+gpw", "beside every layer: a depthwise and a grouped 1x1 convolution, or nothing"
    )
    importance: Literal["l1", "l2", "bn_gamma"] = option(
        "l1", "of a filter: a norm of its weights, or |γ| of the norm behind it"
    )
    prune_share: float = option(0.5, "share of the training in which is pruned")
    ramp: float = option(0.75, "share of that in which the allowed cost falls")
    penalty: float = option(4.0, "λ of the cost")
    tau: float = option(0.5, "τ, width of the surrogate gradient")
    threshold_lr: float = option(0.02, "learning rate of the thresholds")
    skip: tuple[str, ...] = option(
        ("stem", "projection"), "left whole: stem, projection, or regular expressions of layers"
    )
    project: Literal["both", "down", "none"] = option(
        "both", "at the freeze: bring the cost to the budget, only down to it, or refuse if above"
    )

    def __post_init__(self) -> None:
        require(0 < self.prune_share < 1, "prune_share", self.prune_share, "a share in (0, 1)")
        require(0 <= self.ramp <= 1, "ramp", self.ramp, "a share in [0, 1]")
        require(self.penalty >= 0, "penalty", self.penalty, "0 or more")
        require(self.tau > 0, "tau", self.tau, "above 0")
        require(self.threshold_lr >= 0, "threshold_lr", self.threshold_lr, "0 or more")

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
        precision = task.training.precision
        require(precision != "fp16", "precision", precision, "no or bf16: gradients are not scaled")
        structure = Structure(trace(model, task.example_inputs))
        cost = structure_cost(structure, budget, task.example_inputs)
        gates, spent = self.gates(structure, budget)
        least = spent.at(np.ones(len(gates)))
        if least > cost.target:
            raise InputError("budget", str(budget), f"at least {least:.0f}, a filter a layer")
        layers: dict[str, Bypassed] = {}
        if self.bypass != "none":
            layers = inserted(model, gates, mix(seed, 301))
        end = max(1, round(self.prune_share * total_steps(task, task.training)))
        rule = self.rule(spent, cost, end)
        step, state, optimizer, history = self._prune(model, task, gates, rule, end, seed, work)
        kept = self._frozen(model, gates, rule, state, cost)
        outcome = Outcome(model, history=history)
        outcome.tables["thresholds"] = [
            {"layer": g.name, "kept": int(k.sum()), "total": g.size, "threshold": float(t)}
            for g, k, t in zip(gates, kept, state["thresholds"], strict=True)
        ]
        cut = self._shrink(outcome, task, gates, kept, layers)
        if cut is None:
            optimizer = None
            outcome.notes.append("momenta begin anew: the shortened model is a graph")
        else:
            optimizer = shortened_state(optimizer, outcome.model, cut)
        outcome.promise = promise_of(budget, cost, spent, kept)
        fit_once(
            outcome.model, task, task.training, seed=seed, work=work, name="rest",
            start_step=step, optimizer_state=optimizer,
        )  # fmt: skip
        return outcome

    def rule(self, spent: Posynomial, cost: StructureCost, end: int) -> Rule:
        """How the thresholds learn until step `end`."""
        share, fall = cost.target / cost.whole, self.ramp * end

        def allowed(step: int) -> float:
            return 1 - (1 - share) * (min(1.0, step / fall) if fall else 1.0)

        norm: Literal["l1", "l2"] = "l2" if self.importance == "l2" else "l1"
        return Rule(spent, cost.whole, allowed, self.penalty, self.threshold_lr, self.tau, norm)

    # --- what there is to prune ---------------------------------------------------------------

    def gates(self, structure: Structure, budget: Budget) -> tuple[list[Gate], Posynomial]:
        """The thresholds, and the cost in how many units of each are on.

        Raises:
            InputError: no layer to prune, or without γ behind it where that is the importance.
        """
        found = structure.trace
        layers = {
            path: node
            for path, node in weighted_layers(found).items()
            if not grouped(node) and not self._skipped(structure, path, node)
        }
        if self.bypass == "none":
            gates, spent = self._axis_gates(structure, budget, layers)
        else:
            gates, spent = self._layer_gates(structure, budget, layers)
        if not gates:
            raise InputError(
                "model", described(f"{type(found.model).__name__} without a layer to prune"),
                "a model with convolutions or linear layers between hidden widths",
            )  # fmt: skip
        return gates, spent

    def _skipped(self, structure: Structure, path: str, node: fx.Node) -> bool:
        roles = {
            "stem": is_stem(structure.trace, node),
            "projection": is_projection(node),
        }
        patterns = [s for s in self.skip if s not in roles]
        named = bool(patterns) and matches_any(path, patterns)
        return named or any(roles.get(s, False) for s in self.skip)

    def _layer_gates(
        self, structure: Structure, budget: Budget, layers: Mapping[str, fx.Node]
    ) -> tuple[list[Gate], Posynomial]:
        """A threshold a layer. What a filter costs does not depend on other layers."""
        found = structure.trace
        work = {node: size_of(dim) for node, dim in found.notes.macs}
        fixed = structure.parameters() if budget.kind == "params" else structure.macs()
        gates: list[Gate] = []
        terms: dict[Term, float] = {}
        for path, node in layers.items():
            weight = found.tensors[f"{path}.weight"]
            if is_frozen(weight[0]):
                continue
            layer, size = found.model.get_submodule(path), size_of(weight[0])
            if budget.kind == "params":
                own, beside = sum(p.numel() for p in layer.parameters()), bypass_weights(layer)
            else:
                own = work[node]
                positions = own // size_of(tuple(a for dim in weight for a in dim))
                beside = bypass_weights(layer) * positions
            terms[(len(gates),)] = own / size
            fixed += beside - own
            main = f"{path}.main"
            scored = self._scored(structure, path, f"{main}.weight", torch.arange(size))
            gates.append(Gate(path, size, (scored,), outputs=(main,)))
        return gates, Posynomial.of_terms({(): fixed, **terms}, len(gates))

    def _axis_gates(
        self, structure: Structure, budget: Budget, layers: Mapping[str, fx.Node]
    ) -> tuple[list[Gate], Posynomial]:
        """A threshold an axis. The cost of a layer is the product of what is on at both ends."""
        found = structure.trace
        gates: list[Gate] = []
        axes = []
        for group in structure.free:
            made_by = [p for p in layers if _makes(structure, p, group)]
            read_by = consumers(structure, group)
            if not made_by or not read_by or group.normalized:
                continue
            scored = tuple(
                self._scored(
                    structure, path, f"{path}.weight",
                    torch.from_numpy(units_of(found.tensors[f"{path}.weight"][0], group.axis)),
                )
                for path in made_by
            )  # fmt: skip
            inputs = tuple((path, torch.from_numpy(units)) for path, units in read_by.items())
            gates.append(Gate(group.name, group.size, scored, inputs=inputs))
            axes.append(group.axis)
        kind: Any = budget.kind
        return gates, cost_polynomial(structure, kind, axes)

    def _scored(
        self, structure: Structure, path: str, weight: str, units: Tensor
    ) -> tuple[str, Tensor]:
        if self.importance != "bn_gamma":
            return weight, units
        scale = scale_behind(structure.trace, weighted_layers(structure.trace)[path])
        if scale is None:
            raise InputError("importance", "bn_gamma", f"l1 or l2: no norm reads {path} alone")
        return scale, units

    # --- pruning ------------------------------------------------------------------------------

    def _prune(
        self,
        model: nn.Module,
        task: Task,
        gates: Sequence[Gate],
        rule: Rule,
        end: int,
        seed: int,
        work: Workspace | None,
    ) -> tuple[int, Tree, Tree, list[dict[str, Any]]]:
        """Train epoch by epoch until step `end`, or until an epoch stays within the budget."""
        step, state, optimizer = 0, None, None
        epoch, target = steps_per_epoch(task.training_loader()), rule.allowed(end)
        history: list[dict[str, Any]] = []
        while step < end:
            stop = min(step + epoch, end)

            def attach(
                net: nn.Module,
                hung: torch.optim.Optimizer,
                _: int,
                step: int = step,
                state: Tree = state,
            ) -> list[LearnedThresholds]:
                begun = None if state is None else state["thresholds"]
                return [
                    LearnedThresholds(
                        hung, net, gates, rule, first_step=step, thresholds=begun
                    )
                ]  # fmt: skip

            trained = fit_once(
                model, task, task.training, seed=seed, work=work, name=f"prune-{step}",
                start_step=step, stop_step=stop, optimizer_state=optimizer, keep_optimizer=True,
                attach=attach,
            )  # fmt: skip
            [state], optimizer = trained.hooks, trained.optimizer
            history.append(
                {"step": stop, "allowed": rule.allowed(stop), "most spent": state["most"]}
            )
            whole, step = stop - step == epoch, stop
            if whole and state["most"] <= target:
                break
        return step, state, optimizer, history

    def _frozen(
        self,
        model: nn.Module,
        gates: Sequence[Gate],
        rule: Rule,
        state: Tree,
        cost: StructureCost,
    ) -> list[Tensor]:
        """The units that stay, the cost brought to the budget."""
        margins = [
            g.scores(model, rule.norm).cpu() - t.cpu()
            for g, t in zip(gates, state["thresholds"], strict=True)
        ]
        kept = frozen_masks(margins)
        now = rule.cost.at(counts_of(kept))
        if self.project == "none":
            require(
                now <= cost.target, "project", self.project,
                f"down or both: {now:.0f} is above the budget of {cost.target:.0f}",
            )  # fmt: skip
            return kept
        return projected(kept, margins, rule.cost, cost.target, fill=self.project == "both")

    @staticmethod
    def _shrink(
        outcome: Outcome,
        task: Task,
        gates: Sequence[Gate],
        kept: Sequence[Tensor],
        layers: Mapping[str, Bypassed],
    ) -> Mapping[str, Mapping[str, Sequence[int]]] | None:
        """Remove what is off; what was cut of every tensor, or None if the model is a graph."""
        units = {g.name: np.flatnonzero(k.numpy()) for g, k in zip(gates, kept, strict=True)}
        if layers:
            cut = {
                f"{path}.{name}": places
                for path, layer in layers.items()
                for name, places in layer.shorten_(units[path].tolist()).items()
            }
            outcome.surgery.append(substitute(outcome.model, layers))
            return cut
        structure = Structure(trace(outcome.model, task.example_inputs))
        remove(outcome, structure, Choice({structure[n].axis: u for n, u in units.items()}, 0, 0))
        plan = outcome.surgery[-1]
        return plan["tensors"] if plan["form"] == "module" else None


def inserted(model: nn.Module, gates: Sequence[Gate], seed: int) -> dict[str, Bypassed]:
    """Put a bypass with fresh weights beside the layer of every gate, in place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {g.name: Bypassed(model.get_submodule(g.name)) for g in gates}
    substitute(model, layers)
    return layers


def _makes(structure: Structure, path: str, group: Group) -> bool:
    return group.axis in set(plain_axes(structure.trace.tensors[f"{path}.weight"][0]))


def promise_of(
    budget: Budget, cost: StructureCost, spent: Posynomial, kept: Sequence[Tensor]
) -> Promise:
    """The budget as asked and as reached; the tolerance is the cheapest unit that is off."""
    counts = counts_of(kept)
    reached = spent.at(counts)
    steps = [
        spent.at(counts + np.eye(len(counts))[i]) - reached
        for i, units in enumerate(kept)
        if not bool(units.all())
    ]
    return Promise(budget.kind, cost.asked, reached, max(min(steps, default=0.0), 1e-12))
