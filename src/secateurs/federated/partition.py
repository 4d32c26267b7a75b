"""Who holds which samples: a little public data, and clients with skewed classes.

Of every class, client k gets the share p_k, where p ~ Dirichlet(α, ..., α) is drawn for that
class. With α → ∞ all clients look alike; at α = 0.1 most have a few classes only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from secateurs.errors import InputError, described, require
from secateurs.task import Task
from secateurs.training.order import mix, steps_per_epoch

DRAWS = 1000
"""Partitions that are drawn in the hope that every client gets enough samples."""


@dataclass(frozen=True)
class Shares:
    """Indices into the training set; no sample is in two of them, and none is lost.

    Attributes:
        public: what the server holds.
        clients: what each client holds, in ascending order.
    """

    public: Tensor
    clients: list[Tensor]


def dirichlet_partition(
    labels: Tensor, clients: int, alpha: float, seed: int, *, least: int = 2
) -> list[Tensor]:
    """Indices of every client.

    Args:
        labels: (N,) classes.
        clients: how many there are.
        alpha: concentration α; the smaller, the more the clients differ.
        seed: of the draw.
        least: samples that every client has; the whole partition is drawn anew until it does.

    Raises:
        InputError: there are too few samples, or no draw in a thousand gives everybody enough.
    """
    require(clients >= 1, "clients", clients, "at least 1")
    require(alpha > 0, "alpha", alpha, "above 0")
    require(least >= 1, "least", least, "at least 1 sample")
    most = len(labels) // least
    require(clients <= most, "clients", clients, f"up to {most}, for {len(labels)} samples")
    draws = np.random.default_rng(seed)
    classes = [(labels == label).nonzero().flatten().numpy() for label in labels.unique()]
    for _ in range(DRAWS):
        held: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(clients)]
        for members in classes:
            shares = draws.dirichlet([alpha] * clients).cumsum()[:-1]
            cuts = (shares * len(members)).astype(int)
            parts = np.split(draws.permutation(members), cuts)
            for own, part in zip(held, parts, strict=True):
                own.append(part)
        joined = [np.sort(np.concatenate(own)) for own in held]
        if min(map(len, joined)) >= least:
            return [torch.from_numpy(own) for own in joined]
    raise InputError(
        "alpha", alpha, f"one at which each of {clients} clients gets {least} samples or more"
    )


def few_per_class(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Ascending indices of `shots` random samples of every class, all where it has fewer."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen).sort().values


def divide(labels: Tensor, clients: int, alpha: float, shots: int, seed: int) -> Shares:
    """`shots` samples of each class for the server, the rest for the clients."""
    public = few_per_class(labels, shots, mix(seed, 1))
    private = torch.ones(len(labels), dtype=torch.bool)
    private[public] = False
    rest = private.nonzero().flatten()
    parts = dirichlet_partition(labels[rest], clients, alpha, mix(seed, 2))
    return Shares(public, [rest[part] for part in parts])


def labels_of(task: Task) -> Tensor:
    """The class of every training sample, in the order of the data set.

    Raises:
        InputError: a sample has not one whole number as its label, or the data are a stream.
    """
    loader = indexed(task)
    reading: DataLoader[Any] = DataLoader(
        loader.dataset,
        loader.batch_size,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # or the iterator would draw from the global one
    )
    found = []
    for batch in reading:
        _, target = task.unpack(batch)
        plain = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
        shown = described(f"targets of shape {tuple(target.shape)}" if plain is False else "")
        require(plain, "task.train", shown, "one class a sample: Dirichlet splits classes")
        found.append(target)
    return torch.cat(found)


def indexed(task: Task) -> DataLoader[Any]:
    """The training loader, over a data set whose samples have numbers."""
    loader = task.training_loader()
    steps_per_epoch(loader)  # refuses what has no length, or is empty
    shown = described(f"a {type(loader.dataset).__name__} in batches of {loader.batch_size}")
    can = hasattr(loader.dataset, "__getitem__") and loader.batch_size is not None
    require(can, "task.train", shown, "a loader with a batch size over an indexable data set")
    return loader


def restricted(task: Task, indices: Tensor) -> Task:
    """The task of somebody who has only these training samples, and no others to evaluate on.

    A last batch of a single sample, which batch norm cannot train on, is left out. Who has no
    samples has no loader.
    """
    loader = indexed(task)
    if not len(indices):
        return replace(task, train=None)
    assert loader.batch_size is not None
    size = min(loader.batch_size, len(indices))
    own: Subset[Any] = Subset(loader.dataset, indices.tolist())
    alone = len(indices) > size and len(indices) % size == 1
    train: DataLoader[Any] = DataLoader(
        own, size, shuffle=True, collate_fn=loader.collate_fn, drop_last=alone
    )
    evaluate: DataLoader[Any] = DataLoader(own, size, collate_fn=loader.collate_fn)
    return replace(task, train=train, evaluate=evaluate)
