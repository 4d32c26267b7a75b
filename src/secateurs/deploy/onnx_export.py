"""ONNX out: `torch.onnx.export` through `torch.export`, checked against PyTorch."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateurs.deploy.onnx_session import (
    TOLERANCE,
    OnnxSession,
    first_line,
    largest_difference,
    output_tensors,
)
from secateurs.devices import device_of
from secateurs.errors import ConversionError, InputError, described, library, require
from secateurs.parts.costs import evaluating, forward


@dataclass(frozen=True)
class OnnxExport:
    """A file that was written, and how far it is from the PyTorch model.

    Attributes:
        path: of the file; weights above 2 GB lie next to it, in ``NAME.data``.
        opset: version of the operations.
        dynamic_batch: the first dimension of the inputs is free.
        fixed_because: why it is not, where that was tried.
        absolute, relative: largest difference of an output to PyTorch's on the example inputs
            (and on batches of other sizes, where the batch is free).
    """

    path: Path
    opset: int
    dynamic_batch: bool
    fixed_because: str
    absolute: float
    relative: float


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    dynamic_batch: bool | None = None,
    opset: int | None = None,
    tolerance: float = TOLERANCE,
) -> OnnxExport:
    """Write a model as an ONNX file that computes the same in ONNX Runtime.

    The file appears whole and checked, or not at all; one that is there is replaced. Batch
    norms are folded into the convolutions before them.

    Args:
        model: exported in eval mode, on the CPU; it is left as it was.
        example_inputs: a tensor, a sequence of arguments or a dictionary of keyword arguments;
            the first dimension of the first tensor is the batch.
        path: of the file.
        dynamic_batch: leave the batch free: True insists, False fixes it, None tries.
        opset: version of the operations; that of torch's exporter where None. It can write
            versions from its own up, and some models in earlier ones.
        tolerance: largest accepted difference to PyTorch, relative to the largest output.

    Raises:
        InputError: no tensors in the inputs, no such folder or opset, or ONNX is not installed.
        ConversionError: the model cannot be exported (the exporter's reason is told), ONNX
            Runtime refuses it, or its outputs differ by more than the tolerance.
    """
    target = Path(path)
    for name in ("onnxscript", "onnxruntime"):
        library(name, "onnx")
    require(tolerance > 0, "tolerance", tolerance, "a number above 0")
    newest = library("onnx", "onnx").defs.onnx_opset_version()
    known = opset is None or 1 <= opset <= newest
    require(known, "opset", opset, f"from 1 to {newest}, the newest that onnx has")
    require(target.parent.is_dir(), "path", str(path), "a file in an existing folder")
    require(not target.is_dir(), "path", str(path), "a file, not a folder")
    if not output_tensors(example_inputs):
        shown = described(type(example_inputs).__name__)
        raise InputError("example_inputs", shown, "a tensor, or a nest of some")
    if device_of(model).type != "cpu":
        model = copy.deepcopy(model).cpu()
    inputs = pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), example_inputs)
    folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with evaluating(model):
            written = _written(model, inputs, folder / target.name, dynamic_batch, opset, tolerance)
        # weights before the file that refers to them
        for file in sorted(folder.iterdir(), key=lambda f: f.name == target.name):
            os.replace(file, target.with_name(file.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return OnnxExport(target, *written)


Written = tuple[int, bool, str, float, float]


def _written(
    model: nn.Module,
    inputs: Any,
    path: Path,
    dynamic_batch: bool | None,
    opset: int | None,
    tolerance: float,
) -> Written:
    """Opset, whether the batch is free, why not, and the differences, of the file written."""
    reason = ""
    if dynamic_batch is not False:
        batch = output_tensors(inputs)[0].shape[:1]
        # an example of 1 would be taken for a constant
        several = _batches_of(inputs, 2) if batch == (1,) else inputs
        try:
            version = _export(model, several, path, opset, free_batch=True)
            sizes = (1, 2, 3) if batch == (1,) else (int(batch[0]), int(batch[0]) + 1)
            absolute, relative = _checked(
                model, [_batches_of(inputs, n) for n in sizes], path, tolerance
            )
            return version, True, "", absolute, relative
        except (ConversionError, RuntimeError, IndexError) as error:
            reason = str(error)
            if dynamic_batch:
                raise ConversionError(f"{path.name}, with a free batch: {reason}") from None
    version = _export(model, inputs, path, opset, free_batch=False)
    return version, False, reason, *_checked(model, [inputs], path, tolerance)


def _export(
    model: nn.Module, inputs: Any, path: Path, opset: int | None, *, free_batch: bool
) -> int:
    """Write the file; returns its opset."""
    arguments: dict[str, Any] = {"args": (), "kwargs": None}
    if isinstance(inputs, Mapping):
        arguments["kwargs"] = dict(inputs)
    else:
        arguments["args"] = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if free_batch:
        arguments["dynamic_shapes"] = _free_batch(arguments["kwargs"] or arguments["args"])
    try:
        with torch.no_grad(), _quiet(), _PlainForms():
            program = torch.onnx.export(
                model, **arguments, dynamo=True, opset_version=opset, verbose=False
            )
            assert program is not None
            program.save(path)
    except Exception as error:
        raise ConversionError(f"torch.onnx.export failed: {_root_cause(error)}") from None
    written = int(program.model.opset_imports[""])
    if opset not in (None, written):
        raise ConversionError(f"torch.onnx.export wrote opset {written}, not {opset}")
    return written


def _free_batch(inputs: Any) -> Any:
    """For every tensor of a nest: that its first dimension is the batch, or nothing."""
    batch = output_tensors(inputs)[0].shape[:1]
    free = torch.export.Dim("batch")

    def dims(leaf: Any) -> Any:
        own = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[:1] == batch
        return {0: free} if own else None

    return pytree.tree_map(dims, inputs)


def _batches_of(inputs: Any, count: int) -> Any:
    """The inputs with `count` samples: those there are, again and again."""
    size = output_tensors(inputs)[0].shape[0]

    def repeated(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != size:
            return tensor
        return tensor[torch.arange(count) % size]

    return pytree.tree_map_only(Tensor, repeated, inputs)


def _checked(
    model: nn.Module, batches: list[Any], path: Path, tolerance: float
) -> tuple[float, float]:
    """Largest absolute and relative difference between the file and the model.

    Raises:
        ConversionError: it is above the tolerance (the output is named), or either does not run.
    """
    session = OnnxSession(path)
    worst = (0.0, 0.0)
    for inputs in batches:
        try:
            with torch.no_grad():
                expected = output_tensors(forward(model, inputs))
        except Exception as error:
            raise ConversionError(f"the model does not run: {first_line(error)}") from None
        given = session(inputs)
        absolute, relative = largest_difference(given, expected)
        if relative > tolerance:
            where = _differing_output(given, expected, session.outputs, tolerance)
            raise ConversionError(
                f"ONNX Runtime differs from PyTorch by {absolute:.3g}, relative {relative:.3g}, "
                f"in {where}; accepted: {tolerance:g}"
            )
        worst = max(worst[0], absolute), max(worst[1], relative)
    return worst


def _differing_output(
    given: list[Tensor], expected: list[Tensor], names: list[str], tolerance: float
) -> str:
    if len(given) != len(expected):
        return f"the number of outputs ({len(given)} for {len(expected)})"
    for name, a, b in zip(names, given, expected, strict=True):
        if a.shape != b.shape:
            return f"the shape of output {name!r}, {tuple(a.shape)} for {tuple(b.shape)}"
        if largest_difference([a], [b])[1] > tolerance:
            return f"output {name!r}"
    raise AssertionError("the outputs are the same")


def _root_cause(error: BaseException) -> str:
    """What went wrong at first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


class _PlainForms(TorchFunctionMode):
    """Says in the simplest way what torch 2.13 exports badly or not at all.

    Attention over several batch dimensions (windows inside a batch) exports in four dimensions
    only; adaptive pooling to one place becomes a look-up in memory where channels come last.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3:
            several = args[0].ndim > 4 and all(a.ndim == args[0].ndim for a in args)
            if several and kwargs.get("attn_mask") is None:
                flat = [tensor.flatten(0, -4) for tensor in args]
                return func(*flat, **kwargs).unflatten(0, args[0].shape[:-3])
        if func is F.adaptive_avg_pool2d and not kwargs and args[1] in (1, (1, 1), [1, 1]):
            return args[0].mean((-2, -1), keepdim=True)
        return func(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress on standard output, its warnings and its log."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
