"""A model as graphs of ATen operations: one, or several where its code depends on its data.

Detection models choose boxes by their values, which no graph can hold. Such a model is exported
in parts: the largest submodules that can be, each with what it received in a real forward. What
lies between them stays Python code and is unknown. A tensor that a part gives and that goes
nowhere but into other parts, as the same object, is a tensor of the model like any other; all
else that crosses is an input or an output of its part.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export._tree_utils import reorder_kwargs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from secateurs.structure.rules import op_name

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class Part:
    """A submodule that was exported.

    Attributes:
        path: of the submodule; empty for the whole model.
        graph: its operations; attributes are named as in the whole model.
        example, result: what went in and what came out, in the order of the graph's placeholders
            and outputs.
        received, gave: numbers of the tensors that went in and came out, in the order of the
            graph's placeholders and outputs; the same number is the same tensor. Only those
            that pass from part to part have one, others are None.
    """

    path: str
    graph: fx.GraphModule
    example: list[Any] = field(default_factory=list)
    result: list[Any] = field(default_factory=list)
    received: list[int | None] = field(default_factory=list)
    gave: list[int | None] = field(default_factory=list)


@contextmanager
def fed(model: nn.Module, parts: Sequence[Part]) -> Iterator[list[Any]]:
    """While the model runs, its parts receive, and the code between them gets back, what they
    did when they were exported.

    Else other values, behind which other boxes are chosen, would come to the parts behind. Only
    what passes from part to part is what the model computes.

    Yields:
        What the parts give, but for what they pass on.
    """
    outputs: list[Any] = []
    handles = []
    for part in parts:

        def before(_: Any, own: Any, named: Any, part: Part = part) -> Any:
            named = reorder_kwargs(named, part.graph._in_spec)
            leaves, spec = tree_flatten((own, named))
            sides = zip(leaves, part.example, part.received, strict=True)
            fixed = [_copied(old) if number is None else new for new, old, number in sides]
            return tree_unflatten(fixed, spec)

        def after(_: Any, __: Any, result: Any, part: Part = part) -> Any:
            leaves, spec = tree_flatten(result)
            sides = list(zip(leaves, part.result, part.gave, strict=True))
            outputs.extend(new for new, _, number in sides if number is None)
            given = [_copied(old) if number is None else new for new, old, number in sides]
            return tree_unflatten(given, spec)

        module = model.get_submodule(part.path)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Located(nn.Module):
    """Calls a submodule, which lies at its path in the whole model."""

    def __init__(self, path: str, module: nn.Module) -> None:
        super().__init__()
        *outer, last = path.split(".")
        owner: nn.Module = self
        for name in outer:
            owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.add_module(last, module)
        self._path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(self._path)(*args, **kwargs)


def exported(model: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Part:
    """Export the submodule at `path`, whatever torch.export raises."""
    module = Located(path, model.get_submodule(path)) if path else model
    program = torch.export.export(module, args, kwargs, strict=False)
    graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    _inline(graph)
    return Part(path, graph)


def exported_parts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Part]:
    """The largest submodules with parameters that can be exported, in the order of their calls.

    A submodule that is called several times is not taken, for its graphs could differ.
    """
    calls = _calls(model, args, kwargs)
    found: list[Part] = []

    def descend(path: str, module: nn.Module) -> None:
        if next(module.parameters(), None) is None or len(calls[path]) > 1:
            return
        if path and calls[path]:
            try:
                found.append(exported(model, path, *calls[path][0]))
                return
            except Exception:
                pass  # its children may do better
        for name, child in module.named_children():
            descend(f"{path}.{name}".lstrip("."), child)

    descend("", model)
    return _connected(model, found, args, kwargs)


def replaced(model: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """The model with other submodules at some paths; all else is shared with `model`."""
    if "" in parts:
        return parts[""]
    by_child: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for path, part in parts.items():
        name, _, rest = path.partition(".")
        by_child[name][rest] = part
    outer = copy.copy(model)
    outer._modules = dict(model._modules)
    for name, inner in by_child.items():
        outer._modules[name] = replaced(model.get_submodule(name), inner)
    return outer


def _calls(model: nn.Module, args: Any, kwargs: Any) -> dict[str, list[Call]]:
    """What every submodule receives."""
    calls: dict[str, list[Call]] = defaultdict(list)
    handles = []
    for path, module in model.named_modules():

        def note(_: Any, own: Any, named: Any, path: str = path) -> None:
            calls[path].append((own, named))

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _Outside(TorchDispatchMode):
    """Which tensors the operations between the parts touch.

    That this code reads their sizes does not count: it cannot go unnoticed, because the
    shortened model is run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.touched: set[int] = set()
        self.alive: list[Any] = []

    def note(self, arguments: Any) -> None:
        if self.depth == 0:
            found = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
            self.touched.update(map(id, found))
            self.alive += found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs))
        return func(*args, **(kwargs or {}))


def _connected(model: nn.Module, parts: list[Part], args: Any, kwargs: Any) -> list[Part]:
    """The parts in the order of their calls, with the tensors that pass between them."""
    outside = _Outside()
    order: list[Part] = []
    leaves: dict[Part, tuple[list[Any], list[Any]]] = {}
    handles = []
    for part in parts:

        def before(_: Any, own: Any, named: Any, part: Part = part) -> None:
            outside.depth += 1
            order.append(part)
            named = reorder_kwargs(named, part.graph._in_spec)
            leaves[part] = (tree_leaves((own, named)), [])
            part.example = [_copied(x) for x in leaves[part][0]]

        def after(_: Any, __: Any, result: Any, part: Part = part) -> None:
            leaves[part] = (leaves[part][0], tree_leaves(result))
            part.result = [_copied(x) for x in leaves[part][1]]
            outside.depth -= 1  # last: a copy outside would count as a use

        module = model.get_submodule(part.path)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        with outside:
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    outside.note(result)
    given = {id(x) for _, gave in leaves.values() for x in gave if isinstance(x, Tensor)}
    passing = given - outside.touched
    for part, (received, gave) in leaves.items():
        part.received, part.gave = (
            [id(x) if isinstance(x, Tensor) and id(x) in passing else None for x in side]
            for side in (received, gave)
        )
    return order


def _regions(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """Operations that run a graph of their own, without gradients or without autocast.

    Regions with autocast on stay: what is in them is unknown, and so frozen.
    """
    for node in list(graph.graph.nodes):
        name = op_name(node)
        if name == "wrap_with_set_grad_enabled" or (
            name == "wrap_with_autocast" and node.args[2] is False
        ):
            yield node


def _inline(graph: fx.GraphModule) -> None:
    """Lay the graphs of regions into the graph itself."""
    for node in _regions(graph):
        place = next(p for p, a in enumerate(node.args)
                     if isinstance(a, fx.Node) and a.op == "get_attr")  # fmt: skip
        region: Any = node.args[place]
        inner: Any = graph.get_submodule(str(region.target))
        _inline(inner)
        own: dict[fx.Node, Any] = {}
        results: Any = ()
        given = iter(node.args[place + 1 :])
        with graph.graph.inserting_before(node):
            for part in inner.graph.nodes:
                if part.op == "placeholder":
                    own[part] = next(given)
                elif part.op == "output":
                    results = fx.map_arg(part.args[0], own.__getitem__)
                else:
                    own[part] = graph.graph.node_copy(part, own.__getitem__)
                    if part.op == "get_attr":
                        own[part].target = f"{region.target}.{part.target}"
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.recompile()
