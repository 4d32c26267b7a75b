"""Embeddings as methods see them: shards that are read block by block, never whole.

A shard gives two things: its narrow part (ids, labels, extra columns: all of them at once, they
are small) and its vectors, a block of rows after the other. Large files are cut into several
shards, so a shard is also the unit in which work is finished, kept and resumed
(`Embeddings.each`). What is wrong with a row is found wherever it is read, and named.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateurs.errors import InputError, described, require
from secateurs.state import Tree
from secateurs.workspace import Workspace

Array = NDArray[Any]
Metric = Literal["cosine", "euclidean"]
SHARD_ROWS = 1 << 18
"""Larger files and arrays are cut into shards of so many rows."""
BLOCK_ROWS = 8192
"""Rows that are read and computed with at once."""


@dataclass(frozen=True)
class Narrow:
    """All that is not the embedding, of every row of a shard.

    Attributes:
        ids: (n,), whole numbers or strings.
        labels: (n,), or None.
        columns: further values of a row by name, each (n,).
    """

    ids: Array
    labels: Array | None = None
    columns: dict[str, Array] = field(default_factory=dict)


class Shard(ABC):
    """A part of the rows: a file, a piece of one, or an array."""

    name: str
    rows: int
    width: int
    """Length of an embedding; 0 where the rows have none."""

    @abstractmethod
    def narrow(self) -> Narrow:
        """Ids, labels and columns of all rows."""

    @abstractmethod
    def blocks(self, size: int) -> Iterator[Array]:
        """The embeddings in order, at most `size` rows at a time, as they are stored."""

    def fingerprint(self) -> str:
        """What changes when the data do; by it unfinished work is found again."""
        return f"{self.name}:{self.rows}x{self.width}"


@dataclass
class ArrayShard(Shard):
    """Rows in memory."""

    name: str
    content: Narrow
    vectors: Array | None = None

    def __post_init__(self) -> None:
        self.rows = len(self.content.ids)
        self.width = 0 if self.vectors is None else int(self.vectors.shape[1])

    def narrow(self) -> Narrow:
        return self.content

    def blocks(self, size: int) -> Iterator[Array]:
        if self.vectors is not None:
            for first in range(0, self.rows, size):
                yield self.vectors[first : first + size]

    def fingerprint(self) -> str:
        import hashlib

        told = hashlib.sha256()
        for array in (self.vectors, self.content.ids, self.content.labels):
            if array is not None:
                told.update(np.ascontiguousarray(array).data)
        return f"{super().fingerprint()}:{told.hexdigest()}"


class Embeddings:
    """Rows in shards, each with an id, maybe a label, further columns and an embedding.

    Args:
        shards: at least one, alike in width and columns.
        samples: the data set itself, by row number, where there is one: reports show pictures
            from it, methods that make new samples read it.

    Attributes:
        rows: of all shards.
        width: length of an embedding; 0 where there are none.
        ray: address of a cluster that does the work of the shards; None does it here.

    Raises:
        InputError: no rows, or shards of different widths or columns.
    """

    def __init__(self, shards: Iterable[Shard], samples: Any = None) -> None:
        self.shards = tuple(shard for shard in shards if shard.rows)
        self.samples = samples
        self.ray: str | None = None
        require(bool(self.shards), "embeddings", described("no rows"), "at least one row")
        first, told = self.shards[0], self.shards[0].narrow()
        for shard in self.shards[1:]:
            if shard.width != first.width:
                raise InputError(
                    "embeddings", described(f"width {shard.width} in {shard.name}"),
                    f"width {first.width} in every shard, as in {first.name}",
                )  # fmt: skip
        self.rows = sum(shard.rows for shard in self.shards)
        self.width = first.width
        self.offsets = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self.labelled = told.labels is not None
        self.columns = tuple(told.columns)

    def ids_of(self, number: int) -> Array:
        """The ids of a shard."""
        return self.narrow(number).ids

    def narrow(self, number: int) -> Narrow:
        """Ids, labels and columns of a shard.

        Raises:
            InputError: the shard has others than the first, or labels that are missing.
        """
        shard = self.shards[number]
        found = shard.narrow()
        if (found.labels is not None, tuple(found.columns)) != (self.labelled, self.columns):
            has = [*found.columns, *["labels"] * (found.labels is not None)]
            wanted = [*self.columns, *["labels"] * self.labelled]
            raise InputError(
                "embeddings", described(f"columns {has} in {shard.name}"), f"{wanted} in all shards"
            )
        if found.labels is not None and found.labels.dtype.kind == "f":
            whole = found.labels == np.round(found.labels)  # false of NaN
            if not whole.all():
                row = int(np.flatnonzero(~whole)[0])
                raise InputError(
                    "labels", found.labels[row].item(),
                    f"a class, in row {row} of {shard.name}",
                )  # fmt: skip
        return found

    def column(self, name: str) -> list[Array]:
        """A column of numbers, a shard each, float64.

        Raises:
            InputError: there is no such column, or a value is no number.
        """
        require(name in self.columns, "column", name, f"one of {', '.join(self.columns) or 'none'}")
        values = []
        for number, shard in enumerate(self.shards):
            found = self.narrow(number).columns[name]
            require(found.dtype.kind in "biuf", name, described(str(found.dtype)), "numbers")
            made = found.astype(np.float64)
            if np.isnan(made).any():
                row = int(np.flatnonzero(np.isnan(made))[0])
                raise InputError(name, described(f"NaN in row {row} of {shard.name}"), "numbers")
            values.append(made)
        return values

    def classes(self) -> tuple[list[Any], list[Array]]:
        """The distinct labels, sorted, and of every shard the numbers of its rows' labels.

        Raises:
            InputError: there are no labels.
        """
        require(self.labelled, "labels", None, "a label for every row")
        labels = [self._labels(number) for number in range(len(self.shards))]
        names = np.unique(np.concatenate([np.unique(part) for part in labels]))
        return names.tolist(), [np.searchsorted(names, p).astype(np.int32) for p in labels]

    def _labels(self, number: int) -> Array:
        found = self.narrow(number).labels
        assert found is not None
        return found.astype(np.int64) if found.dtype.kind in "fb" else found

    def vectors(
        self, number: int, metric: Metric = "cosine", size: int = BLOCK_ROWS
    ) -> Iterator[Tensor]:
        """The embeddings of a shard as float32, for cosine of length 1, block by block.

        Raises:
            InputError: a row that is not finite, or zero where only its direction counts; or
                of another width than the first.
        """
        first, shard = 0, self.shards[number]
        for block in shard.blocks(size):
            if block.shape[1] != self.width:
                raise InputError(
                    "embeddings", described(f"width {block.shape[1]} in {shard.name}"),
                    f"width {self.width} in every row",
                )  # fmt: skip
            vectors = torch.from_numpy(np.array(block)).float()
            lengths = torch.linalg.vector_norm(vectors, dim=1)
            wrong = ~torch.isfinite(lengths)
            if bool(wrong.any()):
                wrong = ~torch.isfinite(vectors).all(dim=1)
                if bool(wrong.any()):
                    self._refuse(number, first, wrong, "NaN or Inf", "finite numbers")
                lengths = torch.linalg.vector_norm(vectors.double(), dim=1)
            if metric == "cosine":
                if bool((lengths == 0).any()):
                    self._refuse(
                        number, first, lengths == 0, "a zero vector",
                        "vectors with a direction, or a method that compares by distance",
                    )  # fmt: skip
                vectors = (vectors / lengths[:, None]).float()
            yield vectors
            first += len(vectors)

    def _refuse(self, number: int, first: int, wrong: Tensor, what: str, accepted: str) -> None:
        row = first + int(wrong.nonzero()[0])
        shard = self.shards[number]
        told = f"{what} in row {row} of {shard.name} (id {shard.narrow().ids[row]})"
        raise InputError("embeddings", described(told), accepted)

    def take(self, chosen: Sequence[Array], metric: Metric = "cosine") -> Iterator[Tensor]:
        """The embeddings of chosen rows: of every shard one tensor, in the order of the rows.

        Args:
            chosen: a bool array for every shard; shards without any are not read.
        """
        for number, mask in enumerate(chosen):
            yield self.take_from(number, mask, metric)

    def take_from(self, number: int, mask: Array, metric: Metric = "cosine") -> Tensor:
        """The embeddings of the chosen rows of one shard, (chosen, width)."""
        kept, first = [torch.empty(0, self.width)], 0
        if mask.any():
            for block in self.vectors(number, metric):
                part = torch.from_numpy(mask[first : first + len(block)])
                kept.append(block[part])
                first += len(block)
        return torch.cat(kept)

    def check_ids(self, work: Workspace) -> None:
        """Refuse ids that repeat.

        Raises:
            InputError: names the first id that is there twice.
        """
        from secateurs.selection.score_table import hashed

        keys = np.empty(self.rows, np.uint64)
        with work.progress("ids", len(self.shards)) as advance:
            for number in range(len(self.shards)):
                first, last = self.offsets[number : number + 2]
                keys[first:last] = hashed(self.ids_of(number))
                advance(number + 1)
        keys.sort()
        twice = set(keys[1:][keys[1:] == keys[:-1]].tolist())
        del keys
        seen: set[Any] = set()
        for number in range(len(self.shards) if twice else 0):
            ids = self.ids_of(number)
            for one in ids[np.isin(hashed(ids), list(twice))].tolist():
                require(one not in seen, "ids", one, "every id once")
                seen.add(one)

    def each(
        self, work: Workspace, name: str, compute: Callable[[int], Tree], *, here: bool = False
    ) -> list[Tree]:
        """`compute` of the number of every shard, in order; what is finished is read.

        It is done on the cluster where there is one.

        Args:
            name: of the step; the answers are kept as ``NAME-00000`` and so on.
            compute: a shard's number to a tree (see `secateurs.state`).
            here: not on the cluster, since it writes files beside the answer.
        """
        missing = [n for n in range(len(self.shards)) if not work.has(f"{name}-{n:05}")]
        with work.progress(name, len(self.shards)) as advance:
            made: Iterator[Tree]
            if self.ray is not None and not here:
                from secateurs.selection.ray_stages import computed_on_ray

                made = computed_on_ray(compute, missing)
            else:
                made = (compute(number) for number in missing)
            answers = []
            for number in range(len(self.shards)):
                answers.append(work.once(f"{name}-{number:05}", lambda: next(made)))
                advance(number + 1)
        return answers
