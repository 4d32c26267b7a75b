"""The benchmark: a matrix of methods, tasks, budgets and seeds, each cell a run.

    tasks: [{model: zoo:convnet, data: digits}]
    methods: [global-mp, {method: gmp, end: 0.6}]
    budgets: [sparsity=0.9, sparsity=0.95]
    seeds: 3

Cells stand in an SQLite file; workers claim them one by one, so nothing is done twice and a
killed benchmark goes on where it was. A dense network that several cells start from is a job
of its own, trained once. Random pruning, global magnitude and the small dense network trained
from scratch are in every matrix unless `baselines: false`.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from secateurs.errors import InputError, require
from secateurs.method import Procedure
from secateurs.outcome import Outcome, check_output_folder
from secateurs.registry import build, method_class
from secateurs.runs.recipe import (
    Recipe,
    Stage,
    changed,
    check_keys,
    parse_yaml,
    plain_values,
    read_text,
    stages_for,
)
from secateurs.runs.run import dense_identity, needs_dense
from secateurs.state import write_bytes

BASELINES = ("random-pruning", "global-mp", "small-dense")
MATRIX, DATABASE = "matrix.yaml", "bench.sqlite"
TASK_KEYS = ("model", "data", "training", "finetuning", "batch_size", "label_smoothing")
OWN_KEYS = ("name", "about", "tasks", "methods", "budgets", "seeds", "baselines", "latency")
KEYS = (*OWN_KEYS, *TASK_KEYS)
ATTEMPTS = 2
"""A job that brought its worker down this often is given up."""


@dataclass(frozen=True)
class Cell:
    """One run of the matrix, and how it is called in the leaderboard."""

    label: str
    recipe: Recipe

    @property
    def identity(self) -> str:
        """A hash of the recipe: the name of its folder."""
        return self.recipe.identity()

    @property
    def stage(self) -> Stage:
        """The pruning stage."""
        return next(s for s in self.recipe.stages if s.kind == "prune")

    @property
    def task(self) -> str:
        """Model and data."""
        return f"{self.recipe.model} on {self.recipe.data}"


@dataclass(frozen=True)
class Matrix:
    """Methods times tasks times budgets times seeds.

    Attributes:
        tasks: recipes without stages: model, data and their settings.
        methods: names, or mappings with ``method``, ``label``, options, ``recover`` as a stage
            has it, and ``budgets`` in place of the matrix's.
        budgets: in the budget language.
        seeds: their number, or the seeds themselves.
        baselines: whether the three baselines are added.
        latency: whether outcomes are timed, each beside its dense network, when all are done.
        about: a paragraph for the report and the terminal, on how to read the comparison.
    """

    tasks: tuple[dict[str, Any], ...]
    methods: tuple[Any, ...]
    budgets: tuple[str, ...]
    seeds: int | tuple[int, ...] = 1
    name: str = "benchmark"
    baselines: bool = True
    latency: bool = True
    about: str = ""
    cells: tuple[Cell, ...] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "budgets"):
            require(bool(getattr(self, name)), name, [], "at least one")
        some = self.seeds >= 1 if isinstance(self.seeds, int) else bool(self.seeds)
        require(some, "seeds", self.seeds, "at least one seed")
        object.__setattr__(self, "cells", tuple(self._cells()))

    @staticmethod
    def parse(text: str) -> Matrix:
        """A matrix from YAML; every cell is checked.

        Raises:
            InputError: malformed or unknown keys, or a cell that cannot be run.
        """
        values = parse_yaml(text, "matrix")
        check_keys(values, KEYS, "matrix", required=("methods", "budgets"))
        values = {k: v for k, v in values.items() if v is not None}
        common = {k: values.pop(k) for k in TASK_KEYS if k in values}
        if "tasks" not in values:
            values["tasks"] = [{}]
        if not isinstance(values["tasks"], list):
            raise InputError("tasks", values["tasks"], "a list of {model, data}")
        for task in values["tasks"]:
            check_keys(task, TASK_KEYS, "task")
        values["tasks"] = [{**common, **task} for task in values["tasks"]]
        for key in ("methods", "budgets", "seeds"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
            elif key != "seeds":
                raise InputError(key, values.get(key), f"a list of {key}")
        matrix: Matrix = build(Matrix, values)
        return matrix

    @staticmethod
    def read(path: Path) -> Matrix:
        """A matrix from a file."""
        return Matrix.parse(read_text(path, "matrix"))

    def _cells(self) -> Iterator[Cell]:
        seeds = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        seen = set()
        for task in self.tasks:
            for method in self._methods():
                label, name, options = method_entry(method)
                for budget in self._budgets(method):
                    stages = stages_for(name, budget, options, fresh=is_fresh(task))
                    for seed in seeds:
                        recipe = Recipe.from_dict(
                            {
                                **task,
                                "seed": seed,
                                "threads": 1,
                                "latency": False,
                                "stages": [s.as_yaml() for s in stages],
                            }
                        )
                        cell = Cell(label, recipe)
                        if cell.identity not in seen:
                            seen.add(cell.identity)
                            yield cell

    def _budgets(self, method: Any) -> tuple[str, ...]:
        if not isinstance(method, dict) or "budgets" not in method:
            return self.budgets
        own = method["budgets"]
        require(isinstance(own, list) and bool(own), "budgets", own, "a list of budgets")
        return tuple(own)

    def _methods(self) -> list[Any]:
        own = [method_entry(m)[1:] for m in self.methods]
        missing = [b for b in BASELINES if (b, {}) not in own] if self.baselines else []
        return [*self.methods, *missing]

    def as_yaml(self) -> str:
        """The matrix as a file."""
        values = plain_values({name: getattr(self, name) for name in OWN_KEYS})
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def method_entry(value: Any) -> tuple[str, str, dict[str, Any]]:
    """(label, method, options) of an entry of the list of methods."""
    if isinstance(value, str):
        method_class(value)
        return value, value, {}
    if not isinstance(value, dict) or "method" not in value:
        raise InputError("methods", value, "a name, or {method: NAME, label: ..., options...}")
    name = str(value["method"])
    method_class(name)
    options = {k: v for k, v in value.items() if k not in ("method", "label", "budgets")}
    shown = ", ".join(f"{k}={v}" for k, v in options.items())
    return str(value.get("label", f"{name} ({shown})" if shown else name)), name, options


def is_fresh(task: dict[str, Any]) -> bool:
    """Whether the task's model comes without trained weights."""
    from secateurs.zoo.catalog import has_weights

    check_keys(task, TASK_KEYS, "task", required=("model", "data"))
    return not has_weights(task["model"])


