"""The researcher: which method wins on my task, against honest baselines?

    python examples/compare_methods.py

A matrix of methods, budgets and seeds on worker processes. Random pruning, global magnitude and
the small dense network trained from scratch are always in it. Kill it and start it again: it
goes on where it was.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from secateurs.report.console import leaderboard_table
from secateurs.report.leaderboard import leaderboard
from secateurs.runs.matrix import Bench, Matrix
from secateurs.runs.workers import run_bench

MATRIX = """
model: zoo:convnet
data: digits
methods:
  - global-mp-gradual
  - {method: granet, initial: 0.5, label: granet from 50 %}
budgets: [sparsity=0.98]
seeds: 3
latency: false
training: {epochs: EPOCHS}
"""


def main(epochs: float = 15, out: str | None = None) -> list[dict]:
    folder = Path(out or tempfile.mkdtemp()) / "comparison"
    bench = Bench.create(Matrix.parse(MATRIX.replace("EPOCHS", str(epochs))), folder)
    run_bench(bench, workers=2)
    board = leaderboard(bench.results())
    Console().print(leaderboard_table(board))
    return board


if __name__ == "__main__":
    main()
