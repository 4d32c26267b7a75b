"""Prune, combine, augment: a few real images a class, several on one canvas, with hard labels.

Paper: "Rethinking Large-scale Dataset Compression: Shifting Focus From Labels to Images", arXiv
2502.06434 (2025). It is not about principal components.

    Prune    score all samples; of every class the m = g² · ipc easiest stay
    Combine  rank r of a class goes, whole, to tile ⌊r / ipc⌋ of its canvas r mod ipc
    Augment  training draws one tile of a canvas and crops inside it, never across

Easy means a small EL2N, ‖softmax(z) − onehot(y)‖₂ at an early checkpoint, the mean over `runs`
trainings. Without easiness to go by, name a column of scores (`score`; higher means harder). One
view of every canvas is an epoch: ipc · classes samples, as of uncombined images.

`keep` is the share of the source's samples that are on canvases, g² · ipc · classes / rows, to
the nearest ipc: ``keep = 4 * 10 * 100 / rows`` gives 10 canvases of 4 to each of 100 classes.

    kept = secateurs.select(data, "pca-dataset-compression", 0.01, task)
    canvases = PruneCombineAugment(canvas=64).combine(kept)
    canvases.write("small")                        # PNG and a manifest
    training = canvases.with_transform(TileCrop(grid=2))

Decided here: the paper's code was not public. g = 2 is RDED's, as is the order of ranks. The paper
takes as EL2N what its neighbours take; ours is an early checkpoint of several trainings, as EL2N
was published. Sides are resized with antialiasing, images that are no squares are cut to their
middle. Where a class has too few samples, all classes get fewer canvases and the answer says so
(``lower``), its samples are used again (``repeat``), or it is refused.

Measured (Fashion-MNIST, 5 stored images a class, hard labels, three seeds; tests/replicas):
distilled images 38.0 %, random ones 57.8, easy ones 58.1, easy ones in tiles 62.8, random ones in
tiles 70.1; crops across tiles 16.5. Easy images beat random ones at 1 a class (51.4 to 39.1) and
lose at 20 (63.2 to 69.8): try ``order=random`` as well. Tiles pay where one still shows its object.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from secateurs.errors import described, require
from secateurs.method import Selector
from secateurs.outcome import Promise
from secateurs.parts.budgets import Budget
from secateurs.registry import Paper, Tags, register
from secateurs.selection.canvases import Canvases
from secateurs.selection.dynamics import early_scores, read_el2n
from secateurs.selection.embeddings import Array, Embeddings
from secateurs.selection.result import Selection
from secateurs.selection.score_table import Order, ScoreTable, towards
from secateurs.selection.tiles import Resize, check_grid, composed, pixels_of
from secateurs.settings import option
from secateurs.task import Task
from secateurs.training.subset import training_rows
from secateurs.workspace import Workspace

EL2N = "el2n"


@register(
    "pca-dataset-compression",
    paper=Paper(
        "Rethinking Large-scale Dataset Compression: Shifting Focus From Labels to Images",
        "arXiv",
        2025,
        "2502.06434",
    ),
    tags=Tags("S", "sample+group", "PBT", "loss", recovery="none"),
    budgets=("keep",),
    aliases=("prune-combine-augment",),
)
@dataclass(frozen=True)
class PruneCombineAugment(Selector):
    """Few easy images a class, several on one canvas; training crops inside one of them."""

    needs = ("labels",)

    grid: int = option(2, "images along a side of a canvas; 1 combines nothing", "images")
    canvas: int = option(224, "side of a canvas", "pixels")
    order: Order = option("easy", "which samples of a class stay: easy, hard, or any")
    score: str | None = option(
        None,
        "column that says how hard a sample is; none: el2n, else measured on the task, else the "
        "only one",
    )
    runs: int = option(10, "trainings over which EL2N is averaged, if measured", "trainings")
    epoch: float | None = option(
        None, "of the early checkpoint; none: a twentieth of the training", "epochs"
    )
    resize: Resize = option("bilinear", "how images become tiles; bilinear is antialiased")
    short_class: Literal["lower", "repeat", "refuse"] = option(
        "lower", "where a class has too few samples: fewer of all, some twice, or an error"
    )

    def __post_init__(self) -> None:
        check_grid(self.grid, self.canvas)
        require(self.runs >= 1, "runs", self.runs, "at least 1")
        require(self.epoch is None or self.epoch > 0, "epoch", self.epoch, "above 0, or none")

    def select(
        self,
        source: Embeddings,
        keep: Budget,
        task: Task | None = None,
        *,
        target: Embeddings | None = None,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Selection:
        names, classes = source.classes()
        require(isinstance(names[0], int), "labels", names[0], "whole numbers, a class each")
        hardness = self._hardness(source, task, seed, work or Workspace())
        scores = [
            towards(h, partial(source.ids_of, n), self.order, seed) for n, h in enumerate(hardness)
        ]
        table = ScoreTable(scores, source.ids_of, classes)
        sizes = table.sizes(len(names))
        unit, wanted = self.grid**2, keep.kept_samples(source.rows)
        ipc = max(1, round(wanted / (unit * len(names))))
        short = [f"{c} ({s})" for c, s in zip(names, sizes, strict=True) if s < unit * ipc]
        notes = []
        if short:
            told = described(
                f"{unit * ipc} samples a class, more than class {', '.join(short)} has"
            )
            require(self.short_class != "refuse", "keep", told, "a smaller fraction")
            if self.short_class == "lower":
                ipc = int(sizes.min()) // unit
                told = described(f"{sizes.min()} samples in class {names[int(sizes.argmin())]}")
                require(ipc >= 1, "grid", told, f"at least {unit} in each, or short_class=repeat")
                notes.append(f"{ipc} canvases a class: more than that, class {short[0]} lacks")
            else:
                notes.append(f"samples are used again of class {', '.join(short)}")
        kept = table.largest_per_group(np.minimum(unit * ipc, sizes))
        made = Selection.of(source, kept, scores, notes=notes)
        made.tables["canvases"] = [
            {"a class": ipc, "classes": len(names), "images each": unit, "side": self.canvas}
        ]
        reached, step = made.kept / source.rows, unit * len(names) / source.rows
        made.promise = Promise("keep", keep.value, reached, step)
        return made

    def _hardness(
        self, source: Embeddings, task: Task | None, seed: int, work: Workspace
    ) -> list[Array]:
        """A number a sample, a shard each; higher means harder."""
        name = self.score or (EL2N if EL2N in source.columns else None)
        if name is None and task is None and len(source.numeric) == 1:
            name = source.numeric[0]
        if name is not None:
            return source.column(name)
        accepted = "a column of scores, score=COLUMN, or a task on which EL2N is measured"
        require(task is not None, "scores", described("none that can be told apart"), accepted)
        assert task is not None
        told = described(f"{training_rows(task)} training samples")
        require(training_rows(task) == source.rows, "task", told, f"the {source.rows} rows")
        found = early_scores(
            task, read_el2n, runs=self.runs, epoch=self.epoch, seed=seed, work=work.child(EL2N)
        )
        return list(np.split(found, source.offsets[1:-1]))

    def combine(self, selection: Selection, samples: Any = None) -> Canvases:
        """The canvases of a selection.

        Args:
            selection: of this very method and its options.
            samples: the data set by row number; that of the selection's source by default.

        Raises:
            InputError: there is none, its samples are no pictures, or the selection is not one
                of equally many samples a class.
        """
        samples = selection.source.samples if samples is None else samples
        require(samples is not None, "samples", None, "the data set of the selected rows")
        ipc, ranked = self._ranked(selection)
        images, labels, sources = [], [], []
        for label, rows in ranked.items():
            for first in range(ipc):
                own = rows[first::ipc]
                pictures = [pixels_of(picture(samples[row])) for row in own]
                images.append(composed(pictures, self.grid, self.canvas, self.resize))
                labels.append(label)
                sources.append(tuple(selection.id_of(row) for row in own))
        return Canvases(torch.stack(images), torch.tensor(labels), self.grid, tuple(sources))

    def _ranked(self, selection: Selection) -> tuple[int, dict[int, list[int]]]:
        """Canvases a class, and of every class its g² · ipc rows from the best on."""
        source, unit = selection.source, self.grid**2
        names, classes = source.classes()
        rows, scores = selection.indices, np.concatenate(selection.scores)[selection.indices]
        label, ids = np.concatenate(classes)[rows], selection.ids
        order = np.lexsort((ids, np.negative(scores, dtype=np.float64), label))
        sizes = np.bincount(label, minlength=len(names))
        most = int(sizes.max())
        even = most % unit == 0 and (self.short_class == "repeat" or int(sizes.min()) == most)
        told = described(f"{sizes.min()} to {most} samples a class")
        require(even and int(sizes.min()) > 0, "selection", told, f"as many of each, {unit} times")
        starts = np.cumsum(sizes) - sizes
        ranked = {
            name: [int(rows[order[start + rank % size]]) for rank in range(most)]
            for name, start, size in zip(names, starts, sizes, strict=True)
        }
        return most // unit, ranked


def picture(sample: Any) -> Any:
    """The picture of a sample: itself, the first of a pair, or that of a mapping."""
    if isinstance(sample, dict):
        return next((sample[k] for k in ("image", "img", "pixels") if k in sample), sample)
    return sample[0] if isinstance(sample, tuple | list) else sample
