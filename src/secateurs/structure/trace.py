"""A model traced once, and the dimensions of every tensor in it.

`torch.export` (non-strict) gives a graph of ATen operations; `secateurs.structure.rules` says
what each operation means for the dimensions of its tensors. What comes out is a `Trace`: the
graph, a `Dim` for every dimension of every parameter, buffer and activation, and what the rules
noted on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateurs.errors import InputError, described
from secateurs.structure.dimensions import Dim, Mismatch, axis, freeze, size_of
from secateurs.structure.rules import (
    Dims,
    Notes,
    Site,
    Value,
    flat,
    frozen_like,
    op_name,
    rule_for,
)


@dataclass
class Trace:
    """A traced model with the dimensions of its tensors.

    Attributes:
        model: the traced module.
        graph: the exported graph, its parameters and buffers being those of `model`.
        args, kwargs: the example inputs.
        dims: of every node's value.
        tensors: of every parameter and buffer, by canonical name.
        same: other names of a tied tensor -> its canonical name.
        notes: what the rules noted.
    """

    model: nn.Module
    graph: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: dict[fx.Node, Value] = field(default_factory=dict)
    tensors: dict[str, Dims] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied tensor under each of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as arguments and keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """Trace `model` in eval mode on `example_inputs` and derive all dimensions.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keywords.

    Raises:
        InputError: the model cannot be run, or its code depends on the values of its data.
    """
    args, kwargs = as_call(example_inputs)
    with traceable(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(model, args, kwargs, strict=False)
            graph = exported.module(check_guards=False)
        except Exception as failure:
            reason = str(failure).strip().splitlines()
            raise InputError(
                "model",
                described(f"{type(model).__name__} that cannot be traced"),
                "a model that torch.export takes with these inputs "
                f"({type(failure).__name__}: {reason[0] if reason else ''})",
            ) from failure
    found = Trace(model, graph, args, kwargs)
    _name_tensors(found)
    walk(found, graph.graph, graph)
    return found


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode, no caches, attention in the open; all put back afterwards."""
    training = [m for m in model.modules() if m.training]
    configs = {id(c): c for m in model.modules()
               if getattr(c := getattr(m, "config", None), "use_cache", None)}  # fmt: skip
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    for config in configs.values():
        config.use_cache = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for config in configs.values():
            config.use_cache = True
        for module in training:
            module.training = True


def _name_tensors(found: Trace) -> None:
    first: dict[int, str] = {}
    for name, tensor in named_tensors(found.model).items():
        canonical = first.setdefault(id(tensor), name)
        found.same[name] = canonical
        if canonical == name:
            found.tensors[name] = [axis(n) for n in tensor.shape]


def walk(found: Trace, graph: fx.Graph, owner: nn.Module, given: list[Value] | None = None) -> Any:
    """Apply the rules to a graph in its order; the dimensions of what it returns.

    Args:
        owner: module that the graph's attributes belong to.
        given: dimensions of its placeholders, for a graph inside another.
    """
    result: Any = None
    inputs = iter(given or [])
    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            found.dims[node] = next(inputs) if given else frozen_like(value, "an input")
        elif node.op == "get_attr":
            found.dims[node] = _attribute(found, node, owner)
        elif node.op == "call_function":
            found.dims[node] = _operation(found, node, owner)
        elif node.op == "output":
            result = fx.map_arg(node.args[0], found.dims.get)
            if given is None:
                _freeze_outputs(found, node)
    return result


def _attribute(found: Trace, node: fx.Node, owner: nn.Module) -> Value:
    name = found.same.get(str(node.target))
    if name is not None:
        return found.tensors[name]
    value: Any = owner
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return frozen_like(value, "a constant")


def _operation(found: Trace, node: fx.Node, owner: nn.Module) -> Value:
    name = op_name(node)
    if name == "getitem":
        whole, place = node.args
        value = found.dims.get(whole)  # type: ignore[arg-type]
        return value[place] if isinstance(value, tuple) else None
    if name.startswith("wrap_with") or name in ("wrap", "checkpoint"):
        return _inlined(found, node, owner)
    value = node.meta.get("val")
    operands = [found.dims.get(n) for n in node.all_input_nodes]
    if not isinstance(value, Tensor | list | tuple):
        return None
    function = rule_for(node)
    try:
        if function is None or not hasattr(node.target, "_schema"):
            raise Mismatch("no rule")
        dims = function(Site(node, found.dims, found.notes))
        _check(dims, value)
    except (Mismatch, KeyError, IndexError, ValueError, TypeError, AttributeError) as reason:
        why = f"{name}: {reason}"
        found.notes.unruled.setdefault(name, str(reason))
        for dim in (d for dims in flat(operands) for d in dims):
            freeze(dim, why)
        return frozen_like(value, why)
    return dims


def _check(dims: Value, value: Any) -> None:
    """A rule's answer must have the sizes of the values it stands for."""
    if isinstance(value, list | tuple):
        for own, part in zip(dims, value, strict=True):
            _check(own, part)
    elif isinstance(value, Tensor) and [size_of(d) for d in dims] != list(value.shape):
        raise Mismatch(f"sizes {[size_of(d) for d in dims]} for a tensor of {list(value.shape)}")


def _inlined(found: Trace, node: fx.Node, owner: nn.Module) -> Value:
    """An operation that runs a graph of its own, such as an autocast region."""
    for place, argument in enumerate(node.args):
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            inner = getattr(owner, str(argument.target), None)
            if isinstance(inner, fx.GraphModule):
                given = [found.dims.get(a) for a in node.args[place + 1 :]]  # type: ignore[arg-type]
                return walk(found, inner.graph, inner, given)
    return frozen_like(node.meta.get("val"), op_name(node))


def _freeze_outputs(found: Trace, node: fx.Node) -> None:
    for source in node.all_input_nodes:
        for dims in flat([found.dims.get(source)]):
            for dim in dims:
                freeze(dim, "an output")


def dim_of(found: Trace, tensor: str, place: int) -> Dim:
    """One dimension of a parameter or buffer, by any of its names."""
    return found.tensors[found.same[tensor]][place]
