"""Parquet, Arrow and Hugging Face data sets: tables with a column of lists, read by batches.

A table has the embedding in a column of lists of numbers, maybe ids and labels, and further
columns of any kind, which are carried along as they are. Every range of rows can be read by
itself, so a shard is never larger than asked for, whatever the row groups of the file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from secateurs.errors import InputError, described, library, require
from secateurs.selection.columns import Array, Column, Columns, Kinds, family, plain
from secateurs.selection.embeddings import BLOCK_ROWS, Narrow, Shard
from secateurs.selection.names import EMBEDDING, ID, LABEL, Names
from secateurs.selection.reading import ranges, reading, stamp

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")
BUFFER = 1 << 20
"""Bytes of a column of a Parquet file that are read at once; else a row group's would be."""


class Table(ABC):
    """Rows that are read by columns and ranges."""

    name: str
    schema: Any
    sizes: list[int]
    """Rows of the parts it is stored in."""

    @abstractmethod
    def batches(self, columns: Sequence[str], first: int, rows: int, size: int) -> Iterator[Any]:
        """Record batches of the columns of [first, first + rows)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """What changes when the rows do."""

    def _parts(self, first: int, rows: int) -> tuple[range, int]:
        """The parts that hold [first, first + rows), and the rows of theirs before that."""
        starts = [0, *accumulate(self.sizes)]
        parts = range(bisect_right(starts, first) - 1, bisect_left(starts, first + rows))
        return parts, first - starts[parts.start]


def _cut(batches: Iterable[Any], skip: int, rows: int) -> Iterator[Any]:
    """So many rows after those that are skipped."""
    for batch in batches:
        if skip >= len(batch):
            skip -= len(batch)
            continue
        part = batch.slice(skip, rows)
        skip, rows = 0, rows - len(part)
        yield part
        if not rows:
            return


class ParquetTable(Table):
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        with self._opened() as file:
            self.schema, about = file.schema_arrow, file.metadata
            self.sizes = [about.row_group(g).num_rows for g in range(about.num_row_groups)]

    def _opened(self) -> Any:
        parquet = library("pyarrow.parquet", "data")
        return parquet.ParquetFile(self.path, buffer_size=BUFFER, pre_buffer=False)

    def batches(self, columns: Sequence[str], first: int, rows: int, size: int) -> Iterator[Any]:
        groups, skip = self._parts(first, rows)
        with reading(self.path), self._opened() as file:
            read = file.iter_batches(size, list(groups), list(columns))
            for batch in _cut(read, skip, rows):
                yield batch.select(list(columns))

    def fingerprint(self) -> str:
        return stamp([self.path])


class ArrowTable(Table):
    """An Arrow file, or a stream in a file; record batches are mapped, unless compressed."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        types = library("pyarrow", "data").types
        self.compressed = False
        with self._opened() as (file, batches, mapped):
            self.schema = file.schema
            first = next(batches, None)
            self.compressed = first is not None and not _lies_in(first, mapped)
        slim = [field.name for field in self.schema if not types.is_nested(field.type)]
        told = (slim or self.schema.names)[:1]  # only this is unpacked to count the rows
        with self._opened(told) as (_, batches, _):
            self.sizes = [len(batch) for batch in batches]

    @contextmanager
    def _opened(
        self, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[Any, Iterator[Any], Any]]:
        """The reader, its batches with at least some columns, and the file in memory."""
        pyarrow = library("pyarrow", "data")
        ipc = library("pyarrow.ipc", "data")
        chosen = None
        if columns is not None and self.compressed:  # else it would copy what is mapped
            chosen = [self.schema.get_field_index(name) for name in columns]
        options = ipc.IpcReadOptions(included_fields=chosen)
        with pyarrow.memory_map(str(self.path)) as mapped:
            magic = mapped.read(6)
            mapped.seek(0)
            if magic == b"ARROW1":
                with ipc.open_file(mapped, options=options) as file:
                    every = (file.get_batch(n) for n in range(file.num_record_batches))
                    yield file, every, mapped
            else:
                with ipc.open_stream(mapped, options=options) as stream:
                    yield stream, iter(stream), mapped

    def batches(self, columns: Sequence[str], first: int, rows: int, size: int) -> Iterator[Any]:
        parts, skip = self._parts(first, rows)
        with reading(self.path), self._opened(columns) as (file, batches, _):
            if hasattr(file, "get_batch"):
                batches = (file.get_batch(part) for part in parts)
            else:
                skip = first
            for batch in _cut(batches, skip, rows):
                for begin in range(0, len(batch), size):
                    yield batch.slice(begin, size).select(list(columns))

    def fingerprint(self) -> str:
        return stamp([self.path])


def _lies_in(batch: Any, mapped: Any) -> bool:
    """Whether a record batch is used where it stands in a mapped file."""
    mapped.seek(0)
    whole = mapped.read_buffer(mapped.size())
    first, last = whole.address, whole.address + whole.size
    buffers = (buffer for column in batch.columns for buffer in column.buffers())
    return all(b is None or not b.size or first <= b.address < last for b in buffers)


class HuggingFaceTable(Table):
    """A Hugging Face data set, in the order of its rows and whatever its format."""

    name = "the data set"

    def __init__(self, data: Any) -> None:
        self.data = data.with_format("arrow")
        self.schema, self.sizes = data.data.schema, [len(data)]

    def batches(self, columns: Sequence[str], first: int, rows: int, size: int) -> Iterator[Any]:
        chosen = self.data.select_columns(list(columns))
        for begin in range(first, first + rows, size):
            table = chosen[begin : min(begin + size, first + rows)]
            yield table.select(list(columns)).combine_chunks().to_batches()[0]

    def fingerprint(self) -> str:
        return str(self.data._fingerprint)


