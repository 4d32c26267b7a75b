"""How a network is trained: steps, optimizer, learning rate as a function of the step."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from secateurs.errors import require, unknown


def option(default: Any, help: str, unit: str = "") -> Any:
    """A dataclass field that carries its own documentation.

    The command line, the recipe schema and the tables read `help` and `unit` from here.
    """
    metadata = {"help": help, "unit": unit}
    if isinstance(default, dict | list | set):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_choices(values: Any) -> None:
    """Raise `InputError` where a dataclass has a value that the field's `Literal` does not list."""
    for name, hint in typing.get_type_hints(type(values)).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else None
        if choices is not None and getattr(values, name) not in choices:
            raise unknown(name, getattr(values, name), choices)


@dataclass(frozen=True)
class TrainSettings:
    """The recipe of one training."""

    epochs: float = option(10.0, "passes over the training data", "epochs")
    steps: int | None = option(None, "optimizer steps; overrides epochs", "steps")
    optimizer: Literal["sgd", "adam", "adamw", "adamr"] = option(
        "sgd", "the optimizer; adamr decays towards the weights that the training begins with"
    )
    lr: float = option(0.05, "base learning rate")
    momentum: float = option(0.9, "momentum of sgd")
    nesterov: bool = option(False, "Nesterov momentum for sgd")
    weight_decay: float = option(5e-4, "weight decay (decoupled for adamw)")
    decayed: Literal["all", "matrices"] = option(
        "all", "what decays: all, or not vectors, which are biases and the scales of norms"
    )
    schedule: Literal["cosine", "constant", "step", "linear"] = option(
        "cosine", "learning rate over the steps"
    )
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "for step: fractions of all steps at which the rate drops"
    )
    gamma: float = option(0.1, "for step: factor of each drop")
    warmup: int = option(0, "steps of linear warm-up from 0", "steps")
    clip_norm: float | None = option(None, "clip the global gradient norm to this")
    precision: Literal["no", "bf16", "fp16"] = option("no", "mixed precision")

    def __post_init__(self) -> None:
        check_choices(self)
        require(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        require(self.steps is None or self.steps >= 0, "steps", self.steps, "0 or more")
        require(self.lr > 0, "lr", self.lr, "a rate above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "a value in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        require(self.warmup >= 0, "warmup", self.warmup, "0 or more steps")
        require(
            all(0 < m < 1 for m in self.milestones),
            "milestones",
            self.milestones,
            "fractions between 0 and 1",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0"
        )

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole training."""
        return self.steps if self.steps is not None else round(self.epochs * steps_per_epoch)

    def rate_at(self, step: int, total: int) -> float:
        """Learning rate of update number `step` (counted from 0) of `total`."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "step":
            # a fraction such as 29/100 times 100 is a hair below 29
            passed = sum(step >= int(m * total + 1e-9) for m in self.milestones)
            return self.lr * self.gamma**passed
        progress = (step - self.warmup) / max(total - self.warmup, 1)
        if self.schedule == "linear":
            return self.lr * (1 - progress)
        return self.lr * (1 + math.cos(math.pi * progress)) / 2

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer over the trainable ones of `parameters`."""
        trainable = [p for p in parameters if p.requires_grad]
        require(bool(trainable), "model", "no trainable parameter", "at least one")
        groups: list[Any] = trainable
        if self.decayed == "matrices":
            vectors = [p for p in trainable if p.ndim <= 1]
            matrices = [p for p in trainable if p.ndim > 1]
            groups = [
                {"params": own, **({"weight_decay": 0.0} if own is vectors else {})}
                for own in (matrices, vectors)
                if own
            ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                groups,
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
            )
        if self.optimizer == "adamr":
            from secateurs.training.adamr import AdamR

            return AdamR(groups, lr=self.lr, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=self.lr, weight_decay=self.weight_decay)

    def scaled(self, factor: float, steps_per_epoch: int) -> TrainSettings:
        """The same recipe `factor` times as long; milestones are fractions, so they follow."""
        total = self.total_steps(steps_per_epoch)
        return replace(self, steps=int(total * factor))
