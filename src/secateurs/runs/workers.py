"""Worker processes that do the jobs of a benchmark on this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from secateurs.devices import default_device
from secateurs.errors import SecateursError, require
from secateurs.outcome import load
from secateurs.parts.costs import measure_latencies
from secateurs.runs.matrix import Bench, Job, result_row
from secateurs.runs.recipe import changed
from secateurs.runs.run import RECIPE, Run, locked
from secateurs.training.loop import fit_once
from secateurs.workspace import Listener, Workspace

POLL_SECONDS = 0.2
Watch = Callable[[Bench], None]
"""Called again and again while jobs are under way; draws progress bars."""


class ProgressRow:
    """A listener that writes a job's progress into the benchmark, at most twice a second.

    It also ends a worker whose parent is gone, so that no orphan goes on behind a resumed
    benchmark.
    """

    def __init__(self, bench: Bench, job: str, parent: int | None = None) -> None:
        self.bench, self.job, self.parent = bench, job, parent
        self.total, self.last = 1, 0.0

    def event(self, kind: str, values: dict[str, Any]) -> None:
        """Nothing but a sign of life."""
        self._check_parent()

    def begin(self, label: str, total: int) -> None:
        """A new piece of work."""
        self.total = max(total, 1)

    def advance(self, label: str, done: int) -> None:
        """Write it, now and then."""
        self._check_parent()
        if time.monotonic() - self.last > 0.5:
            self.last = time.monotonic()
            self.bench.report_progress(self.job, done / self.total)

    def end(self, label: str) -> None:
        """Nothing."""

    def _check_parent(self) -> None:
        if self.parent is not None and os.getppid() != self.parent:
            os._exit(1)


def execute(bench: Bench, job: Job, parent: int | None = None) -> dict[str, Any] | None:
    """Do one job in the benchmark's folder; a cell's result row, None for a dense training."""
    listener = ProgressRow(bench, job.id, parent)
    if job.kind == "dense":
        train_dense(job, bench.shared, (listener,))
        return None
    folder = bench.cell_folder(job.id)
    is_run = (folder / RECIPE).is_file()
    run = Run(folder, bench.shared) if is_run else Run.create(job.recipe, folder, bench.shared)
    outcome = run.execute((listener,))
    return result_row(job.label, run.recipe, outcome)


def train_dense(job: Job, shared: Path, listeners: tuple[Listener, ...]) -> None:
    """Train the dense network that several cells begin with, into `shared`."""
    recipe = job.recipe
    task = recipe.make_task()
    settings = changed(task.training, recipe.stages[0].settings)
    folder = shared / job.id
    with locked(folder / ".lock", "dense training"):
        model = task.starting_model(recipe.seed)
        work = Workspace(folder, listeners)
        fit_once(model, task, settings, seed=recipe.seed, work=work)


def run_bench(bench: Bench, workers: int, watch: Watch = lambda bench: None) -> None:
    """Do all jobs on worker processes, one thread each; dead workers are replaced.

    Raises:
        InputError: another process works on this benchmark.
    """
    require(workers >= 1, "workers", workers, "at least 1")
    with locked(bench.folder / ".lock", "benchmark"):
        bench.reopen()
        context = multiprocessing.get_context("spawn")
        started = 0
        team: dict[str, BaseProcess] = {}
        try:
            while True:
                for name, process in list(team.items()):
                    if not process.is_alive():
                        process.join()
                        del team[name]
                        bench.abandoned_by(name)
                open_jobs = {"pending", "running"} & set(bench.states())
                if not open_jobs:
                    break
                pending = bench.states().get("pending", 0)
                while len(team) < min(workers, pending + len(team)):
                    name = f"worker-{started}"
                    started += 1
                    process = context.Process(
                        target=work_off, args=(str(bench.folder), name, os.getpid())
                    )
                    process.start()
                    team[name] = process
                    pending -= 1
                watch(bench)
                time.sleep(POLL_SECONDS)
        finally:
            for process in team.values():
                process.terminate()
            for process in team.values():
                process.join()
        watch(bench)
        if bench.matrix.latency:
            time_outcomes(bench)


def work_off(folder: str, name: str, parent: int) -> None:
    """A worker process: claim and do jobs until none is left."""
    import torch

    torch.set_num_threads(1)
    bench = Bench(Path(folder))
    while True:
        if os.getppid() != parent:
            return
        job = bench.claim(name)
        if job is None:
            if not {"pending", "running"} & set(bench.states()):
                return
            time.sleep(POLL_SECONDS)
            continue
        do(bench, job, parent)


def do(bench: Bench, job: Job, parent: int | None = None) -> None:
    """Do a job and write down what came of it."""
    begin = time.perf_counter()
    try:
        result = execute(bench, job, parent)
    except SecateursError as error:
        bench.fail(job.id, str(error))
    except Exception:
        bench.fail(job.id, traceback.format_exc(limit=-3))
    else:
        bench.complete(job.id, result, time.perf_counter() - begin)


def time_outcomes(bench: Bench) -> None:
    """Time every finished cell and its dense network in turn, one cell after the other.

    The machine should be idle, so this comes when all jobs are done.
    """
    with bench.database() as db:
        rows = db.execute(
            "SELECT id, result FROM jobs WHERE kind='cell' AND state='done'"
        ).fetchall()
    for job, text in rows:
        result = json.loads(text)
        if "timed" in result:
            continue
        run = Run(bench.cell_folder(job))
        task = run.recipe.make_task()
        models = [task.starting_model(run.recipe.seed), load(run.folder / "outcome").model]
        models = [model.to(default_device()) for model in models]
        dense, pruned = measure_latencies(models, task.example_inputs)
        result["timed"] = {"before": asdict(dense), "after": asdict(pruned)}
        with bench.database() as db:
            db.execute("UPDATE jobs SET result=? WHERE id=?", (json.dumps(result), job))
    _in_the_same_time(bench)


def _in_the_same_time(bench: Bench) -> None:
    """Give the latencies of a task as if its dense network had taken the same in every cell.

    The two of a cell took turns, but cells were timed minutes apart, and clocks and neighbours
    change. So all of a cell is scaled by the median over the cells of what the dense network took.
    """
    with bench.database() as db:
        rows = db.execute(
            "SELECT id, result FROM jobs WHERE kind='cell' AND state='done'"
        ).fetchall()
        results = {job: json.loads(text) for job, text in rows}
        took: dict[str, list[float]] = defaultdict(list)
        for result in results.values():
            took[result["task"]].append(result["timed"]["before"]["median"])
        for job, result in results.items():
            scale = statistics.median(took[result["task"]]) / result["timed"]["before"]["median"]
            timing = {
                side: {k: v if k == "repeats" else v * scale for k, v in latency.items()}
                for side, latency in result["timed"].items()
            }
            result |= {
                "timing": timing,
                "latency_ms": timing["after"]["median"],
                "dense_latency_ms": timing["before"]["median"],
            }
            db.execute("UPDATE jobs SET result=? WHERE id=?", (json.dumps(result), job))
