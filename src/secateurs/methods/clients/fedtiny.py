"""FedTiny: one very sparse model across clients none of whom ever trains a dense one.

Paper: "Distributed Pruning Towards Tiny Neural Networks in Federated Learning", ICDCS 2023,
arXiv 2212.01977.

Candidates. From a model that the server trained on a few public samples, C masks of the same
density d: each layer l keeps its n_{l,c} = max(1, floor(d_{l,c} N_l)) largest |w|, with
d_{l,c} = d (1 + ε (2u − 1)), u ~ U(0, 1), ε = 0.5, drawn anew until the whole is within 2 % of d.

Adaptive batch-norm selection. Clients run every candidate on a tenth of their samples, which
moves the running statistics; the server averages these by samples; clients report the summed
loss of each candidate with the averages; the smallest Σ_k loss_{k,c} / Σ_k n'_k wins.

Progressive pruning. FedAvg of the sparse weights; after round r (every Δ, up to R_stop) one block,
from the output backward, exchanges in each of its layers

    K_l = ceil(rate(r) · nnz_l),     rate(r) = a/2 (1 + cos(π r / R_stop)),

connections: the smallest averaged |w| go, and the largest |mean gradient| come, starting at 0. A
client sends of a layer its K_l largest gradients only, and holds no other dense gradient while
it looks for them.

Decisions. A budget is kept to one weight: a drawn candidate, within 2 % of the density, has the
rest spread over its layers in proportion. Densities above 1/(1 + ε) get less noise, so that none
passes 1. Δ = 10 and R_stop = 100 are the paper's for hundreds of rounds; the defaults here are
for ten. K_l is at most the number of removed weights, and gradients that are 0 do not count.
Blocks are counted by adjustments, not by rounds: the authors' index by the round, which reaches
2 of a ResNet's 4. The authors pre-train on samples of the test set; here they are taken out of the
training set. A weight that grew on the gradient of one client's model may find the averaged
unit dead and stay at 0: at the end the largest weight that its layer dropped takes its place, and
a note says so. Running statistics go on from the server's with momentum 0.1 over ten passes, as in
the authors' code, but dropout is off meanwhile; variances are averaged without the spread of the
means unless `pooled_variance`. The last round does not adjust: nobody would train what grew.

Measured (the digits over five clients at Dirichlet 0.3, density 0.012, tests/replicas): 93.2 %,
beside 87.1 for global magnitude, 84.1 for SNIP and 81.8 for a random mask, each fixed by the
server, and 98.2 for dense FedAvg, which sends 23 times the bytes. The peak memory of a client is
the same for all: what is masked is zero, not gone, while PyTorch trains.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, SecateursError, require
from secateurs.federated.candidates import candidate_of, pool_of
from secateurs.federated.client import LOSS, STATS
from secateurs.federated.growth import blocks_of
from secateurs.federated.messages import Arrays, Layout
from secateurs.federated.procedure import EXCHANGED, FederatedProcedure, peak_memory
from secateurs.federated.server import Fleet, Global, Growth, train_rounds
from secateurs.federated.statistics import aggregate_statistics, set_statistics, tracked_norms
from secateurs.method import weights_to_keep
from secateurs.methods.clients.fedavg import FedAvg
from secateurs.outcome import Outcome
from secateurs.parts.allocation import counts_from_densities, densities, with_floor
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.parts.schedules import CosineDecay
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.state import Tree, model_state
from secateurs.task import Task
from secateurs.training.order import mix
from secateurs.workspace import Workspace

POOL_ONLY = -1
"""Version of the masks of a client that has candidates and no masks yet."""
DRAWS = 10_000
"""Densities drawn for one candidate, until its sum is near enough."""


def draw_candidates(
    densities: Mapping[str, float],
    size: Mapping[str, int],
    keep: int,
    candidates: int,
    *,
    noise: float = 0.5,
    tolerance: float = 0.02,
    seed: int = 0,
) -> Tensor:
    """(candidates, layers) int64: weights that each candidate keeps of each layer.

    Args:
        densities: around which to draw, by layer.
        size: weights by layer.
        keep: weights that every candidate keeps in all.
        noise: ε, the largest relative change of a density.
        tolerance: largest relative miss of a draw; it is then made up to one weight.

    Raises:
        InputError: no draw in 10,000 comes near enough; the nearest is told.
    """
    total, sizes = sum(size.values()), torch.tensor(list(size.values()))
    base = torch.tensor([densities[name] for name in size], dtype=torch.float64)
    spread = (1 / base - 1).clamp(0, noise)
    generator = torch.Generator().manual_seed(mix(seed, 6))
    found = []
    for _ in range(candidates):
        nearest = math.inf
        for _ in range(DRAWS):
            draw = torch.rand(len(base), dtype=torch.float64, generator=generator)
            counts = (base * (1 + spread * (2 * draw - 1)) * sizes + 1e-9).floor().clamp(min=1)
            miss = abs(int(counts.sum()) - keep)
            nearest = min(nearest, miss)
            if miss <= max(tolerance * keep, 1):
                break
        else:
            shown = f"a density of {keep / total:.4g}"
            raise InputError(
                "tolerance", tolerance, f"more: of {DRAWS} draws none missed {shown} by less than "
                f"{nearest / keep:.2%}",
            )  # fmt: skip
        found.append(_made_up(counts, sizes, keep))
    return torch.stack(found)


def _made_up(counts: Tensor, sizes: Tensor, keep: int) -> Tensor:
    """Counts that sum to `keep`, changed in proportion, each from 1 to the layer's size."""
    names = [str(i) for i in range(len(sizes))]
    shares = counts / sizes * (keep / counts.sum())
    floored = torch.maximum(shares, 1 / sizes).clamp(max=1)
    made = counts_from_densities(
        dict(zip(names, floored.tolist(), strict=True)),
        dict(zip(names, sizes.tolist(), strict=True)),
        keep,
    )
    made = with_floor(made, dict(zip(names, sizes.tolist(), strict=True)), 1)
    return torch.tensor([made[name] for name in names])


