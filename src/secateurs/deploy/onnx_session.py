"""An ONNX file in ONNX Runtime, called like a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateurs.errors import ConversionError, InputError, described, library, require

Feed = dict[str, np.ndarray]

TOLERANCE = 1e-3
"""Largest difference between PyTorch and ONNX Runtime, relative to the largest output, that is
accepted; float32 gives about 1e-6."""


class OnnxSession:
    """A file loaded into ONNX Runtime on the CPU.

    Args:
        path: of the ONNX file; external weights lie next to it.
        threads: within an operation; ONNX Runtime's own choice where None.

    Raises:
        InputError: no such file, or ONNX Runtime is not installed.
        ConversionError: ONNX Runtime refuses the file; its reason is told.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        require(Path(path).is_file(), "path", str(path), "an existing ONNX file")
        runtime = library("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        # threads that wait busily for the next pass would disturb whatever runs beside it
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            reason = first_line(error)
            raise ConversionError(f"{path}: ONNX Runtime refuses it ({reason})") from None
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def feed(self, example_inputs: Any) -> Feed:
        """Arrays by input name: by the names of a dictionary, by position elsewhere.

        Raises:
            InputError: an input of the file is not among them.
        """
        if isinstance(example_inputs, Mapping) and set(self.inputs) <= set(example_inputs):
            return {name: _array(example_inputs[name]) for name in self.inputs}
        tensors = [leaf for leaf in pytree.tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
        if len(tensors) != len(self.inputs):
            given = described(f"{len(tensors)} tensors")
            raise InputError("example_inputs", given, f"one for each of {', '.join(self.inputs)}")
        return {name: _array(tensor) for name, tensor in zip(self.inputs, tensors, strict=True)}

    def run(self, feed: Feed) -> list[np.ndarray]:
        """One pass.

        Raises:
            ConversionError: it fails; the reason of ONNX Runtime is told.
        """
        try:
            results: list[np.ndarray] = self._session.run(None, feed)
        except Exception as error:
            raise ConversionError(f"ONNX Runtime failed: {first_line(error)}") from None
        return results

    def __call__(self, example_inputs: Any) -> list[Tensor]:
        """Outputs in the order of the file, for inputs as the PyTorch model takes them."""
        return [torch.from_numpy(np.asarray(y)) for y in self.run(self.feed(example_inputs))]


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order: what an ONNX file has as its outputs."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[float, float]:
    """Largest difference between two lists of tensors: absolute, and relative.

    max |a − b|, and the same over max |b| of the tensor; infinite where shapes differ, where
    one is finite and the other is not, or where the lengths of the lists differ. Values that
    are not finite in both must be equal. Computed in float64.
    """
    if len(ours) != len(theirs):
        return float("inf"), float("inf")
    absolute = relative = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return float("inf"), float("inf")
        if not a.numel():
            continue
        a, b = (t.detach().cpu().double() for t in (a, b))
        finite = torch.isfinite(b)
        same = torch.equal(finite, torch.isfinite(a))
        if not same or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return float("inf"), float("inf")
        if not finite.any():
            continue
        difference = float((a - b)[finite].abs().max())
        scale = float(b[finite].abs().max())
        absolute = max(absolute, difference)
        relative = max(relative, difference / scale if scale else difference)
    return absolute, relative


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().contiguous().numpy()
    return array


def first_line(error: Exception) -> str:
    """What an error says, short."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
