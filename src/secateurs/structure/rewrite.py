"""The traced graph with other sizes: its tensors shortened, its size literals evaluated anew.

The rewritten graph is what a shortened model computes, whatever the model's own Python code
says; the resized module is checked against it, and where that code hard-codes sizes the graph
is handed back instead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateurs.structure.arguments import argument, with_argument, with_size
from secateurs.structure.dimensions import Axis, shortened_size, size_of
from secateurs.structure.parts import Part, replaced
from secateurs.structure.rules import Literal, op_name
from secateurs.structure.trace import Trace, named_tensors

Counts = Callable[[Axis], int]
"""Axis -> how many of its units stay."""

SAME_ELSEWHERE: dict[Any, Any] = {torch.ops.aten.view.default: torch.ops.aten.reshape.default}
"""Operations that ask for a layout in memory, which follows sizes: their forms that do not."""


class RewrittenGraph(fx.GraphModule):
    """A traced model whose sizes were changed: an ordinary module that can be trained.

    The operations that behave differently in training (dropout, batch norm) follow `train()`
    and `eval()`, as in the module that was traced.
    """

    def train(self, mode: bool = True) -> RewrittenGraph:
        super().train(mode)
        changed = False
        for node in self.graph.nodes:
            place = {"dropout": 2, "batch_norm": 5, "feature_dropout": 2}.get(op_name(node))
            if node.op != "call_function" or place is None or node.meta.get("always"):
                continue
            if place < len(node.args) and node.args[place] is not mode:
                args = list(node.args)
                args[place] = mode
                node.args = tuple(args)
                changed = True
        if changed:
            self.recompile()
        return self


def literal_values(found: Trace, counts: Counts) -> list[tuple[Literal, int, int]]:
    """(literal, old value, new value) of all size literals that change."""
    changes = []
    for literal in found.notes.literals:
        old, new = size_of(literal.dim), shortened_size(literal.dim, counts)
        if old != new:
            sign = -1 if literal.minus else 1
            changes.append((literal, sign * old, sign * new))
    return changes


def rewritten(
    found: Trace,
    counts: Counts,
    tensors: Mapping[str, Tensor],
    scales: Mapping[fx.Node, float] | None = None,
) -> nn.Module:
    """The graph of `found` with new literals and other tensors.

    A model that was exported in parts is given with the graphs in the place of the parts.

    Args:
        tensors: parameters and buffers by canonical name.
        scales: attention calls whose scale is to be stated, because it would follow the width.
    """
    sizes = literal_values(found, counts)
    graphs = {p.path: _rewritten(found, p, sizes, tensors, scales or {}) for p in found.parts}
    return replaced(found.model, graphs)


def _rewritten(
    found: Trace,
    part: Part,
    sizes: list[tuple[Literal, int, int]],
    tensors: Mapping[str, Tensor],
    scales: Mapping[fx.Node, float],
) -> RewrittenGraph:
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    result = graph.graph_copy(part.graph.graph, copies)
    graph.output(result)
    graph._codegen = copy.copy(part.graph.graph._codegen)
    for literal, _, new in sizes:
        if literal.node in copies:
            _set_argument(copies[literal.node], literal.argument, literal.place, new)
    for node, scale in scales.items():
        if node in copies:
            copies[node].kwargs = {**copies[node].kwargs, "scale": scale}
    for old, own in copies.items():
        own.meta = dict(old.meta)
        own.target = SAME_ELSEWHERE.get(own.target, own.target)
        if op_name(old) == "batch_norm":  # training while traced in eval mode: a computation
            own.meta["always"] = len(old.args) > 5 and old.args[5] is True
    root = nn.Module()
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = _carry(found, part, str(node.target), root, tensors)
    return RewrittenGraph(root, graph)


def _set_argument(node: fx.Node, name: str, place: int | None, value: int) -> None:
    new = with_size(argument(node, name), place, value)
    node.args, node.kwargs = with_argument(node, node.args, node.kwargs, name, new)


def _carry(
    found: Trace, part: Part, full: str, root: nn.Module, tensors: Mapping[str, Tensor]
) -> str:
    """Put the attribute that a node reads into `root`; its name there."""
    target = full.removeprefix(f"{part.path}.") if part.path else full
    *path, last = target.split(".")
    owner = root
    for step in path:
        if not hasattr(owner, step):
            owner.add_module(step, nn.Module())
        owner = getattr(owner, step)
    canonical = found.same.get(full)
    value: Any = tensors[canonical] if canonical is not None else _attribute(part.graph, full)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(last, value)
    elif isinstance(value, Tensor):
        owner.register_buffer(last, value, persistent=canonical is not None)
    else:
        setattr(owner, last, value)
    return target


def _attribute(graph: fx.GraphModule, target: str) -> Any:
    value: Any = graph
    for part in target.split("."):
        value = getattr(value, part)
    return value


def current_tensors(found: Trace) -> dict[str, Tensor]:
    """The model's parameters and buffers as they are now, by canonical name."""
    tensors = named_tensors(found.model)
    return {name: tensors[name] for name in found.tensors}


def same_outputs(left: Any, right: Any, tolerance: float) -> bool:
    """Whether two nested outputs agree to a relative tolerance (of the largest value)."""
    a, b = (torch.utils._pytree.tree_leaves(x) for x in (left, right))
    if len(a) != len(b):
        return False
    return all(difference(x, y) <= tolerance for x, y in zip(a, b, strict=True))


def difference(x: Any, y: Any) -> float:
    """Largest difference of two leaves of an output, relative to the largest value of `y`."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return 0.0
    if x.shape != y.shape:
        return float("inf")
    if x.numel() == 0:
        return 0.0
    if not x.is_floating_point():
        return float((x != y).double().mean())
    x, y = x.detach().double(), y.detach().double()
    if not torch.equal(x.isfinite(), y.isfinite()):
        return float("inf")
    gap = float((x - y).nan_to_num(0, 0, 0).abs().max())
    return gap / max(float(y.nan_to_num(0, 0, 0).abs().max()), 1e-6)
