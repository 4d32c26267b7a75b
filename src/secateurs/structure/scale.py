"""Keeping the softmax scale when heads get narrower.

`scaled_dot_product_attention` divides by the square root of the width it sees, so that a head
of `new` instead of `old` units would be scaled otherwise. The difference is folded into what
makes the queries: their weights times sqrt(new / old).

Where the queries come from is found by walking back from the call: through views, splits and
rotary embeddings (which are linear) to a linear layer or convolution, or to the weight of a
norm, behind which scaling has no effect. Where what is found there goes elsewhere as well
(queries that are keys too), nothing can be folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateurs.structure.rules import op_name

VIEWS = {
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", "transpose",
    "permute", "t", "swapaxes", "movedim", "contiguous", "clone", "select", "slice", "alias",
    "split", "split_with_sizes", "chunk", "unbind", "getitem", "to", "detach", "dropout", "expand",
}  # fmt: skip
LINEAR = {"add", "sub", "neg", "cat", "stack", "mul", "div", "type_as", "roll", "index"}


@dataclass(frozen=True)
class Source:
    """Rows (first dimension) of parameters that scale the queries, and the node that has them."""

    tensors: tuple[str, ...]
    rows: Tensor
    node: fx.Node


def foldable(
    factors: Mapping[fx.Node, float], names: Mapping[str, str]
) -> dict[fx.Node, list[Source]]:
    """Attention calls whose queries can be multiplied by changing parameters, with these.

    A parameter that serves several calls must serve all of them in the same way.

    Args:
        factors: attention call -> what its queries are to be multiplied by.
        names: attribute of the graph -> canonical name of a parameter.
    """
    calls = {}
    for call in factors:
        sources = query_sources(call, names)
        if sources is not None:
            calls[call] = sources
    while True:
        served: dict[str, set[tuple[fx.Node, float, tuple[int, ...]]]] = {}
        for call, sources in calls.items():
            for source in sources:
                for name in source.tensors:
                    use = (source.node, factors[call], tuple(source.rows.tolist()))
                    served.setdefault(name, set()).add(use)
        shared = {
            name
            for name, uses in served.items()
            if len({use[1:] for use in uses}) > 1
            or _users(next(iter(uses))[0].graph, name, names) != {use[0] for use in uses}
        }
        kept = {
            call: sources
            for call, sources in calls.items()
            if shared.isdisjoint(name for source in sources for name in source.tensors)
        }
        if len(kept) == len(calls):
            return kept
        calls = kept


def _users(graph: fx.Graph, name: str, names: Mapping[str, str]) -> set[fx.Node]:
    return {
        user
        for node in graph.nodes
        if node.op == "get_attr" and names.get(str(node.target)) == name
        for user in node.users
    }


def query_sources(attention: fx.Node, names: Mapping[str, str]) -> list[Source] | None:
    """What to multiply so that the queries of an attention call, and nothing else, are multiplied.

    None if that is unclear.

    Args:
        names: attribute of the graph -> canonical name of a parameter.
    """
    found: dict[tuple[str, ...], Source] = {}
    passed: dict[fx.Node, bool] = {}
    query = attention.args[0]
    if not isinstance(query, fx.Node) or not _collect(query, names, found, passed):
        return None
    clear = all(_reaches_only(s, attention, passed) for s in found.values())
    return list(found.values()) if clear else None


def _reaches_only(source: Source, attention: fx.Node, passed: Mapping[fx.Node, bool]) -> bool:
    """Whether the rows of a source reach nothing but the queries of the call.

    Behind views they are told from other rows (keys and values of a fused layer).
    """
    rows = set(source.rows.tolist())
    seen: set[fx.Node] = set()
    stack: list[tuple[fx.Node, Any]] = [(source.node, _labels(source.node))]
    while stack:
        here, labels = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        for user in here.users:
            if user is attention:
                if here in attention.args[1:] or here in attention.kwargs.values():
                    return False
            elif op_name(user) in VIEWS and labels is not None:
                own = _viewed(user, {here: labels})
                if not isinstance(own, Tensor) or not rows.isdisjoint(own.unique().tolist()):
                    stack.append((user, own))
            elif user in passed:
                stack.append((user, None))
            else:
                return False
    return True


def _collect(
    node: fx.Node,
    names: Mapping[str, str],
    found: dict[tuple[str, ...], Source],
    seen: dict[fx.Node, bool],
) -> bool:
    """Enter the sources of a node; whether all of its paths end in one."""
    path: list[fx.Node] = []
    while op_name(node) in VIEWS:
        path.append(node)
        seen[node] = True
        node = node.args[0]  # type: ignore[assignment]
    name = op_name(node)
    if name in ("linear", "conv1d", "conv2d", "layer_norm", "rms_norm"):
        at = 2 if name in ("layer_norm", "rms_norm") else 1
        parameters = [a for a in node.args[at : at + 2] if isinstance(a, fx.Node)]
        tensors = tuple(names.get(str(p.target), "") for p in parameters)
        if not tensors or "" in tensors:
            return False
        rows = _rows(node, path)
        old = found.get(tensors)
        if old is not None:
            if old.node is not node:
                return False
            rows = torch.cat([old.rows, rows]).unique()
        found[tensors] = Source(tensors, rows, node)
        return True
    if name not in LINEAR:
        return False
    if node in seen:
        return seen[node]
    operands = list(node.all_input_nodes)
    if name in ("mul", "div"):
        scaled = [o for o in operands if _has_source(o, names)]
        weights = [o for o in operands if o.op == "get_attr" and str(o.target) in names]
        if weights and len(operands) == 2:  # a norm written out: its weight scales the result
            value = weights[0].meta["val"]
            if value.ndim != 1:
                return False
            weight = (names[str(weights[0].target)],)
            found[weight] = Source(weight, torch.arange(value.shape[0]), node)
            return True
        operands = scaled
        if len(scaled) != 1:
            return False
    seen[node] = all(_collect(o, names, found, seen) for o in operands)
    return seen[node]


def _has_source(node: fx.Node, names: Mapping[str, str]) -> bool:
    """Whether a parameter takes part in a value."""
    stack, seen = [node], set()
    while stack:
        here = stack.pop()
        if here in seen:
            continue
        seen.add(here)
        if here.op == "get_attr" and str(here.target) in names and here.meta["val"].ndim > 1:
            return True
        stack += here.all_input_nodes
    return False


def _labels(source: fx.Node) -> Tensor:
    """The value of a source with the number of its row in place of every element."""
    shape = source.meta["val"].shape
    place = 1 if op_name(source).startswith("conv") else len(shape) - 1
    view = [-1 if p == place else 1 for p in range(len(shape))]
    return torch.arange(shape[place]).view(view).expand(shape).contiguous()


def _rows(source: fx.Node, path: list[fx.Node]) -> Tensor:
    """Indices of the source's output dimension that the path lets through."""
    env: dict[fx.Node, Any] = {source: _labels(source)}
    value: Any = env[source]
    for node in reversed(path):
        env[node] = value = _viewed(node, env)
    return value.unique()


def _viewed(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """What a view makes of its operand."""
    args: Any = fx.map_arg(node.args, env.get)
    kwargs = fx.map_arg(node.kwargs, env.get)
    if op_name(node) in ("to", "dropout", "clone", "contiguous", "detach", "alias"):
        return args[0]
    if op_name(node) in ("view", "_unsafe_view", "unflatten"):  # the strides were others
        return args[0].reshape(node.meta["val"].shape)
    return node.target(*args, **kwargs)  # type: ignore[operator]
