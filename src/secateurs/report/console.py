"""Tables for the terminal, with the numbers of `secateurs.report.numbers`.

Names are shown literally: square brackets in them are no markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from secateurs.report import numbers
from secateurs.report.headline import ENGINES, facts, noted

MANY_CLASSES = 20
"""More classes than this are not listed."""


def outcome_table(outcomes: Sequence[Mapping[str, Any]]) -> Table:
    """Before and after of one outcome, or a row each of several.

    Args:
        outcomes: `Outcome.as_dict` each.
    """
    return _before_and_after(outcomes[0]) if len(outcomes) == 1 else _outcomes(outcomes)


def _before_and_after(outcome: Mapping[str, Any]) -> Table:
    name = facts(outcome).name
    table = _table(f"{name}, {outcome['budget']}" if outcome["budget"] else name)
    table.add_column("")
    for column in ("dense", "pruned", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    before, after = outcome["before"], outcome["after"]
    for metric in dict.fromkeys([*outcome["metrics_before"], *outcome["metrics_after"]]):
        old, new = outcome["metrics_before"].get(metric), outcome["metrics_after"].get(metric)
        both = old is not None and new is not None
        change = numbers.difference(new, old, metric, 2) if both else numbers.MISSING
        shown = [numbers.quality(value, metric, 2) for value in (old, new)]
        _row(table, metric, *shown, change)
    if before is None or after is None:
        total = sum(layer["total"] for layer in outcome["layers"])
        left = sum(layer["kept"] for layer in outcome["layers"])
        _row(table, "weights", *map(numbers.count, (total, left)), _less(total, left))
        return table
    for label, key, show in (
        ("parameters", "parameters", numbers.count),
        ("not zero", "nonzero", numbers.count),
        ("MACs promised", "effective_macs", numbers.count),
        ("file, dense", "dense_bytes", numbers.size),
        ("file, sparse", "sparse_bytes", numbers.size),
    ):
        _row(table, label, show(before[key]), show(after[key]), _less(before[key], after[key]))
    if before["latency"] or after["latency"]:
        speed = numbers.factor(facts(outcome).speed)
        change = f"{speed} as fast" if facts(outcome).speed else numbers.MISSING
        shown = [numbers.latency(cost["latency"]) for cost in (before, after)]
        _row(table, "latency measured", *shown, change)
        masked = facts(outcome).masked
        table.caption = "zeros in dense tensors are still multiplied" if masked else None
    for timed in outcome["tables"].get(ENGINES, []):
        if timed["engine"] != "eager" and timed["ratio"] is not None:
            shown = [numbers.latency(timed[side]) for side in ("dense", "pruned")]
            speed = f"{numbers.factor(1 / timed['ratio'])} as fast"
            _row(table, f"in {timed['engine']}{noted(timed)}", *shown, speed)
    return table


def _less(before: float, after: float) -> str:
    """How many times less."""
    if before == after:
        return "same"
    return f"{numbers.factor(before / after)} less" if after else "nothing left"


def _outcomes(outcomes: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("outcomes")
    for column in ("method", "budget"):
        table.add_column(column)
    for column in ("seed", "quality", "dense", "left", "MACs", "file", "latency"):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome in outcomes:
        known, after = facts(outcome), outcome["after"] or {}
        latency = after.get("latency")
        _row(
            table,
            known.name,
            outcome["budget"],
            f"{outcome['seed']}",
            numbers.quality(known.quality, known.metric),
            numbers.quality(known.dense_quality, known.metric),
            numbers.share(known.kept),
            numbers.count(after.get("effective_macs")),
            numbers.size(after.get("sparse_bytes")),
            numbers.milliseconds(latency["median"]) if latency else numbers.MISSING,
        )
    return table


def leaderboard_table(board: Sequence[Mapping[str, Any]]) -> Table:
    """The leaderboard, a section for each task and budget.

    Args:
        board: rows of `secateurs.report.leaderboard.leaderboard`.
    """
    table = _table("leaderboard")
    table.add_column("#", justify="right")
    table.add_column("method", overflow="fold")
    for column in ("quality", "", "left", "MACs", "file", "latency"):
        table.add_column(column, justify="right", no_wrap=True)
    shown: tuple[str, str] | None = None
    tasks = {row["task"] for row in board}
    for row in board:
        group = (row["task"], row["budget"])
        if group != shown:
            table.add_section()
            title = f"{row['budget']}, {row['task']}" if len(tasks) > 1 else row["budget"]
            table.add_row("", Text(title, style="bold"))
            shown = group
        half = None if row["high"] is None else row["high"] - row["mean"]
        _row(
            table,
            f"{row['rank']}",
            row["label"] + (" (budget missed)" if row["promise_kept"] is False else ""),
            numbers.quality_interval(row["mean"], half, row["metric"]),
            "≈" if row["tied"] and row["rank"] > 1 else "",
            numbers.share(1 - row["sparsity"]),
            numbers.count(row["effective_macs"]),
            numbers.size(row["bytes"]),
            numbers.milliseconds(row["latency_ms"]),
        )
    counts = sorted({row["seeds"] for row in board})
    if counts and counts[-1] > 1:
        seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        table.caption = (
            f"{seeds} seeds, ± half of the 95 % interval; ≈ cannot be told from the best"
        )
    return table


def methods_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The registered methods: what each does, its paper, its budgets and needs.

    Args:
        rows: ``name``, ``summary``, ``paper`` (or None), ``budgets`` and ``needs``.
    """
    table = _table(None)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does")
    table.add_column("budgets", max_width=18)
    table.add_column("needs", max_width=12)
    for row in rows:
        text = Text(row["summary"])
        if row.get("paper"):
            text.append(f"\n{row['paper']}", style="dim")
        table.add_row(
            Text(row["name"], style="bold"),
            text,
            Text(", ".join(row["budgets"])),
            Text(", ".join(row["needs"])),
        )
    table.show_lines = True
    return table


