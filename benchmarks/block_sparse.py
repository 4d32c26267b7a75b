"""Block-sparse linear layers beside the dense product, on one thread, in one run.

    python benchmarks/block_sparse.py [--widths 1024 2048 4096] [--tokens 128] [--repeats 7]

For square layers at 0.5, 0.7 and 0.9 sparsity with 16x16 and 32x32 blocks: the median over the
rounds of the time relative to the dense layer, the two timed next to each other, for the
library's own product (`rows`) and that of `torch.sparse_bsr`. Below 1 is faster.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import nn

from secateurs.deploy.block_sparse import BlockSparseLinear
from secateurs.parts.costs import time_calls, timing_conditions
from secateurs.parts.patterns import Block

SPARSITIES = (0.5, 0.7, 0.9)
BLOCKS = ((16, 16), (32, 32))
ENGINES = ("rows", "torch")


def ratios(
    width: int, block: tuple[int, int], sparsity: float, tokens: int, repeats: int
) -> tuple[float, dict[str, float], float]:
    """Milliseconds of the dense layer, times relative to it by engine, stored bytes likewise."""
    generator = torch.Generator().manual_seed(0)
    dense, tiles = nn.Linear(width, width, bias=False), Block(*block)
    units = len(tiles.unit_sizes(dense.weight.shape))
    kept = torch.zeros(units, dtype=torch.bool)
    kept[torch.randperm(units, generator=generator)[: round((1 - sparsity) * units)]] = True
    mask = tiles.expand(kept, dense.weight.shape)
    layers = [BlockSparseLinear.of(dense, mask, block, engine) for engine in ENGINES]
    x = torch.randn(tokens, width, generator=generator)
    calls = [lambda layer=layer: layer(x) for layer in (dense, *layers)]
    with timing_conditions(dense, *layers, threads=1):
        times = time_calls(calls, warmup=2, repeats=repeats)
    found = {
        engine: statistics.median(a / b for a, b in zip(own, times[0], strict=True))
        for engine, own in zip(ENGINES, times[1:], strict=True)
    }
    stored = layers[0].stored_bytes / (dense.weight.numel() * dense.weight.element_size())
    return statistics.median(times[0]), found, stored


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=128, help="rows of the input")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, one thread, {arguments.tokens} tokens; of dense:")
    print("width  block  sparsity  dense ms   rows  torch  bytes")
    for width in arguments.widths:
        for block in BLOCKS:
            for sparsity in SPARSITIES:
                dense, found, stored = ratios(
                    width, block, sparsity, arguments.tokens, arguments.repeats
                )
                shape = f"{block[0]}x{block[1]}"
                print(
                    f"{width:5d}  {shape:5s}  {sparsity:8.1f}  {dense:8.2f}  "
                    f"{found['rows']:5.2f}  {found['torch']:5.2f}  {stored:5.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
