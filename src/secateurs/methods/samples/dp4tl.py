"""DP4TL: of a source to pre-train on, keep the classes that the target is mapped to.

Paper: "Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer Learning",
NeurIPS 2023, arXiv 2310.08782. A surrogate network, trained on the whole source, maps every target
sample x to one of K source groups (classes, or clusters where there are no classes):

    label mapping     s(i) = #{x : argmax_k g(f(x))_k = i}
    feature mapping   s(i) = #{x : argmin_k ‖f(x) − μ_k‖₂ = i},   μ_k the mean of f over group k

and the M = round(keep · K) groups with the most votes stay, whole. Target labels are not needed.

What is given: for feature mapping the embeddings of source and target are f, in eval mode and
without augmentation, and the source has labels or ``clusters`` says into how many groups k-means
puts it. For label mapping the target's embeddings are the logits g(f(x)), or ``predictions`` names
a column of predicted classes; the source has labels only, and its embeddings are not read. Output
k of the surrogate is the k-th of the sorted labels.

Decided here: many groups have no vote, so ties matter: by the mean probability of the group over
the target (label mapping), or its mean distance to the target (feature mapping), then by number;
the released script leaves them to topk. Its FM script stores distances at the index of the target
sample, so its argmin means nothing; this is the loop of its moderate_selection.py. ``moderate``
is that file's variant: the mean over the given share of a class in the middle of the order by the
distance to the class's median. Its other variant, ranking by distances between class means, needs
target labels and is not here. The budget is a fraction of the groups; of the rows it may be
another, and the answer notes which. A surrogate that sends most of the target to one group tells
little of it (inverted or noisy images do that): then there is a note. Labels are left as they are:
whoever trains on the rest numbers them anew, or keeps a head of K outputs.

Measured (tests/replicas/test_dp4tl.py: clothes and digits as source, shifted digits as target, 8
seeds), accuracy of a linear probe: the whole source 88.5, 6 of its 20 classes by label mapping
91.3, by feature mapping 91.2, at random 88.0, those with the fewest votes 85.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import InputError, described, require
from secateurs.method import Selector
from secateurs.outcome import Promise
from secateurs.parts.budgets import Budget
from secateurs.registry import Paper, Tags, register
from secateurs.selection.embeddings import Array, Embeddings
from secateurs.selection.group_means import group_means
from secateurs.selection.grouped_rows import (
    GROUP_ROWS,
    GroupedRows,
    consecutive_groups,
    scratch,
)
from secateurs.selection.kmeans import Engine, KMeans
from secateurs.selection.result import Selection, balance
from secateurs.selection.score_table import random_scores
from secateurs.settings import option
from secateurs.state import Tree
from secateurs.task import Task
from secateurs.workspace import Workspace

TieBreak = Literal["probability", "id", "random"]
TOP_SHARE, LEAST_BALANCE = 0.6, 0.2
"""Above that share of one group, or below that balance of all, votes tell little."""
FIXED = 2.0**28
"""Probabilities and distances are rounded to its inverse, so that their sums have no order."""


@register(
    "dp4tl",
    paper=Paper(
        "Selectivity Drives Productivity: Efficient Dataset Pruning for Enhanced Transfer Learning",
        "NeurIPS",
        2023,
        "2310.08782",
    ),
    tags=Tags("S", "sample+group", "PBT", "sim", supervision="self+sup", recovery="retrain"),
    budgets=("keep",),
)
@dataclass(frozen=True)
class DP4TL(Selector):
    """Source classes that the target is mapped to stay, whole."""

    needs: ClassVar[tuple[str, ...]] = ("embeddings", "labels", "target")

    mapping: Literal["feature", "label"] = option(
        "feature", "nearest mean of a group, or the surrogate's predicted class"
    )
    predictions: str | None = option(
        None, "of label: the target's column of predicted classes; none: its embeddings are logits"
    )
    clusters: int | None = option(
        None, "of feature: groups that k-means makes of the source; none: its labels", "clusters"
    )
    moderate: float | None = option(
        None, "of feature: means over that share in the middle of a group; none: over all of it"
    )
    tie_break: TieBreak = option(
        "probability", "among equal votes: the more probable or nearer group, the first, or any"
    )
    iterations: int = option(100, "of k-means on its sample, at most", "iterations")
    points: int = option(256, "rows of the sample that k-means is fitted on, a cluster", "rows")
    passes: int = option(1, "of k-means over all rows, after that", "passes")
    engine: Engine = option("auto", "of k-means: faiss, torch, or faiss where it is installed")

    def __post_init__(self) -> None:
        clusters, share = self.clusters, self.moderate
        require(clusters is None or clusters >= 1, "clusters", clusters, "at least 1, or none")
        require(share is None or 0 < share <= 1, "moderate", share, "a share in (0, 1], or none")
        require(self.points >= 1, "points", self.points, "at least 1")
        for name in ("iterations", "passes"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        by_label = self.mapping == "label"
        require(by_label or self.predictions is None, "predictions", self.predictions,
                "none, with mapping=feature")  # fmt: skip
        for name in ("clusters", "moderate"):
            value = getattr(self, name)
            require(not by_label or value is None, name, value, "none, with mapping=label")

    @property
    def required(self) -> tuple[str, ...]:
        if self.mapping == "label":
            return ("labels", "target")
        return ("embeddings", "target") if self.clusters else self.needs

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
        keep.kept_samples(source.rows)
        assert target is not None
        names, groups = self._groups(source, seed, work.child("groups"))
        kept = round(keep.value * len(names))
        told = described(f"{keep.value:g} of {len(names)} groups")
        require(kept >= 1, "keep", told, "a fraction that leaves one group")
        if self.mapping == "label":
            votes, favour = self._by_label(target, names, work.child("label"))
        else:
            means = self._means(source, groups, len(names), work.child("means"))
            votes, favour = _by_feature(target, means, self.engine, work.child("feature"))
        order = self._ranked(votes, favour, seed)
        stays = np.zeros(len(names), bool)
        stays[order[:kept]] = True
        rank = np.empty(len(names), np.int64)
        rank[order] = np.arange(len(names))
        scores = [-rank[own] for own in groups]  # votes alone would not tell equal ones apart
        made = Selection.of(
            source,
            [stays[own] for own in groups],
            scores,
            clusters=[own.astype(np.int32) for own in groups],
        )
        made.tables["clusters"] = [
            {"group": name, "votes": int(v), "rank": int(r), "stays": bool(s)}
            for name, v, r, s in zip(names, votes, rank, stays, strict=True)
        ]
        made.promise = Promise("keep", keep.value, kept / len(names), 0.5 / len(names))
        made.notes = _notes(names, votes, kept, made)
        return made

    def _groups(
        self, source: Embeddings, seed: int, work: Workspace
    ) -> tuple[list[Any], list[Array]]:
        """Names of the groups, and of every shard the group of its rows; none is empty."""
        if self.clusters is None:
            return source.classes()
        means = KMeans(self.clusters, self.iterations, self.points, self.passes, False,
                       self.engine)  # fmt: skip
        parts = means.assign(source, means.fit(source, seed=seed, work=work), work)
        own = [part["cluster"].numpy() for part in parts]
        there = np.unique(np.concatenate([np.unique(part) for part in own]))
        return there.tolist(), [np.searchsorted(there, part).astype(np.int32) for part in own]

    def _by_label(
        self, target: Embeddings, names: list[Any], work: Workspace
    ) -> tuple[Array, Array]:
        """Votes, and the mean probability of every group over the target."""
        if self.predictions is not None:
            return _predicted(target, self.predictions, names), np.zeros(len(names))
        told = described(f"{target.width} logits, {len(names)} classes of the source")
        require(target.width == len(names), "target", told,
                "as many logits as classes, or the column of predictions")  # fmt: skip

        def counted(number: int) -> Tree:
            votes = torch.zeros(len(names), dtype=torch.int64)
            sums = torch.zeros(len(names), dtype=torch.float64)
            for logits in target.vectors(number, "euclidean"):
                votes += torch.bincount(logits.argmax(1), minlength=len(names))
                sums += (logits.double().softmax(1) * FIXED).round().sum(0)
            return {"votes": votes, "sums": sums}

        return _summed(target.each(work, "votes", counted), target.rows)

    def _means(
        self, source: Embeddings, groups: list[Array], count: int, work: Workspace
    ) -> Tensor:
        if self.moderate is None:
            return group_means(source, groups, count, "euclidean", work)
        share = self.moderate
        sizes = np.sum([np.bincount(own, minlength=count) for own in groups], axis=0)
        batches = consecutive_groups(sizes, GROUP_ROWS)
        with scratch(work) as folder:
            grouped = GroupedRows(source, groups, folder)
            if not all(work.has(f"moderate-{number:05}") for number in range(len(batches))):
                grouped.write(work)

            def of_groups(first: int, last: int) -> Tree:
                means = []
                for numbers in grouped.numbers(range(first, last)):
                    rows = grouped.rows(numbers)  # a median needs the group whole
                    if not bool(torch.isfinite(rows).all()):
                        _refuse(source)
                    means.append(middle_mean(rows, share))
                return {"means": torch.stack(means)}

            parts = []
            with work.progress("moderate means", count) as advance:
                for number, (first, last) in enumerate(batches):
                    step = f"moderate-{number:05}"
                    parts.append(work.once(step, partial(of_groups, first, last))["means"])
                    advance(last)
        return torch.cat(parts)

    def _ranked(self, votes: Array, favour: Array, seed: int) -> Array:
        """Groups, the first to stay first."""
        number = np.arange(len(votes))
        ties = {"probability": -favour, "id": number, "random": random_scores(number, seed)}
        order: Array = np.lexsort((number, ties[self.tie_break], -votes))
        return order


def _by_feature(
    target: Embeddings, means: Tensor, engine: Engine, work: Workspace
) -> tuple[Array, Array]:
    """Votes of the nearest means, and minus the mean distance of every group to the target."""
    told = described(f"embeddings of width {target.width}")
    require(target.width == means.shape[1], "target", told, f"{means.shape[1]}, as the source's")
    centres, search = means.float(), KMeans(len(means), spherical=False, engine=engine)
    centre = centres.mean(0)  # distances do not change, and float32 tells them better

    def counted(number: int) -> Tree:
        votes = torch.zeros(len(means), dtype=torch.int64)
        sums = torch.zeros(len(means), dtype=torch.float64)
        for block in target.vectors(number, "euclidean"):
            nearest = search.nearest(block - centre, centres - centre)
            votes += torch.bincount(nearest, minlength=len(means))
            sums -= (torch.cdist(block.double(), means) * FIXED).round().sum(0)
        return {"votes": votes, "sums": sums}

    return _summed(target.each(work, "votes", counted), target.rows)


def _summed(parts: Sequence[Tree], rows: int) -> tuple[Array, Array]:
    votes = torch.stack([part["votes"] for part in parts]).sum(0)
    sums = torch.stack([part["sums"] for part in parts]).sum(0)
    return votes.numpy(), (sums / (FIXED * rows)).numpy()


def _predicted(target: Embeddings, column: str, names: list[Any]) -> Array:
    """Votes of a column of predicted classes.

    Raises:
        InputError: no such column, or a class that the source does not have.
    """
    require(column in target.columns, "predictions", column,
            f"a column of the target: {', '.join(target.columns) or 'it has none'}")  # fmt: skip
    known, votes = np.array(names), np.zeros(len(names), np.int64)
    for number in range(len(target.shards)):
        own = target.values(number, column)
        strange = ~np.isin(own, known)
        if strange.any():
            raise InputError(column, own[strange].tolist()[0], "a class of the source")
        votes += np.bincount(np.searchsorted(known, own), minlength=len(names))
    return votes


def _refuse(source: Embeddings) -> None:
    """Name the row that is not finite."""
    for number in range(len(source.shards)):
        for _ in source.vectors(number, "euclidean"):
            pass


def middle_mean(rows: Tensor, share: float) -> Tensor:
    """Mean of the share of the rows in the middle of their order by the distance to their median
    (of every coordinate), float64; at least one row.

    Args:
        rows: (n, width).
    """
    rows = rows.double()
    far = torch.linalg.vector_norm(rows - rows.quantile(0.5, dim=0), dim=1)
    count = max(1, round(share * len(rows)))
    first = (len(rows) - count) // 2
    return rows[far.argsort(stable=True)[first : first + count]].mean(0)


def _notes(names: list[Any], votes: Array, kept: int, made: Selection) -> list[str]:
    share = 100 * made.kept / made.total
    notes = [f"{kept} of {len(names)} groups stay, which are {share:.1f} % of the rows"]
    empty = int((votes == 0).sum())
    if empty:
        notes.append(f"{empty} groups have no vote of the target")
    if empty > len(names) - kept:
        notes.append("some groups without a vote stay: fewer groups would do")
    top, spread = votes.max() / votes.sum(), balance(votes.tolist())
    if len(names) > 1 and (top > TOP_SHARE or (spread is not None and spread < LEAST_BALANCE)):
        notes.append(
            f"{100 * top:.0f} % of the target go to group {names[int(votes.argmax())]}: the "
            "surrogate may not understand it (inverted or noisy images?)"
        )
    return notes
