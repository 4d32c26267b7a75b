"""Fine-tuned weights as a sparse difference to their base: one small file, merged back exactly.

Where a difference d is stored, a merged weight is

    round( wide(base) + wide(d) ),

added in float32 (float64 where a weight or d is float64) and rounded once to the dtype of the
fine-tuned tensor. Whoever makes a delta computes its weights by the same line (`Entries.on`), so
the two agree bit for bit. Not every weight is such a sum: next to a base of 0.5 a weight of 1e-9
has no difference in float32 that leads to it. Where a weight is to be met exactly, the few sums
that miss it are stored beside (`Entries.corrections`).

A file is safetensors: per tensor the values, and where they belong as one bit a position or as
int32 indices, whichever is smaller; a JSON header names the base by a hash. No pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from secateurs.errors import InputError, described, require
from secateurs.parts.deltas import same_bits, widened
from secateurs.parts.masks import Masks
from secateurs.state import read_tensors, write_tensors

DELTA = "delta.safetensors"
FORMAT = 1
SHOWN = 12
"""Hexadecimal digits of a hash that people see."""


def base_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a state dict, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Entries:
    """Differences at some entries of one tensor.

    Attributes:
        mask: bool, of the shape of the base's tensor; True where a difference is stored.
        values: the differences, 1-D, in reading order.
        dtype: of the merged tensor.
        missed: bool, 1-D, over the values: sums that miss the weight they should be.
        corrections: those weights, 1-D.
    """

    mask: Tensor
    values: Tensor
    dtype: torch.dtype
    missed: Tensor
    corrections: Tensor

    @staticmethod
    def of(
        base: Tensor,
        mask: Tensor,
        values: Tensor,
        dtype: torch.dtype,
        target: Tensor | None = None,
    ) -> Entries:
        """Differences to a base.

        Args:
            base: the base's tensor.
            mask: bool, of its shape.
            values: 1-D, a difference for every True.
            dtype: of the merged tensor.
            target: 1-D, what the merged weights have to be exactly; None takes what the sums
                give.
        """
        if target is None:
            missed = torch.zeros_like(values, dtype=torch.bool)
            return Entries(mask, values, dtype, missed, values.new_zeros(0, dtype=dtype))
        sums = _sums(base[mask], values, dtype)
        missed = _bits(sums) != _bits(target.to(dtype))
        return Entries(mask, values, dtype, missed, target.to(dtype)[missed])

    def on(self, base: Tensor) -> Tensor:
        """The merged tensor."""
        here = self.to(base.device)
        sums = _sums(base[here.mask], here.values, self.dtype)
        sums[here.missed] = here.corrections
        merged = base.to(self.dtype, copy=True)
        merged[here.mask] = sums
        return merged

    def difference(self, base: Tensor) -> Tensor:
        """What is added to the base, dense, in float64."""
        here = self.to(base.device)
        values = here.values.double()
        values[here.missed] = here.corrections.double() - base[here.mask][here.missed].double()
        dense = torch.zeros_like(base, dtype=torch.float64)
        dense[here.mask] = values
        return dense

    def to(self, device: torch.device) -> Entries:
        """The same on a device."""
        return Entries(
            self.mask.to(device), self.values.to(device), self.dtype,
            self.missed.to(device), self.corrections.to(device),
        )  # fmt: skip


def _sums(base: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    wide = widened(base.dtype, values.dtype)
    return (base.to(wide) + values.to(wide)).to(dtype)


def _bits(tensor: Tensor) -> Tensor:
    """The bits of floats as integers: -0.0 is not 0.0 there."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


@dataclass(frozen=True)
class SparseDelta:
    """All that leads from a base to a model.

    Attributes:
        base: hash of the base's weights (`base_hash`).
        entries: differences by tensor.
        whole: tensors taken as they are, such as a task's own head.
        rows: rows that follow the base's, such as the embeddings of added tokens.
        tied: names of tensors that are another one's; they follow it.
        method, options, seed: what made it.
        p: drop rate.
        q: what the differences were divided by, one number or one a tensor.
    """

    base: str
    entries: dict[str, Entries]
    whole: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    p: float = 0.0
    q: float | dict[str, float] = 1.0

    @property
    def kept(self) -> int:
        """Number of differences."""
        return sum(e.values.numel() for e in self.entries.values())

    @property
    def total(self) -> int:
        """Number of entries of the tensors that have differences."""
        return sum(e.mask.numel() for e in self.entries.values())

    @property
    def file_bytes(self) -> int:
        """Size of the file that `save_delta` writes."""
        tensors, metadata = packed(self)
        return len(serialize(tensors, metadata=metadata))

    def __repr__(self) -> str:
        return (
            f"SparseDelta({self.kept} of {self.total} differences kept, "
            f"{len(self.whole)} tensors whole, over {self.base[:SHOWN]})"
        )


