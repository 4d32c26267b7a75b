"""What server and clients send each other: active values, masks and their changes, as arrays.

A model is three arrays: the active values of all masked tensors in the order of the masks, the
other floating-point entries of its state (biases, norms, running statistics, dense layers), and
its integers. A mask travels once, as one bit a weight or as indices, whichever is smaller;
afterwards only the positions that changed do. Positions count through all masked tensors laid
end to end.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import described, require
from secateurs.parts.masks import Masks

Arrays = dict[str, Tensor]
State = dict[str, Tensor]

VALUES, DENSE, COUNTERS = "values", "dense", "counters"
BITS, INDICES = "mask-bits", "mask-indices"
DROPPED, GROWN = "dropped", "grown"
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"


@dataclass(frozen=True)
class Layout:
    """Where the entries of a model's state stand in the three arrays.

    Attributes:
        masked, dense, counters: shapes by name, in the order of the state.
        dtype: of the values that are sent.
    """

    masked: Mapping[str, torch.Size]
    dense: Mapping[str, torch.Size]
    counters: Mapping[str, torch.Size]
    dtype: torch.dtype

    @staticmethod
    def of(state: Mapping[str, Tensor], masked: Mapping[str, Any]) -> Layout:
        """The layout of a model's state in which the tensors named in `masked` have masks."""
        floats = {n: t for n, t in state.items() if t.is_floating_point()}
        dtype = reduce(torch.promote_types, (t.dtype for t in floats.values()), torch.float32)
        return Layout(
            {n: floats[n].shape for n in masked},
            {n: t.shape for n, t in floats.items() if n not in masked},
            {n: t.shape for n, t in state.items() if n not in floats},
            dtype,
        )

    @property
    def total(self) -> int:
        """Number of maskable weights."""
        return sum(shape.numel() for shape in self.masked.values())

    @property
    def offsets(self) -> dict[str, int]:
        """Position of the first weight of every masked tensor."""
        sizes = [shape.numel() for shape in self.masked.values()]
        return dict(zip(self.masked, itertools.accumulate([0, *sizes]), strict=False))

    def pack(self, state: Mapping[str, Tensor], masks: Masks) -> Arrays:
        """The arrays of a state; what is masked away is not among them."""
        active = [state[n][masks[n]] for n in self.masked]
        return {VALUES: _joined(active, self.dtype), **self.pack_dense(state)}

    def pack_dense(self, state: Mapping[str, Tensor]) -> Arrays:
        """The entries without masks."""
        arrays = {DENSE: _joined([state[n] for n in self.dense], self.dtype)}
        if self.counters:
            arrays[COUNTERS] = _joined([state[n] for n in self.counters], torch.int64)
        return arrays

    def unpack(self, arrays: Mapping[str, Tensor], masks: Masks) -> State:
        """The inverse of `pack`, with zeros where the masks have none.

        Raises:
            InputError: there are more or fewer values than the masks have room for.
        """
        values = arrays[VALUES]
        shown = described(f"{values.numel()} values")
        require(values.numel() == masks.kept, VALUES, shown, f"{masks.kept}, one a kept weight")
        state, begin = {}, 0
        for name, shape in self.masked.items():
            kept = int(masks[name].sum())
            state[name] = torch.zeros(shape, dtype=values.dtype)
            state[name][masks[name]] = values[begin : begin + kept]
            begin += kept
        return {**state, **self.unpack_dense(arrays)}

    def unpack_dense(self, arrays: Mapping[str, Tensor]) -> State:
        """The inverse of `pack_dense`."""
        state = _taken_apart(arrays[DENSE], self.dense)
        if self.counters:
            state |= _taken_apart(arrays[COUNTERS], self.counters)
        return state

    def flat(self, masks: Mapping[str, Tensor]) -> Tensor:
        """(total,) bool: all masks end to end."""
        return torch.cat([masks[n].reshape(-1).cpu() for n in self.masked])

    def shaped(self, flat: Tensor) -> Masks:
        """The inverse of `flat`."""
        return Masks(_taken_apart(flat, self.masked))

    def pack_mask(self, masks: Masks) -> Arrays:
        """One bit a weight, or the indices of the kept ones; nothing where all are kept."""
        flat = self.flat(masks)
        kept = int(flat.sum())
        if kept == self.total:
            return {}
        if 8 * _index_bytes(self.total) * kept < self.total:
            return {INDICES: self._indices(flat)}
        return {BITS: torch.from_numpy(np.packbits(flat.numpy()))}

    def unpack_mask(self, arrays: Mapping[str, Tensor]) -> Masks:
        """The inverse of `pack_mask`."""
        if INDICES in arrays:
            flat = torch.zeros(self.total, dtype=torch.bool)
            flat[arrays[INDICES].long()] = True
        elif BITS in arrays:
            bits = np.unpackbits(arrays[BITS].numpy(), count=self.total)
            flat = torch.from_numpy(bits.astype(bool))
        else:
            flat = torch.ones(self.total, dtype=torch.bool)
        return self.shaped(flat)

    def pack_change(self, before: Masks, after: Masks) -> Arrays:
        """Positions that were dropped and grown."""
        old, new = self.flat(before), self.flat(after)
        return {DROPPED: self._indices(old & ~new), GROWN: self._indices(new & ~old)}

    def changed(self, masks: Masks, arrays: Mapping[str, Tensor]) -> Masks:
        """Masks after a change."""
        flat = self.flat(masks)
        flat[arrays[DROPPED].long()] = False
        flat[arrays[GROWN].long()] = True
        return self.shaped(flat)

    def positions(self, name: str, indices: Tensor) -> Tensor:
        """Positions of some weights of a tensor, in the integers that are sent."""
        return (indices + self.offsets[name]).to(_index_dtype(self.total))

    def _indices(self, flat: Tensor) -> Tensor:
        return flat.nonzero().flatten().to(_index_dtype(self.total))


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    parts = [t.detach().reshape(-1).to("cpu", dtype) for t in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)


