"""The kinds of methods: what the user holds, and what the method then does.

| kind | it is given | it does |
| --- | --- | --- |
| `Pruner` | a model, a budget, maybe batches | one shot |
| `TrainingPruner` | a model and its optimizer, a budget | hangs on any training loop |
| `Procedure` | a task, a budget | drives whole trainings |
| `Codec` | a model and the base it was fine-tuned from, a budget | makes the difference small |
| `Selector` | embeddings, scores or a task, how much to keep | chooses samples |

A method is a frozen dataclass: hyper-parameters in, nothing stored. Running state lives in
the object the user holds (an `Attachment`, an `Outcome`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from numbers import Real
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from secateurs.errors import InputError, require
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.parts.prunable import fixed_parameters, prunable_parameters
from secateurs.registry import Paper, Tags, build, options_as_dict
from secateurs.task import Task
from secateurs.workspace import Workspace

if TYPE_CHECKING:
    from secateurs.selection.embeddings import Embeddings
    from secateurs.selection.result import Selection
    from secateurs.training.attachment import Attachment


class Method(ABC):
    """What all kinds share; `secateurs.registry.register` fills the class attributes in."""

    name: ClassVar[str]
    paper: ClassVar[Paper | None]
    tags: ClassVar[Tags]
    budgets: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]] = ("nothing",)
    aliases: ClassVar[tuple[str, ...]] = ()
    takes_adapters: ClassVar[bool] = False
    """Whether a `peft.PeftModel` will do; other methods refuse it."""

    @property
    def time(self) -> str:
        """When it prunes, of the times in its tags; a method of several says by an option."""
        times = self.tags.values("when")
        return "PBT" if "PBT" in times else times[0]

    def check(self) -> None:
        """Refuse hyper-parameters that `create` would refuse, for objects made by hand.

        Raises:
            InputError: a value that the option does not take.
        """
        build(type(self), options_as_dict(self))

    def accept(self, budget: str | Budget) -> Budget:
        """Parse a budget, and check the hyper-parameters.

        Raises:
            InputError: malformed, or of a kind that this method cannot honour.
        """
        self.check()
        parsed = Budget.parse(budget)
        if parsed.kind not in self.budgets:
            kinds = ", ".join("N:M" if k == "n:m" else f"{k}=" for k in self.budgets)
            raise InputError("budget", str(parsed), f"for {self.name}: {kinds}")
        return parsed

    def prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights this method may prune; its `exclude` patterns are left out."""
        return prunable_parameters(model, exclude=tuple(getattr(self, "exclude", ())))


class Pruner(Method):
    """One shot: a model and a budget in, masks or a smaller model out."""

    @abstractmethod
    def prune(
        self,
        model: nn.Module,
        budget: Budget,
        task: Task | None = None,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        """Prune `model` in place.

        Args:
            task: source of batches and loss, for methods that need them.
            seed: of whatever is random.
        """

    def recovery_task(self, task: Task, dense: nn.Module) -> Task:
        """What the pruned model is fine-tuned on: `task` itself, or one that `dense` teaches."""
        return task


class TrainingPruner(Method):
    """Prunes while somebody trains: it hangs on the optimizer's step hooks, nothing else.

    ``attachment = method.attach(model, optimizer, budget, total_steps)`` before the loop,
    ``outcome = attachment.finalize()`` after it.
    """

    needs: ClassVar[tuple[str, ...]] = ("training",)
    gradients: ClassVar[str] = "masked"
    """``masked``: removed weights get no gradient; ``dense``: the optimizer sees them all."""

    optimizer_state: ClassVar[str] = "kept"
    """``zeroed``: momenta of removed weights are set to zero after every step."""

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: str | Budget,
        total_steps: int,
        *,
        seed: int = 0,
    ) -> Attachment:
        """Hang on a model and its optimizer.

        Args:
            model: the bare module (not the data-parallel wrapper).
            optimizer: any torch optimizer over the model's parameters.
            total_steps: updates that the loop will make.
            seed: of random masks; the same on every rank.
        """
        from secateurs.training.attachment import Attachment

        return Attachment(self, model, optimizer, self.accept(budget), total_steps, seed=seed)

    @abstractmethod
    def start(self, at: Attachment) -> None:
        """Before the first step: set initial masks, check hyper-parameters against the loop."""

    def before_step(self, at: Attachment) -> None:
        """After the backward pass, before the update: gradients are whole and dense."""

    @abstractmethod
    def after_step(self, at: Attachment) -> None:
        """After update number ``at.step`` (counted from 1): change ``at.masks`` if due."""

    def finish(self, at: Attachment) -> None:
        """After the last step: by default nothing."""


