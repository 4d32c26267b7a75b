"""A training pruner at work: what `TrainingPruner.attach` hands back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateurs.devices import to_device
from secateurs.errors import require
from secateurs.method import TrainingPruner, masked_outcome, weights_to_keep
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.state import Tree
from secateurs.training.keeping import MaskKeeper

if TYPE_CHECKING:
    from secateurs.outcome import Outcome


class Attachment(MaskKeeper):
    """A method that hangs on a model and its optimizer.

    Attributes:
        method: the hyper-parameters.
        masks: what is kept now; the method changes it in `after_step`.
        params: the prunable weights.
        step, total_steps: updates made, and updates there will be.
        keep: weights that the budget leaves at the end.
        generator: source of randomness, the same on every rank.
        extra: whatever the method must remember, a tree that is saved with the state.
    """

    def __init__(
        self,
        method: TrainingPruner,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: Budget,
        total_steps: int,
        *,
        seed: int = 0,
    ) -> None:
        require(total_steps >= 1, "total_steps", total_steps, "at least 1 step")
        self.method, self.budget, self.total_steps = method, budget, total_steps
        params = method.prunable(model)
        self.keep = weights_to_keep(model, params, budget)
        self.generator = torch.Generator().manual_seed(seed)
        self.extra: dict[str, Any] = {}
        self.finished = False
        super().__init__(
            model,
            optimizer,
            Masks.ones_like(params),
            gradients=method.gradients,
            optimizer_state=method.optimizer_state,
        )
        try:
            method.start(self)
        except Exception:
            self.remove()
            raise
        self.apply()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.params.values())).device

    @property
    def sparsity(self) -> float:
        """The sparsity that the budget asks for."""
        return 1 - self.keep / self.masks.total

    def follow(self) -> None:
        super().follow()
        self.extra = to_device(self.extra, self.device)

    def before_step(self) -> None:
        self.method.before_step(self)

    def after_step(self) -> None:
        self.method.after_step(self)
        self.masks.apply_(self.params)

    def finish(self) -> None:
        """Let the method end (once), and zero what is removed."""
        if not self.finished:
            self.method.finish(self)
            self.finished = True
        self.apply()

    def finalize(self) -> Outcome:
        """End the pruning: final masks, hooks off, zeros baked in."""
        self.finish()
        self.remove()
        return masked_outcome(self.model, self.masks, method=self.method.name)

    def state_dict(self) -> Tree:
        return {
            **super().state_dict(),
            "extra": to_device(self.extra, self.device),
            "generator": self.generator.get_state(),
            "finished": self.finished,
        }

    def load_state_dict(self, state: Tree) -> None:
        super().load_state_dict(state)
        self.extra = to_device(state["extra"], self.device)
        self.generator.set_state(state["generator"])
        self.finished = state["finished"]
