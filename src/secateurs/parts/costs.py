"""Costs: parameters, multiply-accumulates, bytes of sparse forms, measured latency.

MACs are those of convolutions, matrix products and attention, as
`torch.utils.flop_counter` counts them (two FLOPs a MAC); biases, norms and activations are
not counted. MACs after masking count a weight that is zero by mask as free: a promise that
only a sparse kernel or a real removal keeps, which is why the latency is measured beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateurs.devices import device_of, to_device
from secateurs.errors import require
from secateurs.parts.experts import are_experts, one_by_one


@dataclass(frozen=True)
class Latency:
    """Wall time of one forward pass on this machine, in milliseconds.

    Attributes:
        median, low, high: median, 10th and 90th percentile.
        repeats: timed passes, after the warm-up.
    """

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: all parameters, tied ones once.
        nonzero: parameters not removed by a mask.
        macs: multiply-accumulates of one forward pass over `batch` samples.
        effective_macs: the same without those on masked weights.
        dense_bytes: parameters and buffers as they are stored densely.
        sparse_bytes: the same with a bit mask a masked tensor and only the kept values.
        batch: samples in the inputs that were counted.
        latency: measured, if it was asked for.
    """

    parameters: int
    nonzero: int
    macs: int
    effective_macs: int
    dense_bytes: int
    sparse_bytes: int
    batch: int = 1
    latency: Latency | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Cost:
        """The inverse of `as_dict`."""
        latency = values.get("latency")
        return Cost(**{**values, "latency": Latency(**latency) if latency else None})


def measure_cost(
    model: nn.Module,
    example_inputs: Any,
    masks: Mapping[str, Tensor] | None = None,
    *,
    with_latency: bool = False,
) -> Cost:
    """Count and, where asked, time a model on `example_inputs`.

    Args:
        masks: True = keep, by parameter name; removed weights do not count as effective.
    """
    masks = masks or {}
    removed = sum(int((~mask).sum()) for mask in masks.values())
    per_layer = count_macs(model, example_inputs)
    kept = _kept_by_layer(model, masks)
    saved = sum(per_layer.get(layer, 0) * (1 - share) for layer, share in kept.items())
    parameters = sum(p.numel() for p in model.parameters())
    macs = sum(per_layer.values())
    dense = dense_bytes(model)
    return Cost(
        parameters=parameters,
        nonzero=parameters - removed,
        macs=macs,
        effective_macs=round(macs - saved),
        dense_bytes=dense,
        sparse_bytes=dense + _bytes_saved(model, masks),
        batch=_batch(example_inputs),
        latency=measure_latency(model, example_inputs) if with_latency else None,
    )