@dataclass
class TableShard(Shard):
    """Rows [first, first + rows) of a table."""

    table: Table
    name: str
    first: int
    rows: int
    width: int
    names: Names
    others: tuple[str, ...]
    """Columns that are carried along."""
    first_id: int
    """Number of the first row among all shards; its id where there are none."""

    @property
    def path(self) -> Path | None:
        """The file, where it is one."""
        return getattr(self.table, "path", None)

    def blocks(self, size: int) -> Iterator[Array]:
        if self.names.embedding is None:
            return
        done = 0
        for batch in self._batches([self.names.embedding], size):
            yield _matrix(batch.column(0), self.name, done)
            done += len(batch)

    def _batches(self, columns: Sequence[str], size: int) -> Iterator[Any]:
        return self.table.batches(columns, self.first, self.rows, size)

    def kinds(self) -> Kinds:
        def kind(name: str) -> Any:
            return self.table.schema.field(name).type

        return Kinds(
            np.dtype(np.int64) if self.names.id is None else kind(self.names.id),
            None if self.names.label is None else kind(self.names.label),
            {name: kind(name) for name in self.others},
        )

    def narrow(self) -> Narrow:
        roles = [name for name in (self.names.id, self.names.label) if name is not None]
        read = self._read(list(dict.fromkeys(roles)))
        ids, labels = np.arange(self.first_id, self.first_id + self.rows), None
        if self.names.id is not None:
            ids = plain(read[self.names.id], "ids", self.name)
        if self.names.label is not None:
            labels = plain(read[self.names.label], "labels", self.name)
        return Narrow(ids, labels, Columns(self.others, lambda name: self._read([name])[name]))

    def _read(self, columns: Sequence[str]) -> dict[str, Column]:
        if not columns:
            return {}
        pyarrow = library("pyarrow", "data")
        batches = list(self._batches(columns, BLOCK_ROWS))
        kinds = self.table.schema
        return {
            name: pyarrow.chunked_array(
                [batch.column(place) for batch in batches], kinds.field(name).type
            )
            for place, name in enumerate(columns)
        }

    def further(self, size: int) -> Iterator[tuple[int, dict[str, Column]]]:
        if not self.others:
            yield self.rows, {}
            return
        for batch in self._batches(self.others, size):
            yield len(batch), dict(zip(self.others, batch.columns, strict=True))

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}:{self.table.fingerprint()}"


def table_shards(
    table: Table, names: Names, rows: int, first: int, *, embedded: bool = True
) -> Iterator[TableShard]:
    """The shards of a table.

    Args:
        first: number of the first row among all shards.
        embedded: look for embeddings in the table; else a column of lists is like any other.

    Raises:
        InputError: no embeddings that can be told, or columns that are of another kind than
            their part asks for.
    """
    kinds = {field.name: field.type for field in table.schema}
    require(len(kinds) == len(table.schema), "embeddings", table.schema.names, "every name once")
    found = None
    if embedded:
        lists = [name for name, kind in kinds.items() if _is_vector(kind)]
        found = names.find("embedding", EMBEDDING, lists, table.name)
        if found is None and len(lists) == 1:
            found = lists[0]
        require(len(lists) < 2 or found is not None, "embedding", lists, "the name of one")
    others = [name for name in kinds if name != found]
    whole = [name for name in others if family(kinds[name]) in ("whole", "text")]
    classes = [name for name in others if family(kinds[name]) != "other"]
    own = Names(
        found,
        names.find("id", ID, others, table.name, whole),
        names.find("label", LABEL, others, table.name, classes),
    )
    carried = tuple(name for name in others if name not in (own.id, own.label))
    width = _width(table, found)
    total = sum(table.sizes)
    for begin, count in ranges(table.sizes, rows):
        name = table.name if count == total else f"{table.name}[{begin}:{begin + count}]"
        yield TableShard(table, name, begin, count, width, own, carried, first + begin)


def _is_vector(kind: Any) -> bool:
    """Whether it is a list of numbers."""
    types = library("pyarrow", "data").types
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return lists and family(kind.value_type) in ("whole", "float")


def _width(table: Table, embedding: str | None) -> int:
    """Length of the first embedding."""
    if embedding is None or not sum(table.sizes):
        return 0
    batch = next(table.batches([embedding], 0, 1, 1))
    return int(_matrix(batch.column(0), table.name, 0).shape[1])


def _matrix(column: Any, name: str, first: int) -> Array:
    """A column of lists as (rows, width).

    Raises:
        InputError: a row is missing, or of another width than the others.
    """
    pyarrow = library("pyarrow", "data")
    compute = library("pyarrow.compute", "data")
    if column.null_count:
        row = first + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        told = described(f"no embedding in row {row} of {name}")
        raise InputError("embeddings", told, "an embedding in every row")
    values = column.flatten()
    if not len(values):
        raise InputError("embeddings", described(f"no numbers in row {first} of {name}"), "numbers")
    if not pyarrow.types.is_fixed_size_list(column.type):
        own = compute.list_value_length(column).to_numpy()
        if (other := np.flatnonzero(own != own[0])).size:
            row = int(other[0])
            told = described(f"width {own[row]} in row {first + row} of {name}")
            raise InputError("embeddings", told, f"width {own[0]} in every row")
    if values.null_count:
        place = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = first + place // (len(values) // len(column))
        told = described(f"a missing number in row {row} of {name}")
        raise InputError("embeddings", told, "numbers")
    found: Array = values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return found
