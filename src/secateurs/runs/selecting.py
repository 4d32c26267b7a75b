"""A selection from files to a file: where its unfinished work lies, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from secateurs.api import select
from secateurs.errors import InputError, described, library, require
from secateurs.registry import create, options_as_dict
from secateurs.selection.embeddings import Embeddings
from secateurs.selection.files import Names, open_files
from secateurs.selection.result import SUFFIX, Selection
from secateurs.state import write_json
from secateurs.task import Task
from secateurs.workspace import Workspace
from secateurs.zoo.datasets import load_data, names_data

MARK = "selection.json"
"""What is in a folder of unfinished work, so that nothing else is ever deleted."""


def select_files(
    *,
    source: Path,
    method: str,
    keep: float,
    out: Path,
    only_kept: bool,
    report: Path | None,
    images: str | None,
    text: str | None,
    embedding: str | None,
    id_column: str | None,
    label: str | None,
    target: Path | None,
    model: str | None,
    forbid_empty_classes: bool,
    ray: str | None,
    seed: int,
    threads: int | None,
    as_json: bool,
    options: dict[str, Any],
    watch: Callable[[bool], AbstractContextManager[list[Any]]],
) -> dict[str, Any]:
    """Select, write the file and the page, and give the facts as plain values.

    What is finished lies in a hidden folder beside `out` until all is; its name follows the data
    and the options, so the same call goes on and another begins anew.
    """
    library("pyarrow.parquet", "data")  # what the answer is written with
    check_out(out)
    chosen = create(method, options)
    chosen.accept(f"keep={keep}")
    names = Names(embedding, id_column, label)
    task = _task(chosen, model, str(source), seed)
    rows = open_files(source, names) if task is None else _training_set(task)
    aim = None if target is None else open_files(target, names)
    samples = rows.samples
    if report is not None:
        from secateurs.report.inspection import check_page
        from secateurs.report.pictures import check_pictures, shows_embeddings
        from secateurs.report.texts import check_texts

        check_page(report)
        if images is not None and not shows_embeddings(rows, images) and names_data(images):
            samples, images = _samples(images, rows), None
        check_pictures(rows, images)
        check_texts(rows, text)
    if threads is not None:
        import torch

        require(threads >= 1, "threads", threads, "at least 1")
        torch.set_num_threads(threads)
    told = {
        "method": method, "options": options_as_dict(chosen), "keep": keep, "seed": seed,
        "columns": vars(names), "source": _fingerprint(rows), "target": aim and _fingerprint(aim),
        "model": model, "data": None if model is None else str(source),
    }  # fmt: skip
    folder = work_folder(out, told)
    try:
        with watch(as_json) as listeners:
            selection = select(
                rows, chosen, keep, task, target=aim, seed=seed, ray=ray,
                forbid_empty_classes=forbid_empty_classes, work=Workspace(folder, listeners),
            )  # fmt: skip
            selection.write(out, only_kept=only_kept)
            if report is not None:
                selection.source.samples = samples
                _write_page(report, selection, source.name, images, text)
    except InputError:
        shutil.rmtree(folder)  # nothing would go on from it
        raise
    shutil.rmtree(folder)
    return {**selection.as_dict(), "out": str(out)}


def _task(method: Any, model: str | None, data: str, seed: int) -> Task | None:
    """The task of a model on the data set whose rows are selected, where there is a model."""
    trains = set(method.required) & {"batches", "training", "fresh-model"}
    if model is None:
        require(not trains, "model", None, f"--model, as {method.name} trains under these options")
        return None
    from secateurs.zoo.catalog import make_task

    return make_task(model, data, seed=seed)


def _training_set(task: Task) -> Embeddings:
    """Ids and labels of the samples that a task trains on."""
    from secateurs.selection.sources import as_embeddings

    return as_embeddings(task.training_loader().dataset)


def check_out(out: Path) -> None:
    """Raise `InputError` unless `out` can become a Parquet file."""
    require(out.suffix == SUFFIX, "out", str(out), f"a file that ends in {SUFFIX}")
    parent = next(p for p in out.absolute().parents if p.exists())
    require(parent.is_dir(), "out", str(out), described("a file in a folder that can be written"))


def _samples(data: str, rows: Embeddings) -> Any:
    """The training samples of a data set, of which the rows are the embeddings."""
    samples: Any = load_data(data).train
    told = described(f"{data}, which has {len(samples)} training samples")
    require(len(samples) == rows.rows, "images", told, f"one with {rows.rows}, a sample a row")
    return samples


def _write_page(
    path: Path, selection: Selection, title: str, images: str | None, text: str | None
) -> None:
    from secateurs.report.selection import write_selection
    from secateurs.runs.run import environment

    write_selection(
        path, selection, title=title, images=images, text=text, environment=environment()
    )


def _fingerprint(source: Embeddings) -> list[str]:
    return [shard.fingerprint() for shard in source.shards]


def work_folder(out: Path, told: dict[str, Any]) -> Path:
    """A hidden folder beside `out` for unfinished work, whose name follows what is `told` of it;
    those of other work for the same file are removed."""
    identity = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    folder = out.parent / f".{out.name}.{identity[:16]}"
    for other in out.parent.glob(f".{out.name}.*"):
        if other != folder and (other / MARK).is_file():
            shutil.rmtree(other)
    write_json(folder / MARK, told)
    return folder
