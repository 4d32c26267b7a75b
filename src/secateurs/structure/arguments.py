"""Arguments of an operation in a graph, by the names of its schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

Call = tuple[tuple[Any, ...], dict[str, Any]]


def names_of(node: fx.Node) -> list[str]:
    """The names of an operation's arguments, in order."""
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments]


def argument(node: fx.Node, name: str) -> Any:
    """An argument by name; the schema's default where the graph leaves it out."""
    return argument_of(node, node.args, node.kwargs, name)


def argument_of(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """The same among the values that a call of the operation gets."""
    at = names_of(node).index(name)
    if at < len(args):
        return args[at]
    target: Any = node.target
    return kwargs[name] if name in kwargs else target._schema.arguments[at].default_value


def with_argument(
    node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], name: str, value: Any
) -> Call:
    """The arguments of a call with one of them replaced."""
    at = names_of(node).index(name)
    if at < len(args):
        return (*args[:at], value, *args[at + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, name: value}


def with_size(old: Any, place: int | None, value: int) -> Any:
    """An integer argument, or one integer of a list of them, replaced."""
    return value if place is None else [*old[:place], value, *old[place + 1 :]]
