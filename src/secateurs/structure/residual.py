"""Residual blocks, y = act(skip(x) + F(x)): found in a traced graph, and reduced to act(skip(x)).

No names are looked for. A module is a residual block where its own code adds two tensors, and

 - all it computes comes from one input x, and one value y leaves it;
 - one operand, F(x), and all that leads to it is used for nothing but this sum;
 - the other is x itself, or was computed from x beside F with fewer products (a projection);
 - what follows the sum sees nothing but the sum, and multiplies it with no weights;
 - a submodule gives F(x), so that its output can be gated.

That covers the ResNets of zoo, torchvision, timm and transformers, with bottlenecks, inverted
residuals or squeeze-and-excitation, whatever calls their activation. It leaves out blocks that
add twice (a transformer's), whose projection starts inside F (in ResNetV2 four of 16), and whose
code scales F itself (ConvNeXt). Of blocks inside blocks the inner ones are taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from secateurs.errors import InputError, described
from secateurs.structure.dimensions import size_of
from secateurs.structure.rewrite import current_tensors, rewritten
from secateurs.structure.rules import op_name, out_of_place
from secateurs.structure.substitution import Substitute
from secateurs.structure.surgery import calling
from secateurs.structure.trace import Trace, trace


@dataclass(frozen=True)
class Residual:
    """A residual block of a traced model.

    Attributes:
        path: of the module.
        end: path of the submodule whose output is F(x).
        input: x in the graph.
        total: the addition.
        skip: its operand beside F(x).
        branch: the operations of F.
        parameters: that F alone reads.
        macs: multiply-accumulates of F for the example inputs.
    """

    path: str
    end: str
    input: fx.Node
    total: fx.Node
    skip: fx.Node
    branch: tuple[fx.Node, ...]
    parameters: int
    macs: int


def residual_blocks(found: Trace) -> dict[str, Residual]:
    """The residual blocks of a traced model by path, in the order of execution.

    Raises:
        InputError: it has none.
    """
    blocks: dict[str, Residual] = {}
    for part in found.parts:
        segments = _segments(part.graph.graph)
        for node in part.graph.graph.nodes:
            path = calling(node)[-1:]
            if op_name(node) == "add" and path and path[0]:
                block = _residual(found, path[0], segments, node)
                if block is not None:
                    blocks[block.path] = block
    inner = {p: b for p, b in blocks.items() if not any(q.startswith(f"{p}.") for q in blocks)}
    if not inner:
        raise InputError(
            "model", described(f"{type(found.model).__name__} without residual blocks"),
            "a model with modules that compute act(skip(x) + F(x)), F ending in a submodule",
        )  # fmt: skip
    return inner


def _segments(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The operations that each module executed, itself or in its submodules, in order."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for path in dict.fromkeys(calling(node)):
                found.setdefault(path, []).append(node)
    return found


def _residual(
    found: Trace, path: str, segments: Mapping[str, list[fx.Node]], total: fx.Node
) -> Residual | None:
    own = set(segments[path])
    operands = [a for a in total.args[:2] if isinstance(a, fx.Node)]
    given = _values(n for node in own for n in node.all_input_nodes if n not in own)
    leaving = [n for n in own if any(user not in own for user in n.users)]
    if len(operands) != 2 or len(given) != 1 or len(leaving) != 1 or total.kwargs:
        return None
    [start] = given
    if len({_shape(n) for n in (*operands, total)}) != 1:
        return None
    behind = own - _back(total, own)
    products = {node for node, _ in found.notes.macs}
    if behind & products or any(
        n in own - behind - {total} for b in behind for n in b.all_input_nodes
    ):
        return None
    for skip, end in (operands, operands[::-1]):
        branch, beside = _back(end, own), _back(skip, own)
        work, less = len(branch & products), len(beside & products)
        closed = all(u in branch or u is total for n in branch for u in n.users)
        closed &= all(u in beside or u is total for n in beside for u in n.users)
        from_input = start in _inputs(beside) if beside else skip is start
        if not closed or branch & beside or work <= less or not from_input:
            continue
        last = _giver(end, path, segments)
        if last is None:
            return None
        ordered = tuple(n for n in segments[path] if n in branch)
        return Residual(
            path, last, start, total, skip, ordered, _parameters(found, branch),
            sum(size_of(dim) for node, dim in found.notes.macs if node in branch),
        )  # fmt: skip
    return None


def _values(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Those that hold no weight or constant."""
    return {n for n in nodes if n.op != "get_attr"}


def _back(node: fx.Node, within: set[fx.Node]) -> set[fx.Node]:
    """`node` and all operations that lead to it, as far as they are in a set."""
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        current = queue.pop()
        if current in within and current not in found:
            found.add(current)
            queue += current.all_input_nodes
    return found


def _inputs(nodes: set[fx.Node]) -> set[fx.Node]:
    return _values(n for node in nodes for n in node.all_input_nodes if n not in nodes)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _giver(end: fx.Node, path: str, segments: Mapping[str, list[fx.Node]]) -> str | None:
    """The innermost module inside `path` whose one result is `end`."""
    last = calling(end)[-1]
    inside = set(segments[last])
    leaving = [n for n in inside if any(user not in inside for user in n.users)]
    return last if last != path and leaving == [end] else None


def _parameters(found: Trace, branch: set[fx.Node]) -> int:
    """Elements of the parameters that no operation outside `branch` reads."""
    readers: dict[str, list[fx.Node]] = {}
    for part in found.parts:
        for node in part.graph.graph.nodes:
            if node.op == "get_attr" and (name := found.same.get(str(node.target))):
                readers.setdefault(name, []).extend(node.users)
    own = dict(found.model.named_parameters())
    return sum(
        own[name].numel()
        for name, users in readers.items()
        if name in own and users and all(user in branch for user in users)
    )


class Shortcut(Substitute):
    """What is left of a residual block without F: act(skip(x)), as a graph.

    Args:
        block: the module, whose parameters outside F are taken over.
        shape, dtype: of an input x to trace it on.
    """

    kind = "shortcut"

    def __init__(self, block: nn.Module, shape: Iterable[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = tuple(shape), dtype
        found = trace(block, torch.zeros(self.shape, dtype=dtype))
        graph = found.parts[0].graph.graph
        segments = {"": [n for n in graph.nodes if n.op == "call_function"], **_segments(graph)}
        sums = (_residual(found, "", segments, n) for n in segments[""] if op_name(n) == "add")
        residual = next((r for r in sums if r is not None), None)
        if residual is None or found.divided is not None:
            kind = described(type(block).__name__)
            raise InputError("model", kind, "the residual block that the plan was made of")
        _cut(graph, residual)
        tensors = current_tensors(found)
        self.graph = rewritten(found, lambda axis: axis.size, tensors)
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) as the block takes it."""
        result: Tensor = self.graph(x)
        return result

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def shaped(cls, dense: nn.Module, config: Mapping[str, Any]) -> Self:
        return cls(dense, config["shape"], getattr(torch, config["dtype"]))


def shortcut_of(model: nn.Module, block: Residual) -> Shortcut:
    """The shortcut of a block of a traced model."""
    value: Any = block.input.meta["val"]
    return Shortcut(model.get_submodule(block.path), value.shape, value.dtype)


def _cut(graph: fx.Graph, block: Residual) -> None:
    """Take F and the sum out of a graph; what is left writes into no tensor that it was given."""
    block.total.replace_all_uses_with(block.skip)
    for node in (block.total, *reversed(block.branch)):
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
        elif node.op == "call_function":
            # in the block it wrote into the sum, now it would write into the input
            node.target = out_of_place(node)
