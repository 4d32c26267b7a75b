"""A traced graph for batches of any size.

An exported graph states the batch size of its example inputs wherever the code does
(``reshape(len(x), 24)``). Which integers those are shows when the model is exported once more
with one sample more: an integer that grew in proportion is so many times the batch. In the
graph it is replaced by that multiple of the size of the first input.
"""

from __future__ import annotations

import operator
import warnings
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from secateurs.structure.parts import exported
from secateurs.structure.rewrite import RewrittenGraph
from secateurs.structure.trace import Trace, traceable


def free_batch(found: Trace, graph: nn.Module) -> bool:
    """Let `graph`, a rewriting of the graph of `found`, take batches of any size.

    Args:
        found: its model must have its dense weights.

    Returns:
        Whether that was possible; if not, the graph is left as it is.
    """
    size = _batch(found)
    if size is None or found.divided or not isinstance(graph, RewrittenGraph):
        return False
    other = _with_one_more(found, size)
    if other is None:
        return False
    nodes = list(found.parts[0].graph.graph.nodes), list(other.graph.nodes), list(graph.graph.nodes)
    if len({len(n) for n in nodes}) != 1:
        return False
    changes: list[tuple[fx.Node, list[int]]] = []
    for old, bigger, new in zip(*nodes, strict=True):
        if old.op != bigger.op or (old.op == "call_function" and old.target != bigger.target):
            return False
        if old.op == "get_attr" and not _same_value(found.parts[0].graph, old, other, bigger):
            return False
        places = _growing(old, bigger, size)
        if places is None:
            return False
        if places:
            changes.append((new, places))
    _state(graph, changes, size)
    return True


def _batch(found: Trace) -> int | None:
    """The first dimension that the input tensors share."""
    leaves, _ = tree_flatten((found.args, found.kwargs))
    sizes = {t.shape[0] for t in leaves if isinstance(t, Tensor) and t.ndim > 0}
    return sizes.pop() if len(sizes) == 1 else None


def _with_one_more(found: Trace, size: int) -> fx.GraphModule | None:
    def grown(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim > 0
        return torch.cat([value, value[:1]]) if is_batch else value

    args, kwargs = tree_map(grown, (found.args, found.kwargs))
    with traceable(found.model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return exported(found.model, "", args, kwargs).graph
        except Exception:  # the model takes no other batch
            return None


def _same_value(one: fx.GraphModule, old: fx.Node, two: fx.GraphModule, bigger: fx.Node) -> bool:
    """Whether two attributes are the same tensor: a constant can hold the batch size, too."""
    first, second = (attrgetter(str(n.target))(g) for g, n in ((one, old), (two, bigger)))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return type(first) is type(second)
    return first is second or (first.shape == second.shape and torch.equal(first, second))


def _growing(old: fx.Node, bigger: fx.Node, size: int) -> list[int] | None:
    """Places among the flattened arguments of integers that are multiples of the batch size.

    None where anything changed in another way.
    """
    one, _ = tree_flatten((old.args, old.kwargs))
    two, _ = tree_flatten((bigger.args, bigger.kwargs))
    if len(one) != len(two):
        return None
    places = []
    for place, (a, b) in enumerate(zip(one, two, strict=True)):
        if isinstance(a, fx.Node) or a == b:
            continue
        if type(a) is not int or type(b) is not int or a * (size + 1) != b * size:
            return None
        places.append(place)
    return places


def _state(graph: RewrittenGraph, changes: list[tuple[fx.Node, list[int]]], size: int) -> None:
    if not changes:
        return
    first = next(
        n
        for n in graph.graph.nodes
        if n.op == "placeholder" and isinstance(n.meta.get("val"), Tensor) and n.meta["val"].ndim
    )
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    with graph.graph.inserting_after(last):
        batch = graph.graph.call_function(torch.ops.aten.sym_size.int, (first, 0))
    for node, places in changes:
        leaves, spec = tree_flatten((node.args, node.kwargs))
        with graph.graph.inserting_before(node):
            for place in places:
                times = leaves[place] // size
                leaves[place] = (
                    batch if times == 1 else graph.graph.call_function(operator.mul, (batch, times))
                )
        node.args, node.kwargs = tree_unflatten(leaves, spec)
    graph.recompile()
