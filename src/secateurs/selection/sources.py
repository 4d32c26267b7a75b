"""What people hold, as `Embeddings`: arrays, tensors, paths, data sets with an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from secateurs.errors import InputError, described, require
from secateurs.parts.costs import evaluating
from secateurs.selection.columns import (
    Array,
    Column,
    Columns,
    Kinds,
    carried,
    is_arrow,
    kind_of,
    plain,
)
from secateurs.selection.embeddings import SHARD_ROWS, ArrayShard, Embeddings, Narrow, Shard
from secateurs.selection.files import open_files
from secateurs.selection.names import EMBEDDING, ID, LABEL, Names
from secateurs.selection.tables import HuggingFaceTable, table_shards
from secateurs.state import Tree
from secateurs.workspace import Workspace

Encoder = Callable[[Any], Any]
"""From a batch of samples, stacked as `torch.utils.data.default_collate` does (or a list where
that cannot be done), to their embeddings, (samples, width)."""
ENCODED_ROWS = 1 << 14
"""Samples whose embeddings are kept as one finished step."""


def as_embeddings(
    source: Any,
    *,
    ids: Any = None,
    labels: Any = None,
    scores: Mapping[str, Any] | None = None,
    encoder: Encoder | None = None,
    samples: Any = None,
    names: Names | None = None,
    batch_size: int = 256,
    work: Workspace | None = None,
) -> Embeddings:
    """Embeddings out of whatever holds them.

    Args:
        source: `Embeddings`; a path; a tensor or array (rows, width); a mapping of such with
            ``embeddings`` and maybe ``ids``, ``labels`` and further columns; a Hugging Face
            data set, read as a file of its columns would be, or with embeddings that the
            encoder makes of its samples; a torch data set, whose samples the encoder embeds, and
            which without one has only ids and labels.
        ids, labels: (rows,), where the source has none of its own.
        scores: further columns by name, each (rows,).
        encoder: what embeds the samples of a data set; a module is run in eval mode.
        samples: the data set behind embeddings that were made from one.
        work: where what the encoder made is kept, so that it is not run again.

    Raises:
        InputError: of another kind, or lengths that differ.
    """
    if isinstance(source, str | Path):
        source = open_files(source, names)
    given = {"ids": ids, "labels": labels, "scores": scores}
    if isinstance(source, Embeddings):
        beside = next((name for name, values in given.items() if values is not None), None)
        if beside is not None:
            told = described("embeddings in files, which have columns of their own")
            raise InputError(beside, told, f"no {beside} beside them")
        source.samples = source.samples if samples is None else samples
        return source
    columns: dict[str, Any] = dict(scores or {})
    if _is_hugging_face(source):
        samples = source if samples is None else samples
        work = work or Workspace()
        vectors = None
        if encoder is not None:
            vectors, _ = _of_samples(source, encoder, batch_size, work)
        return _beside_table(source, names or Names(), samples, vectors, ids, labels, columns)
    if isinstance(source, Mapping):
        source, own_ids, own_labels, others = _of_mapping(source, names or Names(), given)
        ids = own_ids if ids is None else ids
        labels = own_labels if labels is None else labels
        columns = {**others, **columns}
    elif hasattr(source, "__getitem__") and not isinstance(source, Tensor | np.ndarray):
        samples = source if samples is None else samples
        source, found = _of_samples(source, encoder, batch_size, work or Workspace())
        labels = found if labels is None else labels
        if source is None:
            ids = np.arange(len(samples)) if ids is None else ids
    elif hasattr(source, "features"):
        told = described(type(source).__name__)
        raise InputError("source", told, "a data set that has a length")
    vectors = None if source is None else _matrix(source)
    return from_arrays(
        vectors,
        None if ids is None else _values(ids, "ids"),
        None if labels is None else _values(labels, "labels"),
        {name: _values(values, name) for name, values in columns.items()},
        samples=samples,
    )


def from_arrays(
    vectors: Array | None,
    ids: Column | None = None,
    labels: Column | None = None,
    columns: Mapping[str, Column] | None = None,
    *,
    rows: int = SHARD_ROWS,
    samples: Any = None,
) -> Embeddings:
    """Embeddings in memory, in shards of `rows`.

    Raises:
        InputError: columns of different lengths, or not one value a row; an id or a label that
            is missing.
    """
    every = {"ids": ids, "labels": labels, **(columns or {})}
    shapes = {name: _shape(values) for name, values in every.items() if values is not None}
    single = [shape[0] for shape in shapes.values() if len(shape) == 1]
    total = len(vectors) if vectors is not None else next(iter(single), 0)
    for name, shape in shapes.items():
        told = described(f"shape {shape}")
        require(shape == (total,), name, told, f"one value for each of {total} rows")
    own = np.arange(total) if ids is None else plain(ids, "ids", "the rows")
    classes = None if labels is None else plain(labels, "labels", "the rows")
    if vectors is not None:
        vectors = vectors.astype(vectors.dtype.newbyteorder("="), copy=False)
    shards = []
    for first in range(0, total, rows):
        part = slice(first, first + rows)
        narrow = Narrow(
            own[part],
            None if classes is None else classes[part],
            {name: values[part] for name, values in (columns or {}).items()},
        )
        name = "the rows" if total <= rows else f"rows {first} to {min(first + rows, total) - 1}"
        shards.append(ArrayShard(name, narrow, None if vectors is None else vectors[part]))
    return Embeddings(shards, samples)


def _shape(values: Column) -> tuple[int, ...]:
    return (len(values),) if is_arrow(values) else values.shape


def _first(found: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((found[name] for name in names if name in found), None)


def _numpy(values: Tensor) -> Array:
    values = values.detach().to_dense().cpu()
    if values.is_floating_point() and values.dtype not in (
        torch.float16, torch.float32, torch.float64,
    ):  # fmt: skip
        values = values.float()  # numpy has neither bfloat16 nor float8
    return np.asarray(values.numpy())


def _matrix(values: Any) -> Array:
    """Embeddings as an array.

    Raises:
        InputError: they are no numbers of shape (rows, width).
    """
    try:
        made = _numpy(values) if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:
        told = described(f"{type(values).__name__}: {error}")
        raise InputError("embeddings", told, "numbers of shape (rows, width)") from None
    good = made.ndim == 2 and made.shape[1] > 0 and made.dtype.kind in "fiub"
    told = described(f"{made.dtype} of shape {made.shape}")
    require(good, "embeddings", told, "numbers of shape (rows, width)")
    told = described(f"{made.dtype}")
    require(made.dtype.itemsize <= 8, "embeddings", told, "numbers of at most 64 bits")
    return made


def _is_nested(values: Any) -> bool:
    """Whether it has rows of several numbers."""
    if hasattr(values, "ndim"):
        return bool(values.ndim == 2)
    return isinstance(values, list | tuple) and np.ndim(values[:1]) == 2


def _values(values: Any, name: str) -> Column:
    return carried(_numpy(values) if isinstance(values, Tensor) else values, name)


def _of_mapping(
    found: Mapping[str, Any], names: Names, given: Mapping[str, Any]
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Embeddings, ids, labels and further columns of a mapping.

    Raises:
        InputError: there is nothing in it that can be used.
    """
    splits = [name for name, value in found.items() if _is_hugging_face(value)]
    if splits:
        accepted = f"one of its splits: {', '.join(map(str, splits))}"
        raise InputError("source", described(type(found).__name__), accepted)
    present = list(found)
    matrices = [name for name in present if name in EMBEDDING and _is_nested(found[name])]
    taken = {
        "embedding": names.find("embedding", EMBEDDING, present, "the mapping", matrices or None),
        "id": names.find("id", ID, present, "the mapping") if given["ids"] is None else None,
        "label": names.find("label", LABEL, present, "the mapping")
        if given["labels"] is None
        else None,
    }
    others = {name: found[name] for name in present if name not in taken.values()}
    one, id_name, label = (None if name is None else found[name] for name in taken.values())
    some = one is not None or bool(others) or label is not None
    require(some, "embeddings", None, "a mapping with 'embeddings'")
    return one, id_name, label, others


