"""Nested state on disk without pickle: tensors in safetensors, everything else as JSON.

A tree is dicts, lists, tuples, numbers, strings, booleans, None and tensors, nested as one
likes: what optimizers, pruners and random generators hand out as their state. Files are
written under another name and renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor

from secateurs.errors import InputError, described

Tree = Any
_MARKS = _TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"


def flatten(tree: Tree) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a tree under numbered names, and its JSON skeleton."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Tree) -> Any:
        if isinstance(node, Tensor):
            key = str(len(tensors))
            tensors[key] = node.detach()
            return {_TENSOR: key}
        if isinstance(node, Mapping):
            if all(isinstance(k, str) and k not in _MARKS for k in node):
                return {k: walk(v) for k, v in node.items()}
            return {_PAIRS: [[walk(k), walk(v)] for k, v in node.items()]}
        if isinstance(node, tuple):
            return {_TUPLE: [walk(v) for v in node]}
        if isinstance(node, list):
            return [walk(v) for v in node]
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise InputError("state", described(type(node).__name__), "tensors and plain values")

    return tensors, walk(tree)


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Tree:
    """The tree that `flatten` took apart."""
    if isinstance(skeleton, list):
        return [unflatten(tensors, v) for v in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if _TENSOR in skeleton:
        return tensors[skeleton[_TENSOR]]
    if _TUPLE in skeleton:
        return tuple(unflatten(tensors, v) for v in skeleton[_TUPLE])
    if _PAIRS in skeleton:
        return {unflatten(tensors, k): unflatten(tensors, v) for k, v in skeleton[_PAIRS]}
    return {k: unflatten(tensors, v) for k, v in skeleton.items()}


def save_tree(path: Path, tree: Tree) -> None:
    """Write a tree to one safetensors file, atomically."""
    tensors, skeleton = flatten(tree)
    write_tensors(path, tensors, {"tree": json.dumps(skeleton)})


def load_tree(path: Path) -> Tree:
    """Read what `save_tree` wrote."""
    tensors, metadata = read_tensors(path)
    if "tree" not in metadata:
        raise InputError(str(path), described("a file without a tree"), "a state of secateurs")
    return unflatten(tensors, json.loads(metadata["tree"]))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file, atomically.

    Tensors that share memory are written once each: the file has no notion of sharing.
    """
    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen: set[int] = set()
    for name, tensor in own.items():
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen and tensor.numel():
            own[name] = tensor.clone()
        seen.add(memory)
    write_bytes(path, serialize(own, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        InputError: the file is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise InputError("file", str(path), "an existing safetensors file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise InputError("file", str(path), f"a whole safetensors file ({error})") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented."""
    write_bytes(path, (json.dumps(value, indent=2, default=_plain) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def cpu_copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a state dict on the CPU that shares no memory with it."""
    return {name: t.detach().to("cpu", copy=True) for name, t in state.items()}


def model_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model, copied."""
    return cpu_copy(model.state_dict())
