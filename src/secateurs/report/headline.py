"""What was won and lost, in one or two plain sentences, and what makes it really faster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateurs.report import numbers
from secateurs.report.leaderboard import dense_quality

CLOSE = 0.1
"""Two latencies that differ by less than this share count as equal."""
ENGINES = "latency by engine"
"""The table of an outcome that was timed in several engines (`secateurs.deploy.timing`)."""
SAMPLES = "the kept part"
"""The table of an outcome that was trained on a part of the samples: ``kept`` and ``of``."""


@dataclass(frozen=True)
class Facts:
    """What the sentences need to know of an outcome.

    Attributes:
        name: of the method, or the label of its variant.
        metric, quality, dense_quality: of the task; None where it was not measured.
        higher_is_better: the direction of the metric.
        kept: share of the dense model's parameters that is left and not zero; without costs,
            the share of the masked weights that is kept; None if neither is known.
        masked: some weights are zeros by a mask.
        smaller: the tensors themselves are smaller than the dense model's.
        unit: ``parameters``, or ``weights`` where only the masks are known.
    pattern: ``N:M`` where the budget asked for one, else empty.
        files: dense bytes over sparse bytes.
        speed: dense latency over latency; None where either was not measured.
        same_speed: the two latencies cannot be told apart.
        samples: share of the samples that it was trained on; None where nobody pruned them.
    """

    name: str
    metric: str
    quality: float | None
    dense_quality: float | None
    higher_is_better: bool
    kept: float | None
    masked: bool
    smaller: bool
    unit: str
    pattern: str
    files: float | None
    speed: float | None
    same_speed: bool
    samples: float | None = None


def facts(outcome: Mapping[str, Any]) -> Facts:
    """The facts of an outcome (`Outcome.as_dict`)."""
    before, after, metric = outcome["before"], outcome["after"], outcome["primary"]
    layers = outcome["layers"]
    total = sum(layer["total"] for layer in layers)
    left = sum(layer["kept"] for layer in layers)
    kept = left / total if total else None
    masked, smaller, files, unit = left < total, False, None, "weights"
    if before is not None and after is not None:
        kept = after["nonzero"] / before["parameters"]
        masked = after["nonzero"] < after["parameters"]
        unit = "parameters"
        smaller = after["parameters"] < before["parameters"]
        files = before["dense_bytes"] / max(after["sparse_bytes"], 1)
    speed, same = _speed(before, after)
    promise = outcome["promise"]
    part = outcome["tables"].get(SAMPLES)
    return Facts(
        name=str(outcome.get("label") or outcome["method"] or "the model"),
        metric=metric,
        quality=outcome["metrics_after"].get(metric),
        dense_quality=outcome["metrics_before"].get(metric),
        higher_is_better=outcome["higher_is_better"],
        kept=kept,
        masked=masked,
        smaller=smaller,
        unit=unit,
        pattern=outcome["budget"] if promise and promise["kind"] == "n:m" else "",
        files=files,
        speed=speed,
        same_speed=same,
        samples=part[0]["kept"] / part[0]["of"] if part else None,
    )


def _speed(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> tuple[float | None, bool]:
    """Dense latency over latency, and whether the two cannot be told apart."""
    dense = before["latency"] if before is not None else None
    now = after["latency"] if after is not None else None
    if dense is None or now is None or now["median"] <= 0:
        return None, False
    ratio = dense["median"] / now["median"]
    overlap = dense["low"] <= now["high"] and now["low"] <= dense["high"]
    return ratio, overlap or abs(math.log(ratio)) < math.log(1 + CLOSE)


def headline(outcome: Mapping[str, Any]) -> list[str]:
    """Sentences on an outcome: quality for weights, and speed, also in other engines."""
    known = facts(outcome)
    first = f"{known.name} {_quality_clause(known)}{_weights_clause(known)}."
    others = [
        f" In {row['engine']}{noted(row)} it runs {_pace(1 / row['ratio'])}."
        for row in outcome["tables"].get(ENGINES, [])
        if row["engine"] != "eager" and row["ratio"]
    ]
    return [first, speed_sentence(known) + "".join(others)]


def noted(row: Mapping[str, Any]) -> str:
    """What an engine's row has to say beside its times, in brackets."""
    return f" ({row['note']})" if row.get("note") else ""


