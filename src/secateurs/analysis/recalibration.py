"""Batch-norm recalibration: running statistics estimated anew for the weights as they are.

Weights that were cut, averaged or interpolated no longer produce the activations whose mean and
variance the normalisation layers remember. Here these are forgotten and taken again as the plain
average over some batches (the cumulative average of `torch.nn.BatchNorm2d` with
``momentum=None``), not as the exponential one of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader

from secateurs.devices import device_of, to_device
from secateurs.errors import require
from secateurs.task import Split, split_batch
from secateurs.training.order import batches_from, steps_per_epoch


def recalibrate(
    model: nn.Module,
    loader: DataLoader[Any],
    batches: int | None = None,
    *,
    split: Split = split_batch,
    seed: int = 0,
    momentum: float | None = None,
) -> None:
    """Reset the running statistics of `model` and estimate them anew, in place.

    Every batch counts the same: mean and (unbiased) variance are averages of those of the
    batches. All other layers work as in eval mode; modes and momenta are left as they were.

    Args:
        loader: of training batches.
        batches: how many to look at; an epoch by default.
        split: batch -> (inputs, target).
        seed: of the order of the batches.
        momentum: of an exponential average that goes on from the statistics as they are,
            instead of the plain one.
    """
    require(batches is None or batches >= 1, "batches", batches, "at least 1")
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not layers:
        return
    count = steps_per_epoch(loader) if batches is None else batches
    device = device_of(model)
    with _estimating(model, layers, momentum), torch.no_grad():
        for batch, _ in islice(batches_from(loader, seed, 0), count):
            inputs, _ = split(to_device(batch, device))
            model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


@contextmanager
def _estimating(
    model: nn.Module, layers: list[_NormBase], momentum: float | None
) -> Iterator[None]:
    """Only `layers` in training mode; without a momentum, without memory."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    model.eval()
    for layer in layers:
        if momentum is None:
            layer.reset_running_stats()
        layer.momentum = momentum
        layer.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum in momenta:
            layer.momentum = momentum
