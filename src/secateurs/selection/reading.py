"""Files that shards are read from: what tells that they changed, and what damage is called."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from secateurs.errors import InputError

DAMAGE = (
    OSError, ValueError, KeyError, EOFError, NotImplementedError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
"""What readers raise of files that are damaged; Arrow's errors are among them."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What a reader raises within names the file.

    Raises:
        InputError: the file is damaged, or of a kind that its reader does not know.
    """
    try:
        yield
    except InputError:
        raise
    except DAMAGE as error:
        whole = f"a whole {path.suffix.lower().lstrip('.')} file ({error})"
        raise InputError("embeddings", str(path), whole) from None


def stamp(paths: Sequence[Path]) -> str:
    """What changes when one of the files does: names, sizes and times."""
    told = ((path.absolute(), path.stat()) for path in paths)
    return ":".join(f"{path}:{about.st_size}:{about.st_mtime_ns}" for path, about in told)


def ranges(sizes: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """Consecutive rows as (first, count): whole parts together while at most `rows`; larger parts
    are cut."""
    first = count = 0
    for size in sizes:
        if count and count + size > rows:
            yield first, count
            first, count = first + count, 0
        count += size
        while count > rows:
            yield first, rows
            first, count = first + rows, count - rows
    if count:
        yield first, count