def _quality_clause(known: Facts) -> str:
    if known.quality is None:
        return "was not scored" if known.kept is None else "keeps"
    shown = f"{numbers.quality(known.quality, known.metric)} {known.metric}"
    if not numbers.is_ratio(known.metric, known.quality):
        shown = f"{known.metric} {numbers.plain(known.quality)}"
    if known.dense_quality is None:
        return f"reaches {shown}"
    before = "dense" if known.samples is None else "all samples"
    dense = f"({before} {numbers.quality(known.dense_quality, known.metric)})"
    return f"{_verb(known.quality, known.dense_quality, known.higher_is_better)} {shown} {dense}"


def _verb(quality: float, dense: float, higher_is_better: bool) -> str:
    """Keeps, reaches or falls to: by the relative change of the metric."""
    if not (math.isfinite(quality) and math.isfinite(dense)):
        return "ends at"
    gain = (quality - dense) if higher_is_better else (dense - quality)
    if gain > 0:
        return "reaches"
    if -gain <= 0.05 * abs(dense):
        return "keeps" if higher_is_better else "stays at"
    return "falls to" if higher_is_better else "rises to"


def _weights_clause(known: Facts) -> str:
    if known.samples is not None:
        return f", trained on {numbers.share(known.samples)} of the samples"
    if known.kept is None:
        return ""
    if known.kept >= 1:
        return " with all of the parameters"
    many = f": {numbers.factor(1 / known.kept)} fewer" if known.kept else ": none are left"
    many = many.replace("× fewer", " times fewer")
    lead = " " if known.quality is None else " with "
    return f"{lead}{numbers.share(known.kept)} of the {known.unit}{many}"


def speed_sentence(known: Facts) -> str:
    """How fast the model really is, and why."""
    if known.speed is None:
        if known.masked:
            return (
                "No latency was measured; zeros in dense tensors are still multiplied, so dense "
                "kernels give no speed-up."
            )
        return "No latency was measured."
    ratio = f"({numbers.factor(known.speed)})"
    if known.smaller:
        if known.same_speed:
            return (
                f"On this machine it runs as fast as the dense one {ratio}: its tensors are "
                "smaller, but at this size other costs decide."
            )
        return f"Its tensors are smaller, and on this machine it runs {_pace(known.speed)}."
    if not known.masked:
        return f"On this machine it runs {_pace(known.speed)}."
    if known.same_speed:
        return (
            f"On this machine the masked model runs as fast as the dense one {ratio}, because "
            "zeros in dense tensors are still multiplied."
        )
    return (
        f"On this machine the masked model runs {_pace(known.speed)}; its zeros are still "
        "multiplied, so time it again before relying on that."
    )


def _pace(speed: float) -> str:
    if speed >= 1:
        return f"{numbers.factor(speed).replace('×', ' times')} as fast as the dense one"
    return f"{numbers.factor(1 / speed).replace('×', ' times')} slower than the dense one"


def realisation(known: Facts) -> str:
    """Where a real speed-up of this kind of outcome comes from."""
    if known.smaller and not known.masked:
        return (
            "Its tensors are really smaller, so ordinary dense kernels have less to do. Where a "
            "model is small or its sizes are odd, they may take as long all the same."
        )
    if known.pattern:
        return (
            f"Zeros are only zeros: the {known.pattern} pattern runs faster only on hardware "
            "with kernels for it, after conversion to the compressed form; in a dense tensor "
            "the zeros are still multiplied."
        )
    if known.masked:
        size = ""
        if known.files is not None and known.files > 1.05:
            size = f" ({numbers.factor(known.files)} here)"
        return (
            f"Zeros are only zeros: masks give smaller files{size}, but dense kernels still "
            "multiply every zero. A real speed-up needs sparse kernels, an N:M pattern the "
            "hardware knows, or the removal of whole channels, heads or layers."
        )
    if known.samples is not None:
        return "The model keeps its size; what is shorter is every further training."
    return "Nothing was removed, so nothing is faster."


