"""Seeded data order: which batch a training sees at which step is a function of the seed.

A loader that shuffles is re-made with a sampler whose permutation of epoch e depends on
(seed, e) alone, so a training can begin at any step and see the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

from secateurs.errors import InputError, described, require


def mix(*parts: int) -> int:
    """One 63-bit seed out of several numbers (SplitMix64 over them)."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class Indices(list[int]):
    """The indices of a batch, and the seed of whatever its samples draw."""

    def __init__(self, indices: Iterable[int], seed: int) -> None:
        super().__init__(indices)
        self.seed = seed


class SeededBatches(Sampler[Indices]):
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

    def __iter__(self) -> Iterator[Indices]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        for batch in range(self.first, self.batches):
            whole = order[batch * self.size : (batch + 1) * self.size]
            # a process without a share repeats a sample, which `share` then weighs with 0
            own = whole[self.rank :: self.world] or whole[:1]
            yield Indices(own, mix(self.seed, batch, self.rank))

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

    What the data set or the collation draws from torch's generator (augmentation) depends on
    the seed and the step alone, and the generator is left as it was. Loaders with a sampler of
    their own kind and streams are read as they are, from the start of the epoch.
    """
    if not can_be_ordered(loader):
        for batch in _as_given(loader, seed, step):
            yield batch, 1.0
        return
    epoch, first = divmod(step, steps_per_epoch(loader))
    while True:
        ordered, sampler = _ordered(loader, mix(seed, epoch), first, rank, world)
        for position, batch in enumerate(ordered, start=first):
            yield batch, sampler.share(position)
        epoch, first = epoch + 1, 0


def sample_count(data: Any) -> int:
    """Samples of a data set, whose class in torch does not say that it has a length."""
    return len(data)


def can_be_ordered(loader: DataLoader[Any]) -> bool:
    """Whether an epoch is each sample of the data set once, shuffled or not."""
    sampler = loader.sampler
    if loader.batch_size is None or not isinstance(sampler, RandomSampler | SequentialSampler):
        return False
    drawn_again = isinstance(sampler, RandomSampler) and sampler.replacement
    return not drawn_again and len(sampler) == sample_count(loader.dataset)


def first_indices(loader: DataLoader[Any], count: int, seed: int) -> list[int]:
    """Which samples `batches_from` reads first, of a loader that can be ordered."""
    shuffle, length = isinstance(loader.sampler, RandomSampler), sample_count(loader.dataset)
    epoch = SeededBatches(length, count, mix(seed, 0), shuffle=shuffle, drop_last=False)
    return list(next(iter(epoch)))


def _ordered(
    loader: DataLoader[Any], seed: int, first: int, rank: int, world: int
) -> tuple[DataLoader[Any], SeededBatches]:
    assert loader.batch_size is not None
    batches = SeededBatches(
        sample_count(loader.dataset),
        loader.batch_size,
        seed,
        shuffle=isinstance(loader.sampler, RandomSampler),
        drop_last=loader.drop_last,
        first=first,
        rank=rank,
        world=world,
    )
    ordered: DataLoader[Any] = DataLoader(
        _SeededBatchReads(loader),
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=_as_it_is,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator().manual_seed(seed),
    )
    return ordered, batches


class _SeededBatchReads(Dataset[Any]):
    """The data set of a loader, read and collated a batch at a time under the batch's seed.

    So it does not matter which worker process reads the batch, or what was read before.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset: Any = loader.dataset
        self.collate = loader.collate_fn

    def __getitems__(self, indices: Indices) -> Any:
        with _drawing_from(indices.seed):
            if hasattr(self.dataset, "__getitems__"):
                return self.collate(self.dataset.__getitems__(indices))
            return self.collate([self.dataset[index] for index in indices])


def _as_it_is(batch: Any) -> Any:
    return batch


def _as_given(loader: DataLoader[Any], seed: int, step: int) -> Iterator[Any]:
    """Batches in the loader's own order; what it draws, it draws from (seed, epoch, batch)."""
    epoch, skip = 0, step
    if _has_length(loader):
        epoch, skip = divmod(step, steps_per_epoch(loader))
    for number in count(epoch):
        with _drawing_from(mix(seed, number)):
            batches = iter(loader)
        for position in count():
            with _drawing_from(mix(seed, number, position)):
                batch = next(batches, None)
            if batch is None:
                break
            if skip:
                skip -= 1
            else:
                yield batch
        require(position > 0, "task.train", described("an empty loader"), "at least one batch")


def _has_length(loader: DataLoader[Any]) -> bool:
    try:
        return len(loader) >= 0
    except TypeError:
        return False


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Torch's generator for the CPU at a seed, given back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