# ---------------------------------------------------------------- merging


def merge(
    base_state: Mapping[str, Tensor], deltas: SparseDelta | Sequence[SparseDelta]
) -> dict[str, Tensor]:
    """The state dict of a base with one delta, or with the sum of several.

    With one delta the weights are, bit for bit, those it was made of. Several are added in
    float64 and rounded once; a tensor that one of them has whole counts as its difference to
    the base.

    Returns:
        New tensors, on the devices of the base.

    Raises:
        InputError: no delta; a delta over another base (both hashes are named); two deltas that
            disagree about what has no difference: added rows, new tensors, integers.
    """
    several = [deltas] if isinstance(deltas, SparseDelta) else list(deltas)
    require(bool(several), "deltas", [], "at least one delta")
    own = base_hash(base_state)
    for delta in several:
        if delta.base != own:
            raise InputError(
                "delta",
                described(f"a delta over the base {delta.base[:SHOWN]}"),
                f"a delta over this base, {own[:SHOWN]}",
            )
    names = list(dict.fromkeys([*base_state, *(n for d in several for n in d.whole)]))
    merged = {name: _merged(name, base_state.get(name), several) for name in names}
    for delta in several:
        merged |= {name: merged[first].clone() for name, first in delta.tied.items()}
    return merged


def _merged(name: str, base: Tensor | None, deltas: Sequence[SparseDelta]) -> Tensor:
    touching = [d for d in deltas if name in d.entries or name in d.whole or name in d.rows]
    if len(touching) == 1:
        return _alone(name, base, touching[0])
    if not touching:
        assert base is not None
        return base.detach().clone()
    if base is not None and base.is_floating_point() and _summable(name, base, touching):
        return _summed(name, base, touching)
    first, *others = (_alone(name, base, d) for d in touching)
    for other in others:
        if not same_bits(first, other):
            raise InputError(
                "deltas",
                described(f"several that replace {name!r} or add rows to it, each in its own way"),
                "at most one that does",
            )
    return first


def _alone(name: str, base: Tensor | None, delta: SparseDelta) -> Tensor:
    if name in delta.whole:
        whole = delta.whole[name].clone()
        return whole if base is None else whole.to(base.device)
    assert base is not None
    merged = delta.entries[name].on(base) if name in delta.entries else base.detach().clone()
    if name in delta.rows:
        merged = torch.cat([merged, delta.rows[name].to(merged)])
    return merged


def _summable(name: str, base: Tensor, deltas: Sequence[SparseDelta]) -> bool:
    """Whether every delta says of a tensor what has to be added to the base's."""
    return all(
        name not in d.rows and (name not in d.whole or d.whole[name].shape == base.shape)
        for d in deltas
    )


def _summed(name: str, base: Tensor, deltas: Sequence[SparseDelta]) -> Tensor:
    total, dtype = base.double(), base.dtype
    for delta in deltas:
        if name in delta.whole:
            whole = delta.whole[name].to(base.device)
            total, dtype = total + (whole.double() - base.double()), whole.dtype
        else:
            entries = delta.entries[name]
            total, dtype = total + entries.difference(base), entries.dtype
    return total.to(dtype)


def shared_seeds(deltas: Sequence[SparseDelta]) -> list[int]:
    """Seeds that several random deltas have in common: what they keep is in the same places."""
    seeds = [d.seed for d in deltas if d.options.get("criterion") == "random"]
    return sorted({seed for seed in seeds if seeds.count(seed) > 1})


# ---------------------------------------------------------------- the file


def save_delta(path: str | Path, delta: SparseDelta) -> Path:
    """Write a delta to one file, under another name first and then renamed."""
    tensors, metadata = packed(delta)
    write_tensors(Path(path), tensors, metadata)
    return Path(path)


