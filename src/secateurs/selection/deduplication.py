"""SemDeDup: of rows that mean the same, one is kept.

Rows are clustered; within a cluster they are ordered by the distance to its centre, and a row is
a duplicate iff an earlier one, removed or not, is nearer than ε in cosine:

    M_i = max_{j < i} ⟨e_i, e_j⟩,    removed iff M_i > 1 − ε.

Source: arXiv 2303.09540 and its code. In a cluster larger than a piece a row is compared with as
many rows before it as a piece has, so the cost is linear in the rows; the code cuts such clusters
into pieces, compared each in itself. Near duplicates are about as far from the centre, hence near
each other in that order, but not always near enough.

Measured: 10,000 pairs in one cluster of 20,000 random rows of 64 numbers, so that nothing but the
order brings pairs together; found of pairs of cosine 0.9999, 0.997 and 0.992:

    cut into pieces of 4096       98.5   92.4   86.9 %      0.3 s of one core
    the 4096 rows before it      100    100    100          0.4
    the 2048                     100    100     98.5        0.3
    the 1024                     100     96.1   82.3        0.3
    the 512                      100     75.4   56.6        0.3

It is the ratio that counts: a cluster of 80,000 rows with a piece of 4096 is the row of 1024. Of
512 numbers a row costs 77 µs of one core with the 4096 before it, and 43 in pieces of 4096. In
clusters of at most a piece all pairs are found; `Duplicates.large` tells how many are larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import require
from secateurs.selection.embeddings import Array, Embeddings
from secateurs.selection.grouped_rows import (
    GROUP_ROWS,
    GroupedRows,
    consecutive_groups,
    scratch,
)
from secateurs.selection.score_table import Order, hashed
from secateurs.state import Tree
from secateurs.workspace import Workspace

SHOWN = 64
"""Pairs of duplicates that are remembered as examples."""
READ_BYTES = 1 << 27
"""Embeddings that are held at once."""


STEP = "duplicates"
"""A group of clusters whose rows were compared."""


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        found: bool arrays, a shard each: the rows to leave out.
        pairs: examples, (row, earlier row like it, cosine); rows are numbered over all shards.
        large: clusters of more rows than a piece, not all of whose pairs were compared.
    """

    found: list[Array]
    pairs: list[tuple[int, int, float]]
    large: int = 0

    @property
    def count(self) -> int:
        """Rows to leave out."""
        return sum(int(mask.sum()) for mask in self.found)


