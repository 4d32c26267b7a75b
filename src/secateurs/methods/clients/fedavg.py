"""Federated averaging of a dense model, or of one that the server pruned before.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv 1602.05629:  w ← Σ_k (n_k / n) w_k  over the clients' weights w_k after their local passes.
A mask, found by any one-shot method on the server's few public samples, stays as it is; clients
send and receive only what it keeps. This is what FedTiny is compared with: `density=1` is the
dense model, `pruner=random-pruning` a random mask, and SNIP, SynFlow, magnitude and the like are
what a server can do that has no more than public data.

The optimizer is fresh in every round, and moments of removed weights are kept at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from secateurs.errors import InputError
from secateurs.federated.messages import Layout
from secateurs.federated.procedure import FederatedProcedure
from secateurs.federated.server import Global, train_rounds
from secateurs.method import Pruner
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import named_parameters
from secateurs.registry import Paper, Tags, create, register
from secateurs.settings import option
from secateurs.state import model_state
from secateurs.task import Task
from secateurs.workspace import Workspace


@register(
    "fedavg",
    paper=Paper(
        "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        "AISTATS",
        2017,
        "1602.05629",
    ),
    tags=Tags("U", "weight", "PBT", "any", fusion="fl"),
    budgets=("sparsity", "density", "params"),
)
@dataclass(frozen=True)
class FedAvg(FederatedProcedure):
    """Prune on the server by a one-shot method, then train across clients."""

    pruner: str = option("random-pruning", "one-shot method that finds the server's mask")
    pruner_options: dict[str, Any] = option({}, "its hyper-parameters")

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
        work = work or Workspace()
        self.pretrain(model, public, seed, work)
        masks = self._pruner(model).prune(model, budget, public, seed=seed).masks.to("cpu")
        state = model_state(model)
        shared = Global(Layout.of(state, masks), state, masks)
        fleet = self.fleet(grid, masks, seed)
        history = train_rounds(fleet, shared, self.schedule(seed), work=work)
        model.load_state_dict(shared.state)
        shared.masks.apply_(named_parameters(model, shared.masks))
        return self.served(model, shared.masks, fleet, history)

    def _pruner(self, model: nn.Module) -> Pruner:
        options = {"exclude": self.excluded(model), **self.pruner_options}
        pruner = create(self.pruner, options)
        if not isinstance(pruner, Pruner):
            raise InputError("pruner", self.pruner, "a one-shot method, such as one-shot")
        return pruner

    def refuse(self, model: nn.Module, budget: Budget) -> None:
        super().refuse(model, budget)
        self._pruner(model).accept(budget)
