"""Batches for scores that look at data: the first one, or so many samples of every class."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from secateurs.errors import InputError, described
from secateurs.task import Task
from secateurs.training.order import batches_from, steps_per_epoch


def first_batch(task: Task, seed: int) -> Any:
    """The first training batch of a seed."""
    batch, _ = next(batches_from(task.training_loader(), seed, 0))
    return batch


def some_batches(task: Task, seed: int, count: int) -> list[Any]:
    """The first `count` training batches of a seed."""
    return [b for b, _ in islice(batches_from(task.training_loader(), seed, 0), count)]


def class_balanced(task: Task, seed: int, per_class: int, parts: int = 1) -> list[Any]:
    """`per_class` samples of every class, split evenly over `parts` batches of pairs.

    Reads one epoch at most.

    Raises:
        InputError: the inputs are not one tensor, or a class has too few samples.
    """
    found: dict[int, list[Tensor]] = defaultdict(list)
    loader = task.training_loader()
    for batch, _ in islice(batches_from(loader, seed, 0), steps_per_epoch(loader)):
        inputs, target = task.unpack(batch)
        if not isinstance(inputs, Tensor) or target.ndim != 1:
            raise InputError("task", described("batches that are not (tensor, class)"), "pairs")
        for sample, label in zip(inputs, target.tolist(), strict=True):
            if len(found[label]) < per_class:
                found[label].append(sample)
    for label, samples in sorted(found.items()):
        if len(samples) < per_class:
            raise InputError(
                "samples_per_class", per_class, f"at most {len(samples)}, all of class {label}"
            )
    batches = []
    for part in range(parts):
        chosen = [(s, label) for label in sorted(found) for s in found[label][part::parts]]
        batches.append((torch.stack([s for s, _ in chosen]), torch.tensor([c for _, c in chosen])))
    return batches
