"""Small reference networks by name.

A network is a function (inputs, classes, width, options) -> module, entered by a decorator;
every module of this package that holds some is imported on the first look-up. All have their
output layer called ``classifier``, use modules (not functions) for activations, and draw their
weights from torch's global generator: who wants the same weights twice seeds it.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from torch import nn

from secateurs.errors import InputError, require, unknown

Shape = tuple[int, ...]
Factory = Callable[..., nn.Module]
F = TypeVar("F", bound=Factory)

_MODULES = ("perceptrons", "convolutional", "resnets", "transformers", "llama")
_NETWORKS: dict[str, Network] = {}


@dataclass(frozen=True)
class Network:
    """A registered network.

    Attributes:
        name: by which it is made.
        make: (inputs, classes, width, options) -> module.
        inputs, classes: what it is built for when nobody says: its paper's data.
        kind: ``classification`` of images (C, H, W), or ``language``, over tokens (T,).
        ranks: numbers of dimensions that a sample may have.
        init: how its weights are drawn, one of `INITIALISATIONS`.
        fixed: options that this name presets.
    """

    name: str
    make: Factory
    inputs: Shape
    classes: int
    kind: str
    ranks: tuple[int, ...]
    init: str
    fixed: dict[str, Any]

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return (inspect.getdoc(self.make) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults."""
        parameters = inspect.signature(self.make).parameters
        own = [p for n, p in parameters.items() if n not in ("inputs", "classes", "width")]
        return {p.name: self.fixed.get(p.name, p.default) for p in own}


def network(
    name: str,
    *,
    inputs: Shape = (3, 32, 32),
    classes: int = 10,
    kind: str = "classification",
    ranks: tuple[int, ...] | None = None,
    init: str = "kaiming-normal",
    **fixed: Any,
) -> Callable[[F], F]:
    """Decorator that enters a network under `name`; see `Network` for the arguments."""

    def enter(make: F) -> F:
        _NETWORKS[name] = Network(
            name, make, inputs, classes, kind, ranks or (len(inputs),), init, fixed
        )
        return make

    return enter


@cache
def _discover() -> None:
    for module in _MODULES:
        importlib.import_module(f"secateurs.zoo.{module}")


def networks(pattern: str = "*") -> dict[str, Network]:
    """Networks whose names match a wildcard, sorted by name."""
    _discover()
    return {n: _NETWORKS[n] for n in sorted(_NETWORKS) if fnmatch.fnmatch(n, pattern)}


def find_network(name: str) -> Network:
    """A network by name.

    Raises:
        InputError: there is none; the closest name is suggested.
    """
    _discover()
    if name not in _NETWORKS:
        raise unknown("network", name, _NETWORKS)
    return _NETWORKS[name]


def make_network(
    name: str,
    *,
    inputs: Shape | None = None,
    classes: int | None = None,
    width: float = 1.0,
    init: str | None = None,
    **options: Any,
) -> nn.Module:
    """A network with fresh weights.

    Args:
        name: one of `networks`.
        inputs: shape of a sample, (C, H, W) for images, (T,) for tokens.
        classes: outputs, or the vocabulary.
        width: multiplies every hidden width (rounded, at least 1).
        init: one of `INITIALISATIONS`; the network's own when None.
        options: of the network; texts, as they come from a spec, are turned into what it takes.

    Raises:
        InputError: unknown network, initialisation or option, or a value that it does not take.
    """
    found = find_network(name)
    inputs = found.inputs if inputs is None else tuple(inputs)
    classes = found.classes if classes is None else classes
    shape = "(tokens,)" if found.kind == "language" else "(channels, height, width)"
    fits = len(inputs) in found.ranks and all(isinstance(n, int) and n > 0 for n in inputs)
    require(fits, "inputs", inputs, f"{shape} of positive integers for {name}")
    require(classes >= 1, "classes", classes, "at least 1")
    require(width > 0, "width", width, "a multiplier above 0")
    init = found.init if init is None else init
    if init not in INITIALISATIONS:
        raise unknown("init", init, INITIALISATIONS)
    model = found.make(inputs, classes, width, **{**found.fixed, **_checked(found, options)})
    initialise(model, init)
    return model


def _checked(found: Network, options: dict[str, Any]) -> dict[str, Any]:
    """The options in the types that the network's signature states."""
    from pydantic import TypeAdapter, ValidationError

    known, hints = found.options, typing.get_type_hints(found.make)
    values = {}
    for key, value in options.items():
        if key not in known:
            raise unknown(f"option of {found.name}", key, [*known, "init"])
        several = typing.get_origin(hints[key]) is tuple
        if several and isinstance(value, str):
            value = tuple(part for part in value.split(",") if part)
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as failure:
            problem = failure.errors()[0]["msg"]
            raise InputError(
                f"option {key} of {found.name}", options[key],
                f"something like {known[key]!r} ({problem})",
            ) from None  # fmt: skip
    return values


def scaled(channels: int, width: float) -> int:
    """A width times the multiplier: rounded, at least 1."""
    return max(1, round(channels * width))


INITIALISATIONS: dict[str, Callable[[Any], Any]] = {
    "kaiming-normal": nn.init.kaiming_normal_,
    "glorot-normal": nn.init.xavier_normal_,
}
"""Kaiming: N(0, 2 / fan_in) (He et al., arXiv 1502.01852); Glorot: N(0, 2 / (fan_in + fan_out)),
as in the lottery-ticket paper (arXiv 1803.03635)."""


def initialise(model: nn.Module, init: str = "kaiming-normal") -> None:
    """Draw the weights of convolutions and linear layers again; biases become 0.

    Weights on the meta device are left: torch would import its compiler to draw nothing.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_meta:
            INITIALISATIONS[init](module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
