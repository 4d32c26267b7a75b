"""A checkpoint that stays on disk: safetensors shards in, pruned shards out.

The model is made without memory for its weights; one block at a time is read, pruned, written
to a shard of its own and forgotten. Tensors outside of blocks (embeddings, the patch projection)
are read each time that the model's code asks for them. A shard appears whole or not at all, so
what is there is finished: a killed run goes on at the block it died in, and writes the same
bytes. The index comes last; until then the folder is no checkpoint for anybody.

Tensors in the files are named as they were; where they are not those of the model's state dict,
such as experts one by one, transformers' rules convert them (`secateurs.calibration.stored`). A
tied one stands in the files once. Each keeps its dtype, whatever the model computes in.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import struct
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateurs.calibration.blocks import find_blocks, owner_of
from secateurs.calibration.stored import Conversion, Part
from secateurs.errors import InputError, described, require
from secateurs.parts.prunable import check_finite
from secateurs.state import write_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PROGRESS = ".progress"
"""Folder of what is told of finished blocks, until all are."""
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SHARD_BYTES = 1 << 29
"""Tensors outside of blocks are written in files of about so many bytes."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: str
    shape: tuple[int, ...]
    bytes: int
    dtype: str
    """As safetensors call it."""


class Checkpoint:
    """The safetensors files of a folder, read tensor by tensor.

    Args:
        folder: with ``model.safetensors``, or shards and their index.

    Raises:
        InputError: no such files, a shard that the index names is missing, a file is truncated
            or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        digest = hashlib.sha256()
        for file, names in self._files().items():
            header, raw = read_header(folder / file)
            digest.update(file.encode() + raw)
            for name in names if names is not None else header:
                if name not in header:
                    raise InputError(f"file {file}", described(f"no tensor {name}"), "the index's")
                entry = header[name]
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                self.tensors[name] = Stored(file, shape, end - begin, entry["dtype"])
        self.identity = digest.hexdigest()

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating tensor, in which transformers makes a model that says nothing."""
        files = {stored.file: None for stored in self.tensors.values()}
        with safetensors.safe_open(self.folder / min(files), framework="pt") as opened:
            first = [self.tensors[n].dtype for n in opened.keys() if n in self.tensors]  # noqa: SIM118
        return next((FLOATING[name] for name in first if name in FLOATING), torch.float32)

    def _files(self) -> dict[str, list[str] | None]:
        """Tensor names by file; None for all of a file."""
        index = self.folder / INDEX
        if not index.is_file():
            present = (self.folder / SINGLE).is_file()
            require(present, "folder", str(self.folder), f"a folder with {SINGLE} or {INDEX}")
            return {SINGLE: None}
        try:
            placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError("file", str(index), f"an index with a weight_map ({error})") from None
        files: dict[str, list[str] | None] = {}
        for name, file in placed.items():
            listed = files.setdefault(file, [])
            assert listed is not None
            listed.append(name)
        for file in files:
            there = (self.folder / file).is_file()
            require(there, "shard", str(self.folder / file), f"an existing file: {INDEX} names it")
        return files

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors, in memory of their own."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        found = {}
        for file, listed in by_file.items():
            with safetensors.safe_open(self.folder / file, framework="pt") as opened:
                for name in listed:
                    found[name] = opened.get_tensor(name).clone()
        return found


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, parsed and raw.

    Raises:
        InputError: it is none, or the file is shorter than its header says.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            raw = file.read(min(length, size))
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (
        struct.error,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
    ):
        raise InputError("file", str(path), "a whole safetensors file") from None
    if 8 + length + end != size:
        shown = described(f"{size} bytes in {path}")
        raise InputError("file", shown, f"{8 + length + end} bytes, as its header says")
    return header, raw


