"""The report: one self-contained HTML file that opens anywhere, prints well and needs no network.

The template `report.html.jinja` only lays out; everything it shows is prepared here as plain
strings, tables and figures. A content security policy in the file forbids any request, so a
name that looks like a tag or an address stays a name.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from secateurs import __version__
from secateurs.errors import InputError, described
from secateurs.report import figures, numbers
from secateurs.report.headline import (
    ENGINES,
    Facts,
    benchmark_headline,
    benchmark_speed,
    facts,
    headline,
    realisation,
)
from secateurs.report.leaderboard import dense_quality, promise_kept, row_of
from secateurs.report.leaderboard import leaderboard as make_leaderboard

TEMPLATE = "report.html.jinja"
LIBRARIES = ("jinja2", "plotly")
"""What `write_report` needs beyond the library's own dependencies."""

KEYS = (
    "method", "options", "budget", "seed", "source", "primary", "higher_is_better", "promise",
    "before", "after", "metrics_before", "metrics_after", "layers", "history", "tables", "notes",
)  # fmt: skip
"""What the report reads of an outcome."""

MANY_NOTES = 8
"""Above this number the remaining notes stand only with their outcomes."""

WIDE_TABLE = 9
"""A table with more columns than this, and fewer rows than columns, is laid on its side."""

LONG_TABLE = 12
"""A table with more rows is folded up."""

TIMED_ROWS = 14
"""Rows of the plot of promised and measured costs."""


@dataclass(frozen=True)
class Table:
    """A table as it is shown: all cells are text.

    Attributes:
        head, rows: the columns' names, the cells.
        title, caption: above and below.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""

    @property
    def folded(self) -> bool:
        """Whether the table is shown only when asked for."""
        return len(self.rows) > LONG_TABLE

    @property
    def right(self) -> list[bool]:
        """Whether each column is set to the right: most of its cells are numbers."""
        columns = [[row[c] for row in self.rows if row[c]] for c in range(len(self.head))]
        return [2 * sum(map(_is_number, cells)) >= max(len(cells), 1) for cells in columns]


@dataclass(frozen=True)
class Plot:
    """A figure as JSON, with its height in pixels and a sentence below it."""

    title: str
    data: str
    height: int
    caption: str = ""


@dataclass(frozen=True)
class Strip:
    """Where a mean and its interval lie on a line from 0 to 100; ``off`` marks a mean outside."""

    mean: float
    low: float
    high: float
    dense: float | None
    off: str = ""


@dataclass(frozen=True)
class Place:
    """A row of a leaderboard."""

    rank: int
    label: str
    quality: str
    badge: str
    strip: Strip | None
    cells: Sequence[str]
    kept: bool | None


@dataclass(frozen=True)
class Board:
    """The leaderboard of one task and budget."""

    title: str
    metric: str
    head: Sequence[str]
    places: Sequence[Place]
    caption: str


@dataclass(frozen=True)
class BudgetLine:
    """What was asked and what was reached."""

    budget: str
    asked: str
    reached: str
    kept: bool


@dataclass(frozen=True)
class Tile:
    """A key figure with what it was before."""

    name: str
    value: str
    before: str


@dataclass(frozen=True)
class Picture:
    """A sample: its picture as a data URI (or none), what stands below, whether it is kept; and
    its text, where it is one."""

    image: str
    caption: str
    kept: bool
    text: str = ""


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures, each row with a name. Texts stand in two columns."""

    title: str
    rows: Sequence[tuple[str, Sequence[Picture]]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One outcome, or the outcomes of one method over several seeds."""

    title: str
    summary: str = ""
    budget: BudgetLine | None = None
    seeds: Table | None = None
    costs: Table | None = None
    speed: str = ""
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    galleries: Sequence[Gallery] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Note:
    """A remark of a method, with whose it is and how often it was made."""

    who: str
    text: str
    missed: bool


@dataclass(frozen=True)
class Source:
    """A method, what it does and where it was published."""

    method: str
    summary: str
    paper: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything the template lays out, from top to bottom."""

    title: str
    intro: str = ""
    date: str = ""
    version: str = __version__
    headline: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    notes: Sequence[Note] = ()
    more_notes: int = 0
    boards: Sequence[Board] = ()
    plots: Sequence[Plot] = ()
    single: bool
    sections: Sequence[Section]
    speeds: Sequence[tuple[str, str]] = ()
    recipe: str = ""
    environment: Sequence[tuple[str, str]] = ()
    sources: Sequence[Source] = ()

    @property
    def has_plots(self) -> bool:
        """Whether the file needs plotly."""
        return bool(self.plots) or any(section.plots for section in self.sections)


def missing_libraries() -> list[str]:
    """What a report needs of the extra ``report`` and this installation lacks."""
    return [name for name in LIBRARIES if find_spec(name) is None]


def write_report(
    path: str | Path,
    *,
    title: str,
    outcomes: Sequence[Mapping[str, Any]],
    leaderboard: Sequence[Mapping[str, Any]] = (),
    recipe: str | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, Any] | None = None,
    intro: str | None = None,
) -> Path:
    """Write the report of one or of many outcomes, atomically.

    Args:
        path: of the HTML file.
        title: what was pruned, such as model and data.
        outcomes: `Outcome.as_dict` each; ``label`` tells variants of a method apart.
        leaderboard: rows of `secateurs.report.leaderboard.leaderboard`; made from the outcomes
            where there are several and this is left out.
        recipe: the YAML that leads here again.
        events: of the run, for its learning curve (`secateurs.workspace.read_events`).
        environment: versions and machine, by name.
        intro: a paragraph below the title.

    Returns:
        The path.

    Raises:
        InputError: an outcome lacks a key, or the extra ``report`` is not installed.
    """
    return write_page(
        path, make_page(title, outcomes, leaderboard, recipe, events, environment, intro)
    )


