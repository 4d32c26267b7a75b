"""Numbers for shapes and layers for weights, in what onnx2torch makes of an ONNX graph.

Every value that follows from shapes and constants alone is computed, at two sizes of the free
dimensions: what stays the same is a number, what grows with a dimension is a multiple of it. So
no shape remains a tensor. Products with constant matrices become linear layers, look-ups in
constant tables embeddings, and constants of more than one value parameters.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateurs.deploy import onnx_operators as operators
from secateurs.deploy.onnx_graph import OnnxGraph, content
from secateurs.deploy.onnx_operators import DOMAIN, Operation
from secateurs.deploy.onnx_session import first_line
from secateurs.errors import ConversionError

SLOTS = "abcd"
"""Names of an operation's first inputs: onnx2torch passes those after an absent one by name."""
LARGEST_WEIGHT = 1e4
"""A constant with a larger value is no weight but a mask or a limit."""


@dataclass(frozen=True)
class Multiple:
    """A number that follows a free dimension: size * factor + offset."""

    symbol: str
    factor: Fraction = Fraction(1)
    offset: int = 0


@dataclass
class Trial:
    """Values of the nodes that follow from shapes and constants, at two sizes.

    Attributes:
        small, large: sizes of the free dimensions; the others are fixed.
        values: of every node, at both.
        shapes: of every tensor of the graph, at the large one.
    """

    small: dict[str, int]
    large: dict[str, int]
    values: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    shapes: dict[fx.Node, torch.Size] = field(default_factory=dict)

    def number(self, a: Any, b: Any) -> Any:
        """What gives `a` at the small and `b` at the large sizes; None where nothing does."""
        if a == b:
            return a
        if not isinstance(a, int):
            return None
        moving = [s for s in self.small if self.small[s] != self.large[s]]
        for symbol in moving:
            factor = Fraction(a, self.small[symbol])
            if factor * self.large[symbol] == b:
                return Multiple(symbol, factor)
        for symbol in moving:
            if a - self.small[symbol] == b - self.large[symbol]:
                return Multiple(symbol, Fraction(1), a - self.small[symbol])
        return None

    def numbers(self, node: fx.Node) -> Any:
        """A node's value as plain numbers: one, or a list; an unknown one is None."""
        a, b = (v.tolist() if isinstance(v, Tensor) else v for v in self.values[node])
        if not isinstance(a, list):
            return self.number(a, b)
        if not isinstance(b, list) or len(a) != len(b):
            return None
        return [self.number(x, y) for x, y in zip(a, b, strict=True)]


class _Watching(fx.Interpreter):
    """Keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(module)
        self.nodes, self.seen = nodes, dict[fx.Node, Any]()
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        if n in self.nodes:
            self.seen[n] = result
        return result


def with_layers(module: fx.GraphModule, graph: OnnxGraph) -> tuple[nn.Module, tuple[str, ...]]:
    """The module with numbers for shapes and layers for weights; the dimensions left free.

    Args:
        module: of onnx2torch.
        graph: that it was made from.

    Raises:
        ConversionError: it does not run.
    """
    module.eval()
    inputs = module.graph.find_nodes(op="placeholder")
    for node, name in zip(inputs, graph.input_names, strict=True):
        node.target = name
    derived = _derived(module)
    trial = _trial(module, graph, derived)
    moving = tuple(s for s in trial.small if trial.small[s] != trial.large[s])
    return _Settling(module, graph, trial, derived).result(), moving


def _derived(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes that follow from constants and from the shapes of others."""
    found: set[fx.Node] = set()
    modules = dict(module.named_modules())
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found.add(node)
        elif node.op in ("call_module", "call_function"):
            function = getattr(modules.get(str(node.target)), "function", None)
            shape = function in (operators.shape_of, operators.size_of)
            if shape or all(n in found for n in node.all_input_nodes):
                found.add(node)
    return found


def _trial(module: fx.GraphModule, graph: OnnxGraph, derived: set[fx.Node]) -> Trial:
    """Values at two sizes of as many free dimensions as the model bears to be changed."""
    sizes = graph.sizes
    leading = {s for s, (_, place) in graph.places().items() if place == 0}
    for moving in (set(sizes), leading, set[str]()):
        small, large = dict(sizes), dict(sizes)
        for step, symbol in enumerate(sorted(moving)):
            # sizes that no constant and no other dimension is likely to have
            small[symbol] = sizes[symbol] if sizes[symbol] > 1 else 2 + step
            large[symbol] = 2 * small[symbol] + 1
        trial, seen = Trial(small, large), []
        try:
            for chosen in (small, large):
                watching = _Watching(module, derived)
                with torch.no_grad():
                    watching.run(*graph.inputs(chosen).values())
                seen.append(watching.seen)
        except Exception as error:
            if moving:
                continue
            raise ConversionError(f"it does not run in PyTorch ({first_line(error)})") from None
        trial.values = {node: (seen[0][node], seen[1][node]) for node in seen[0]}
        trial.shapes = watching.shapes
        return trial
    raise AssertionError("the last trial returns or raises")


