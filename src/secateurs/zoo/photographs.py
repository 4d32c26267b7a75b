"""Crops of the photographs that scikit-image and scikit-learn ship, without labels.

What is measured on them is agreement: how often a pruned classifier's best class is that of the
dense one. The dense network's own logits on a crop are its target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateurs.errors import InputError, described, require
from secateurs.task import Metric, Task
from secateurs.zoo.datasets import Data, TensorData, as_fetched
from secateurs.zoo.pretrained import lite0_pixels, package_folder, pretrained
from secateurs.zoo.specs import Options, Spec

PHOTOGRAPHS = (
    "astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg",
    "china.jpg", "flower.jpg",
)  # fmt: skip


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

    Options: ``model``, a name of `secateurs.zoo.pretrained` (efficientnet-lite0); ``crops`` of
    every photograph in either part (24); ``size`` (224); ``seed`` (0).
    """
    name = options.text("model", "efficientnet-lite0")
    crops, size = options.integer("crops", 24), options.integer("size", 224)
    seed = options.integer("seed", 0, least=0)
    options.done()
    assert crops is not None
    assert size is not None
    assert seed is not None
    require(not spec.name, "data", spec.text, "photographs, without a path")
    dense = pretrained(name).make()
    parts = []
    for part in range(2):
        generator = torch.Generator().manual_seed(2 * seed + part)
        images = lite0_pixels(
            torch.cat([crops_of(read_photograph(p), crops, size, generator) for p in PHOTOGRAPHS])
        )
        with torch.no_grad():
            logits = torch.cat([dense(images[i : i + 32]) for i in range(0, len(images), 32)])
        if logits.ndim != 2:
            raise InputError("option model", name, described("a classifier"))
        parts.append(TensorData(images, logits))
    train, test = parts
    data = Data(train, test, (3, size, size), int(test.targets.shape[1]), "classification",
                spec.text, as_fetched)  # fmt: skip
    loaders = data.loaders(32, seed=seed)
    task = agreement(*loaders, example_inputs=test.inputs[:1])
    return Data(train, test, data.inputs, data.classes, data.kind, data.name, as_fetched, task)


def agreement(train: Any, evaluate: Any, example_inputs: Tensor) -> Task:
    """A task whose targets are the logits of a dense classifier, (N, classes).

    The loss is KL(dense ‖ pruned); ``agreement`` is the share of samples with the same best
    class. The model is to be filled in.
    """

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(
            output.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean"
        )

    def agrees(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(-1) == target.argmax(-1)).float()

    return Task(
        model=torch.nn.Identity(),
        train=train,
        evaluate=evaluate,
        loss=loss,
        metrics={"agreement": Metric(agrees)},
        example_inputs=example_inputs,
        primary="agreement",
    )
