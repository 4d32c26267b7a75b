"""A shortened transformers model as an ordinary folder, for plain `from_pretrained`.

A configuration can express a shape when every layer has the same: one width of the feed-forward
layers, one number of heads. Which of its numbers say so is found by trying: those that equal a
size before, set to the size after, until a model made from the configuration has the tensors of
the shortened one and computes the same.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, described
from secateurs.outcome import Outcome, check_output_folder
from secateurs.structure.rewrite import same_outputs
from secateurs.structure.trace import as_call, traceable

TRIES = 64
"""Configurations that are tried."""
AGREE = 1e-5
"""Largest relative difference of outputs that counts as the same."""


def save_pretrained(outcome: Outcome, folder: str | Path, example_inputs: Any) -> Path:
    """Write the outcome's model as transformers does: config.json and safetensors.

    The folder appears whole or not at all.

    Args:
        example_inputs: as the model takes them, to compare outputs on.

    Raises:
        InputError: not a transformers model, a folder that is not empty, or shapes that no
            configuration of the model expresses (the first tensor that differs is named).
    """
    model: Any = outcome.model
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise InputError("model", described(type(model).__name__), "a transformers model")
    target = Path(folder)
    check_output_folder(target)
    config = expressing(model, size_changes(outcome), example_inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dense = model.config
    try:
        model.config = config
        with _without_bars():
            model.save_pretrained(partial)
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    finally:
        model.config = dense
        shutil.rmtree(partial, ignore_errors=True)
    return target


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers' own, for files that are written in an instant."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def size_changes(outcome: Outcome) -> list[tuple[int, int]]:
    """(before, after) of every dimension that changed, over all surgeries of an outcome."""
    changes: list[tuple[int, int]] = []
    for plan in outcome.surgery:
        own = [(before, after) for before, after in plan["sizes"]]
        further = [(before, c) for before, after in changes for b, c in own if b == after]
        changes = list(dict.fromkeys([*further, *changes, *own]))
    return changes


def expressing(model: Any, changes: Sequence[tuple[int, int]], example_inputs: Any) -> Any:
    """A configuration from which a model of the shortened shapes is made.

    Raises:
        InputError: there is none.
    """
    device = device_of(model)
    args, kwargs = as_call(to_device(example_inputs, device))
    with traceable(model), torch.no_grad():
        wanted = model(*args, **kwargs)
        difference = "no configuration was tried"
        for config in itertools.islice(_candidates(model.config, changes), TRIES):
            difference = _difference(model, config)
            if difference:
                continue
            other = type(model)(config).to(device, model.dtype).eval()
            other.load_state_dict(model.state_dict())
            if same_outputs(other(*args, **kwargs), wanted, AGREE):
                return config
            difference = "the outputs"
    raise InputError(
        "model",
        described(f"shapes that {type(model.config).__name__} cannot express ({difference})"),
        "one size for all layers (scope=local) of the axes that a configuration has a number "
        "for; secateurs.save keeps any shape",
    )


def _candidates(config: Any, changes: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """Copies of a configuration in which numbers that equal an old size are the new one."""
    numbers = {n: v for n, v in config.to_dict().items() if type(v) is int}
    choices: list[list[tuple[str, int] | None]] = []
    for name, value in numbers.items():
        new = [after for before, after in changes if before == value]
        if new:
            choices.append([*((name, n) for n in dict.fromkeys(new)), None])
    for chosen in itertools.product(*choices):
        found = copy.deepcopy(config)
        for change in chosen:
            if change is not None:
                setattr(found, *change)
        yield found


def _difference(model: nn.Module, config: Any) -> str:
    """The first tensor whose shape a model of the configuration would have otherwise."""
    try:
        type(config).from_dict(config.to_dict())  # transformers refuses some numbers
        with torch.device("meta"):
            other = type(model)(config)
    except Exception as reason:
        return " ".join(str(reason).split())
    own, made = model.state_dict(), other.state_dict()
    for name in dict.fromkeys([*own, *made]):
        shapes = [tuple(s[name].shape) if name in s else None for s in (own, made)]
        if shapes[0] != shapes[1]:
            return f"{name} has {shapes[0]}, not {shapes[1]}"
    return ""