class _Settling:
    """Writes the graph anew, with numbers for shapes and layers for weights."""

    def __init__(
        self, module: fx.GraphModule, graph: OnnxGraph, trial: Trial, derived: set[fx.Node]
    ) -> None:
        self.module, self.source, self.trial, self.derived = module, graph, trial, derived
        self.names = graph.names_by_content()
        self.modules = dict(module.named_modules())
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        self.sizes: dict[str, fx.Node] = {}
        self.root: dict[str, Any] = {}
        self.parameters: dict[str, tuple[str, Tensor | None]] = {}

    def result(self) -> nn.Module:
        """The new module, in eval mode."""
        for node in self.module.graph.find_nodes(op="placeholder"):
            self.copies[node] = self.graph.placeholder(node.target)
        for symbol, (name, place) in self.source.places().items():
            holder = next(n for n in self.copies.values() if n.target == name)
            self.sizes[symbol] = self.graph.call_method("size", (holder, place))
        for node in self.module.graph.nodes:
            if node.op == "output":
                self.graph.output(self._output(node.args[0]))
            elif node.op != "placeholder" and node not in self.copies:
                self._place(node)
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)
        used = {str(n.target) for n in self.graph.nodes if n.op in ("get_attr", "call_module")}
        root = {target: value for target, value in self.root.items() if target in used}
        made = fx.GraphModule(root, self.graph, "OnnxModel")
        made.graph.lint()
        return made.eval()

    def _output(self, value: Any) -> Any:
        mapped = fx.node.map_arg(value, self._copy)
        return tuple(mapped) if isinstance(mapped, list) else mapped

    def _copy(self, node: fx.Node) -> Any:
        """The new node for an old one; a constant where it is one."""
        if node not in self.copies:
            self.copies[node] = self._constant(self.trial.values[node][0], str(node.target))
        return self.copies[node]

    def _constant(self, value: Any, hint: str) -> Any:
        if not isinstance(value, Tensor):
            return value
        target, _ = self._weight(value, hint)
        return self.graph.get_attr(target)

    def _weight(self, value: Tensor, hint: str) -> tuple[str, Tensor]:
        """A constant under the name it has in the file: a parameter or a buffer, once."""
        key = self._key(value)
        target, kept = self.parameters.get(key, ("", None))
        if not target:
            name = self.names.get(content(value), hint)
            # exporters number their own constants, and would meet these names again
            target = self._free_target(name if "." in name else f"constant.{name}")
            if kept is None:
                trained = value.is_floating_point() and value.numel() > 1
                trained = trained and bool((value.abs() < LARGEST_WEIGHT).all())
                kept = nn.Parameter(value.clone()) if trained else value.clone()
            self.root[target] = kept
            self.parameters[key] = target, kept
        assert kept is not None
        return target, kept

    def _key(self, value: Tensor) -> str:
        """What equal tensors have in common, but for those that are one value throughout.

        Exporters store equal tensors once, and fresh norms and biases are all equal: shared, they
        would tie widths that have nothing to do with each other.
        """
        uniform = value.numel() > 0 and bool((value == value.flatten()[0]).all())
        return f"{content(value)} {len(self.root)}" if uniform else content(value)

    def _free_target(self, name: str) -> str:
        """A path that neither is, nor lies in, nor holds another one."""
        parts = [re.sub(r"\W", "_", part) for part in re.split(r"[./:]+", name) if part]
        path = ".".join(parts) or "constant"
        if not self._taken(path):
            return path
        flat = path.replace(".", "_")
        return next(name for name in _numbered(flat) if not self._taken(name))

    def _taken(self, path: str) -> bool:
        return any(f"{t}.".startswith(f"{path}.") or path.startswith(f"{t}.") for t in self.root)

    def _settles(self, node: fx.Node) -> bool:
        """Whether a node is the same number at all sizes."""
        if node not in self.derived:
            return False
        a, b = self.trial.values[node]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.shape == b.shape and bool(torch.equal(a, b))
        return not isinstance(a, tuple | list) and a == b

    def _place(self, node: fx.Node) -> None:
        """Write one node."""
        if self._settles(node):
            return  # it is written as a constant where it is used
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Operation):
            self._operation(node, module)
        elif node.op == "call_module":
            target = self._free_target(_layer_name(node))
            self.root[target] = module
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._copy)
            self.copies[node] = self.graph.call_module(target, args, kwargs)
        else:
            self.copies[node] = self.graph.node_copy(node, self._copy)

    def _is_matrix(self, argument: Any) -> bool:
        if not isinstance(argument, fx.Node) or not self._settles(argument):
            return False
        value = self.trial.values[argument][0]
        return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()

    def _operation(self, node: fx.Node, operation: Operation) -> None:
        """Call the function itself, with numbers where it wants numbers."""
        slots: list[Any] = [*node.args, *[None] * (len(SLOTS) - len(node.args))]
        for name, value in node.kwargs.items():
            slots[SLOTS.index(name)] = value
        while slots and slots[-1] is None:
            slots.pop()
        recognise = {
            operators.take: self._table,
            operators.normalise: self._layer_norm,
            operators.convolve: self._convolution,
            operators.gemm: self._gemm,
            torch.matmul: self._product,
        }.get(operation.function)
        if recognise is not None and recognise(node, slots, operation):
            return
        args = [self._argument(place, value, operation) for place, value in enumerate(slots)]
        if any(arg is _UNKNOWN for arg in args):
            target = self._free_target(_layer_name(node))
            self.root[target] = operation
            args = [fx.node.map_arg(value, self._copy) for value in slots]
            self.copies[node] = self.graph.call_module(target, tuple(args))
            return
        if operation.function is operators.reshape and self._flattens(node, slots[0]):
            self.copies[node] = self.graph.call_function(torch.flatten, (args[0], 1))
            return
        self.copies[node] = self.graph.call_function(
            operation.function, tuple(args), dict(operation.options)
        )

    def _flattens(self, node: fx.Node, x: fx.Node) -> bool:
        """Whether a reshape makes vectors of the samples: then it needs no sizes at all."""
        before, after = self.trial.shapes[x], self.trial.shapes[node]
        return len(after) == 2 and len(before) > 2 and before[0] == after[0]

    def _argument(self, place: int, value: Any, operation: Operation) -> Any:
        if not isinstance(value, fx.Node):
            return value
        scalar = operation.function is operators.take and place == 1
        if scalar and value in self.derived:
            first = self.trial.values[value][0]
            scalar = isinstance(first, Tensor) and first.ndim == 0
        if place not in operation.numbers and not (scalar and value in self.derived):
            return fx.node.map_arg(value, self._copy)
        if value not in self.derived:
            return _UNKNOWN
        numbers = self.trial.numbers(value)
        several = isinstance(numbers, list)
        missing = numbers.count(None) if several else int(numbers is None)
        if operation.function is operators.reshape and several and missing == 1:
            # the one that is missing follows from the others
            missing = int(-1 in numbers)
            numbers = [-1 if n is None else n for n in numbers]
        if missing:
            return _UNKNOWN
        return [self._written(n) for n in numbers] if several else self._written(numbers)

    def _written(self, number: Any) -> Any:
        """A number in the new graph."""
        if not isinstance(number, Multiple):
            return number
        size: Any = self.sizes[number.symbol]
        if number.factor.numerator != 1:
            size = self.graph.call_function(operator.mul, (size, number.factor.numerator))
        if number.factor.denominator != 1:
            size = self.graph.call_function(operator.floordiv, (size, number.factor.denominator))
        if number.offset:
            size = self.graph.call_function(operator.add, (size, number.offset))
        return size

    def _layer(self, node: fx.Node, layer: nn.Module, argument: Any, name: str) -> None:
        target = self._free_target(name)
        self.root[target] = layer
        self.copies[node] = self.graph.call_module(target, (self._copy(argument),))

    def _product(self, node: fx.Node, slots: list[Any], operation: Operation) -> bool:
        """A product with a constant matrix, and the bias that is added to it, as a layer."""
        if not self._is_matrix(slots[1]):
            return False
        matrix = self.trial.values[slots[1]][0]
        bias, adding = self._bias(node, matrix.shape[1])
        self._linear(node, slots[0], matrix.T, bias)
        if adding is not None:
            self.copies[adding] = self.copies[node]
        return True

    def _gemm(self, node: fx.Node, slots: list[Any], operation: Operation) -> bool:
        """A product with a constant matrix and a constant bias as a layer."""
        options = operation.options
        turn_input, turned = options["transposed"]
        if turn_input or not self._is_matrix(slots[1]):
            return False
        matrix, bias = self.trial.values[slots[1]][0], None
        weight = options["alpha"] * matrix if options["alpha"] != 1 else matrix
        weight = weight if turned else weight.T
        if len(slots) == 3:
            if not self._settles(slots[2]):
                return False
            value, width = self.trial.values[slots[2]][0], len(weight)
            if value.shape not in ((width,), (1, width)) and value.numel() != 1:
                return False
            bias = options["beta"] * value.flatten().expand(width)
        self._linear(node, slots[0], weight, bias)
        return True

    def _linear(self, node: fx.Node, x: Any, weight: Tensor, bias: Tensor | None) -> None:
        rows, columns = weight.shape
        layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        layer.weight = self._tied(weight.contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone())
        self._layer(node, layer, x, _layer_name(node))

    def _bias(self, node: fx.Node, width: int) -> tuple[Tensor | None, fx.Node | None]:
        """A vector that is added to a product and to nothing else, and the node that adds it."""
        if len(node.users) != 1:
            return None, None
        [user] = node.users
        module = self.modules.get(str(user.target)) if user.op == "call_module" else None
        if getattr(module, "function", None) is not torch.add:
            return None, None
        other = [a for a in user.args if a is not node]
        if len(other) != 1 or not isinstance(other[0], fx.Node) or not self._settles(other[0]):
            return None, None
        value = self.trial.values[other[0]][0]
        if value.shape != (width,):
            return None, None
        return value, user

    def _tied(self, weight: Tensor) -> nn.Parameter:
        """A parameter for these values: the same one for the same values."""
        key = self._key(weight)
        if key not in self.parameters:
            self.parameters[key] = "", nn.Parameter(weight.clone())
        _, kept = self.parameters[key]
        assert kept is not None
        return kept if isinstance(kept, nn.Parameter) else nn.Parameter(kept)

    def _table(self, node: fx.Node, slots: list[Any], operation: Operation) -> bool:
        """A look-up in a constant table as an embedding; false where it is none."""
        table, indices = slots
        if operation.options["axis"] != 0 or indices in self.derived or not self._is_matrix(table):
            return False
        values = self.trial.values[table][0]
        rows, width = values.shape
        layer = nn.Embedding(rows, width, device="meta")
        layer.weight = self._tied(values)
        name = self.names.get(content(values), _layer_name(node))
        self._layer(node, layer, indices, name.removesuffix(".weight"))
        return True

    def _layer_norm(self, node: fx.Node, slots: list[Any], operation: Operation) -> bool:
        """A norm over the last dimension as a layer; false where it is none."""
        constant = all(isinstance(s, fx.Node) and self._settles(s) for s in slots[1:])
        if operation.options["axis"] != -1 or not constant:
            return False
        vectors = [self.trial.values[s][0] for s in slots[1:]]
        width = self.trial.shapes[slots[0]][-1:]
        if any(v.shape != width for v in vectors):
            return False
        layer = nn.LayerNorm(len(vectors[0]), operation.options["eps"], bias=len(vectors) == 2)
        for parameter, values in zip((layer.weight, layer.bias), vectors, strict=False):
            parameter.data = values.clone()
        name = self.names.get(content(vectors[0]), _layer_name(node))
        self._layer(node, layer, slots[0], name.removesuffix(".weight"))
        return True

    def _convolution(self, node: fx.Node, slots: list[Any], operation: Operation) -> bool:
        """A convolution with weights that are computed, but always the same, as a layer."""
        if not all(isinstance(s, fx.Node) and self._settles(s) for s in slots[1:]):
            return False
        weight, *bias = (self.trial.values[s][0] for s in slots[1:])
        options, spatial = operation.options, weight.ndim - 2
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
        layer = kind(
            weight.shape[1] * options["groups"], len(weight), tuple(weight.shape[2:]),
            options["strides"] or 1, tuple(options["pads"] or [0] * spatial),
            options["dilations"] or 1, options["groups"], bool(bias),
        )  # fmt: skip
        layer.weight.data = weight.clone()
        if bias and layer.bias is not None:
            layer.bias.data = bias[0].clone()
        self._layer(node, layer, slots[0], _layer_name(node))
        return True


_UNKNOWN = object()
"""Instead of a number that depends on data, or that no formula was found for."""


def _layer_name(node: fx.Node) -> str:
    """Name of the layer that an operation of the file becomes."""
    return str(node.target).removeprefix(f"{DOMAIN}/")


def _numbered(name: str) -> Iterator[str]:
    yield name
    count = 0
    while True:
        count += 1
        yield f"{name}_{count}"