def benchmark_headline(board: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on a leaderboard: who wins where, and against what."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in board:
        groups.setdefault((row["task"], row["budget"]), []).append(row)
    if not groups:
        return ["No run has finished."]
    if len(groups) == 1:
        return _one_contest(next(iter(groups.values())))
    wins: dict[str, int] = {}
    alone: dict[str, int] = {}
    for rows in groups.values():
        for row in rows:
            if row["rank"] == 1 or row["tied"]:
                wins[row["label"]] = wins.get(row["label"], 0) + 1
            if row["rank"] == 1:
                alone[row["label"]] = alone.get(row["label"], 0) + 1
    ranked = sorted(wins, key=lambda name: (-wins[name], -alone.get(name, 0), name))
    tasks = len({task for task, _ in groups})
    where = f"{len(groups)} settings ({_plural(tasks, 'task')}, " + (
        f"{_plural(len({budget for _, budget in groups}), 'budget')})"
    )
    first = (
        f"{ranked[0]} is the best, or cannot be told from the best, in {wins[ranked[0]]} of {where}"
    )
    others = [f"{name} in {wins[name]}" for name in ranked[1:4]]
    first += ("; " + _listed(others) if others else "") + "."
    hardest = max(groups.values(), key=lambda rows: max(row["sparsity"] for row in rows))
    return [first, *_one_contest(hardest, hardest[0]["task"] if tasks > 1 else "")[:1]]


def benchmark_speed(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on how fast masked models were beside the dense one, if they were timed."""
    known = [facts(outcome) for outcome in outcomes]
    timed = [f for f in known if f.masked and not f.smaller and f.speed is not None]
    if not timed:
        return []
    ratios = sorted(f.speed for f in timed if f.speed is not None)
    span = numbers.factor(ratios[0])
    if numbers.factor(ratios[-1]) != span:
        span += f" to {numbers.factor(ratios[-1])}"
    if sum(f.same_speed for f in timed) > len(timed) / 2:
        return [
            f"The masked models run as fast as the dense one ({span}), because zeros in dense "
            "tensors are still multiplied."
        ]
    return [
        f"The masked models run at {span} the dense one's speed; their zeros are still "
        "multiplied, so time them again before relying on that."
    ]


def _one_contest(rows: Sequence[Mapping[str, Any]], task: str = "") -> list[str]:
    best, metric = rows[0], rows[0]["metric"]
    half = None if best["high"] is None else best["high"] - best["mean"]
    shown = numbers.quality_interval(best["mean"], half, metric)
    ratio = numbers.is_ratio(metric, best["mean"])
    score = f"{shown} {metric}" if ratio else f"{metric} {shown}"
    dense = ""
    if (known := dense_quality(rows)) is not None:
        dense = f" (dense {numbers.quality(known, metric)})"
    seeds = f" over {_plural(best['seeds'], 'seed')}" if best["seeds"] > 1 else ", one seed"
    at = f"For {task} at {best['budget']}" if task else f"At {best['budget']}"
    first = f"{at}, {best['label']} comes first: {score}{dense}{seeds}"
    rivals = [row["label"] for row in rows[1:] if row["tied"]]
    if rivals:
        first += f"; {_listed(rivals)} cannot be told from it"
    elif any(row["tied"] is None for row in rows[1:]):
        first += "; with single seeds the order may be chance"
    sentences = [first + "."]
    if len(rows) > 1:
        last = rows[-1]
        worst = numbers.quality(last["mean"], metric)
        sentences[0] += f" {last['label']} comes last with {worst}."
    return sentences


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(items) < 2:
        return "".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]
