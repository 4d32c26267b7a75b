"""What people hold, as `Embeddings`: arrays, tensors, paths, data sets with an encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from secateurs.errors import InputError, described, require
from secateurs.selection.embeddings import SHARD_ROWS, Array, ArrayShard, Embeddings, Narrow
from secateurs.selection.files import EMBEDDING, ID, LABEL, Names, open_files
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
            data set with a column of lists; a torch or Hugging Face data set, whose samples the
            encoder embeds, and which without one has only ids and labels.
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
    columns: dict[str, Any] = dict(scores or {})
    if isinstance(source, Embeddings):
        given = [
            n for n, v in (("ids", ids), ("labels", labels), ("scores", scores)) if v is not None
        ]
        if given:
            told = described("embeddings in files, which have columns of their own")
            raise InputError(given[0], told, f"no {given[0]} beside them")
        source.samples = source.samples if samples is None else samples
        return source
    if isinstance(source, Mapping):
        columns = {
            **{k: v for k, v in source.items() if k not in (*EMBEDDING, *ID, *LABEL)},
            **columns,
        }
        ids = ids if ids is not None else _first(source, ID)
        labels = labels if labels is not None else _first(source, LABEL)
        source = _first(source, EMBEDDING)
        require(source is not None or bool(columns) or labels is not None, "embeddings", None,
                "a mapping with 'embeddings'")  # fmt: skip
    elif hasattr(source, "__getitem__") and not isinstance(source, Tensor | np.ndarray):
        samples = source if samples is None else samples
        source, found = _of_data_set(source, encoder, batch_size, work or Workspace())
        labels = found if labels is None else labels
        if source is None:
            columns = columns or {}
            ids = np.arange(len(samples)) if ids is None else ids
    vectors = None if source is None else _array(source)
    if vectors is not None:
        good = vectors.ndim == 2 and vectors.shape[1] > 0 and vectors.dtype.kind in "fiub"
        told = described(f"{vectors.dtype} of shape {vectors.shape}")
        require(good, "embeddings", told, "numbers of shape (rows, width)")
    return from_arrays(
        vectors,
        None if ids is None else _array(ids),
        None if labels is None else _array(labels),
        {name: _array(values) for name, values in columns.items()},
        samples=samples,
    )


def from_arrays(
    vectors: Array | None,
    ids: Array | None = None,
    labels: Array | None = None,
    columns: Mapping[str, Array] | None = None,
    *,
    rows: int = SHARD_ROWS,
    samples: Any = None,
) -> Embeddings:
    """Embeddings in memory, in shards of `rows`.

    Raises:
        InputError: columns of different lengths, or not one value a row.
    """
    all_columns = {"ids": ids, "labels": labels, **(columns or {})}
    lengths = {name: len(v) for name, v in all_columns.items() if v is not None and v.ndim == 1}
    total = len(vectors) if vectors is not None else next(iter(lengths.values()), 0)
    for name, values in all_columns.items():
        good = values is None or values.shape == (total,)
        told = described("" if values is None else f"shape {values.shape}")
        require(good, name, told, f"one value for each of {total} rows")
    own = np.arange(total) if ids is None else ids
    shards = []
    for first in range(0, total, rows):
        part = slice(first, first + rows)
        narrow = Narrow(
            own[part],
            None if labels is None else labels[part],
            {name: values[part] for name, values in (columns or {}).items()},
        )
        name = "the rows" if total <= rows else f"rows {first} to {min(first + rows, total) - 1}"
        shards.append(ArrayShard(name, narrow, None if vectors is None else vectors[part]))
    return Embeddings(shards, samples)


def _first(found: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((found[name] for name in names if name in found), None)


def _array(values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        return np.asarray(values.numpy())
    made = np.asarray(values)
    return made.astype(str) if made.dtype.kind == "O" else made


def _of_data_set(
    data: Any, encoder: Encoder | None, batch_size: int, work: Workspace
) -> tuple[Array | None, Array | None]:
    """Embeddings, if there are any or can be made, and labels of a data set."""
    try:
        rows = len(data)
    except TypeError:
        told = described(type(data).__name__)
        raise InputError("source", told, "a data set that has a length") from None
    if encoder is None and hasattr(data, "features"):  # Hugging Face
        present = list(data.features)
        label = next((name for name in LABEL if name in present), None)
        labels = None if label is None else np.asarray(data[label])
        lists = [n for n in present if n in EMBEDDING and isinstance(data[0][n], list)]
        if lists:
            return np.asarray(data.with_format("numpy")[lists[0]][:]), labels
        return None, labels
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
    if isinstance(encoder, nn.Module):
        encoder.eval()
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
