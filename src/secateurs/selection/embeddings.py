"""Embeddings as methods see them: shards that are read block by block, never whole.

A shard gives its narrow part (ids and labels, all of them at once: they are small), further
columns as they are asked for, and its vectors, a block of rows after the other. Large files are
cut into several shards, so a shard is also the unit in which work is finished, kept and resumed
(`Embeddings.each`). What is wrong with a row is found wherever it is read, and named.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import InputError, described, require
from secateurs.selection.columns import (
    Array,
    Column,
    Kinds,
    family,
    is_arrow,
    kind_of,
    numbers,
    one_kind,
    plain,
)
from secateurs.state import Tree
from secateurs.workspace import Workspace

Metric = Literal["cosine", "euclidean"]
SHARD_ROWS = 1 << 18
"""Larger files and arrays are cut into shards of so many rows."""
BLOCK_ROWS = 8192
"""Rows that are read and computed with at once."""
SHORT = 2.0**-50
"""Below this length of a row, squares of its entries underflow in float32."""


@dataclass(frozen=True)
class Narrow:
    """All that is not the embedding, of every row of a shard.

    Attributes:
        ids: (n,), whole numbers or strings.
        labels: (n,), or None.
        columns: further values of a row by name, each (n,), numpy or Arrow.
    """

    ids: Array
    labels: Array | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)


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
        """The embeddings in order, at most `size` rows at a time, as they are stored but in the
        machine's byte order."""

    def kinds(self) -> Kinds:
        """Of what kind ids, labels and columns are, without reading them where that can be."""
        found = self.narrow()
        label = None if found.labels is None else kind_of(found.labels)
        columns = {name: kind_of(values) for name, values in found.columns.items()}
        return Kinds(kind_of(found.ids), label, columns)

    def further(self, size: int) -> Iterator[tuple[int, dict[str, Column]]]:
        """Further columns in order, at most `size` rows at a time; all rows where there are none.

        Returns:
            How many rows, and their columns by name.
        """
        columns = dict(self.narrow().columns)
        for first in range(0, self.rows, size if columns else self.rows):
            last = min(self.rows, first + size) if columns else self.rows
            yield last - first, {name: values[first:last] for name, values in columns.items()}

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
        columns = sorted(self.content.columns.items())
        for name, array in [
            ("", self.vectors), ("", self.content.ids), ("", self.content.labels), *columns
        ]:  # fmt: skip
            if array is not None:
                told.update(f"{name} {kind_of(array)};".encode())
                told.update(_bytes_of(array))
        return f"{super().fingerprint()}:{told.hexdigest()}"


def _bytes_of(values: Column) -> Any:
    if is_arrow(values):
        return repr(values.to_pylist()).encode()
    if values.dtype.kind == "O":
        return repr(values.tolist()).encode()
    return np.ascontiguousarray(values).view(np.uint8).data if values.size else b""


def unit_rows(raw: Tensor) -> Tensor:
    """Rows at length 1, float32; NaN where a row has no direction.

    Where squares of float32 overflow or vanish, the row is scaled first; no row depends on others.

    Args:
        raw: (rows, width), of any numbers.
    """
    vectors = raw.float()
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    vectors = vectors / lengths[:, None]
    odd = ~torch.isfinite(lengths) | (lengths < SHORT)
    if bool(odd.any()):
        own = raw[odd].double()
        own = own / own.abs().amax(dim=1, keepdim=True)
        vectors[odd] = (own / torch.linalg.vector_norm(own, dim=1, keepdim=True)).float()
    return vectors


