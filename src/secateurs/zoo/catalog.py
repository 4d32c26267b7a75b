"""Tasks from names: a model on a data set, with settings that are known to work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

from torch import Tensor, nn

from secateurs.errors import require
from secateurs.outcome import load
from secateurs.settings import TrainSettings
from secateurs.task import Task, classification, joint_classification, language_modelling, seeded
from secateurs.zoo.datasets import Data, load_data
from secateurs.zoo.likeness import is_noise, likeness
from secateurs.zoo.models import ModelSource, has_weights, load_model, saved_outcome
from secateurs.zoo.specs import parse_spec

__all__ = [
    "base_model",
    "default_settings",
    "has_weights",
    "inspectable",
    "make_task",
    "remake",
    "task_of",
]

Settings = tuple[TrainSettings, TrainSettings]

_TRANSFORMER = (
    TrainSettings(
        epochs=30, optimizer="adamw", lr=2e-3, weight_decay=0.01, warmup=50, clip_norm=1.0
    ),
    TrainSettings(
        epochs=8, optimizer="adamw", lr=1e-3, weight_decay=0.01, warmup=20, clip_norm=1.0
    ),
)
_LLAMA = (
    TrainSettings(
        steps=1500, optimizer="adamw", lr=4e-3, weight_decay=0.01, warmup=100, clip_norm=1.0
    ),
    TrainSettings(
        steps=200, optimizer="adamw", lr=1e-3, weight_decay=0.01, warmup=20, clip_norm=1.0
    ),
)
_DEFAULTS: tuple[tuple[str, str, Settings], ...] = (
    ("*", "zoo:vit-*", _TRANSFORMER),
    ("*", "zoo:char-*", _TRANSFORMER),
    ("*", "zoo:llama*", _LLAMA),
    ("*", "hf:*", (
        TrainSettings(epochs=3, optimizer="adamw", lr=5e-5, weight_decay=0.01, warmup=50,
                      schedule="linear", clip_norm=1.0),
        TrainSettings(epochs=1, optimizer="adamw", lr=5e-5, weight_decay=0.01, warmup=50,
                      schedule="linear", clip_norm=1.0),
    )),
    ("digits*", "*", (TrainSettings(epochs=10, lr=0.05), TrainSettings(epochs=5, lr=0.02))),
    ("fashion-mnist*limit=*", "*", (
        TrainSettings(epochs=10, lr=0.05), TrainSettings(epochs=4, lr=0.02),
    )),
    ("fashion-mnist*", "*", (TrainSettings(epochs=5, lr=0.05), TrainSettings(epochs=2, lr=0.02))),
    ("*", "*", (TrainSettings(epochs=30, lr=0.05), TrainSettings(epochs=5, lr=0.01))),
)  # fmt: skip
"""(data, model, (training, recovery)): the first row whose wildcards match is taken."""


def default_settings(model: str, data: str) -> Settings:
    """How a model is trained on a data set, and how it recovers, where nobody says otherwise."""
    for data_pattern, model_pattern, settings in _DEFAULTS:
        if fnmatch(data, data_pattern) and fnmatch(model, model_pattern):
            return settings
    raise AssertionError("the last row matches everything")


def make_task(
    model: str,
    data: str,
    *,
    batch_size: int = 64,
    seed: int = 0,
    training: TrainSettings | None = None,
    finetuning: TrainSettings | None = None,
    label_smoothing: float = 0.0,
    width: float = 1.0,
    workers: int = 0,
) -> Task:
    """The task of a model on a data set, both by name.

    Args:
        model: see `secateurs.zoo.models.load_model`.
        data: see `secateurs.zoo.datasets.load_data`; or ``noise``, on which a model with
            weights is to stay like itself (`secateurs.zoo.likeness`). A ``python:`` name that
            gives a Task brings its loaders, loss and metrics; the same name as model takes the
            Task as it is.
        batch_size: samples of a batch.
        seed: of the loader's order, and of what a model with weights still has to draw.
        training, finetuning: `default_settings`, or those of a user's Task, where they are None.
        label_smoothing: of the cross entropy, in classification.
        width: multiplies the model's.
        workers: processes that load the data.

    Raises:
        InputError: see `load_model` and `load_data`.
    """
    if is_noise(data):
        made = likeness(load_model(model, width=width), data)
        own_training, own_finetuning = training or made.training, finetuning or made.finetuning
        return replace(made, training=own_training, finetuning=own_finetuning)
    found = load_data(data)
    own = found.task
    defaults = default_settings(model, data) if own is None else (own.training, own.finetuning)
    recipes: dict[str, Any] = {
        "training": training or defaults[0],
        "finetuning": finetuning or defaults[1],
    }
    if own is not None and model == data:
        return replace(own, **recipes)
    source = load_model(model, data=found, width=width)
    return task_of(
        source,
        found,
        batch_size=batch_size,
        seed=seed,
        label_smoothing=label_smoothing,
        workers=workers,
        **recipes,
    )


def task_of(
    source: ModelSource,
    data: Data,
    *,
    batch_size: int = 64,
    seed: int = 0,
    label_smoothing: float = 0.0,
    workers: int = 0,
    **fields: Any,
) -> Task:
    """The task of a model and a data set that were found already.

    Args:
        fields: further fields of `Task`.
        batch_size, seed, label_smoothing, workers: as for `make_task`.
    """
    model = seeded(source.make, seed) if source.pretrained else source.make
    fields = {
        "model": model,
        "resize": source.resize,
        "name": f"{source.spec} on {data.name}",
        **fields,
    }
    if data.task is not None:
        return replace(data.task, **fields)
    train, test = data.loaders(batch_size, seed=seed, workers=workers)
    fields |= {"train": train, "evaluate": test, "example_inputs": data.example()}
    if data.kind == "language":
        return language_modelling(**fields)
    if data.heads is not None:
        return joint_classification(heads=data.heads, label_smoothing=label_smoothing, **fields)
    return classification(label_smoothing=label_smoothing, **fields)


def remake(model: str, data: str | None = None, width: float = 1.0) -> nn.Module:
    """The module that a saved outcome's weights go into; its own weights are of no account.

    Args:
        model, data, width: what the outcome has under ``source``.
    """
    found = None if data is None or is_noise(data) else load_data(data)
    source = load_model(parse_spec(model, "model").title, data=found, width=width)
    return seeded(source.architecture, 0)


def base_model(model: str, data: str | None = None) -> nn.Module:
    """A model with its weights, what others were fine-tuned from; in eval mode.

    What it still has to draw, such as a head for other classes, is the same every time.

    Raises:
        InputError: the model comes without weights, or cannot be had.
    """
    require(has_weights(model), "base", model, "a model with weights")
    found = None if data is None or is_noise(data) else load_data(data)
    return seeded(load_model(model, data=found).make, 0).eval()


def inspectable(model: str, data: str | None = None) -> tuple[nn.Module, Any, Mapping[str, Tensor]]:
    """A model in eval mode, a batch of 1 that it takes, and its masks by parameter name.

    Masks are there for the folder of a run or of a saved outcome, and empty otherwise.

    Args:
        data: gives the inputs; where None, those the model was made for.
    """
    found = None if data is None else load_data(data)
    source = load_model(model, data=found)
    folder = saved_outcome(model)
    if folder is None:
        return seeded(source.make, 0).eval(), source.example_inputs(), {}
    outcome = load(folder)
    return outcome.model.eval(), source.example_inputs(), outcome.masks
