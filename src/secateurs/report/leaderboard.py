"""The leaderboard of a benchmark: means over seeds, intervals, ranks.

For n seeds with mean x̄ and standard deviation s (n − 1 in the denominator) the 95 % interval is
x̄ ± t(0.975, n − 1) · s / √n. A method is not distinguishable from the best of its group when
Welch's 95 % interval of the difference of the two means contains 0, that is when
|x̄₁ − x̄₂| ≤ t(0.975, ν) · √(s₁²/n₁ + s₂²/n₂) with the degrees of freedom ν of Welch and
Satterthwaite. Nothing is corrected for the number of comparisons, and runs of equal seeds are
treated as independent, which widens the interval at most.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateurs.errors import InputError, require

CONFIDENCE = 0.95
GROUP = ("task", "budget")
KEYS = (
    "method", "label", "task", "budget", "seed", "quality", "metric", "higher_is_better",
    "sparsity", "parameters", "nonzero", "macs", "effective_macs", "bytes", "latency_ms",
    "seconds",
)  # fmt: skip
"""What a row of the benchmark must have. It may also have `OPTIONAL`."""

COSTS = (
    "sparsity", "parameters", "nonzero", "macs", "effective_macs", "bytes", "latency_ms", "seconds",
)  # fmt: skip
OPTIONAL = ("dense_quality", "dense_macs", "dense_latency_ms")
"""The dense model beside it, for reference lines."""


def leaderboard(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean, spread and rank of every method, best first within each task and budget.

    Args:
        rows: one a finished cell, with `KEYS`; ``latency_ms`` may be None.

    Returns:
        A row for each (task, budget, label), in the order in which tasks and budgets come:
        ``task, budget, label, method, metric, higher_is_better, rank, seeds``; ``mean``,
        ``std`` and the 95 % interval ``low, high`` (None for one seed); ``tied`` (True: not
        distinguishable from the best, None: one of the two has a single seed);
        ``promise_kept`` (None: not known); and the means of the costs.

    Raises:
        InputError: a row lacks a key, or one task is judged by two metrics.
    """
    for number, row in enumerate(rows):
        for key in KEYS:
            if key not in row:
                raise InputError(f"rows[{number}]", sorted(row), f"a row with {key!r}")
    board: list[dict[str, Any]] = []
    for group in _grouped(rows, GROUP):
        metrics = sorted({str(row["metric"]) for row in group})
        require(len(metrics) == 1, f"metric of {group[0]['task']}", metrics, "one metric a task")
        entries = [_entry(runs) for runs in _grouped(group, ("label",))]
        entries.sort(key=_best_first)
        for entry in entries:
            entry["rank"] = 1 + sum(_best_first(e)[0] < _best_first(entry)[0] for e in entries)
            entry["tied"] = tied(entries[0], entry)
        board += entries
    return board


def tied(best: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    """Whether Welch's interval of the difference contains 0; None with a single seed.

    Args:
        best, other: entries with ``label``, ``mean``, ``std`` and ``seeds``.
    """
    if best["label"] == other["label"]:
        return True
    if min(best["seeds"], other["seeds"]) < 2:
        return None
    first, second = (e["std"] ** 2 / e["seeds"] for e in (best, other))
    gap, error = abs(best["mean"] - other["mean"]), math.sqrt(first + second)
    if error == 0 or not math.isfinite(gap):
        return gap == 0
    freedom = (first + second) ** 2 / (
        first**2 / (best["seeds"] - 1) + second**2 / (other["seeds"] - 1)
    )
    return bool(gap <= t_quantile(freedom) * error)


def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t distribution."""
    # scipy comes with scikit-learn
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + confidence / 2))


def dense_quality(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The mean quality of the dense model over the rows of a task that know it."""
    return _mean(row["dense_quality"] for row in rows)


def row_of(outcome: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any] | None:
    """The benchmark's row of an outcome (`Outcome.as_dict`); None where nothing was measured."""
    before, after, metric = outcome["before"], outcome["after"], outcome["primary"]
    if before is None or after is None or metric not in outcome["metrics_after"]:
        return None
    source = outcome.get("source") or {}
    names = [str(source[key]) for key in ("model", "data") if source.get(key)]
    promise = outcome.get("promise")
    return {
        "label": outcome.get("label") or outcome["method"] or "dense",
        "method": outcome["method"],
        "task": " on ".join(names),
        "budget": outcome["budget"],
        "seed": outcome["seed"],
        "metric": metric,
        "higher_is_better": outcome["higher_is_better"],
        "quality": outcome["metrics_after"][metric],
        "sparsity": 1 - after["nonzero"] / before["parameters"],
        "parameters": after["parameters"],
        "nonzero": after["nonzero"],
        "macs": after["macs"],
        "effective_macs": after["effective_macs"],
        "bytes": after["sparse_bytes"],
        "latency_ms": after["latency"]["median"] if after["latency"] else None,
        "seconds": seconds,
        "dense_quality": outcome["metrics_before"].get(metric),
        "dense_macs": before["macs"],
        "dense_latency_ms": before["latency"]["median"] if before["latency"] else None,
        "promise_kept": None if promise is None else promise_kept(promise),
    }


def promise_kept(promise: Mapping[str, Any]) -> bool:
    """Whether a budget was reached, from the plain values of a `Promise`."""
    from secateurs.outcome import Promise

    return Promise(**promise).kept


def _grouped(
    rows: Iterable[Mapping[str, Any]], keys: Sequence[str]
) -> list[list[Mapping[str, Any]]]:
    """Rows with equal keys together, in the order of their first appearance."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def _entry(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    values = [float(run["quality"]) for run in runs]
    mean = statistics.mean(values)  # exact: equal values have no rounding error between them
    several = len(values) > 1
    std = statistics.stdev(values) if several and math.isfinite(mean) else 0.0
    half = t_quantile(len(values) - 1) * std / math.sqrt(len(values)) if several else None
    kept = [run.get("promise_kept") for run in runs]
    return {
        **{key: first[key] for key in ("task", "budget", "label", "method", "metric")},
        "higher_is_better": bool(first["higher_is_better"]),
        "seeds": len(values),
        "mean": mean,
        "std": std if several else None,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "promise_kept": None if None in kept else all(kept),
        **{key: _mean(run[key] for run in runs) for key in COSTS},
        **{key: _mean(run.get(key) for run in runs) for key in OPTIONAL},
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _best_first(entry: Mapping[str, Any]) -> tuple[float, str]:
    mean = entry["mean"] if math.isfinite(entry["mean"]) else math.inf
    better = -mean if entry["higher_is_better"] and math.isfinite(mean) else mean
    return better, entry["label"]
