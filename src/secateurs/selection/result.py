"""What a selector answers: who stays, with scores, clusters and why; written as Parquet."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secateurs.errors import InputError, described, library, require
from secateurs.outcome import Promise
from secateurs.selection.columns import (
    Column,
    arrow_kind,
    as_arrow,
    can_be_written,
    decoded,
    family,
)
from secateurs.selection.embeddings import BLOCK_ROWS, Array, Embeddings
from secateurs.selection.reading import reading

KEPT, PRUNED, DUPLICATE, FILTERED = range(4)
REASONS = ("kept", "pruned", "duplicate", "filtered")
SUFFIX = ".parquet"
OWN = ("id", "score", "keep", "reason", "cluster", "distance", "label")
"""Columns of the file that a selection is written to; the source's of these names are renamed."""
GROUP_BYTES = 1 << 28
"""Columns that are held at once when they are written."""


@dataclass
class Selection:
    """Which rows stay.

    Attributes:
        source: the rows; ids, labels and columns are read from it where they are asked for.
        scores: float32, (rows of the shard,) each; higher means keep; NaN where there is none.
        reasons: int8 each, numbers of `REASONS`: kept, pruned by its score, left out as a
            duplicate, or by a filter before that.
        clusters: int32 each; None where nothing was clustered.
        distances: float32 each, to the own centre; None where there is none.
        method, options, budget, seed: how it was made.
        tables: records by title, such as a row for every cluster.
        pairs: examples of duplicates: (row, the row it is like, cosine).
        notes: what a reader must know.
    """

    source: Embeddings
    scores: list[Array]
    reasons: list[Array]
    clusters: list[Array] | None = None
    distances: list[Array] | None = None
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    budget: str = ""
    seed: int = 0
    promise: Promise | None = None
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pairs: list[tuple[int, int, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def of(
        source: Embeddings,
        keep: Sequence[Array],
        scores: Sequence[Array],
        *,
        duplicates: Sequence[Array] | None = None,
        filtered: Sequence[Array] | None = None,
        **fields: Any,
    ) -> Selection:
        """A selection from bool arrays, a shard each."""
        reasons = [np.where(mask, KEPT, PRUNED).astype(np.int8) for mask in keep]
        for code, masks in ((FILTERED, filtered), (DUPLICATE, duplicates)):
            for reason, mask in zip(reasons, masks or (), strict=masks is not None):
                reason[mask] = code
        return Selection(
            source, [s.astype(np.float32, copy=False) for s in scores], reasons, **fields
        )

    @property
    def masks(self) -> list[Array]:
        """Of every shard, who stays."""
        return [reason == KEPT for reason in self.reasons]

    @property
    def mask(self) -> Array:
        """Who stays, (rows,), bool."""
        return np.concatenate(self.masks)

    @property
    def indices(self) -> Array:
        """Numbers of the rows that stay, in order."""
        return np.flatnonzero(self.mask)

    @property
    def ids(self) -> Array:
        """Ids of the rows that stay, in the order of the rows."""
        narrow = [self.source.ids_of(n)[mask] for n, mask in enumerate(self.masks)]
        return np.concatenate(narrow)

    @property
    def total(self) -> int:
        """All rows."""
        return self.source.rows

    @property
    def kept(self) -> int:
        """Rows that stay."""
        return sum(int(mask.sum()) for mask in self.masks)

    def count(self, reason: str) -> int:
        """Rows of one of `REASONS`."""
        code = REASONS.index(reason)
        return sum(int((part == code).sum()) for part in self.reasons)

    def by_class(self) -> list[dict[str, Any]]:
        """Of every class its rows, and those that stay; none without labels."""
        if not self.source.labelled:
            return []
        names, codes = self.source.classes()
        return [
            {"class": name, "rows": int(total), "kept": int(kept)}
            for name, total, kept in zip(names, *self._counted(codes, len(names)), strict=True)
        ]

    def by_cluster(self) -> list[dict[str, Any]]:
        """Of every cluster its rows, and those that stay, with what the method tells of it."""
        if self.clusters is None:
            return []
        size = 1 + max(int(part.max()) for part in self.clusters)
        told = self.tables.get("clusters", [])
        size = max(size, len(told))
        rows, kept = self._counted(self.clusters, size)
        return [
            {"cluster": n, "rows": int(rows[n]), "kept": int(kept[n]),
             **(told[n] if n < len(told) else {})}
            for n in range(size)
        ]  # fmt: skip

    def _counted(self, groups: Sequence[Array], size: int) -> tuple[Array, Array]:
        rows, kept = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for part, mask in zip(groups, self.masks, strict=True):
            rows += np.bincount(part, minlength=size)
            kept += np.bincount(part[mask], minlength=size)
        return rows, kept

    def check_classes(self, *, forbid: bool = False) -> None:
        """Note the classes of which nothing is left, or refuse.

        Raises:
            InputError: nothing is left of a class, and that was forbidden.
        """
        gone = [row for row in self.by_class() if row["rows"] and not row["kept"]]
        if not gone:
            return
        named = ", ".join(f"{row['class']} ({row['rows']} rows)" for row in gone[:8])
        more = f" and {len(gone) - 8} more" if len(gone) > 8 else ""
        if forbid:
            told = described(f"{self.budget}, which leaves nothing of class {named}{more}")
            raise InputError("keep", told, "a fraction that leaves a row of every class")
        self.notes.append(f"nothing is left of class {named}{more}")

    def as_dict(self) -> dict[str, Any]:
        """The facts as plain values: what ``--json`` prints and the page shows."""
        classes, clusters = self.by_class(), self.by_cluster()
        return {
            "method": self.method,
            "options": self.options,
            "budget": self.budget,
            "seed": self.seed,
            "rows": self.total,
            "kept": self.kept,
            **{reason: self.count(reason) for reason in REASONS[1:]},
            "classes": classes,
            "clusters": clusters,
            "balance": {
                side: balance([row[key] for row in classes])
                for side, key in (("before", "rows"), ("after", "kept"))
            },
            "cluster_balance": {
                side: balance([row[key] for row in clusters])
                for side, key in (("before", "rows"), ("after", "kept"))
            },
            "tables": {k: v for k, v in self.tables.items() if k != "clusters"},
            "notes": [*self.source.notes, *self.notes],
        }

    # ------------------------------------------------------------ on disk

    def write(self, path: str | Path, *, only_kept: bool = False) -> Path:
        """Write a row for every sample, atomically, a row group a shard unless it is large.

        Columns: ``id``, ``score``, ``keep``, ``reason``, and where there are any ``cluster``,
        ``distance``, ``label`` and the source's own columns, as they were there. Of those, one
        with a name of ours is written as ``source_NAME``, which is noted.

        Args:
            only_kept: leave out the rows that go.

        Raises:
            InputError: another suffix than .parquet.
        """
        parquet = library("pyarrow.parquet", "data")
        path = Path(path)
        require(path.suffix == SUFFIX, "out", str(path), f"a file that ends in {SUFFIX}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        writer = None
        try:
            names = self._written_names()
            for number in range(len(self.source.shards)):
                for table in self._tables(number, names, only_kept):
                    writer = writer or parquet.ParquetWriter(partial, table.schema)
                    writer.write_table(table, row_group_size=max(len(table), 1))
            if writer is not None:
                writer.close()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _written_names(self) -> dict[str, str]:
        """What the source's columns are called in the file; what is not as it was is noted."""
        names, notes = {}, []
        columns = self.source.kinds.columns
        for name, kind in columns.items():
            if not can_be_written(name, kind):
                notes.append(f"column {name} is left out: Parquet does not hold {kind}")
                continue
            written = name
            while written in OWN or (written != name and written in columns):
                written = f"source_{written}"
            names[name] = written
            if written != name:
                notes.append(f"the source's column {name} is written as {written}")
        self.notes += [note for note in notes if note not in self.notes]
        return names

    def _tables(self, number: int, names: Mapping[str, str], only_kept: bool) -> Iterator[Any]:
        """What is written of a shard, in tables of about `GROUP_BYTES`."""
        pyarrow = library("pyarrow", "data")
        own = self._own_columns(number)
        parts, held, first = [], 0, 0
        for count, further in self.source.shards[number].further(BLOCK_ROWS):
            kinds = self.source.kinds.columns
            columns = {
                written: as_arrow(further[name], arrow_kind(kinds[name]))
                for name, written in names.items()
            }
            columns |= {name: values.slice(first, count) for name, values in own.items()}
            table = pyarrow.table(columns)
            if only_kept:
                table = table.filter(columns["keep"])
            parts.append(table)
            held += table.nbytes
            first += count
            if held > GROUP_BYTES:
                yield pyarrow.concat_tables(parts)
                parts, held = [], 0
        if parts:
            yield pyarrow.concat_tables(parts)

    def _own_columns(self, number: int) -> dict[str, Any]:
        pyarrow = library("pyarrow", "data")
        narrow, kinds = self.source.narrow(number), self.source.kinds
        columns = {
            "id": as_arrow(narrow.ids, decoded(arrow_kind(kinds.id))),
            "score": pyarrow.array(self.scores[number]),
            "keep": pyarrow.array(self.reasons[number] == KEPT),
            "reason": pyarrow.array(np.array(REASONS)[self.reasons[number]]),
        }
        for name, parts in (("cluster", self.clusters), ("distance", self.distances)):
            if parts is not None:
                columns[name] = pyarrow.array(parts[number])
        if narrow.labels is not None:
            columns["label"] = as_arrow(narrow.labels, decoded(arrow_kind(kinds.label)))
        return columns

    # ------------------------------------------------------------ examples

    def examples(self, clusters: int = 8, each: int = 4) -> list[dict[str, Any]]:
        """Of the largest clusters, the rows nearest to the centre and the farthest from it.

        Returns:
            A record a cluster: ``cluster``, ``rows``, ``nearest`` and ``farthest``, lists of
            ``row``, ``id``, ``distance``, ``keep`` and ``reason``.
        """
        if self.clusters is None or self.distances is None:
            return []
        table = sorted(self.by_cluster(), key=lambda row: (-row["rows"], row["cluster"]))
        found = []
        for row in [row for row in table[:clusters] if row["rows"]]:
            ends: dict[str, list[tuple[float, int]]] = {"nearest": [], "farthest": []}
            for number, own in enumerate(self.clusters):
                rows = np.flatnonzero(own == row["cluster"])
                distance = self.distances[number][rows]
                order = np.argsort(distance, kind="stable")
                for end, chosen in (("nearest", order[:each]), ("farthest", order[::-1][:each])):
                    ends[end] += [
                        (float(distance[i]), int(rows[i] + self.source.offsets[number]))
                        for i in chosen
                    ]
            nearest = sorted(ends["nearest"])[:each]
            farthest = sorted(ends["farthest"], key=lambda e: (-e[0], e[1]))[:each]
            found.append(
                {
                    "cluster": row["cluster"],
                    "rows": row["rows"],
                    "kept": row["kept"],
                    "nearest": [self._example(n, d) for d, n in nearest],
                    "farthest": [self._example(n, d) for d, n in farthest],
                }
            )
        return found

    def _example(self, row: int, distance: float) -> dict[str, Any]:
        reason = self.reason_of(row)
        return {"row": row, "id": self.id_of(row), "distance": distance,
                "keep": reason == REASONS[KEPT], "reason": reason}  # fmt: skip

    def keeps(self, row: int) -> bool:
        """Whether a row stays."""
        return self.reason_of(row) == REASONS[KEPT]

    def reason_of(self, row: int) -> str:
        """One of `REASONS`."""
        number, place = self._where(row)
        return REASONS[int(self.reasons[number][place])]

    def id_of(self, row: int) -> Any:
        """The id of a row."""
        number, place = self._where(row)
        return self.source.ids_of(number)[place].item()

    def _where(self, row: int) -> tuple[int, int]:
        number = int(np.searchsorted(self.source.offsets, row, side="right")) - 1
        return number, row - int(self.source.offsets[number])


def balance(counts: Sequence[int]) -> float | None:
    """Entropy of the shares over its largest value: 1 where all groups are as large.

    None for fewer than two groups, or where nothing is left.
    """
    total = sum(counts)
    if len(counts) < 2 or not total:
        return None
    shares = [count / total for count in counts if count]
    return -sum(share * math.log(share) for share in shares) / math.log(len(counts))


def read_selection(path: str | Path) -> Mapping[str, Column]:
    """The columns of a file that `Selection.write` wrote.

    Numbers and texts are numpy arrays, columns of the source with gaps or of other kinds Arrow's.

    Raises:
        InputError: no such file, or not one of these.
    """
    parquet = library("pyarrow.parquet", "data")
    require(Path(path).is_file(), "selection", str(path), "an existing file")
    with reading(Path(path)):
        table = parquet.read_table(path)
    missing = {"id", "keep", "score"} - set(table.column_names)
    require(not missing, "selection", str(path), "what secateurs select wrote")
    found = {name: table[name] for name in table.column_names}
    return {
        name: values if values.null_count or family(values.type) == "other" else values.to_numpy()
        for name, values in found.items()
    }
