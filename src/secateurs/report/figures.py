"""The plots of the report, as plotly figures.

Every figure has transparent backgrounds and neutral greys, so that the page decides between
light and dark. ``layout.meta["narrow"]`` holds what changes on a narrow screen (a relayout
patch); ``layout.updatemenus`` become ordinary buttons in the HTML report. Methods differ by
colour and by marker, in the colour-blind safe hues of Okabe and Ito, darkened where they
would be too light on white.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs.errors import InputError, described, require, unknown
from secateurs.report import numbers
from secateurs.report.leaderboard import dense_quality

if TYPE_CHECKING:
    import plotly.graph_objects as go

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#C8609B", "#C98500", "#3E9CD6", "#7A5FB5")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down")
BLUE, ORANGE = PALETTE[0], PALETTE[1]
GREY = "#8A8F98"
GRID = "rgba(138, 143, 152, 0.22)"
LIGHT = "rgba(138, 143, 152, 0.42)"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'

ROLES = {
    "channel": BLUE, "neuron": PALETTE[2], "head": ORANGE, "head width": PALETTE[3],
    "width": PALETTE[4],
}  # fmt: skip
"""The colour of an axis by what its units are."""

MANY_AXES = 40
"""Above this number axes stand side by side without their names."""

TIED_SHOWN = 5
"""Tensors that are named when one points at an axis."""

BAR = 0.68
"""Width of an axis's bar; plotly would take the gaps between bars of a colour for room."""

MANY_LAYERS = 24
"""Above this number layers stand side by side without their names."""

CURVE_POINTS = 1200
"""Points of a learning curve that are drawn; longer ones are thinned."""

LOG_ABOVE = 4.0
"""Largest over smallest value from which an axis is logarithmic."""


