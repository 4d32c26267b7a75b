"""A consensus sub-network: gates that look at every sample learn to say the same for all of them.

Paper: "Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training",
arXiv 2302.10798. Each block has a gate that sees its input x and closes blocks or channels,

    q = sigmoid(FC2(relu(FC1(mean x)))),   g = 1[q ≥ 1/2],   ∂g/∂q = 1
    blocks:  y = act(skip(x) + g F(x))     channels:  g_c times channel c, wherever it is summed

and with ḡ, the mean of g over the batch, training minimises

    L = L_task + λ_act max(0, Σ c_u ḡ_u − s) + λ_pol 1/U Σ ḡ_u (1 − ḡ_u)

c being shares of what can be gated and s what the budget leaves of it. At the end the gates are
constants: closed units go, and all gates. No second training.

No code is public and only the abstract and summaries could be read: gates, straight-through
estimator, polarisation, a user's sparsity and one pass are the paper's, the formulas and defaults
are those of our card. What we decided:

 - Any model: residual blocks and inner channels are found in the trace (`structure/residual.py`,
   `structure/switches.py`), and where channels meet (VGG, perceptrons) c is not constant: the
   cost of ḡ is the budget's own polynomial in the kept counts, exact and differentiable. A block
   whose shortcut is a projection loses F and keeps the projection.
 - The budget is that of the whole model and is kept: ``extract=budget`` closes units in the order
   of their votes, ``extract=vote`` is the card's ḡ ≥ 1/2, exactly 1/2 being open.
 - Where training is too short for the gates to agree, what is closed or opened against its vote
   is missed. So the vote may be held before the end: for the share `settle` of the steps, still of
   the same pass, the static network trains on, smaller already.
 - Gates do not decay. A layer keeps a channel at least.

On the digits (`tests/replicas/test_consensus_polarization.py`) three of six blocks, or half of the
inner channels, go and change no output: 0.979 and 0.974 against 0.963 of the whole network and
0.954 and 0.967 of small ones trained from scratch. Without the polarisation the gates of single
samples disagree, and channels lose 4.5 points when they are cut. Settling did not pay there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import require
from secateurs.method import Procedure
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.gates import over_budget, polarization
from secateurs.parts.prunable import prunable_parameters
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.structure.axes import Structure
from secateurs.structure.choice import Choice, choose, chosen
from secateurs.structure.cost import StructureCost, structure_cost
from secateurs.structure.removal import promise_of, remove
from secateurs.structure.residual import residual_blocks, shortcut_of
from secateurs.structure.substitution import substitute
from secateurs.structure.switches import Switch, block_switches, channel_switches
from secateurs.structure.trace import trace
from secateurs.task import Task
from secateurs.training.decay import spare_from_decay
from secateurs.training.gates import Gated, Votes, penalized, votes
from secateurs.training.keeping import StepHooks
from secateurs.training.loop import fit_once, total_steps
from secateurs.training.order import mix
from secateurs.workspace import Workspace

DISSENT = 0.01
"""Consensus defect above which the outcome warns."""


@register(
    "consensus-polarization",
    paper=Paper(
        "Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training",
        "arXiv",
        2023,
        "2302.10798",
    ),
    tags=Tags("S", "layer+channel", "PDT", "learned", learn="gate", recovery="none"),
    budgets=("macs", "params", "sparsity", "density"),
)
@dataclass(frozen=True)
class ConsensusPolarization(Procedure):
    """Train gates that look at samples until they agree, then remove what they close."""

    needs: ClassVar[tuple[str, ...]] = ("training", "inputs")

    units: Literal["channels", "blocks"] = option(
        "channels", "what a gate closes: inner channels of any model, or residual blocks"
    )
    hidden: int = option(16, "neurons of a gate", "neurons")
    open_bias: float = option(1.5, "what a gate starts from; moderate, so that q is not saturated")
    polar_weight: float = option(1.0, "λ_pol, of the polarisation")
    polar_ramp: float = option(0.0, "share of the steps over which λ_pol rises from 0")
    act_weight: float = option(2.0, "λ_act, of what is open beyond the budget")
    penalty: Literal["hinge", "mean"] = option(
        "hinge", "of the open cost: what exceeds the budget, or all of it"
    )
    cost: Literal["budget", "count"] = option(
        "budget", "c: what the budget counts (MACs, parameters), or one a unit"
    )
    noise: float = option(0.0, "factor of the logistic noise on the gates while training")
    extract: Literal["budget", "vote"] = option(
        "budget", "what stays: the most voted for that the budget leaves, or by the threshold"
    )
    threshold: float = option(0.5, "of extract=vote: the least share of samples for which it opens")
    settle: float = option(0.0, "share of the training after the vote, of the static network")

    def __post_init__(self) -> None:
        require(self.hidden >= 1, "hidden", self.hidden, "at least 1 neuron")
        require(self.polar_weight >= 0, "polar_weight", self.polar_weight, "0 or more")
        require(0 <= self.polar_ramp <= 1, "polar_ramp", self.polar_ramp, "a share in [0, 1]")
        require(self.act_weight >= 0, "act_weight", self.act_weight, "0 or more")
        require(self.noise >= 0, "noise", self.noise, "0 or more")
        require(0 < self.threshold <= 1, "threshold", self.threshold, "a share in (0, 1]")
        require(0 <= self.settle < 1, "settle", self.settle, "a share in [0, 1)")

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
        gateable = self._gateable(model, task, budget)
        gated = Gated(
            model, gateable.switches, hidden=self.hidden, open_bias=self.open_bias,
            noise=self.noise, seed=mix(seed, 311),
        )  # fmt: skip
        steps = total_steps(task, task.training)
        last = steps - round(self.settle * steps)
        try:
            self._train(gated, gateable, task, seed, last, work)
            vote = votes(gated, task, seed)
            outcome = Outcome(model, metrics_before=task.measure(gated))
        finally:
            gated.ungated()
        gateable = self._gateable(model, task, budget)  # traced on the device that it trained on
        threshold = self.threshold if self.extract == "vote" else None
        choice, kept = gateable.extract(outcome, vote, threshold)
        outcome.promise = promise_of(budget, gateable.cost, choice)
        outcome.metrics_after = task.measure(outcome.model)
        outcome.history = [
            {"stage": "gated", "defect": vote.defect, **outcome.metrics_before},
            {"stage": "removal", "defect": None, **outcome.metrics_after},
        ]
        if last < steps:
            fit_once(
                outcome.model, task, task.training, seed=seed, work=work, name="settled",
                start_step=last,
            )  # fmt: skip
            outcome.metrics_after = task.measure(outcome.model)
            outcome.history.append({"stage": "settled", "defect": None, **outcome.metrics_after})
        outcome.tables["gates"] = _table(vote, self.threshold, kept)
        outcome.notes += _dissent(vote, outcome.tables["gates"])
        return outcome

    def _train(
        self,
        gated: Gated,
        gateable: Gateable,
        task: Task,
        seed: int,
        last: int,
        work: Workspace | None,
    ) -> None:
        """By ``task.training`` up to the vote, with the terms of the gates in the loss."""
        hooks: list[StepHooks] = []
        ramp = self.polar_ramp * total_steps(task, task.training)

        def attach(_: nn.Module, optimizer: torch.optim.Optimizer, __: int) -> list[StepHooks]:
            spare_from_decay(optimizer, gated.gates.parameters())
            hooks.append(StepHooks(optimizer))
            return hooks

        def penalty() -> Tensor:
            means = gated.means()
            every = torch.cat(list(means.values()))
            cost = gateable.share(means) if self.cost == "budget" else every.mean()
            risen = min(1.0, hooks[0].step / ramp) if ramp else 1.0
            return self.act_weight * over_budget(
                cost, gateable.budget if self.penalty == "hinge" else 0.0
            ) + self.polar_weight * risen * polarization(every)

        pressed = penalized(task, penalty)
        fit_once(
            gated, pressed, task.training, seed=seed, work=work, name="gated", attach=attach,
            stop_step=last,
        )  # fmt: skip

    def _gateable(self, model: nn.Module, task: Task, budget: Budget) -> Gateable:
        """What can be gated; refuses a budget that closing all of it would not reach."""
        structure = Structure(trace(model, task.example_inputs))
        cost = structure_cost(structure, budget, task.example_inputs)
        return (
            Blocks(structure, cost, budget) if self.units == "blocks" else Channels(structure, cost)
        )


Extracted = tuple[Choice, dict[str, int]]


class Gateable(Protocol):
    """Units that can be gated: what they cost, which of them stay, and how the others go.

    Attributes:
        switches: of the units.
        cost: of the model, and what it is to come down to.
        budget: s, what this leaves of the cost that can be gated, a share.
    """

    switches: list[Switch]
    cost: StructureCost
    budget: float

    def share(self, means: Mapping[str, Tensor]) -> Tensor:
        """Σ c_u ḡ_u, the share of the gateable cost that is open, differentiable."""
        ...

    def extract(self, outcome: Outcome, vote: Votes, threshold: float | None) -> Extracted:
        """Remove what is not voted for, by a threshold or by the budget.

        Returns:
            What that costs, and the number of units that stay, by switch.
        """
        ...


class Channels:
    """Inner channels and neurons, axis by axis."""

    def __init__(self, structure: Structure, cost: StructureCost) -> None:
        self.structure, self.cost = structure, cost
        self.switches = channel_switches(structure)
        self.axes = {structure[s.name].axis: s.name for s in self.switches}
        self.fixed = cost.of(lambda a: 0 if a in self.axes else a.size)
        self.budget = (cost.target - self.fixed) / (cost.whole - self.fixed)
        equal = {s.name: torch.zeros(s.units) for s in self.switches}
        choose(structure, equal, cost.of, cost.target)  # refuses what no choice can reach

    def share(self, means: Mapping[str, Tensor]) -> Tensor:
        counts: Any = {axis: means[name].sum() for axis, name in self.axes.items()}
        spent: Any = self.cost.of(lambda a: counts.get(a, a.size))
        share: Tensor = (spent - self.fixed) / (self.cost.whole - self.fixed)
        return share

    def extract(self, outcome: Outcome, vote: Votes, threshold: float | None) -> Extracted:
        if threshold is None:
            choice = choose(self.structure, vote.order, self.cost.of, self.cost.target)
        else:
            kept = {}
            for axis, name in self.axes.items():
                units = np.flatnonzero((vote.open[name] >= threshold).numpy())
                # a layer keeps the channel that most samples open
                kept[axis] = units if len(units) else vote.order[name].argmax().view(1).numpy()
            choice = chosen(kept, self.cost.of)
        stay = {n: len(choice.kept.get(a, range(a.size))) for a, n in self.axes.items()}
        remove(outcome, self.structure, choice)
        return choice, stay


class Blocks:
    """Residual blocks: what is closed becomes its shortcut."""

    def __init__(self, structure: Structure, cost: StructureCost, budget: Budget) -> None:
        self.cost, found = cost, structure.trace
        self.blocks = residual_blocks(found)
        self.switches = block_switches(found, self.blocks)
        self.costs = {
            path: float(block.macs if budget.kind == "macs" else block.parameters)
            for path, block in self.blocks.items()
        }
        self.gateable = sum(self.costs.values())
        fixed = cost.whole - self.gateable
        self.budget = (cost.target - fixed) / self.gateable
        least = f"at least {cost.reached(fixed):.4g}, what no block is part of"
        require(self.budget >= 0, "budget", str(budget), least)

    def share(self, means: Mapping[str, Tensor]) -> Tensor:
        spent = torch.stack([self.costs[name] * mean.sum() for name, mean in means.items()])
        return spent.sum() / self.gateable

    def extract(self, outcome: Outcome, vote: Votes, threshold: float | None) -> Extracted:
        cost = before = self.cost.whole
        closed = []
        for name in sorted(self.blocks, key=lambda name: float(vote.order[name])):
            over = cost > self.cost.target
            if over if threshold is None else float(vote.open[name]) < threshold:
                closed.append(name)
                before, cost = cost, cost - self.costs[name]
        model = outcome.model
        shortcuts = {p: shortcut_of(model, self.blocks[p]) for p in self.blocks if p in closed}
        outcome.surgery.append(substitute(model, shortcuts))
        before = before if threshold is None else cost + max(self.costs.values())
        return Choice({}, cost, before), {p: int(p not in closed) for p in self.blocks}


def _table(vote: Votes, threshold: float, kept: Mapping[str, int]) -> list[dict[str, Any]]:
    """Of every switch: units, how many of them are voted open and stay, how far samples agree."""
    return [
        {
            "gate": name,
            "units": len(shares),
            "voted open": int((shares >= threshold).sum()),
            "kept": kept[name],
            "mean share": float(shares.mean()),
            "defect": float((shares * (1 - shares)).mean()),
        }
        for name, shares in vote.open.items()
    ]


def _dissent(vote: Votes, table: list[dict[str, Any]]) -> list[str]:
    """Notes where samples do not agree, or the budget was met against their votes."""
    notes = []
    if vote.defect > DISSENT:
        notes.append(f"the gates do not agree: consensus defect {vote.defect:.3f}, above {DISSENT}")
    units = sum(row["units"] for row in table)
    closed = sum(max(0, row["voted open"] - row["kept"]) for row in table)
    opened = sum(max(0, row["kept"] - row["voted open"]) for row in table)
    for count, done, why in ((closed, "closed", "meet"), (opened, "opened", "use")):
        if count > max(1, DISSENT * units):
            notes.append(
                f"{count} of {units} units were {done} against their vote to {why} the budget: "
                "train longer, let the smaller network settle (settle=0.2), or extract=vote"
            )
    return notes
