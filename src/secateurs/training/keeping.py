"""Acting while somebody else trains: two hooks on the optimizer.

They need nothing of the loop, so they work in a bare loop, under `transformers.Trainer`,
Lightning or Accelerate alike. `MaskKeeper` keeps masks: before the step the gradients of removed
weights may be zeroed; after the step the removed weights are set to zero again by one fused
multiply. `BeforeStep` lets a function add to the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
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


class StepHooks:
    """Acts before and after every step of an optimizer.

    Attributes:
        step: updates made since the start.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.step = bare_optimizer(optimizer), 0
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

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

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.step += 1
        self.after_step()

    def before_step(self) -> None:
        """For subclasses: gradients are whole and dense."""

    def after_step(self) -> None:
        """For subclasses: the step is made."""

    def finish(self) -> None:
        """The last step of the whole training has been made."""

    def state_dict(self) -> Tree:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: Tree) -> None:
        """Take the step back."""
        self.step = state["step"]

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class BeforeStep(StepHooks):
    """Calls a function when the gradients of a step are there, such as one that adds to them."""

    def __init__(self, optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> None:
        super().__init__(optimizer)
        self.act = act

    def before_step(self) -> None:
        self.act()


class MaskKeeper(StepHooks):
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
        self.model, self.masks = model, masks
        self.gradients, self.optimizer_state = gradients, optimizer_state
        self.params = named_parameters(model, masks)
        masks.check(self.params)
        held = {id(p) for group in bare_optimizer(optimizer).param_groups for p in group["params"]}
        strangers = [n for n, p in self.params.items() if id(p) not in held]
        if strangers and len(strangers) == len(self.params):
            raise InputError(
                "optimizer", described("an optimizer of other parameters"), "the model's own"
            )
        super().__init__(optimizer)
        self.apply()

    def apply(self) -> None:
        """Set removed weights (and, if asked for, their moments) to zero."""
        self.masks.apply_(self.params)
        if self.optimizer_state == "zeroed":
            self.masks.apply_to_state_(self.params, self.optimizer)

    def _gradients_are_ready(self) -> None:
        if any(mask.device != self.params[name].device for name, mask in self.masks.items()):
            self.follow()
        self.before_step()
        if self.gradients == "masked":
            self.masks.apply_to_gradients_(self.params)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.step += 1
        self.masks.apply_(self.params)
        self.after_step()
        if self.optimizer_state == "zeroed":
            self.masks.apply_to_state_(self.params, self.optimizer)

    def follow(self) -> None:
        """Go where the weights went: a trainer may move the model after the hooks were hung."""
        self.masks.update({n: m.to(self.params[n].device) for n, m in self.masks.items()})

    def after_step(self) -> None:
        """For subclasses: the step is made and removed weights are zero."""

    def finish(self) -> None:
        """The last step of the whole training has been made."""
        self.apply()

    def state_dict(self) -> Tree:
        """Masks and step."""
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        return {**super().state_dict(), "masks": self.masks.pack(), "shapes": shapes}

    def load_state_dict(self, state: Tree) -> None:
        """Take masks and step back."""
        super().load_state_dict(state)
        masks = Masks.unpack(state["masks"], state["shapes"])
        self.masks.update({n: m.to(self.params[n].device) for n, m in masks.items()})
