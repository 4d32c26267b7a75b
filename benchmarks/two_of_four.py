"""2:4 linear layers in sparse kernels beside dense ones, on a GPU; says so where there is none.

    python benchmarks/two_of_four.py

Widths of Llama-7B's layers, 4096 rows of inputs, float16; medians of 50 products, both in one run.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from secateurs.deploy.semi_structured import pack_semi_structured
from secateurs.parts.patterns import NM

ROWS, REPEATS = 4096, 50


def milliseconds(layer: nn.Module, inputs: torch.Tensor) -> float:
    """Median time of a product."""
    times = []
    with torch.no_grad():
        for _ in range(REPEATS + 5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            layer(inputs)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[5:])


def main() -> None:
    """Print a line a shape."""
    if not torch.cuda.is_available():
        print("no GPU: 2:4 layers stay dense here, checked by tests/deploy/test_semi_structured.py")
        return
    print(torch.cuda.get_device_name())
    for out, width in ((4096, 4096), (11008, 4096), (4096, 11008)):
        layer = nn.Linear(width, out, bias=False, device="cuda", dtype=torch.half)
        with torch.no_grad():
            layer.weight.mul_(NM(2, 4).mask(layer.weight.abs()))
        inputs = torch.randn(ROWS, width, device="cuda", dtype=torch.half)
        dense = milliseconds(layer, inputs)
        pack_semi_structured(nn.Sequential(layer))
        sparse = milliseconds(layer, inputs)
        gain = f"{dense / sparse:.2f} times"
        print(f"{out} x {width}: dense {dense:.3f} ms, 2:4 {sparse:.3f} ms, {gain}")


if __name__ == "__main__":
    main()
