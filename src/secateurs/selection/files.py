"""Embeddings on disk: Parquet, Arrow (Feather), npy and npz, one file or a folder of shards.

A table has a column of lists (the embedding), maybe ids and labels, and further columns of
numbers or texts that are carried along. Beside ``part.npy`` may lie ``part.ids.npy``,
``part.labels.npy`` and ``part.ANY.npy``; an npz has all of these as members. Rows without ids are
numbered. Nothing is read whole: Parquet and Arrow by batches, npy and npz by blocks of rows.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from secateurs.errors import InputError, described, library, require, unknown
from secateurs.selection.embeddings import SHARD_ROWS, Array, Embeddings, Narrow, Shard

EMBEDDING = ("embedding", "embeddings", "emb", "vector", "vectors", "features", "x")
ID = ("id", "ids", "uid", "key")
LABEL = ("label", "labels", "class", "y")
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
ARRAYS = {".npy": "npy", ".npz": "npz"}
SUFFIXES = (*TABLES, *ARRAYS)


@dataclass(frozen=True)
class Names:
    """Columns by the part they play; those not given are found by the usual names."""

    embedding: str | None = None
    id: str | None = None
    label: str | None = None

    def find(
        self, role: str, usual: Sequence[str], present: Sequence[str], file: str
    ) -> str | None:
        """The column of a role, or None.

        Raises:
            InputError: it was given, and is not there.
        """
        given: str | None = getattr(self, role)
        if given is not None and given not in present:
            raise unknown(f"{role} of {file}", given, present)
        return given or next((name for name in usual if name in present), None)


def open_files(path: str | Path, names: Names | None = None, rows: int = SHARD_ROWS) -> Embeddings:
    """The embeddings in a file, or in all files of a folder in the order of their names.

    Args:
        names: of columns, where they are not the usual ones.
        rows: about so many make a shard.

    Raises:
        InputError: no such file, of another kind, damaged, or without embeddings; shards that
            are not alike.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.name[0] not in "._")
        files = [p for p in files if not _beside_another(p)]
        kinds = f"a folder with files that end in {', '.join(SUFFIXES)}"
        require(bool(files), "embeddings", str(path), kinds)
    shards: list[Shard] = []
    done = 0
    for file in files:
        require(file.is_file(), "embeddings", str(file), "an existing file or folder")
        if file.suffix not in SUFFIXES:
            raise InputError("embeddings", str(file), f"a file in {', '.join(SUFFIXES)}")
        for shard in _shards_of(file, names or Names(), rows, done):
            shards.append(shard)
            done += shard.rows
    return Embeddings(shards)


def _beside_another(path: Path) -> bool:
    """Whether it is a column of an npy file."""
    stem, _, column = path.stem.rpartition(".")
    return path.suffix == ".npy" and bool(column) and path.with_name(f"{stem}.npy").exists()


def _shards_of(file: Path, names: Names, rows: int, first: int) -> Iterator[Shard]:
    try:
        if file.suffix == ".npy":
            yield from _npy_shards(file, rows, first)
        elif file.suffix == ".npz":
            yield _npz_shard(file, names, first)
        else:
            yield from _table_shards(file, names, rows, first)
    except InputError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        whole = f"a whole {file.suffix.lstrip('.')} file ({error})"
        raise InputError("embeddings", str(file), whole) from None


class _FileShard(Shard):
    """Part of a file; its fingerprint follows the file's size and time."""

    path: Path

    def fingerprint(self) -> str:
        told = self.path.stat()
        return f"{super().fingerprint()}:{self.path.absolute()}:{told.st_size}:{told.st_mtime_ns}"


# ---------------------------------------------------------------- npy and npz


@dataclass
class NpyShard(_FileShard):
    """Rows [first, first + rows) of an npy file; not mapped, so that they leave no pages behind."""

    path: Path
    name: str
    first: int
    rows: int
    width: int
    dtype: np.dtype[Any]
    start: int
    first_id: int
    """Number of the first row among all shards; its id where there are none."""

    def blocks(self, size: int) -> Iterator[Array]:
        with open(self.path, "rb") as file:
            file.seek(self.start + self.first * self.width * self.dtype.itemsize)
            for done in range(0, self.rows, size):
                count = min(size, self.rows - done)
                block = np.fromfile(file, self.dtype, count * self.width)
                yield block.reshape(count, self.width)

    def narrow(self) -> Narrow:
        own = slice(self.first, self.first + self.rows)
        found = {}
        for file in sorted(self.path.parent.glob(f"{self.path.stem}.*.npy")):
            column = file.stem.removeprefix(f"{self.path.stem}.")
            values = np.load(file, mmap_mode="r", allow_pickle=False)
            _check_length(values, self.path, file.name)
            found[column] = np.array(values[own])
        return _narrow(found, self.first_id, self.rows)