def write_page(path: str | Path, page: Page) -> Path:
    """Lay out a page and write it, atomically.

    Raises:
        InputError: the extra ``report`` is not installed.
    """
    from secateurs.state import write_bytes

    # beside the page and not in it: five megabytes that no one wants to see in a message
    plotly = _plotly_source() if page.has_plots else ""
    target = Path(path)
    write_bytes(target, _template().render(page=page, plotly=plotly).encode())
    return target


def make_page(
    title: str,
    outcomes: Sequence[Mapping[str, Any]],
    leaderboard: Sequence[Mapping[str, Any]] = (),
    recipe: str | None = None,
    events: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, Any] | None = None,
    intro: str | None = None,
) -> Page:
    """Everything the report shows; see `write_report`."""
    _check(outcomes)
    outcomes = labelled(outcomes)
    board: list[Mapping[str, Any]] = list(leaderboard)
    if not board and len(outcomes) > 1:
        board += make_leaderboard([row for o in outcomes if (row := row_of(o)) is not None])
    groups = grouped(outcomes)
    single = len(groups) == 1 and len(board) <= 1
    first = representative(groups[0]) if groups else None
    groups.sort(key=_order(board))
    sections = [_section(group, events if single else ()) for group in groups]
    notes = _notes(outcomes)
    plots = [] if single else _board_plots(board, outcomes)
    words = headline(first) if single and first is not None else benchmark_headline(board)
    if not single and not board and outcomes:
        words = [f"{len(outcomes)} outcomes, none of which was scored."]
    if not single:
        words += benchmark_speed(outcomes)
    environment = environment or {}
    return Page(
        title=title,
        intro=intro or "",
        date=str(environment.get("date", "")),
        headline=words,
        tiles=_tiles(first) if single and first is not None else [],
        notes=notes[:MANY_NOTES],
        more_notes=max(len(notes) - MANY_NOTES, 0),
        boards=[] if single else _boards(board),
        plots=plots,
        single=single,
        sections=sections,
        speeds=_speeds(outcomes),
        recipe=(recipe or "").strip(),
        environment=environment_pairs(environment),
        sources=_sources(outcomes),
    )


