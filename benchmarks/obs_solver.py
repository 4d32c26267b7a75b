"""The column sweep of the OBS solver, beside a loop that updates all later columns every time.

    python benchmarks/obs_solver.py [--size 4096] [--threads 1] [--repeats 3] [--block 128] [--rows]
                                    [--device cuda]

A square float32 layer with correlated inputs is swept to half by `sweep_columns`; a plain loop
takes away the same weights, one column after the other, without blocks. It works on the
transpose of the weight, where a column is contiguous; with --rows, also on the weight as it lies
(out, d), as the loop is usually written, which takes minutes. They take turns, so that all see
the same machine; printed are medians, of ratios pair by pair, and how far the results are apart.
All share the factorisation, which is timed by itself. With more threads than free cores the many
small operations of each wait for a thread that does not run, and the ratio says little.
Bar: twice as fast as the loop on the transpose.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from secateurs.calibration.obs import BLOCK_SIZE, damp, sweep_columns

SPARSITY = 0.5
BAR_RATIO = 2.0
Result = TypeVar("Result")


def correlated_hessian(size: int, generator: torch.Generator) -> Tensor:
    """2/N X Xᵀ of inputs whose scales differ and that share an eighth as many causes."""
    causes = torch.randn(size // 8, 2 * size, generator=generator)
    mixing = torch.randn(size, size // 8, generator=generator) / (size // 8) ** 0.5
    scales = torch.rand(size, 1, generator=generator) + 0.1
    inputs = scales * (mixing @ causes + 0.3 * torch.randn(size, 2 * size, generator=generator))
    return (inputs @ inputs.t()).double() / size


def loop_by_rows(weight: Tensor, root: Tensor, mask: Tensor) -> Tensor:
    rest = weight.clone()
    for column in range(rest.shape[1]):
        error = rest[:, column] * ~mask[:, column] / root[column, column]
        rest[:, column:] -= error[:, None] @ root[column, None, column:]
    return rest * mask


def loop_by_columns(weight: Tensor, root: Tensor, mask: Tensor) -> Tensor:
    rest, gone = weight.t().contiguous(), ~mask.t().contiguous()
    for column in range(len(rest)):
        error = rest[column] * gone[column] / root[column, column]
        rest[column:].addr_(root[column, column:], error, alpha=-1)
    return rest.t() * mask


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    begin = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all that is timed")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    parser.add_argument("--block", type=int, default=BLOCK_SIZE, help="columns in a block")
    parser.add_argument("--rows", action="store_true", help="also the loop on rows")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    generator = torch.Generator().manual_seed(0)
    second_moment = correlated_hessian(arguments.size, generator).to(arguments.device)
    weight = torch.randn(arguments.size, arguments.size, generator=generator).to(arguments.device)

    damp(second_moment[:64, :64])  # a GPU loads its libraries at the first call
    hessian, damping = timed(lambda: damp(second_moment))
    root, inverting = timed(lambda: hessian.inverse_root.float())
    loops = {"loop, weight transposed": loop_by_columns}
    if arguments.rows:
        loops["loop, weight as it lies"] = loop_by_rows
    seconds: dict[str, list[float]] = {name: [] for name in ("sweep_columns", *loops)}
    apart = 0.0
    for _ in range(arguments.repeats):
        swept, own = timed(
            lambda: sweep_columns(weight, hessian, SPARSITY, block_size=arguments.block)
        )
        seconds["sweep_columns"].append(own)
        for name, loop in loops.items():
            result, own = timed(lambda loop=loop, mask=swept.mask: loop(weight, root, mask))
            seconds[name].append(own)
            apart = max(apart, float((result - swept.weight).abs().max()))

    on = torch.cuda.get_device_name() if weight.is_cuda else f"{torch.get_num_threads()} threads"
    print(f"{arguments.size} x {arguments.size} float32, {on}")
    print(f"{'factorisation, shared':26s} {damping + inverting:8.2f} s")
    ratios = {}
    for name, own in seconds.items():
        pairs = zip(own, seconds["sweep_columns"], strict=True)
        ratios[name] = statistics.median(a / b for a, b in pairs)
        print(f"{name:26s} {statistics.median(own):8.2f} s   {ratios[name]:6.2f} times the sweep")
    print(f"largest difference of a weight: {apart:.0e}")
    ratio = ratios["loop, weight transposed"]
    verdict = "holds" if ratio >= BAR_RATIO else "MISSED"
    print(f"ratio: {ratio:.2f}, bar {BAR_RATIO:g}: {verdict}")


if __name__ == "__main__":
    main()
