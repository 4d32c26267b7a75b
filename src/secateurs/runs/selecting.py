"""A selection from files to a file: where its unfinished work lies, and what it leaves behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from secateurs.api import select
from secateurs.errors import InputError, described, library, require
from secateurs.method import Selector
from secateurs.registry import create
from secateurs.selection.embeddings import Embeddings
from secateurs.selection.files import Names, open_files
from secateurs.selection.identity import identity, told_of_selection
from secateurs.selection.result import SUFFIX, Selection
from secateurs.state import write_json
from secateurs.task import Task
from secateurs.workspace import Workspace
from secateurs.zoo.datasets import load_data, names_data
from secateurs.zoo.specs import parse_spec

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
    and the options, so the same call goes on and another begins anew. A refusal leaves it there,
    unless nothing was finished.
    """
    library("pyarrow.parquet", "data")  # what the answer is written with
    check_out(out)
    if report is not None:
        _check_place("report", report)
    chosen = create(method, options)
    assert isinstance(chosen, Selector)  # the command line has seen to it
    chosen.accept(keep)
    names = Names(embedding, id_column, label)
    task = _task(chosen, model, str(source), seed)
    rows = open_files(source, names) if task is None else _training_set(task)
    aim = None if target is None else open_files(target, names)
    read = [*_places(source, rows, model), *([] if aim is None else _places(target, aim, None))]
    _check_apart("out", out, read)
    samples = rows.samples
    if report is not None:
        from secateurs.report.inspection import check_page
        from secateurs.report.pictures import check_paths, check_pictures, shows_embeddings
        from secateurs.report.texts import check_texts

        check_page(report)
        _check_apart("report", report, read)
        if images is not None and not shows_embeddings(rows, images) and names_data(images):
            samples, images = _samples(images, rows), None
        check_pictures(rows, images)
        check_paths(rows, images)
        check_texts(rows, text)
    if threads is not None:
        import torch

        require(threads >= 1, "threads", threads, "at least 1")
        torch.set_num_threads(threads)
    told = {
        **told_of_selection(chosen, chosen.accept(keep), seed, rows, aim),
        "columns": vars(names), "model": model, "data": None if model is None else str(source),
    }  # fmt: skip
    folder = work_folder(out, told)
    try:
        with watch(as_json) as listeners:
            selection = select(
                rows, chosen, keep, task, target=aim, seed=seed, ray=ray,
                work=Workspace(folder, listeners),
            )  # fmt: skip
            if forbid_empty_classes:
                _check_classes(selection)
            selection.write(out, only_kept=only_kept)
            if report is not None:
                selection.source.samples = samples
                _write_page(report, selection, source.name, images, text)
    except InputError:
        if not any(folder.rglob("*.safetensors")):  # else the same command, mended, goes on
            shutil.rmtree(folder)
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
    _check_place("out", out)


def _check_place(argument: str, path: Path) -> None:
    """Refuse a file that could not be written, by writing one beside it."""
    told = described("a file in a folder that can be written")
    parent = next(p for p in path.absolute().parents if p.exists())
    require(parent.is_dir() and not path.is_dir(), argument, str(path), told)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(argument, str(path), f"{told} ({error.strerror})") from None


def _places(given: Path | None, rows: Embeddings, model: str | None) -> Iterator[Path]:
    """The files and the folder that rows are read from, without links."""
    for shard in rows.shards:
        if isinstance(path := getattr(shard, "path", None), Path):
            yield path.resolve()
    name = str(given) if model is None else parse_spec(str(given), "data").name
    if name and Path(name).exists():
        yield Path(name).resolve()


def _check_apart(argument: str, path: Path, read: Sequence[Path]) -> None:
    """Refuse a file that is read, or that would be among those that are."""
    own = path.resolve()
    for place in read:
        free = own != place and place not in own.parents
        require(free, argument, str(path), f"a file apart from {place}, which is read")


def _check_classes(selection: Selection) -> None:
    try:
        selection.check_classes(forbid=True)
    except InputError as error:
        also = "or the same command without --forbid-empty-classes, which goes on from what is done"
        raise InputError(error.argument, error.value, f"{error.accepted}, {also}") from None


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


def work_folder(out: Path, told: dict[str, Any]) -> Path:
    """A hidden folder beside `out` for unfinished work, whose name follows what is `told` of it;
    those of other work for the same file are removed."""
    folder = out.parent / f".{out.name}.{identity(told)}"
    for other in out.parent.glob(f".{out.name}.*"):
        if other != folder and (other / MARK).is_file():
            shutil.rmtree(other)
    write_json(folder / MARK, told)
    return folder