def select_candidate(losses: Sequence[Tensor], samples: Sequence[float]) -> tuple[int, Tensor]:
    """The candidate of least loss over all clients' samples, and all losses.

    Args:
        losses: (candidates,) summed losses of each client; one that is not finite excludes the
            candidate.
        samples: of each client.

    Raises:
        SecateursError: no candidate has a finite loss.
    """
    mean = torch.stack([loss.double() for loss in losses]).sum(0) / sum(samples)
    usable = mean.masked_fill(~mean.isfinite(), torch.inf)
    if not bool(usable.isfinite().any()):
        raise SecateursError("candidates: none has a finite loss; accepted: at least one")
    return int(usable.argmin()), mean


@register(
    "fedtiny",
    paper=Paper(
        "Distributed Pruning Towards Tiny Neural Networks in Federated Learning",
        "ICDCS",
        2023,
        "2212.01977",
    ),
    tags=Tags("U", "weight", "PBT+PDT", "mag+sens+bn", fusion="fl", rounds="iterative"),
    budgets=("sparsity", "density", "params"),
)
@dataclass(frozen=True)
class FedTiny(FederatedProcedure):
    """Choose among coarse masks by the clients' losses, then mend the mask while training."""

    candidates: int = option(10, "C, masks to choose from", "masks")
    noise: float = option(0.5, "ε, largest relative change of a layer's density")
    tolerance: float = option(0.02, "relative miss of a drawn density that is still made up")
    allocation: Literal["uniform", "er", "erk"] = option(
        "uniform", "densities that are varied; the authors' code varies er by noise=1"
    )
    bn_passes: int = option(10, "passes over the development samples that move the statistics")
    bn_average: Literal["exponential", "plain"] = option(
        "exponential", "from the server's statistics on with momentum 0.1, or the samples' own"
    )
    pooled_variance: bool = option(False, "add the spread of the clients' means to the variance")
    adjust_every: int = option(2, "Δ, rounds from one adjustment to the next", "rounds")
    stop_round: int = option(7, "R_stop, the last round that may adjust", "rounds")
    adjust_rate: float = option(0.3, "a, share of a layer exchanged at first")
    granularity: Literal["block", "layer", "entire"] = option("block", "what adjusts at a time")
    order: Literal["backward", "forward"] = option("backward", "in which blocks take turns")
    grow_data: Literal["batch", "sample", "all"] = option(
        "batch", "what a client takes gradients on: its last batch, one sample, all"
    )
    grow_weighting: Literal["uniform", "samples"] = option(
        "uniform", "how clients' gradients are averaged"
    )
    baselines: bool = option(
        False, "also run FedAvg with the dense and a randomly pruned model, and tabulate"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.candidates >= 1, "candidates", self.candidates, "at least 1")
        require(0 <= self.noise <= 1, "noise", self.noise, "a share in [0, 1]")
        require(0 < self.tolerance < 1, "tolerance", self.tolerance, "a share in (0, 1)")
        require(self.bn_passes >= 1, "bn_passes", self.bn_passes, "at least 1")
        require(self.adjust_every >= 1, "adjust_every", self.adjust_every, "at least 1")
        require(self.stop_round >= 0, "stop_round", self.stop_round, "0 or more")
        require(0 <= self.adjust_rate < 1, "adjust_rate", self.adjust_rate, "a share in [0, 1)")

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
        params = self.prunable(model)
        state = model_state(model)
        layout = Layout.of(state, params)
        fleet = self.fleet(
            grid,
            params,
            seed,
            **{
                "bn-passes": self.bn_passes,
                "bn-momentum": 0.1 if self.bn_average == "exponential" else 0.0,
                "grow-data": self.grow_data,
            },
        )
        counts = self._draw(model, params, budget, seed)
        pool = pool_of(layout, state, counts)
        known = work.has("selection")
        chosen = work.once("selection", lambda: self._select(fleet, model, layout, pool))
        if known:
            fleet.take(chosen)
        start, masks = candidate_of(layout, pool, chosen["candidate"])
        model.load_state_dict(start)
        if chosen["means"] is not None:
            set_statistics(model, chosen["means"], chosen["variances"])
        form = "candidate" if self.candidates > 1 else "mask"
        shared = Global(layout, model_state(model), masks, form=form, candidate=chosen["candidate"])
        history = train_rounds(
            fleet, shared, self.schedule(seed), work=work, growth=self.adjustment
        )
        if idle := shared.replace_idle():
            chosen["notes"].append(
                f"weights that grew and stayed at 0, replaced at the end: {idle}"
            )
        model.load_state_dict(shared.state)
        outcome = self.served(model, shared.masks, fleet, history)
        outcome.notes += chosen["notes"]
        outcome.tables["candidates"] = chosen["table"]
        return outcome

    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        given = copy.deepcopy(model)
        outcome = super().run(model, task, budget, seed=seed, work=work)
        if self.baselines:
            work = work or Workspace()
            total = outcome.masks.total
            rows = [beside("fedtiny", outcome, total, task.primary)]
            shared = {f.name: getattr(self, f.name) for f in fields(FederatedProcedure)}
            for arm, kept in (("dense", Budget.parse("density=1")), ("random", budget)):
                mask = {} if arm == "dense" else {"allocation": self.allocation}
                fedavg = FedAvg(**shared, pruner_options=mask)
                at = work.child(f"fedavg-{arm}")
                other = fedavg.run(copy.deepcopy(given), task, kept, seed=seed, work=at)
                rows.append(beside(f"fedavg, {arm}", other, total, task.primary))
            outcome.tables["beside FedAvg"] = rows
        return outcome

    def _draw(
        self, model: nn.Module, params: Mapping[str, nn.Parameter], budget: Budget, seed: int
    ) -> Tensor:
        size = {n: p.numel() for n, p in params.items()}
        keep = weights_to_keep(model, dict(params), budget)
        require(
            keep >= len(size), "budget", str(budget), f"one weight for each of {len(size)} layers"
        )
        shapes = {n: tuple(p.shape) for n, p in params.items()}
        return draw_candidates(
            densities(shapes, keep / sum(size.values()), self.allocation),
            size,
            keep,
            self.candidates,
            noise=self.noise,
            tolerance=self.tolerance,
            seed=seed,
        )

    def refuse(self, model: nn.Module, budget: Budget) -> None:
        super().refuse(model, budget)
        self._draw(model, self.prunable(model), budget, 0)

    def _select(self, fleet: Fleet, model: nn.Module, layout: Layout, pool: Arrays) -> Tree:
        """Adaptive batch-norm selection."""
        if self.candidates == 1:
            nothing: Tree = {"candidate": 0, "means": None, "variances": None, "table": []}
            return {**nothing, **fleet.since(), "notes": []}
        notes, sent, first = [], dict(pool), dict(pool)
        statistics: Arrays = {}
        if tracked_norms(model):
            replies = fleet.ask("abns_stats", 0, STATS, pool, {})
            weights = [float(reply.metrics["development"]) for reply in replies]
            means, variances = aggregate_statistics(
                [reply.arrays for reply in replies], weights, pooled=self.pooled_variance
            )
            statistics = {"means": means, "variances": variances}
            sent, first = statistics, {**pool, **statistics}
        else:
            notes.append("no batch norm: candidates were chosen by their plain losses")
        replies = fleet.ask("abns_loss", 0, LOSS, sent, {}, whole=lambda: (first, {}))
        fleet.held |= dict.fromkeys((reply.rank for reply in replies), POOL_ONLY)
        chosen, losses = select_candidate(
            [reply.arrays["losses"] for reply in replies],
            [float(reply.metrics["development"]) for reply in replies],
        )
        table = [
            {"candidate": number, "loss": loss, "chosen": number == chosen}
            for number, loss in enumerate(losses.tolist())
        ]
        return {
            "candidate": chosen,
            "means": statistics["means"][chosen] if statistics else None,
            "variances": statistics["variances"][chosen] if statistics else None,
            "table": table,
            **fleet.since(),
            "notes": notes,
        }

    def adjustment(self, number: int, masks: Masks) -> Growth | None:
        """What is exchanged after a round."""
        due = number % self.adjust_every == 0 and 0 < number <= self.stop_round
        if not due or number == self.rounds:
            return None
        names = self.turn(number // self.adjust_every - 1, list(masks))
        rate = CosineDecay(self.adjust_rate, self.stop_round)(number)
        wanted = {n: exchanged_count(rate, masks[n]) for n in names}
        counts = {n: count for n, count in wanted.items() if count}
        return Growth(counts, self.grow_weighting) if counts else None

    def turn(self, adjustment: int, names: Sequence[str]) -> list[str]:
        """The layers whose turn it is at an adjustment, counted from 0."""
        if self.granularity == "entire":
            return list(names)
        blocks = blocks_of(names) if self.granularity == "block" else [[n] for n in names]
        ordered = blocks[::-1] if self.order == "backward" else blocks
        return ordered[adjustment % len(ordered)]


def exchanged_count(rate: float, mask: Tensor) -> int:
    """K = ceil(rate · kept), as far as there are removed weights to take their place."""
    kept = int(mask.sum())
    # 0.15 of 1,000 is a hair above 150
    return min(math.ceil(rate * kept - 1e-9 * kept), mask.numel() - kept)


def beside(arm: str, outcome: Outcome, total: int, primary: str) -> dict[str, Any]:
    """A row of the comparison."""
    sent = outcome.tables[EXCHANGED][-1]
    return {
        "arm": arm,
        primary: outcome.metrics_after[primary],
        "kept": outcome.masks.kept / total,
        "down": sent["down"],
        "up": sent["up"],
        "peak client memory": peak_memory(outcome.history),
    }
