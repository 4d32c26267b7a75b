"""Keeping the softmax scale when heads get narrower.

`scaled_dot_product_attention` divides by the square root of the width it sees, so that a head
of `new` instead of `old` units would be scaled otherwise. The difference is folded into what
makes the queries: their weights times sqrt(new / old).

Where the queries come from is found by walking back from the call: through views, splits and
rotary embeddings (which are linear) to a linear layer or convolution, or to the weight of a
norm, behind which scaling has no effect.
"""

from __future__ import annotations

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
    """Rows (first dimension) of parameters that scale the queries."""

    tensors: tuple[str, ...]
    rows: Tensor


def query_sources(attention: fx.Node, names: dict[str, str]) -> list[Source] | None:
    """What to multiply so that the queries of an attention call are multiplied; None if unclear.

    Args:
        names: attribute of the graph -> canonical name of a parameter.
    """
    found: dict[tuple[str, ...], Tensor] = {}
    query = attention.args[0]
    if not isinstance(query, fx.Node) or not _collect(query, names, found, {}):
        return None
    return [Source(tensors, rows) for tensors, rows in found.items()]


def _collect(
    node: fx.Node,
    names: dict[str, str],
    found: dict[tuple[str, ...], Tensor],
    seen: dict[fx.Node, bool],
) -> bool:
    """Enter the sources of a node; whether all of its paths end in one."""
    path: list[fx.Node] = []
    while op_name(node) in VIEWS:
        path.append(node)
        node = node.args[0]  # type: ignore[assignment]
    name = op_name(node)
    if name in ("linear", "conv1d", "conv2d", "layer_norm", "rms_norm"):
        at = 2 if name in ("layer_norm", "rms_norm") else 1
        parameters = [a for a in node.args[at : at + 2] if isinstance(a, fx.Node)]
        tensors = tuple(names.get(str(p.target), "") for p in parameters)
        if not tensors or "" in tensors:
            return False
        value = node.meta["val"]
        place = 1 if name.startswith("conv") else value.ndim - 1
        rows = _rows(node, place, path)
        old = found.get(tensors)
        found[tensors] = rows if old is None else torch.cat([old, rows]).unique()
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
            found[(names[str(weights[0].target)],)] = torch.arange(value.shape[0])
            return value.ndim == 1
        operands = scaled
        if len(scaled) != 1:
            return False
    seen[node] = all(_collect(o, names, found, seen) for o in operands)
    return seen[node]


def _has_source(node: fx.Node, names: dict[str, str]) -> bool:
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


def _rows(source: fx.Node, place: int, path: list[fx.Node]) -> Tensor:
    """Indices of the source's output dimension that the path lets through."""
    shape = source.meta["val"].shape
    view = [-1 if p == place else 1 for p in range(len(shape))]
    value: Any = torch.arange(shape[place]).view(view).expand(shape).contiguous()
    env = {source: value}
    for node in reversed(path):
        args = fx.map_arg(node.args, lambda n: env.get(n))
        kwargs = fx.map_arg(node.kwargs, lambda n: env.get(n))
        if op_name(node) in ("to", "dropout", "clone", "contiguous", "detach", "alias"):
            value = args[0]
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        env[node] = value
    return value.unique()
