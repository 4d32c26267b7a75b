"""Kill a run or a benchmark at any moment: resuming gives the same bits, nothing twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from secateurs.workspace import read_events

RECIPE = """
model: zoo:convnet
data: digits
threads: 1
latency: false
training: {epochs: 2}
finetuning: {epochs: 2}
stages:
  - train
  - prune: {method: lottery-ticket, budget: sparsity=0.7, rounds: 2}
  - prune: {method: global-mp, budget: sparsity=0.9}
  - finetune: {epochs: 1}
"""

MATRIX = """
model: zoo:convnet
data: digits
methods: [global-mp, gmp]
budgets: [sparsity=0.9]
seeds: 2
baselines: false
latency: false
training: {epochs: 2}
finetuning: {epochs: 1}
"""

# one interpreter is started, imports everything, and forks a child for every trial: a kill
# then costs milliseconds, not the import of torch
FORKING = """
import json, os, sys
from pathlib import Path
from secateurs.runs.matrix import Bench, Matrix
from secateurs.runs.recipe import Recipe
from secateurs.runs.run import Run
from secateurs.runs.workers import do, run_bench
import secateurs.zoo.catalog, accelerate, torch
torch.set_num_threads(1)

def start(kind, source, folder):
    folder = Path(folder)
    if kind == "run":
        known = (folder / "recipe.yaml").is_file()
        run = Run(folder) if known else Run.create(Recipe.parse(source), folder)
        run.execute(snapshot_seconds=0.0)
    else:
        bench = Bench.create(Matrix.parse(source), folder)
        bench.reopen()
        while (job := bench.claim("worker")) is not None:
            do(bench, job)

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        start(**request)
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


class Trials:
    """Starts trials in children of one warm interpreter, and kills them."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, kind: str, source: str, folder: Path) -> int:
        request = {"kind": kind, "source": source, "folder": str(folder)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the interpreter died"
        return line

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def trials():
    made = Trials()
    yield made
    made.close()


def finish(trials: Trials, kind: str, source: str, folder: Path) -> float:
    begin = time.monotonic()
    trials.start(kind, source, folder)
    assert trials.wait() == 0
    return time.monotonic() - begin


def kill_after(trials: Trials, kind: str, source: str, folder: Path, seconds: float) -> bool:
    """Whether the kill came before the end."""
    child = trials.start(kind, source, folder)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return trials.wait() != 0


def run_result(folder: Path):
    plan = json.loads((folder / "outcome" / "outcome.json").read_text())
    numbers = {k: plan[k] for k in ("metrics_after", "metrics_before", "history", "layers")}
    return numbers, load_file(folder / "outcome" / "model.safetensors")


def assert_same(one, two) -> None:
    assert one[0] == two[0]
    assert one[1].keys() == two[1].keys()
    for name, tensor in one[1].items():
        assert tensor.equal(two[1][name]), name


@pytest.mark.parametrize("total", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_many_moments_ends_the_same(
    trials: Trials, tmp_path: Path, total: int
) -> None:
    seconds = finish(trials, "run", RECIPE, tmp_path / "whole")
    whole = run_result(tmp_path / "whole")
    chance = random.Random(0)
    kills, folder = 0, 0
    while kills < total:
        folder += 1
        target = tmp_path / f"killed-{folder}"
        while kills < total and kill_after(
            trials, "run", RECIPE, target, chance.uniform(0, 0.6 * seconds)
        ):
            kills += 1
            leftovers = [p for p in target.glob("**/*") if p.suffix == ".safetensors"]
            for path in leftovers:
                if not path.name.startswith("."):
                    load_file(path)
        finish(trials, "run", RECIPE, target)
        assert_same(whole, run_result(target))
        events = read_events(target / "events.jsonl")
        done = [(e["at"], e["step"]) for e in events if e["event"] == "done"]
        assert len(done) == len(set(done)), "a finished step was run again"


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_benchmark_killed_at_random_moments_ends_the_same(
    trials: Trials, tmp_path: Path, kills: int
) -> None:
    from secateurs.runs.matrix import Bench

    def rows(folder: Path):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in Bench(folder).results()]

    seconds = finish(trials, "bench", MATRIX, tmp_path / "whole")
    whole = rows(tmp_path / "whole")
    assert len(whole) == 4
    chance = random.Random(1)
    target = tmp_path / "killed"
    done: list[dict] = []
    for _ in range(kills):
        # so that they spread over the whole of it: every start costs an import of torch
        moment = chance.uniform(0, 4 / kills * seconds)
        alive = kill_after(trials, "bench", MATRIX, target, moment)
        if not (target / "bench.sqlite").is_file():
            continue
        bench = Bench(target)
        with bench.database() as db:
            now = dict(db.execute("SELECT id, seconds FROM jobs WHERE state='done'").fetchall())
        for before in done:
            assert before.items() <= now.items(), "a finished job was run again"
        done.append(now)
        if not alive:
            break
    finish(trials, "bench", MATRIX, target)
    assert rows(target) == whole
    for cell in Bench(target).matrix.cells:
        folder = tmp_path / "whole" / "cells" / cell.identity
        assert_same(run_result(folder), run_result(target / "cells" / cell.identity))