@dataclass(frozen=True)
class Job:
    """Something a worker can claim: a dense training, or a cell."""

    id: str
    kind: str
    label: str
    recipe: Recipe

    @property
    def title(self) -> str:
        """The job as a progress bar calls it."""
        return title_of(self.label, self.recipe)


class Bench:
    """A matrix in a folder, with its jobs in SQLite.

        matrix.yaml   fixed when the benchmark begins
        bench.sqlite  jobs, their states and results
        cells/ID/     a run each
        shared/       dense trainings

    Raises:
        InputError: the folder holds no benchmark.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / DATABASE).is_file():
            raise InputError("benchmark", str(folder), f"a folder with {DATABASE}")
        self.matrix = Matrix.read(folder / MATRIX)
        try:
            self.states()
        except sqlite3.DatabaseError as error:
            file = str(folder / DATABASE)
            raise InputError("benchmark", file, f"a whole benchmark ({error})") from None

    @staticmethod
    def create(matrix: Matrix, folder: Path) -> Bench:
        """A new benchmark, or the one in `folder` when its matrix is the same.

        Raises:
            InputError: the folder holds something else.
        """
        if (folder / DATABASE).is_file():
            bench = Bench(folder)
            if bench.matrix.as_yaml() != matrix.as_yaml():
                raise InputError("output folder", str(folder), "a folder of the same matrix")
            return bench
        check_output_folder(folder)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_bytes(partial / MATRIX, matrix.as_yaml().encode())
        _write_jobs(partial / DATABASE, matrix)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
        return Bench(folder)

    @contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """A connection with one transaction, which begins by claiming the right to write."""
        with closing(connect(self.folder / DATABASE)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def reopen(self) -> None:
        """Give back what workers that are gone had claimed, and failed jobs another try."""
        with self.database() as db:
            db.execute(
                "UPDATE jobs SET state='pending', attempts=0 WHERE state IN ('running','failed')"
            )

    def claim(self, worker: str) -> Job | None:
        """The next job whose dense network is ready; None when there is none now."""
        with self.database() as db:
            row = db.execute(
                "SELECT id, kind, label, recipe FROM jobs AS job WHERE state='pending' AND "
                "(needs IS NULL OR EXISTS "
                "(SELECT 1 FROM jobs WHERE id=job.needs AND state='done')) "
                "ORDER BY rank LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET state='running', worker=?, attempts=attempts+1 WHERE id=?",
                (worker, row[0]),
            )
        return Job(row[0], row[1], row[2], Recipe.from_dict(json.loads(row[3])))

    def needs(self, job: Job) -> str | None:
        """The dense training that a job begins with."""
        with closing(connect(self.folder / DATABASE)) as db:
            row = db.execute("SELECT needs FROM jobs WHERE id=?", (job.id,)).fetchone()
        return None if row is None else row[0]

    def complete(self, job: str, result: dict[str, Any] | None, seconds: float) -> None:
        """Write a finished job's result."""
        with self.database() as db:
            db.execute(
                "UPDATE jobs SET state='done', result=?, seconds=?, progress=1 WHERE id=?",
                (json.dumps(result), seconds, job),
            )

    def fail(self, job: str, reason: str, *, final: bool = True) -> None:
        """A job raised, or its worker died; those that need it fail with it."""
        with self.database() as db:
            row = db.execute("SELECT attempts FROM jobs WHERE id=?", (job,)).fetchone()
            if not final and row[0] < ATTEMPTS:
                db.execute("UPDATE jobs SET state='pending', progress=0 WHERE id=?", (job,))
                return
            db.execute("UPDATE jobs SET state='failed', error=? WHERE id=?", (reason, job))
            db.execute(
                "UPDATE jobs SET state='failed', error=? WHERE needs=? AND state='pending'",
                (f"its dense network failed: {reason}", job),
            )

    def abandoned_by(self, worker: str) -> None:
        """A worker died: its job is tried once more."""
        with self.database() as db:
            rows = db.execute(
                "SELECT id FROM jobs WHERE state='running' AND worker=?", (worker,)
            ).fetchall()
        for (job,) in rows:
            self.fail(job, "its worker process died", final=False)

    def report_progress(self, job: str, progress: float) -> None:
        """How much of a job is done, from 0 to 1."""
        with self.database() as db:
            db.execute("UPDATE jobs SET progress=? WHERE id=?", (progress, job))

    def states(self) -> dict[str, int]:
        """How many jobs there are in each state."""
        with closing(connect(self.folder / DATABASE)) as db:
            return dict(db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())

    def running(self) -> list[tuple[str, str, float]]:
        """(id, title, progress) of the jobs under way."""
        query = "SELECT id, title, progress FROM jobs WHERE state='running' ORDER BY rank"
        with closing(connect(self.folder / DATABASE)) as db:
            return db.execute(query).fetchall()

    def failures(self) -> list[dict[str, str]]:
        """Title and reason of what failed."""
        query = "SELECT title, error FROM jobs WHERE state='failed' ORDER BY rank"
        with closing(connect(self.folder / DATABASE)) as db:
            return [{"job": title, "error": error} for title, error in db.execute(query)]

    def results(self) -> list[dict[str, Any]]:
        """A row a finished cell, in the order of the matrix."""
        query = (
            "SELECT result, seconds FROM jobs WHERE kind='cell' AND state='done' ORDER BY number"
        )
        with closing(connect(self.folder / DATABASE)) as db:
            return [{**json.loads(r), "seconds": s} for r, s in db.execute(query)]

    def cell_folder(self, job: str) -> Path:
        """Where a cell's run is."""
        return self.folder / "cells" / job

    @property
    def shared(self) -> Path:
        """Where dense trainings are."""
        return self.folder / "shared"


