"""npy and npz: an array of embeddings, and arrays of one value a row beside it.

Beside ``part.npy`` may lie ``part.ids.npy``, ``part.labels.npy`` and ``part.ANY.npy``; an npz has
all of these as members. Any range of rows is read from where it stands in the file, so nothing is
read whole. A compressed member has to be unpacked from its beginning to get there.
"""

from __future__ import annotations

import glob
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from secateurs.errors import described, require
from secateurs.selection.columns import Array, Kinds, plain
from secateurs.selection.embeddings import Narrow, Shard
from secateurs.selection.names import EMBEDDING, ID, LABEL, Names
from secateurs.selection.reading import ranges, reading, stamp


@dataclass(frozen=True)
class Stored:
    """An array in a file: an npy file, or a member of an npz.

    Attributes:
        name: what errors call it.
        member: of an npz; None for an npy.
        start: where in the file its values begin; None where they are compressed.
    """

    path: Path
    name: str
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int | None

    @staticmethod
    def npy(path: Path) -> Stored:
        """The array of an npy file."""
        with reading(path), open(path, "rb") as stream:
            shape, dtype = _header(stream, path.name)
            start = stream.tell()
        _check_size(path, start, shape, dtype)
        return Stored(path, path.name, None, shape, dtype, start)

    @staticmethod
    def members(path: Path) -> dict[str, Stored]:
        """The arrays of an npz by name."""
        found = {}
        with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
            for about in archive.infolist():
                name = about.filename.removesuffix(".npy")
                told = f"{name} in {path.name}"
                with archive.open(about) as stream:
                    shape, dtype = _header(stream, told)
                    length = stream.tell()
                start = None
                if about.compress_type == zipfile.ZIP_STORED:
                    raw.seek(about.header_offset + 26)  # lengths of name and extra field
                    sizes = np.frombuffer(raw.read(4), "<u2")
                    start = about.header_offset + 30 + int(sizes.sum()) + length
                    _check_size(path, start, shape, dtype)
                found[name] = Stored(path, told, about.filename, shape, dtype, start)
        require(bool(found), "embeddings", described(f"no arrays in {path.name}"), "some")
        return found

    def blocks(self, first: int, rows: int, size: int) -> Iterator[Array]:
        """Rows from the first on, at most `size` at a time, in the machine's byte order."""
        width = int(np.prod(self.shape[1:]))
        native = self.dtype.newbyteorder("=")
        with reading(self.path), self._stream(first * width * self.dtype.itemsize) as stream:
            for done in range(0, rows, size):
                count = min(size, rows - done)
                data = stream.read(count * width * self.dtype.itemsize)
                block = np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
                yield block.astype(native, copy=False)

    def read(self, first: int, rows: int) -> Array:
        """Rows from the first on."""
        return np.concatenate(list(self.blocks(first, rows, max(rows, 1))))

    @contextmanager
    def _stream(self, offset: int) -> Iterator[IO[bytes]]:
        """Bytes from an offset into the values; not mapped, so that they leave no pages behind."""
        if self.start is not None:
            with open(self.path, "rb") as file:
                file.seek(self.start + offset)
                yield file
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(str(self.member)) as stream:
            _header(stream, self.name)
            stream.seek(offset, 1)  # unpacks what is before
            yield stream


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an npy stream, which then stands at its first value.

    Raises:
        InputError: it is in Fortran order, or holds objects.
    """
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(stream)
    told = "Fortran order" if fortran else "objects"
    good = not fortran and not dtype.hasobject
    accepted = "numbers, or texts of fixed width, in C order"
    require(good, "embeddings", described(f"an array in {told} in {name}"), accepted)
    return shape, dtype


def _check_size(path: Path, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    wanted = start + int(np.prod(shape)) * dtype.itemsize
    size = path.stat().st_size
    told = f"a whole file of {wanted} bytes, not {size}"
    require(size >= wanted, "embeddings", str(path), told)


def is_sidecar(path: Path) -> bool:
    """Whether it is a column of an npy file."""
    stem, _, column = path.stem.rpartition(".")
    own = path.suffix.lower() == ".npy" and bool(column)
    return own and path.with_name(f"{stem}{path.suffix}").exists()


def _sidecars(path: Path) -> dict[str, Stored]:
    """Columns beside an npy file by name."""
    files = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*{path.suffix}"))
    return {file.stem.removeprefix(f"{path.stem}."): Stored.npy(file) for file in files}


@dataclass
class ArraysShard(Shard):
    """Rows [first, first + rows) of an array, and of the columns that go with it."""

    path: Path
    name: str
    first: int
    rows: int
    width: int
    embedding: Stored | None
    columns: Mapping[str, Stored]
    names: Names
    first_id: int
    """Number of the first row among all shards; its id where there are none."""

    def blocks(self, size: int) -> Iterator[Array]:
        if self.embedding is not None:
            yield from self.embedding.blocks(self.first, self.rows, size)

    def kinds(self) -> Kinds:
        kinds = {name: stored.dtype.newbyteorder("=") for name, stored in self.columns.items()}
        roles = (self.names.id, self.names.label)
        return Kinds(
            np.dtype(np.int64) if self.names.id is None else _as_text(kinds[self.names.id]),
            None if self.names.label is None else _as_text(kinds[self.names.label]),
            {name: kind for name, kind in kinds.items() if name not in roles},
        )

    def narrow(self) -> Narrow:
        found = {n: stored.read(self.first, self.rows) for n, stored in self.columns.items()}
        id_name, label_name = self.names.id, self.names.label
        ids = np.arange(self.first_id, self.first_id + self.rows)
        return Narrow(
            ids if id_name is None else plain(found.pop(id_name), "ids", self.name),
            None if label_name is None else plain(found.pop(label_name), "labels", self.name),
            found,
        )

    def fingerprint(self) -> str:
        files = {self.path, *(stored.path for stored in self.columns.values())}
        return f"{super().fingerprint()}:{stamp(sorted(files))}"


def _as_text(kind: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(str) if kind.kind in "SU" else kind


def array_shards(file: Path, names: Names, rows: int, first: int) -> Iterator[Shard]:
    """The shards of an npy or npz file.

    Args:
        first: number of the first row among all shards.

    Raises:
        InputError: no embeddings that can be told, or columns of another length.
    """
    if file.suffix.lower() == ".npy":
        embedding: Stored | None = Stored.npy(file)
        columns = _sidecars(file)
    else:
        columns = Stored.members(file)
        embedding = _embedding_among(columns, names, file.name)
        columns = {name: stored for name, stored in columns.items() if stored is not embedding}
    if embedding is not None:
        _check_matrix(embedding)
    total = _rows_of(embedding, columns)
    for stored in columns.values():
        told = described(f"shape {stored.shape} in {stored.name}")
        accepted = f"one value for each of {total} rows of {file.name}"
        require(stored.shape == (total,), "embeddings", told, accepted)
    present = list(columns)
    own = Names(
        None,
        names.find("id", ID, present, file.name),
        names.find("label", LABEL, present, file.name),
    )
    width = 0 if embedding is None else embedding.shape[1]
    for begin, count in ranges([total], rows):
        name = file.name if count == total else f"{file.name}[{begin}:{begin + count}]"
        yield ArraysShard(
            file, name, begin, count, width, embedding, columns, own, first + begin
        )  # fmt: skip


def _embedding_among(stored: Mapping[str, Stored], names: Names, file: str) -> Stored | None:
    matrices = [name for name, one in stored.items() if len(one.shape) == 2]
    found = names.find("embedding", EMBEDDING, list(stored), file, matrices)
    if found is None and len(matrices) == 1:
        found = matrices[0]
    require(len(matrices) < 2 or found is not None, "embedding", matrices, "the name of one")
    return None if found is None else stored[found]


def _rows_of(embedding: Stored | None, columns: Mapping[str, Stored]) -> int:
    shapes = [stored.shape for stored in columns.values() if stored.shape]
    if embedding is not None:
        return embedding.shape[0]
    return shapes[0][0] if shapes else 0


def _check_matrix(stored: Stored) -> None:
    shape, dtype = stored.shape, stored.dtype
    good = len(shape) == 2 and dtype.kind in "fiub" and dtype.itemsize <= 8 and shape[-1] > 0
    told = described(f"{dtype} of shape {shape} in {stored.name}")
    require(good, "embeddings", told, "numbers of shape (rows, width), of at most 64 bits")