def selection_table(selection: Mapping[str, Any]) -> Table:
    """What a selection keeps, of every class where there are labels.

    Args:
        selection: `Selection.as_dict`.
    """
    table = _table(f"{selection['method']}, {selection['budget']}")
    table.add_column("")
    for column in ("rows", "kept", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    groups = [("all", selection["rows"], selection["kept"])]
    if len(selection["classes"]) <= MANY_CLASSES:
        groups += [(f"class {c['class']}", c["rows"], c["kept"]) for c in selection["classes"]]
    for name, rows, kept in groups:
        share = numbers.share(kept / rows) if rows else numbers.MISSING
        _row(table, name, numbers.plain(rows), numbers.plain(kept), share)
    for reason in ("duplicate", "filtered"):
        if count := selection[reason]:
            share = numbers.share(count / selection["rows"])
            _row(table, f"left out: {reason}", numbers.plain(count), "0", share)
    return table


def layers_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The weights of a model that can be pruned.

    Args:
        rows: ``name``, ``shape``, ``weights``, ``kept`` and ``macs``.
    """
    table = _table(None)
    table.add_column("weight", ratio=1)
    for column in ("shape", "weights", "kept", "MACs"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        _row(
            table,
            row["name"],
            " × ".join(str(side) for side in row["shape"]),
            numbers.count(row["weights"]),
            numbers.share(row["kept"] / row["weights"]) if row["weights"] else numbers.MISSING,
            numbers.count(row["macs"]),
        )
    return table


def axes_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The axes of a model that can be shortened.

    Args:
        rows: ``name``, ``role``, ``size``, of one unit ``granularity``, ``parameters`` and
            ``macs``, and ``normalized``.
    """
    table = _table(None)
    table.add_column("axis", ratio=1)
    table.add_column("role", no_wrap=True)
    for column in ("units", "entries each", "params each", "MACs each"):
        table.add_column(column, justify="right", no_wrap=True)
    if any(row["normalized"] for row in rows):
        table.add_column("statistics over it")
    for row in rows:
        _row(
            table,
            row["name"],
            row["role"],
            numbers.plain(row["size"]),
            numbers.plain(row["granularity"]),
            numbers.count(row["parameters"]),
            numbers.count(row["macs"]),
            *([", ".join(row["normalized"])] if len(table.columns) > 6 else []),
        )
    return table


def frozen_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Why the other axes cannot be shortened.

    Args:
        rows: ``reason``, ``axes`` (how many) and ``example``.
    """
    table = _table(None)
    table.add_column("frozen because", ratio=1)
    table.add_column("axes", justify="right", no_wrap=True)
    table.add_column("such as", ratio=1)
    for row in rows:
        _row(table, row["reason"], numbers.plain(row["axes"]), row["example"])
    return table


def cost_table(cost: Mapping[str, Any]) -> Table:
    """What a model costs.

    Args:
        cost: `Cost.as_dict`.
    """
    table = _table(None)
    table.add_column("")
    table.add_column("", justify="right", no_wrap=True)
    table.show_header = False
    _row(table, "parameters", numbers.count(cost["parameters"]))
    if cost["nonzero"] != cost["parameters"]:
        _row(table, "not zero", numbers.count(cost["nonzero"]))
    macs = "MACs a sample" if cost["batch"] == 1 else f"MACs of {cost['batch']} samples"
    _row(table, macs, numbers.count(cost["macs"]))
    if cost["effective_macs"] != cost["macs"]:
        _row(table, "MACs promised, zeros skipped", numbers.count(cost["effective_macs"]))
    _row(table, "file, dense", numbers.size(cost["dense_bytes"]))
    if cost["sparse_bytes"] != cost["dense_bytes"]:
        _row(table, "file, sparse", numbers.size(cost["sparse_bytes"]))
    if cost["latency"]:
        _row(table, "latency measured", numbers.latency(cost["latency"]))
    return table


def _table(title: str | None) -> Table:
    heading = None if title is None else Text(title, style="bold")
    return Table(
        title=heading, title_justify="left", caption_justify="left", box=SIMPLE_HEAD,
        pad_edge=False,
    )  # fmt: skip


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(str(cell)) for cell in cells))
