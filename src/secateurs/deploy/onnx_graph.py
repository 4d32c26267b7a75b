"""The graph of an ONNX file, brought into the form that onnx2torch takes.

Constants become weights, automatic padding numbers, absent inputs disappear, operations go where
`onnx_operators` says, and nodes are called as the layers were whose weights they have. Shapes are
inferred for one size of every free dimension: what onnx2torch reads from them is their rank.
"""

from __future__ import annotations

import hashlib
import keyword
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateurs.deploy.onnx_operators import DOMAIN, OURS, extend_onnx2torch
from secateurs.errors import ConversionError, require, unknown

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
"""Operations that are called as the layer was whose weights they have."""


class OnnxGraph:
    """A graph in the form that onnx2torch takes.

    Args:
        proto: of the file; it is changed.
        sizes: of free dimensions, by name; 1 where none is given.

    Attributes:
        proto: the graph.
        weights: its constants by name.
        sizes: of all free dimensions of the inputs.
        symbols: by input, for every dimension its name where it is free, '' where it is fixed.

    Raises:
        InputError: there is no such dimension, or its size is below 1.
        ConversionError: two inputs have the same name in Python, or a batch norm is in training.
    """

    def __init__(self, proto: Any, sizes: Mapping[str, int]) -> None:
        import onnx

        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        self.proto = proto
        weights = {tensor.name for tensor in proto.graph.initializer}
        self._inputs = [value for value in proto.graph.input if value.name not in weights]
        self.symbols = {value.name: _symbols(value) for value in self._inputs}
        spelled: dict[str, str] = {}
        for name in self.symbols:
            other = spelled.setdefault(identifier(name), name)
            if other != name:
                raise ConversionError(f"inputs {other!r} and {name!r} are the same name in Python")
        self._shapes = {value.name: _dims(value) for value in self._inputs}
        self.sizes = self._checked(sizes)
        self._constants_to_weights()
        self._fix_shapes()
        self.proto = onnx.shape_inference.infer_shapes(self.proto, data_prop=True)
        self.weights = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self._known = {
            value.name: _dims(value)
            for value in [*self.proto.graph.value_info, *self.proto.graph.input]
        }
        self._drop_unread_outputs()
        self._outputs_of_their_own()
        for node in self.proto.graph.node:
            self._repair(node)
        self.proto.opset_import.add(domain=DOMAIN, version=1)
        self._name_nodes()

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs as Python spells them."""
        return [identifier(name) for name in self.symbols]

    def inputs(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Inputs for sizes of the free dimensions: drawn floats, integers of 1, booleans of true.

        The numbers are the same at every call.
        """
        import onnx

        stream = torch.Generator().manual_seed(0)
        made = {}
        for value in self._inputs:
            symbols, dims = self.symbols[value.name], self._shapes[value.name]
            shape = [sizes[s] if s else n for s, n in zip(symbols, dims, strict=True)]
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            dtype = torch.from_numpy(np.zeros(0, kind)).dtype
            drawn = torch.randn(shape, generator=stream) if dtype.is_floating_point else None
            made[identifier(value.name)] = (
                torch.ones(shape, dtype=dtype) if drawn is None else drawn.to(dtype)
            )
        return made

    def places(self) -> dict[str, tuple[str, int]]:
        """For every free dimension an input that has it, as Python spells it, and where."""
        found: dict[str, tuple[str, int]] = {}
        for name, symbols in self.symbols.items():
            for place, symbol in enumerate(symbols):
                if symbol:
                    found.setdefault(symbol, (identifier(name), place))
        return found

    def names_by_content(self) -> dict[str, str]:
        """Names of the weights by what is in them."""
        import onnx

        names: dict[str, str] = {}
        for name, tensor in self.weights.items():
            values = onnx.numpy_helper.to_array(tensor)
            if values.dtype.kind in "fiub":
                names.setdefault(content(torch.from_numpy(values.copy())), name)
        return names

    def check_operations(self, path: str) -> None:
        """Raise `ConversionError` that names every operation without a counterpart."""
        from onnx2torch.node_converters.registry import get_converter

        extend_onnx2torch()
        versions = {o.domain: o.version for o in self.proto.opset_import}
        missing: dict[str, int] = {}
        for node in self.proto.graph.node:
            try:
                get_converter(node.op_type, versions.get(node.domain, 1), node.domain)
            except NotImplementedError:
                name = f"{node.domain}.{node.op_type}".lstrip(".")
                missing[name] = missing.get(name, 0) + 1
        if missing:
            listed = ", ".join(f"{name} ({count}x)" for name, count in sorted(missing.items()))
            raise ConversionError(f"{path}: operations without a counterpart in PyTorch: {listed}")

    def _checked(self, given: Mapping[str, int]) -> dict[str, int]:
        names = {s: 1 for symbols in self.symbols.values() for s in symbols if s}
        for name, size in given.items():
            if name not in names:
                raise unknown("sizes", name, names)
            require(size >= 1, f"sizes {name}", size, "at least 1")
        return {**names, **given}

    def _constants_to_weights(self) -> None:
        """Constants are weights; so are names that only repeat one."""
        import onnx

        graph = self.proto.graph
        weights = {tensor.name for tensor in graph.initializer}
        outputs = {value.name for value in graph.output}
        kept: list[Any] = []
        same: dict[str, str] = {}
        for node in graph.node:
            node.domain = "" if node.domain == "ai.onnx" else node.domain
            for place, name in enumerate(node.input):
                node.input[place] = same.get(name, name)
            tensor = _constant(node) if node.op_type == "Constant" and not node.domain else None
            if tensor is not None:
                named = onnx.TensorProto()
                named.CopyFrom(tensor)
                named.name = node.output[0]
                graph.initializer.append(named)
                weights.add(named.name)
            elif (
                node.op_type == "Identity"
                and node.input[0] in weights
                and node.output[0] not in outputs
            ):
                same[node.output[0]] = node.input[0]
            else:
                kept.append(node)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)

    def _fix_shapes(self) -> None:
        """One size for every free dimension, and nothing that was inferred for others."""
        for value in self._inputs:
            dims = value.type.tensor_type.shape.dim
            for dim, symbol in zip(dims, self.symbols[value.name], strict=True):
                if symbol:
                    dim.dim_value = self.sizes[symbol]
        del self.proto.graph.value_info[:]
        for value in self.proto.graph.output:
            value.type.tensor_type.ClearField("shape")

    def _drop_unread_outputs(self) -> None:
        """Second outputs that nobody reads (the mask of a dropout) are none.

        Those of a split stay: their number says how large the parts are.
        """
        graph = self.proto.graph
        read = {name for node in graph.node for name in node.input}
        read |= {value.name for value in graph.output}
        for node in graph.node:
            while node.op_type != "Split" and len(node.output) > 1 and node.output[-1] not in read:
                node.output.pop()

    def _outputs_of_their_own(self) -> None:
        """An output that is an input, a weight, one of several results or twice one gets a node."""
        import onnx

        graph = self.proto.graph
        producers = {name: node for node in graph.node for name in node.output}
        inside: dict[str, str] = {}
        for number, value in enumerate(graph.output):
            name = value.name
            node = producers.get(name)
            if name not in inside:
                if node is not None and len(node.output) == 1:
                    inside[name] = name
                    continue
                inside[name] = name if node is None else f"{name}/inner"
                for one in graph.node if node is not None else ():
                    for names in (one.input, one.output):
                        for place, own in enumerate(names):
                            names[place] = inside[name] if own == name else own
            value.name = f"{name}/outer{number}"
            graph.node.append(onnx.helper.make_node("Identity", [inside[name]], [value.name]))

    def _repair(self, node: Any) -> None:
        while node.input and not node.input[-1]:
            node.input.pop()
        if node.domain:
            return
        attributes = {a.name: a for a in node.attribute}
        if node.op_type in ("Conv", "MaxPool", "AveragePool"):
            self._explicit_padding(node, attributes)
        if node.op_type == "ConvTranspose":
            self._explicit_cutting(node, attributes)
        if node.op_type == "BatchNormalization" and _integer(attributes, "training_mode"):
            raise ConversionError(
                f"BatchNormalization {node.name!r} normalises by the batch (training_mode=1): "
                "export the model in evaluation mode"
            )
        if node.op_type == "Resize" and len(node.input) == 2:
            node.op_type = "Upsample"  # of opset 10, which has neither roi nor sizes
        plain = node.op_type in ("Conv", "ConvTranspose") and self._even(node)
        plain = plain or "broadcast" in attributes  # of opset 6
        if node.op_type in OURS and not plain:
            node.domain = DOMAIN

    def _explicit_padding(self, node: Any, attributes: Mapping[str, Any]) -> None:
        """auto_pad=SAME_* as numbers: the output has ceil(size / stride) places."""
        auto = attributes.get("auto_pad")
        shape = self._known.get(node.input[0], [])[2:]
        if auto is None or not auto.s.startswith(b"SAME") or not shape or 0 in shape:
            return
        kernel = _integers(attributes, "kernel_shape")
        kernel = kernel or self._sizes(node.input[1])[2:]
        ones = [1] * len(kernel)
        strides = _integers(attributes, "strides") or ones
        dilations = _integers(attributes, "dilations") or ones
        before, after = [], []
        for size, k, stride, dilation in zip(shape, kernel, strides, dilations, strict=True):
            total = max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
            first = total // 2 if auto.s == b"SAME_UPPER" else total - total // 2
            before.append(first)
            after.append(total - first)
        for name in ("auto_pad", "pads"):
            if name in attributes:
                node.attribute.remove(attributes[name])
        node.attribute.add(name="pads", ints=[*before, *after], type=7)

    def _explicit_cutting(self, node: Any, attributes: Mapping[str, Any]) -> None:
        """output_shape and auto_pad=SAME_* of a transposed convolution as what is cut off."""
        auto = attributes["auto_pad"].s if "auto_pad" in attributes else b"NOTSET"
        wanted = _integers(attributes, "output_shape")
        shape = self._known.get(node.input[0], [])[2:]
        if not (wanted or auto.startswith(b"SAME")) or not shape or 0 in shape:
            return
        rank = len(shape)
        ones, none = [1] * rank, [0] * rank
        kernel = _integers(attributes, "kernel_shape") or self._sizes(node.input[1])[2:]
        strides = _integers(attributes, "strides") or ones
        dilations = _integers(attributes, "dilations") or ones
        further = _integers(attributes, "output_padding") or none
        wanted = wanted[-rank:] or [n * s for n, s in zip(shape, strides, strict=True)]
        before, after = [], []
        for axis in range(rank):
            reach = dilations[axis] * (kernel[axis] - 1) + 1
            whole = strides[axis] * (shape[axis] - 1) + reach + further[axis]
            total = max(whole - wanted[axis], 0)
            further[axis] += max(wanted[axis] - whole, 0)
            first = total // 2 if auto == b"SAME_UPPER" else total - total // 2
            before.append(first)
            after.append(total - first)
        for name in ("auto_pad", "pads", "output_shape", "output_padding"):
            if name in attributes:
                node.attribute.remove(attributes[name])
        node.attribute.add(name="pads", ints=[*before, *after], type=7)
        node.attribute.add(name="output_padding", ints=further, type=7)

    def _sizes(self, name: str) -> list[int]:
        """Sizes of a weight, or of a value as far as they are known."""
        return list(self.weights[name].dims) if name in self.weights else self._known.get(name, [])

    def _even(self, node: Any) -> bool:
        """Whether a convolution has constant weights and, if transposed, equal pads both sides."""
        constant = all(name in self.weights for name in node.input[1:])
        pads = next((list(a.ints) for a in node.attribute if a.name == "pads"), [])
        half = len(pads) // 2
        return constant and (node.op_type == "Conv" or pads[:half] == pads[half:])

    def _name_nodes(self) -> None:
        """Nodes are called as the layers were whose weights they have."""
        readers: dict[str, list[Any]] = {}
        for node in self.proto.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        for node in self.proto.graph.node:
            if node.op_type not in LAYERS:
                continue
            stems = self._stems(node)
            if not stems and node.op_type == "MatMul":
                adding = [n for n in readers.get(node.output[0], []) if n.op_type == "Add"]
                stems = [stem for n in adding for stem in self._stems(n)]
            if stems:
                node.name = stems[0]

    def _stems(self, node: Any) -> list[str]:
        """Names of layers, from the names of a node's weights."""
        return [
            name.rpartition(".")[0]
            for name in node.input
            if name in self.weights and name.endswith((".weight", ".bias"))
        ]