def _kept_by_layer(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of its weights that each masked layer keeps.

    A token passes through all arrays of its experts, so their MACs are as their sizes.
    """
    kept = {
        name.rpartition(".")[0]: float(mask.double().mean())
        for name, mask in masks.items()
        if name.rpartition(".")[2] == "weight"
    }
    for layer, module in model.named_modules():
        arrays = {
            name: parameter.numel()
            for name, parameter in module.named_parameters(layer, recurse=False)
            if are_experts(module, name, parameter)
        }
        if gone := sum(int((~masks[name]).sum()) for name in arrays if name in masks):
            kept[layer] = 1 - gone / sum(arrays.values())
    return kept


def count_macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs by the innermost module that executed them ('' for the model itself)."""
    # imported here because it brings Triton along, a tenth of a second
    from torch.utils.flop_counter import FlopCounterMode

    with evaluating(model), attention_in_the_open(), one_by_one(model), _untrained(model):
        counter = FlopCounterMode(display=False)
        with counter:
            forward(model, to_device(example_inputs, device_of(model)))
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    named = {"": flops.get("Global", 0)}
    for name, count in flops.items():
        if name.startswith(root + "."):
            named[name[len(root) + 1 :]] = count
    own = dict(named)
    for name, count in named.items():
        if name:
            parent = name.rpartition(".")[0]
            while parent not in own:
                parent = parent.rpartition(".")[0]
            own[parent] -= count
    return {name: count // 2 for name, count in own.items() if count > 0}


@contextmanager
def _untrained(model: nn.Module) -> Iterator[None]:
    """No gradients, and no parameter that asks for one.

    The counter watches gradients of what a module is given. A view of a parameter (learned
    queries) asks for them and has no function that they would come from.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def dense_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def bitmask_bytes(elements: int, nonzero: int, width: int = 4) -> int:
    """Bytes of a sparse tensor stored as kept values and one bit a position."""
    return width * nonzero + -(-elements // 8)


def csr_bytes(nonzero: int, index_bits: int, width: int = 4) -> int:
    """Bytes with a relative index of `index_bits` a kept value (no padding zeros counted)."""
    return width * nonzero + -(-nonzero * index_bits // 8)


def _bytes_saved(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    params = dict(model.named_parameters(remove_duplicate=False))
    change = 0
    for name, mask in masks.items():
        width = params[name].element_size()
        sparse = bitmask_bytes(mask.numel(), int(mask.sum()), width)
        # a tensor that a bit mask would make larger is stored densely
        change += min(0, sparse - width * mask.numel())
    return change


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    warmup: int = 5,
    repeats: int = 30,
    threads: int | None = None,
) -> Latency:
    """Time forward passes in eval mode: median and spread, after a warm-up.

    Args:
        threads: of the CPU while it is measured; as many as torch has where None.
    """
    [latency] = measure_latencies(
        [model], example_inputs, warmup=warmup, repeats=repeats, threads=threads
    )
    return latency


def measure_latencies(
    models: Sequence[nn.Module],
    example_inputs: Any,
    *,
    warmup: int = 5,
    repeats: int = 30,
    threads: int | None = None,
) -> list[Latency]:
    """`measure_latency` of several models that take turns, so that drift hits all alike."""
    with timing_conditions(*models, threads=threads):
        calls = [forward_call(model, example_inputs) for model in models]
        times = time_calls(calls, warmup=warmup, repeats=repeats)
    return [latency_of(own) for own in times]


def latency_of(milliseconds: Sequence[float]) -> Latency:
    """Median, 10th and 90th percentile of measured times."""
    times = sorted(milliseconds)
    tenth = len(times) // 10
    return Latency(statistics.median(times), times[tenth], times[-1 - tenth], len(times))


def time_calls(
    calls: Sequence[Callable[[], Any]], *, warmup: int = 5, repeats: int = 30
) -> list[list[float]]:
    """Milliseconds of each of several calls, measured in turn so that drift hits all alike.

    The order is reversed in every other round.

    Args:
        calls: functions that return when their work is done.
        warmup: rounds that are not counted.
        repeats: rounds that are.

    Returns:
        For each call its times; those at the same place were measured next to each other.
    """
    require(repeats >= 1, "repeats", repeats, "at least 1")
    require(warmup >= 0, "warmup", warmup, "0 or more")
    times: list[list[float]] = [[] for _ in calls]
    order = list(enumerate(calls))
    for repeat in range(warmup + repeats):
        for place, call in order if repeat % 2 else reversed(order):
            begin = time.perf_counter()
            call()
            if repeat >= warmup:
                times[place].append((time.perf_counter() - begin) * 1e3)
    return times


@contextmanager
def timing_conditions(*models: nn.Module, threads: int | None = None) -> Iterator[None]:
    """Eval mode without gradients, on a given number of CPU threads; all is put back."""
    require(threads is None or threads >= 1, "threads", threads, "at least 1")
    before = torch.get_num_threads()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before)


def forward_call(model: nn.Module, example_inputs: Any) -> Callable[[], Any]:
    """A forward pass as a function that returns when the device has done it."""
    device = device_of(model)
    inputs = to_device(example_inputs, device)

    def call() -> Any:
        output = forward(model, inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return output

    return call


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own mode is put back."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


@contextmanager
def attention_in_the_open() -> Iterator[None]:
    """Without the fused kernels, which the counter cannot see into."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def forward(model: nn.Module, inputs: Any) -> Any:
    """The output for a tensor, a sequence of arguments or a dictionary of keyword arguments.

    Tensors are brought to the model's device.
    """
    device = device_of(model)
    if isinstance(inputs, Tensor):
        return model(inputs.to(device))
    if isinstance(inputs, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return model(*[v.to(device) if isinstance(v, Tensor) else v for v in inputs])


def _batch(inputs: Any) -> int:
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.ndim else 1
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim), 1)
