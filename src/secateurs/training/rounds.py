"""Iterative pruning: train, remove some, rewind, train again.

The engine behind lottery tickets, rewinding and sparsity-informed pruning. What differs
between them is given: how many weights each group loses in a round (`RatePolicy`), the step
to which survivors are rewound, and when they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, require
from secateurs.parts.allocation import largest_by_name, per_tensor_masks
from secateurs.parts.masks import Masks
from secateurs.state import Tree, model_state
from secateurs.task import Task
from secateurs.training.keeping import MaskKeeper
from secateurs.training.loop import fit_once, total_steps
from secateurs.workspace import Workspace

State = dict[str, Tensor]

Removal = Callable[[Mapping[str, Tensor], Masks, int], dict[str, Tensor]]
"""(trained weights, masks, round) -> the masks of the next round, each within the old one."""


@dataclass
class Round:
    """One trained round.

    Attributes:
        number: 0 is the dense network.
        masks: under which it was trained.
        metrics: of the task after training.
        evaluations: (updates made, metrics) during training, if asked for.
        trained: the weights and buffers at the end.
        optimizer: the optimizer's state at the end, if it was to be kept.
    """

    number: int
    masks: Masks
    metrics: dict[str, float]
    evaluations: list[tuple[int, dict[str, float]]]
    trained: State
    optimizer: Tree | None = None

    def record(self) -> dict[str, Any]:
        """Plain values for the outcome's history.

        With evaluations during training, also the step of least loss and the metrics there:
        the early-stopping step, decided after the fact.
        """
        values = {"round": self.number, "density": self.masks.density, **self.metrics}
        if self.evaluations:
            step, metrics = min(self.evaluations, key=lambda e: e[1]["loss"])
            values["early_stop_step"] = step
            values |= {f"early_stop_{n}": v for n, v in metrics.items() if n != "loss"}
        return values


@dataclass
class Tickets:
    """The result of all rounds.

    Attributes:
        rewound: the state to which survivors are put back (at step `rewind_step`).
        rewind_step: that step.
        rounds: one a training, the dense one first.
    """

    rewound: State
    rewind_step: int
    rounds: list[Round]

    def ticket(self, number: int) -> tuple[State, Masks]:
        """The starting state of a round (survivors rewound, the rest zero) and its masks."""
        masks = self.rounds[number].masks
        return masked_state(self.rewound, masks), masks


def masked_state(state: Mapping[str, Tensor], masks: Masks) -> State:
    """A copy of a state dict with removed weights zero."""
    return {n: t * masks[n].to(t.device) if n in masks else t.clone() for n, t in state.items()}


def train_masked(
    model: nn.Module,
    masks: Masks,
    task: Task,
    *,
    seed: int,
    start_step: int = 0,
    stop_step: int | None = None,
    work: Workspace | None = None,
    name: str = "train",
    evaluate_every: int = 0,
    optimizer_state: Tree | None = None,
    keep_optimizer: bool = False,
) -> Round:
    """Train under fixed masks by ``task.training``; the optimizer starts fresh by default."""
    trained = fit_once(
        model,
        task,
        task.training,
        seed=seed,
        start_step=start_step,
        stop_step=stop_step,
        work=work,
        name=name,
        evaluate_every=evaluate_every,
        optimizer_state=optimizer_state,
        keep_optimizer=keep_optimizer,
        attach=lambda net, optimizer, _: [MaskKeeper(net, optimizer, masks.clone())],
    )
    state = model_state(model)
    metrics = task.measure(model)
    evaluations = trained.history.evaluations
    # masks and weights of a round lie on the CPU, wherever the model is
    return Round(0, masks.clone().to("cpu"), metrics, evaluations, state, trained.optimizer)


def iterative_rounds(
    model: nn.Module,
    masks: Masks,
    task: Task,
    remove: Removal,
    rounds: int,
    *,
    rewind_step: int = 0,
    reset: Literal["each", "end"] | str = "each",
    keep_optimizer: bool = False,
    seed: int = 0,
    work: Workspace | None = None,
    evaluate_every: int = 0,
    until: Callable[[Round], bool] | None = None,
) -> Tickets:
    """Train, remove, rewind, `rounds` times, and train once more.

    Args:
        model: holds the initial weights; left with those of the last training.
        masks: of round 0, usually all ones.
        remove: which weights go after a round.
        rounds: how many times weights are removed.
        rewind_step: survivors return to their values after this many updates; 0 is the
            initialisation. Learning rate and data order go on from there.
        reset: ``each`` rewinds after every removal; ``end`` only before the last training
            (in between, training goes on from the trained weights).
        keep_optimizer: give survivors the optimizer's state of the rewind point back, too.
        until: stop before the next removal when this holds for a trained round.

    Raises:
        InputError: the rewind step lies outside the training.
    """
    work = work or Workspace()
    last = total_steps(task, task.training)
    require(
        0 <= rewind_step < max(last, 1), "rewind_step", rewind_step, f"a step from 0 to {last - 1}"
    )
    require(rounds >= 0, "rounds", rounds, "0 or more")
    require(reset in ("each", "end"), "reset", reset, "each or end")
    optimizer_state = None
    if rewind_step:
        early = train_masked(
            model,
            masks,
            task,
            seed=seed,
            stop_step=rewind_step,
            work=work,
            name="to-rewind",
            keep_optimizer=keep_optimizer,
        )
        optimizer_state = early.optimizer
    rewound = model_state(model)
    done: list[Round] = []
    for number in range(rounds + 1):
        if number:
            previous = done[-1]
            masks = _removed(previous, remove, work)
            keep_training = reset == "end" and number < rounds
            start = previous.trained if keep_training else rewound
            model.load_state_dict(masked_state(start, masks))
        trained = train_masked(
            model,
            masks,
            task,
            seed=seed,
            start_step=rewind_step,
            work=work.child(f"round-{number}"),
            evaluate_every=evaluate_every,
            optimizer_state=optimizer_state,
        )
        trained.number = number
        done.append(trained)
        work.event("round", **trained.record())
        if until is not None and until(trained):
            break
    return Tickets(rewound, rewind_step, done)


def _removed(previous: Round, remove: Removal, work: Workspace) -> Masks:
    weights = {name: previous.trained[name] for name in previous.masks}
    new = Masks(remove(weights, previous.masks, previous.number))
    for name, mask in new.items():
        if bool((mask & ~previous.masks[name]).any()):
            raise InputError("remove", name, "masks within those of the round before")
    if new.kept == 0:
        raise InputError("rate", 1.0, "a rate that leaves at least one weight")
    for name in sorted(set(new.empty_tensors()) - set(previous.masks.empty_tensors())):
        work.event("note", text=f"round {previous.number + 1} leaves nothing of {name}")
    return new


def remove_smallest(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """In every tensor, remove exactly `counts` of the surviving weights of least magnitude."""
    scores = active_scores(weights, masks)
    keep = {n: int(masks[n].sum()) - counts[n] for n in masks}
    return per_tensor_masks(scores, keep)


def remove_smallest_overall(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Remove exactly `count` of the surviving weights of least magnitude over all tensors."""
    kept = sum(int(m.sum()) for m in masks.values())
    return largest_by_name(active_scores(weights, masks), kept - count)


def active_scores(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w| of survivors and −1 for what is gone, so that it is never kept again."""
    return {
        name: torch.where(mask, weights[name].abs(), weights[name].new_full((), -1.0))
        for name, mask in masks.items()
    }


def random_masks_like(
    masks: Mapping[str, Tensor], seed: int, *, scope: Literal["layer", "global"] | str = "layer"
) -> Masks:
    """Random masks with the same number of kept weights, in every tensor or over all."""
    from secateurs.parts.saliency import uniform_like

    scores = {n: uniform_like(m, seed, n) for n, m in masks.items()}
    if scope == "global":
        return Masks(largest_by_name(scores, sum(int(m.sum()) for m in masks.values())))
    return Masks(per_tensor_masks(scores, {n: int(m.sum()) for n, m in masks.items()}))
