"""Seeded data order: which batch a training sees at which step is a function of the seed.

A loader that shuffles is re-made with a sampler whose permutation of epoch e depends on
(seed, e) alone, so a training can begin at any step and see the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler

from secateurs.errors import InputError, described


def mix(*parts: int) -> int:
    """One 63-bit seed out of several numbers (SplitMix64 over them)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class SeededBatches(Sampler[list[int]]):
    """Batches of indices of one epoch, from `first` on, for one of several processes.

    Every process takes its share of each global batch, so the global batches are the same
    whatever the number of processes.
    """

    def __init__(
        self,
        length: int,
        size: int,
        seed: int,
        *,
        shuffle: bool,
        drop_last: bool,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.length, self.size, self.seed = length, size, seed
        self.shuffle, self.drop_last, self.first = shuffle, drop_last, first
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        for batch in range(self.first, self.batches):
            whole = order[batch * self.size : (batch + 1) * self.size]
            # a process without a share repeats a sample, which `share` then weighs with 0
            yield whole[self.rank :: self.world] or whole[:1]

    @property
    def batches(self) -> int:
        """Batches of a whole epoch."""
        full, rest = divmod(self.length, self.size)
        return full if self.drop_last or not rest else full + 1

    def __len__(self) -> int:
        return self.batches - self.first

    def share(self, batch: int) -> float:
        """What this process's mean loss over `batch` must be multiplied with, so that the
        average over processes is the mean over the global batch."""
        whole = min(self.size, self.length - batch * self.size)
        own = len(range(self.rank, whole, self.world))
        return own * self.world / whole


def steps_per_epoch(loader: DataLoader[Any]) -> int:
    """Batches of one epoch.

    Raises:
        InputError: the loader is over an iterable data set that does not say its length.
    """
    try:
        steps = len(loader)
    except TypeError:
        raise InputError(
            "task.train", described("a loader without a length"), "TrainSettings(steps=...)"
        ) from None
    if steps == 0:
        raise InputError("task.train", described("a loader of 0 batches"), "at least one batch")
    return steps


def batches_from(
    loader: DataLoader[Any], seed: int, step: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Any, float]]:
    """Endless (batch, loss weight) pairs of a training, beginning at update number `step`.

    Loaders with a sampler of their own kind are read as they are, from the start of the epoch.
    """
    per_epoch = steps_per_epoch(loader)
    epoch, first = divmod(step, per_epoch)
    while True:
        ordered = _ordered(loader, mix(seed, epoch), first, rank, world)
        if ordered is None:
            for batch in islice(loader, first, None):
                yield batch, 1.0
        else:
            sampler = ordered.batch_sampler
            assert isinstance(sampler, SeededBatches)
            for position, batch in enumerate(ordered, start=first):
                yield batch, sampler.share(position)
        epoch, first = epoch + 1, 0


def _ordered(
    loader: DataLoader[Any], seed: int, first: int, rank: int, world: int
) -> DataLoader[Any] | None:
    plain = isinstance(loader.sampler, RandomSampler | SequentialSampler)
    if not plain or loader.batch_size is None:
        return None
    dataset: Sequence[Any] = loader.dataset  # type: ignore[assignment]
    batches = SeededBatches(
        len(dataset),
        loader.batch_size,
        seed,
        shuffle=isinstance(loader.sampler, RandomSampler),
        drop_last=loader.drop_last,
        first=first,
        rank=rank,
        world=world,
    )
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator().manual_seed(seed),
    )
