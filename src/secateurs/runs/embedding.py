"""From a data set and an encoder to a file of embeddings that `secateurs select` reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.deploy.delta_file import base_hash
from secateurs.devices import default_device
from secateurs.errors import InputError, described, library, require
from secateurs.runs.selecting import check_out, work_folder
from secateurs.selection.features import Take, read_rows
from secateurs.state import Tree
from secateurs.task import Task
from secateurs.training.subset import task_on, training_rows
from secateurs.workspace import Workspace
from secateurs.zoo.catalog import task_of
from secateurs.zoo.datasets import Data, columns_of, load_data
from secateurs.zoo.models import ModelSource, has_weights, load_model
from secateurs.zoo.pretrained import SentenceEncoder

PIXELS = "pixels"
ROWS = 1 << 10
"""Samples that make a finished step, and a row group of the file."""

Part = Literal["train", "test"]


def embed(
    *,
    data: str,
    encoder: str,
    out: Path,
    part: Part,
    take: Take | None,
    batch_size: int,
    threads: int | None,
    as_json: bool,
    watch: Callable[[bool], AbstractContextManager[list[Any]]],
) -> dict[str, Any]:
    """Embed the samples of a data set, write the file, and give the facts as plain values.

    Columns are ``id``, ``label`` where there is one, ``embedding``, and what else the data set
    tells of its samples. What is finished lies in a hidden folder beside `out` until all is, so
    the same call goes on.

    Args:
        data: see `secateurs.zoo.datasets.load_data`.
        encoder: ``pixels``, or a model with weights.
        part: training or held-out samples.
        take: what of the model is the embedding; None takes the outputs of sentence encoders,
            and features of other models.

    Raises:
        InputError: unknown names, a model without weights or without linear layers, or one that
            does not take this data.
    """
    library("pyarrow.parquet", "data")  # what the file is written with
    check_out(out)
    if threads is not None:
        require(threads >= 1, "threads", threads, "at least 1")
        torch.set_num_threads(threads)
    found = load_data(data)
    task = _task(found, encoder, batch_size)
    if part == "test":
        task = replace(task, train=task.evaluate)
    model = task.starting_model(0).to(default_device())
    taken: Take = take or _usual(encoder, model)
    _try(task, model, data, encoder)
    rows = training_rows(task)
    narrow = columns_of(task.training_loader().dataset)
    folder = work_folder(out, {
        "data": data, "part": part, "rows": rows, "encoder": encoder, "take": taken,
        "weights": base_hash(model.state_dict()), "batch_size": batch_size,
    })  # fmt: skip
    try:
        with watch(as_json) as listeners:
            parts = _Parts(task, model, taken, rows, Workspace(folder, listeners))
            labelled = _write(folder / out.name, parts, narrow)
            os.replace(folder / out.name, out)
    except InputError:
        shutil.rmtree(folder)  # nothing would go on from it
        raise
    shutil.rmtree(folder)
    return {
        "data": data, "part": part, "encoder": encoder, "take": taken, "rows": rows,
        "width": parts.width, "labels": labelled, "columns": sorted({*narrow} - {"id", "label"}),
        "out": str(out),
    }  # fmt: skip


def _task(found: Data, encoder: str, batch_size: int) -> Task:
    """The data with the encoder as its model, with its weights."""
    if encoder == PIXELS:
        example = found.example()
        good = isinstance(example, Tensor) and example.is_floating_point()
        told = described(f"{PIXELS} of {found.name}, whose samples are no arrays of numbers")
        require(good, "encoder", told, "a model with weights")
        source = ModelSource(nn.Flatten, None, True, PIXELS, found.example, nn.Flatten)
        return task_of(source, found, batch_size=batch_size)
    accepted = f"{PIXELS}, or a model with weights, such as zoo:convnet@FILE.safetensors"
    require(has_weights(encoder), "encoder", encoder, accepted)
    return task_of(load_model(encoder, data=found), found, batch_size=batch_size)


def _usual(encoder: str, model: nn.Module) -> Take:
    """Encoders give embeddings; classifiers have them before their last layer."""
    return "outputs" if encoder == PIXELS or isinstance(model, SentenceEncoder) else "features"


def _try(task: Task, model: nn.Module, data: str, encoder: str) -> None:
    """Refuse a model that does not take the data, by one sample."""
    try:
        with torch.no_grad():
            task.forward(model.eval(), task.example_inputs)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError("data", data, f"what {encoder} takes ({reason})") from None


@dataclass
class _Parts:
    """The embeddings, `ROWS` samples after the others; each part is kept until all are there."""

    task: Task
    model: nn.Module
    take: Take
    rows: int
    work: Workspace
    width: int = 0

    def __iter__(self) -> Iterator[tuple[slice, Tree]]:
        with self.work.progress("embed", self.rows) as advance:
            for number, first in enumerate(range(0, self.rows, ROWS)):
                last = min(first + ROWS, self.rows)
                own = partial(self._read, range(first, last))
                read = self.work.once(f"embedded-{number:05}", own)
                self.width = read["vectors"].shape[1]
                yield slice(first, last), read
                advance(last)

    def _read(self, own: range) -> Tree:
        return read_rows(task_on(self.task, own), self.model, self.take)


def _write(unfinished: Path, parts: _Parts, narrow: Mapping[str, Sequence[Any]]) -> bool:
    """Write the file; whether there are labels."""
    pyarrow = library("pyarrow", "data")
    parquet = library("pyarrow.parquet", "data")
    writer, labelled = None, False
    for own, read in parts:
        vectors = read["vectors"].numpy()
        table: dict[str, Any] = {name: list(values[own]) for name, values in narrow.items()}
        table.setdefault("id", np.arange(own.start, own.stop))
        if "labels" in read:
            table.setdefault("label", read["labels"].numpy())
        labelled = "label" in table
        flat = pyarrow.array(vectors.reshape(-1))
        table["embedding"] = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        rows = pyarrow.table(table)
        writer = writer or parquet.ParquetWriter(unfinished, rows.schema)
        writer.write_table(rows)
    if writer is not None:
        writer.close()
    return labelled