def environment_pairs(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Versions and machine as the page lists them."""
    return [(str(k), numbers.plain(v)) for k, v in environment.items() if v is not None]


def _check(outcomes: Sequence[Mapping[str, Any]]) -> None:
    for number, outcome in enumerate(outcomes):
        for key in KEYS:
            if key not in outcome:
                raise InputError(
                    f"outcomes[{number}]", sorted(outcome), f"Outcome.as_dict(), with {key!r}"
                )


# ---------------------------------------------------------------- which outcomes belong together


def labelled(outcomes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The outcomes with a ``label`` each: the method, and the options in which variants differ."""
    variants: dict[str, list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        variants.setdefault(outcome["method"], []).append(outcome["options"])
    out = []
    for outcome in outcomes:
        options, others = outcome["options"], variants[outcome["method"]]
        own = [
            f"{key}={numbers.plain(value)}"
            for key, value in options.items()
            if any(other.get(key) != value for other in others)
        ]
        name = outcome["method"] or "dense"
        label = f"{name} ({', '.join(own)})" if own else name
        out.append({**outcome, "label": outcome.get("label") or label})
    return out


def grouped(outcomes: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Outcomes that differ only by their seed together, in the order they come."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        key = (_task(outcome), outcome["budget"], outcome["label"])
        groups.setdefault(key, []).append(outcome)
    return list(groups.values())


def _order(board: Sequence[Mapping[str, Any]]) -> Callable[[Sequence[Mapping[str, Any]]], int]:
    """The place of a group in the leaderboard; groups that are not in it come last, as they are."""
    places = {(r["task"], r["budget"], r["label"]): number for number, r in enumerate(board)}

    def place(group: Sequence[Mapping[str, Any]]) -> int:
        key = (_task(group[0]), group[0]["budget"], group[0]["label"])
        return places.get(key, len(places))

    return place


def representative(group: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The outcome of median quality, which is shown in detail for all seeds."""
    metric = group[0]["primary"]
    scored = [o for o in group if metric in o["metrics_after"]]
    if not scored:
        return group[0]
    middle = statistics.median_low([o["metrics_after"][metric] for o in scored])
    return next((o for o in scored if o["metrics_after"][metric] == middle), scored[0])


def _task(outcome: Mapping[str, Any]) -> str:
    source = outcome["source"] or {}
    return " on ".join(str(source[key]) for key in ("model", "data") if source.get(key))


# ---------------------------------------------------------------- one outcome


def _section(group: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> Section:
    outcome = representative(group)
    metric = outcome["primary"]
    plots, tables = [], []
    if outcome["layers"]:
        plots.append(_layers_plot(outcome["layers"]))
    if axes := outcome["tables"].get("axes"):
        plots.append(_axes_plot(axes))
    if timed := _timed(outcome):
        plots.append(made_plot("Promised and measured", figures.promised_and_measured(timed), PACE))
    if figures.has_rounds(outcome["history"], metric):
        figure = figures.rounds(
            outcome["history"], metric, higher_is_better=outcome["higher_is_better"]
        )
        plots.append(
            made_plot("Round by round", figure, "Each point is one training of the network.")
        )
    if figures.training_stages(events):
        caption = (
            "Faint: the loss of single batches. Strong: its running mean. Dotted lines part the "
            "stages."
        )
        plots.append(made_plot("Training", figures.learning_curves(events), caption))
    if outcome["history"]:
        tables.append(records_table("History", outcome["history"]))
    for title, rows in outcome["tables"].items():
        shown = engines_table(rows) if title == ENGINES else records_table(str(title), rows)
        tables.append(shown)
    known = facts(outcome)
    return Section(
        title=outcome["label"],
        summary=_summary(outcome, len(group)),
        budget=_budget_line(outcome),
        seeds=_seeds_table(group) if len(group) > 1 else None,
        costs=_costs_table(outcome),
        speed=realisation(known),
        plots=plots,
        tables=[table for table in tables if table.rows],
        notes=[str(note) for note in outcome["notes"]],
    )


PACE = (
    "Left, the multiplications that are left when zeros are skipped. Right, what a forward pass "
    "takes in this process: median, and the range from the 10th to the 90th percentile."
)


def _layers_plot(layers: Sequence[Mapping[str, Any]]) -> Plot:
    empty = sum(not row["kept"] for row in layers)
    caption = "Share of each layer's weights that is kept; the dashed line is all layers together."
    if empty:
        caption += f" {empty} of {len(layers)} layers lost everything."
    return made_plot("Layer by layer", figures.layer_bars(layers), caption)


def _axes_plot(axes: Sequence[Mapping[str, Any]]) -> Plot:
    rows = [{**row, "name": f"{row['axis']} ({row['role']})", "short": row["axis"]} for row in axes]
    whole = sum(row["kept"] == row["total"] for row in axes)
    caption = (
        "Share of each axis's units that is kept: channels, neurons and heads with everything "
        "that is tied to them; the dashed line is all axes together."
    )
    if whole:
        caption += f" {whole} of {len(axes)} axes are whole."
    return made_plot("Axis by axis", figures.layer_bars(rows, "axes"), caption)


def _summary(outcome: Mapping[str, Any], seeds: int) -> str:
    known = facts(outcome)
    parts = [outcome["budget"]]
    if known.quality is not None:
        shown = numbers.quality(known.quality, known.metric)
        parts.append(
            f"{shown} {known.metric}" if shown.endswith("%") else f"{known.metric} {shown}"
        )
    if known.kept is not None:
        parts.append(f"{numbers.share(known.kept)} of the parameters")
    if seeds > 1:
        parts.append(f"{seeds} seeds")
    return " · ".join(str(part) for part in parts if part)


def _budget_line(outcome: Mapping[str, Any]) -> BudgetLine | None:
    promise = outcome["promise"]
    if promise is None:
        return None
    show = {
        "params": lambda v: f"{numbers.plain(round(v))} parameters",
        "macs": lambda v: f"{numbers.count(v)} MACs",
        "bytes": numbers.size,
        "latency": lambda v: numbers.milliseconds(1e3 * v),
    }.get(promise["kind"], lambda v: numbers.percent(v, 2))
    names = {"n:m": "density"}
    kind = "" if promise["kind"] in ("params", "macs", "bytes") else promise["kind"]
    words = f" {names.get(kind, kind)}" if kind else ""
    return BudgetLine(
        budget=outcome["budget"] or promise["kind"],
        asked=show(promise["asked"]) + words,
        reached=show(promise["reached"]),
        kept=promise_kept(promise),
    )


def _costs_table(outcome: Mapping[str, Any]) -> Table | None:
    """Before and after, a quantity a row."""
    before, after = outcome["before"], outcome["after"]
    rows: list[tuple[str, str, str, str]] = []
    names = list(dict.fromkeys([*outcome["metrics_after"], *outcome["metrics_before"]]))
    names.sort(key=lambda name: name != outcome["primary"])
    for name in names:
        old, new = outcome["metrics_before"].get(name), outcome["metrics_after"].get(name)
        both = old is not None and new is not None
        change = numbers.difference(new, old, name, 2) if both else numbers.MISSING
        dense, pruned = (numbers.quality(value, name, 2) for value in (old, new))
        rows.append((_capital(name), dense, pruned, change))
    caption = ""
    if before is not None and after is not None:
        rows += [
            _change("Parameters", numbers.count, before["parameters"], after["parameters"]),
            _change("Parameters that are not zero", numbers.count, before["nonzero"],
                    after["nonzero"]),
            _change("MACs, zeros multiplied", numbers.count, before["macs"], after["macs"]),
            _change("MACs promised, zeros skipped", numbers.count, before["effective_macs"],
                    after["effective_macs"]),
            _change("File, stored densely", numbers.size, before["dense_bytes"],
                    after["dense_bytes"], "smaller", "larger"),
            _change("File, a bit mask and the kept values", numbers.size, before["sparse_bytes"],
                    after["sparse_bytes"], "smaller", "larger"),
        ]  # fmt: skip
        if before["latency"] or after["latency"]:
            rows.append(_latency_row(before["latency"], after["latency"], facts(outcome)))
        batch = after["batch"]
        timed = " and latency" if before["latency"] or after["latency"] else ""
        samples = "1 sample" if batch == 1 else f"{batch} samples"
        caption = f"MACs{timed} are those of one forward pass over {samples}."
        if total := sum(row["total"] for row in outcome["layers"]):
            left = sum(row["kept"] for row in outcome["layers"])
            caption += (
                f" {numbers.share(left / total)} of the {numbers.count(total)} weights that may be "
                "pruned are left; other parameters, such as biases, stay."
            )
        if after["latency"] is not None:
            caption += (
                f" Latency is the median of {after['latency']['repeats']} passes, ± half of the "
                "range from the 10th to the 90th percentile."
            )
    elif outcome["layers"]:
        total = sum(row["total"] for row in outcome["layers"])
        left = sum(row["kept"] for row in outcome["layers"])
        rows.append(_change("Weights that may be pruned", numbers.count, total, left))
        caption = "No task was given, so quality and cost were not measured."
    if not rows:
        return None
    return Table(("", "Dense", "Pruned", "Change"), rows, "Before and after", caption)


def _change(
    name: str, show: Any, before: float, after: float, less: str = "fewer", more: str = "more"
) -> tuple[str, str, str, str]:
    if after == before:
        change = "same"
    elif not after or not before:
        change = numbers.MISSING
    elif after < before:
        change = f"{numbers.factor(before / after)} {less}"
    else:
        change = f"{numbers.factor(after / before)} {more}"
    return name, show(before), show(after), change


def _latency_row(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, known: Facts
) -> tuple[str, str, str, str]:
    change = numbers.MISSING
    if known.speed is not None:
        faster = known.speed if known.speed >= 1 else 1 / known.speed
        word = "faster" if known.speed >= 1 else "slower"
        change = f"{numbers.factor(faster)} {word}"
        if known.same_speed:
            change = f"as fast ({numbers.factor(known.speed)})"
    shown = [numbers.latency(value) if value else "not timed" for value in (before, after)]
    return "Latency, measured", shown[0], shown[1], change


def _tiles(outcome: Mapping[str, Any]) -> list[Tile]:
    """Four key figures of a single outcome."""
    known, before, after = facts(outcome), outcome["before"], outcome["after"]
    tiles = []
    if known.quality is not None:
        dense = "dense not scored"
        if known.dense_quality is not None:
            change = numbers.difference(known.quality, known.dense_quality, known.metric)
            dense = f"dense {numbers.quality(known.dense_quality, known.metric)}, {change}"
        name = _capital(known.metric)
        tiles.append(Tile(name, numbers.quality(known.quality, known.metric), dense))
    if known.kept is not None:
        many = numbers.factor(1 / known.kept) + " fewer" if known.kept else "none left"
        tiles.append(Tile("Parameters left", numbers.share(known.kept), many))
    if before is not None and after is not None:
        dense = f"dense {numbers.size(before['dense_bytes'])}"
        if known.files is not None and known.files > 1.005:
            dense += f", {numbers.factor(known.files)} smaller"
        tiles.append(Tile("Smallest file", numbers.size(after["sparse_bytes"]), dense))
        if known.speed is not None:
            pace = f"dense {numbers.milliseconds(before['latency']['median'])}, "
            pace += "as fast" if known.same_speed else f"{numbers.factor(known.speed)} as fast"
            value = numbers.milliseconds(after["latency"]["median"])
            tiles.append(Tile("Measured latency", value, pace))
    return tiles


def _seeds_table(group: Sequence[Mapping[str, Any]]) -> Table:
    metric = group[0]["primary"]
    shown = representative(group)
    rows = []
    for outcome in group:
        line, after = _budget_line(outcome), outcome["after"]
        rows.append(
            (
                f"{outcome['seed']}",
                numbers.quality(outcome["metrics_after"].get(metric), metric, 2),
                numbers.count(after["nonzero"]) if after else numbers.MISSING,
                line.reached if line else numbers.MISSING,
                ("✓" if line.kept else "✗ missed") if line else numbers.MISSING,
            )
        )
    head = ("Seed", _capital(metric), "Weights", "Reached", "Budget")
    caption = f"Details below are those of seed {shown['seed']}, the median one."
    return Table(head, rows, "Seeds", caption)


def records_table(title: str, records: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of plain values; a wide and short table is laid on its side."""
    columns = list(dict.fromkeys(str(key) for row in records for key in row))
    rows = [[numbers.named(c, row[c]) if c in row else "" for c in columns] for row in records]
    if len(columns) > WIDE_TABLE and len(rows) < len(columns):
        turned = list(map(list, zip(*rows, strict=True)))
        head = [_capital(columns[0].replace("_", " ")), *turned[0]]
        body = [[c, *cells] for c, cells in zip(columns[1:], turned[1:], strict=True)]
        return Table(head, body, _capital(title))
    return Table([_capital(c.replace("_", " ")) for c in columns], rows, _capital(title))


def engines_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The promised ratio of MACs beside what was measured, an engine a row."""
    cells = []
    for row in rows:
        timed = row["ratio"] is not None
        sides = [numbers.latency(row[side]) for side in ("dense", "pruned")]
        spread = f"{row['low']:.3g} to {numbers.factor(row['high'])}" if timed else numbers.MISSING
        cells.append(
            (
                row["engine"],
                numbers.factor(row["promised"]),
                *(sides if timed else ("not timed", "not timed")),
                numbers.factor(row["ratio"]),
                spread,
            )
        )
    head = ("Engine", "MACs promised", "Dense", "Pruned", "Time measured", "10–90 % of rounds")
    caption = (
        "Promised: MACs of the pruned model, zeros skipped, over those of the dense one. Measured: "
        "its time over the dense one's, the median of rounds in which both ran one after the "
        "other; below 1 is faster."
    )
    told = [(row["engine"], row["failure"] or row.get("note")) for row in rows]
    reasons = [f" {engine}: {reason}." for engine, reason in told if reason]
    return Table(head, cells, "Promised and measured, by engine", caption + "".join(reasons))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------- several outcomes


def _boards(board: Sequence[Mapping[str, Any]]) -> list[Board]:
    contests: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in board:
        contests.setdefault((row["task"], row["budget"]), []).append(row)
    one_task = len({task for task, _ in contests}) == 1
    made = []
    for (task, budget), rows in contests.items():
        timed = any(row["latency_ms"] is not None for row in rows)
        waited = any(row["seconds"] is not None for row in rows)
        head = ["Parameters left", "MACs promised", "File"]
        head += ["Latency"] * timed + ["Run time"] * waited
        made.append(
            Board(
                title=budget if one_task or not task else f"{budget} — {task}",
                metric=_capital(rows[0]["metric"]),
                head=head,
                places=_places(rows, timed, waited),
                caption=_board_caption(rows),
            )
        )
    return made


def _places(rows: Sequence[Mapping[str, Any]], timed: bool, waited: bool) -> list[Place]:
    span, dense = _strip_span(rows), dense_quality(rows)
    places = []
    for row in rows:
        half = None if row["high"] is None else row["high"] - row["mean"]
        cells = [
            numbers.share(1 - row["sparsity"]),
            numbers.count(row["effective_macs"]),
            numbers.size(row["bytes"]),
        ]
        cells += [numbers.milliseconds(row["latency_ms"])] * timed
        cells += [numbers.duration(row["seconds"])] * waited
        places.append(
            Place(
                rank=row["rank"],
                label=row["label"],
                quality=numbers.quality_interval(row["mean"], half, row["metric"], 2),
                badge="≈ best" if row["tied"] and row["rank"] > 1 else "",
                strip=_strip(row, span, dense) if span else None,
                cells=cells,
                kept=row["promise_kept"],
            )
        )
    return places


def _board_caption(rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = {row["seeds"] for row in rows}
    many = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    words = f"Mean over {many} seed{'' if seeds == {1} else 's'}"
    if max(seeds) > 1:
        words += ", ± the half width of its 95 % interval (Student's t)"
    words += "." if rows[0]["higher_is_better"] else "; lower is better."
    if len(rows) > 1 and dense_quality(rows) is not None:
        words += " Dashed: the dense model."
    if any(row["tied"] and row["rank"] > 1 for row in rows):
        words += " ≈ best: Welch's 95 % interval of the difference from the best contains 0."
    if min(seeds) == 1 and len(rows) > 1:
        words += " With a single seed a difference may be chance."
    return words


def _strip_span(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """The values between which the strips are drawn: all, or the better ones if some failed."""
    from math import ceil, isfinite

    finite = [row for row in rows if isfinite(row["mean"])]
    if len(finite) < 2:
        return None
    known = dense_quality(finite)
    dense = [] if known is None else [known]
    whole = [v for r in finite for v in (r["mean"], r["low"], r["high"]) if v is not None] + dense
    best = [row["mean"] for row in finite[: max(2, ceil(0.6 * len(finite)))]] + dense
    low, high = min(whole), max(whole)
    if max(best) - min(best) < (high - low) / 4 and max(best) > min(best):
        margin = 0.5 * (max(best) - min(best))
        low, high = max(low, min(best) - margin), min(high, max(best) + margin)
    return (low, high) if high > low else None


def _strip(row: Mapping[str, Any], span: tuple[float, float], dense: float | None) -> Strip:
    low, high = span

    def place(value: float) -> float:
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)

    mean = row["mean"]
    ends = [mean if row[key] is None else row[key] for key in ("low", "high")]
    off = "low" if not mean >= low else "high" if mean > high else ""
    return Strip(
        place(mean) if mean == mean else 0.0,
        place(ends[0]) if mean == mean else 0.0,
        place(ends[1]) if mean == mean else 0.0,
        None if dense is None or not low <= dense <= high else place(dense),
        off,
    )


def _board_plots(
    board: Sequence[Mapping[str, Any]], outcomes: Sequence[Mapping[str, Any]]
) -> list[Plot]:
    plots = []
    tasks = list(dict.fromkeys(row["task"] for row in board))
    for task in tasks:
        rows = [row for row in board if row["task"] == task]
        name = f" — {task}" if len(tasks) > 1 else ""
        caption = "Error bars are 95 % intervals over seeds; the dashed line is the dense model."
        plots.append(made_plot(f"Trade-off{name}", figures.trade_off(rows), caption))
        tightest = max(rows, key=lambda row: row["sparsity"])["budget"]
        chosen = [row for row in rows if row["budget"] == tightest][:TIMED_ROWS]
        if any(row["latency_ms"] is not None for row in chosen):
            budgets = len({row["budget"] for row in rows})
            place = f"At {tightest}, where most was promised. " if budgets > 1 else ""
            timed = _timed_board(task, chosen, outcomes)
            figure = figures.promised_and_measured(timed)
            plots.append(made_plot(f"Promised and measured{name}", figure, place + PACE))
    return plots


def _timed(outcome: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Dense and pruned costs of one outcome, if either was timed."""
    before, after = outcome["before"], outcome["after"]
    if before is None or after is None or not (before["latency"] or after["latency"]):
        return []
    return [
        {"label": "dense", "macs": before["macs"], "latency": before["latency"]},
        {"label": outcome["label"], "macs": after["effective_macs"], "latency": after["latency"]},
    ]


def _timed_board(
    task: str, rows: Sequence[Mapping[str, Any]], outcomes: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Costs of the dense model and of a leaderboard's rows, with spreads where they are known."""
    own = [o for o in outcomes if _task(o) == task]
    timed = []
    dense = next((o["before"] for o in own if o["before"] is not None), None)
    if dense is not None:
        latency = dense["latency"] or _exactly(rows[0]["dense_latency_ms"])
        timed.append({"label": "dense", "macs": dense["macs"], "latency": latency})
    for row in rows:
        group = [o for o in own if o["label"] == row["label"] and o["budget"] == row["budget"]]
        after = representative(group)["after"] if group else None
        latency = (after or {}).get("latency") or _exactly(row["latency_ms"])
        timed.append({"label": row["label"], "macs": row["effective_macs"], "latency": latency})
    return timed


def _exactly(milliseconds: float | None) -> dict[str, float] | None:
    """A latency of which only the median is known."""
    if milliseconds is None:
        return None
    return {"median": milliseconds, "low": milliseconds, "high": milliseconds}


# ---------------------------------------------------------------- what is said once


def _notes(outcomes: Sequence[Mapping[str, Any]]) -> list[Note]:
    """The notes of all outcomes, equal ones of a method once."""
    counted: dict[tuple[str, str], int] = {}
    for outcome in outcomes:
        for text in outcome["notes"]:
            counted[outcome["label"], str(text)] = counted.get((outcome["label"], str(text)), 0) + 1
    alone = len({outcome["label"] for outcome in outcomes}) == 1
    notes = [
        Note(
            who="" if alone else label,
            text=text + (f" ({times} times)" if times > 1 else ""),
            missed="MISSED" in text,
        )
        for (label, text), times in counted.items()
    ]
    return sorted(notes, key=lambda note: not note.missed)


def _speeds(outcomes: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(methods, what makes them really faster), each explanation once."""
    told: dict[str, list[str]] = {}
    for outcome in outcomes:
        known = facts(outcome)
        # the size of one outcome's file says nothing about the others'
        text = re.sub(r" \([\d.]+× here\)", "", realisation(known))
        told.setdefault(text, []).append(known.name)
    return [(", ".join(dict.fromkeys(names)), text) for text, names in told.items()]


def _sources(outcomes: Sequence[Mapping[str, Any]]) -> list[Source]:
    """The methods with their papers; a name that is not registered has neither."""
    from secateurs.registry import method_class

    sources = []
    for name in dict.fromkeys(str(o["method"]) for o in outcomes if o["method"]):
        try:
            cls = method_class(name)
        except InputError:
            sources.append(Source(name, "", "Not registered in this installation."))
            continue
        summary = (cls.__doc__ or "").strip().splitlines()
        paper = str(cls.paper) if cls.paper else "A baseline, without a paper of its own."
        sources.append(Source(name, summary[0] if summary else "", paper))
    return sources


# ---------------------------------------------------------------- the file


def made_plot(title: str, figure: Any, caption: str = "") -> Plot:
    """A figure as the page holds it."""
    # the data stands in a script element: no tag may begin or end inside it
    data = json.dumps(json.loads(figure.to_json()), separators=(",", ":"))
    for sign in "<>&":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return Plot(title, data, int(figure.layout.height), caption)


def _plotly_source() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def bound(text: str) -> str:
    """Text whose numbers do not part from their units at the end of a line."""
    text = re.sub(r"(?<=\d) (?=(%|ms|s|min|h|[kMGTP]?B|times|points|seeds?)\b|%)", "\u00a0", text)
    return text.replace("± ", "±\u00a0")


def _is_number(text: str) -> bool:
    """Whether a cell is set to the right."""
    return bool(re.match(r"^[−+≈]?[\d∞]", text)) or text in ("", numbers.MISSING)


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        missing = described("jinja2 is not installed")
        raise InputError("report", missing, "pip install 'secateurs[report]'") from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bound"] = bound
    source = files("secateurs.report").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source)