def graph_objects() -> Any:
    """The module `plotly.graph_objects`.

    Raises:
        InputError: the extra ``report`` is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        missing = described("plotly is not installed")
        raise InputError("report", missing, "pip install 'secateurs[report]'") from None
    return go


# ---------------------------------------------------------------- quality against cost


def _density(row: Mapping[str, Any]) -> float:
    return 100 * (1 - row["sparsity"])


def _macs(row: Mapping[str, Any]) -> float:
    return float(row["effective_macs"])


def _latency(row: Mapping[str, Any]) -> float | None:
    value = row["latency_ms"]
    return None if value is None else float(value)


def _place(row: Mapping[str, Any]) -> float:
    return float(row["place"])


AXES: dict[str, tuple[str, Callable[[Mapping[str, Any]], float | None]]] = {
    "method": ("Methods", _place),
    "density": ("Parameters left", _density),
    "macs": ("MACs promised", _macs),
    "latency": ("Milliseconds measured", _latency),
}
"""What quality can be drawn against: the label of the button, and the value of a row."""


def trade_off(board: Sequence[Mapping[str, Any]], *, x: str | None = None) -> go.Figure:
    """Quality against cost: a line a method with 95 % intervals, the dense model dashed.

    Buttons switch between parameters left, MACs promised and milliseconds measured; where
    every method has one budget only, they may also stand side by side in their order. Several
    tasks stand below each other.

    Args:
        board: rows of `secateurs.report.leaderboard.leaderboard`.
        x: the first axis: ``method``, ``density``, ``macs`` or ``latency``; by default the
            first of these that is there.

    Raises:
        InputError: no rows, an unknown axis, or one that was not measured.
    """
    go = graph_objects()
    require(bool(board), "board", list(board), "at least one row")
    labels = list(dict.fromkeys(row["label"] for row in board))
    board = [{**row, "place": labels.index(row["label"])} for row in board]
    known = [axis for axis in AXES if any(AXES[axis][1](row) is not None for row in board)]
    if len({(row["task"], row["label"]) for row in board}) < len(board):
        known.remove("method")
    if x is not None and x not in AXES:
        raise unknown("x", x, AXES)
    if x is not None and x not in known:
        raise InputError("x", x, "one of " + ", ".join(known) + ", which this board has")
    first = x or known[0]

    tasks = list(dict.fromkeys(row["task"] for row in board))
    traces, curves = [], []
    for panel, task in enumerate(tasks):
        for label in labels:
            rows = [r for r in board if r["task"] == task and r["label"] == label]
            rows.sort(key=_density)
            if rows:
                curves.append(rows)
                style = labels.index(label)
                traces.append(_method_trace(go, rows, first, style, panel, legend=panel == 0))
    room, narrow_room = (_legend_room(labels, width) for width in (900, 350))
    figure = _figure(
        go, traces, 400 * len(tasks) + room, {"l": 20, "r": 18, "t": 46, "b": 56 + room}
    )
    domains = _stacked(len(tasks), gap=0.14)
    for panel, task in enumerate(tasks):
        rows = [r for r in board if r["task"] == task]
        suffix = _suffix(panel)
        metric, scale = rows[0]["metric"], _scale(rows)
        figure.update_layout(
            {
                f"xaxis{suffix}": {**_axis_layout(first, rows), "anchor": f"y{suffix}"},
                f"yaxis{suffix}": {
                    **_quality_axis(metric, scale, rows[0]["higher_is_better"]),
                    "domain": domains[panel],
                    "anchor": f"x{suffix}",
                    "range": _quality_range(rows, scale),
                },
            }
        )
        # above few weights the line is free; above methods in their order, over the last
        _dense_line(figure, rows, metric, scale, suffix, left=first != "method")
        if len(tasks) > 1:
            figure.add_annotation(
                text=f"<b>{_text(task)}</b>", x=0, xref=f"x{suffix} domain", xanchor="left",
                y=1, yref=f"y{suffix} domain", yanchor="bottom", showarrow=False,
            )  # fmt: skip
    menus = [_axis_buttons(known, first, curves, tasks, board)] if len(known) > 1 else []
    closer = _close_up_buttons(board, tasks)
    figure.update_layout(
        legend=_legend_below(),
        updatemenus=menus + ([closer] if closer else []),
        meta={
            "wide": {"height": 400 * len(tasks) + room, "margin.b": 56 + room, "margin.r": 18},
            "narrow": {
                "height": 340 * len(tasks) + narrow_room,
                "margin.b": 56 + narrow_room,
                "margin.r": 4,
            },
        },
    )
    return figure


def _method_trace(
    go: Any,
    rows: Sequence[Mapping[str, Any]],
    axis: str,
    style: int,
    panel: int,
    *,
    legend: bool,
) -> Any:
    colour = PALETTE[style % len(PALETTE)]
    symbol = SYMBOLS[(style + style // len(PALETTE)) % len(SYMBOLS)]
    scale = _scale(rows)
    halves = [0.0 if r["high"] is None else scale * (r["high"] - r["mean"]) for r in rows]
    return go.Scatter(
        x=[AXES[axis][1](r) for r in rows],
        y=[scale * r["mean"] for r in rows],
        error_y={"array": halves, "thickness": 1.2, "width": 4, "color": colour},
        name=_text(rows[0]["label"]),
        legendgroup=_text(rows[0]["label"]),
        showlegend=legend,
        mode=_mode(axis),
        line={"color": colour, "width": 2, "dash": "solid" if style < len(PALETTE) else "dot"},
        marker={"color": colour, "size": 8, "symbol": symbol},
        hovertext=[_hover(r) for r in rows],
        hoverinfo="text",
        xaxis=f"x{_suffix(panel)}",
        yaxis=f"y{_suffix(panel)}",
    )


def _mode(axis: str) -> str:
    """Measured times are noisy: a line through them would tell nothing."""
    return "markers" if axis == "latency" else "lines+markers"


def _scale(rows: Iterable[Mapping[str, Any]]) -> int:
    """100 for metrics that are shown in percent, else 1."""
    return 100 if all(numbers.is_ratio(r["metric"], r["mean"]) for r in rows) else 1


def _hover(row: Mapping[str, Any]) -> str:
    half = None if row["high"] is None else row["high"] - row["mean"]
    quality = numbers.quality_interval(row["mean"], half, row["metric"], 2)
    seeds = "1 seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
    lines = [
        f"<b>{_text(row['label'])}</b>, {_text(row['budget'])}",
        f"{_text(row['metric'])} {quality} ({seeds})",
        f"{numbers.count(row['nonzero'])} parameters, {numbers.share(1 - row['sparsity'])}",
        f"{numbers.count(row['effective_macs'])} MACs promised",
    ]
    if row["latency_ms"] is not None:
        lines.append(f"{numbers.milliseconds(row['latency_ms'])} measured")
    return "<br>".join(lines)


def _axis_layout(axis: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Title, scale and ticks of a cost axis over the given rows."""
    title, value = AXES[axis]
    if axis == "method":
        return _methods_axis(rows)
    values = [v for row in rows if (v := value(row)) is not None] or [1.0]
    low, high = min(values), max(values)
    if len(values) < len(rows):
        title += f" ({len(rows) - len(values)} of {len(rows)} not timed)"
    logarithmic = low > 0 and high / low >= LOG_ABOVE
    layout: dict[str, Any] = {**_line_axis(title), "type": "log" if logarithmic else "linear"}
    if logarithmic:
        margin = 0.06 * math.log10(high / low)
        layout["range"] = [math.log10(low) - margin, math.log10(high) + margin]
        layout |= {"tickmode": "array", **_log_ticks(low, high, axis)}
        return layout
    layout["range"] = [0, 1.08 * high]
    layout |= {"tickmode": "auto", "tickvals": None, "ticktext": None}
    layout["ticksuffix"] = " %" if axis == "density" else ""
    layout["tickformat"] = "~s" if axis == "macs" else ""
    return layout


