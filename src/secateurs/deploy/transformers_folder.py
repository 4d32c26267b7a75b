"""A shortened transformers model as an ordinary folder, for plain `from_pretrained`.

A configuration can express a shape when every layer has the same: one width of the feed-forward
layers, one number of heads. Which of its numbers say so is found by trying: those that equal a
size before, set to the size after, until a model made from the configuration has the tensors of
the shortened one and computes the same. The numbers of configurations inside it, of text and of
vision, are tried with its own. Of a module that only wraps a transformers model, such as an
encoder of sentences, it is that model that is written.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
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

TRIES = 256
"""Configurations that are tried."""
AGREE = 1e-5
"""Largest relative difference of outputs that counts as the same."""


def save_pretrained(outcome: Outcome, folder: str | Path, example_inputs: Any) -> Path:
    """Write the outcome's model, or the one in it, as transformers does: config.json, safetensors.

    The folder appears whole or not at all.

    Args:
        example_inputs: as the model takes them, to compare outputs on.

    Raises:
        InputError: not a transformers model, a folder that is not empty, or shapes that no
            configuration of the model expresses (the first tensor that differs is named).
    """
    model = transformers_model(outcome.model)
    if model is None:
        shown = described(type(outcome.model).__name__)
        raise InputError("model", shown, "a transformers model")
    target = Path(folder)
    check_output_folder(target)
    inputs = example_inputs
    if model is not outcome.model:
        inputs = _given(outcome.model, model, example_inputs)
    config = expressing(model, size_changes(outcome), inputs, _advice(outcome))
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


def transformers_model(model: nn.Module) -> Any:
    """The model of transformers that a module is, or in which all its parameters are; or None."""
    everything = len(list(model.parameters()))
    for module in model.modules():
        if hasattr(module, "save_pretrained") and hasattr(module, "config"):
            return module if len(list(module.parameters())) == everything else None
    return None


def _given(model: nn.Module, inner: nn.Module, example_inputs: Any) -> Any:
    """What a module gives to one inside it: positional where there is no keyword."""
    calls: list[Any] = []
    hook = inner.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs if kwargs else args), with_kwargs=True
    )
    try:
        args, kwargs = as_call(to_device(example_inputs, device_of(model)))
        with traceable(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        hook.remove()
    return calls[0]


def _advice(outcome: Outcome) -> str:
    """Options of the outcome's method under which all layers come down to one size."""
    options = outcome.options
    if "scope" in options:
        return "scope=local"
    if "protect_first" in options and "protect_last" in options:
        return "protect_first=0 protect_last=0"
    if outcome.method == "cfsp":
        return "metric=constant"
    return ""


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


def expressing(
    model: Any, changes: Sequence[tuple[int, int]], example_inputs: Any, advice: str = ""
) -> Any:
    """A configuration from which a model of the shortened shapes is made.

    Args:
        advice: options that would give layers of one size, for the refusal.

    Raises:
        InputError: there is none.
    """
    device = device_of(model)
    args, kwargs = as_call(to_device(example_inputs, device))
    with traceable(model), torch.no_grad():
        wanted = model(*args, **kwargs)
        closest = (math.inf, "no configuration was tried")
        for config in itertools.islice(_candidates(model.config, changes), TRIES):
            if difference := _difference(model, config):
                closest = min(closest, difference, key=lambda found: found[0])
                continue
            other = _made(model, config).to(device, model.dtype).eval()
            other.load_state_dict(model.state_dict())
            if same_outputs(other(*args, **kwargs), wanted, AGREE):
                return config
            closest = (0, "the outputs")
    raise InputError(
        "model",
        described(f"shapes that {type(model.config).__name__} cannot express ({closest[1]})"),
        f"one size for all layers{f' ({advice})' if advice else ''} of the axes that a "
        "configuration has a number for; secateurs.save keeps any shape",
    )


def _candidates(config: Any, changes: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """Copies of a configuration in which numbers that equal an old size are the new one."""
    choices: list[list[tuple[tuple[str, ...], str, int] | None]] = []
    for path, name, value in _numbers(config):
        new = [after for before, after in changes if before == value]
        if new:
            choices.append([*((path, name, n) for n in dict.fromkeys(new)), None])
    for chosen in itertools.product(*choices):
        found = copy.deepcopy(config)
        for change in chosen:
            if change is not None:
                path, name, after = change
                setattr(functools.reduce(getattr, path, found), name, after)
        yield found


def _numbers(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """Where the integers of a configuration and of those inside it are, and what they are."""
    for name, value in config.to_dict().items():
        if type(value) is int:
            yield path, name, value
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            yield from _numbers(inner, (*path, name))


def _made(model: Any, config: Any) -> Any:
    """A model of the same kind, without a pooler where it has none."""
    bare = hasattr(model, "pooler") and model.pooler is None
    return type(model)(config, add_pooling_layer=False) if bare else type(model)(config)


def _difference(model: nn.Module, config: Any) -> tuple[float, str] | None:
    """How many tensors a model of the configuration would have otherwise, and the first of them."""
    try:
        type(config).from_dict(config.to_dict())  # transformers refuses some numbers
        with torch.device("meta"):
            other = _made(model, config)
    except Exception as reason:
        return math.inf, " ".join(str(reason).split())
    own, made = model.state_dict(), other.state_dict()
    found = []
    for name in dict.fromkeys([*own, *made]):
        shapes = [tuple(s[name].shape) if name in s else None for s in (own, made)]
        if shapes[0] != shapes[1]:
            found.append(f"{name} has {shapes[0]}, not {shapes[1]}")
    return (len(found), found[0]) if found else None
