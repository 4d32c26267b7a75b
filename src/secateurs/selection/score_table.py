"""Narrow tables of (id, group, score), and who is among the best: exact, streaming, stable.

A higher score means keep. Equal scores go by the smaller id, so neither the order of the rows nor
the cuts between shards change an answer. The best are found in two passes: one counts scores into
bins a group, the other keeps what lies above the bin in which the quota ends and sorts only what
lies inside it. Bins are those of a 64-bit integer that orders as the scores do, infinities too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateurs.errors import InputError, described, require
from secateurs.training.order import mix

Array = NDArray[Any]
Order = Literal["hard", "easy", "random"]
"""Which end of a score is kept: the largest, the smallest, or none (by hash of the id)."""
BINS = 1 << 21
"""Of all groups together, at most this many; and at most GROUP_BINS each."""
GROUP_BINS = 1 << 12


@dataclass(frozen=True)
class ScoreTable:
    """Scores in parts, such as one a shard.

    Attributes:
        scores: (n,) a part; higher means keep; NaN marks a row that is out of the question.
        ids: a function from a part's number to its ids, called only where scores are equal.
        groups: (n,) a part, whole numbers from 0; None is one group.
    """

    scores: Sequence[Array]
    ids: Callable[[int], Array]
    groups: Sequence[Array] | None = None

    @staticmethod
    def of(scores: Array, ids: Array | None = None, groups: Array | None = None) -> ScoreTable:
        """A table of one part; ids are row numbers by default."""
        own = np.arange(len(scores)) if ids is None else np.asarray(ids)
        parts = None if groups is None else [np.asarray(groups)]
        return ScoreTable([np.asarray(scores)], lambda part: own, parts)

    @property
    def rows(self) -> int:
        """Rows that can be kept."""
        return sum(int((~np.isnan(part)).sum()) for part in self.scores)

    def sizes(self, groups: int) -> Array:
        """Rows of every group that can be kept, (groups,)."""
        total = np.zeros(groups, np.int64)
        for part in range(len(self.scores)):
            own, there = self._group(part), ~np.isnan(self.scores[part])
            total += np.bincount(own[there], minlength=groups)
        return total

    def largest(self, count: int) -> list[Array]:
        """Bool arrays that are True at exactly `count` of the largest scores of all groups.

        Raises:
            InputError: more than there are.
        """
        return ScoreTable(self.scores, self.ids).largest_per_group(np.array([count]))

    def largest_per_group(self, counts: Array | Sequence[int]) -> list[Array]:
        """Bool arrays, True at exactly ``counts[g]`` of the largest scores of every group g.

        Raises:
            InputError: a group has fewer.
        """
        wanted = np.asarray(counts, dtype=np.int64)
        sizes = self.sizes(len(wanted))
        if (short := np.flatnonzero((wanted > sizes) | (wanted < 0))).size:
            group = int(short[0])
            raise InputError("counts", int(wanted[group]), f"0 to {sizes[group]} in group {group}")
        bins = _Bins.over(self, len(wanted))
        # rows above a bin, of the same group: the quota ends in the first bin from above at
        # which they and its own are enough
        above = np.cumsum(bins.filled[:, ::-1], axis=1)[:, ::-1]
        edge = (above >= wanted[:, None]).sum(axis=1) - 1
        edge = np.where(wanted == 0, bins.count, edge)
        beyond = np.where(edge + 1 < bins.count, np.take_along_axis(
            above, np.minimum(edge + 1, bins.count - 1)[:, None], axis=1)[:, 0], 0)  # fmt: skip
        return self._cut(bins, edge, wanted - np.where(wanted == 0, 0, beyond))

    def largest_with_floor(
        self, count: int, floor: int | Array | Sequence[int], groups: int
    ) -> list[Array]:
        """The `floor` best of every group, or all it has, and the best of the others up to
        `count` in all.

        Raises:
            InputError: the floors alone are more than `count`.

        Source: arXiv 2206.14486 (class balance of pruned sets).
        """
        sizes = self.sizes(groups)
        least = np.minimum(np.broadcast_to(np.asarray(floor), sizes.shape), sizes)
        require(least.sum() <= count, "floor", int(least.sum()), f"at most {count} rows in all")
        reserved = self.largest_per_group(least)
        rest = [np.where(r, np.nan, s) for r, s in zip(reserved, self.scores, strict=True)]
        filled = ScoreTable(rest, self.ids).largest(count - int(least.sum()))
        return [r | f for r, f in zip(reserved, filled, strict=True)]

    def _cut(self, bins: _Bins, edge: Array, left: Array) -> list[Array]:
        """The second pass: all above the edge bins, and the best `left` rows inside them."""
        keep, inside = [], []
        for part, scores in enumerate(self.scores):
            there = ~np.isnan(scores)
            group = self._group(part)
            place = bins.place(ordered(scores), group)
            keep.append(there & (place > edge[group]))
            rows = np.flatnonzero(there & (place == edge[group]))
            if rows.size:
                inside.append((np.full(rows.size, part), rows, group[rows], scores[rows],
                               self.ids(part)[rows]))  # fmt: skip
        if inside:
            parts, rows, group, scores, ids = (np.concatenate(c) for c in zip(*inside, strict=True))
            order = np.lexsort((ids, np.negative(scores, dtype=np.float64), group))
            sorted_group = group[order]
            rank = np.arange(order.size) - np.searchsorted(sorted_group, sorted_group)
            for row in order[rank < left[sorted_group]]:
                keep[parts[row]][rows[row]] = True
        return keep

    def _group(self, part: int) -> Array:
        if self.groups is None:
            return np.zeros(len(self.scores[part]), np.int64)
        return self.groups[part]


@dataclass(frozen=True)
class _Bins:
    """Of every group, how many scores lie in which bin.

    Attributes:
        low: (groups,), the least key.
        shift: (groups,), bits of (key − low) that a bin does not tell.
        filled: (groups, bins).
    """

    low: Array
    shift: Array
    filled: Array

    @property
    def count(self) -> int:
        return int(self.filled.shape[1])

    @staticmethod
    def over(table: ScoreTable, groups: int) -> _Bins:
        """Count the scores of a table."""
        bins = int(min(GROUP_BINS, max(16, BINS // max(groups, 1))))
        low = np.full(groups, np.iinfo(np.uint64).max, np.uint64)
        high = np.zeros(groups, np.uint64)
        parts = range(len(table.scores))
        for part in parts:
            there = ~np.isnan(table.scores[part])
            keys, group = ordered(table.scores[part][there]), table._group(part)[there]
            np.minimum.at(low, group, keys)
            np.maximum.at(high, group, keys)
        span = np.where(high >= low, high - np.minimum(low, high), 0).astype(np.uint64)
        bits = np.array([int(s).bit_length() for s in span], np.int64)
        shift = np.maximum(bits - (bins.bit_length() - 1), 0).astype(np.uint64)
        made = _Bins(low, shift, np.zeros((groups, bins), np.int64))
        for part in parts:
            there = ~np.isnan(table.scores[part])
            group = table._group(part)[there]
            place = made.place(ordered(table.scores[part][there]), group)
            flat = np.bincount(group.astype(np.int64) * bins + place, minlength=groups * bins)
            np.add(made.filled, flat.reshape(groups, bins), out=made.filled)
        return made

    def place(self, keys: Array, group: Array) -> Array:
        """The bin of every key, (n,); of what is below the least key (NaN), any."""
        above = np.maximum(keys, self.low[group]) - self.low[group]
        found: Array = np.minimum(above >> self.shift[group], self.count - 1).astype(np.int64)
        return found


def ordered(scores: Array) -> Array:
    """A uint64 each that orders as the scores do; both zeros are the same."""
    bits = (scores.astype(np.float64) + 0.0).view(np.uint64)
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(1 << 63))


def hashed(ids: Array, seed: int = 0) -> Array:
    """A uint64 each that depends on the id and the seed alone (SplitMix64), (n,).

    Ids are whole numbers or strings; strings go through BLAKE2b first.
    """
    if ids.dtype.kind in "iub":
        keys = ids.astype(np.int64).view(np.uint64).copy()
    elif ids.dtype.kind in "UOS":
        from hashlib import blake2b

        digests = b"".join(blake2b(str(i).encode(), digest_size=8).digest() for i in ids.tolist())
        keys = np.frombuffer(digests, np.uint64).copy()
    else:
        raise InputError("ids", described(str(ids.dtype)), "whole numbers or strings")
    keys ^= np.uint64(mix(seed))
    with np.errstate(over="ignore"):
        keys += np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ keys >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ keys >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    found: Array = keys ^ keys >> np.uint64(31)
    return found


def random_scores(ids: Array, seed: int) -> Array:
    """A score in [0, 1) for every id, the same wherever the row stands."""
    return (hashed(ids, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def towards(scores: Array, ids: Callable[[], Array], order: Order, seed: int) -> Array:
    """Scores whose largest are kept, of scores of which the `order` end is kept."""
    if order == "random":
        return np.where(np.isnan(scores), np.nan, random_scores(ids(), seed))
    return scores if order == "hard" else -scores
