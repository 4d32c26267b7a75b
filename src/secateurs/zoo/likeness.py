"""Likeness to the dense model on noise: what can be said of a pruned model without any data.

The inputs are noise within the range of the model's example inputs, the targets what the dense
model puts out. ``error`` is the root of the mean squared difference, relative to the outputs'
own size: 0 for a model that computes the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from secateurs.errors import InputError, described, require
from secateurs.task import Metric, Task, head
from secateurs.training.batches import noise_like
from secateurs.zoo.models import ModelSource
from secateurs.zoo.specs import Options, parse_spec


def is_noise(data: str | None) -> bool:
    """Whether a data spec asks for noise."""
    return data is not None and parse_spec(data, "data").kind == "noise"


def likeness(source: ModelSource, data: str, **fields: Any) -> Task:
    """The task of staying like the dense model.

    Args:
        source: of the dense model, with its weights.
        data: ``noise``; options ``samples`` (16) and ``seed`` (0).
        fields: further fields of `Task`.

    Raises:
        InputError: a model without trained weights, that fails on its example inputs (CLIP wants
            tokens and pixels), or without outputs to compare.
    """
    spec = parse_spec(data, "data")
    options = Options(spec, "data")
    samples, seed = options.integer("samples", 16), options.integer("seed", 0, least=0)
    options.done()
    assert samples is not None
    assert seed is not None
    require(not spec.name, "data", data, "noise, without a path")
    if not source.pretrained:
        raise InputError("data", data, f"a data set: {source.spec} has no weights to stay like")
    dense, example = source.make().eval(), head(source.example_inputs(), 1)
    loaders: list[DataLoader[Any]] = []
    for part in range(2):
        noise = noise_like(example, samples, 2 * seed + part)
        rows = [_row(noise, number) for number in range(samples)]
        with torch.no_grad():
            pairs = [(row, floats(_answer(dense, row, source.spec)).detach()) for row in rows]
        loaders.append(DataLoader(pairs, batch_size=None))  # type: ignore[arg-type]
    if pairs[0][1].numel() == 0:
        raise InputError("model", described("no floating point output"), "outputs to compare")
    return Task(
        model=dense,
        train=loaders[0],
        evaluate=loaders[1],
        loss=lambda output, target: (floats(output) - target).square().mean(),
        metrics={"error": Metric(relative_square, math.sqrt, higher_is_better=False)},
        example_inputs=example,
        primary="error",
        **{"name": f"{source.spec} on noise", **fields},
    )


def _row(noise: Any, number: int) -> Any:
    """One sample of a nested batch, as a batch of 1."""
    if isinstance(noise, dict):
        return {k: _row(v, number) for k, v in noise.items()}
    if isinstance(noise, list | tuple):
        return type(noise)(_row(v, number) for v in noise)
    return noise[number : number + 1] if isinstance(noise, Tensor) else noise


def _called(model: torch.nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def _answer(dense: torch.nn.Module, row: Any, spec: str) -> Any:
    try:
        return _called(dense, row)
    except Exception as failure:
        told = f"{type(failure).__name__}: {failure}"
        accepted = f"a data set: {spec} fails on its example inputs ({told})"
        raise InputError("data", described("noise"), accepted) from failure


def floats(output: Any) -> Tensor:
    """All floating point tensors of an output, one behind the other."""
    found = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([t.reshape(-1) for t in found]) if found else torch.empty(0)


def relative_square(output: Any, target: Tensor) -> Tensor:
    """Squared difference from the target over the target's own square, (1,)."""
    own = floats(output)
    return ((own - target).square().sum() / target.square().sum().clamp_min(1e-12)).reshape(1)
