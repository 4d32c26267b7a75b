"""Where tensors are: batches go to the model's device, and models back to where they came from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """A nested batch on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(v, device) for v in value)
    return value


def default_device() -> torch.device:
    """Where Accelerate trains: a GPU where there is one, unless its settings say otherwise."""
    from accelerate import PartialState

    return torch.device(PartialState().device)
