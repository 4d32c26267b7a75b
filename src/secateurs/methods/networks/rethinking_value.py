"""Rethinking the value: is the pruned network better than the same one trained from scratch?

Paper: "Rethinking the Value of Network Pruning", ICLR 2019, arXiv 1810.05270. An evaluation
protocol that runs behind any other method. Given a large model M trained for E epochs and the
pruned model P:

 - fine-tune: P as the audited method delivers it, with its own recovery;
 - Scratch-E: P's architecture (or mask) with fresh weights, trained like M for E epochs;
 - Scratch-B: the same for E · F(M)/F(P) epochs, F the cost of a forward pass, so that the
   training costs as much as M's. `cap=2` is the ImageNet rule: at most twice as long.

Fresh weights are drawn as the large model's were, by the task's own function, and where a tensor
became smaller, with the spread that this function gives, brought to the inputs that are left; a
task without such a function leaves it to the rules of `reinitialize`. Under a mask their variance
is the one that the surviving connections ask for (std = sqrt(2/n), n = kept weights of the layer
/ input channels, as in the public code's weight-level part). F counts multiply-accumulates of
surviving weights; the public code counts through the zeros and so gives masks no extra epochs.
Every arm is scored after its last epoch (the public code reports the best test epoch).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from secateurs.devices import device_of
from secateurs.errors import require
from secateurs.method import Method, Procedure
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import measure_cost
from secateurs.parts.masks import Masks, named_parameters
from secateurs.parts.prunable import prunable_parameters
from secateurs.registry import Paper, Tags, create, register
from secateurs.settings import TrainSettings, option
from secateurs.task import Task
from secateurs.training.fresh import draw_like, drawn_by, reset_layers
from secateurs.training.loop import total_steps
from secateurs.training.order import mix
from secateurs.training.rounds import train_masked
from secateurs.workspace import Workspace

Arm = Literal["finetune", "scratch-e", "scratch-b"]


def scratch_epochs(
    epochs: int, flops_large: float, flops_small: float, cap: float | None = None
) -> int:
    """Epochs (or steps) that the small model gets for the large one's computation.

    int(E · F_large / F_small); with `cap`, exactly cap · E where the ratio reaches it.
    """
    require(flops_small > 0, "flops_small", flops_small, "above 0")
    require(flops_large >= flops_small, "flops_large", flops_large, f"at least {flops_small}")
    require(cap is None or cap >= 1, "cap", cap, "at least 1")
    ratio = flops_large / flops_small
    if cap is not None and ratio >= cap:
        return int(cap * epochs)
    return int(epochs * ratio)


def scale_milestones(milestones: Sequence[int], epochs: int, new_epochs: int) -> list[int]:
    """Milestones moved in proportion, rounded down."""
    return [m * new_epochs // epochs for m in milestones]


@torch.no_grad()
def reinitialize(
    model: nn.Module,
    masks: Masks | None = None,
    *,
    sparse_aware: bool = True,
    seed: int = 0,
    drawn: nn.Module | None = None,
) -> None:
    """Fresh weights for every layer of `model`, in place, and zeros where `masks` say so.

    Convolutions: normal of variance 2/(kh·kw·C_out); linear layers: as the layer itself draws
    them; normalisation and all others: their own reset. Masked weights with `sparse_aware`:
    variance 2/n with n = kept/in_channels, which is the same rule for the connections left.

    Args:
        seed: of all draws.
        drawn: a fresh network with tensors of the same names, which takes the place of these
            rules (but not of that for masked weights). A weight that is smaller in `model` is
            normal, with the spread in `drawn` times sqrt(inputs there / inputs here).

    Raises:
        InputError: a layer with parameters of its own knows no reset.
    """
    masks = masks or Masks({})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if drawn is None:
            for layer in reset_layers(model):
                if isinstance(layer, nn.modules.conv._ConvNd):
                    fan_out = layer.weight.numel() // layer.weight.shape[1]
                    layer.weight.normal_(0, math.sqrt(2 / fan_out))
        else:
            draw_like(model, drawn)
        for name, weight in named_parameters(model, masks).items():
            if sparse_aware and bool(masks[name].any()):
                weight.normal_(0, sparse_std(masks[name]))
    masks.apply_(named_parameters(model, masks))


def sparse_std(mask: torch.Tensor) -> float:
    """sqrt(2 / n) with n = kept weights / input channels."""
    return math.sqrt(2 / (int(mask.sum()) / mask.shape[1]))


@register(
    "rethinking-value",
    paper=Paper("Rethinking the Value of Network Pruning", "ICLR", 2019, "1810.05270"),
    tags=Tags("-", "network", "ANY", "any", rounds="one_shot"),
    budgets=("sparsity", "density", "params", "macs", "bytes", "latency", "n:m"),
)
@dataclass(frozen=True)
class RethinkingValue(Procedure):
    """Audit a method: train its result from scratch, with fair budgets, over several seeds."""

    audited: str = option("global-mp", "the method that is put to the test")
    audited_options: dict[str, Any] = option({}, "its hyper-parameters")
    arms: tuple[Arm, ...] = option(("finetune", "scratch-e", "scratch-b"), "arms to run")
    seeds: int = option(1, "runs of every arm (the paper: 5 on CIFAR)", "runs")
    cap: float | None = option(None, "longest Scratch-B as a multiple of the training (2)")
    sparse_aware: bool = option(True, "variance of fresh weights follows the mask")

    def __post_init__(self) -> None:
        require(bool(self.arms), "arms", self.arms, "finetune, scratch-e or scratch-b")
        require(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        require(self.cap is None or self.cap >= 1, "cap", self.cap, "at least 1")
        require(self.audited != "rethinking-value", "audited", self.audited, "another method")
        self.audited_method()

    def audited_method(self) -> Method:
        """The method under test."""
        method = create(self.audited, self.audited_options)
        assert isinstance(method, Method)
        return method

    def accept(self, budget: str | Budget) -> Budget:
        self.check()
        return self.audited_method().accept(budget)

    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        prunable_parameters(model)  # refuses before anything is trained
        work = work or Workspace()
        rows: list[dict[str, Any]] = []
        first: Outcome | None = None
        for repeat in range(self.seeds):
            own = mix(seed, repeat) if repeat else seed
            place = work.child(f"seed-{repeat}")
            start = model if repeat == 0 else task.fresh_model(own).to(device_of(model))
            outcome = self._pruned(start, task, budget, own, place)
            rows += self._arms(outcome, task, own, repeat, place)
            first = first or outcome
        assert first is not None
        first.history = rows
        first.tables["arms"] = summary(rows, task.primary)
        return first

    def _pruned(
        self, model: nn.Module, task: Task, budget: Budget, seed: int, work: Workspace
    ) -> Outcome:
        """The large model, trained where the audited method expects it, then pruned."""
        from secateurs.api import prune
        from secateurs.training.loop import fit_once

        method = self.audited_method()
        if method.time in ("PAT", "PTP") and not isinstance(method, Procedure):
            fit_once(model, task, task.training, seed=seed, work=work, name="large")
        return prune(
            model, method, budget, task, seed=seed, inplace=True, work=work.child("pruned")
        )

    def _arms(
        self, outcome: Outcome, task: Task, seed: int, repeat: int, work: Workspace
    ) -> list[dict[str, Any]]:
        before = outcome.before or measure_cost(outcome.model, task.example_inputs)
        after = outcome.after or measure_cost(outcome.model, task.example_inputs, outcome.masks)
        steps = total_steps(task, task.training)
        longer = scratch_epochs(steps, before.macs, max(after.effective_macs, 1), self.cap)
        rows = []
        for arm in self.arms:
            if arm == "finetune":
                metrics, spent = outcome.metrics_after, None
            else:
                spent = steps if arm == "scratch-e" else longer
                settings = replace(task.training, steps=spent)
                metrics = self._scratch(outcome, task, settings, seed, work, arm)
            rows.append(
                {
                    "arm": arm,
                    "seed": repeat,
                    "steps": spent,
                    "parameters": after.nonzero,
                    "macs": after.effective_macs,
                    **metrics,
                }
            )
            work.event("arm", **rows[-1])
        return rows

    def _scratch(
        self,
        outcome: Outcome,
        task: Task,
        settings: TrainSettings,
        seed: int,
        work: Workspace,
        arm: str,
    ) -> dict[str, float]:
        fresh = copy.deepcopy(outcome.model)
        own = mix(seed, 201)
        reinitialize(
            fresh,
            outcome.masks,
            sparse_aware=self.sparse_aware,
            seed=own,
            drawn=drawn_by(task, fresh, own),
        )
        trained = train_masked(
            fresh,
            outcome.masks,
            replace(task, training=settings),
            seed=mix(seed, 202),
            work=work,
            name=arm,
        )
        return trained.metrics


def summary(rows: Sequence[dict[str, Any]], primary: str) -> list[dict[str, Any]]:
    """Mean and standard deviation of the primary metric, an arm a row."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        values = [row[primary] for row in own]
        table.append(
            {
                "arm": arm,
                "runs": len(values),
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "steps": own[0]["steps"],
                "parameters": own[0]["parameters"],
                "macs": own[0]["macs"],
            }
        )
    return table