def _methods_axis(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Methods side by side, each at its place."""
    names = {row["place"]: _text(_elided(str(row["label"]), 26)) for row in rows}
    return {
        **_line_axis(""),
        "type": "linear",
        "range": [min(names) - 0.5, max(names) + 0.5],
        "tickmode": "array", "tickvals": list(names), "ticktext": list(names.values()),
        "ticksuffix": "", "tickformat": "",
    }  # fmt: skip


def _log_ticks(low: float, high: float, axis: str) -> dict[str, Any]:
    """1, 2, 5 (and 3, 7 over a short range) of every decade, or only its 1 over a long one."""
    digits = (1, 2, 3, 5, 7) if high / low < 20 else (1, 2, 5) if high / low < 1e3 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [d * 10.0**e for e in decades for d in digits]
    ticks = [t for t in ticks if low / 1.2 <= t <= high * 1.2]
    text = [f"{t:g} %" if axis == "density" else numbers.count(t) for t in ticks]
    return {"tickvals": ticks, "ticktext": text, "ticksuffix": "", "tickformat": ""}


def _axis_buttons(
    known: Sequence[str],
    first: str,
    curves: Sequence[Sequence[Mapping[str, Any]]],
    tasks: Sequence[str],
    board: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Small buttons that put another cost on the horizontal axes."""
    buttons = []
    for axis in known:
        title, value = AXES[axis]
        changes: dict[str, Any] = {}
        for panel, task in enumerate(tasks):
            layout = _axis_layout(axis, [r for r in board if r["task"] == task])
            changes[f"xaxis{_suffix(panel)}.title.text"] = layout.pop("title")["text"]
            for key in ("type", "range", "tickmode", "tickvals", "ticktext", "ticksuffix",
                        "tickformat"):  # fmt: skip
                changes[f"xaxis{_suffix(panel)}.{key}"] = layout.get(key)
        data = {"x": [[value(row) for row in rows] for rows in curves], "mode": _mode(axis)}
        buttons.append({"label": title, "method": "update", "args": [data, changes]})
    return {
        "type": "buttons",
        "direction": "right",
        "active": list(known).index(first),
        "buttons": buttons,
        "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "pad": {"b": 6},
    }  # fmt: skip


def _close_up_buttons(
    board: Sequence[Mapping[str, Any]], tasks: Sequence[str]
) -> dict[str, Any] | None:
    """Buttons between all methods and the better half, where a few failures hide the rest."""
    whole, closer, useful = {}, {}, False
    for panel, task in enumerate(tasks):
        rows = [r for r in board if r["task"] == task and math.isfinite(r["mean"])]
        if not rows:
            continue
        rows.sort(key=lambda r: r["mean"], reverse=rows[0]["higher_is_better"])
        scale, key = _scale(rows), f"yaxis{_suffix(panel)}.range"
        points = [{**r, "low": None, "high": None} for r in rows[: math.ceil(0.6 * len(rows))]]
        whole[key], closer[key] = _quality_range(rows, scale), _quality_range(points, scale)
        spans = [r[key][1] - r[key][0] for r in (closer, whole)]
        useful |= spans[0] < spans[1] / 4
    if not useful:
        return None
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": [
            {"label": "All", "method": "relayout", "args": [whole]},
            {"label": "Close-up", "method": "relayout", "args": [closer]},
        ],
        "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "pad": {"b": 6},
    }  # fmt: skip