def connect(path: Path) -> sqlite3.Connection:
    """A connection that waits for others, with explicit transactions."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def _write_jobs(path: Path, matrix: Matrix) -> None:
    with closing(connect(path)) as db:
        db.execute("BEGIN")
        db.execute(
            "CREATE TABLE jobs (id TEXT PRIMARY KEY, number INTEGER, rank INTEGER, kind TEXT, "
            "label TEXT, title TEXT, recipe TEXT, needs TEXT, worker TEXT, "
            "state TEXT DEFAULT 'pending', attempts INTEGER DEFAULT 0, "
            "progress REAL DEFAULT 0, result TEXT, error TEXT, seconds REAL)"
        )
        for number, (job, rank, needs) in enumerate(jobs_of(matrix)):
            db.execute(
                "INSERT INTO jobs (id, number, rank, kind, label, title, recipe, needs) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (job.id, number, rank * 100_000 + number, job.kind, job.label, job.title,
                 json.dumps(job.recipe.as_dict()), needs),
            )  # fmt: skip
        db.execute("COMMIT")


def jobs_of(matrix: Matrix) -> list[tuple[Job, int, str | None]]:
    """(job, rank, id of the dense training it needs) of all dense trainings and cells.

    What others wait for ranks first, then what drives several trainings.
    """
    dense: dict[str, tuple[Job, int, str | None]] = {}
    cells: list[tuple[Job, int, str | None]] = []
    for cell in matrix.cells:
        needs = None
        if needs_dense(cell.recipe):
            needs, recipe = dense_job(cell.recipe)
            dense[needs] = (Job(needs, "dense", "dense network", recipe), 0, None)
        whole = issubclass(method_class(cell.stage.method), Procedure)
        job = Job(cell.identity, "cell", cell.label, cell.recipe)
        cells.append((job, 1 if whole else 2, needs))
    return [*dense.values(), *cells]


def title_of(label: str, recipe: Recipe) -> str:
    """Label, budget and seed."""
    budgets = [s.budget for s in recipe.stages if s.kind == "prune"]
    return ", ".join([label, *budgets, f"seed {recipe.seed}"])


def dense_job(recipe: Recipe) -> tuple[str, Recipe]:
    """Identity and recipe of the dense training that a recipe begins with."""
    task = recipe.make_task()
    settings = changed(task.training, recipe.stages[0].settings)
    return dense_identity(recipe, settings), replace(recipe, stages=recipe.stages[:1])


def result_row(label: str, recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    """What the leaderboard needs of an outcome."""
    stage = next(s for s in recipe.stages if s.kind == "prune")
    after, before = outcome.after, outcome.before
    assert after is not None
    assert before is not None
    return {
        "cell": recipe.identity(),
        "label": label,
        "method": stage.method,
        "task": f"{recipe.model} on {recipe.data}",
        "budget": stage.budget,
        "seed": recipe.seed,
        "metric": outcome.primary,
        "higher_is_better": outcome.higher_is_better,
        "quality": outcome.metrics_after[outcome.primary],
        "dense_quality": outcome.metrics_before.get(outcome.primary),
        "promise_kept": outcome.promise.kept if outcome.promise else None,
        "sparsity": 1 - after.nonzero / before.parameters,
        "parameters": after.parameters,
        "nonzero": after.nonzero,
        "macs": after.macs,
        "effective_macs": after.effective_macs,
        "bytes": after.sparse_bytes,
        "latency_ms": after.latency.median if after.latency else None,
        "dense_macs": before.macs,
        "dense_latency_ms": before.latency.median if before.latency else None,
    }
