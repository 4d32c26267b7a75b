"""Fresh weights for a network that has changed its sizes.

Best are those that the task's own function draws: it knows how its networks begin. Tensors that
kept their shape take its values. One that became smaller or larger is drawn with the spread that
the function gives it, brought to the inputs that it has now (a variance of so much an input).
Where no function is there, every layer draws as its class does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from secateurs.errors import InputError, described
from secateurs.task import Task


@torch.no_grad()
def redraw(model: nn.Module, task: Task | None, seed: int) -> None:
    """Draw all weights anew, in place: as `task` does, or as the layers do.

    Raises:
        InputError: no function to draw with, and a layer that has no reset of its own.
    """
    drawn = None if task is None else drawn_by(task, model, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if drawn is not None:
            draw_like(model, drawn)
        else:
            for _ in reset_layers(model):
                pass


def drawn_by(task: Task, model: nn.Module, seed: int) -> nn.Module | None:
    """A fresh network of the task; None where it makes none, or one with other tensors."""
    if isinstance(task.model, nn.Module):
        return None
    fresh = task.fresh_model(seed)
    return fresh if fresh.state_dict().keys() == model.state_dict().keys() else None


def reset_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Let every layer with parameters draw them as its class does; each is given when it has.

    Raises:
        InputError: a layer with parameters of its own knows no reset.
    """
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        reset = getattr(module, "reset_parameters", None) or getattr(
            module, "_reset_parameters", None
        )
        if reset is None:
            raise InputError(
                "model",
                described(f"{name} of type {type(module).__name__} without reset_parameters"),
                "layers that can draw fresh weights, or Task(model=function)",
            )
        reset()
        yield module


@torch.no_grad()
def draw_like(model: nn.Module, drawn: nn.Module) -> None:
    """Give the tensors of `model` the values of `drawn`, or their spread where shapes differ."""
    parameters, fresh = dict(model.named_parameters()), drawn.state_dict()
    for name, tensor in model.state_dict().items():
        other = fresh[name]
        if other.shape == tensor.shape:
            tensor.copy_(other)
        elif bool((other == other.flatten()[0]).all()):
            tensor.fill_(other.flatten()[0])
        elif name in parameters:
            inputs = (other[0].numel() / tensor[0].numel()) if tensor.ndim > 1 else 1.0
            tensor.normal_(float(other.mean()), float(other.std()) * math.sqrt(inputs))
