"""How a pruned model gets its quality back, whatever pruned it.

`prune` and the ``prune`` stage of a recipe take it as ``recover``: true for what is usual for the
method, false or ``none``, ``finetune``, ``lora``, or the name of a method that is a `Recovery`,
such as ``perp``, with its options in a mapping: ``recover: {perp: {steps: 500}}``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateurs.errors import InputError, described, require, unknown
from secateurs.method import Method, Pruner
from secateurs.outcome import Outcome
from secateurs.registry import create, list_methods
from secateurs.settings import TrainSettings
from secateurs.task import Task
from secateurs.training.keeping import MaskKeeper
from secateurs.training.loop import fit_once
from secateurs.training.shared_gradients import rescale_gradients
from secateurs.workspace import Workspace


class Recovery(ABC):
    """Something that trains what a method left."""

    @property
    def needs_dense(self) -> bool:
        """Whether it compares with the model before it was pruned."""
        return False

    @abstractmethod
    def recover(
        self,
        outcome: Outcome,
        task: Task,
        *,
        dense: nn.Module | None = None,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> None:
        """Train the outcome's model in place; what is masked stays zero.

        Args:
            dense: the model before it was pruned, where one shot did it.
            seed: of data order and of whatever is random.
            work: where finished steps are kept.
        """


@dataclass(frozen=True)
class Finetuning(Recovery):
    """All that is left trains on, by ``task.finetuning``."""

    def recover(
        self,
        outcome: Outcome,
        task: Task,
        *,
        dense: nn.Module | None = None,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> None:
        finetune(outcome, task, task.finetuning, seed=seed, work=work)


def finetune(
    outcome: Outcome,
    task: Task,
    settings: TrainSettings,
    *,
    seed: int = 0,
    work: Workspace | None = None,
    name: str = "finetune",
) -> None:
    """Train the outcome's model with its masks kept, in place.

    Gradients of arrays that its weights share are rescaled.
    """
    fit_once(
        outcome.model,
        task,
        settings,
        seed=seed,
        work=work,
        name=name,
        attach=lambda net, optimizer, _: [
            MaskKeeper(net, optimizer, outcome.masks),
            *rescale_gradients(net, optimizer),
        ],
    )


LORA = {"biases": False, "norms": False, "head": False}
"""Options of `perp` that leave its adapters alone."""

Recover = bool | str | Mapping[str, Any] | Recovery
"""A recovery as people write it."""


def recovery(given: Recover) -> bool | Recovery:
    """A recovery as asked for: true for the method's usual one, false for none.

    Raises:
        InputError: a name that is none, or options that it does not take.
    """
    if isinstance(given, bool | Recovery):
        return given
    name: Any = given
    options: Any = {}
    if isinstance(given, Mapping):
        require(len(given) == 1, "recover", dict(given), "one recovery: {NAME: {options}}")
        ((name, options),) = given.items()
        require(isinstance(options, Mapping), f"recover {name}", options, "options as a mapping")
    if name == "none":
        return False
    if name == "finetune":
        require(not options, "recover finetune", options, "no options: the finetuning settings")
        return Finetuning()
    if name == "lora":
        name, options = "perp", {**LORA, **options}
    known = [n for n, c in list_methods().items() if issubclass(c, Recovery)]
    if name not in known:
        raise unknown("recover", str(name), ("true", "false", "none", "finetune", "lora", *known))
    made = create(str(name), options)
    assert isinstance(made, Recovery)
    return made


def check_recovery(how: bool | Recovery, task: Task | None, method: Method) -> None:
    """Raise `InputError` unless there is something to recover with."""
    if isinstance(how, Recovery) and (task is None or task.train is None):
        raise InputError("task.train", None, "a Task with training data: recover asks for them")
    if isinstance(how, Recovery) and how.needs_dense and not isinstance(method, Pruner):
        name = method.name
        told = f"reconstruct after {name}, which trains: there are no dense blocks to compare with"
        raise InputError("mode", described(told), "retrain")
