"""2:4 linear layers in sparse kernels beside dense ones, on a GPU; says so where there is none.

    python benchmarks/two_of_four.py [--rows 4096] [--dtype float16]

Widths of Llama-7B's layers; medians of products, dense and 2:4 in one run: called one by one from
Python, and replayed as a CUDA graph. torch plans a sparse product anew at every call, which takes
the host about half a millisecond; a graph (`torch.compile(mode="reduce-overhead")` makes one)
pays that once, so only there the kernels themselves are compared.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateurs.deploy.semi_structured import pack_semi_structured
from secateurs.parts.patterns import NM

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
REPEATS, WARMUP = 50, 5


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU."""
    times = []
    for _ in range(WARMUP + REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[WARMUP:])


def replay(layer: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """The layer's product as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(inputs)
    return graph.replay


@torch.no_grad()
def times_of(layer: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """Milliseconds of a product when called, and when replayed."""
    return milliseconds(lambda: layer(inputs)), milliseconds(replay(layer, inputs))


def main() -> None:
    """Print a line a shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 4096, 16384], help="of inputs")
    parser.add_argument("--dtype", default="float16", help="float16 or bfloat16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: 2:4 layers stay dense here, checked by tests/deploy/test_semi_structured.py")
        return
    dtype = getattr(torch, arguments.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}")
    print(f"{'':23}{'called':>26}{'replayed':>29}")
    print("  rows   weight           dense     2:4   ratio      dense     2:4   ratio")
    for rows in arguments.rows:
        for out, width in SHAPES:
            layer = nn.Linear(width, out, bias=False, device="cuda", dtype=dtype)
            with torch.no_grad():
                layer.weight.mul_(NM(2, 4).mask(layer.weight.abs()))
            inputs = torch.randn(rows, width, device="cuda", dtype=dtype)
            dense = times_of(layer, inputs)
            packed = pack_semi_structured(nn.Sequential(layer))
            assert packed.packed, packed.dense
            sparse = times_of(layer, inputs)
            pairs = "     ".join(
                f"{a:7.3f} {b:7.3f}   {b / a:5.2f}" for a, b in zip(dense, sparse, strict=True)
            )
            print(f"{rows:6d}   {out:5d} x {width:5d} {pairs}", flush=True)


if __name__ == "__main__":
    main()
