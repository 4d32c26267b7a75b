"""Tensors out of a file of `torch.save` (its form before 1.6), without unpickling anything.

The file is five pickles, the fourth being a state dict that names storages and the fifth the
storages' order, then of each storage the number of its elements and their bytes. The pickles are
only disassembled, to see where they end and in which order storages are named: no object is made
and no code of the file is run.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import InputError, described

PICKLES = 5
_DTYPES = {torch.float32: np.float32, torch.int64: np.int64}


def read_tensors_like(path: Path, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a file in its order, in the shapes and dtypes of `like`.

    Args:
        like: float32 or int64, each in a storage of its own.

    Raises:
        InputError: another number of tensors, other sizes, or another form of file.
    """
    stream = io.BytesIO(path.read_bytes())
    try:
        operations = [list(pickletools.genops(stream)) for _ in range(PICKLES)]
    except ValueError:
        raise InputError("file", str(path), "tensors as torch.save wrote them before 1.6") from None
    strides = _strides(operations[3])
    named = list(strides)
    order = [text for _, text, _ in operations[4] if isinstance(text, str)]
    if len(named) != len(like) or sorted(named) != sorted(order):
        shown = described(f"{len(named)} tensors in {len(order)} storages")
        raise InputError(f"file {path.name}", shown, f"{len(like)}, each in one of its own")
    wanted = dict(zip(named, like, strict=True))
    found: dict[str, Tensor] = {}
    for key in order:
        one = wanted[key]
        count = int.from_bytes(stream.read(8), "little")
        data = stream.read(count * one.element_size())
        if count != one.numel() or len(data) != count * one.element_size():
            shown = described(f"{count} elements, {len(data)} bytes of them")
            raise InputError(f"file {path.name}", shown, f"{one.numel()} of {one.dtype}")
        if strides[key][: one.ndim + 1] != [0, *one.shape]:
            shown = described(f"a tensor at {strides[key]}")
            raise InputError(f"file {path.name}", shown, f"shape {tuple(one.shape)}")
        values = torch.from_numpy(np.frombuffer(data, _DTYPES[one.dtype]).copy())
        found[key] = values.as_strided(one.shape, strides[key][one.ndim + 1 :]).contiguous()
    return [found[key] for key in named]


def _strides(
    operations: Sequence[tuple[pickletools.OpcodeInfo, object, int | None]],
) -> dict[str, list[int]]:
    """By storage, in the order of a pickled state dict: offset, sizes and strides of its tensor."""
    found: dict[str, list[int]] = {}
    number, numbers = "", []
    for opcode, argument, _ in operations:
        if isinstance(argument, str) and argument.isdigit():
            number = argument
        if opcode.name == "BINPERSID":  # storage number `number`; its tensor is described next
            numbers = found[number] = []
        if opcode.name in ("BININT", "BININT1", "BININT2", "LONG1") and isinstance(argument, int):
            numbers.append(argument)
        if opcode.name in ("NEWFALSE", "NEWTRUE"):
            numbers = []
    return found