class Procedure(Method):
    """Drives one or several trainings of a task."""

    needs: ClassVar[tuple[str, ...]] = ("training",)

    @abstractmethod
    def run(
        self,
        model: nn.Module,
        task: Task,
        budget: Budget,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        """Run on `model`, whose weights are the starting point, and return the result.

        Args:
            seed: of data order and of whatever is random.
            work: where finished rounds are kept, so that a killed run goes on.
        """


class Codec(Method):
    """Makes the difference of a fine-tuned model to its base small; the model keeps its size.

    The outcome's model is the base plus what is left of the difference, which the outcome
    carries as ``delta``; `secateurs.save` writes it to a file of its own.
    """

    needs: ClassVar[tuple[str, ...]] = ("base",)

    @abstractmethod
    def encode(
        self,
        base: nn.Module,
        model: nn.Module,
        budget: Budget,
        task: Task | None = None,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        """Prune the difference, and change `model` in place accordingly.

        Args:
            base: the weights that the model was fine-tuned from; left as it is.
            model: of the same architecture, fine-tuned; its own head may differ.
            task: source of batches and metrics, for methods that look at outputs.
            seed: of whatever is random.
            work: where finished steps are kept.
        """


class Selector(Method):
    """Chooses which samples of a data set stay.

    Its ``needs`` say what of: ``embeddings`` and ``labels`` of the rows, ``scores`` (columns of
    numbers), a ``target`` to be useful for, batches or ``training`` of a task.
    """

    needs: ClassVar[tuple[str, ...]] = ("embeddings",)

    @property
    def required(self) -> tuple[str, ...]:
        """What it needs under its options; `needs` says it for the defaults."""
        return self.needs

    def accept(self, budget: str | float | Budget) -> Budget:
        """As for every method; a number is the fraction that stays."""
        if not isinstance(budget, str | Budget):
            good = isinstance(budget, Real) and 0 < float(budget) <= 1
            require(good, "keep", budget, "a fraction of the rows: above 0, at most 1")
            budget = Budget("keep", float(budget))
        return super().accept(budget)

    @abstractmethod
    def select(
        self,
        source: Embeddings,
        keep: Budget,
        task: Task | None = None,
        *,
        target: Embeddings | None = None,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Selection:
        """Choose rows of `source`.

        Args:
            source: rows in shards, with what the method needs of ids, labels, columns and
                embeddings; the answer depends neither on their order nor on the cuts.
            keep: ``keep=FRACTION``; `Budget.kept_samples` says how many rows that is.
            task: for methods that train or look at outputs; its training set has the rows of
                `source`, in their order.
            target: what the kept rows are to be useful for.
            seed: of whatever is random.
            work: where finished shards are kept (`Embeddings.each`).
        """


def weights_to_keep(model: nn.Module, params: dict[str, nn.Parameter], budget: Budget) -> int:
    """How many of the prunable weights the budget leaves."""
    total = sum(p.numel() for p in params.values())
    return budget.kept(total, fixed_parameters(model, params))


def masked_outcome(model: nn.Module, masks: Masks, **fields: object) -> Outcome:
    """Apply masks to a model and wrap the two; layers left empty are noted."""
    from secateurs.parts.masks import named_parameters

    masks.apply_(named_parameters(model, masks))
    outcome = Outcome(model=model, masks=masks, **fields)  # type: ignore[arg-type]
    if empty := masks.empty_tensors():
        outcome.notes.append("layer collapse: nothing is left of " + ", ".join(empty))
    return outcome
