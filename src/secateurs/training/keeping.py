"""Keeping masks while somebody else trains: two hooks on the optimizer.

Before the step the gradients of removed weights may be zeroed; after the step the removed
weights are set to zero again by one fused multiply. It needs nothing of the loop, so it works
in a bare loop, under `transformers.Trainer`, Lightning or Accelerate alike.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from secateurs.errors import InputError, described, require
from secateurs.parts.masks import Masks, named_parameters
from secateurs.state import Tree


def bare_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the wrappers of Accelerate or Lightning."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise InputError(
                "optimizer", described(type(optimizer).__name__), "a torch.optim.Optimizer"
            )
        optimizer = inner
    return optimizer


class MaskKeeper:
    """Holds a model to its masks through an optimizer's step hooks.

    Args:
        model: the bare module.
        optimizer: its optimizer.
        masks: True = keep; applied at once.
        gradients: ``masked`` zeroes the gradients of removed weights before the step (so that
            momenta and gradient norms do not see them), ``dense`` leaves them.
        optimizer_state: ``zeroed`` also multiplies the optimizer's moments after the step.

    Attributes:
        step: updates made since the start.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        masks: Masks,
        *,
        gradients: Literal["masked", "dense"] | str = "masked",
        optimizer_state: Literal["kept", "zeroed"] | str = "kept",
    ) -> None:
        require(gradients in ("masked", "dense"), "gradients", gradients, "masked or dense")
        require(
            optimizer_state in ("kept", "zeroed"),
            "optimizer_state",
            optimizer_state,
            "kept or zeroed",
        )
        self.model, self.masks, self.step = model, masks, 0
        self.optimizer = bare_optimizer(optimizer)
        self.gradients, self.optimizer_state = gradients, optimizer_state
        self.params = named_parameters(model, masks)
        masks.check(self.params)
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        strangers = [n for n, p in self.params.items() if id(p) not in held]
        if strangers and len(strangers) == len(self.params):
            raise InputError(
                "optimizer", described("an optimizer of other parameters"), "the model's own"
            )
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        self.apply()

    def apply(self) -> None:
        """Set removed weights (and, if asked for, their moments) to zero."""
        self.masks.apply_(self.params)
        if self.optimizer_state == "zeroed":
            self.masks.apply_to_state_(self.params, self.optimizer)

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Act when the gradients are there: now, or after the closure that computes them."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._gradients_are_ready()
            return None

        def evaluated() -> Any:
            loss = closure()
            self._gradients_are_ready()
            return loss

        return args[:1], {**kwargs, "closure": evaluated}

    def _gradients_are_ready(self) -> None:
        self.before_step()
        if self.gradients == "masked":
            self.masks.apply_to_gradients_(self.params)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.step += 1
        self.masks.apply_(self.params)
        self.after_step()
        if self.optimizer_state == "zeroed":
            self.masks.apply_to_state_(self.params, self.optimizer)

    def before_step(self) -> None:
        """For subclasses: gradients are whole and dense."""

    def after_step(self) -> None:
        """For subclasses: the step is made and removed weights are zero."""

    def finish(self) -> None:
        """The last step of the whole training has been made."""
        self.apply()

    def state_dict(self) -> Tree:
        """Masks and step."""
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        return {"step": self.step, "masks": self.masks.pack(), "shapes": shapes}

    def load_state_dict(self, state: Tree) -> None:
        """Take masks and step back."""
        self.step = state["step"]
        masks = Masks.unpack(state["masks"], state["shapes"])
        self.masks.update({n: m.to(self.params[n].device) for n, m in masks.items()})

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
