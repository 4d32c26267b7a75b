"""Numbers as people read them: 61.7k, 2.21 MB, 4.1 ms ± 0.2, 95.0 %, 20×.

The terminal and the HTML report use the same functions, so a number looks the same in both.
Prefixes are decimal (1 kB = 1000 bytes). What is not known is shown as an en dash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

MISSING = "–"
MINUS = "−"
_PREFIXES = ("", "k", "M", "G", "T", "P")
_RATIOS = {
    "accuracy", "acc", "agreement", "ap", "auc", "dice", "exact", "f1", "iou", "map", "miou",
    "precision", "recall", "rate", "top1", "top5",
}  # fmt: skip
_SHARES = {"density", "keep", "kept_share", "share", "sparsity"}
_COUNTS = {"bytes", "kept", "macs", "nonzero", "parameters", "total", "weights"}


def count(value: float | None) -> str:
    """A number of things to three digits: 812, 61.7k, 2.21M."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return plain(value)
    number, prefix = _scaled(value)
    return f"{number}{prefix}"


def size(value: float | None) -> str:
    """Bytes to three digits: 812 B, 246 kB, 2.21 MB."""
    if value is None:
        return MISSING
    number, prefix = _scaled(value)
    return f"{number} {prefix}B"


def _scaled(value: float) -> tuple[str, str]:
    power = 0
    scaled = float(value)
    while abs(scaled) >= 999.5 and power < len(_PREFIXES) - 1:
        scaled /= 1000
        power += 1
    if scaled == int(scaled):
        return _signed(f"{int(scaled)}"), _PREFIXES[power]
    return _signed(_three_digits(scaled)), _PREFIXES[power]


def _three_digits(value: float) -> str:
    """Three significant digits without an exponent, trailing zeros kept."""
    rounded = f"{value:.2e}"
    power = int(rounded.partition("e")[2])
    return f"{float(rounded):.{max(2 - power, 0)}f}" if value else "0"


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent with a fixed number of decimals: 97.8 %."""
    if value is None:
        return MISSING
    return _signed(f"{100 * value:.{digits}f} %")


def share(value: float | None) -> str:
    """A part of a whole: 5.0 %, and more decimals close to nothing or to all of it."""
    if value is None:
        return MISSING
    if value in (0, 1):
        return f"{100 * value:.0f} %"
    rest = min(abs(value), abs(1 - value))
    return percent(value, 1 if rest >= 0.00995 else 2 if rest >= 0.00095 else 3)


def factor(value: float | None) -> str:
    """How many times: 1.02×, 20×, 133×."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.3g}×" if value < 999.5 else f"{count(value)}×"


def milliseconds(value: float | None) -> str:
    """A time to three digits: 0.213 ms, 4.10 ms, 123 ms."""
    return MISSING if value is None else f"{_three_digits(value)} ms"


def latency(value: Mapping[str, Any] | None) -> str:
    """A measured latency: the median, plus or minus half of the 10–90 % range."""
    if value is None:
        return MISSING
    half = (value["high"] - value["low"]) / 2
    if half <= 0:
        return milliseconds(value["median"])
    # one digit of the spread; where that is wider than the median, one of the median
    finest = min(half, value["median"]) or half
    decimals = max(-int(f"{finest:.0e}".partition("e")[2]), 0)
    return f"{value['median']:.{decimals}f} ms ± {half:.{decimals}f}"


def is_ratio(metric: str, value: float) -> bool:
    """Whether a metric is a share of samples and so is shown in percent."""
    words = re.split(r"[^a-z0-9]+", metric.lower())
    return bool(_RATIOS.intersection(words)) and 0 <= value <= 1


def quality(value: float | None, metric: str, digits: int = 1) -> str:
    """A metric's value: 97.8 % of an accuracy, 12.31 of a perplexity."""
    if value is None:
        return MISSING
    return percent(value, digits) if is_ratio(metric, value) else plain(value)


def quality_interval(value: float | None, half: float | None, metric: str, digits: int = 1) -> str:
    """A metric's mean and the half width of its interval: 97.1 % ± 0.4."""
    shown = quality(value, metric, digits)
    if value is None or half is None or not math.isfinite(value):
        return shown
    if is_ratio(metric, value):
        return f"{shown} ± {100 * half:.{digits}f}"
    return f"{shown} ± {half:.2g}"


def difference(after: float, before: float, metric: str, digits: int = 1) -> str:
    """A change of a metric, in points where it is shown in percent: −0.6 points."""
    change = after - before
    if is_ratio(metric, after) and is_ratio(metric, before):
        text = f"{100 * change:+.{digits}f}"
        return "no change" if float(text) == 0 else _signed(text) + " points"
    return "no change" if change == 0 else _signed(f"{change:+.3g}")


def duration(seconds: float | None) -> str:
    """A time people wait: 0.4 s, 41 s, 3 min 20 s, 1 h 5 min."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def plain(value: Any) -> str:
    """Any other value: four digits of a float, yes and no, lists with commas."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return _signed(f"{value:,}".replace(",", " "))  # a thin no-break space
    if isinstance(value, float):
        if math.isnan(value):
            return "not a number"
        if math.isinf(value):
            return "∞" if value > 0 else f"{MINUS}∞"
        if value and not 1e-4 <= abs(value) < 1e6:
            return _signed(f"{value:.3e}")
        return _signed(f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={plain(item)}" for key, item in value.items()) or MISSING
    if isinstance(value, list | tuple | set):
        return ", ".join(plain(item) for item in value) or MISSING
    return str(value)


def named(key: str, value: Any) -> str:
    """A value of a table, formatted by the name of its column."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return plain(value)
    if not math.isfinite(value):
        return plain(value)
    if key in _SHARES:
        return share(value)
    if is_ratio(key, value) and isinstance(value, float):
        return percent(value)
    if key in _COUNTS:
        return size(value) if key == "bytes" else count(value)
    return plain(value)
