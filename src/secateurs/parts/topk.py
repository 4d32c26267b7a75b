"""Exact selection of the largest scores over many tensors, ties broken by position.

Nothing is concatenated and nothing is sorted whole. For large inputs a sample of the scores
brackets the wanted one; one pass counts what lies above the bracket and gathers what lies
inside it, and the exact answer is found among the few gathered. Memory beyond the input is a
few chunks and, for n scores, a small multiple of n^(2/3).

The tie rule: among equal scores, the earlier tensor and the lower index in it are kept first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from secateurs.errors import require

Transform = Callable[[Tensor], Tensor]
_Comparison = Callable[..., Tensor]

SMALL = 1 << 17
"""Up to this many scores are simply put side by side."""
SAMPLED = 2 / 3
"""A sample of n^SAMPLED scores; at 2/3 the sample and what it leaves to gather grow alike."""
SPREADS = (3.0, 12.0)
"""Half-widths of the brackets to try, in standard deviations of a rank in the sample."""
GATHERED = 16
"""Up to this many times the size of the sample is gathered; 3 times is usual."""
CHUNK = 1 << 20
"""Scores read at once on a CPU, to stay in its cache; an accelerator reads 16 times as many."""
WORD = 8
"""Bytes of a mask that are looked at as one integer when few of them are set."""
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class Cut:
    """Where to cut: keep all scores above `value` and the first `ties` that equal it."""

    value: float
    ties: int


def identity(scores: Tensor) -> Tensor:
    """The scores as they are."""
    return scores


def find_cut(tensors: Sequence[Tensor], keep: int, transform: Transform = identity) -> Cut:
    """The score of rank `keep` (1 = largest) over all `tensors`, exactly.

    Args:
        tensors: floating point, of any shapes, layouts and devices. A NaN has no rank: callers
            check for it, this function does not.
        keep: how many to keep, 0 to the number of elements.
        transform: applied chunk by chunk, so it has to work element by element, such as
            `torch.abs` for magnitudes.
    """
    total = sum(t.numel() for t in tensors)
    require(0 <= keep <= total, "keep", keep, f"0 to {total}")
    if keep == 0:
        return Cut(math.inf, 0)
    scores = _Scores(tensors, transform)
    if total <= SMALL:
        return _cut_side_by_side(scores, keep)
    return _cut_by_sample(scores, keep) or _cut_by_halving(scores, keep)


def select_largest(
    tensors: Sequence[Tensor], keep: int, transform: Transform = identity
) -> list[Tensor]:
    """Bool tensors that are True at exactly `keep` of the largest scores."""
    cut = find_cut(tensors, keep, transform)
    return masks_above(tensors, cut, transform)


def masks_above(
    tensors: Sequence[Tensor], cut: Cut, transform: Transform = identity
) -> list[Tensor]:
    """The masks that a `Cut` describes, contiguous; beyond them it takes only a few chunks."""
    scores = _Scores(tensors, transform, _dtype_holding(cut.value))
    masks, ties = [], cut.ties
    for tensor in tensors:
        mask = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device)
        rest = mask.view(-1)
        for desk in scores.read(tensor):
            part, rest = rest[: desk.filled], rest[desk.filled :]
            part.copy_(desk.compare(torch.gt, cut.value)[: desk.filled])
            if ties > 0:
                first = desk.compare(torch.eq, cut.value).nonzero().view(-1)[:ties]
                part[first] = True
                ties -= len(first)
        masks.append(mask)
    return masks


def _cut_side_by_side(scores: _Scores, keep: int) -> Cut:
    """The cut among so few scores that they can be copied."""
    flat = scores.side_by_side()
    value = flat.kthvalue(len(flat) - keep + 1).values.item()
    return Cut(value, keep - int((flat > value).sum()))


def _cut_by_sample(scores: _Scores, keep: int) -> Cut | None:
    """The cut, found where a sample tells that it should be; None if the sample misled."""
    sample = scores.sample(math.ceil(scores.total**SAMPLED))
    for spread in SPREADS:
        low, high = _bracket(sample, keep / scores.total, spread)
        cut = _cut_in_bracket(scores, keep, low, high, GATHERED * len(sample))
        if cut is not None:
            return cut
    return None


def _bracket(sample: Tensor, share: float, spread: float) -> tuple[float, float]:
    """Two scores; the one that has the `share` above it is very likely between them."""
    rank = len(sample) * share
    margin = spread * (1 + math.sqrt(rank * (1 - share)))
    upper, lower = math.floor(rank - margin), math.ceil(rank + margin)
    high = find_cut([sample], upper).value if upper >= 1 else math.inf
    low = find_cut([sample], lower).value if lower <= len(sample) else -math.inf
    return low, high


def _cut_in_bracket(scores: _Scores, keep: int, low: float, high: float, most: int) -> Cut | None:
    """The cut if it is between `low` and `high`, where `most` scores may lie, or at one of them.

    Scores equal to an end are counted but never gathered, which bounds the memory under heavy
    ties: a value that would fill the bracket is so frequent in the sample that it is an end.
    """
    if low == high:
        return _cut_at(scores, keep, low)
    split = scores.split(low, high, min(most, scores.total // 2))
    if split is None:
        return None
    reached, inside = split
    if reached < keep <= reached + len(inside):
        return find_cut([inside], keep - reached)
    return _cut_at(scores, keep, high if keep <= reached else low)


def _cut_at(scores: _Scores, keep: int, value: float) -> Cut | None:
    """The cut if it is at `value`."""
    above = scores.count(torch.gt, value)
    reached = scores.count(torch.ge, value)
    return Cut(value, keep - above) if above < keep <= reached else None


def _cut_by_halving(scores: _Scores, keep: int) -> Cut:
    """The cut by halving the range of all floats: many passes, but sure for any scores."""
    high = _place_of_infinity(scores.dtype)
    low = -high
    while low < high:
        middle = (low + high) // 2
        if scores.count(torch.gt, _float_at(middle, scores.dtype)) < keep:
            high = middle
        else:
            low = middle + 1
    value = _float_at(low, scores.dtype)
    return Cut(value, keep - scores.count(torch.gt, value))


class _Scores:
    """The scores of many tensors in one dtype that holds them all, read chunk by chunk."""

    def __init__(
        self, tensors: Sequence[Tensor], transform: Transform, least: torch.dtype = torch.float32
    ) -> None:
        self._tensors = [t.detach() for t in tensors if t.numel() > 0]
        self._transform = transform
        self._desks: dict[torch.device, _Desk] = {}
        dtypes = (transform(t.new_empty(0)).dtype for t in self._tensors)
        self.dtype = reduce(torch.promote_types, dtypes, least)
        self.total = sum(t.numel() for t in self._tensors)

    def side_by_side(self) -> Tensor:
        """All of them, flat, in reading order."""
        return self._joined(self._transform(t.reshape(-1)) for t in self._tensors)

    def sample(self, size: int) -> Tensor:
        """One out of each of `size` equal stretches, drawn the same way every time."""
        with torch.device("cpu"):
            draws = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.double)
            places = (draws + torch.arange(size)).mul_(self.total / size).long()
            places.clamp_(max=self.total - 1)
            sizes = torch.tensor([t.numel() for t in self._tensors])
            stops = sizes.cumsum(0)
            shares = places.tensor_split(torch.searchsorted(places, stops[:-1]))
        starts = (stops - sizes).tolist()
        return self._joined(
            self._transform(tensor.take((share - start).to(tensor.device)))
            for tensor, share, start in zip(self._tensors, shares, starts, strict=True)
        )

    def count(self, comparison: _Comparison, value: float) -> int:
        """How many compare like that with `value`."""
        return sum(int(desk.compare(comparison, value).sum()) for desk in self._all())

    def split(self, low: float, high: float, most: int) -> tuple[int, Tensor] | None:
        """How many reach `high`, and those strictly between; None if these are over `most`."""
        reached, inside, room = 0, [], most
        for desk in self._all():
            count, found = desk.split(low, high)
            reached, room = reached + count, room - len(found)
            if room < 0:
                return None
            inside.append(found)
        return reached, self._joined(inside)

    def read(self, tensor: Tensor) -> Iterator[_Desk]:
        """The desk on the tensor's device, with one chunk after the other laid on it."""
        desk = self._desk_on(tensor.device)
        for chunk in _chunks(tensor.detach(), desk.size):
            desk.lay(chunk, self._transform)
            yield desk

    def _all(self) -> Iterator[_Desk]:
        return chain.from_iterable(map(self.read, self._tensors))

    def _desk_on(self, device: torch.device) -> _Desk:
        if device not in self._desks:
            most = CHUNK if device.type == "cpu" else CHUNK << 4
            largest = max((t.numel() for t in self._tensors if t.device == device), default=0)
            self._desks[device] = _Desk(min(most, largest), self.dtype, device)
        return self._desks[device]

    def _joined(self, parts: Iterable[Tensor]) -> Tensor:
        """Few scores side by side, on the CPU, where that is fast and always deterministic."""
        return torch.cat([part.to("cpu", self.dtype) for part in parts])


