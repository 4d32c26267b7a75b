"""Parts of a labelled data set, and a second task beside the class.

For transfer: only some of the classes, only so many samples of each. For models that serve two
tasks: the class and a coarse category that it belongs to, or the class and by how many quarters
the image was turned, which is independent of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from secateurs.errors import InputError, described, require
from secateurs.training.order import mix
from secateurs.zoo.datasets import Data, TensorData
from secateurs.zoo.specs import Options

EVEN_ODD = (0, 1, 0, 1, 0, 1, 0, 1, 0, 1)
"""The coarse category of a digit: even or odd."""
CLOTHING = (0, 1, 0, 0, 0, 2, 0, 2, 3, 2)
"""Of a piece of clothing: worn above (with dresses), trousers, shoes, bags."""
TURNS = 4
"""Quarters of a turn."""

Choose = Callable[[Data, tuple[int, ...]], Data]
"""(whole data, coarse category by class) -> what the options ask for."""


def choice_of(options: Options, classes: int) -> Choose:
    """What the options ``classes``, ``per_class`` and ``with`` ask for.

    Raises:
        InputError: a class that is none or named twice, fewer than two, or a word that ``with``
            does not take.
    """
    names = options.text("classes")
    wanted = None if not names else _numbers(options, names, classes)
    per_class = options.integer("per_class")
    attribute = options.text("with", "none", ("none", "coarse", "rotation"))

    def choose(data: Data, coarse: tuple[int, ...]) -> Data:
        if wanted is not None:
            data = with_classes(data, wanted)
            coarse = tuple(coarse[c] for c in wanted)
        if per_class is not None:
            data = replace(data, train=few_samples(data.train, per_class))
        return data if attribute == "none" else with_second_task(data, attribute, coarse)

    return choose


def _numbers(options: Options, text: str, classes: int) -> tuple[int, ...]:
    parts = text.split(",")
    known = all(p.isdecimal() and int(p) < classes for p in parts)
    require(
        known and len(set(parts)) == len(parts) > 1, f"{options.argument} option classes", text,
        f"two or more different numbers from 0 to {classes - 1}, joined by commas",
    )  # fmt: skip
    return tuple(map(int, parts))


def with_classes(data: Data, wanted: tuple[int, ...]) -> Data:
    """Only the samples of some classes, which are numbered in the order given."""
    number = torch.full((max(wanted) + 1,), -1)
    number[list(wanted)] = torch.arange(len(wanted))

    def part(samples: Any, which: str) -> TensorData:
        chosen = torch.isin(samples.targets, torch.tensor(wanted)).nonzero().flatten()
        left = TensorData(samples.inputs[chosen], number[samples.targets[chosen]])
        shown = described(f"{len(left.targets.unique())} of {len(wanted)} classes")
        full = len(left.targets.unique()) == len(wanted)
        require(full, f"data {data.name} ({which})", shown, "a sample of every class")
        return left

    train, test = part(data.train, "train"), part(data.test, "test")
    return replace(data, train=train, test=test, classes=len(wanted))


def few_samples(samples: Any, per_class: int) -> TensorData:
    """The first samples of every class, in their order.

    Raises:
        InputError: a class has fewer.
    """
    rank = torch.empty(len(samples), dtype=torch.long)
    for label in samples.targets.unique():
        own = samples.targets == label
        if int(own.sum()) < per_class:
            raise InputError(
                "per_class", per_class, f"at most {int(own.sum())}, all of class {int(label)}"
            )
        rank[own] = torch.arange(int(own.sum()))
    chosen = (rank < per_class).nonzero().flatten()
    return TensorData(samples.inputs[chosen], samples.targets[chosen])


def with_second_task(data: Data, attribute: str, coarse: tuple[int, ...]) -> Data:
    """Targets (N, 2): the class, and the attribute.

    Args:
        attribute: ``coarse``: the category of the class. ``rotation``: every image (C, H, H) is
            turned by 0 to 3 quarters, always the same, and the number is to be told.
        coarse: category by class.
    """
    assert data.classes is not None
    categories = sorted(set(coarse))
    of_class = torch.tensor([categories.index(c) for c in coarse])

    def part(samples: Any, stream: int) -> TensorData:
        images, labels = samples.inputs, samples.targets
        if attribute == "coarse":
            return TensorData(images, torch.stack([labels, of_class[labels]], 1))
        generator = torch.Generator().manual_seed(mix(stream, 301))
        turns = torch.randint(TURNS, (len(images),), generator=generator)
        return TensorData(turned(images, turns), torch.stack([labels, turns], 1))

    count = len(categories) if attribute == "coarse" else TURNS
    require(count > 1, f"data {data.name}", described("one coarse category"), "two or more")
    return replace(
        data,
        train=part(data.train, 0),
        test=part(data.test, 1),
        classes=data.classes + count,
        heads={"class": data.classes, attribute: count},
    )


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Images (N, C, H, H), each turned by its number of quarters."""
    found = images.clone()
    for quarters in range(1, TURNS):
        own = turns == quarters
        found[own] = torch.rot90(images[own], quarters, (-2, -1))
    return found
