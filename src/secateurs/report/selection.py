"""What a selection keeps, as a page in the look of the reports.

secateurs select rows.parquet --method density --keep 0.25 --out kept.parquet --report page.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateurs.registry import method_class
from secateurs.report import figures, numbers
from secateurs.report.html import (
    BudgetLine,
    Gallery,
    Note,
    Page,
    Picture,
    Plot,
    Section,
    Source,
    Table,
    Tile,
    environment_pairs,
    made_plot,
    records_table,
    write_page,
)
from secateurs.report.pictures import check_pictures, picture_of
from secateurs.report.texts import check_texts, text_of
from secateurs.selection.result import Selection

PAIRS_SHOWN = 12
CLUSTERS_SHOWN = 6
EACH = 4
"""Examples at either end of a cluster."""


def write_selection(
    path: str | Path,
    selection: Selection,
    *,
    title: str = "selection",
    images: str | None = None,
    text: str | None = None,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page of a selection, atomically; a page that is there is replaced.

    Args:
        path: of the HTML file.
        title: what was selected from.
        images: where pictures are found, see `secateurs.report.pictures.picture_of`.
        text: column with the texts of samples; by default ``text``, where there is one.
        environment: versions and machine, by name.

    Returns:
        The path.

    Raises:
        InputError: the extra ``report`` is not installed, or no such pictures or texts.
    """
    check_pictures(selection.source, images)
    check_texts(selection.source, text)
    environment = environment or {}
    told = selection.as_dict()
    section = Section(
        title=title,
        budget=_budget(selection),
        plots=_plots(told),
        galleries=_galleries(selection, _sample(selection, images, text)),
        tables=[t for t in _tables(told) if t.rows],
    )
    page = Page(
        title=title,
        date=str(environment.get("date", "")),
        headline=_headline(told),
        tiles=_tiles(told),
        notes=[Note("", text, missed=text.startswith("budget ")) for text in told["notes"]],
        single=True,
        sections=[section],
        environment=environment_pairs(environment),
        sources=_sources(selection.method),
    )
    return write_page(path, page)


# ---------------------------------------------------------------- in words


def _headline(told: Mapping[str, Any]) -> list[str]:
    kept, rows = told["kept"], told["rows"]
    words = [
        f"{numbers.plain(kept)} of {numbers.plain(rows)} samples stay, "
        f"{numbers.share(kept / rows)}."
    ]
    groups = [(row["kept"] / row["rows"], row) for row in told["classes"] if row["rows"]]
    if len(groups) > 1:
        least, most = (f(groups, key=lambda g: g[0]) for f in (min, max))
        words.append(
            f"Class {least[1]['class']} keeps the least, {numbers.share(least[0])}, "
            f"class {most[1]['class']} the most, {numbers.share(most[0])}."
        )
    return words


def _tiles(told: Mapping[str, Any]) -> list[Tile]:
    rows = told["rows"]
    tiles = [Tile("Kept", numbers.count(told["kept"]), f"of {numbers.count(rows)}")]
    for reason, name in (("duplicate", "Duplicates"), ("filtered", "Filtered out")):
        if told[reason] or reason == "duplicate":
            share = f"{numbers.share(told[reason] / rows)} of all"
            tiles.append(Tile(name, numbers.count(told[reason]), share))
    for key, name in (("balance", "Balance of classes"), ("cluster_balance", "Of clusters")):
        before, after = told[key]["before"], told[key]["after"]
        if before is not None and after is not None:
            tiles.append(Tile(name, f"{after:.3f}", f"{before:.3f} before; 1 is even"))
    return tiles


def _budget(selection: Selection) -> BudgetLine | None:
    promise = selection.promise
    if promise is None:
        return None
    asked, reached = (numbers.share(value) for value in (promise.asked, promise.reached))
    return BudgetLine(selection.budget, asked, reached, promise.kept)


