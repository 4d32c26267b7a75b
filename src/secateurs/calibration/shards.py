"""A checkpoint that stays on disk: safetensors shards in, pruned shards out.

The model is made without memory for its weights; one block at a time is read, pruned, written
to a shard of its own and forgotten. Modules outside of blocks (embeddings, the patch projection)
hold their weights only while they run. A shard appears whole or not at all, so what is there is
finished: a killed run goes on at the block it died in, and writes the same bytes. The index
comes last; until then the folder is no checkpoint for anybody.

Tensors in the files are named as they were; where they are not those of the model's state dict,
such as experts one by one, transformers' rules convert them (`secateurs.calibration.stored`). A
tied one stands in the files once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
SHARD_BYTES = 1 << 29
"""Tensors outside of blocks are written in files of about so many bytes."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: str
    shape: tuple[int, ...]
    bytes: int


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
                begin, end = header[name]["data_offsets"]
                self.tensors[name] = Stored(file, tuple(header[name]["shape"]), end - begin)
        self.identity = digest.hexdigest()

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
        self._uses: Counter[str] = Counter()
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

    def _load(self, block: str) -> None:
        parts = self._parts[block]
        names = [name for part in parts for name in part.stored]
        if self.wanted(block):
            tensors = self.source.read(names)
            check_finite({n: t for n, t in tensors.items() if t.is_floating_point()})
        else:
            with safetensors.safe_open(self.shard(block), framework="pt") as opened:
                tensors = {n: opened.get_tensor(n).clone() for n in names}
        self._place(parts, tensors)

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
        """Modules outside of blocks hold their own tensors while they run, and only then."""
        used: dict[str, list[Part]] = {}
        for part in self._parts[None]:
            names = [name for own in part.own for name in self._names.get(own, [own])]
            for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
                used.setdefault(path, []).append(part)
        with ExitStack() as hooks:
            for path, parts in used.items():
                module = self.model.get_submodule(path)
                before = module.register_forward_pre_hook(self._loading(parts))
                after = module.register_forward_hook(self._releasing(parts), always_call=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            yield

    def _loading(self, parts: Sequence[Part]) -> Callable[..., None]:
        def load(*_: Any) -> None:
            missing = [part for part in parts if self._uses[part.own[0]] == 0]
            names = [name for part in missing for name in part.stored]
            self._place(missing, self.source.read(names))
            self._uses.update(part.own[0] for part in parts)

        return load

    def _releasing(self, parts: Sequence[Part]) -> Callable[..., None]:
        def release(*_: Any) -> None:
            self._uses.subtract(part.own[0] for part in parts)
            self._forget(part for part in parts if self._uses[part.own[0]] == 0)

        return release

    def write(self, block: str, told: Mapping[str, Any]) -> None:
        """Write the tensors of a block that is held, and what is told of it."""
        write_json(self._told(block), told)  # before the shard, which says that it is finished
        parts = self._parts[block]
        own = {n: tensor_of(self.model, n).detach() for part in parts for n in part.own}
        stored = self.conversion.write(parts, own)
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
        size = sum(stored.bytes for stored in self.source.tensors.values())
        write_json(self.target / INDEX, {"metadata": {"total_size": size}, "weight_map": placed})

    def _outside_parts(self) -> Iterator[list[str]]:
        part: list[str] = []
        size = 0
        for name in (name for outside in self._parts[None] for name in outside.stored):
            length = self.source.tensors[name].bytes
            if part and size + length > SHARD_BYTES:
                yield part
                part, size = [], 0
            part.append(name)
            size += length
        if part:
            yield part


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under another name, flush it to the disk, rename it."""
    partial = path.with_name(f".{path.name}.partial")
    # one entry of metadata, which transformers asks for: the order of several is random
    save_file(dict(tensors), partial, {"format": "pt"})
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


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
