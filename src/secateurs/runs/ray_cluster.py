"""The jobs of a benchmark on a Ray cluster; nodes need not share a disk with the driver."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateurs.errors import SecateursError
from secateurs.ray_connection import connected
from secateurs.runs.matrix import Bench, Job, result_row
from secateurs.runs.run import Run, locked
from secateurs.runs.workers import Watch, time_outcomes, train_dense
from secateurs.state import write_bytes

Files = dict[str, bytes]


@dataclass(frozen=True)
class Delivery:
    """What a node sends back: the files of a run or of a dense training, and the result row."""

    files: Files
    result: dict[str, Any] | None
    seconds: float


def run_on_ray(bench: Bench, address: str, watch: Watch = lambda bench: None) -> None:
    """Do all jobs as Ray tasks, one CPU each.

    Args:
        address: of a cluster, ``auto``, or ``local`` for one that lives as long as the call.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    with connected(address) as ray, locked(bench.folder / ".lock", "benchmark"):
        bench.reopen()
        _drive(ray, bench, watch)
        if bench.matrix.latency:
            time_outcomes(bench)


def _drive(ray: Any, bench: Bench, watch: Watch) -> None:
    """Hand out jobs as nodes become free, and write down what comes back."""
    remote = ray.remote(num_cpus=1, max_retries=1)(execute_remotely)
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    under_way: dict[Any, Job] = {}
    while True:
        while len(under_way) < at_once and (job := bench.claim("ray")) is not None:
            dense = _pack(bench.shared / needs) if (needs := bench.needs(job)) else {}
            under_way[remote.remote(job, needs, dense)] = job
        if not under_way:
            break
        done, _ = ray.wait(list(under_way), timeout=0.5)
        for reference in done:
            _receive(ray, bench, under_way.pop(reference), reference)
        watch(bench)
    watch(bench)


def _receive(ray: Any, bench: Bench, job: Job, reference: Any) -> None:
    try:
        delivery: Delivery = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, SecateursError) else error
        bench.fail(job.id, str(cause))
        return
    except ray.exceptions.RayError as error:
        bench.fail(job.id, str(error), final=False)
        return
    target = bench.shared / job.id if job.kind == "dense" else bench.cell_folder(job.id)
    _unpack(delivery.files, target)
    bench.complete(job.id, delivery.result, delivery.seconds)


def execute_remotely(job: Job, needs: str | None, dense: Files) -> Delivery:
    """On a node: do one job in a folder of its own."""
    import torch

    torch.set_num_threads(1)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        shared, cell = Path(name) / "shared", Path(name) / "cell"
        if needs:
            _unpack(dense, shared / needs)
        if job.kind == "dense":
            train_dense(job, shared, ())
            return Delivery(_pack(shared / job.id), None, time.perf_counter() - begin)
        run = Run.create(job.recipe, cell, shared)
        row = result_row(job.label, run.recipe, run.execute())
        return Delivery(_pack(cell), row, time.perf_counter() - begin)


def _pack(folder: Path) -> Files:
    """The files of a folder by relative name, locks left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def _unpack(files: Files, folder: Path) -> None:
    """Write files; the one that marks the folder as finished goes last."""
    for name in sorted(files, key=lambda n: n.endswith("outcome.json")):
        write_bytes(folder / name, files[name])