def _check_length(values: Array, path: Path, name: str) -> None:
    with open(path, "rb") as file:
        rows = _header(file)[0][0]
    if values.ndim != 1 or len(values) != rows:
        told = described(f"shape {values.shape} in {name}")
        raise InputError("embeddings", told, f"one value for each of {rows} rows of {path.name}")


def _narrow(
    found: Mapping[str, Array], first_id: int, rows: int, names: Names | None = None
) -> Narrow:
    """Columns by their roles; rows without ids get their numbers."""
    names, present = names or Names(), list(found)
    id_name = names.find("id", ID, present, "embeddings")
    label_name = names.find("label", LABEL, present, "embeddings")
    ids = np.arange(first_id, first_id + rows) if id_name is None else _plain(found[id_name])
    return Narrow(
        ids,
        None if label_name is None else _plain(found[label_name]),
        {k: _plain(v) for k, v in found.items() if k not in (id_name, label_name)},
    )


def _plain(values: Array) -> Array:
    """Texts as fixed-width strings, bytes as texts."""
    return values.astype(str) if values.dtype.kind in "OS" else values


def _header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an npy stream, which then stands at its first value.

    Raises:
        InputError: it is in Fortran order, or holds objects.
    """
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(file)
    plain = not fortran and not dtype.hasobject
    told = "Fortran order" if fortran else "objects"
    require(plain, "embeddings", described(f"an array in {told}"), "numbers in C order")
    return shape, dtype


def _check_matrix(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    good = len(shape) == 2 and dtype.kind in "fiub" and shape[-1] > 0
    told = described(f"{dtype} of shape {shape} in {name}")
    require(good, "embeddings", told, "numbers of shape (rows, width)")


def _npy_shards(file: Path, rows: int, first: int) -> Iterator[Shard]:
    with open(file, "rb") as stream:
        shape, dtype = _header(stream)
        start = stream.tell()
    _check_matrix(shape, dtype, file.name)
    wanted = start + shape[0] * shape[1] * dtype.itemsize
    size = file.stat().st_size
    require(size >= wanted, "embeddings", str(file), f"a whole file of {wanted} bytes, not {size}")
    for begin in range(0, shape[0], rows):
        count = min(rows, shape[0] - begin)
        name = file.name if shape[0] <= rows else f"{file.name}[{begin}:{begin + count}]"
        yield NpyShard(file, name, begin, count, shape[1], dtype, start, first + begin)


@dataclass
class NpzShard(_FileShard):
    """An npz file; its members are read as streams, compressed or not."""

    path: Path
    name: str
    rows: int
    width: int
    member: str | None
    names: Names
    first_id: int

    def blocks(self, size: int) -> Iterator[Array]:
        if self.member is None:
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.member}.npy") as stream:
            _, dtype = _header(stream)  # type: ignore[arg-type]
            for done in range(0, self.rows, size):
                count = min(size, self.rows - done)
                data = stream.read(count * self.width * dtype.itemsize)
                yield np.frombuffer(data, dtype).reshape(count, self.width)

    def narrow(self) -> Narrow:
        with np.load(self.path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files if name != self.member}
        for name, values in found.items():
            told = described(f"shape {values.shape} of {name} in {self.name}")
            require(values.shape == (self.rows,), "embeddings", told, f"({self.rows},)")
        return _narrow(found, self.first_id, self.rows, self.names)


def _npz_shard(file: Path, names: Names, first: int) -> NpzShard:
    shapes = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                shapes[member.removesuffix(".npy")] = _header(stream)  # type: ignore[arg-type]
    found = names.find("embedding", EMBEDDING, list(shapes), file.name)
    matrices = [name for name, (shape, _) in shapes.items() if len(shape) == 2]
    if found is None and len(matrices) == 1:
        found = matrices[0]
    require(len(matrices) < 2 or found is not None, "embedding", matrices, "the name of one")
    if found is not None:
        _check_matrix(*shapes[found], file.name)
    shape = shapes[found][0] if found is not None else (*next(iter(shapes.values()))[0][:1], 0)
    return NpzShard(file, file.name, shape[0], shape[1], found, names, first)


# ---------------------------------------------------------------- Parquet and Arrow


@dataclass
class TableShard(_FileShard):
    """Row groups of a Parquet file or record batches of an Arrow file."""

    path: Path
    name: str
    rows: int
    width: int
    groups: tuple[int, ...]
    embedding: str | None
    others: tuple[str, ...]
    names: Names
    first_id: int

    def blocks(self, size: int) -> Iterator[Array]:
        first = 0
        for batch in self._batches([self.embedding] if self.embedding else [], size):
            column = batch.column(0)
            for begin in range(0, len(column), size):
                part = column.slice(begin, size)
                yield _matrix(part, self.name, first)
                first += len(part)

    def narrow(self) -> Narrow:
        pyarrow = library("pyarrow", "data")
        found: dict[str, Array] = {}
        batches = list(self._batches(list(self.others), SHARD_ROWS)) if self.others else []
        for place, name in enumerate(self.others):
            column = pyarrow.chunked_array([batch.column(place) for batch in batches])
            if pyarrow.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            missing = column.null_count and name in (self.names.id, self.names.label)
            told = described(f"{column.null_count} without a value in {self.name}")
            require(not missing, name, told, "a value for every row")
            found[name] = column.to_numpy()
        return _narrow(found, self.first_id, self.rows, self.names)

    def _batches(self, columns: list[str], size: int) -> Iterator[Any]:
        if not columns:
            return
        if TABLES[self.path.suffix] == "parquet":
            with library("pyarrow.parquet", "data").ParquetFile(self.path) as file:
                for batch in file.iter_batches(size, list(self.groups), columns):
                    yield batch.select(columns)
            return
        with _arrow_file(self.path) as file:
            for group in self.groups:
                yield file.get_batch(group).select(columns)


def _arrow_file(path: Path) -> Any:
    pyarrow = library("pyarrow", "data")
    library("pyarrow.ipc", "data")
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))


def _matrix(column: Any, name: str, first: int) -> Array:
    """A column of lists as (rows, width).

    Raises:
        InputError: a row is missing, or of another width than the others.
    """
    pyarrow = library("pyarrow", "data")
    compute = library("pyarrow.compute", "data")
    lengths = compute.list_value_length(column)
    if column.null_count:
        row = first + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        told = described(f"no embedding in row {row} of {name}")
        raise InputError("embeddings", told, "an embedding in every row")
    if not pyarrow.types.is_fixed_size_list(column.type):
        own = lengths.to_numpy()
        if (other := np.flatnonzero(own != own[0])).size:
            row = int(other[0])
            told = described(f"width {own[row]} in row {first + row} of {name}")
            raise InputError("embeddings", told, f"width {own[0]} in every row")
    values = column.flatten()
    if values.null_count:
        place = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = first + place // (len(values) // len(column))
        told = described(f"a missing number in row {row} of {name}")
        raise InputError("embeddings", told, "numbers")
    found: Array = values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
    return found


def _table_shards(file: Path, names: Names, rows: int, first: int) -> Iterator[Shard]:
    """A shard for so many row groups as have about `rows` rows."""
    pyarrow = library("pyarrow", "data")
    if TABLES[file.suffix] == "parquet":
        with library("pyarrow.parquet", "data").ParquetFile(file) as opened:
            schema, about = opened.schema_arrow, opened.metadata
            sizes = [about.row_group(g).num_rows for g in range(about.num_row_groups)]
    else:
        with _arrow_file(file) as opened:
            schema = opened.schema
            sizes = [opened.get_batch(g).num_rows for g in range(opened.num_record_batches)]
    lists = [field.name for field in schema if pyarrow.types.is_list(field.type)
             or pyarrow.types.is_large_list(field.type)
             or pyarrow.types.is_fixed_size_list(field.type)]  # fmt: skip
    found = names.find("embedding", EMBEDDING, lists, file.name)
    if found is None and len(lists) == 1:
        found = lists[0]
    require(len(lists) < 2 or found is not None, "embedding", lists, "the name of one")
    others = [f.name for f in schema if f.name not in lists and _carried(f.type)]
    own = Names(
        found,
        names.find("id", ID, others, file.name),
        names.find("label", LABEL, others, file.name),
    )
    begin, group = first, 0
    while group < len(sizes):
        last = group + 1
        while last < len(sizes) and sum(sizes[group : last + 1]) <= rows:
            last += 1
        count = sum(sizes[group:last])
        name = file.name if last - group == len(sizes) else f"{file.name}[{group}:{last}]"
        shard = TableShard(
            file, name, count, 0, tuple(range(group, last)), found, tuple(others), own, begin
        )
        if found is not None and count:
            shard.width = next(shard.blocks(1)).shape[1]
        yield shard
        begin, group = begin + count, last


def _carried(kind: Any) -> bool:
    """Whether a column holds one number or text a row."""
    types = library("pyarrow", "data").types
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind)
    return bool(number or text)
