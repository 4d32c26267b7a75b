"""How much faster two worker processes finish a benchmark matrix than one.

    python benchmarks/matrix_scaling.py [--seeds 4] [--epochs 40]

The same matrix (two methods, two budgets, several seeds on the digits) in two new folders.
Bar: at least 1.7 times as fast. Each worker spends its first seconds on importing torch, so the
matrix must take minutes for the figure to mean anything. The results of the two are compared,
too: they are identical.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from secateurs.runs.matrix import Bench, Matrix
from secateurs.runs.workers import run_bench


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    text = f"""
model: zoo:convnet
data: digits
methods: [global-mp, gmp]
budgets: [sparsity=0.8, sparsity=0.95]
seeds: {arguments.seeds}
baselines: false
latency: false
training: {{epochs: {arguments.epochs}}}
"""
    seconds, results = {}, {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench.create(Matrix.parse(text), Path(folder) / "bench")
            begin = time.perf_counter()
            run_bench(bench, workers)
            seconds[workers] = time.perf_counter() - begin
            results[workers] = [
                {k: v for k, v in row.items() if k != "seconds"} for row in bench.results()
            ]
        print(f"{workers} worker(s): {seconds[workers]:6.1f} s, {len(results[workers])} cells")
    print(f"speed-up {seconds[1] / seconds[2]:.2f}; identical results: {results[1] == results[2]}")


if __name__ == "__main__":
    main()
