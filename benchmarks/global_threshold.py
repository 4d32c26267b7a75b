"""The exact global magnitude threshold over a billion weights, beside one pass that reads them.

    python benchmarks/global_threshold.py [--elements 1e9] [--tensors 200] [--threads 2]

`find_cut` keeps the largest 10 % of normal float32 weights in tensors of sizes from 1 to 100; it
takes turns with `sum(t.abs().sum() for t in tensors)`, so that both see the same machine. Printed
are medians and the largest growth of the resident set. Bars: 4 times the pass, 256 MB. Beside
them, without a bar: the same pass in 4 MB pieces, which spares it the allocation of large
results, and the naive way, `cat` and `kthvalue`, on as many tensors as half of the free memory
can take.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from secateurs.parts.topk import Cut, find_cut

KEPT = 0.1
BAR_TIMES, BAR_MEGABYTES = 4.0, 256.0
NAIVE_BYTES = 20
"""For each float32: the copy, the copy in `kthvalue`, its int64 indices, one to spare."""


def normal_weights(elements: int, tensors: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shares = [100 ** (i / max(1, tensors - 1)) for i in range(tensors)]
    stops = [round(elements * sum(shares[: i + 1]) / sum(shares)) for i in range(tensors)]
    sizes = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
    order = torch.randperm(tensors, generator=generator).tolist()
    return [torch.empty(sizes[i]).normal_(generator=generator) for i in order]


def one_pass(tensors: list[Tensor]) -> Tensor:
    return sum((t.abs().sum() for t in tensors), torch.zeros(()))


def one_pass_in_pieces(tensors: list[Tensor]) -> Tensor:
    return one_pass([piece for t in tensors for piece in torch.split(t, 1 << 20)])


def magnitude_cut(tensors: list[Tensor]) -> Cut:
    return find_cut(tensors, kept(tensors), torch.abs)


def naive_cut(tensors: list[Tensor]) -> Cut:
    flat = torch.cat(tensors).abs_()
    value = flat.kthvalue(len(flat) - kept(tensors) + 1).values.item()
    return Cut(value, kept(tensors) - int((flat > value).sum()))


def kept(tensors: list[Tensor]) -> int:
    return round(KEPT * count(tensors))


def count(tensors: list[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


def above_and_at(tensors: list[Tensor], value: float) -> tuple[int, int]:
    above = sum(int((t.abs() > value).sum()) for t in tensors)
    return above, sum(int((t.abs() == value).sum()) for t in tensors)


class Meter:
    """Seconds and megabytes of growth of the resident set, over all calls of one function."""

    def __init__(self, function: Callable[[list[Tensor]], Tensor | Cut]) -> None:
        self.function = function
        self.seconds: list[float] = []
        self.megabytes = 0.0

    def __call__(self, tensors: list[Tensor]) -> Tensor | Cut:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before, begin = kilobytes("self/status", "VmRSS"), time.perf_counter()
        result = self.function(tensors)
        self.seconds.append(time.perf_counter() - begin)
        growth = kilobytes("self/status", "VmHWM") - before
        self.megabytes = max(self.megabytes, growth / 1024)
        return result

    def row(self, name: str, scores: int, beside: float) -> str:
        """Name, scores, seconds, time per score in passes, megabytes."""
        seconds = statistics.median(self.seconds)
        times = seconds / scores / beside
        return f"{name:24s} {scores:13,d} {seconds:9.3f} {times:9.2f} {self.megabytes:10.0f}"


def kilobytes(file: str, field: str) -> int:
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def that_fit(tensors: list[Tensor]) -> list[Tensor]:
    room = kilobytes("meminfo", "MemAvailable") * 1024 // 2
    fitting = []
    for tensor in tensors:
        room -= tensor.numel() * NAIVE_BYTES
        if room >= 0:
            fitting.append(tensor)
    return fitting


def verdict(name: str, value: float, bar: float) -> str:
    return f"{name}: {value:.2f}, bar {bar:g}: {'holds' if value <= bar else 'MISSED'}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--elements", type=float, default=1e9, help="weights in all")
    parser.add_argument("--tensors", type=int, default=200, help="tensors they are spread over")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7, help="turns of each")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tensors = normal_weights(int(arguments.elements), arguments.tensors)
    scores = count(tensors)
    ours, naive = Meter(magnitude_cut), Meter(naive_cut)
    reading, in_pieces = Meter(one_pass), Meter(one_pass_in_pieces)
    for _ in range(arguments.repeats):
        cut = ours(tensors)
        reading(tensors)
        in_pieces(tensors)
    assert isinstance(cut, Cut)
    above, at = above_and_at(tensors, cut.value)
    exact = above + cut.ties == kept(tensors) and 0 < cut.ties <= at

    some = that_fit(tensors)
    same = naive(some) == magnitude_cut(some)

    beside = statistics.median(reading.seconds) / scores
    print(f"{len(tensors)} tensors, {scores:,d} weights, {arguments.threads} threads")
    print(f"{'':24s} {'scores':>13s} {'seconds':>9s} {'passes':>9s} {'extra MB':>10s}")
    print(reading.row("sum of t.abs().sum()", scores, beside))
    print(in_pieces.row("the same in pieces", scores, beside))
    print(ours.row("find_cut", scores, beside))
    print(naive.row("cat and kthvalue", count(some), beside))
    print(
        f"keep {kept(tensors):,d}: {above:,d} above {cut.value!r} and {cut.ties} of the {at} at it"
    )
    print(f"exact: {exact}; the same as the naive way on {count(some) / scores:.0%}: {same}")
    print(verdict("time in passes", statistics.median(ours.seconds) / scores / beside, BAR_TIMES))
    print(verdict("extra memory in MB", ours.megabytes, BAR_MEGABYTES))


if __name__ == "__main__":
    main()
