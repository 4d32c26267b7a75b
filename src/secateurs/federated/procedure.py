"""What every federated method shares: who the clients are, how they train, where it runs.

A `FederatedProcedure` is an ordinary procedure: on one machine it splits the training set of a
task, a little public data for the server and the rest for the clients, and runs them
(`secateurs.federated.engine`). `serve` is the server alone; a Flower `ServerApp` on a network
calls it with its grid.
"""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from secateurs.devices import device_of
from secateurs.errors import require
from secateurs.federated.engine import run_clients
from secateurs.federated.partition import divide, labels_of, restricted
from secateurs.federated.server import RESTART, Fleet, Rounds
from secateurs.method import Procedure, masked_outcome
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.parts.prunable import prunable_parameters
from secateurs.settings import option
from secateurs.state import Tree, model_state
from secateurs.task import Task
from secateurs.training.loop import fit_once
from secateurs.workspace import Workspace

EXCHANGED, CLIENTS = "messages", "clients"
"""Titles of an outcome's tables."""


@dataclass(frozen=True)
class FederatedProcedure(Procedure):
    """One model, many clients, who keep their data."""

    clients: int = option(5, "how many there are (the paper: 10)", "clients")
    alpha: float = option(0.5, "of the Dirichlet split of each class; smaller is less alike")
    rounds: int = option(10, "of federated averaging", "rounds")
    local_epochs: float | None = option(
        None, "passes of a client over its data a round; by default task.training over all rounds"
    )
    participation: float = option(1.0, "share of the clients asked in a round")
    answering: float = option(1.0, "share of those that must answer; others are left out")
    shots: int = option(5, "public samples of each class, on the server", "samples")
    pretrain_steps: int = option(100, "updates on the public samples before", "steps")
    dense_stem: bool = option(True, "leave the first layer dense where it is a convolution")
    dev_fraction: float = option(0.1, "share of a client's samples it develops on")
    engine: Literal["inline", "flower"] = option(
        "inline", "clients in this process, or in Flower's simulation engine"
    )
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        require(self.clients >= 1, "clients", self.clients, "at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "above 0")
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        epochs = self.local_epochs
        require(epochs is None or epochs > 0, "local_epochs", epochs, "above 0, or none")
        for name in ("participation", "answering", "dev_fraction"):
            share = getattr(self, name)
            require(0 < share <= 1, name, share, "a share in (0, 1]")
        require(self.shots >= 0, "shots", self.shots, "0 or more")
        require(self.pretrain_steps >= 0, "pretrain_steps", self.pretrain_steps, "0 or more")

    def prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return prunable_parameters(model, exclude=self.excluded(model))

    def excluded(self, model: nn.Module) -> tuple[str, ...]:
        """`exclude`, and the first layer where it is a convolution that stays dense."""
        names = prunable_parameters(model)
        first = next(iter(names))
        stem = self.dense_stem and len(names) > 1 and names[first].ndim > 2
        return (*self.exclude, f"^{re.escape(first)}$") if stem else self.exclude

    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        self.refuse(model, budget)
        work = work or Workspace()
        shares = divide(labels_of(task), self.clients, self.alpha, self.shots, seed)
        public = restricted(task, shares.public)
        architecture = task.with_model(copy.deepcopy(model))
        tasks = [restricted(architecture, own) for own in shares.clients]
        served: list[Tree] = []

        def main(grid: Any) -> None:
            outcome = self.serve(grid, model, public, budget, seed=seed, work=work)
            served.append(_as_tree(outcome))

        def compute() -> Tree:
            run_clients(main, tasks, self.engine)
            return served[0]

        tree = work.once("served", compute)
        model.load_state_dict(tree["model"])
        outcome = masked_outcome(
            model,
            Masks.unpack(tree["masks"], tree["shapes"]).to(device_of(model)),
            notes=list(tree["notes"]),
            history=tree["history"],
            tables=tree["tables"],
        )
        outcome.metrics_after = task.measure(model)
        outcome.tables[CLIENTS] = [
            {"client": number, "samples": len(own)} for number, own in enumerate(shares.clients)
        ]
        return outcome

    def refuse(self, model: nn.Module, budget: Budget) -> None:
        """Raise `InputError` for a model or a budget that no training could serve."""
        self.prunable(model)

    @abstractmethod
    def serve(
        self,
        grid: Any,
        model: nn.Module,
        public: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        """The server of a federation.

        Args:
            grid: Flower's, with the clients behind it.
            model: where to start; it is trained in place.
            public: the server's own task, with its few training samples.
        """

    def fleet(self, grid: Any, masked: Mapping[str, Any], seed: int, **common: Any) -> Fleet:
        """The clients behind a grid, told what every message tells."""
        told = {
            "seed": seed,
            "masked": list(masked),
            "dev-fraction": self.dev_fraction,
            "local-epochs": self.local_epochs or 0.0,
            **common,
        }
        return Fleet(grid, self.clients, told, self.answering)

    def schedule(self, seed: int) -> Rounds:
        """The rounds, and who takes part."""
        return Rounds(self.rounds, self.participation, seed)

    def pretrain(self, model: nn.Module, public: Task, seed: int, work: Workspace) -> None:
        """Train on the public samples, as much as there are."""
        if self.shots and self.pretrain_steps:
            settings = replace(public.training, steps=self.pretrain_steps)
            fit_once(model, public, settings, seed=seed, work=work, name="pretrain")
        model.to("cpu")

    def served(
        self, model: nn.Module, masks: Masks, fleet: Fleet, history: list[dict[str, Any]]
    ) -> Outcome:
        """The outcome of a server, with what was exchanged."""
        outcome = masked_outcome(model, masks, notes=list(fleet.notes), history=history)
        outcome.tables[EXCHANGED] = exchanged(fleet.rows)
        return outcome


def exchanged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages and bytes by stage, and in all; what a restart of the server took is not in that."""
    keys = ("messages", "down", "up")
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    summed = [
        {"stage": stage, **{k: sum(r[k] for r in rows if r["stage"] == stage) for k in keys}}
        for stage in stages
    ]
    counted = [row for row in summed if row["stage"] != RESTART]
    whole = {key: sum(row[key] for row in counted) for key in keys}
    apart = [row for row in summed if row["stage"] == RESTART]
    return [*counted, *apart, {"stage": "all", **whole}]


def _as_tree(outcome: Outcome) -> Tree:
    return {
        "model": model_state(outcome.model),
        "masks": outcome.masks.pack(),
        "shapes": {name: list(mask.shape) for name, mask in outcome.masks.items()},
        "notes": outcome.notes,
        "history": outcome.history,
        "tables": outcome.tables,
    }


def peak_memory(history: list[dict[str, Any]]) -> int:
    """Bytes of tensors that the hungriest client held at the same time."""
    return max(record["peak memory"] or 0 for record in history)
