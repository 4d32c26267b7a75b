"""A task on some of its training samples, on all of them in their order, or with their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from secateurs.errors import InputError, described, require
from secateurs.task import Task
from secateurs.training.order import sample_count

ROWS, BATCH = "_rows", "_batch"
"""Keys of a batch that carries the numbers of its samples (`numbered`)."""


def training_rows(task: Task) -> int:
    """Samples of the training set.

    Raises:
        InputError: the loader draws its samples in a way of its own, so rows have no number.
    """
    return _rows(task.training_loader(), "task.train")


def _rows(loader: DataLoader[Any], argument: str) -> int:
    plain = isinstance(loader.sampler, RandomSampler | SequentialSampler)
    if loader.batch_size is None or not plain:
        told = described("a loader with a sampler of its own")
        raise InputError(argument, told, "a loader that reads a data set, shuffled or in order")
    return sample_count(loader.dataset)


def task_on(task: Task, rows: Sequence[int] | Tensor | Any) -> Task:
    """The same task with only these samples to train on; its settings stay.

    So at equal epochs it makes fewer updates; for equal updates say ``steps`` in the settings.

    Args:
        rows: numbers of training samples, any order, at least one; or a bool mask over all.

    Raises:
        InputError: a number out of range, or none at all.
    """
    total, loader = training_rows(task), task.training_loader()
    chosen = torch.as_tensor(rows)
    if chosen.dtype == torch.bool:
        told = described(f"a mask of shape {tuple(chosen.shape)}")
        require(chosen.shape == (total,), "rows", told, f"one value for each of {total} samples")
        chosen = chosen.nonzero().view(-1)
    require(len(chosen) > 0, "rows", described("none"), "at least one training sample")
    low, high = int(chosen.min()), int(chosen.max())
    require(low >= 0 and high < total, "rows", low if low < 0 else high, f"0 to {total - 1}")
    return replace(task, train=_like(loader, Subset(loader.dataset, chosen.tolist())))


def in_order(loader: DataLoader[Any], argument: str = "task.train") -> DataLoader[Any]:
    """The samples of a loader, each once, in their order; the last batch may be smaller."""
    _rows(loader, argument)
    return _like(loader, loader.dataset, shuffle=False, drop_last=False)


def numbered(task: Task) -> DataLoader[Any]:
    """The training loader; its batches are ``{ROWS: (n,) int64, BATCH: the batch}``."""
    training_rows(task)
    loader = task.training_loader()
    return _like(loader, _Numbered(loader), collate_fn=_as_it_is)


def _like(loader: DataLoader[Any], data: Dataset[Any], **changed: Any) -> DataLoader[Any]:
    assert loader.batch_size is not None
    samples = sample_count(data)
    options: dict[str, Any] = {
        "batch_size": loader.batch_size,
        "shuffle": isinstance(loader.sampler, RandomSampler),
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "drop_last": loader.drop_last and samples >= loader.batch_size,
        "worker_init_fn": loader.worker_init_fn,
    }
    return DataLoader(data, **{**options, **changed})


class _Numbered(Dataset[Any]):
    """Batches of a loader's data set, each with the numbers of its samples."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset: Any = loader.dataset
        self.collate = loader.collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch is not None else [self.dataset[i] for i in indices]
        return {ROWS: torch.tensor(list(indices)), BATCH: self.collate(samples)}


def _as_it_is(batch: Any) -> Any:
    return batch
