"""Embeddings on disk: Parquet, Arrow (Feather), npy and npz, one file or a folder of shards.

Files of a folder are read in the order of their names; rows without ids are numbered over all of
them. How the formats are read: `tables` (Parquet, Arrow) and `arrays` (npy, npz).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from secateurs.errors import InputError, described, require
from secateurs.selection.arrays import array_shards, is_sidecar
from secateurs.selection.embeddings import SHARD_ROWS, Embeddings, Shard
from secateurs.selection.names import Names
from secateurs.selection.reading import reading
from secateurs.selection.tables import ARROW, PARQUET, ArrowTable, ParquetTable, table_shards

__all__ = ["Names", "open_files"]

ARRAYS = (".npy", ".npz")
SUFFIXES = (*PARQUET, *ARROW, *ARRAYS)
"""Of the files that are read, in small letters."""
LOOKED_AT = 10_000
"""Files of a subfolder that are looked at for one that is not read."""


def open_files(path: str | Path, names: Names | None = None, rows: int = SHARD_ROWS) -> Embeddings:
    """The embeddings in a file, or in all files of a folder in the order of their names.

    Args:
        names: of columns, where they are not the usual ones.
        rows: a shard has at most so many.

    Raises:
        InputError: no such file, of another kind, damaged, or without embeddings; shards that
            are not alike.
    """
    path, notes = Path(path), []
    files = [path]
    if path.is_dir():
        files = _files_in(path)
        below = _below(path)
        told = str(path) if not below else described(f"{path}, whose files are in {below[0]}")
        kinds = f"a folder with files that end in {', '.join(SUFFIXES)}"
        require(bool(files), "embeddings", told, kinds)
        if below:
            more = f" and {len(below) - 1} more" if len(below) > 1 else ""
            notes.append(f"files in subfolders were not read: {below[0]}{more}")
    shards: list[Shard] = []
    done = 0
    for file in files:
        require(file.is_file(), "embeddings", str(file), "an existing file or folder")
        if file.suffix.lower() not in SUFFIXES:
            raise InputError("embeddings", str(file), f"a file in {', '.join(SUFFIXES)}")
        for shard in _shards_of(file, names or Names(), rows, done):
            shards.append(shard)
            done += shard.rows
    source = Embeddings(shards)
    source.notes += notes
    return source


def _files_in(folder: Path) -> list[Path]:
    seen = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] not in "._")
    return [p for p in sorted(seen) if p.is_file() and not is_sidecar(p)]


def _below(folder: Path) -> list[Path]:
    """Subfolders with files of these kinds; not those whose names say that they are hidden."""
    inner = (p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._")
    return [p for p in sorted(inner) if any(Path(f).suffix.lower() in SUFFIXES for f in _some(p))]


def _some(folder: Path) -> Iterator[str]:
    """Names of files below a folder, but not of a million pictures."""
    every = (name for _, _, names in os.walk(folder) for name in names)
    return islice(every, LOOKED_AT)


def _shards_of(file: Path, names: Names, rows: int, first: int) -> Iterator[Shard]:
    suffix = file.suffix.lower()
    with reading(file):
        if suffix in ARRAYS:
            yield from array_shards(file, names, rows, first)
        else:
            table = ParquetTable(file) if suffix in PARQUET else ArrowTable(file)
            yield from table_shards(table, names, rows, first)
