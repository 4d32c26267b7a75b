"""SAP: in every round of lottery-ticket pruning the PQ index says how much to prune.

Paper: "Pruning Deep Neural Networks from a Sparsity Perspective", ICLR 2023, arXiv 2302.05601.
Per round and group (all weights, a layer, or a neuron) with d survivors of index I:
m = ceil(d (1 + η)^(q/(p−q)) (1 − I)^(pq/(q−p))), ratio = clamp(γ (1 − m/d), 0, β), and the
floor(d · ratio) smallest survivors go; then everything is reset to the initial weights.

The budget is where to stop: SAP slows down by itself, so it may not come that far within
`rounds`. Then the rest is cut by global magnitude in the last round and the outcome says so;
`shortfall="keep"` leaves it. Where the public code differs: its reset carries running
statistics over from the round before, here buffers are reset too; it selects the best epoch on
the test set, here the last epoch counts; p and q are free, not a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from secateurs.analysis.pq_index import PQIMonitor, check_norms, pq_index, pq_prune_count
from secateurs.errors import require
from secateurs.method import Procedure, masked_outcome, weights_to_keep
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.task import Task
from secateurs.training.rounds import (
    Round,
    active_scores,
    iterative_rounds,
    remove_smallest,
    remove_smallest_overall,
)
from secateurs.workspace import Workspace


@register(
    "pq-index-sap",
    paper=Paper(
        "Pruning Deep Neural Networks from a Sparsity Perspective", "ICLR", 2023, "2302.05601"
    ),
    tags=Tags("U", "weight", "PAT", "mag", recovery="rewind", rounds="iterative"),
    budgets=("sparsity", "density", "params"),
)
@dataclass(frozen=True)
class SparsityInformedPruning(Procedure):
    """Sparsity-informed adaptive pruning."""

    p: float = option(0.5, "lower norm of the PQ index")
    q: float = option(1.0, "upper norm of the PQ index")
    eta: float = option(0.0, "η_r, share of |w|^p that the removed may hold")
    gamma: float = option(1.0, "scale of the ratio")
    beta: float = option(0.9, "largest share of a group removed in one round")
    scope: Literal["global", "layer", "neuron"] = option("layer", "group that has one ratio")
    policy: Literal["sap", "lt", "os"] = option(
        "sap", "lt: a fixed rate of the survivors; os: the same, always ranked by round 0"
    )
    rate: float = option(0.2, "the fixed rate of lt and os")
    rounds: int = option(30, "largest number of rounds of removal", "rounds")
    stop_below: float = option(0.0, "stop when a round would remove less than this share")
    shortfall: Literal["magnitude", "keep"] = option(
        "magnitude", "when the rounds end above the budget: cut the rest by magnitude, or keep"
    )
    clip_norm: float | None = option(1.0, "global gradient norm in every training")
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        check_norms(self.p, self.q)
        require(self.eta >= 0, "eta", self.eta, "0 or more")
        require(self.gamma > 0, "gamma", self.gamma, "above 0")
        require(0 < self.beta < 1, "beta", self.beta, "a share in (0, 1)")
        require(0 < self.rate < 1, "rate", self.rate, "a share in (0, 1)")
        require(self.rounds >= 0, "rounds", self.rounds, "0 or more")
        require(0 <= self.stop_below < 1, "stop_below", self.stop_below, "a share in [0, 1)")

    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        params = self.prunable(model)
        keep = weights_to_keep(model, params, budget)
        monitor = PQIMonitor(self.p, self.q)
        first: dict[str, Tensor] = {}
        notes: list[str] = []

        def remove(weights: Mapping[str, Tensor], masks: Masks, number: int) -> dict[str, Tensor]:
            if number == 0:
                first.update(weights)
            ranked = {n: first[n] for n in masks} if self.policy == "os" else weights
            return self._removal(weights, ranked, masks, keep, number, notes)

        def done(trained: Round) -> bool:
            weights = {n: trained.trained[n] for n in trained.masks}
            monitor.record(weights, trained.masks)
            if trained.masks.kept <= keep:
                return True
            return self.shortfall == "keep" and self._stops(
                sum(self._counts(weights, trained.masks).values()), trained.masks
            )

        settings = replace(task.training, clip_norm=self.clip_norm)
        tickets = iterative_rounds(
            model,
            Masks.ones_like(params),
            replace(task, training=settings),
            remove,
            self.rounds,
            seed=seed,
            work=work,
            until=done,
        )
        last = tickets.rounds[-1]
        outcome = masked_outcome(model, last.masks, notes=notes)
        outcome.history = [
            {**r.record(), "pq_index": index}
            for r, index in zip(tickets.rounds, monitor.history, strict=True)
        ]
        outcome.tables["pq index by layer"] = [
            {"round": number, **layers} for number, layers in enumerate(monitor.layers)
        ]
        outcome.metrics_before = tickets.rounds[0].metrics
        outcome.metrics_after = last.metrics
        return outcome

    def _removal(
        self,
        weights: Mapping[str, Tensor],
        ranked: Mapping[str, Tensor],
        masks: Masks,
        keep: int,
        number: int,
        notes: list[str],
    ) -> dict[str, Tensor]:
        """The next masks: SAP's own, but never below `keep`, and at `keep` in the last round."""
        allowed = masks.kept - keep
        counts = self._counts(weights, masks)
        own = sum(counts.values())
        last = number == self.rounds - 1 or self._stops(own, masks)
        if last and own < allowed and self.shortfall == "magnitude":
            notes.append(
                f"{self.policy} alone came to density {(masks.kept - own) / masks.total:.4g} in "
                f"{number + 1} rounds; the rest was cut by global magnitude in the last round"
            )
            return remove_smallest_overall(ranked, masks, allowed)
        new = self._cut(ranked, masks, counts)
        if own <= allowed:
            return new
        # the last step to the budget: of what would go, the smallest go first
        going = {n: masks[n] & ~new[n] for n in masks}
        leaving = remove_smallest_overall(ranked, going, allowed)
        return {n: masks[n] & ~(going[n] & ~leaving[n]) for n in masks}

    def _stops(self, removed: int, masks: Masks) -> bool:
        return removed < self.stop_below * masks.kept

    def _counts(self, weights: Mapping[str, Tensor], masks: Masks) -> dict[str, int]:
        """Weights to remove of each group; a neuron's key is ``tensor:row``."""
        groups = self._groups(weights, masks)
        if self.policy != "sap":
            return {n: int(self.rate * int(m.sum())) for n, (_, m) in groups.items()}
        return {
            name: pq_prune_count(
                float(pq_index(weight, self.p, self.q, mask)),
                int(mask.sum()),
                self.p,
                self.q,
                self.eta,
                self.gamma,
                self.beta,
            )
            for name, (weight, mask) in groups.items()
        }

    def _groups(
        self, weights: Mapping[str, Tensor], masks: Masks
    ) -> dict[str, tuple[Tensor, Tensor]]:
        if self.scope == "layer":
            return {n: (weights[n], m) for n, m in masks.items()}
        if self.scope == "global":
            flat = torch.cat([weights[n].reshape(-1) for n in masks])
            return {"": (flat, torch.cat([m.reshape(-1) for m in masks.values()]))}
        return {
            f"{n}:{row}": (weights[n][row], mask)
            for n, whole in masks.items()
            for row, mask in enumerate(whole)
        }

    def _cut(
        self, ranked: Mapping[str, Tensor], masks: Masks, counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        if self.scope == "global":
            return remove_smallest_overall(ranked, masks, counts[""])
        if self.scope == "layer":
            return remove_smallest(ranked, masks, counts)
        return {n: self._cut_rows(n, ranked[n], masks[n], counts) for n in masks}

    def _cut_rows(
        self, name: str, weight: Tensor, mask: Tensor, counts: Mapping[str, int]
    ) -> Tensor:
        """Every row of a tensor cut by its own count, at once."""
        rows = mask.shape[0]
        scores = active_scores({name: weight}, {name: mask})[name].reshape(rows, -1)
        removed = torch.tensor([counts[f"{name}:{row}"] for row in range(rows)])
        keep = mask.reshape(rows, -1).sum(1) - removed
        rank = scores.argsort(stable=True, dim=1, descending=True).argsort(1)
        return (rank < keep[:, None]).reshape(mask.shape)
