"""SemDeDup: of rows that mean the same, one is kept.

Rows are clustered; within a cluster they are ordered by the distance to its centre, and a row is
a duplicate iff an earlier one, removed or not, is nearer than ε in cosine:

    M_i = max_{j < i} ⟨e_i, e_j⟩,    removed iff M_i > 1 − ε.

Source: arXiv 2303.09540 and its code. A cluster larger than a piece is cut into consecutive
pieces, compared each in itself, as there: so the cost is linear in the rows. Near duplicates are
about as far from the centre, hence in the same piece or astride a cut.

Rows are first written grouped by cluster, a file a shard, so that a cluster is read from
consecutive places whatever the format of the source.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import require
from secateurs.selection.embeddings import BLOCK_ROWS, Array, Embeddings
from secateurs.selection.score_table import Order, hashed
from secateurs.state import Tree
from secateurs.workspace import Workspace

SHOWN = 64
"""Pairs of duplicates that are remembered as examples."""
GROUP_ROWS = 1 << 17
"""About so many rows are looked at between two finished steps."""
READ_BYTES = 1 << 27
"""Embeddings that are held at once."""


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        found: bool arrays, a shard each: the rows to leave out.
        pairs: examples, (row, earlier row like it, cosine); rows are numbered over all shards.
    """

    found: list[Array]
    pairs: list[tuple[int, int, float]]

    @property
    def count(self) -> int:
        """Rows to leave out."""
        return sum(int(mask.sum()) for mask in self.found)