class Embeddings:
    """Rows in shards, each with an id, maybe a label, further columns and an embedding.

    Args:
        shards: at least one, alike in width and columns.
        samples: the data set itself, by row number, where there is one: reports show pictures
            from it, methods that make new samples read it.

    Attributes:
        rows: of all shards.
        width: length of an embedding; 0 where there are none.
        labelled: whether there are labels.
        columns: names of the further columns.
        kinds: of ids, labels and columns, the same for all shards.
        notes: what a reader must know.
        ray: address of a cluster that does the work of the shards; None does it here.

    Raises:
        InputError: no rows, shards of different widths or columns, or columns that are of one
            kind here and of another there, with none that holds both.
    """

    def __init__(self, shards: Iterable[Shard], samples: Any = None) -> None:
        self.shards = tuple(shard for shard in shards if shard.rows)
        self.samples = samples
        self.ray: str | None = None
        require(bool(self.shards), "embeddings", described("no rows"), "at least one row")
        first = self.shards[0]
        for shard in self.shards[1:]:
            if shard.width != first.width:
                raise InputError(
                    "embeddings", described(f"width {shard.width} in {shard.name}"),
                    f"width {first.width} in every shard, as in {first.name}",
                )  # fmt: skip
        self.rows = sum(shard.rows for shard in self.shards)
        self.width = first.width
        self.offsets = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self.notes: list[str] = []
        self.kinds = self._agreed([(shard.name, shard.kinds()) for shard in self.shards])
        self.labelled = self.kinds.label is not None
        self.columns = tuple(self.kinds.columns)

    def _agreed(self, found: Sequence[tuple[str, Kinds]]) -> Kinds:
        """One kind for every column."""
        first = found[0][1]
        wanted = sorted([*first.columns, *["labels"] * (first.label is not None)])
        for name, kinds in found[1:]:
            has = sorted([*kinds.columns, *["labels"] * (kinds.label is not None)])
            if has != wanted:
                raise InputError(
                    "embeddings", described(f"columns {has} in {name}"), f"{wanted} in all shards"
                )
        for name, kinds in found:
            for role, kind, accepted in (
                ("ids", kinds.id, ("whole", "text")),
                ("labels", kinds.label, ("whole", "text", "float")),
            ):
                good = kind is None or family(kind) in accepted
                require(good, role, described(f"{kind} in {name}"), "whole numbers or texts")
        label = None
        if first.label is not None:
            label = one_kind("labels", [(name, kinds.label) for name, kinds in found])
        columns = {}
        for column in first.columns:
            own = [(name, kinds.columns[column]) for name, kinds in found]
            columns[column] = one_kind(column, own)
            whole = next((name for name, kind in own if family(kind) == "whole"), None)
            if whole is not None and family(columns[column]) == "float":
                kind = columns[column]
                self.notes.append(f"column {column} is {kind} in all shards, not so in {whole}")
        return Kinds(one_kind("ids", [(name, kinds.id) for name, kinds in found]), label, columns)

    @property
    def numeric(self) -> tuple[str, ...]:
        """Names of the further columns that hold numbers."""
        kinds = self.kinds.columns.items()
        return tuple(name for name, kind in kinds if family(kind) in ("whole", "float"))

    def ids_of(self, number: int) -> Array:
        """The ids of a shard."""
        return self.narrow(number).ids

    def narrow(self, number: int) -> Narrow:
        """Ids, labels and columns of a shard.

        Raises:
            InputError: an id or a label is missing, or a label is no class.
        """
        shard = self.shards[number]
        found = shard.narrow()
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
            InputError: there is no such column, or a value is missing or no number.
        """
        require(name in self.columns, "column", name, f"one of {', '.join(self.columns) or 'none'}")
        return [numbers(shard.narrow().columns[name], name, shard.name) for shard in self.shards]

    def values(self, number: int, name: str) -> Array:
        """A column of a shard as numpy: numbers or texts.

        Raises:
            InputError: a value is missing, or of another kind.
        """
        shard = self.shards[number]
        return plain(shard.narrow().columns[name], name, shard.name)

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
            raw = torch.from_numpy(np.array(block))
            if metric == "cosine":
                vectors = unit_rows(raw)
                wrong = vectors[:, 0].isnan()
            else:
                vectors = raw.float()
                wrong = ~torch.isfinite(torch.linalg.vector_norm(vectors, dim=1))
                if bool(wrong.any()):  # of the square, or of an entry
                    wrong = ~torch.isfinite(vectors).all(dim=1)
            if bool(wrong.any()):
                self._refuse(number, first, raw, wrong)
            yield vectors
            first += len(vectors)

    def _refuse(self, number: int, first: int, raw: Tensor, wrong: Tensor) -> None:
        place = int(wrong.nonzero()[0])
        row, what, accepted = raw[place], "NaN or Inf", "finite numbers"
        if bool((row == 0).all()):
            what = "a zero vector"
            accepted = "vectors with a direction, or a method that compares by distance"
        elif bool(torch.isfinite(row.double()).all()):
            what = "a number beyond float32"
            accepted = "numbers below 3.4e38, or a method that compares by direction"
        shard = self.shards[number]
        where = first + place
        told = f"{what} in row {where} of {shard.name} (id {self.ids_of(number)[where]})"
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
        self,
        work: Workspace,
        name: str,
        compute: Callable[[int], Tree],
        count: int | None = None,
    ) -> list[Tree]:
        """`compute` of the number of every shard, in order; what is finished is read.

        It is done on the cluster where there is one.

        Args:
            name: of the step; the answers are kept as ``NAME-00000`` and so on.
            compute: a shard's number to a tree (see `secateurs.state`).
            count: of numbers, where they are not those of the shards.
        """
        numbers = range(len(self.shards) if count is None else count)
        missing = [n for n in numbers if not work.has(f"{name}-{n:05}")]
        with work.progress(name, len(numbers)) as advance:
            made: Iterator[Tree]
            if self.ray is not None:
                from secateurs.selection.ray_stages import computed_on_ray

                made = computed_on_ray(compute, missing)
            else:
                made = (compute(number) for number in missing)
            answers = []
            for number in numbers:
                answers.append(work.once(f"{name}-{number:05}", lambda: next(made)))
                advance(number + 1)
        return answers
