"""Exchanging a layer for one that costs less, in place, and doing it again at load.

Not every smaller model is the dense one with shorter axes: a kernel becomes two thin ones, a
block its shortcut, a weight a view of a shared array. Such a layer is a `Substitute`: a module
that says in plain values how it is made from the dense layer. The plan of a substitution holds
those values by path; weights are loaded afterwards, so no pickle is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import nn

from secateurs.errors import InputError, described, unknown

FORM = "substituted"
"""The form of a plan of `secateurs.structure.persistence` that this module rebuilds."""

_KINDS: dict[str, type[Substitute]] = {}


class Substitute(nn.Module, ABC):
    """A layer that stands in for a dense one.

    Subclasses that set `kind` are found by that name at load, and implement both methods.

    Attributes:
        kind: the name of the class in a plan; one class a name.
    """

    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            known = _KINDS.get(cls.kind)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise InputError("kind", cls.kind, f"a name not taken by {known.__module__}")
            _KINDS[cls.kind] = cls

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values from which, with the dense layer, `shaped` makes a layer of this shape."""

    @classmethod
    @abstractmethod
    def shaped(cls, dense: nn.Module, config: Mapping[str, Any]) -> Self:
        """A layer like the one that gave `config`; its weights may be anything.

        Raises:
            InputError: `dense` is not a layer that this can stand in for.
        """


def is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether its class computes what torch's of one of `kinds` does, from a weight of its own."""
    kind = next((k for k in kinds if isinstance(module, k)), None)
    own = isinstance(module._parameters.get("weight"), nn.Parameter)
    return kind is not None and own and type(module).forward is kind.forward


def owners(model: nn.Module) -> Counter[int]:
    """Under how many names the model has each parameter, by its ``id``."""
    modules = model.named_modules(remove_duplicate=False)
    return Counter(id(p) for _, module in modules for p in module.parameters(recurse=False))


def substitute(model: nn.Module, layers: Mapping[str, Substitute]) -> dict[str, Any]:
    """Put `layers` into `model` by path, in place.

    Returns:
        The plan, to be appended to ``outcome.surgery``.

    Raises:
        InputError: the model has no layer of that path, or a path is empty (the whole model).
    """
    for path in layers:
        _require_layer(model, path)
    for path, layer in layers.items():
        model.set_submodule(path, layer.train(model.get_submodule(path).training))
    return {
        "form": FORM,
        "layers": {p: {"kind": s.kind, "config": s.config()} for p, s in layers.items()},
        "sizes": [],
    }


def resubstitute(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """Do the substitutions of a plan again on a dense model, in place.

    Raises:
        InputError: the model lacks a layer, or a kind is unknown.
    """
    made = {}
    for path, entry in plan["layers"].items():
        if entry["kind"] not in _KINDS:
            raise unknown("kind of layer", entry["kind"], _KINDS)
        dense = _require_layer(model, path)
        made[path] = _KINDS[entry["kind"]].shaped(dense, entry["config"])
    substitute(model, made)
    return model


def _require_layer(model: nn.Module, path: str) -> nn.Module:
    try:
        found = model.get_submodule(path) if path else None
    except AttributeError:
        found = None
    if found is None:
        raise InputError("model", described(f"no layer {path!r}"), "the dense model of the plan")
    return found
