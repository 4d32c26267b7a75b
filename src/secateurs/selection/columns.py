"""What goes along with a row: ids, labels and further columns, as numpy or Arrow arrays.

Ids and labels are whole numbers or texts. Further columns are whatever they are: those of tables
stay Arrow arrays, so that missing values, texts and structures come out as they went in. Shards
agree on one kind of every column before anything is computed (`one_kind`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secateurs.errors import InputError, described, library, require

Array = NDArray[Any]
Column = Any
"""A numpy array, a ``pyarrow.Array`` or a ``pyarrow.ChunkedArray``, (rows,)."""
Kind = Any
"""A numpy dtype or a ``pyarrow.DataType``."""


@dataclass(frozen=True)
class Kinds:
    """Of what kind the ids, the labels and every further column are."""

    id: Kind
    label: Kind | None = None
    columns: dict[str, Kind] = field(default_factory=dict)


class Columns(Mapping[str, Column]):
    """Further columns by name, each read when it is asked for."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Column]) -> None:
        self._names, self._read = tuple(names), read

    def __getitem__(self, name: str) -> Column:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def is_arrow(values: Any) -> bool:
    """Whether it is an Arrow array or an Arrow type."""
    return any(base.__module__.partition(".")[0] == "pyarrow" for base in type(values).__mro__)


def kind_of(values: Column) -> Kind:
    """The kind of a column."""
    return values.type if is_arrow(values) else values.dtype


def carried(values: Any, name: str) -> Column:
    """A column as it is carried: numbers as numpy, texts and mixtures with None as Arrow.

    Raises:
        InputError: the values are of different kinds.
    """
    if is_arrow(values):
        return values
    made = values
    if not isinstance(values, np.ndarray):
        made = np.asarray(values, object)
        if not any(isinstance(value, str | bytes) or _is_absent(value) for value in made.flat):
            made = np.asarray(values)
    if made.dtype.kind == "T":
        made = made.astype(object)
    if made.dtype.kind != "O" or made.ndim != 1 or find_spec("pyarrow") is None:
        return made  # an array of fixed-width texts would take its longest for every row
    pyarrow = library("pyarrow", "data")
    try:
        return pyarrow.array(made, from_pandas=True)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise InputError(name, described(str(error)), "values of one kind") from None


# ---------------------------------------------------------------- ids, labels and numbers


def family(kind: Kind) -> str:
    """``whole``, ``text``, ``float``, or ``other``."""
    if not is_arrow(kind):
        return {"b": "whole", "i": "whole", "u": "whole", "f": "float"}.get(
            kind.kind, "text" if kind.kind in "US" else "other"
        )
    types = library("pyarrow", "data").types
    if types.is_dictionary(kind):
        return family(kind.value_type)
    if types.is_integer(kind) or types.is_boolean(kind):
        return "whole"
    if types.is_floating(kind):
        return "float"
    texts = (types.is_string, types.is_large_string, getattr(types, "is_string_view", None))
    return "text" if any(one is not None and one(kind) for one in texts) else "other"


def plain(values: Column, name: str, where: str) -> Array:
    """A column as numpy: numbers, or texts of fixed width.

    Args:
        name: of the column. where: the shard.

    Raises:
        InputError: a value is missing, or the values are neither numbers nor texts.
    """
    if not is_arrow(values):
        return _plain_numpy(values, name, where)
    if values.null_count:
        missing = values.is_null().to_numpy(**_copying(values))
        _refuse_missing(missing, name, where)
    kind = values.type
    if family(kind) == "other":
        raise InputError(name, described(f"{kind} in {where}"), "whole numbers or texts")
    if library("pyarrow", "data").types.is_dictionary(kind):
        values = values.cast(kind.value_type)
    made: Array = values.to_numpy(**_copying(values))
    return made.astype(str) if family(kind) == "text" else made


def _copying(values: Column) -> dict[str, bool]:
    """Chunked arrays are always copied, and old ones take no such argument."""
    return {} if hasattr(values, "chunks") else {"zero_copy_only": False}