def _sources(method: str) -> list[Source]:
    if not method:
        return []
    cls = method_class(method)
    told = (cls.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return [Source(method, told, str(cls.paper) if cls.paper else "a plain baseline")]


# ---------------------------------------------------------------- pictures and tables


def _plots(told: Mapping[str, Any]) -> list[Plot]:
    plots = []
    if classes := told["classes"]:
        groups = [{**row, "name": str(row["class"])} for row in classes]
        figure = figures.kept_of_groups(groups, "class")
        plots.append(made_plot("What stays of each class", figure))
    if clusters := [row for row in told["clusters"] if row["rows"]]:
        ordered = sorted(clusters, key=lambda row: -row["rows"])
        groups = [{**row, "name": str(row["cluster"])} for row in ordered]
        figure = figures.kept_of_groups(groups, "cluster")
        caption = "Clusters from the largest to the smallest. Point at a bar for its number."
        plots.append(made_plot("What stays of each cluster", figure, caption))
    return plots


Sample = Callable[..., Picture]
"""From a row, and what is to be said of it, to its picture."""


def _sample(selection: Selection, images: str | None, text: str | None) -> Sample:
    picture, words_of = picture_of(selection.source, images), text_of(selection.source, text)

    def sample(row: int, *told: str) -> Picture:
        words = words_of(row)
        caption = (" · " if words else "\n").join((str(selection.id_of(row)), *told))
        return Picture(picture(row), caption, selection.keeps(row), words)

    return sample


def _galleries(selection: Selection, sample: Sample) -> list[Gallery]:
    galleries = []
    examples = selection.examples(CLUSTERS_SHOWN, EACH)
    shelves = []
    for found in examples:
        ends = [[sample(e["row"], *_told_of(e)) for e in found[end]]
                for end in ("nearest", "farthest")]  # fmt: skip
        name = f"cluster {found['cluster']}\n{found['rows']} rows\n{found['kept']} kept"
        shelves.append((name, _side_by_side(*ends)))
    if shelves:
        caption = (
            f"Of the {len(shelves)} largest clusters the {EACH} samples nearest to the centre on "
            f"the left, the {EACH} farthest on the right, with their ids and distances. Framed in "
            "green: kept."
        )
        galleries.append(Gallery("Nearest and farthest samples", shelves, caption))
    pairs = selection.pairs[:PAIRS_SHOWN]
    if pairs:
        shelves = [
            ("alike", [sample(row, f"cosine {c:.4f}"), sample(like, "like this one")])
            for row, like, c in pairs
        ]
        told = (
            f"{len(pairs)} of {numbers.plain(selection.count('duplicate'))} that were found: first "
            "the one that goes, then the one that it is like."
        )
        galleries.append(Gallery("Duplicates", _paired(shelves), told))
    return galleries


def _told_of(example: Mapping[str, Any]) -> list[str]:
    again = ["duplicate"] if example["reason"] == "duplicate" else []
    return [f"{example['distance']:.3f}", *again]


def _side_by_side(nearest: list[Picture], farthest: list[Picture]) -> list[Picture]:
    """Pictures stand in one row, the farthest at its end; texts in two columns."""
    if any(p.text for p in nearest):
        return [p for pair in zip(nearest, farthest, strict=True) for p in pair]
    return [*nearest, *reversed(farthest)]


def _paired(shelves: Sequence[tuple[str, Sequence[Picture]]]) -> list[tuple[str, list[Picture]]]:
    """Three pairs a row."""
    rows = []
    for first in range(0, len(shelves), 3):
        together = [picture for _, pair in shelves[first : first + 3] for picture in pair]
        rows.append((f"pairs {first + 1} to {first + len(shelves[first : first + 3])}", together))
    return rows


def _tables(told: Mapping[str, Any]) -> list[Table]:
    return [
        _groups_table("class", "Classes", told["classes"]),
        _groups_table("cluster", "Clusters", told["clusters"]),
        *(records_table(title, records) for title, records in told["tables"].items()),
    ]


def _groups_table(key: str, title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    extra = [k for k in (rows[0] if rows else {}) if k not in (key, "rows", "kept")]
    cells = [
        (
            str(row[key]),
            numbers.plain(row["rows"]),
            numbers.plain(row["kept"]),
            numbers.share(row["kept"] / row["rows"]) if row["rows"] else numbers.MISSING,
            *(f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in extra),
        )
        for row in rows
    ]
    names = [k.replace("_", " ") for k in extra]
    return Table((key.capitalize(), "Rows", "Kept", "Share", *names), cells, title)
