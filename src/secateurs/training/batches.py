"""Batches for scores that look at data: the first one, or so many samples of every class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset

from secateurs.errors import InputError, described, require
from secateurs.task import Split, Task, batch_size, head, split_batch
from secateurs.training.order import (
    batches_from,
    can_be_ordered,
    first_indices,
    sample_count,
    steps_per_epoch,
)


def first_batch(task: Task, seed: int) -> Any:
    """The first training batch of a seed."""
    batch, _ = next(batches_from(task.training_loader(), seed, 0))
    return batch


def some_batches(task: Task, seed: int, count: int) -> list[Any]:
    """The first `count` training batches of a seed."""
    return [b for b, _ in islice(batches_from(task.training_loader(), seed, 0), count)]


def calibration_batches(
    loader: DataLoader[Any],
    samples: int,
    size: int,
    seed: int,
    unpack: Split = split_batch,
    *,
    fewer: bool = False,
) -> list[Any]:
    """Inputs of the first `samples` of a loader under a seed, in batches of `size`.

    They are collated anew, so batches may differ in shape (texts that are padded) and need not be
    cut. Batches of a loader that has an order of its own are cut, and joined where they fit.

    Args:
        fewer: whether all that the loader has will do.

    Raises:
        InputError: there are fewer.
    """
    if can_be_ordered(loader):
        return [unpack(b)[0] for b in _collated(loader, samples, size, seed, fewer)]
    given = (unpack(b)[0] for b in _epoch(loader, seed))
    return _cut(given, samples, size, fewer)


def calibration_inputs(
    loader: DataLoader[Any], samples: int, seed: int, unpack: Split = split_batch
) -> Any:
    """Inputs of the first `samples` of a loader under a seed, as one batch.

    Fewer where the loader has fewer.

    Raises:
        InputError: batches of a loader that has an order of its own do not fit together.
    """
    found = calibration_batches(loader, samples, samples, seed, unpack, fewer=True)
    told = described("a loader of its own order, whose batches differ in shape")
    require(len(found) == 1, "task.train", told, "a plain DataLoader, or batches of one shape")
    return found[0]


def labelled_batches(
    loader: DataLoader[Any], samples: int, size: int, seed: int, unpack: Split = split_batch
) -> list[Any]:
    """As `calibration_batches`, with the labels.

    Raises:
        InputError: there are fewer, or batches to be cut have not one label a row.
    """
    if can_be_ordered(loader):
        return _collated(loader, samples, size, seed, fewer=False)

    def checked() -> Iterator[Any]:
        for batch in _epoch(loader, seed):
            rows, labels = (batch_size(part) for part in unpack(batch))
            told = described(
                f"a loader of its own order, {rows} rows and {labels} labels in a batch"
            )
            accepted = "a label for every row, or a plain DataLoader"
            require(rows == labels, "task.train", told, accepted)
            yield batch

    return _cut(checked(), samples, size, fewer=False)


def _collated(
    loader: DataLoader[Any], samples: int, size: int, seed: int, fewer: bool
) -> list[Any]:
    """The first samples of a loader that can be ordered, by its own collation."""
    there = sample_count(loader.dataset)
    _check_enough(there, samples, fewer)
    part = Subset(loader.dataset, first_indices(loader, min(samples, there), seed))
    again: DataLoader[Any] = DataLoader(part, size, collate_fn=loader.collate_fn)
    return [b for b, _ in islice(batches_from(again, seed, 0), len(again))]


def _epoch(loader: DataLoader[Any], seed: int) -> Iterator[Any]:
    """The batches of a loader, once."""
    for batch, _ in islice(batches_from(loader, seed, 0), steps_per_epoch(loader)):
        yield batch


def _cut(batches: Iterable[Any], samples: int, size: int, fewer: bool) -> list[Any]:
    """The first samples of some batches in others of `size`, or less where two do not fit."""
    made: list[Any] = []
    rest: Any = None
    left = samples
    for batch in batches:
        batch = head(batch, left)
        left -= batch_size(batch)
        if rest is not None and _fit(rest, batch):
            batch = joined([rest, batch])
        elif rest is not None:
            made.append(rest)
        there = batch_size(batch)
        whole = there - there % size
        made += [tail(head(batch, start + size), start) for start in range(0, whole, size)]
        rest = tail(batch, whole) if whole < there else None
        if left == 0:
            break
    if rest is not None:
        made.append(rest)
    _check_enough(samples - left, samples, fewer)
    return made


def _fit(one: Any, other: Any) -> bool:
    """Whether two batches are of the same shape but for their length."""
    leaves = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(
        a.shape[1:] == b.shape[1:] if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in leaves
    )


def _check_enough(there: int, samples: int, fewer: bool) -> None:
    accepted = f"at most {there}, all that the data has"
    require(fewer or there >= samples, "samples", samples, accepted)


def tail(value: Any, start: int) -> Any:
    """A nested batch without its first `start` samples."""
    if isinstance(value, Tensor):
        return value[start:]
    if isinstance(value, Mapping):
        return {k: tail(v, start) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(tail(v, start) for v in value)
    return value


def noise_like(
    example: Any, samples: int, seed: int, law: Literal["natural", "uniform"] = "natural"
) -> Any:
    """`samples` inputs of noise, within the range of the values of an example.

    Args:
        law: ``uniform``: every value by itself. ``natural``: images (N, C, H, W) whose amplitude
            falls with the spatial frequency f as 1/f and whose channels are correlated, as those
            of photographs; the standard deviation is a quarter of the range. Other inputs are
            uniform under both; integers (tokens) from 0 to the largest of the example.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: drawn(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(drawn(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        shape = (samples, *value.shape[1:])
        if not value.is_floating_point():
            top = int(value.max()) + 1
            return torch.randint(top, shape, generator=generator).to(value)
        low, high = float(value.min()), float(value.max())
        require(low < high, "task.example_inputs", described("constant values"), "a real sample")
        if law == "natural" and len(shape) == 4:
            waves = natural_noise(shape, generator) * (high - low) / 4 + (high + low) / 2
            return waves.clamp(low, high).to(value)
        noise = torch.rand(shape, generator=generator) * (high - low) + low
        return noise.to(value)

    return drawn(example)


SHARED_COLOUR = 0.9
"""Share of a pixel's variance that the channels of a photograph have in common."""


def natural_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(N, C, H, W) of mean 0 and deviation 1 an image, amplitudes falling as 1/f."""
    height, width = shape[2:]
    down, across = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (down.square() + across.square()).sqrt().clamp_min(1 / max(height, width))
    common = torch.randn(shape[0], 1, height, width, generator=generator)
    own = torch.randn(shape, generator=generator)
    white = SHARED_COLOUR**0.5 * common + (1 - SHARED_COLOUR) ** 0.5 * own
    waves = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    waves = waves - waves.mean((1, 2, 3), keepdim=True)
    return waves / waves.std((1, 2, 3), keepdim=True)


def joined(batches: list[Any]) -> Any:
    """Nested batches side by side along their first dimension."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(batches)
    if isinstance(first, Mapping):
        return {k: joined([b[k] for b in batches]) for k in first}
    if isinstance(first, list | tuple):
        return type(first)(joined(list(parts)) for parts in zip(*batches, strict=True))
    return first


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
