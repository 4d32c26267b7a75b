"""ONNX in: a file of any framework as a PyTorch module that trains, traces and exports again.

onnx2torch converts. `onnx_graph` brings the file into the form that it takes, `onnx_operators`
has what it lacks, `onnx_layers` makes numbers of shapes and layers of weights. What comes out is
compared with ONNX Runtime before it is handed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateurs.deploy.onnx_graph import OnnxGraph
from secateurs.deploy.onnx_layers import with_layers
from secateurs.deploy.onnx_session import (
    TOLERANCE,
    OnnxSession,
    first_line,
    largest_difference,
    output_tensors,
)
from secateurs.errors import ConversionError, InputError, described, library, require

LARGEST_FILE = 2**31
"""Bytes of a model with its weights: what the tools of ONNX take in memory."""


@dataclass(frozen=True)
class OnnxImport:
    """A model that was read.

    Attributes:
        model: in eval mode; its inputs are called as in the file.
        example_inputs: a tensor, or a dictionary where the model has several inputs; floats are
            drawn, integers are 1, booleans true. Free dimensions have the size in `sizes`.
        sizes: of the free dimensions, by name.
        free: those that stayed free: the model takes them at any size.
        opset: version of the operations.
        producer: what wrote the file.
        absolute, relative: largest difference of an output to ONNX Runtime's.
    """

    model: nn.Module
    example_inputs: Any
    sizes: dict[str, int]
    free: tuple[str, ...]
    opset: int
    producer: str
    absolute: float
    relative: float


def import_onnx(
    path: str | Path,
    *,
    sizes: Mapping[str, int] | None = None,
    tolerance: float = TOLERANCE,
) -> OnnxImport:
    """Read an ONNX file as a PyTorch module.

    Args:
        path: of the file; external weights lie next to it.
        sizes: of free dimensions in the example inputs, by their names; 1 where none is given.
        tolerance: largest accepted difference to ONNX Runtime, relative to the largest output.

    Raises:
        InputError: no such file, it is truncated or no ONNX model, its weights are missing, a
            dimension has another name, or ONNX is not installed.
        ConversionError: operations without a counterpart (all of them are named), or outputs
            that differ.
    """
    for name in ("onnx", "onnxruntime", "onnx2torch"):
        library(name, "onnx")
    require(tolerance > 0, "tolerance", tolerance, "a number above 0")
    proto = _read(Path(path))
    session = OnnxSession(path)
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    producer = f"{proto.producer_name} {proto.producer_version}".strip()
    graph = OnnxGraph(proto, sizes or {})
    graph.check_operations(str(path))
    model, free = with_layers(_converted(graph.proto, str(path)), graph)
    inputs = graph.inputs(graph.sizes)
    trials = [inputs]
    if free:
        trials.append(graph.inputs({n: size + (n in free) for n, size in graph.sizes.items()}))
    absolute = relative = 0.0
    for trial in trials:
        difference = _difference(model, trial, session, str(path))
        absolute, relative = max(absolute, difference[0]), max(relative, difference[1])
    if relative > tolerance:
        raise ConversionError(
            f"{path}: PyTorch differs from ONNX Runtime by {absolute:.3g}, relative "
            f"{relative:.3g}; accepted: {tolerance:g}"
        )
    example = next(iter(inputs.values())) if len(inputs) == 1 else inputs
    return OnnxImport(model, example, graph.sizes, free, opset, producer, absolute, relative)


def _difference(
    model: nn.Module, inputs: dict[str, Tensor], session: OnnxSession, path: str
) -> tuple[float, float]:
    try:
        with torch.no_grad():
            ours = output_tensors(model(**inputs))
    except Exception as error:
        raise ConversionError(f"{path}: it does not run in PyTorch ({first_line(error)})") from None
    theirs = session(list(inputs.values()))
    return largest_difference(ours, theirs)


def _read(path: Path) -> Any:
    """The model of a file, whole."""
    import onnx
    from google.protobuf.message import DecodeError

    require(path.is_file(), "path", str(path), "an existing ONNX file")
    accepted = "a whole ONNX model"
    try:
        proto = onnx.load(path)
    except DecodeError:
        damaged = described(f"{path.stat().st_size} bytes that do not decode")
        raise InputError(f"file {path}", damaged, accepted) from None
    except (onnx.checker.ValidationError, OSError, ValueError) as error:  # of external weights
        raise InputError(f"file {path}", described(first_line(error)), accepted) from None
    size = proto.ByteSize()
    require(size < LARGEST_FILE, f"file {path}", described(f"{size} bytes"), "at most 2 GB")
    if not proto.graph.node or not proto.graph.output:
        raise InputError(f"file {path}", described("no operations or no output"), accepted)
    return proto


def _converted(proto: Any, path: str) -> fx.GraphModule:
    from onnx2torch import convert

    try:
        module: fx.GraphModule = convert(proto)
    except Exception as error:
        raise ConversionError(f"{path}: onnx2torch fails ({first_line(error)})") from None
    return module
