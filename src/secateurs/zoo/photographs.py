"""Crops of the photographs that scikit-image and scikit-learn ship, without labels.

What is measured on them is agreement: how often a pruned classifier's best class is that of the
dense one. The dense network's own logits on a crop are its target.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.devices import device_of
from secateurs.errors import InputError, described, require
from secateurs.parts.costs import evaluating
from secateurs.task import Metric, Task, logits_of
from secateurs.zoo.datasets import Data, TensorData, as_fetched
from secateurs.zoo.pretrained import lite0_pixels, package_folder, pretrained
from secateurs.zoo.specs import Options, Spec

PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg",
    "china.jpg", "flower.jpg",
)  # fmt: skip

CLASSIFIERS = ("efficientnet-lite0",)
"""Of `secateurs.zoo.pretrained`: those that answer what is on a photograph."""


def read_photograph(name: str) -> Tensor:
    """(3, H, W) in [0, 1]."""
    from PIL import Image

    folder = (
        package_folder("sklearn", "scikit-learn") / "datasets" / "images"
        if name in ("china.jpg", "flower.jpg")
        else package_folder("skimage", "scikit-image") / "data"
    )
    path: Path = folder / name
    if not path.is_file():
        raise InputError("photograph", name, "one that the installed package ships")
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def crops_of(image: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Square crops of 50 to 100 % of the shorter side, half of them mirrored, resized.

    Args:
        image: (3, H, W).

    Returns:
        (count, 3, size, size).
    """
    height, width = image.shape[1:]
    found = []
    for _ in range(count):
        share, down, across, mirror = torch.rand(4, generator=generator).tolist()
        side = int((0.5 + share / 2) * min(height, width))
        top, left = int(down * (height - side)), int(across * (width - side))
        crop = image[:, top : top + side, left : left + side]
        crop = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]
        found.append(crop.flip(2) if mirror < 0.5 else crop)
    return torch.stack(found)


def photographs(spec: Spec, options: Options) -> Data:
    """Crops with the logits of a dense classifier, for `agreement`.

    Options: ``model``, one of `CLASSIFIERS`; ``crops`` of every photograph in either part (24);
    ``size`` (224); ``seed`` (0). Any other classifier: `answered` and `agreement`.
    """
    name = options.text("model", CLASSIFIERS[0], CLASSIFIERS)
    crops, size = options.integer("crops", 24), options.integer("size", 224)
    seed = options.integer("seed", 0, least=0)
    options.done()
    assert crops is not None
    assert size is not None
    assert seed is not None
    require(not spec.name, "data", spec.text, "photographs, without a path")
    answering = pretrained(name).make()
    train, test = (
        answered(answering, lite0_pixels(crops_of_all(crops, size, 2 * seed + part)))
        for part in range(2)
    )
    data = Data(train, test, (3, size, size), int(test.targets.shape[1]), "classification",
                spec.text, as_fetched)  # fmt: skip
    loaders = data.loaders(32, seed=seed)
    task = agreement(*loaders, example_inputs=test.inputs[:1])
    return replace(data, task=task)


def crops_of_all(count: int, size: int, seed: int) -> Tensor:
    """`count` crops of every photograph: (7 count, 3, size, size) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([crops_of(read_photograph(p), count, size, generator) for p in PHOTOGRAPHS])


def answered(dense: nn.Module, inputs: Tensor) -> TensorData:
    """Inputs with the logits of any dense classifier for targets, for `agreement`.

    Args:
        dense: called in eval mode on 32 samples at a time, where it is.
        inputs: (N, ...), as it takes them.

    Raises:
        InputError: its output is not (N, classes).
    """
    device = device_of(dense)
    with evaluating(dense), torch.no_grad():
        parts = [logits_of(dense(part.to(device))).cpu() for part in inputs.split(32)]
    if parts[0].ndim != 2:
        shown = described(f"outputs of shape {tuple(parts[0].shape)}")
        raise InputError("dense", shown, "a classifier: logits of shape (N, classes)")
    return TensorData(inputs, torch.cat(parts))


def agreement(train: Any, evaluate: Any, example_inputs: Tensor) -> Task:
    """A task whose targets are the logits of a dense classifier, (N, classes).

    The loss is KL(dense ‖ pruned) of the softmaxes; ``agreement`` is the share of samples with
    the same best class, ``logit-mse`` the mean squared difference of the logits. The model is to
    be filled in (`Task.with_model`).
    """

    def loss(output: Any, target: Tensor) -> Tensor:
        return F.kl_div(
            logits_of(output).log_softmax(-1),
            target.log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )

    def agrees(output: Any, target: Tensor) -> Tensor:
        return (logits_of(output).argmax(-1) == target.argmax(-1)).float()

    def distance(output: Any, target: Tensor) -> Tensor:
        return (logits_of(output) - target).square().mean(-1)

    return Task(
        model=nn.Identity(),
        train=train,
        evaluate=evaluate,
        loss=loss,
        metrics={
            "agreement": Metric(agrees),
            "logit-mse": Metric(distance, higher_is_better=False),
        },
        example_inputs=example_inputs,
        primary="agreement",
    )
