"""Beyond neural scaling laws: rank every sample once, keep the top; many metrics, either end.

Paper: "Beyond neural scaling laws: beating power law scaling via data pruning", NeurIPS 2022, arXiv
2206.14486. Each metric gives a sample a score; higher is harder, or less redundant:

    prototypes             1 − cos(e, nearest centre), k-means in a self-supervised embedding
    supervised-prototypes  1 − cos(e, mean of the own class)
    el2n, grand, margin, forgetting, el2n-online, memorization, influence-max,
    influence-sum-abs      out of trainings of the task, see `secateurs.selection.dynamics`
    column                 a column of scores that somebody else made
    random                 the baseline to beat

and the n = round(keep · N) hardest stay, or the easiest. Which end depends on how much data there
is: with much, the hard ones are worth more, with little the easy ones; its theory is
`secateurs.analysis.teacher_student`. ``order=auto`` finds out: on a random half of the rows both
ends are selected and trained on, and the other half judges. Half the rows are less data, so it
leans towards easy.

Classes are kept from dying out: with a floor b, every class first gets its ⌊b n / C⌋ hardest (all,
if it has fewer), the rest goes by score alone. 0 is no floor, 1 the same number for every class.

Decided here: the number of clusters is 1000, as the card remembers it for ImageNet, or a fortieth
of the rows where that is less. The floor is the authors' 0.5 where there are labels and 0 where
there are none. `margin` stands for the paper's ensemble active learning, whose public file is a
list of kept samples; it is the mean over the runs of the two largest probabilities' difference,
negated. The authors' two other lists (DDD, active learning) are imported with ``column``. Metrics
need different things: the class says what the default needs, `required` what an object does.

Measured (tests/replicas/test_neural_scaling.py; Fashion-MNIST, 8000 images, an MLP, equal updates,
3 seeds), test accuracy of random, hard and easy EL2N: one image a class 46.3, 16.6, 55.6; without a
floor, 2 % 72.8, 14.3, 15.6; with it, 50 % 84.2, 84.1, 78.2 and 80 % 85.1, 85.5, 82.6; all images
85.5. So little data wants easy samples (of every class), much data hard ones, by a little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch

from secateurs.errors import InputError, described, require
from secateurs.method import Selector
from secateurs.parts.budgets import Budget
from secateurs.parts.quotas import box_quotas, quota_floor
from secateurs.registry import Paper, Tags, register
from secateurs.selection import dynamics
from secateurs.selection.embeddings import Array, Embeddings
from secateurs.selection.group_means import group_means
from secateurs.selection.kmeans import Engine, KMeans
from secateurs.selection.result import Selection
from secateurs.selection.score_table import Order, ScoreTable, hashed, random_scores, towards
from secateurs.settings import option
from secateurs.state import Tree
from secateurs.task import Task
from secateurs.training.loop import fit_once
from secateurs.training.order import mix
from secateurs.training.subset import in_order, task_on, training_rows
from secateurs.workspace import Workspace

Metric = Literal[
    "prototypes", "supervised-prototypes", "el2n", "el2n-online", "grand", "margin",
    "forgetting", "memorization", "influence-max", "influence-sum-abs", "column", "random",
]  # fmt: skip
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "prototypes": ("embeddings",),
    "supervised-prototypes": ("embeddings", "labels"),
    "column": ("scores",),
}
TRAINED = frozenset(get_args(Metric)[2:9])
CLUSTERS = 1000
ROWS_A_CLUSTER = 40
FLOOR = 0.5
HALVES = 0x5EED


@register(
    "neural-scaling-data-pruning",
    paper=Paper(
        "Beyond neural scaling laws: beating power law scaling via data pruning",
        "NeurIPS",
        2022,
        "2206.14486",
    ),
    tags=Tags("S", "sample", "PBT", "sim+loss+sens", supervision="self+sup", recovery="none"),
    budgets=("keep",),
    aliases=("neural-scaling",),
)
@dataclass(frozen=True)
class NeuralScaling(Selector):
    """The hardest samples of a metric stay, or the easiest, with a floor under every class."""

    metric: Metric = option("prototypes", "what makes a sample hard")
    order: Literal["hard", "easy", "auto"] = option(
        "hard", "the end that stays; auto trains on both ends of one half, and asks the other"
    )
    class_floor: float | None = option(
        None, "share of an equal quota that every class gets; none: 0.5 if there are labels"
    )
    clusters: int | None = option(
        None, "of prototypes; none: 1000, or a fortieth of the rows if that is less", "clusters"
    )
    spherical: bool = option(
        True, "prototypes by direction; false: by distance, of embeddings as they are"
    )
    iterations: int = option(100, "of k-means on its sample, at most", "iterations")
    points: int = option(256, "rows of the sample that k-means is fitted on, a cluster", "rows")
    passes: int = option(0, "of k-means over all rows, after that", "passes")
    engine: Engine = option("auto", "of k-means: faiss, torch, or faiss where it is installed")
    column: str | None = option(None, "of column: its name; higher is harder")
    runs: int | None = option(
        None,
        "trainings; none: 10, or 1 for forgetting and el2n-online, 2000 for memorization "
        "and influence",
        "trainings",
    )
    epoch: float | None = option(
        None,
        "of the early checkpoint; none: a twentieth of the training (10 of 200), at least 1",
        "epochs",
    )
    presentations: int = option(10, "of el2n-online: epochs that are summed", "epochs")
    last_layer: bool = option(True, "of grand: of the last layer only; false: of all weights")
    never_learned: dynamics.NeverLearned = option(
        "inf", "of forgetting: what samples have that were never right"
    )
    ratio: float = option(0.7, "of memorization and influence: share that a training gets")

    def __post_init__(self) -> None:
        floor = self.class_floor
        require(floor is None or 0 <= floor <= 1, "class_floor", floor, "a share in [0, 1]")
        for name in ("clusters", "runs"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or none")
        many = self.metric not in ("memorization", "influence-max", "influence-sum-abs")
        require(many or self.runs != 1, "runs", self.runs, f"at least 2, for {self.metric}")
        for name in ("points", "presentations"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("iterations", "passes"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.epoch is None or self.epoch > 0, "epoch", self.epoch, "above 0, or none")
        require(0 < self.ratio < 1, "ratio", self.ratio, "a share in (0, 1)")
        require((self.metric == "column") == (self.column is not None), "column", self.column,
                "the name of a column with metric=column, else none")  # fmt: skip

    @property
    def required(self) -> tuple[str, ...]:
        found = _NEEDS.get(self.metric, ())
        if self.metric in TRAINED or self.order == "auto":
            found += ("training", "fresh-model")
        return (*found, "labels") if self.class_floor and "labels" not in found else found

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
        work = work or Workspace()
        wanted = keep.kept_samples(source.rows)
        if task is not None and "training" in self.required:
            told = described(f"{source.rows} rows")
            rows = training_rows(task)
            require(rows == source.rows, "source", told, f"the {rows} of the training set")
        found = self._scored(source, wanted, task, seed, work)
        floors = _Floors.of(source, self._floor(source))
        order, ends = self._end(source, found.hardness, floors, keep, task, seed, work)
        scores = _towards(source, found.hardness, order, seed)
        made = Selection.of(
            source, floors.best(source, scores, wanted), scores,
            clusters=found.clusters, distances=found.distances,
        )  # fmt: skip
        made.notes += found.notes
        if ends:
            made.tables["ends"] = ends
            made.notes.append(f"the {order} ones were kept: they were the better half to train on")
        return made

    def _floor(self, source: Embeddings) -> float:
        if self.class_floor is None:
            return FLOOR if source.labelled else 0.0
        return self.class_floor

    def _scored(
        self, source: Embeddings, wanted: int, task: Task | None, seed: int, work: Workspace
    ) -> _Scored:
        own = work.child(self.metric)
        if self.metric == "prototypes":
            return self._prototypes(source, wanted, seed, own)
        if self.metric == "supervised-prototypes":
            return _Scored(_class_distances(source, own))
        if self.metric == "column":
            assert self.column is not None
            return _Scored(source.column(self.column))
        if self.metric == "random":
            shards = range(len(source.shards))
            return _Scored([random_scores(source.ids_of(n), seed) for n in shards])
        assert task is not None
        scores, notes = self._trained(task, seed, own)
        return _Scored(np.split(scores, source.offsets[1:-1]), notes=notes)

    def _prototypes(self, source: Embeddings, wanted: int, seed: int, work: Workspace) -> _Scored:
        clusters = self.clusters
        if clusters is None:
            clusters = max(1, min(CLUSTERS, source.rows // ROWS_A_CLUSTER))
        means = KMeans(clusters, self.iterations, self.points, self.passes, self.spherical,
                       self.engine)  # fmt: skip
        parts = means.assign(source, means.fit(source, seed=seed, work=work), work)
        distances = [part["distance"].numpy() for part in parts]
        own = [part["cluster"].numpy() for part in parts]
        return _Scored([d.astype(np.float64) for d in distances], own, distances)

    def _trained(self, task: Task, seed: int, work: Workspace) -> tuple[Array, list[str]]:
        """Scores of the training set, and what a reader must know of them."""
        shared: dict[str, Any] = {"seed": seed, "work": work}
        readings: Mapping[str, dynamics.Reading] = {
            "el2n": dynamics.read_el2n,
            "margin": dynamics.read_margin,
            "grand": dynamics.read_last_layer_grand if self.last_layer else dynamics.read_grand,
        }
        if self.metric in readings:
            return dynamics.early_scores(
                task, readings[self.metric], runs=self.runs or 10, epoch=self.epoch, **shared
            ), []
        if self.metric == "el2n-online":
            return dynamics.online_el2n_scores(
                task, runs=self.runs or 1, epochs=self.presentations, **shared
            ), []
        if self.metric == "forgetting":
            scores = dynamics.forgetting_scores(
                task, runs=self.runs or 1, never_learned=self.never_learned, **shared
            )
            return scores, _note(np.isinf(scores), "samples were never learned, hence hardest")
        found = dynamics.subset_runs(task, runs=self.runs or 2000, ratio=self.ratio, **shared)
        counted = found.memorization()
        notes = _note(~counted.known, "samples were in all trainings or in none, and score 0")
        if self.metric == "memorization":
            return counted.scores(), notes
        kind: dynamics.Influence = "max" if self.metric == "influence-max" else "sum-abs"
        notes.append("influence looked at the labels of task.evaluate: judge by other samples")
        return dynamics.influences(found.members, found.tests, kind), notes

    def _end(
        self,
        source: Embeddings,
        hardness: Sequence[Array],
        floors: _Floors,
        keep: Budget,
        task: Task | None,
        seed: int,
        work: Workspace,
    ) -> tuple[Order, list[dict[str, Any]]]:
        """Which end stays, and what was tried."""
        if self.order != "auto":
            return self.order, []
        assert task is not None
        half = [
            hashed(source.ids_of(n), mix(seed, HALVES)) < np.uint64(1 << 63)
            for n in range(len(source.shards))
        ]
        mask = np.concatenate(half)
        told = described(f"{source.rows} rows")
        require(0 < mask.sum() < source.rows, "source", told, "more, for order=auto to halve")
        count = keep.kept_samples(int(mask.sum()))
        judge = in_order(task_on(task, torch.from_numpy(~mask)).training_loader())
        ends: tuple[Order, ...] = ("hard", "easy")
        tried = []
        for order in ends:
            scores = [
                np.where(there, s, np.nan)
                for there, s in zip(half, _towards(source, hardness, order, seed), strict=True)
            ]
            chosen = np.concatenate(floors.best(source, scores, count))

            def train(chosen: Array = chosen, order: Order = order) -> Tree:
                model = task.fresh_model(seed)
                own = task_on(task, torch.from_numpy(chosen))
                fit_once(model, own, task.training, seed=seed, work=work, name=f"auto-{order}")
                return dict(task.measure(model, judge))

            tried.append({"order": order, "kept": count,
                          **work.once(f"auto-{order}-measured", train)})  # fmt: skip
        sign = 1 if task.higher_is_better else -1
        best = max(tried, key=lambda record: sign * float(record[task.primary]))
        found: Order = "hard" if best["order"] == "hard" else "easy"
        return found, tried


@dataclass(frozen=True)
class _Scored:
    """Hardness of every row, a shard each, and where it comes from."""

    hardness: Sequence[Array]
    clusters: list[Array] | None = None
    distances: list[Array] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Floors:
    """What every class gets before scores alone decide.

    Attributes:
        share: b, of an equal quota.
        classes: how many there are.
        codes: of every shard the class of its rows.
    """

    share: float
    classes: int
    codes: Sequence[Array] | None

    @staticmethod
    def of(source: Embeddings, share: float) -> _Floors:
        if share == 0:
            return _Floors(0.0, 1, None)
        names, codes = source.classes()
        return _Floors(share, len(names), codes)

    def best(self, source: Embeddings, scores: Sequence[Array], count: int) -> list[Array]:
        """Bool arrays, True at `count` rows; rows whose score is NaN are out of the question."""
        table = ScoreTable(scores, source.ids_of, self.codes)
        if self.codes is None:
            return table.largest(count)
        if self.share == 1:  # what is left of an equal division goes round, one each
            sizes = table.sizes(self.classes)
            ones, none = np.ones(self.classes), np.zeros(self.classes, np.int64)
            return table.largest_per_group(box_quotas(ones, sizes, count, none))
        floor = quota_floor(self.share, count, self.classes)
        return table.largest_with_floor(count, floor, self.classes)


def _towards(source: Embeddings, hardness: Sequence[Array], order: Order, seed: int) -> list[Array]:
    return [
        towards(part, partial(source.ids_of, number), order, seed)
        for number, part in enumerate(hardness)
    ]


def _class_distances(source: Embeddings, work: Workspace) -> list[Array]:
    """1 − cos to the mean of the own class, of embeddings of length 1."""
    names, codes = source.classes()
    means = group_means(source, codes, len(names), work=work)
    lengths = torch.linalg.vector_norm(means, dim=1)
    if bool((lengths == 0).any()):
        name = names[int((lengths == 0).nonzero()[0])]
        told = described(f"embeddings of class {name} that cancel out")
        raise InputError("embeddings", told, "classes whose mean has a direction")
    centres = (means / lengths[:, None]).float()
    measured = KMeans(len(names))

    def distances(number: int) -> Tree:
        first, parts = 0, []
        for block in source.vectors(number):
            own = torch.from_numpy(codes[number][first : first + len(block)]).long()
            parts.append(measured.distances(block, centres, own))
            first += len(block)
        return {"distance": torch.cat(parts)}

    return [part["distance"].numpy() for part in source.each(work, "own-class", distances)]


def _note(rows: Array, what: str) -> list[str]:
    return [f"{int(rows.sum())} {what}"] if rows.any() else []