class OnDisk:
    """The weights of a model that has none in memory (`secateurs.calibration.walk.Weights`).

    Args:
        model: all parameters on the meta device.
        source: where they are.
        target: folder of the pruned checkpoint; what it holds already is finished.
    """

    def __init__(self, model: nn.Module, source: Checkpoint, target: Path) -> None:
        self.model, self.source, self.target = model, source, target
        self.blocks = find_blocks(model)
        require(
            "" not in self.blocks, "model", described(f"{type(model).__name__} without blocks"),
            "a model with blocks; others are pruned in memory",
        )  # fmt: skip
        self.conversion = Conversion(model, {n: t.shape for n, t in source.tensors.items()})
        self._names: dict[str, list[str]] = {}
        """Tensor of the model that is stored -> all names that the model has for it."""
        self._check_names()
        self._parts: dict[str | None, list[Part]] = defaultdict(list)
        """Block, or None -> what is stored of it."""
        for part in self.conversion.parts:
            owners = {owner_of(name, self.blocks) for name in part.own}
            whole = f"tensors of one block, not of several as {', '.join(part.own)}"
            require(len(owners) == 1, "checkpoint", ", ".join(part.stored), whole)
            if any(name in self._names for name in part.own):
                self._parts[owners.pop()].append(part)

    def _check_names(self) -> None:
        stored = {name for part in self.conversion.parts for name in part.own}
        holders: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            holders.setdefault(id(tensor), []).append(name)
        for names in holders.values():
            found = [name for name in names if name in stored]
            if not found:
                shown = described(f"no tensor {names[0]}")
                raise InputError("checkpoint", shown, "the tensors of the model's state dict")
            self._names[found[0]] = names

    def shard(self, block: str) -> Path:
        """The file of a pruned block."""
        number = list(self.blocks).index(block) + 1
        return self.target / f"model-block-{number:05d}-of-{len(self.blocks):05d}.safetensors"

    def wanted(self, block: str) -> bool:
        return not self.shard(block).exists()

    @contextmanager
    def held(self, block: str) -> Iterator[None]:
        """The weights of a block, pruned ones where they are finished."""
        self._load(block)
        try:
            yield
        finally:
            self._release(block)
            give_memory_back()

    def _load(self, block: str) -> None:
        parts = self._parts[block]
        names = [name for part in parts for name in part.stored]
        if self.wanted(block):
            tensors = self._dense(names)
        else:
            with safetensors.safe_open(self.shard(block), framework="pt") as opened:
                tensors = {n: opened.get_tensor(n).clone() for n in names}
        self._place(parts, tensors)

    def _dense(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = self.source.read(names)
        check_finite({n: t for n, t in tensors.items() if t.is_floating_point()})
        return tensors

    def _release(self, block: str) -> None:
        self._forget(self._parts[block])

    def _place(self, parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.conversion.read(parts, tensors).items():
            place(self.model, self._names.get(name, [name]), tensor)

    def _forget(self, parts: Iterable[Part]) -> None:
        for name in (name for part in parts for name in part.own):
            place(self.model, self._names.get(name, [name]), tensor_of(self.model, name).to("meta"))

    @contextmanager
    def outside_on_demand(self) -> Iterator[None]:
        """What is outside of blocks is read where the model's code asks for it, and not kept."""
        read: dict[str, dict[str, Callable[[], Tensor]]] = defaultdict(dict)
        for part in self._parts[None]:
            for own in part.own:
                for name in self._names.get(own, [own]):
                    path, _, local = name.rpartition(".")
                    read[path][local] = partial(self._outside, part, own)
        with ExitStack() as undo:
            for path, readers in read.items():
                module: Any = self.model.get_submodule(path)
                for held in ("_parameters", "_buffers"):
                    undo.callback(setattr, module, held, getattr(module, held))
                    setattr(module, held, _OnDemand(getattr(module, held), readers))
            yield

    def _outside(self, part: Part, own: str) -> Tensor:
        return self.conversion.read([part], self.source.read(part.stored))[own]

    def write(self, block: str, told: Mapping[str, Any]) -> None:
        """Write the tensors of a block that is held, and what is told of it."""
        parts = self._parts[block]
        own = {n: tensor_of(self.model, n).detach() for part in parts for n in part.own}
        stored = self.conversion.write(parts, own)
        for name, tensor in stored.items():
            if tensor.dtype != FLOATING.get(self.source.tensors[name].dtype, tensor.dtype):
                stored[name] = _in_dtype_of(self.source.read([name])[name], tensor)
        self._finish(block, stored, told)

    def copy(self, block: str) -> None:
        """Write the tensors of a block as they are."""
        names = [name for part in self._parts[block] for name in part.stored]
        self._finish(block, self._dense(names), {"kept": {}, "notes": []})

    def _finish(self, block: str, stored: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        write_json(self._told(block), told)  # before the shard, which says that it is finished
        # a file holds no views: experts of one array are copied
        write_shard(self.shard(block), {n: _own_memory(t) for n, t in stored.items()})

    def told(self, block: str) -> dict[str, Any]:
        """What was told of a finished block."""
        found: dict[str, Any] = json.loads(self._told(block).read_text())
        return found

    def _told(self, block: str) -> Path:
        return self.target / PROGRESS / self.shard(block).with_suffix(".json").name

    def finish(self) -> None:
        """Copy what is outside of blocks and all other files; the index comes last."""
        placed = {
            n: self.shard(b).name
            for b in self.blocks
            for part in self._parts[b]
            for n in part.stored
        }
        parts = list(self._outside_parts())
        for number, names in enumerate(parts, start=1):
            file = f"model-outside-{number:05d}-of-{len(parts):05d}.safetensors"
            if not (self.target / file).exists():
                write_shard(self.target / file, self.source.read(names))
            placed.update(dict.fromkeys(names, file))
        for path in sorted(self.source.folder.iterdir()):
            if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
                shutil.copyfile(path, self.target / path.name)
        told = {
            "total_size": sum(stored.bytes for stored in self.source.tensors.values()),
            # for transformers, where the configuration does not say it and the files have several
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
        }
        write_json(self.target / INDEX, {"metadata": told, "weight_map": placed})

    def _outside_parts(self) -> Iterator[list[str]]:
        part: list[str] = []
        size = 0
        outside = [name for part in self._parts[None] for name in part.stored]
        for name in (*outside, *self.conversion.ignored):
            length = self.source.tensors[name].bytes
            if part and size + length > SHARD_BYTES:
                yield part
                part, size = [], 0
            part.append(name)
            size += length
        if part:
            yield part


class _OnDemand(dict[str, Any]):
    """Parameters or buffers of a module, of which some are read anew for every look at them.

    Not every module that has some is called: DETR takes the weight of its embedding of queries.
    Who goes through them sees those without memory.
    """

    def __init__(self, own: Mapping[str, Any], read: Mapping[str, Callable[[], Tensor]]) -> None:
        super().__init__(own)
        self.read = read

    def __getitem__(self, local: str) -> Any:
        there = super().__getitem__(local)
        if there is None or local not in self.read:
            return there
        tensor = self.read[local]().to(there.dtype)
        parameter = isinstance(there, nn.Parameter)
        return nn.Parameter(tensor, requires_grad=False) if parameter else tensor


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under another name, flush it to the disk, rename it."""
    partial = path.with_name(f".{path.name}.partial")
    # one entry of metadata, which transformers asks for: the order of several is random
    save_file(dict(tensors), partial, {"format": "pt"})
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def give_memory_back() -> None:
    """Have the C library return what is free to the system.

    glibc keeps freed tensors of some MB and goes on beside them: 24 blocks of 16 MB, of which one
    was held at a time, took 366 MB; with this they take 62.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not of musl
        if trim is not None:
            trim(0)


def _in_dtype_of(dense: Tensor, pruned: Tensor) -> Tensor:
    """A pruned tensor in the dtype of the dense one; what did not change is not rounded."""
    return torch.where(pruned == dense.to(pruned.dtype), dense, pruned.to(dense.dtype))


def _own_memory(tensor: Tensor) -> Tensor:
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its qualified name."""
    path, _, local = name.rpartition(".")
    found = getattr(model.get_submodule(path), local)
    assert isinstance(found, Tensor)
    return found


def place(model: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Put one tensor where the model has tensors of these names, in the dtype that it has there."""
    tensor = tensor.to(tensor_of(model, names[0]).dtype)
    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        path, _, local = name.rpartition(".")
        module = model.get_submodule(path)
        if local in module._parameters:
            module._parameters[local] = parameter
        else:
            module._buffers[local] = tensor