class _Desk:
    """Room on one device for a chunk of scores and its comparisons, made once for all chunks.

    The chunk is padded to whole words with NaN, for which no comparison holds.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        words = -(-size // WORD)
        self.size = size
        self.filled = 0
        self._scores = torch.empty(words * WORD, dtype=dtype, device=device)
        self._answers = torch.empty_like(self._scores)
        self._reached = torch.empty_like(self._scores, dtype=torch.bool)
        self._inside = torch.empty_like(self._reached)

    def lay(self, chunk: Tensor, transform: Transform) -> None:
        """Put the scores of a chunk on the desk."""
        self.filled = chunk.numel()
        scores = self._scores[: self.filled].view(chunk.shape)
        if transform is torch.abs and chunk.dtype == scores.dtype:
            torch.abs(chunk, out=scores)  # the usual case, spared the allocation of a result
        else:
            scores.copy_(transform(chunk))
        self._scores[self.filled : self._padded].fill_(math.nan)

    def compare(self, comparison: _Comparison, value: float) -> Tensor:
        """1.0 where the scores compare like that with `value`, 0.0 elsewhere and in the padding.

        Into floats a comparison is several times faster than into bools, and so is their sum,
        which is exact for chunks of up to 2^24.
        """
        return comparison(self._scores[: self._padded], value, out=self._answers[: self._padded])

    def split(self, low: float, high: float) -> tuple[int, Tensor]:
        """How many scores reach `high`, and those strictly between `low` and `high`."""
        answers = self.compare(torch.ge, high)
        count = int(answers.sum())
        reached = self._reached[: self._padded].copy_(answers)
        inside = self._inside[: self._padded].copy_(self.compare(torch.gt, low))
        return count, self._picked(inside.bitwise_xor_(reached))

    def _picked(self, mask: Tensor) -> Tensor:
        """The scores under a sparse mask: its few words that are not zero are found first."""
        words = mask.view(torch.int64).nonzero().view(-1)
        scores = self._scores[: self._padded].view(-1, WORD)
        return scores.index_select(0, words)[mask.view(-1, WORD).index_select(0, words)]

    @property
    def _padded(self) -> int:
        return -(-self.filled // WORD) * WORD


def _chunks(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """Views of up to `size` elements that together are the tensor, in reading order."""
    if tensor.numel() == 0:
        return
    if tensor.numel() <= size:
        yield tensor
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), size)
    else:
        axis = next(axis for axis, length in enumerate(tensor.shape) if length > 1)
        for half in tensor.chunk(2, axis):
            yield from _chunks(half, size)


def _dtype_holding(value: float) -> torch.dtype:
    """The dtype to compare low precision scores in, so that `value` is not rounded to theirs."""
    rounded = torch.tensor(value, dtype=torch.float32).item()
    return torch.float32 if rounded == value else torch.float64


def _float_at(place: int, dtype: torch.dtype) -> float:
    """The float at a place in the order of all floats of that dtype, 0.0 being at 0."""
    magnitude = torch.tensor(abs(place), dtype=_BITS[dtype]).view(dtype).item()
    return math.copysign(magnitude, place)


def _place_of_infinity(dtype: torch.dtype) -> int:
    return int(torch.tensor(math.inf, dtype=dtype).view(_BITS[dtype]).item())