def _taken_apart(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    sizes = [shape.numel() for shape in shapes.values()]
    shown = described(f"{flat.numel()} entries")
    require(flat.numel() == sum(sizes), "message", shown, f"{sum(sizes)}: the model's own")
    parts = flat.split(sizes)
    return {n: part.reshape(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}


def _index_dtype(total: int) -> torch.dtype:
    return torch.int32 if total <= torch.iinfo(torch.int32).max else torch.int64


def _index_bytes(total: int) -> int:
    return _index_dtype(total).itemsize


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the state that `Layout.unpack` made, in the model's own dtypes."""
    model.load_state_dict(dict(state))


def weighted_mean(states: list[State], weights: list[float]) -> State:
    """Mean of every entry, summed in double precision in the order given; integers are rounded.

    Args:
        weights: of the states, such as numbers of samples; they are normalised.
    """
    require(bool(states), "states", described("none"), "at least one")
    total = sum(weights)
    mean = {}
    for name, first in states[0].items():
        summed = sum(
            state[name].double() * (weight / total)
            for state, weight in zip(states, weights, strict=True)
        )
        assert isinstance(summed, Tensor)
        whole = not first.is_floating_point()
        mean[name] = (summed.round() if whole else summed).to(first.dtype)
    return mean


# ---------------------------------------------------------------- as records of Flower


def content(
    arrays: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, int | float] | None = None,
) -> Any:
    """A Flower `RecordDict` of arrays, plain values and numbers."""
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

    records: dict[str, Any] = {}
    if arrays:
        whole = {n: t.detach().cpu().contiguous() for n, t in arrays.items()}
        records[ARRAYS] = ArrayRecord(whole)
    if config:
        records[CONFIG] = ConfigRecord(dict(config))
    if metrics:
        records[METRICS] = MetricRecord(dict(metrics))
    return RecordDict(records)


def arrays_of(record: Any) -> Arrays:
    """The arrays of a message's content, or of a context's state."""
    return dict(record[ARRAYS].to_torch_state_dict()) if ARRAYS in record else {}


def config_of(record: Any) -> dict[str, Any]:
    """The plain values of a message's content."""
    return dict(record[CONFIG]) if CONFIG in record else {}


def metrics_of(record: Any) -> dict[str, Any]:
    """The numbers of a message's content."""
    return dict(record[METRICS]) if METRICS in record else {}


def size_of(record: Any) -> int:
    """Bytes of a message's content as Flower puts it on the wire."""
    from flwr.common.serde import recorddict_to_proto

    return int(recorddict_to_proto(record).ByteSize())
