"""A model traced once, and the dimensions of every tensor in it.

`torch.export` (non-strict) gives a graph of ATen operations, or several
(`secateurs.structure.parts`); `secateurs.structure.rules` says what each operation means for the
dimensions of its tensors. What comes out is a `Trace`: the graphs, a `Dim` for every dimension of
every parameter, buffer and activation, and what the rules noted on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateurs.devices import to_device
from secateurs.errors import InputError, described
from secateurs.structure.dimensions import Dim, Mismatch, axis, freeze, size_of
from secateurs.structure.parts import Part, exported, exported_parts, fed
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
        parts: the exported graphs, their parameters and buffers being those of `model`: one, or
            several where the model cannot be exported as a whole.
        args, kwargs: the example inputs.
        dims: of every node's value.
        tensors: of every parameter and buffer, by canonical name.
        same: other names of a tied tensor -> its canonical name.
        notes: what the rules noted.
        divided: why the model could not be exported as a whole, if it could not.
    """

    model: nn.Module
    parts: list[Part]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: dict[fx.Node, Value] = field(default_factory=dict)
    tensors: dict[str, Dims] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    divided: str | None = None


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
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keywords; they
            are moved to where the model is.

    Raises:
        InputError: the model cannot be run, or its code depends on the values of its data.
    """
    device = next((t.device for t in named_tensors(model).values()), torch.device("cpu"))
    args, kwargs = as_call(to_device(example_inputs, device))
    divided = None
    with traceable(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            parts = [exported(model, "", args, kwargs)]
        except Exception as failure:
            first_line = (str(failure).strip().splitlines() or [""])[0]
            divided = f"{type(failure).__name__}: {first_line}"
            parts = _divided(model, args, kwargs, divided)
    found = Trace(model, parts, args, kwargs, divided=divided)
    _name_tensors(found)
    passing: dict[int, Value] = {}
    for part in parts:
        walk(found, part, passing)
    _freeze_unused(found)
    return found


def _divided(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> list[Part]:
    try:
        parts = exported_parts(model, args, kwargs)
    except Exception as failure:
        raise InputError(
            "example_inputs", described(f"inputs on which {type(model).__name__} fails"),
            f"inputs of a forward pass ({type(failure).__name__}: {failure})",
        ) from failure  # fmt: skip
    if not parts:
        raise InputError(
            "model", described(f"{type(model).__name__} that cannot be traced"),
            f"a model that torch.export takes with these inputs ({reason})",
        )  # fmt: skip
    return parts


def outputs_of(found: Trace, module: nn.Module) -> Any:
    """What `module` gives for the example inputs; random draws are the same at every call.

    For a model that was exported in parts: what the parts give.
    """
    args, kwargs = tree_map(
        lambda x: x.clone() if isinstance(x, Tensor) else x, (found.args, found.kwargs)
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if found.divided is None:
            return module(*args, **kwargs)
        with fed(module, found.parts) as outputs:
            module(*args, **kwargs)
        return outputs


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Eval mode, no caches, attention in the open; all put back afterwards."""
    training = [m for m in model.modules() if m.training]
    configs: dict[int, Any] = {id(c): c for m in model.modules()
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


def walk(found: Trace, part: Part, passing: dict[int, Value]) -> None:
    """Apply the rules to the graph of a part, in its order.

    Args:
        passing: dimensions of tensors that go from part to part, by number.
    """
    received = iter(part.received)
    for node in part.graph.graph.nodes:
        if node.op == "placeholder":
            known = passing.get(next(received, None))  # type: ignore[arg-type]
            frozen = frozen_like(node.meta.get("val"), "an input")
            found.dims[node] = frozen if known is None else known
        elif node.op == "get_attr":
            found.dims[node] = _attribute(found, part, node)
        elif node.op == "call_function":
            found.dims[node] = _operation(found, node)
        elif node.op == "output":
            _leave(found, node, part, passing)


def _attribute(found: Trace, part: Part, node: fx.Node) -> Value:
    name = found.same.get(str(node.target))
    if name is not None:
        return found.tensors[name]
    value: Any = part.graph
    for step in str(node.target).split("."):
        value = getattr(value, step)
    return frozen_like(value, "a constant")


def _operation(found: Trace, node: fx.Node) -> Value:
    name = op_name(node)
    if name == "getitem":
        whole, place = node.args
        value = found.dims.get(whole)  # type: ignore[arg-type]
        return value[place] if isinstance(value, tuple) else None  # type: ignore[index]
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


def _leave(found: Trace, node: fx.Node, part: Part, passing: dict[int, Value]) -> None:
    """Freeze what a part gives, but for tensors that go into other parts only."""
    gave = iter(part.gave)
    for source in tree_leaves(node.args[0]):
        number = next(gave, None)
        dims = found.dims.get(source) if isinstance(source, fx.Node) else None
        if number is not None:
            passing[number] = dims
            continue
        for own in flat([dims]):
            for dim in own:
                freeze(dim, "an output")


def _freeze_unused(found: Trace) -> None:
    """Freeze the tensors that no graph reads: what they belong to is not known."""
    read = {
        found.same.get(str(node.target))
        for part in found.parts
        for node in part.graph.graph.nodes
        if node.op == "get_attr" and node.users
    }
    for name, dims in found.tensors.items():
        if name not in read:
            for dim in dims:
                freeze(dim, "not used in the traced forward")


def dim_of(found: Trace, tensor: str, place: int) -> Dim:
    """One dimension of a parameter or buffer, by any of its names."""
    return found.tensors[found.same[tensor]][place]