# ---------------------------------------------------------------- Hugging Face data sets


def _is_hugging_face(source: Any) -> bool:
    """Whether it is a data set of theirs that has a length."""
    parts = ("features", "with_format", "select_columns", "__getitem__", "__len__")
    return not isinstance(source, Mapping) and all(hasattr(source, part) for part in parts)


@dataclass
class CompletedShard(Shard):
    """A shard with what was given beside it."""

    base: Shard
    vectors: Array | None
    ids: Array | None
    labels: Array | None
    columns: Mapping[str, Column]

    def __post_init__(self) -> None:
        self.name, self.rows = self.base.name, self.base.rows
        self.width = self.base.width if self.vectors is None else int(self.vectors.shape[1])

    def blocks(self, size: int) -> Iterator[Array]:
        if self.vectors is None:
            yield from self.base.blocks(size)
            return
        for first in range(0, self.rows, size):
            yield self.vectors[first : first + size]

    def kinds(self) -> Kinds:
        base = self.base.kinds()
        return Kinds(
            base.id if self.ids is None else kind_of(self.ids),
            base.label if self.labels is None else kind_of(self.labels),
            {**base.columns, **{name: kind_of(values) for name, values in self.columns.items()}},
        )

    def narrow(self) -> Narrow:
        base = self.base.narrow()

        def read(name: str) -> Column:
            return self.columns[name] if name in self.columns else base.columns[name]

        names = dict.fromkeys([*base.columns, *self.columns])
        return Narrow(
            base.ids if self.ids is None else self.ids,
            base.labels if self.labels is None else self.labels,
            Columns(list(names), read),
        )

    def further(self, size: int) -> Iterator[tuple[int, dict[str, Column]]]:
        first = 0
        for count, columns in self.base.further(size):
            own = {name: values[first : first + count] for name, values in self.columns.items()}
            yield count, {**columns, **own}
            first += count

    def fingerprint(self) -> str:
        beside = ArrayShard("", Narrow(np.arange(0) if self.ids is None else self.ids,
                                       self.labels, self.columns), self.vectors)  # fmt: skip
        return f"{self.base.fingerprint()}:{beside.fingerprint()}"


