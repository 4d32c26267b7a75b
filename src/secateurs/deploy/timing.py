"""Latency on this machine in several engines, and pruned against dense in one run.

Two measurements minutes apart differ by more than pruning saves: clocks, caches and neighbours
change. So the two models are timed in turn, one pass each, and what is reported is the median of
the ratios of neighbours, with their spread.

============== ==================================================================================
``eager``      PyTorch as it is
``compile``    `torch.compile` with fixed shapes (TorchInductor); the warm-up compiles
``onnxruntime``  ONNX Runtime on the CPU, from a file that `export_onnx` writes and checks
``2:4``        the pruned model in sparse kernels (`secateurs.deploy.packing`), the dense one eager
``block``      the same, its blocks of zeros left out
============== ==================================================================================
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.deploy.onnx_export import export_onnx
from secateurs.deploy.onnx_session import OnnxSession, first_line
from secateurs.deploy.packing import PACKED, packed
from secateurs.devices import device_of
from secateurs.errors import InputError, require, unknown
from secateurs.parts.costs import (
    Latency,
    forward_call,
    latency_of,
    time_calls,
    timing_conditions,
)

Call = Callable[[], Any]

TABLE = "latency by engine"
"""Title of `latency_rows` among the tables of an outcome."""


@dataclass(frozen=True)
class EngineLatency:
    """Latency of one forward pass in one engine.

    Attributes:
        engine: its name.
        latency: in milliseconds; None where it could not be measured.
        failure: why not.
        note: what was timed, where that is not plain.
    """

    engine: str
    latency: Latency | None
    failure: str = ""
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """A pruned model against its dense one in one engine, timed in turn.

    Attributes:
        engine: its name.
        dense, pruned: latencies in milliseconds; None where they could not be measured.
        ratio: median over the rounds of pruned / dense: below 1 is faster.
        low, high: 10th and 90th percentile of these ratios.
        failure: why there are none.
        note: what was timed, where that is not plain: how many layers run in sparse kernels, and
            which stay dense.
    """

    engine: str
    dense: Latency | None = None
    pruned: Latency | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    failure: str = ""
    note: str = ""


def measure_engines(
    model: nn.Module,
    example_inputs: Any,
    *,
    engines: Sequence[str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    threads: int | None = None,
    warmup: int = 5,
    repeats: int = 30,
) -> dict[str, EngineLatency]:
    """Time forward passes of a model in every engine.

    Args:
        model: timed in eval mode; it is left as it was.
        example_inputs: a tensor, a sequence of arguments or a dictionary of keyword arguments.
        engines: names of `ENGINES` or `PACKED`; all of `ENGINES` where None.
        masks: True = keep, of a pruned model, for `PACKED`; by default what is not zero is kept.
        threads: of the CPU; as many as torch has where None.
        warmup, repeats: passes before and while the clock runs.

    Returns:
        By engine, in the order asked for. One that is not installed, or fails, is in it with
        the reason.

    Raises:
        InputError: an unknown engine, a number out of range.
    """
    results = {}
    for engine in check_engines(engines):
        times, failure, note = _times(
            engine, [model], example_inputs, masks, threads, warmup, repeats
        )
        latency = latency_of(times[0]) if times else None
        results[engine] = EngineLatency(engine, latency, failure, note)
    return results


def compare_latency(
    dense: nn.Module,
    pruned: nn.Module,
    example_inputs: Any,
    *,
    engines: Sequence[str] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    threads: int | None = None,
    warmup: int = 5,
    repeats: int = 30,
) -> dict[str, Comparison]:
    """Time a dense and a pruned model in turn, in every engine.

    Args:
        dense, pruned: both are called on the same inputs.
        example_inputs, engines, threads, warmup, repeats: as for `measure_engines`.
        masks: of the pruned model.

    Returns:
        By engine, in the order asked for. One that is not installed, or fails for either model,
        is in it with the reason.

    Raises:
        InputError: an unknown engine, a number out of range.
    """
    results = {}
    for engine in check_engines(engines):
        times, failure, note = _times(
            engine, [dense, pruned], example_inputs, masks, threads, warmup, repeats
        )
        results[engine] = (
            _comparison(engine, *times, note=note) if times else Comparison(engine, failure=failure)
        )
    return results


def latency_rows(
    comparisons: Mapping[str, Comparison], promised: float | None = None
) -> list[dict[str, Any]]:
    """Comparisons as rows of plain values, for `Outcome.tables` and JSON.

    Args:
        promised: MACs of the pruned over those of the dense model, to stand beside the ratios.
    """
    return [
        {
            "engine": found.engine,
            "promised": promised,
            "dense": asdict(found.dense) if found.dense else None,
            "pruned": asdict(found.pruned) if found.pruned else None,
            "ratio": found.ratio,
            "low": found.low,
            "high": found.high,
            "failure": found.failure,
            "note": found.note,
        }
        for found in comparisons.values()
    ]


def _comparison(
    engine: str, dense: Sequence[float], pruned: Sequence[float], *, note: str
) -> Comparison:
    ratios = sorted(b / a for a, b in zip(dense, pruned, strict=True))
    tenth = len(ratios) // 10
    return Comparison(
        engine,
        latency_of(dense),
        latency_of(pruned),
        statistics.median(ratios),
        ratios[tenth],
        ratios[-1 - tenth],
        note=note,
    )


def check_engines(engines: Sequence[str] | None) -> list[str]:
    """The engines asked for, all of `ENGINES` where None.

    Raises:
        InputError: none, or an unknown one; the closest one is suggested.
    """
    chosen = list(ENGINES if engines is None else engines)
    known = (*ENGINES, *PACKED)
    require(bool(chosen), "engines", engines, f"some of {', '.join(known)}")
    for engine in chosen:
        if engine not in known:
            raise unknown("engines", engine, known)
    return chosen


def _times(
    engine: str,
    models: Sequence[nn.Module],
    inputs: Any,
    masks: Mapping[str, Tensor] | None,
    threads: int | None,
    warmup: int,
    repeats: int,
) -> tuple[list[list[float]], str, str]:
    """Milliseconds by model, the reason why there are none, and a note on what was timed."""
    require(repeats >= 1, "repeats", repeats, "at least 1")
    require(warmup >= 0, "warmup", warmup, "0 or more")
    note = ""
    with ExitStack() as stack:
        stack.enter_context(timing_conditions(*models, threads=threads))
        try:
            if engine in PACKED:
                with torch.inference_mode(False):
                    pruned, note = packed(models[-1], engine, inputs, masks)
                models = [*models[:-1], pruned.eval()]
            run = ENGINES.get(engine, _eager)
            calls = [stack.enter_context(run(model, inputs)) for model in models]
            return time_calls(calls, warmup=warmup, repeats=repeats), "", note
        except Exception as error:
            return [], str(error) if isinstance(error, InputError) else first_line(error), ""


@contextmanager
def _eager(model: nn.Module, inputs: Any) -> Iterator[Call]:
    yield forward_call(model, inputs)


@contextmanager
def _compiled(model: nn.Module, inputs: Any) -> Iterator[Call]:
    # models of one class share their forward's cache: past its limit, torch runs them eagerly
    limits = {
        "recompile_limit": 1024,
        "accumulated_recompile_limit": 8192,
        "fail_on_recompile_limit_hit": True,
    }
    with torch._dynamo.config.patch(limits):
        compiled: Any = torch.compile(model, dynamic=False)
        yield forward_call(compiled, inputs)


@contextmanager
def _in_onnx_runtime(model: nn.Module, inputs: Any) -> Iterator[Call]:
    device = device_of(model).type
    require(device == "cpu", "model", f"on {device}", "a model on the CPU, for ONNX Runtime")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        # the exporter takes no tensors that were made in inference mode
        with torch.inference_mode(False):
            export_onnx(model, inputs, path, dynamic_batch=False)
        session = OnnxSession(path, torch.get_num_threads())
        feed = session.feed(inputs)
        yield lambda: session.run(feed)


ENGINES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "eager": _eager,
    "compile": _compiled,
    "onnxruntime": _in_onnx_runtime,
}
"""By name: (model, inputs) -> a context that gives the call to be timed."""
