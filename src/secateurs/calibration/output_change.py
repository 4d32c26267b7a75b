"""How far a model's outputs are from those of another: a score that needs no labels.

Two kinds: the mean absolute change of the last hidden state, which is what the last layer with
weights is given; or the mean square change of the teacher's top-k logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.calibration.moments import is_known
from secateurs.errors import InputError, described, require
from secateurs.parts.costs import evaluating
from secateurs.task import logits_of

Call = Callable[[nn.Module, Any], Any]
"""(model, inputs) -> the model's output."""
Kind = Literal["hidden", "topk_logits"]


class OutputChange:
    """Distance of a model's outputs on some inputs from a teacher's.

    Args:
        teacher: the model to compare with; it is run once.
        inputs: one batch, as the model takes it.
        call: how a model is called on them.
        kind: what is compared.
        k: for ``topk_logits``, logits a position.

    Raises:
        InputError: k below 1, or a teacher without a layer whose input could be compared.
    """

    def __init__(
        self, teacher: nn.Module, inputs: Any, call: Call, kind: Kind = "hidden", k: int = 5
    ) -> None:
        require(k >= 1, "k", k, "at least 1")
        self.inputs, self.call, self.kind, self.k = inputs, call, kind, k
        self.layer = last_layer(teacher, self._run) if kind == "hidden" else ""
        with torch.no_grad():
            self.answer = self._answer(teacher)

    def __call__(self, model: nn.Module) -> float:
        """The change of a model with the teacher's modules, in eval mode."""
        with torch.no_grad():
            return float(self.of(self._answer(model)))

    def of(self, answer: Tensor) -> Tensor:
        """The change of hidden states or logits, with its graph."""
        if self.kind == "hidden":
            return (answer.float() - self.answer.float()).abs().mean()
        wanted, places = self.answer.float().topk(min(self.k, self.answer.shape[-1]), dim=-1)
        return (answer.float().gather(-1, places) - wanted).square().mean()

    def _run(self, model: nn.Module) -> Any:
        return self.call(model, self.inputs)

    def _answer(self, model: nn.Module) -> Tensor:
        with evaluating(model):
            if self.kind == "topk_logits":
                return logits_of(self._run(model))
            found: list[Tensor] = []
            layer = model.get_submodule(self.layer)
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs: found.append(_first(args, kwargs)), with_kwargs=True
            )
            try:
                self._run(model)
            finally:
                handle.remove()
            return found[-1].detach()


def last_layer(model: nn.Module, run: Callable[[nn.Module], Any]) -> str:
    """Name of the linear or convolutional layer that `run(model)` calls last.

    Raises:
        InputError: it calls none.
    """
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: called.append(name))
        for name, module in model.named_modules()
        if is_known(module)
    ]
    try:
        with evaluating(model), torch.no_grad():
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise InputError(
            "kind", "hidden", "topk_logits: " + described("the model calls no layer with weights")
        )
    return called[-1]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value