def like_an_earlier(rows: Tensor, tile: int = 1024) -> tuple[Tensor, Tensor]:
    """Of rows in their order: the largest cosine to an earlier one, and which that is.

    The first has cosine −inf. It takes tile × tile products at once.

    Args:
        rows: (n, width), of length 1.
    """
    best = torch.full((len(rows),), -torch.inf)
    twin = torch.full((len(rows),), -1)
    for first in range(0, len(rows), tile):
        block = rows[first : first + tile]
        for begin in range(0, first + 1, tile):
            likeness = block @ rows[begin : begin + tile].T
            if begin == first:
                likeness = likeness.masked_fill_(_not_earlier(len(block)), -torch.inf)
            top = likeness.max(dim=1)
            better = top.values > best[first : first + tile]
            best[first : first + tile] = torch.where(better, top.values, best[first : first + tile])
            twin[first : first + tile] = torch.where(
                better, top.indices + begin, twin[first : first + tile]
            )
    return best, twin


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
        piece: rows that are compared with each other.
    """
    require(0 < epsilon <= 2, "epsilon", epsilon, "a cosine distance in (0, 2]")
    require(piece >= 2, "piece", piece, "at least 2 rows")
    work = work or Workspace()
    cluster = [part["cluster"].numpy() for part in assigned]
    sizes = np.sum([np.bincount(c, minlength=clusters) for c in cluster], axis=0)
    groups = _groups_of(sizes, GROUP_ROWS)
    with _scratch(work) as folder:
        grouped = _Grouped(source, cluster, folder)
        steps = [f"group-{number:05}" for number in range(len(groups))]
        if not all(work.has(step) for step in steps):
            grouped.write(work)
        found = [np.zeros(shard.rows, bool) for shard in source.shards]
        pairs: list[tuple[int, int, float]] = []
        with work.progress("duplicates", clusters) as advance:
            for step, (first, last) in zip(steps, groups, strict=True):
                compare = partial(
                    grouped.compare, range(first, last), assigned, epsilon, keep, piece, seed
                )
                done = work.once(step, compare)
                rows = done["rows"].numpy()
                shard = np.searchsorted(source.offsets, rows, side="right") - 1
                for number in np.unique(shard):
                    found[number][rows[shard == number] - source.offsets[number]] = True
                pairs += [tuple(pair) for pair in done["pairs"]]
                advance(last)
    return Duplicates(found, pairs[:SHOWN])


def _groups_of(sizes: Array, rows: int) -> list[tuple[int, int]]:
    """Consecutive clusters that have about so many rows together."""
    ends = np.cumsum(sizes) // max(rows, 1)
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(sizes)]
    return [(a, b) for a, b in pairwise(cuts) if b > a]


@contextmanager
def _scratch(work: Workspace) -> Iterator[Path]:
    if work.folder is not None:
        folder = work.folder / "grouped"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    else:
        with tempfile.TemporaryDirectory(prefix="secateurs-") as name:
            yield Path(name)


@dataclass
class _Grouped:
    """The rows of every shard on disk, those of a cluster side by side."""

    source: Embeddings
    cluster: list[Array]
    folder: Path

    def __post_init__(self) -> None:
        self.places = []
        for own in self.cluster:  # within a shard and a cluster the rows keep their order
            place = np.empty(len(own), np.int32)
            place[np.argsort(own, kind="stable")] = np.arange(len(own), dtype=np.int32)
            self.places.append(place)

    def write(self, work: Workspace) -> None:
        """Write what is not there."""
        with work.progress("grouped", len(self.source.shards)) as advance:
            for number, shard in enumerate(self.source.shards):
                path, first = self._path(number), 0
                grouped: Array | None = None
                for block in () if path.exists() else shard.blocks(BLOCK_ROWS):
                    if grouped is None:
                        grouped = np.empty((shard.rows, shard.width), block.dtype)
                    grouped[self.places[number][first : first + len(block)]] = block
                    first += len(block)
                if grouped is not None:
                    partial = path.with_suffix(".partial")
                    with open(partial, "wb") as file:
                        np.save(file, grouped)
                    os.replace(partial, path)
                advance(number + 1)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.npy"

    def rows(self, numbers: Array) -> Tensor:
        """The unit embeddings of rows, which are numbered over all shards."""
        shards = self._shards(numbers)
        found = torch.empty(len(numbers), self.source.width)
        for number in np.unique(shards):
            own = np.flatnonzero(shards == number)
            places = self.places[number][numbers[own] - self.source.offsets[number]]
            stored = np.load(self._path(number), mmap_mode="r")
            found[torch.from_numpy(own)] = torch.from_numpy(stored[places]).float()
            del stored  # or its pages would count as this process's memory
        return found.div_(torch.linalg.vector_norm(found, dim=1, keepdim=True))

    def _shards(self, numbers: Array) -> Array:
        found: Array = np.searchsorted(self.source.offsets, numbers, side="right") - 1
        return found

    def compare(
        self,
        clusters: range,
        assigned: Sequence[Tree],
        epsilon: float,
        keep: Order,
        piece: int,
        seed: int,
    ) -> Tree:
        """Duplicates among the rows of some clusters, and examples of them."""
        numbers, cluster, distance, names = self._narrow(clusters, assigned)
        if keep == "random":
            distance = hashed(names, seed).astype(np.float64)
        order = np.lexsort((names, distance if keep == "easy" else -distance, cluster))
        numbers = numbers[order]
        edges = np.searchsorted(cluster[order], np.arange(clusters.start, clusters.stop + 1))
        pieces = [
            (begin, min(begin + piece, last))
            for first, last in pairwise(edges.tolist())
            for begin in range(first, last, piece)
        ]
        gone: list[Array] = []
        pairs: list[tuple[int, int, float]] = []
        most = max(piece, READ_BYTES // (4 * self.source.width))
        for batch in _batches(pieces, most):
            first, last = batch[0][0], batch[-1][1]
            rows = self.rows(numbers[first:last])
            for begin, end in batch:
                best, twin = like_an_earlier(rows[begin - first : end - first])
                removed = (best > 1 - epsilon).nonzero().view(-1).numpy()
                gone.append(numbers[begin + removed])
                for place in removed[: SHOWN - len(pairs)].tolist():
                    like = int(numbers[begin + int(twin[place])])
                    pairs.append((int(numbers[begin + place]), like, float(best[place])))
        every = np.concatenate(gone) if gone else np.empty(0, np.int64)
        return {"rows": torch.from_numpy(every), "pairs": pairs}

    def _narrow(
        self, clusters: range, assigned: Sequence[Tree]
    ) -> tuple[Array, Array, Array, Array]:
        """Numbers over all shards, clusters, distances and ids of the rows of some clusters."""
        parts = []
        for number, own in enumerate(self.cluster):
            rows = np.flatnonzero((own >= clusters.start) & (own < clusters.stop))
            if rows.size or not number:
                distance = assigned[number]["distance"].numpy()[rows].astype(np.float64)
                ids = self.source.ids_of(number)[rows]
                parts.append((rows + self.source.offsets[number], own[rows], distance, ids))
        numbers, cluster, distance, ids = (np.concatenate(c) for c in zip(*parts, strict=True))
        return numbers, cluster, distance, ids


def _batches(pieces: Sequence[tuple[int, int]], rows: int) -> Iterator[Sequence[tuple[int, int]]]:
    """Consecutive pieces of at most so many rows together, but at least one."""
    first = 0
    while first < len(pieces):
        last = first + 1
        while last < len(pieces) and pieces[last][1] - pieces[first][0] <= rows:
            last += 1
        yield pieces[first:last]
        first = last
