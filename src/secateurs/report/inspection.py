"""What a model is made of, as a page in the look of the reports.

    secateurs inspect timm:resnet50 --out resnet50.html

The picture shows every axis that can be shortened with what hangs on it: what one unit less
saves, times the units. A weight lies on an axis by its rows and on another by its columns, so
the shares of all axes may sum to more than the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateurs.errors import described, require
from secateurs.report import figures, numbers
from secateurs.report.html import (
    Note,
    Page,
    Plot,
    Section,
    Table,
    Tile,
    environment_pairs,
    made_plot,
    missing_libraries,
    write_page,
)

SUFFIXES = (".html", ".htm")


def check_page(path: Path) -> None:
    """Refuse a file that could not be written, before there is anything to write.

    Raises:
        InputError: the name is not that of a page, its folder cannot be written, or the extra
            ``report`` is not installed.
    """
    require(path.suffix.lower() in SUFFIXES, "out", str(path), "a file that ends in .html")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    require(writable, "out", str(path), "a file in a folder that can be written")
    missing = missing_libraries()
    told = described(f"no {' and no '.join(missing)}")
    require(not missing, "report", told, "pip install 'secateurs[report]'")


def write_inspection(
    path: str | Path, found: Mapping[str, Any], *, environment: Mapping[str, Any] | None = None
) -> Path:
    """Write the page of a model, atomically; a page that is there is replaced.

    Args:
        path: of the HTML file.
        found: what ``secateurs inspect --json`` prints: ``model``, ``layers``, ``axes``,
            ``frozen``, ``unruled``, ``traced``, ``untraced`` and ``cost``.
        environment: versions and machine, by name.

    Returns:
        The path.

    Raises:
        InputError: the extra ``report`` is not installed.
    """
    environment = environment or {}
    axes = found["axes"]
    section = Section(
        title=found["model"],
        plots=[_picture(axes, found["traced"])] if axes else [],
        tables=[t for t in _tables(found) if t.rows],
    )
    page = Page(
        title=found["model"],
        date=str(environment.get("date", "")),
        headline=_headline(found),
        tiles=_tiles(found),
        notes=_notes(found),
        single=True,
        sections=[section],
        environment=environment_pairs(environment),
    )
    return write_page(path, page)


# ---------------------------------------------------------------- in words


def _headline(found: Mapping[str, Any]) -> list[str]:
    if found["untraced"]:
        return ["The model could not be traced, so its axes are not known."]
    axes, traced = found["axes"], found["traced"]
    if not axes:
        return ["No axis of this model can be shortened."]
    lie = _on_free_axes(traced)
    words = [
        f"{_counted(len(axes), 'axis', 'axes')} can be shortened; "
        f"{'it covers' if len(axes) == 1 else 'they cover'} {numbers.share(lie)} of the parameters."
    ]
    heaviest, busiest = (max(axes, key=lambda row: _share(row, k, traced)) for k in COSTS)
    parameters, macs = _share(heaviest, "parameters", traced), _share(busiest, "macs", traced)
    if heaviest is busiest:
        words.append(
            f"Most hangs on {_called(heaviest)}: {numbers.share(parameters)} of the parameters "
            f"and {numbers.share(macs)} of the MACs."
        )
    else:
        words.append(
            f"Most parameters hang on {_called(heaviest)}: {numbers.share(parameters)}; most "
            f"MACs on {_called(busiest)}: {numbers.share(macs)}."
        )
    return words


COSTS = ("parameters", "macs")


def _called(row: Mapping[str, Any]) -> str:
    return f"{row['name']} ({row['role']}, {numbers.plain(row['size'])} units)"


def _counted(many: int, one: str, several: str) -> str:
    return f"{many} {one if many == 1 else several}"


def _share(row: Mapping[str, Any], kind: str, traced: Mapping[str, Any]) -> float:
    """What one unit less saves, times the units, of what the model has."""
    return float(row["size"] * row[kind] / max(traced[kind], 1))


def _on_free_axes(traced: Mapping[str, Any]) -> float:
    return float(traced["free_parameters"] / max(traced["parameters"], 1))


def _tiles(found: Mapping[str, Any]) -> list[Tile]:
    cost, axes, traced = found["cost"], found["axes"], found["traced"]
    left = cost["nonzero"] / cost["parameters"] if cost["parameters"] else 1.0
    stored = f"{numbers.size(cost['dense_bytes'])} in a file"
    tiles = [
        Tile(
            "Parameters",
            numbers.count(cost["parameters"]),
            stored if left == 1 else f"{numbers.share(left)} are not zero",
        ),
        Tile("MACs", numbers.count(cost["macs"]), f"of {_counted(cost['batch'], *SAMPLES)}"),
    ]
    if axes:
        frozen = sum(row["axes"] for row in found["frozen"])
        lie = numbers.share(_on_free_axes(traced))
        tiles += [
            Tile("Axes that can be shortened", f"{len(axes)}", f"{frozen} keep their size"),
            Tile("Parameters on them", lie, "each on at least one"),
        ]
    if cost["latency"]:
        repeats = f"median of {cost['latency']['repeats']} passes"
        shown = numbers.milliseconds(cost["latency"]["median"])
        tiles.append(Tile("Measured latency", shown, repeats))
    return tiles


SAMPLES = ("sample", "samples")


def _notes(found: Mapping[str, Any]) -> list[Note]:
    texts = []
    if found["untraced"]:
        texts.append(found["untraced"])
    if many := len(found["unruled"]):
        texts.append(
            f"{_counted(many, 'operation has', 'operations have')} no rule; the axes that pass "
            "through are frozen."
        )
    return [Note(who="", text=text, missed=False) for text in texts]


# ---------------------------------------------------------------- picture and tables


def _picture(axes: Sequence[Mapping[str, Any]], traced: Mapping[str, Any]) -> Plot:
    figure = figures.axis_costs(axes, traced["parameters"], traced["macs"])
    caption = (
        "Every axis that can be shortened, in the order of the network: what one unit less saves, "
        "times its units, as a share of the model. A weight lies on several axes, so the shares "
        "may sum to more than 100 %. Point at a bar for all that is tied to its axis."
    )
    return made_plot("What hangs on each axis", figure, caption)


def _tables(found: Mapping[str, Any]) -> list[Table]:
    return [
        _free(found["axes"], found["traced"]),
        _frozen(found["frozen"]),
        Table(
            ("Operation", "What it did"),
            [(name, str(reason)) for name, reason in found["unruled"].items()],
            "Operations without a rule",
        ),
        _weights(found["layers"]),
    ]


def _free(axes: Sequence[Mapping[str, Any]], traced: Mapping[str, Any]) -> Table:
    head = ["Axis", "Role", "Units", "Entries each", "Parameters each", "MACs each",
            "Of the parameters", "Of the MACs", "Tensors"]  # fmt: skip
    over = any(row["normalized"] for row in axes)
    rows = []
    for row in axes:
        cells = [
            row["name"],
            row["role"],
            numbers.plain(row["size"]),
            numbers.plain(row["granularity"]),
            *(numbers.count(row[kind]) for kind in COSTS),
            *(numbers.share(_share(row, kind, traced)) for kind in COSTS),
            numbers.plain(len(row["slices"])),
        ]
        rows.append(cells + [", ".join(row["normalized"])] * over)
    caption = (
        "Entries: what one unit takes of the tensor that makes it. Parameters, MACs: what one unit "
        "less saves, all other axes being whole."
    )
    if over:
        caption += " Where a statistic is taken over an axis, a removed unit changes the others."
    return Table(head + ["Statistic"] * over, rows, "Axes that can be shortened", caption)


def _frozen(frozen: Sequence[Mapping[str, Any]]) -> Table:
    rows = [(row["reason"], numbers.plain(row["axes"]), row["example"]) for row in frozen]
    return Table(("Because", "Axes", "Such as"), rows, "Axes that keep their size")


def _weights(layers: Sequence[Mapping[str, Any]]) -> Table:
    masked = any(row["kept"] != row["weights"] for row in layers)
    rows = []
    for row in layers:
        cells = [row["name"], " × ".join(str(side) for side in row["shape"]),
                 numbers.count(row["weights"])]  # fmt: skip
        if masked:
            kept = row["kept"] / row["weights"] if row["weights"] else None
            cells.append(numbers.share(kept))
        rows.append([*cells, numbers.count(row["macs"])])
    head = ["Weight", "Shape", "Weights", *["Kept"] * masked, "MACs"]
    return Table(head, rows, "Weights that can be pruned")