def _beside_table(
    data: Any,
    names: Names,
    samples: Any,
    vectors: Array | None,
    ids: Any,
    labels: Any,
    columns: Mapping[str, Any],
) -> Embeddings:
    """A data set read as the table that it is, with what was given or made beside it."""
    shards = list(
        table_shards(HuggingFaceTable(data), names, SHARD_ROWS, 0, embedded=vectors is None)
    )
    given = {name: _values(values, name) for name, values in columns.items()}
    if vectors is None and ids is None and labels is None and not given:
        return Embeddings(shards, samples)
    beside = from_arrays(
        vectors,
        np.arange(len(data)) if ids is None else _values(ids, "ids"),
        None if labels is None else _values(labels, "labels"),
        given,
    )
    require(beside.rows == len(data), "ids", described(f"{beside.rows}"), f"{len(data)} rows")
    completed = []
    for shard, other in zip(shards, beside.shards, strict=True):
        own = other.narrow()
        completed.append(
            CompletedShard(
                shard,
                other.vectors if isinstance(other, ArrayShard) else None,
                None if ids is None else own.ids,
                own.labels,
                own.columns,
            )
        )
    return Embeddings(completed, samples)


# ---------------------------------------------------------------- samples and an encoder


def _of_samples(
    data: Any, encoder: Encoder | None, batch_size: int, work: Workspace
) -> tuple[Array | None, Array | None]:
    """Embeddings, if there are any or can be made, and labels of a data set."""
    try:
        rows = len(data)
    except TypeError:
        told = described(type(data).__name__)
        raise InputError("source", told, "a data set that has a length") from None
    require(rows > 0, "embeddings", described("no rows"), "at least one row")
    parts: list[Tree] = []
    with work.progress("encode", rows) as advance:
        for first in range(0, rows, ENCODED_ROWS):
            last = min(rows, first + ENCODED_ROWS)

            def compute(begin: int = first, end: int = last) -> Tree:
                return _encoded(data, range(begin, end), encoder, batch_size)

            parts.append(work.once(f"encoded-{first:09}", compute))
            advance(last)
    vectors = None if encoder is None else torch.cat([p["embeddings"] for p in parts]).numpy()
    if any(part["labels"] is None for part in parts):
        return vectors, None
    return vectors, np.asarray([label for part in parts for label in part["labels"]])


@torch.no_grad()
def _encoded(data: Any, rows: range, encoder: Encoder | None, batch_size: int) -> Tree:
    with evaluating(encoder) if isinstance(encoder, nn.Module) else nullcontext():
        return _read(data, rows, encoder, batch_size)


def _read(data: Any, rows: range, encoder: Encoder | None, batch_size: int) -> Tree:
    made, labels = [], []
    for first in range(rows.start, rows.stop, batch_size):
        samples, own = [], []
        for row in range(first, min(first + batch_size, rows.stop)):
            sample, label = _sample_and_label(data[row])
            samples.append(sample)
            own.append(label)
        labels += own
        if encoder is not None:
            found = torch.as_tensor(encoder(_stacked(samples))).detach().cpu().float()
            good = found.ndim == 2 and len(found) == len(samples)
            told = described(f"shape {tuple(found.shape)}")
            require(good, "encoder", told, f"({len(samples)}, width) of {len(samples)} samples")
            made.append(found)
    return {
        "embeddings": torch.cat(made) if made else None,
        "labels": None if any(label is None for label in labels) else labels,
    }


def _sample_and_label(item: Any) -> tuple[Any, Any]:
    """A sample apart from its label, where it has one: (x, y), or a mapping with a label."""
    label: Any = None
    if isinstance(item, Mapping):
        label = _first(item, LABEL)
        item = {k: v for k, v in item.items() if k not in LABEL}
        item = next(iter(item.values())) if len(item) == 1 else item
    elif isinstance(item, tuple | list) and len(item) == 2:
        item, label = item
    elif isinstance(item, tuple | list) and len(item) == 1:
        item = item[0]
    if isinstance(label, Tensor | np.generic):
        label = label.item()
    return item, label if isinstance(label, int | str) else None


def _stacked(samples: list[Any]) -> Any:
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError):
        return samples
