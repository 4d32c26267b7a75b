"""Lottery tickets: train, cut the smallest weights, put the rest back, train again.

Papers: "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019,
arXiv 1803.03635; "Stabilizing the Lottery Ticket Hypothesis", arXiv 1903.01611. One class: a
ticket is rewound to its values at step k, and k = 0 is the initialisation.

 1. θ_0, m = 1. Train k steps, keep θ_k and all buffers.
 2. Train from k to T; among the survivors remove round(rate · active) of least |θ_T|.
 3. θ ← m ⊙ θ_k, fresh optimizer; learning rate and data order go on from step k.
 4. Repeat 2–3, then train the ticket once more.

The budget says where to stop: the number of rounds follows from the rate (or the rate from the
number of rounds, r = 1 − P^(1/n)), and the last round removes just what is missing. The public
codes remove one weight more than asked; here the rounded count is exact. Controls that make
the claim testable: the same mask with weights drawn anew (`reinit`), random masks of the same
size per layer (`random-mask`) or over all layers (`global-random`), weights re-drawn from the
ticket's own initial values (`ticket-sample`), the mask taken at step 0 (`prune-at-init`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.analysis.stability import stability
from secateurs.errors import InputError, require
from secateurs.method import Procedure, masked_outcome, weights_to_keep
from secateurs.outcome import Outcome
from secateurs.parts.allocation import counts_from_densities
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.parts.prunable import matches_any, sizes
from secateurs.parts.schedules import rate_for
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.task import Task
from secateurs.training.loop import total_steps
from secateurs.training.order import mix, steps_per_epoch
from secateurs.training.rounds import (
    Tickets,
    iterative_rounds,
    masked_state,
    random_masks_like,
    remove_smallest,
    remove_smallest_overall,
    train_masked,
)
from secateurs.workspace import Workspace

Control = Literal["reinit", "random-mask", "global-random", "ticket-sample", "prune-at-init"]


def rewind_steps(rewind: int | str, total: int, per_epoch: int) -> int:
    """A rewind point as a number of steps: ``500``, ``"4%"`` of training, ``"6ep"`` epochs.

    Raises:
        InputError: malformed, or not before the end of training.
    """
    accepted = f"steps below {total}, a percentage such as 4%, or epochs such as 6ep"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|ep)?\s*", str(rewind))
    if match is None:
        raise InputError("rewind", rewind, accepted)
    value = float(match[1])
    scale = {"%": total / 100, "ep": per_epoch, None: 1.0}[match[2]]
    step = round(value * scale)
    require(0 <= step < max(total, 1), "rewind", rewind, accepted)
    return step


@register(
    "lottery-ticket",
    paper=Paper(
        "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        "ICLR",
        2019,
        "1803.03635",
    ),
    tags=Tags("U", "weight", "PAT", "mag", recovery="rewind", rounds="iterative"),
    budgets=("sparsity", "density", "params"),
)
@dataclass(frozen=True)
class LotteryTicket(Procedure):
    """Iterative magnitude pruning with survivors reset to their initial values."""

    rate: float = option(0.2, "share of the surviving weights removed in a round")
    rounds: int | None = option(
        None, "rounds of removal; sets the rate (1 is the one-shot ticket)", "rounds"
    )
    output_rate: float = option(0.5, "the last layer's rate as a share of the rate, per layer")
    rates: dict[str, float] = option(
        {}, "own rates of weights whose name matches a regular expression, per layer"
    )
    scope: Literal["layer", "global"] = option("layer", "rank within layers, or all together")
    rewind: int | str = option(0, "rewind point: steps, a percentage (4%) or epochs (6ep)")
    reset: Literal["each", "end"] = option(
        "each", "rewind after every round, or only before the last training"
    )
    optimizer_state: Literal["drop", "keep"] = option(
        "drop", "the optimizer's state at the rewind point"
    )
    controls: tuple[Control, ...] = option((), "controls to train beside the last ticket")
    noise: tuple[float, ...] = option(
        (), "control: noise on the initial weights, in units of each layer's std"
    )
    stability_samples: int = option(0, "pairs of trainings for the stability measures; 0 is off")
    evaluate_every: int = option(
        0, "steps between evaluations, for the early-stopping step; 0 is off", "steps"
    )
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        require(0 < self.rate < 1, "rate", self.rate, "a share in (0, 1)")
        require(self.rounds is None or self.rounds >= 0, "rounds", self.rounds, "0 or more")
        require(0 < self.output_rate <= 1, "output_rate", self.output_rate, "a share in (0, 1]")
        for pattern, rate in self.rates.items():
            require(0 <= rate < 1, f"rates {pattern}", rate, "a share in [0, 1)")
        require(
            not self.rates or self.scope == "layer", "rates", self.rates, "none with scope global"
        )
        require(self.evaluate_every >= 0, "evaluate_every", self.evaluate_every, "0 or more")
        require(
            self.stability_samples >= 0, "stability_samples", self.stability_samples, "0 or more"
        )

    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        work = work or Workspace()
        if "reinit" in self.controls and isinstance(task.model, nn.Module):
            raise InputError(
                "controls", "reinit", "controls that need no function for fresh models"
            )
        params = self.prunable(model)
        keep = weights_to_keep(model, params, budget)
        plan = self.plan(sizes(params), keep)
        rewind = self._rewind_step(task)
        tickets = iterative_rounds(
            model,
            Masks.ones_like(params),
            task,
            lambda weights, masks, number: self._remove(weights, masks, plan[number]),
            len(plan),
            rewind_step=rewind,
            reset=self.reset,
            keep_optimizer=self.optimizer_state == "keep",
            seed=seed,
            work=work,
            evaluate_every=self.evaluate_every,
        )
        last = tickets.rounds[-1]
        outcome = masked_outcome(model, last.masks)
        outcome.history = [r.record() for r in tickets.rounds]
        outcome.metrics_before = tickets.rounds[0].metrics
        outcome.metrics_after = last.metrics
        if self.controls or self.noise:
            rows = self._controls(model, task, tickets, seed, work)
            outcome.tables["controls"] = rows
        if self.stability_samples:
            outcome.tables["stability"] = stability(
                model,
                task,
                tickets.rewound,
                last.masks,
                start_step=rewind,
                samples=self.stability_samples,
                seed=seed,
                work=work.child("stability"),
            )
        model.load_state_dict(last.trained)
        return outcome

    def _rewind_step(self, task: Task) -> int:
        total = total_steps(task, task.training)
        return rewind_steps(self.rewind, total, steps_per_epoch(task.training_loader()))

    def plan(self, size: Mapping[str, int], keep: int) -> list[dict[str, int]]:
        """How many weights each tensor loses in each round, down to `keep` in all.

        With one ranking over all tensors, the counts stand under the name ''.
        """
        total = sum(size.values())
        if self.scope == "global":
            size = {"": total}
        rate = self.rate if not self.rounds else rate_for(max(keep, 1) / total, self.rounds)
        own = self._layer_rates(size, rate)
        left, plan = dict(size), list[dict[str, int]]()
        limit = self.rounds if self.rounds is not None else 1000
        while sum(left.values()) > keep and len(plan) < limit:
            counts = {n: round(own[n] * left[n]) for n in left}
            missing = sum(left.values()) - keep
            last = self.rounds is not None and len(plan) == self.rounds - 1
            if sum(counts.values()) > missing or last or not any(counts.values()):
                share = own if any(counts.values()) else dict.fromkeys(own, 1.0)
                weight = sum(share[n] * left[n] for n in left)
                exact = {n: min(1.0, share[n] * missing / weight) for n in left}
                counts = counts_from_densities(exact, left, missing)
            plan.append(counts)
            left = {n: left[n] - counts[n] for n in left}
        return plan

    def _layer_rates(self, size: Mapping[str, int], rate: float) -> dict[str, float]:
        own = dict.fromkeys(size, rate)
        if len(size) > 1:
            own[list(size)[-1]] = rate * self.output_rate
        for pattern, value in self.rates.items():
            matching = [name for name in size if matches_any(name, [pattern])]
            if not matching:
                raise InputError("rates", pattern, "a pattern of one of " + ", ".join(size))
            own.update(dict.fromkeys(matching, value))
        return own

    def _remove(
        self, weights: Mapping[str, Tensor], masks: Masks, counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        if self.scope == "global":
            return remove_smallest_overall(weights, masks, counts[""])
        return remove_smallest(weights, masks, counts)

    def _controls(
        self,
        model: nn.Module,
        task: Task,
        tickets: Tickets,
        seed: int,
        work: Workspace,
    ) -> list[dict[str, Any]]:
        """Train every control as the last ticket was trained."""
        last = tickets.rounds[-1]
        rows: list[dict[str, Any]] = [{"control": "ticket", **last.metrics}]
        arms: list[tuple[str, Mapping[str, Tensor], Masks]] = [
            (name, *self._control(name, tickets, task, seed)) for name in self.controls
        ]
        arms += [
            (f"noise-{scale:g}", noisy(tickets.rewound, last.masks, scale, seed), last.masks)
            for scale in self.noise
        ]
        for name, state, masks in arms:
            model.load_state_dict(masked_state(state, masks))
            trained = train_masked(
                model,
                masks,
                task,
                seed=seed,
                start_step=tickets.rewind_step,
                work=work.child("controls"),
                name=name,
            )
            rows.append({"control": name, **trained.metrics})
        return rows

    def _control(
        self, name: Control, tickets: Tickets, task: Task, seed: int
    ) -> tuple[Mapping[str, Tensor], Masks]:
        masks, rewound = tickets.rounds[-1].masks, tickets.rewound
        match name:
            case "reinit":
                return task.fresh_model(mix(seed, 101)).state_dict(), masks
            case "random-mask":
                return rewound, random_masks_like(masks, mix(seed, 102))
            case "global-random":
                return rewound, random_masks_like(masks, mix(seed, 103), scope="global")
            case "ticket-sample":
                return resampled(rewound, masks, mix(seed, 104)), masks
            case "prune-at-init":
                start = {n: rewound[n] for n in masks}
                counts = {n: int((~m).sum()) for n, m in masks.items()}
                return rewound, Masks(remove_smallest(start, Masks.ones_like(start), counts))


@register(
    "lottery-rewinding",
    paper=Paper("Stabilizing the Lottery Ticket Hypothesis", "arXiv", 2019, "1903.01611"),
    tags=Tags("U", "weight", "PAT", "mag", recovery="rewind", rounds="iterative"),
    budgets=("sparsity", "density", "params"),
)
@dataclass(frozen=True)
class LotteryRewinding(LotteryTicket):
    """Lottery tickets rewound to an early step, for deep networks at large learning rates.

    The default of 2 % is the paper's k = 500 of 30,000 steps for ResNet-18, rounded.
    """

    scope: Literal["layer", "global"] = option("global", "rank within layers, or all together")
    rewind: int | str = option("2%", "rewind point: steps, a percentage (4%) or epochs (6ep)")


def resampled(state: Mapping[str, Tensor], masks: Masks, seed: int) -> dict[str, Tensor]:
    """Surviving weights drawn with replacement from the survivors' own values, per tensor."""
    generator = torch.Generator().manual_seed(seed)
    out = {n: t.clone() for n, t in state.items()}
    for name, mask in masks.items():
        pool = state[name][mask]
        if pool.numel():
            drawn = torch.randint(pool.numel(), (pool.numel(),), generator=generator)
            out[name][mask] = pool[drawn]
    return out


def noisy(state: Mapping[str, Tensor], masks: Masks, scale: float, seed: int) -> dict[str, Tensor]:
    """Gaussian noise of `scale` standard deviations of each tensor on the masked tensors."""
    generator = torch.Generator().manual_seed(mix(seed, 105))
    out = {n: t.clone() for n, t in state.items()}
    for name in masks:
        draw = torch.randn(state[name].shape, generator=generator, dtype=state[name].dtype)
        out[name] += scale * state[name].std() * draw
    return out
