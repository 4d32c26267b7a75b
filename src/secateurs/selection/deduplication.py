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
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import require
from secateurs.selection.embeddings import Array, Embeddings
from secateurs.selection.score_table import Order, hashed
from secateurs.state import Tree
from secateurs.workspace import Workspace

SHOWN = 64
"""Pairs of duplicates that are remembered as examples."""
GROUP_BYTES = 1 << 28
"""Embeddings that are looked at between two finished steps."""


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


def like_an_earlier(rows: Tensor, tile: int = 4096) -> tuple[Tensor, Tensor]:
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
    groups = _groups_of(sizes, GROUP_BYTES // (4 * source.width))
    with _scratch(work) as folder:
        grouped = _Grouped(source, cluster, clusters, folder)
        steps = [f"group-{number:05}" for number in range(len(groups))]
        if not all(work.has(step) for step in steps):
            grouped.write(work)
        found = [np.zeros(shard.rows, bool) for shard in source.shards]
        pairs: list[tuple[int, int, float]] = []
        with work.progress("duplicates", clusters) as advance:
            for step, (first, last) in zip(steps, groups, strict=True):
                done = work.once(step, lambda first=first, last=last: grouped.compare(  # type: ignore[misc]
                    range(first, last), assigned, epsilon, keep, piece, seed))  # fmt: skip
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
    clusters: int
    folder: Path

    def __post_init__(self) -> None:
        # within a shard and a cluster the rows keep their order
        self.orders = [np.argsort(c, kind="stable") for c in self.cluster]
        counts = [np.bincount(c, minlength=self.clusters) for c in self.cluster]
        self.starts = [np.concatenate([[0], np.cumsum(c)]) for c in counts]

    def write(self, work: Workspace) -> None:
        """Write what is not there."""
        with work.progress("grouped", len(self.source.shards)) as advance:
            for number, shard in enumerate(self.source.shards):
                path = self._path(number)
                if not path.exists():
                    rows = np.concatenate(list(shard.blocks(shard.rows)))
                    partial = path.with_suffix(".partial")
                    with open(partial, "wb") as file:
                        np.save(file, rows[self.orders[number]])
                    os.replace(partial, path)
                advance(number + 1)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.npy"

    def rows_of(self, cluster: range) -> tuple[Array, Tensor]:
        """Numbers over all shards and unit embeddings of the rows of some clusters."""
        numbers, parts = [], []
        for number in range(len(self.source.shards)):
            first, last = self.starts[number][[cluster.start, cluster.stop]]
            if last > first:
                stored = np.load(self._path(number), mmap_mode="r")
                parts.append(torch.from_numpy(np.array(stored[first:last])).float())
                numbers.append(self.orders[number][first:last] + self.source.offsets[number])
                del stored
        rows = torch.cat(parts) if parts else torch.empty(0, self.source.width)
        every = np.concatenate(numbers) if numbers else np.empty(0, np.int64)
        return every, rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)

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
        numbers, rows = self.rows_of(clusters)
        shards = np.searchsorted(self.source.offsets, numbers, side="right") - 1
        cluster, distance = np.empty(len(numbers), int), np.empty(len(numbers))
        ids: list[Array] = []
        for shard in np.unique(shards):
            own = shards == shard
            local = numbers[own] - self.source.offsets[shard]
            cluster[own] = self.cluster[shard][local]
            distance[own] = assigned[shard]["distance"].numpy()[local]
            ids.append(self.source.narrow(int(shard)).ids[local])
        names = np.concatenate(ids) if ids else np.empty(0, np.int64)
        if keep == "random":
            distance = hashed(names, seed).astype(np.float64)
        order = np.lexsort((names, distance if keep == "easy" else -distance, cluster))
        gone: list[Array] = []
        pairs: list[tuple[int, int, float]] = []
        for one in clusters:
            first, last = np.searchsorted(cluster[order], [one, one + 1])
            for begin in range(first, last, piece):
                own = order[begin : min(begin + piece, last)]
                best, twin = like_an_earlier(rows[torch.from_numpy(own)])
                removed = (best > 1 - epsilon).nonzero().view(-1).numpy()
                gone.append(numbers[own[removed]])
                for place in removed[: SHOWN - len(pairs)].tolist():
                    like = int(numbers[own[int(twin[place])]])
                    pairs.append((int(numbers[own[place]]), like, float(best[place])))
        every = np.concatenate(gone) if gone else np.empty(0, np.int64)
        return {"rows": torch.from_numpy(every), "pairs": pairs}