def like_an_earlier(
    rows: Tensor, tile: int = 1024, *, window: int | None = None, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Of rows in their order: the largest cosine to an earlier one, and which that is.

    The first has cosine −inf. It takes tile × tile products at once.

    Args:
        rows: (n, width), of length 1.
        window: how many rows before it one is compared with; all by default.
        start: the first row that is asked about; the answers begin there.
    """
    best = torch.full((len(rows),), -torch.inf)
    twin = torch.full((len(rows),), -1)
    for first in range(start, len(rows), tile):
        last = min(first + tile, len(rows))
        block, own = rows[first:last], slice(first, last)
        far = 0 if window is None else max(0, first - window)
        for begin in [*range(far, first, tile), first]:
            end = last if begin == first else min(begin + tile, first)
            likeness = block @ rows[begin:end].T
            if begin == first:
                likeness.masked_fill_(_not_earlier(len(block)), -torch.inf)
            if window is not None and begin < last - 1 - window:
                place, other = torch.arange(first, last), torch.arange(begin, end)
                likeness.masked_fill_(place[:, None] - other > window, -torch.inf)
            top = likeness.max(dim=1)
            better = top.values > best[own]
            best[own] = torch.where(better, top.values, best[own])
            twin[own] = torch.where(better, top.indices + begin, twin[own])
    return best[start:], twin[start:]


def _not_earlier(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu_()


def find_duplicates(
    source: Embeddings,
    assigned: Sequence[Tree],
    clusters: int,
    epsilon: float,
    *,
    keep: Order = "hard",
    piece: int = 4096,
    seed: int = 0,
    work: Workspace | None = None,
) -> Duplicates:
    """The rows that are nearer than ε to an earlier one of their cluster.

    Args:
        assigned: of `KMeans.assign`, spherical.
        epsilon: above 0; of float32 rows below about 1e-6 chance decides.
        keep: which of two alike stays: the one farther from the centre (``hard``), nearer
            (``easy``), or any (``random``).
        piece: rows before it that a row of a larger cluster is compared with.
    """
    require(0 < epsilon <= 2, "epsilon", epsilon, "a cosine distance in (0, 2]")
    require(piece >= 2, "piece", piece, "at least 2 rows")
    work = work or Workspace()
    cluster = [part["cluster"].numpy() for part in assigned]
    sizes = np.sum([np.bincount(c, minlength=clusters) for c in cluster], axis=0)
    groups = consecutive_groups(sizes, GROUP_ROWS)
    with scratch(work) as folder:
        grouped = GroupedRows(source, cluster, folder)
        if not all(work.has(f"{STEP}-{number:05}") for number in range(len(groups))):
            grouped.write(work)
        distance = [part["distance"].numpy() for part in assigned]
        compare = partial(_compared, grouped, groups, distance, epsilon, keep, piece, seed)
        done = source.each(work, STEP, compare, len(groups))
    found = [np.zeros(shard.rows, bool) for shard in source.shards]
    pairs: list[tuple[int, int, float]] = []
    for answer in done:
        rows = answer["rows"].numpy()
        shard = np.searchsorted(source.offsets, rows, side="right") - 1
        for number in np.unique(shard):
            found[number][rows[shard == number] - source.offsets[number]] = True
        pairs += [tuple(pair) for pair in answer["pairs"]]
    return Duplicates(found, pairs[:SHOWN], int((sizes > piece).sum()))


def _compared(
    grouped: GroupedRows,
    groups: Sequence[tuple[int, int]],
    distances: Sequence[Array],
    epsilon: float,
    keep: Order,
    piece: int,
    seed: int,
    group: int,
) -> Tree:
    """Duplicates among the rows of the clusters of a group, and examples of them."""
    clusters = range(*groups[group])
    numbers, cluster, distance, names = _narrow(grouped, clusters, distances)
    if keep == "random":
        distance = hashed(names, seed).astype(np.float64)
    order = np.lexsort((names, distance if keep == "easy" else -distance, cluster))
    numbers = numbers[order]
    edges = np.searchsorted(cluster[order], np.arange(clusters.start, clusters.stop + 1))
    most = max(4 * piece, READ_BYTES // (4 * grouped.source.width))
    spans = [
        Span(max(first, begin - piece), begin, min(begin + most - piece, last))
        for first, last in pairwise(edges.tolist())
        for begin in range(first, last, most - piece)
    ]
    gone: list[Array] = []
    pairs: list[tuple[int, int, float]] = []
    for batch in _batches(spans, most):
        first = batch[0].before
        rows = grouped.rows(numbers[first : batch[-1].end], unit=True)
        for before, begin, end in batch:
            own = rows[before - first : end - first]
            best, twin = like_an_earlier(own, window=piece, start=begin - before)
            removed = (best > 1 - epsilon).nonzero().view(-1).numpy()
            gone.append(numbers[begin + removed])
            for place in removed[: SHOWN - len(pairs)].tolist():
                like = int(numbers[before + int(twin[place])])
                pairs.append((int(numbers[begin + place]), like, float(best[place])))
    every = np.concatenate(gone) if gone else np.empty(0, np.int64)
    return {"rows": torch.from_numpy(every), "pairs": pairs}


def _narrow(
    grouped: GroupedRows, clusters: range, distances: Sequence[Array]
) -> tuple[Array, Array, Array, Array]:
    """Numbers over all shards, clusters, distances and ids of the rows of some clusters."""
    parts = []
    for number, own in enumerate(grouped.groups):
        rows = np.flatnonzero((own >= clusters.start) & (own < clusters.stop))
        if rows.size or not number:
            distance = distances[number][rows].astype(np.float64)
            ids = grouped.source.ids_of(number)[rows]
            parts.append((rows + grouped.source.offsets[number], own[rows], distance, ids))
    numbers, cluster, distance, ids = (np.concatenate(c) for c in zip(*parts, strict=True))
    return numbers, cluster, distance, ids


class Span(NamedTuple):
    """Rows [begin, end) of one cluster, with those from `before` on that they are compared with."""

    before: int
    begin: int
    end: int


def _batches(spans: Sequence[Span], rows: int) -> Iterator[Sequence[Span]]:
    """Consecutive spans of at most so many rows together, but at least one."""
    first = 0
    while first < len(spans):
        last = first + 1
        while last < len(spans) and spans[last].end - spans[first].before <= rows:
            last += 1
        yield spans[first:last]
        first = last
