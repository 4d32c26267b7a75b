"""Layers that the peft library put into a model, told by their class alone."""

from __future__ import annotations

from torch import nn

from secateurs.errors import InputError, described


def is_peft(module: nn.Module) -> bool:
    """Whether a class of peft, or made from one."""
    return any(cls.__module__.split(".")[0] == "peft" for cls in type(module).__mro__)


def refuse_adapters(model: nn.Module, argument: str = "model") -> None:
    """Raise `InputError` for a model with peft's layers: A and B are no weights to be pruned."""
    for name, module in model.named_modules():
        if is_peft(module):
            told = f"peft's {type(module).__name__}" + (f" at {name}" if name else "")
            accepted = "the model itself: merge_and_unload() first; loraprune and darex take LoRA"
            raise InputError(argument, described(told), accepted)
