"""Which selection it is: the same data, method, options and seed have the same identity.

What is finished of one selection lies under its identity, so another one in the same place finds
nothing of it. Files are told by their names, sizes and times, arrays by all their bytes. Data
sets whose samples are to be encoded, or trained on, are told by their length and by `SAMPLES` of
their samples, models by their weights. Encoders that are no modules and have no name of their own
are never the same, and nothing of them is found again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.method import Selector
from secateurs.parts.budgets import Budget
from secateurs.registry import options_as_dict
from secateurs.selection.embeddings import Array, Embeddings
from secateurs.task import Task
from secateurs.training.loop import own_randomness

SAMPLES = 64
"""Of a data set, evenly spread, that tell it from others."""


def identity(told: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of plain values."""
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def told_of_selection(
    method: Selector,
    budget: Budget,
    seed: int,
    source: Embeddings,
    target: Embeddings | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """All that an answer depends on, as plain values."""
    return {
        "method": method.name,
        "options": options_as_dict(method),
        "budget": str(budget),
        "seed": seed,
        "source": told_of_rows(source),
        "target": None if target is None else told_of_rows(target),
        "task": None if task is None else told_of_task(task),
    }


def told_of_rows(source: Embeddings) -> list[str]:
    """A fingerprint a shard."""
    return [shard.fingerprint() for shard in source.shards]


def told_of_task(task: Task) -> dict[str, Any]:
    """The model, the training samples and how it is trained."""
    made = task.starting_model(0)
    return {
        "model": f"{type(made).__qualname__} {_digest(made.state_dict())}",
        "training": repr(task.training),
        "samples": None if task.train is None else told_of_samples(task.train.dataset),
    }


def told_of_samples(data: Any) -> str:
    """The length of a data set and a digest of some of its samples."""
    try:
        rows = len(data)
    except TypeError:  # a stream is nothing that could be told
        return repr(data)
    some = sorted(set(np.linspace(0, rows - 1, min(rows, SAMPLES)).astype(int).tolist()))
    named = getattr(data, "_fingerprint", "")  # a Hugging Face data set's own
    with own_randomness():
        torch.default_generator.manual_seed(0)
        return f"{rows} {named} {_digest([data[row] for row in some])}"


def told_of_encoder(encoder: Any) -> str:
    """The weights of a module, or the name of a function."""
    if isinstance(encoder, nn.Module):
        return f"{encoder!r} {_digest(encoder.state_dict())}"
    name = getattr(encoder, "__qualname__", "<lambda>")
    if "<" in name:  # a lambda or a closure: another time it may be another
        return repr(encoder)
    return f"{encoder.__module__}.{name}"


def _digest(value: Any) -> str:
    told = hashlib.sha256()
    _tell(told, value)
    return told.hexdigest()


def _tell(told: Any, value: Any) -> None:
    """Update a hash with a value: arrays by type, shape and bytes, the rest by its text."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        told.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        told.update(_bytes_of(plain.reshape(-1).view(torch.uint8).numpy()))
    elif isinstance(value, np.ndarray):
        told.update(f"array {value.dtype} {value.shape};".encode())
        told.update(_bytes_of(value))
    elif isinstance(value, Mapping):
        told.update(f"mapping {len(value)};".encode())
        for key, inner in value.items():
            _tell(told, str(key))
            _tell(told, inner)
    elif isinstance(value, list | tuple):
        told.update(f"sequence {len(value)};".encode())
        for inner in value:
            _tell(told, inner)
    elif callable(getattr(value, "tobytes", None)):  # a picture, a number of numpy
        told.update(f"{type(value).__qualname__} {getattr(value, 'size', '')};".encode())
        told.update(value.tobytes())
    else:
        told.update(f"{type(value).__qualname__} {value!r};".encode())


def _bytes_of(array: Array) -> Any:
    if array.dtype.hasobject or not array.dtype.itemsize:
        return repr(array.tolist()).encode()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