def _quality_range(rows: Sequence[Mapping[str, Any]], scale: int) -> list[float]:
    keys = ("mean", "low", "high", "dense_quality")
    finite = [r[k] for r in rows for k in keys if r[k] is not None and math.isfinite(r[k])]
    if not finite:
        return [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    if scale == 100:
        low, high = max(low, 0.0), min(high, 1.0 + 0.3 * margin)
    return [scale * low, scale * high]


def _quality_axis(metric: str, scale: int, higher_is_better: bool) -> dict[str, Any]:
    better = "" if higher_is_better else " (lower is better)"
    return {
        **_line_axis(_text(metric[:1].upper() + metric[1:]) + better),
        "ticksuffix": " %" if scale == 100 else "",
    }


def _dense_line(
    figure: Any,
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    scale: int,
    suffix: str,
    *,
    left: bool = False,
) -> None:
    value = dense_quality(rows)
    if value is None:
        return
    figure.add_shape(
        type="line", x0=0, x1=1, xref=f"x{suffix} domain", y0=scale * value, y1=scale * value,
        yref=f"y{suffix}", line={"color": GREY, "width": 1.4, "dash": "dash"}, layer="below",
    )  # fmt: skip
    figure.add_annotation(
        text=f"dense {numbers.quality(value, metric)}", x=0 if left else 1,
        xref=f"x{suffix} domain", xanchor="left" if left else "right", xshift=6 if left else 0,
        y=scale * value, yref=f"y{suffix}", yanchor="bottom", showarrow=False,
        font={"color": GREY, "size": 12},
    )  # fmt: skip


# ---------------------------------------------------------------- promised and measured


def promised_and_measured(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """MACs as counted beside the milliseconds that a forward pass really took.

    Args:
        rows: ``label``; ``macs`` without those on zeros; ``latency`` as the plain values of a
            `secateurs.parts.costs.Latency`, or None where nothing was timed. A row labelled
            ``dense`` is drawn in grey.
    """
    go = graph_objects()
    require(bool(rows), "rows", list(rows), "at least one row")
    names = [_text(_elided(str(row["label"]), 30)) for row in rows]
    # several rows may share a label, so positions are numbers and labels are tick texts
    places = list(range(len(rows)))
    colours = [GREY if row["label"] == "dense" else BLUE for row in rows]
    macs = [float(row["macs"]) for row in rows]
    timings = [row["latency"] for row in rows]
    medians = [0.0 if t is None else t["median"] for t in timings]
    highs = [0.0 if t is None else t["high"] for t in timings]
    timed = ["not timed" if t is None else numbers.latency(t) for t in timings]
    spans = {
        "array": [high - median for high, median in zip(highs, medians, strict=True)],
        "arrayminus": [0 if t is None else t["median"] - t["low"] for t in timings],
    }
    bar = {"orientation": "h", "y": places, "hoverinfo": "text", "marker": {"color": colours}}
    words = {"y": places, "mode": "text", "textposition": "middle right", "hoverinfo": "skip",
             "cliponaxis": False}  # fmt: skip
    counted = [numbers.count(m) for m in macs]
    traces = [
        go.Bar(
            x=macs, hovertext=[f"{n}: {m} MACs" for n, m in zip(names, counted, strict=True)],
            **bar,
        ),
        go.Scatter(x=macs, text=[f"  {text}" for text in counted], **words),
        go.Bar(
            x=medians, hovertext=[f"{n}: {t}" for n, t in zip(names, timed, strict=True)],
            error_x={"type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                     "color": GREY, **spans},
            xaxis="x2", yaxis="y2", **bar,
        ),
        go.Scatter(x=highs, text=[f"  {t}" for t in timed], xaxis="x2", yaxis="y2", **words),
    ]  # fmt: skip
    height = 60 + 30 * len(rows)
    figure = _figure(go, traces, height, margin={"l": 20, "r": 12, "t": 34, "b": 8})
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": names}
    side = {
        "range": [len(rows) - 0.4, -0.6], "showgrid": False, "automargin": True, "zeroline": False,
        "ticklabelstandoff": 6,
    }  # fmt: skip
    hidden = {"showticklabels": False, "showgrid": False, "zeroline": False, "fixedrange": True}
    figure.update_layout(
        xaxis={**hidden, "domain": [0, 0.46], "range": [0, 1.3 * max(macs) or 1]},
        xaxis2={**hidden, "domain": [0.54, 1], "anchor": "y2", "range": [0, 1.7 * max(highs) or 1]},
        yaxis={**side, **ticks, "fixedrange": True},
        yaxis2={**side, **ticks, "anchor": "x2", "showticklabels": False, "fixedrange": True},
        bargap=0.45,
        annotations=[
            _heading("MACs promised", "x", "y"),
            _heading("Milliseconds measured", "x2", "y2"),
        ],
        meta=_beside_or_below(len(rows), height, max(highs)),
    )  # fmt: skip
    return figure


def _beside_or_below(rows: int, height: int, longest: float) -> dict[str, Any]:
    """The two panels beside each other on a wide screen, below each other on a narrow one."""
    tall = 100 + 56 * rows
    half = 0.5 - 24 / (tall - 42)  # the heading of the lower panel needs 48 pixels
    return {
        "narrow": {
            "height": tall,
            "xaxis.domain": [0, 1], "xaxis2.domain": [0, 1],
            "yaxis.domain": [1 - half, 1], "yaxis2.domain": [0, half],
            "yaxis2.showticklabels": True, "xaxis2.range": [0, 2.4 * longest or 1],
        },
        "wide": {
            "height": height,
            "xaxis.domain": [0, 0.46], "xaxis2.domain": [0.54, 1],
            "yaxis.domain": [0, 1], "yaxis2.domain": [0, 1],
            "yaxis2.showticklabels": False, "xaxis2.range": [0, 1.7 * longest or 1],
        },
    }  # fmt: skip


def _heading(text: str, x: str, y: str) -> dict[str, Any]:
    return {
        "text": f"<b>{text}</b>", "x": 0, "xref": f"{x} domain", "xanchor": "left",
        "y": 1, "yref": f"{y} domain", "yanchor": "bottom", "yshift": 6, "showarrow": False,
    }  # fmt: skip


# ---------------------------------------------------------------- layers


def layer_bars(layers: Sequence[Mapping[str, Any]], what: str = "layers") -> go.Figure:
    """Share of kept weights by layer, with the overall share as a dashed line.

    Up to `MANY_LAYERS` layers are rows with their names; more stand side by side in network
    order, with names on hover. Layers that lost everything are marked with a cross.

    Args:
        layers: ``name``, ``kept`` and ``total`` each, as `Outcome.layers` gives them; ``short``
            is a name for narrow screens.
        what: they are called.

    Raises:
        InputError: no layers.
    """
    go = graph_objects()
    require(bool(layers), "layers", list(layers), "at least one masked layer")
    shares = [100 * row["kept"] / max(row["total"], 1) for row in layers]
    total = sum(row["total"] for row in layers)
    overall = 100 * sum(row["kept"] for row in layers) / max(total, 1)
    hover = [
        f"<b>{_text(row['name'])}</b><br>{numbers.share(value / 100)} kept: "
        f"{numbers.plain(int(row['kept']))} of {numbers.plain(int(row['total']))}"
        for row, value in zip(layers, shares, strict=True)
    ]
    top = min(max([*shares, overall]) * 1.04 or 1.0, 104.0)
    note = f"all {what} {numbers.share(overall / 100)}"
    if len(layers) <= MANY_LAYERS:
        return _few_layers(go, layers, shares, hover, overall, top, note)
    return _many_layers(go, shares, hover, overall, top, note)


def _few_layers(
    go: Any,
    layers: Sequence[Mapping[str, Any]],
    shares: Sequence[float],
    hover: Sequence[str],
    overall: float,
    top: float,
    note: str,
) -> go.Figure:
    places = list(range(len(layers)))
    bars = go.Bar(
        x=shares, y=places, orientation="h", marker={"color": BLUE}, hovertext=hover,
        hoverinfo="text",
    )  # fmt: skip
    # an axis on the right needs a trace of its own, or it is not drawn
    right = go.Scatter(x=[None], y=[None], yaxis="y2", hoverinfo="skip")
    height = 66 + 28 * len(layers)
    figure = _figure(go, [bars, right], height, margin={"l": 20, "r": 20, "t": 28, "b": 34})
    names = [_text(_elided(str(row["name"]), 34)) for row in layers]
    short = [numbers.share(s / 100) if s else "emptied" for s in shares]
    full = [
        f"{text}, {numbers.count(row['kept'])} of {numbers.count(row['total'])}"
        for text, row in zip(short, layers, strict=True)
    ]
    side = {
        "tickmode": "array", "tickvals": places, "showgrid": False, "automargin": True,
        "range": [len(layers) - 0.4, -0.6], "zeroline": False, "fixedrange": True,
        "ticklabelstandoff": 6,
    }  # fmt: skip
    figure.update_layout(
        bargap=0.4,
        xaxis={
            **_line_axis(""),
            "range": [0, top],
            "ticksuffix": " %",
            "nticks": 6,
            "tickangle": 0,
        },
        yaxis={**side, "ticktext": names},
        yaxis2={**side, "ticktext": full, "side": "right", "overlaying": "y"},
        meta={
            "narrow": {
                "yaxis2.ticktext": short,
                "yaxis.ticktext": [
                    _text(_elided(str(row.get("short", row["name"])), 20)) for row in layers
                ],
                "xaxis.nticks": 4,
            },
            "wide": {"yaxis2.ticktext": full, "yaxis.ticktext": names, "xaxis.nticks": 6},
        },
    )
    _emptied(figure, go, [(0.0, p, h) for p, s, h in zip(places, shares, hover, strict=True)
                          if not s])  # fmt: skip
    figure.add_shape(
        type="line", x0=overall, x1=overall, y0=0, y1=1, yref="paper", layer="below",
        line={"color": GREY, "width": 1.4, "dash": "dash"},
    )  # fmt: skip
    figure.add_annotation(
        text=note, x=overall, y=1, yref="paper", yanchor="bottom", showarrow=False,
        xanchor="left" if overall < 0.6 * top else "right", font={"color": GREY, "size": 12},
    )  # fmt: skip
    return figure


def _many_layers(
    go: Any,
    shares: Sequence[float],
    hover: Sequence[str],
    overall: float,
    top: float,
    note: str,
) -> go.Figure:
    places = list(range(1, len(shares) + 1))
    bars = go.Bar(
        x=places, y=shares, marker={"color": BLUE, "line": {"width": 0}},
        hovertext=hover, hoverinfo="text",
    )  # fmt: skip
    figure = _figure(go, [bars], 320, margin={"l": 20, "r": 14, "t": 28, "b": 48})
    figure.update_layout(
        bargap=0.25,
        xaxis={**_line_axis("Layer, in the order of the network"), "showgrid": False,
               "range": [0.4, len(shares) + 0.6]},
        yaxis={**_line_axis("Weights kept"), "range": [0, 1.04 * top], "ticksuffix": " %"},
        hovermode="x",
    )  # fmt: skip
    _emptied(figure, go, [(p, 0.0, h) for p, s, h in zip(places, shares, hover, strict=True)
                          if not s])  # fmt: skip
    figure.add_shape(
        type="line", x0=0, x1=1, xref="paper", y0=overall, y1=overall,
        line={"color": GREY, "width": 1.4, "dash": "dash"},
    )  # fmt: skip
    figure.add_annotation(
        text=note, x=1, xref="paper", xanchor="right", y=1, yref="paper", yanchor="bottom",
        showarrow=False, font={"color": GREY, "size": 12},
    )  # fmt: skip
    return figure


def _emptied(figure: Any, go: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Orange crosses where nothing is left."""
    if points:
        x, y, hover = zip(*points, strict=True)
        figure.add_trace(
            go.Scatter(
                x=x, y=y, mode="markers", cliponaxis=False, hovertext=hover, hoverinfo="text",
                marker={"symbol": "x", "size": 8, "color": ORANGE},
            )
        )  # fmt: skip


# ---------------------------------------------------------------- axes


def axis_costs(axes: Sequence[Mapping[str, Any]], parameters: float, macs: float) -> go.Figure:
    """What hangs on each axis, in parameters and in MACs, coloured by role.

    An axis is shown with what one unit less saves times its units, as a share of the model. Up
    to `MANY_AXES` axes are rows with their names; more stand side by side in network order, with
    names on hover.

    Args:
        axes: ``name``, ``role``, ``size``, ``parameters`` and ``macs`` (of one unit),
            ``normalized`` and ``slices``, in network order.
        parameters, macs: of the whole model.

    Raises:
        InputError: no axes.
    """
    go = graph_objects()
    require(bool(axes), "axes", list(axes), "at least one axis")
    whole = {"parameters": max(parameters, 1), "macs": max(macs, 1)}
    shares = {
        kind: [100 * row["size"] * row[kind] / total for row in axes]
        for kind, total in whole.items()
    }
    hover = [
        _axis_hover(row, parameters=p, macs=m)
        for row, p, m in zip(axes, shares["parameters"], shares["macs"], strict=True)
    ]
    roles = [role for role in ROLES if any(row["role"] == role for row in axes)]
    rows = len(axes) <= MANY_AXES
    traces = []
    for suffix, values in zip(("", "2"), shares.values(), strict=True):
        for role in roles:
            chosen = [place for place, row in enumerate(axes) if row["role"] == role]
            lengths, places = [values[c] for c in chosen], [c if rows else c + 1 for c in chosen]
            bar: dict[str, Any] = {"x": places, "y": lengths}
            if rows:
                words = [numbers.share(value / 100) for value in lengths]
                bar = {"x": lengths, "y": places, "orientation": "h", "text": words,
                       "textposition": "outside", "cliponaxis": False}  # fmt: skip
            traces.append(
                go.Bar(
                    **bar, width=BAR, name=role, legendgroup=role, showlegend=not suffix,
                    marker={"color": ROLES[role], "line": {"width": 0}},
                    hovertext=[hover[c] for c in chosen], hoverinfo="text",
                    xaxis=f"x{suffix}", yaxis=f"y{suffix}",
                )
            )  # fmt: skip
    tops = [max(values) or 1.0 for values in shares.values()]
    lay_out = _axis_rows if rows else _axis_columns
    return lay_out(go, traces, [str(row["name"]) for row in axes], tops, roles)


def _axis_hover(row: Mapping[str, Any], parameters: float, macs: float) -> str:
    tied = [f"{_text(_elided(name, 44))}[{dim}]" for name, dim in row["slices"]]
    lines = [
        f"<b>{_text(row['name'])}</b>, {_text(row['role'])}",
        f"{numbers.plain(row['size'])} units; one less saves {numbers.count(row['parameters'])} "
        f"parameters and {numbers.count(row['macs'])} MACs",
        f"times its units: {numbers.share(parameters / 100)} of the parameters, "
        f"{numbers.share(macs / 100)} of the MACs",
    ]
    if row["normalized"]:
        lines.append("normalised over it: " + _text(", ".join(row["normalized"])))
    lines += ["tied to it, tensor[dimension]:", *(f"  {name}" for name in tied[:TIED_SHOWN])]
    if len(tied) > TIED_SHOWN:
        lines.append(f"  and {len(tied) - TIED_SHOWN} more")
    return "<br>".join(lines)


def _axis_rows(
    go: Any,
    traces: Sequence[Any],
    names: Sequence[str],
    tops: Sequence[float],
    roles: Sequence[str],
) -> go.Figure:
    """An axis a row: parameters on the left, MACs on the right, below each other if narrow."""
    room, narrow_room = (_legend_room(roles, width) for width in (900, 350))
    each = 22 * len(names)
    height, tall = each + 60 + room, 2 * each + 110 + narrow_room
    half = 0.5 - 25 / (2 * each + 50)  # the heading of the lower panel needs 50 pixels
    figure = _figure(go, traces, height, margin={"l": 20, "r": 12, "t": 34, "b": 16 + room})
    ticks = {"tickmode": "array", "tickvals": list(range(len(names)))}
    side = {
        **ticks, "range": [len(names) - 0.4, -0.6], "showgrid": False, "automargin": True,
        "zeroline": False, "ticklabelstandoff": 6, "fixedrange": True, "tickfont": {"size": 12},
    }  # fmt: skip
    hidden = {"showticklabels": False, "showgrid": False, "zeroline": False, "fixedrange": True}
    long, short = ([_text(_elided(name, length)) for name in names] for length in (40, 22))
    wide = {
        "height": height, "margin.b": 16 + room,
        "xaxis.domain": [0, 0.48], "xaxis2.domain": [0.52, 1],
        "yaxis.domain": [0, 1], "yaxis2.domain": [0, 1],
        "yaxis.ticktext": long, "yaxis2.ticktext": long, "yaxis2.showticklabels": False,
    }  # fmt: skip
    narrow = {
        "height": tall, "margin.b": 16 + narrow_room,
        "xaxis.domain": [0, 1], "xaxis2.domain": [0, 1],
        "yaxis.domain": [1 - half, 1], "yaxis2.domain": [0, half],
        "yaxis.ticktext": short, "yaxis2.ticktext": short, "yaxis2.showticklabels": True,
    }  # fmt: skip
    figure.update_layout(
        barmode="overlay", legend=_legend_below(),
        xaxis={**hidden, "domain": [0, 0.48], "range": [0, 1.25 * tops[0]]},
        xaxis2={**hidden, "domain": [0.52, 1], "anchor": "y2", "range": [0, 1.25 * tops[1]]},
        yaxis={**side, "ticktext": long},
        yaxis2={**side, "ticktext": long, "anchor": "x2", "showticklabels": False},
        annotations=[_heading("Parameters", "x", "y"), _heading("MACs", "x2", "y2")],
        meta={"wide": wide, "narrow": narrow},
    )  # fmt: skip
    return figure


def _axis_columns(
    go: Any,
    traces: Sequence[Any],
    names: Sequence[str],
    tops: Sequence[float],
    roles: Sequence[str],
) -> go.Figure:
    """Axes side by side, too many for their names: parameters above, MACs below."""
    room, narrow_room = (_legend_room(roles, width) for width in (900, 350))
    figure = _figure(go, traces, 500 + room, margin={"l": 20, "r": 14, "t": 34, "b": 56 + room})
    upper, lower = _stacked(2, gap=0.14)
    along = {**_line_axis(""), "showgrid": False, "range": [0.4, len(names) + 0.6]}
    title = _line_axis("Axis, in the order of the network")["title"]
    up = {**_line_axis(""), "ticksuffix": " %", "nticks": 6}
    figure.update_layout(
        barmode="overlay", hovermode="x", legend=_legend_below(),
        xaxis={**along, "anchor": "y", "showticklabels": False},
        xaxis2={**along, "anchor": "y2", "title": title},
        yaxis={**up, "domain": upper, "range": [0, 1.04 * tops[0]]},
        yaxis2={**up, "domain": lower, "range": [0, 1.04 * tops[1]], "anchor": "x2"},
        annotations=[_heading("Parameters", "x", "y"), _heading("MACs", "x2", "y2")],
        meta={
            "wide": {"height": 500 + room, "margin.b": 56 + room},
            "narrow": {"height": 460 + narrow_room, "margin.b": 56 + narrow_room},
        },
    )  # fmt: skip
    return figure


# ---------------------------------------------------------------- history


MANY_GROUPS = 40
"""More groups than this stand side by side without their names."""


def kept_of_groups(groups: Sequence[Mapping[str, Any]], what: str) -> go.Figure:
    """Rows of every group, and in front of them those that are kept.

    Args:
        groups: ``name``, ``rows`` and ``kept``, in the order in which they are to stand.
        what: the axis title, such as ``class``.

    Raises:
        InputError: no groups.
    """
    go = graph_objects()
    require(bool(groups), "groups", list(groups), "at least one group")
    few = len(groups) <= MANY_GROUPS
    places = list(range(len(groups)))
    hover = [
        f"<b>{_text(what)} {_text(row['name'])}</b><br>{numbers.plain(row['kept'])} of "
        f"{numbers.plain(row['rows'])} rows stay, "
        f"{numbers.share(row['kept'] / row['rows'] if row['rows'] else None)}"
        for row in groups
    ]
    traces = [
        go.Bar(
            x=places, y=[row[key] for row in groups], name=name, width=BAR if few else 1.0,
            marker={"color": color, "line": {"width": 0}}, hovertext=hover, hoverinfo="text",
        )
        for key, name, color in (("rows", "all", LIGHT), ("kept", "kept", PALETTE[0]))
    ]  # fmt: skip
    figure = _figure(go, traces, 340, {"l": 62, "r": 16, "t": 34, "b": 62})
    ticks: dict[str, Any] = {"showticklabels": False}
    if few:
        ticks = {"tickvals": places, "ticktext": [_text(_elided(r["name"], 14)) for r in groups]}
    figure.update_layout(
        barmode="overlay",
        xaxis={**_line_axis(what), "showgrid": False, **ticks},
        yaxis=_line_axis("rows"),
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        showlegend=True,
    )
    return figure


def has_rounds(history: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Whether a history tells quality and density of at least two rounds."""
    return len(_rounds(history, metric)) >= 2


def _rounds(history: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    return [r for r in history if r.get("density") and isinstance(r.get(metric), int | float)]


def rounds(
    history: Sequence[Mapping[str, Any]], metric: str, *, higher_is_better: bool = True
) -> go.Figure:
    """Quality against density, a point a round, as the lottery ticket papers draw it.

    Args:
        history: records with ``density`` and the metric; ``round`` numbers them, and a metric
            at the early-stopping step is drawn beside it.
        metric: the task's deciding metric.

    Raises:
        InputError: fewer than two such records.
    """
    go = graph_objects()
    records = _rounds(history, metric)
    require(len(records) >= 2, "history", len(records), "two or more rounds with a density")
    densities = [100 * r["density"] for r in records]
    logarithmic = max(densities) / min(densities) >= LOG_ABOVE
    series = [("at the end of training", metric, BLUE, "circle")]
    if all(isinstance(r.get(f"early_stop_{metric}"), int | float) for r in records):
        series.append(("at the early-stopping step", f"early_stop_{metric}", ORANGE, "square"))
    scale = 100 if all(numbers.is_ratio(metric, r[metric]) for r in records) else 1
    traces = []
    for name, key, colour, symbol in series:
        traces.append(
            go.Scatter(
                x=densities, y=[scale * r[key] for r in records], mode="lines+markers", name=name,
                line={"color": colour, "width": 2},
                marker={"color": colour, "size": 7, "symbol": symbol},
                hovertext=[
                    f"round {r.get('round', number)}, {numbers.share(r['density'])} kept<br>"
                    f"{_text(metric)} {numbers.quality(r[key], metric, 2)}"
                    for number, r in enumerate(records)
                ],
                hoverinfo="text", showlegend=len(series) > 1,
            )
        )  # fmt: skip
    room = 30 if len(series) > 1 else 0
    figure = _figure(go, traces, 340 + room, {"l": 20, "r": 18, "t": 20, "b": 56 + room})
    xaxis: dict[str, Any] = {**_line_axis("Weights kept, round by round"), "ticksuffix": " %"}
    low, high = min(densities), max(densities)
    if logarithmic:
        margin = 0.04 * math.log10(high / low)
        span = [math.log10(high) + margin, math.log10(low) - margin]
        xaxis |= {"type": "log", "range": span, "tickmode": "array"}
        xaxis |= _log_ticks(low, high, "density")
    else:
        margin = 0.04 * (high - low) or 1.0
        xaxis["range"] = [high + margin, low - margin]
    figure.update_layout(
        xaxis=xaxis,
        yaxis=_quality_axis(metric, scale, higher_is_better),
        legend=_legend_below(),
    )
    if records[0]["density"] == 1:
        first = {"dense_quality": records[0][metric]}
        _dense_line(figure, [first], metric, scale, "")
    return figure


def training_stages(
    events: Iterable[Mapping[str, Any]], kind: str = "train"
) -> dict[str, list[Mapping[str, Any]]]:
    """The events of one kind by the stage they belong to, in the order of the run.

    A run that was resumed tells some steps twice; the later telling counts.
    """
    stages: dict[str, dict[int, Mapping[str, Any]]] = {}
    for event in events:
        if event.get("event") == kind and isinstance(event.get("step"), int):
            name = "/".join(str(p) for p in (event.get("at"), event.get("stage")) if p)
            stages.setdefault(name, {})[event["step"]] = event
    return {name: [steps[s] for s in sorted(steps)] for name, steps in stages.items()}


def learning_curves(events: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Training loss over all steps of a run, stage after stage.

    The faint line is the loss of single batches, the strong one its running mean; dotted
    lines part the stages (trainings, rounds, recovery).

    Args:
        events: of a run, as `secateurs.workspace.read_events` reads them.

    Raises:
        InputError: no training was logged.
    """
    go = graph_objects()
    stages = training_stages(events)
    require(bool(stages), "events", len(events), "events of a training")
    points = sum(len(e) for e in stages.values())
    stride = max(1, math.ceil(points / CURVE_POINTS))
    raw: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
    smooth: dict[str, list[Any]] = {"x": [], "y": [], "text": []}
    borders, start = [], 0
    for name, steps in stages.items():
        first = steps[0]["step"]
        losses = [float(e["loss"]) for e in steps]
        means = _running_mean(losses, max(1, len(losses) // 30))
        for number, event in enumerate(steps):
            if number % stride and number + 1 < len(steps):
                continue
            x = start + event["step"] - first
            for line, value in ((raw, losses[number]), (smooth, means[number])):
                line["x"].append(x)
                line["y"].append(value if math.isfinite(value) else None)
                line["text"].append(
                    f"<b>{_text(name)}</b>, step {event['step']}<br>loss {numbers.plain(value)}"
                )
        for line in (raw, smooth):  # a gap between stages
            line["x"].append(None)
            line["y"].append(None)
            line["text"].append("")
        borders.append((name, start))
        start += steps[-1]["step"] - first + 1
    traces = [
        go.Scatter(
            x=raw["x"], y=raw["y"], mode="lines", line={"color": BLUE, "width": 1}, opacity=0.28,
            hoverinfo="skip",
        ),
        go.Scatter(
            x=smooth["x"], y=smooth["y"], mode="lines", line={"color": BLUE, "width": 2},
            hovertext=smooth["text"], hoverinfo="text",
        ),
    ]  # fmt: skip
    figure = _figure(go, traces, 320, margin={"l": 20, "r": 18, "t": 26, "b": 52})
    finite = [y for y in raw["y"] if y is not None and y > 0]
    logarithmic = bool(finite) and max(finite) / min(finite) > 30
    figure.update_layout(
        xaxis={**_line_axis("Optimizer steps"), "range": [0, start], "showgrid": False},
        yaxis={**_line_axis("Training loss"), "type": "log" if logarithmic else "linear",
               "rangemode": "normal" if logarithmic else "tozero",
               "dtick": 1 if logarithmic else None, "nticks": 6},
    )  # fmt: skip
    named = len(borders) <= 6
    for name, x in borders:
        if x:
            figure.add_shape(
                type="line", x0=x, x1=x, y0=0, y1=1, yref="paper",
                line={"color": GREY, "width": 1, "dash": "dot"},
            )  # fmt: skip
        if named and len(borders) > 1:
            figure.add_annotation(
                text=_text(_elided(_stage_label(name), 18)), x=x, xanchor="left", y=1,
                yref="paper", yanchor="bottom", showarrow=False, xshift=2,
                font={"size": 11, "color": GREY},
            )  # fmt: skip
    return figure


def _stage_label(name: str) -> str:
    """The telling part of a stage's path: ``1-prune/finetune`` is ``finetune``, ``0-train``
    is ``train``."""
    parts = [p for p in name.split("/") if p]
    if len(parts) > 1 and parts[-1] == "train":
        parts.pop()
    number, _, name = parts[-1].partition("-")
    return name if number.isdigit() and name else parts[-1]


def _running_mean(values: Sequence[float], half: int) -> list[float]:
    """The mean of each value and up to `half` neighbours on either side."""
    out = []
    for place in range(len(values)):
        window = values[max(0, place - half) : place + half + 1]
        out.append(sum(window) / len(window))
    return out


# ---------------------------------------------------------------- files


def to_png(
    figure: go.Figure, path: str | Path, *, width: int = 1000, height: int | None = None
) -> Path:
    """Write a figure as PNG on white, at twice the resolution, without any network.

    Args:
        width, height: in pixels before doubling; by default the figure's own height.

    Raises:
        InputError: kaleido or a Chrome or Chromium to draw with is not there.
    """
    go = graph_objects()
    try:
        import kaleido
        from choreographer.errors import BrowserFailedError, ChromeNotFoundError
    except ImportError:
        missing = described("kaleido is not installed")
        raise InputError("png", missing, "pip install 'secateurs[report]'") from None
    still = go.Figure(figure)
    still.update_layout(paper_bgcolor="white", plot_bgcolor="white", font={"color": "#1f2328"})
    still.layout.updatemenus = ()
    options = {
        "format": "png", "width": width, "height": height or figure.layout.height or 400,
        "scale": 2,
    }  # fmt: skip
    # without MathJax, which kaleido would fetch from the network
    page = kaleido.PageGenerator(mathjax=False)
    try:
        data = kaleido.calc_fig_sync(still, opts=options, kopts={"page_generator": page})
    except (ChromeNotFoundError, BrowserFailedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            "png",
            described(f"no browser that draws ({reason})"),
            "Chrome or Chromium on the PATH, or its path in the variable BROWSER_PATH",
        ) from None
    from secateurs.state import write_bytes

    target = Path(path)
    write_bytes(target, data)
    return target


# ---------------------------------------------------------------- shared looks


def _figure(go: Any, traces: Sequence[Any], height: int, margin: Mapping[str, int]) -> go.Figure:
    return go.Figure(
        list(traces),
        {
            "template": go.layout.Template(),
            "height": height,
            "margin": dict(margin),
            "font": {"family": FONT, "size": 13, "color": "#57606a"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "hoverlabel": {"align": "left", "font": {"family": FONT, "size": 13}},
            "dragmode": False,
            "showlegend": any(t.showlegend for t in traces),
        },
    )


def _line_axis(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 12, "font": {"size": 13}}, "gridcolor": GRID,
        "zeroline": False, "linecolor": GREY, "ticks": "", "ticklabelstandoff": 4,
        "automargin": True, "fixedrange": True,
    }  # fmt: skip


def _legend_below() -> dict[str, Any]:
    return {
        "orientation": "h", "itemwidth": 30, "traceorder": "normal",
        "x": 0, "xref": "container", "xanchor": "left",
        "y": 0, "yref": "container", "yanchor": "bottom",
    }  # fmt: skip


def _legend_room(labels: Sequence[str], width: int) -> int:
    """Pixels that a legend below the plot takes."""
    entry = 55 + 7.5 * max(len(label) for label in labels)
    return 22 * math.ceil(len(labels) / max(1, int(width // entry)))


def _stacked(panels: int, gap: float) -> list[list[float]]:
    """Vertical domains of panels below each other, the first on top."""
    each = (1 - gap * (panels - 1)) / panels
    tops = [1 - number * (each + gap) for number in range(panels)]
    return [[max(top - each, 0.0), min(top, 1.0)] for top in tops]


def _suffix(panel: int) -> str:
    return "" if panel == 0 else str(panel + 1)


def _text(value: Any) -> str:
    """A name as plotly shows it literally; otherwise it would read tags and links in it."""
    return html.escape(str(value), quote=False)


def _elided(text: str, length: int) -> str:
    """A long name with its middle left out."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[: length - 1 - half]}…{text[-half:]}"
