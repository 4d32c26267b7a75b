"""Methods by name, with the paper each comes from and the tags that describe it.

A method is a frozen dataclass; its fields are its hyper-parameters. The listing, the command
line, the recipe schema and the tables in the documentation are all read from the class. Every
module under `secateurs.methods` is found by itself, so a new method is one new file.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import math
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from secateurs.errors import InputError, require, unknown


@dataclass(frozen=True)
class Paper:
    """Where a method was published; `id` is the arXiv number or a DOI."""

    title: str
    venue: str
    year: int
    id: str

    def __str__(self) -> str:
        return f"{self.title} ({self.venue} {self.year}, {self.id})"


VOCABULARY: dict[str, tuple[str, ...]] = {
    "speedup": ("U", "SS", "S", "-"),
    "unit": (
        "weight", "nm", "block", "kernel", "filter", "channel", "group", "head", "neuron",
        "layer", "operator", "width_depth", "rank", "share", "token", "window", "attnblock",
        "sample", "delta", "adapter", "network",
    ),
    "when": ("PBT", "PDT", "PAT", "PTP", "RT", "ANY"),
    "criterion": (
        "mag", "lp", "sens", "loss", "bn", "act", "rel", "sim", "attn", "rand", "learned",
        "any", "none",
    ),
    "learn": (
        "none", "sr", "gate", "thr", "soft", "score", "meta", "gnn", "rl", "search", "router",
    ),
    "fusion": ("none", "quant", "td", "nas", "kd", "peft", "fl", "avg"),
    "supervision": ("sup", "self", "none"),
    "recovery": ("retrain", "rewind", "kd", "peft", "avg", "adapt", "none"),
    "rounds": ("one_shot", "iterative", "gradual"),
}  # fmt: skip
"""The axes of the survey of Cheng, Zhang & Shi (TPAMI 2024) and the values each may take."""

WHEN = {
    "PBT": "before training",
    "PDT": "during training",
    "PAT": "after training",
    "PTP": "after training, without retraining",
    "RT": "at run time, per input",
    "ANY": "any time",
}


@dataclass(frozen=True)
class Tags:
    """What kind of method this is, in the vocabulary of the survey (`VOCABULARY`).

    Several values of one axis are joined by ``+``.
    """

    speedup: str
    unit: str
    when: str
    criterion: str
    learn: str = "none"
    fusion: str = "none"
    supervision: str = "sup"
    recovery: str = "retrain"
    rounds: str = "one_shot"

    def __post_init__(self) -> None:
        for axis, allowed in VOCABULARY.items():
            for value in getattr(self, axis).split("+"):
                if value not in allowed:
                    raise unknown(f"tag {axis}", value, allowed)

    def values(self, axis: str) -> list[str]:
        """The values of one axis."""
        return str(getattr(self, axis)).split("+")


_METHODS: dict[str, type[Any]] = {}
_ALIASES: dict[str, str] = {}
T = TypeVar("T", bound=type[Any])


def register(
    name: str,
    *,
    paper: Paper | None,
    tags: Tags,
    budgets: tuple[str, ...],
    aliases: tuple[str, ...] = (),
) -> Callable[[T], T]:
    """Class decorator that enters a method.

    Args:
        name: the name by which people run it.
        paper: its source; None for plain baselines.
        tags: what it is.
        budgets: kinds of budget that it can honour.
        aliases: shorter names that people may also type.
    """

    def enter(cls: T) -> T:
        entered: Any = cls
        require(dataclasses.is_dataclass(cls), "method", cls.__name__, "a dataclass")
        known = _METHODS.get(name)
        require(_ALIASES.get(name, name) == name, "name", name, "a name that is no alias")
        again = (cls.__module__, cls.__qualname__)
        if known is not None and (known.__module__, known.__qualname__) != again:
            raise InputError("name", name, f"a name not taken by {known.__module__}")
        entered.name, entered.paper, entered.tags, entered.budgets = name, paper, tags, budgets
        for alias in aliases:
            free = alias not in _METHODS and _ALIASES.get(alias, name) == name
            require(free, "alias", alias, "a name that is not taken")
            _ALIASES[alias] = name
        entered.aliases = aliases
        _METHODS[name] = cls
        return cls

    return enter


@cache
def discover() -> None:
    """Import every method, so that what its file registers is there."""
    import secateurs.methods as package

    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for point in entry_points(group="secateurs.methods"):
        point.load()


def list_methods(pattern: str = "*", **wanted: str) -> dict[str, type[Any]]:
    """Registered methods by name, filtered.

    Args:
        pattern: wildcard over names.
        wanted: a value an axis of the tags must have, such as ``unit="weight"``; ``needs``
            filters by what the method asks of the user.
    """
    discover()
    for axis, value in wanted.items():
        if axis not in (*VOCABULARY, "needs"):
            raise unknown("axis", axis, (*VOCABULARY, "needs"))
        accepted = NEEDS if axis == "needs" else VOCABULARY[axis]
        if value not in accepted:
            raise unknown(axis, value, accepted)
    return {
        name: cls
        for name, cls in sorted(_METHODS.items())
        if fnmatch.fnmatch(name, pattern)
        and all(
            value in (cls.needs if axis == "needs" else cls.tags.values(axis))
            for axis, value in wanted.items()
        )
    }


NEEDS = ("nothing", "inputs", "batches", "training", "fresh-model", "resize", "norm-scales", "base",
         "embeddings", "labels", "scores", "target")  # fmt: skip
"""What a method may ask for: example inputs, batches with a loss, a training set to train on, a
function that makes a fresh model, a function that makes the model at another width, a model with
normalisation layers that have scales, the base that the model was fine-tuned from; of samples
their embeddings, labels or columns of scores, and the samples that they are to be useful for."""


def method_class(name: str) -> type[Any]:
    """The class of a method, by its name or an alias.

    Raises:
        InputError: no such method; the closest name is suggested.
    """
    discover()
    name = _ALIASES.get(name, name)
    if name not in _METHODS:
        raise unknown("method", name, [*_METHODS, *_ALIASES])
    return _METHODS[name]


def create(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """A method by name with its hyper-parameters; strings are turned into the fields' types.

    Raises:
        InputError: unknown method or option, or a value that the option does not take.
    """
    return build(method_class(name), options or {})


def build(cls: type[Any], options: Mapping[str, Any]) -> Any:
    """A dataclass from plain values, checked against the types of its fields."""
    from pydantic import TypeAdapter, ValidationError

    names = [f.name for f in dataclasses.fields(cls)]
    for key in options:
        if key not in names:
            raise unknown("option", key, names)
    try:
        made = TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as failure:
        first = failure.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            raise cause from None
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str | int))
        raise InputError(where or cls.__name__, first["input"], first["msg"]) from None
    for name in names:
        for number in _floats(getattr(made, name)):
            require(math.isfinite(number), name, number, "a finite number")
    return made


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(part)


@dataclass(frozen=True)
class Option:
    """A hyper-parameter of a method, as people see it."""

    name: str
    type: str
    default: Any
    help: str
    unit: str


def options_of(cls: type[Any]) -> list[Option]:
    """The hyper-parameters of a dataclass: name, type, default, help, unit."""
    hints = typing.get_type_hints(cls)
    return [
        Option(
            f.name,
            type_name(hints[f.name]),
            f.default_factory() if callable(f.default_factory) else f.default,
            f.metadata.get("help", ""),
            f.metadata.get("unit", ""),
        )
        for f in dataclasses.fields(cls)
    ]


def type_name(hint: Any) -> str:
    """A type as people read it: ``float``, ``a|b|c``, ``int or none``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(str(a) for a in args)
    if hint is type(None):
        return "none"
    if origin in (dict, tuple, list):
        inner = ", ".join(type_name(a) for a in args if a is not Ellipsis)
        return f"{origin.__name__}[{inner}]"
    if args:
        return " or ".join(type_name(a) for a in args)
    return str(getattr(hint, "__name__", hint))


def options_as_dict(method: Any) -> dict[str, Any]:
    """The hyper-parameters of a method as plain values."""
    return dataclasses.asdict(method)