def _plain_numpy(values: Array, name: str, where: str) -> Array:
    if values.dtype.kind == "S":
        try:
            return np.char.decode(values, "utf-8")
        except UnicodeDecodeError as error:
            told = described(f"bytes in {where} that are no text ({error.reason})")
            raise InputError(name, told, "texts in UTF-8, or whole numbers") from None
    if values.dtype.kind != "O":
        return values
    missing = np.array([_is_missing(value) for value in values.flat], bool)
    if missing.any():
        _refuse_missing(missing, name, where)
    kinds = {str if isinstance(value, str) else np.asarray(value).dtype.type for value in values}
    if len(kinds) == 1:
        made = np.array(values.tolist())
        if made.dtype.kind in "biufU":
            return made
    told = described(f"{', '.join(sorted(kind.__name__ for kind in kinds))} in {where}")
    raise InputError(name, told, "whole numbers or texts")


def _is_absent(value: Any) -> bool:
    """None, or what pandas writes for it."""
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _is_missing(value: Any) -> bool:
    """Absent, or NaN."""
    return _is_absent(value) or bool(value != value)


def _refuse_missing(missing: Array, name: str, where: str) -> None:
    row = int(np.flatnonzero(missing)[0])
    raise InputError(name, described(f"no value in row {row} of {where}"), "a value in every row")


def numbers(values: Column, name: str, where: str) -> Array:
    """A column as float64.

    Raises:
        InputError: a value is missing or NaN, or they are no numbers.
    """
    told = described(f"{kind_of(values)} in {where}")
    require(family(kind_of(values)) in ("whole", "float"), name, told, "numbers")
    made: Array = plain(values, name, where).astype(np.float64)
    if np.isnan(made).any():
        row = int(np.flatnonzero(np.isnan(made))[0])
        raise InputError(name, described(f"NaN in row {row} of {where}"), "numbers")
    return made


# ---------------------------------------------------------------- one kind for all shards


def arrow_kind(kind: Kind) -> Any:
    """The Arrow type of a kind; objects are texts where nobody could tell.

    Raises:
        NotImplementedError: Arrow has none.
    """
    pyarrow = library("pyarrow", "data")
    if is_arrow(kind):
        return kind
    if kind.kind in "UO":
        return pyarrow.string()
    return pyarrow.from_numpy_dtype(kind.newbyteorder("="))


def one_kind(name: str, kinds: Sequence[tuple[str, Kind]]) -> Kind:
    """The kind that a column has in all shards: what those of the shards can be widened to.

    Args:
        name: of the column. kinds: by the name of the shard.

    Raises:
        InputError: there is none; two shards are named.
    """
    where, found = kinds[0]
    for other, kind in kinds[1:]:
        if type(kind) is not type(found) or kind != found:
            wider = _wider(found, kind)
            if wider is None:
                raise InputError(
                    name, described(f"{kind} in {other}"), f"{found}, as in {where}"
                )  # fmt: skip
            found = wider
    return found


def _wider(one: Kind, other: Kind) -> Kind | None:
    pyarrow = library("pyarrow", "data")
    try:
        kinds = [decoded(arrow_kind(kind)) for kind in (one, other)]
        if pyarrow.uint64() in kinds and {family(kind) for kind in kinds} == {"whole"}:
            return None  # Arrow would take int64, which does not hold them
        schemas = [pyarrow.schema([("", kind)]) for kind in kinds]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, NotImplementedError):
        return None


def decoded(kind: Any) -> Any:
    """Of a dictionary the type of its values."""
    return kind.value_type if library("pyarrow", "data").types.is_dictionary(kind) else kind


def as_arrow(values: Column, kind: Any) -> Any:
    """A column as an Arrow array of a kind, to which `one_kind` widened it."""
    pyarrow = library("pyarrow", "data")
    if not is_arrow(values):
        native = values.astype(values.dtype.newbyteorder("="), copy=False)
        values = pyarrow.array(native, from_pandas=values.dtype.kind == "O")
    return values if values.type == kind else values.cast(kind, safe=False)


def can_be_written(name: str, kind: Kind) -> bool:
    """Whether Parquet holds a column of this kind."""
    pyarrow, parquet = library("pyarrow", "data"), library("pyarrow.parquet", "data")
    try:
        schema = pyarrow.schema([(name, arrow_kind(kind))])
        parquet.ParquetWriter(pyarrow.BufferOutputStream(), schema).close()
    except (NotImplementedError, pyarrow.ArrowInvalid):
        return False
    return True