def load_delta(path: str | Path) -> SparseDelta:
    """Read what `save_delta` wrote.

    Args:
        path: a file, or the folder of a run or of a saved outcome that holds one.

    Raises:
        InputError: no such file, not a delta, truncated, or a newer format.
    """
    file = delta_path(Path(path))
    tensors, metadata = read_tensors(file)
    if "delta" not in metadata:
        raise InputError("delta", str(file), "a delta as secateurs.save writes it")
    try:
        return unpacked(tensors, json.loads(metadata["delta"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("delta", str(file), f"a whole delta ({error!r})") from None


def delta_path(path: Path) -> Path:
    """The delta of a folder; a file is itself."""
    if not path.is_dir():
        return path
    for candidate in (path / DELTA, path / "outcome" / DELTA):
        if candidate.is_file():
            return candidate
    raise InputError("delta", str(path), f"a folder with {DELTA}, or such a file")


def packed(delta: SparseDelta) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a delta's file."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, entries in delta.entries.items():
        tensors[f"values/{name}"] = entries.values.detach().cpu()
        about[name] = {
            "shape": list(entries.mask.shape),
            "dtype": _dtype_name(entries.dtype),
            "places": _pack_places(tensors, f"places/{name}", entries.mask),
        }
        if entries.corrections.numel():
            tensors[f"corrections/{name}"] = entries.corrections.detach().cpu()
            about[name]["missed"] = _pack_places(tensors, f"missed/{name}", entries.missed)
    for kind in ("whole", "rows"):
        for name, tensor in getattr(delta, kind).items():
            tensors[f"{kind}/{name}"] = tensor.detach().cpu().contiguous()
    dtypes = sorted({_dtype_name(e.values.dtype) for e in delta.entries.values()})
    header = {
        "format": FORMAT, "base": delta.base, "method": delta.method, "options": delta.options,
        "seed": delta.seed, "p": delta.p, "q": delta.q, "dtype": dtypes, "tensors": about,
        "tied": delta.tied,
    }  # fmt: skip
    return tensors, {"delta": json.dumps(header)}


def unpacked(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> SparseDelta:
    """The delta of a file's tensors and header."""
    if header["format"] > FORMAT:
        raise InputError("delta", described(f"format {header['format']}"), f"up to {FORMAT}")
    entries = {}
    for name, about in header["tensors"].items():
        values, dtype = tensors[f"values/{name}"], _dtype_named(about["dtype"])
        mask = _unpack_places(tensors[f"places/{name}"], about["places"], about["shape"])
        _check_count(name, mask, values)
        missed = torch.zeros(values.numel(), dtype=torch.bool)
        corrections = values.new_zeros(0, dtype=dtype)
        if "missed" in about:
            missed = _unpack_places(tensors[f"missed/{name}"], about["missed"], [values.numel()])
            corrections = tensors[f"corrections/{name}"]
            _check_count(name, missed, corrections)
        entries[name] = Entries(mask, values, dtype, missed, corrections)
    plain = {key: header[key] for key in ("base", "method", "options", "seed", "p", "q", "tied")}
    return SparseDelta(
        entries=entries, whole=_below("whole/", tensors), rows=_below("rows/", tensors), **plain
    )


def _check_count(name: str, places: Tensor, values: Tensor) -> None:
    if int(places.sum()) != values.numel():
        shown = described(f"{values.numel()} values for {int(places.sum())} places")
        raise InputError(f"delta {name}", shown, "a value for every place")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _pack_places(tensors: dict[str, Tensor], key: str, mask: Tensor) -> str:
    """Put places in the smaller of two forms under a key; which one it is."""
    flat = mask.detach().cpu().reshape(-1)
    as_bits = -(-flat.numel() // 8) <= 4 * int(flat.sum()) or flat.numel() > 2**31
    if as_bits:
        tensors[key] = Masks({key: flat}).pack()[key]
        return "bits"
    tensors[key] = flat.nonzero().reshape(-1).to(torch.int32)
    return "indices"


def _unpack_places(stored: Tensor, form: str, shape: Sequence[int]) -> Tensor:
    if form == "bits":
        return Masks.unpack({"places": stored}, {"places": tuple(shape)})["places"]
    mask = torch.zeros(shape, dtype=torch.bool)
    inside = not stored.numel() or 0 <= int(stored.min()) <= int(stored.max()) < mask.numel()
    require(inside, "delta", described("indices beyond the tensor"), f"below {mask.numel()}")
    mask.view(-1)[stored.long()] = True
    return mask


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise InputError("delta", name, "a dtype of torch")
    return dtype
