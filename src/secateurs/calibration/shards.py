"""A checkpoint that stays on disk: safetensors shards in, pruned shards out.

The model is made without memory for its weights; one block at a time is read, pruned, written
to a shard of its own and forgotten. Modules outside of blocks (embeddings, the patch projection)
hold their weights only while they run. A shard appears whole or not at all, so what is there is
finished: a killed run goes on at the block it died in, and writes the same bytes. The index
comes last; until then the folder is no checkpoint for anybody.

Tensors in the files are named as in the model's state dict; a tied one stands in them once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from secateurs.calibration.blocks import find_blocks, owner_of
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
        self._names: dict[str, list[str]] = {}
        """Stored tensor -> all names that the model has for it."""
        self._uses: Counter[str] = Counter()
        self._check_names()

    def _check_names(self) -> None:
        state = self.model.state_dict(keep_vars=True)
        holders: dict[int, list[str]] = {}
        for name, tensor in state.items():
            holders.setdefault(id(tensor), []).append(name)
        for names in holders.values():
            stored = [name for name in names if name in self.source.tensors]
            if not stored:
                shown = described(f"no tensor {names[0]}")
                raise InputError("checkpoint", shown, "the tensors of the model's state dict")
            self._names[stored[0]] = names
        for name, stored_tensor in self.source.tensors.items():
            if name not in state:
                raise InputError("checkpoint", name, "tensors that the model has")
            own, shape = tuple(state[name].shape), stored_tensor.shape
            require(own == shape, f"checkpoint {name}", described(f"shape {shape}"), f"{own}")

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

    def _own(self, block: str) -> list[str]:
        return [n for n in self._names if owner_of(n, self.blocks) == block]

    def _load(self, block: str) -> None:
        names = self._own(block)
        if self.wanted(block):
            tensors = self.source.read(names)
            check_finite({n: t for n, t in tensors.items() if t.is_floating_point()})
        else:
            with safetensors.safe_open(self.shard(block), framework="pt") as opened:
                tensors = {n: opened.get_tensor(n).clone() for n in names}
        for name, tensor in tensors.items():
            self._place(name, tensor)

    def _release(self, block: str) -> None:
        for name in self._own(block):
            self._forget(name)

    def _place(self, name: str, tensor: Tensor) -> None:
        place(self.model, self._names[name], tensor)

    def _forget(self, name: str) -> None:
        self._place(name, tensor_of(self.model, name).to("meta"))

    @contextmanager
    def outside_on_demand(self) -> Iterator[None]:
        """Modules outside of blocks hold their own tensors while they run, and only then."""
        used: dict[str, list[str]] = {}
        for stored, names in self._names.items():
            for name in names if owner_of(stored, self.blocks) is None else ():
                used.setdefault(name.rpartition(".")[0], []).append(stored)
        with ExitStack() as hooks:
            for path, tensors in used.items():
                module = self.model.get_submodule(path)
                before = module.register_forward_pre_hook(self._loading(tensors))
                after = module.register_forward_hook(self._releasing(tensors), always_call=True)
                hooks.callback(before.remove)
                hooks.callback(after.remove)
            yield

    def _loading(self, names: Sequence[str]) -> Callable[..., None]:
        def load(*_: Any) -> None:
            missing = [name for name in names if self._uses[name] == 0]
            for name, tensor in self.source.read(missing).items():
                self._place(name, tensor)
            self._uses.update(names)

        return load

    def _releasing(self, names: Sequence[str]) -> Callable[..., None]:
        def release(*_: Any) -> None:
            self._uses.subtract(names)
            for name in names:
                if self._uses[name] == 0:
                    self._forget(name)

        return release

    def write(self, block: str, told: Mapping[str, Any]) -> None:
        """Write the tensors of a block that is held, and what is told of it."""
        write_json(self._told(block), told)  # before the shard, which says that it is finished
        tensors = {n: tensor_of(self.model, n).detach().contiguous() for n in self._own(block)}
        write_shard(self.shard(block), tensors)

    def told(self, block: str) -> dict[str, Any]:
        """What was told of a finished block."""
        found: dict[str, Any] = json.loads(self._told(block).read_text())
        return found

    def _told(self, block: str) -> Path:
        return self.target / PROGRESS / self.shard(block).with_suffix(".json").name

    def finish(self) -> None:
        """Copy what is outside of blocks and all other files; the index comes last."""
        placed = {n: self.shard(b).name for b in self.blocks for n in self._own(b)}
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
        for name in self._names:
            if owner_of(name, self.blocks) is not None:
                continue
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
