"""Rows on disk group by group, so that a group is read whole without reading the source again.

The source is read once, a file a shard is written in which the rows of a group lie side by side,
and a group is then read from consecutive places whatever the format of the source.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import require
from secateurs.selection.embeddings import BLOCK_ROWS, Array, Embeddings, unit_rows
from secateurs.state import Tree
from secateurs.workspace import Workspace

GROUP_ROWS = 1 << 17
"""About so many rows are looked at between two finished steps."""


def consecutive_groups(sizes: Array, rows: int) -> list[tuple[int, int]]:
    """Consecutive groups that have about so many rows together."""
    ends = np.cumsum(sizes) // max(rows, 1)
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(sizes)]
    return [(a, b) for a, b in pairwise(cuts) if b > a]


@contextmanager
def scratch(work: Workspace) -> Iterator[Path]:
    """A folder for grouped rows; it goes when all is done, and stays for who was killed."""
    if work.folder is not None:
        folder = (work.folder / "grouped").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    else:
        with tempfile.TemporaryDirectory(prefix="secateurs-") as name:
            yield Path(name)


@dataclass
class GroupedRows:
    """The rows of every shard on disk, those of a group side by side.

    Attributes:
        groups: of every shard, the group of its rows, from 0.
        folder: where the files are.
    """

    source: Embeddings
    groups: Sequence[Array]
    folder: Path

    def __post_init__(self) -> None:
        self.places = []
        for own in self.groups:  # within a shard and a group the rows keep their order
            place = np.empty(len(own), np.int32)
            place[np.argsort(own, kind="stable")] = np.arange(len(own), dtype=np.int32)
            self.places.append(place)

    def write(self, work: Workspace) -> None:
        """Write what is not there; the nodes of a cluster do, into a folder that all find."""
        self.source.each(replace(work, folder=None), "grouped", self._write_shard)

    def _write_shard(self, number: int) -> Tree:
        shard, path, first = self.source.shards[number], self._path(number), 0
        grouped: Array | None = None
        for block in () if path.exists() else shard.blocks(BLOCK_ROWS):
            if grouped is None:
                grouped = np.empty((shard.rows, shard.width), block.dtype)
            grouped[self.places[number][first : first + len(block)]] = block
            first += len(block)
        if grouped is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                np.save(file, grouped)
            os.replace(partial, path)
        return {}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05}.npy"

    def numbers(self, groups: range) -> list[Array]:
        """Of each of some groups the numbers of its rows over all shards, ascending."""
        numbers, names = [], []
        for own, offset in zip(self.groups, self.source.offsets[:-1], strict=True):
            rows = np.flatnonzero((own >= groups.start) & (own < groups.stop))
            numbers.append(rows + offset)
            names.append(own[rows])
        every = np.concatenate(names)
        order = np.argsort(every, kind="stable")
        edges = np.searchsorted(every[order], np.arange(groups.start + 1, groups.stop))
        return np.split(np.concatenate(numbers)[order], edges)

    def rows(self, numbers: Array, *, unit: bool = False) -> Tensor:
        """The embeddings of rows, which are numbered over all shards, float32.

        Args:
            unit: at length 1.
        """
        shards = np.searchsorted(self.source.offsets, numbers, side="right") - 1
        found = torch.empty(len(numbers), self.source.width)
        for number in np.unique(shards):
            own = np.flatnonzero(shards == number)
            places = self.places[number][numbers[own] - self.source.offsets[number]]
            path = self._path(number)
            told = "a folder that every node of the cluster finds"
            require(path.exists(), "work", str(self.folder), told)
            stored = np.load(path, mmap_mode="r")
            read = torch.from_numpy(stored[places])
            found[torch.from_numpy(own)] = unit_rows(read) if unit else read.float()
            del stored  # or its pages would count as this process's memory
        return found
