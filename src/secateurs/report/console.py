"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from secateurs.report import numbers


def _table(*columns: str, left: int = 1, title: str | None = None) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right")
    return table


def outcome_table(outcomes: Sequence[Mapping[str, Any]]) -> Table:
    """What was before and what is after, a row a quantity and a pair of columns an outcome."""
    table = _table("")
    for outcome in outcomes:
        name = str(outcome.get("label") or outcome["method"] or "model")
        table.add_column("before", justify="right")
        table.add_column(name, justify="right")
    for title, pairs in before_and_after(outcomes):
        table.add_row(title, *(text for pair in pairs for text in pair))
    return table


def before_and_after(
    outcomes: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows of (quantity, (before, after) an outcome), as texts, where measured."""
    quantities: dict[str, tuple[str, Callable[[Any], str]]] = {
        "parameters": ("parameters", numbers.count),
        "non-zero parameters": ("nonzero", numbers.count),
        "MACs": ("macs", numbers.count),
        "MACs on non-zero weights": ("effective_macs", numbers.count),
        "bytes, dense": ("dense_bytes", numbers.size),
        "bytes, sparse with bit mask": ("sparse_bytes", numbers.size),
        "latency, measured": ("latency", numbers.latency),
    }
    rows: list[tuple[str, list[tuple[str, str]]]] = []
    names = list(dict.fromkeys(n for o in outcomes for n in o["metrics_after"]))
    for name in names:
        rows.append(
            (
                name,
                [
                    (
                        numbers.quality(o["metrics_before"].get(name), name),
                        numbers.quality(o["metrics_after"].get(name), name),
                    )
                    for o in outcomes
                ],
            )
        )
    for title, (key, show) in quantities.items():
        pairs = [
            (show((o["before"] or {}).get(key)), show((o["after"] or {}).get(key)))
            for o in outcomes
        ]
        if any(text != numbers.MISSING for pair in pairs for text in pair):
            rows.append((title, pairs))
    return rows


def leaderboard_table(board: Sequence[Mapping[str, Any]]) -> Table:
    """The leaderboard: quality with its 95 % interval, and what it costs.

    An equals sign marks what cannot be told from the best; the report has all columns.
    """
    metric = board[0]["metric"] if board else "quality"
    table = _table("budget", "method", metric, "non-zeros", "latency", left=2)
    for column in table.columns:
        column.no_wrap = True
    previous = None
    for row in board:
        group = (row["task"], row["budget"])
        if previous not in (None, group):
            table.add_section()
        mark = "[bold]" if row["rank"] == 1 else "[bold dim]=[/] " if row["tied"] else ""
        table.add_row(
            row["budget"] if group != previous else "",
            f"{mark}{row['label']}",
            interval(row),
            numbers.count(row["nonzero"]),
            numbers.milliseconds(row["latency_ms"]),
        )
        previous = group
    return table


def interval(row: Mapping[str, Any]) -> str:
    """Mean and half width of the 95 % interval of a leaderboard's row."""
    half = None if row["high"] is None else row["high"] - row["mean"]
    return numbers.quality_interval(row["mean"], half, row["metric"])


def methods_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Methods with what they do, when, and where they come from."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for column in ("method", "what it does", "unit", "when", "paper"):
        table.add_column(column, no_wrap=column == "method")
    for row in rows:
        tags = row["tags"]
        table.add_row(
            row["name"],
            row["summary"],
            "+".join(tags["unit"]),
            "+".join(tags["when"]),
            row["paper"] or "baseline",
        )
    return table


def layers_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Prunable weights, a row a tensor."""
    table = _table("weight", "shape", "weights", "kept", "MACs", left=2)
    for row in rows:
        table.add_row(
            row["name"],
            " x ".join(map(str, row["shape"])),
            numbers.count(row["weights"]),
            numbers.share(row["kept"] / row["weights"]),
            numbers.count(row["macs"]),
        )
    return table


def cost_table(cost: Mapping[str, Any]) -> Table:
    """What a model costs."""
    table = _table("", "")
    for title, pairs in before_and_after(
        [{"metrics_before": {}, "metrics_after": {}, "before": None, "after": cost}]
    ):
        table.add_row(title, pairs[0][1])
    return table