def identifier(name: str) -> str:
    """A name as Python takes it for an argument of a method."""
    plain = re.sub(r"\W", "_", name)
    taken = keyword.iskeyword(plain) or plain == "self"
    return f"_{plain}" if taken or not plain or plain[0].isdigit() else plain


def content(tensor: Tensor) -> str:
    """Type, shape and a hash of the values: equal for equal tensors."""
    plain = tensor.detach().cpu()
    raw = (plain.view(torch.int16) if plain.dtype is torch.bfloat16 else plain).numpy().tobytes()
    seal = hashlib.blake2b(raw, digest_size=16).hexdigest()
    return f"{tensor.dtype}{tuple(tensor.shape)}{seal}"


def _dims(value: Any) -> list[int]:
    """Sizes of a value; 0 for those that are not known."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _symbols(value: Any) -> list[str]:
    names = []
    for place, dim in enumerate(value.type.tensor_type.shape.dim):
        unnamed = "batch" if place == 0 else f"{value.name}.{place}"
        names.append("" if dim.dim_value > 0 else dim.dim_param or unnamed)
    return names


def _constant(node: Any) -> Any:
    """The tensor of a Constant node; None where it is no tensor of numbers."""
    import onnx

    [attribute] = node.attribute
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return value
    kinds = {"value_int": onnx.TensorProto.INT64, "value_float": onnx.TensorProto.FLOAT}
    kind = kinds.get(attribute.name.removesuffix("s"))
    if kind is None:
        return None
    several = attribute.name.endswith("s")
    return onnx.helper.make_tensor(
        "", kind, [len(value)] if several else [], list(value) if several else [value]
    )


def _integers(attributes: Mapping[str, Any], name: str) -> list[int]:
    return list(attributes[name].ints) if name in attributes else []


def _integer(attributes: Mapping[str, Any], name: str) -> int:
    return int(attributes[name].i) if name in attributes else 0
