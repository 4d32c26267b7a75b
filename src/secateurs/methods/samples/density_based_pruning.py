"""Density-based pruning: dense or crowded clusters keep few samples, wide and lonely ones many.

Paper: "Effective pruning of web-scale datasets based on complexity of concept clusters", arXiv
2401.04578 (ICLR 2024). With unit embeddings e, spherical k-means (centres c, cluster a(i) of row
i, M_j rows in cluster j), N rows of which P stay:

    d_i      = 1 − ⟨e_i, c_a(i)⟩
    d_intra  = mean of d_i over a cluster
    d_inter  = mean of 1 − ⟨c_j, c_l⟩ over the `neighbours` nearest other centres
    C_j      = d_inter · d_intra,      p = softmax(C / τ)
    x        = argmin ½ Σ (x_j − p_j P)²   s.t.  Σ x_j = P,  low_j ≤ x_j ≤ M_j

and the x_j rows farthest from the centre stay. Before that, duplicates go (SemDeDup, see
`secateurs.selection.deduplication`), then what a filter such as the CLIP score leaves out; both
before clustering, since quotas of rows that then go would be wrong.

Decided here: τ is 0.1 (the paper's, as its card remembers; the released script has 0.5). low_j is
1 (the paper) or a share of P/k (the script). Rounding gives exactly P: the script's np.rint is
off by a few. `keep` is of all rows; where fewer are left after duplicates and filter, all of
those stay. k is 500 as published, or a fortieth of the rows where they are fewer than 20,000.
ε of duplicates is ours, 0.01; the paper's is not stated. The first clustering (for duplicates)
has as many clusters as the second: the release has 50,000, which costs N · 50,000 products. The
filter keeps a share of a column's largest values, or those above a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import InputError, described, require
from secateurs.method import Selector
from secateurs.parts.budgets import Budget
from secateurs.parts.quotas import box_quotas, quota_floor
from secateurs.registry import Paper, Tags, register
from secateurs.selection.deduplication import Duplicates, find_duplicates
from secateurs.selection.embeddings import Array, Embeddings
from secateurs.selection.kmeans import Engine, KMeans
from secateurs.selection.result import Selection
from secateurs.selection.score_table import Order, ScoreTable, towards
from secateurs.settings import option
from secateurs.task import Task
from secateurs.workspace import Workspace

CLUSTERS = 500
ROWS_A_CLUSTER = 40


@register(
    "density-based-pruning",
    paper=Paper(
        "Effective pruning of web-scale datasets based on complexity of concept clusters",
        "ICLR",
        2024,
        "2401.04578",
    ),
    tags=Tags("S", "sample", "PBT", "sim", supervision="self", recovery="none"),
    budgets=("keep",),
    aliases=("density",),
)
@dataclass(frozen=True)
class DensityBasedPruning(Selector):
    """Clusters keep as many samples as they are complex; within them the least typical stay."""

    clusters: int | None = option(
        None, "clusters; none: 500, or a fortieth of the rows if that is less", "clusters"
    )
    neighbours: int = option(20, "nearest other centres that a cluster is compared with", "centres")
    temperature: float = option(0.1, "tau: the lower, the more the complex clusters get")
    floor: float | Literal["one"] = option(
        "one", "least rows of a cluster: one, or a share of an equal quota"
    )
    within: Order = option("hard", "which rows of a cluster stay: far from its centre, near, any")
    epsilon: float | None = option(0.01, "cosine distance of duplicates; none looks for none")
    dedup_clusters: int | None = option(
        None, "clusters within which duplicates are looked for; none: as clusters", "clusters"
    )
    dedup_keep: Order = option("hard", "which of duplicates stays: far from the centre, near, any")
    piece: int = option(4096, "rows before it in its cluster that a row is compared with", "rows")
    filter: str | None = option(None, "column whose largest values pass, such as a CLIP score")
    filter_keep: float | None = option(None, "share of the rows without duplicates that pass")
    filter_above: float | None = option(None, "or: the value above which they pass")
    iterations: int = option(100, "of k-means on its sample, at most", "iterations")
    points: int = option(256, "rows of the sample that k-means is fitted on, a cluster", "rows")
    passes: int = option(0, "of k-means over all rows, after that", "passes")
    engine: Engine = option("auto", "of k-means: faiss, torch, or faiss where it is installed")

    def __post_init__(self) -> None:
        for name in ("neighbours", "points"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("clusters", "dedup_clusters"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or none")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        if not isinstance(self.floor, str):
            require(0 <= self.floor <= 1, "floor", self.floor, "one, or a share in [0, 1]")
        epsilon = self.epsilon
        require(epsilon is None or 0 < epsilon <= 2, "epsilon", epsilon, "in (0, 2], or none")
        require(self.piece >= 2, "piece", self.piece, "at least 2")
        for name in ("iterations", "passes"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        ways = [self.filter_keep, self.filter_above]
        given = sum(way is not None for way in ways)
        told = described(f"filter={self.filter}, filter_keep={ways[0]}, filter_above={ways[1]}")
        require(given == (self.filter is not None), "filter", told,
                "a column, and one of filter_keep and filter_above, or none")  # fmt: skip
        share = self.filter_keep
        require(share is None or 0 < share <= 1, "filter_keep", share, "a share in (0, 1]")

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
        alike = self._duplicates(source, wanted, seed, work.child("dedup"))
        left = [~mask for mask in alike.found]
        passed = self._filtered(source, left)
        total = sum(int(mask.sum()) for mask in passed)
        keeping = min(wanted, total)
        means = self._kmeans(self.clusters, total, keeping)
        if means.clusters > total:
            gone = [("removing duplicates", self.epsilon), ("filtering", self.filter)]
            steps = " and ".join(step for step, option in gone if option is not None) or "nothing"
            most = f"at most {total}, the rows that are left of {source.rows} after {steps}"
            raise InputError("clusters", means.clusters, most)
        clustered = work.child("clusters")
        centres = means.fit(source, seed=seed, among=passed, work=clustered)
        parts = means.assign(source, centres, clustered)
        cluster = [part["cluster"].numpy() for part in parts]
        distance = [part["distance"].numpy() for part in parts]
        sizes, intra = _intra(cluster, distance, passed, means.clusters)
        inter = inter_distance(centres, self.neighbours)
        shares = softmax_shares(complexities(intra, inter), self.temperature)
        quotas = box_quotas(shares, sizes, keeping, self._low(sizes, keeping))
        scores = [
            towards(d, partial(source.ids_of, n), self.within, seed) for n, d in enumerate(distance)
        ]
        ranked = [np.where(mask, s, np.nan) for s, mask in zip(scores, passed, strict=True)]
        table = ScoreTable(ranked, source.ids_of, cluster)
        made = Selection.of(
            source, table.largest_per_group(quotas), scores,
            duplicates=alike.found,
            filtered=[~p & u for p, u in zip(passed, left, strict=True)],
            clusters=cluster, distances=distance, pairs=alike.pairs,
        )  # fmt: skip
        made.tables["clusters"] = [
            {"d_intra": float(i), "d_inter": e, "share": p, "quota": int(q)}
            for i, e, p, q in zip(intra, inter.tolist(), shares.tolist(), quotas, strict=True)
        ]
        if alike.large:
            made.notes.append(
                f"{alike.large} clusters of more than {self.piece} rows: a row was compared with "
                f"the {self.piece} before it, so some duplicates may be left (more dedup_clusters, "
                "or a larger piece, find them)"
            )
        if total < wanted:
            made.notes.append(f"{wanted} rows were asked for, and only {total} are left to keep")
        return made

    def _kmeans(self, clusters: int | None, rows: int, most: int) -> KMeans:
        if clusters is None:
            clusters = max(1, min(CLUSTERS, rows // ROWS_A_CLUSTER, most))
        return KMeans(clusters, self.iterations, self.points, self.passes, engine=self.engine)

    def _duplicates(
        self, source: Embeddings, wanted: int, seed: int, work: Workspace
    ) -> Duplicates:
        if self.epsilon is None:
            return Duplicates([np.zeros(shard.rows, bool) for shard in source.shards], [])
        means = self._kmeans(self.dedup_clusters or self.clusters, source.rows, wanted)
        assigned = means.assign(source, means.fit(source, seed=seed, work=work), work)
        return find_duplicates(
            source, assigned, means.clusters, self.epsilon,
            keep=self.dedup_keep, piece=self.piece, seed=seed, work=work,
        )  # fmt: skip

    def _filtered(self, source: Embeddings, left: Sequence[Array]) -> list[Array]:
        """Rows that pass the filter, of those that are left."""
        if self.filter is None:
            return list(left)
        values = source.column(self.filter)
        if self.filter_above is not None:
            passed = [u & (v > self.filter_above) for u, v in zip(left, values, strict=True)]
        else:
            assert self.filter_keep is not None
            count = round(self.filter_keep * sum(int(mask.sum()) for mask in left))
            ranked = [np.where(u, v, np.nan) for u, v in zip(left, values, strict=True)]
            passed = ScoreTable(ranked, source.ids_of).largest(count)
        told = described(f"no row with {self.filter} above {self.filter_above}")
        require(any(bool(p.any()) for p in passed), "filter", told, "a filter that lets rows pass")
        return passed

    def _low(self, sizes: Array, total: int) -> Array:
        """Least rows of every cluster."""
        one = np.minimum(1, sizes)
        if self.floor == "one":
            low = one
        elif self.floor == 0:
            low = np.clip(sizes - 1, 0, 1)
        else:
            assert not isinstance(self.floor, str)
            equal = quota_floor(self.floor, total, len(sizes))
            low = np.clip(sizes - 1, 0, equal)
        if int(low.sum()) > total:
            told = described(f"{len(sizes)}, of which {int(low.sum())} rows must stay")
            raise InputError("clusters", told, f"at most {total}, the rows that are kept")
        return low


def _intra(
    cluster: Sequence[Array], distance: Sequence[Array], among: Sequence[Array], clusters: int
) -> tuple[Array, list[float]]:
    """Rows of every cluster, and their mean distance to its centre; NaN of an empty one."""
    sizes, sums = np.zeros(clusters, np.int64), np.zeros(clusters)
    for own, far, mask in zip(cluster, distance, among, strict=True):
        sizes += np.bincount(own[mask], minlength=clusters)
        # multiples of 2^-28: float64 adds them exactly, in any order
        fixed = np.round(far[mask].astype(np.float64) * 2.0**28)
        sums += np.bincount(own[mask], fixed, minlength=clusters)
    means = [s * 2.0**-28 / m if m else float("nan") for s, m in zip(sums, sizes, strict=True)]
    return sizes, means


def inter_distance(centres: Tensor, neighbours: int) -> Tensor:
    """Mean of 1 − ⟨c_j, c_l⟩ over the nearest other centres, (clusters,), float64.

    Itself is left out by its number, so that an equal centre counts. One alone has 0.
    """
    centres = centres.double()
    nearest = min(neighbours, len(centres) - 1)
    if nearest == 0:
        return torch.zeros(len(centres), dtype=torch.float64)
    parts = []
    for first in range(0, len(centres), 1024):
        likeness = centres[first : first + 1024] @ centres.T
        rows = torch.arange(len(likeness))
        likeness[rows, rows + first] = -torch.inf
        parts.append(1 - likeness.topk(nearest, dim=1).values.mean(1))
    return torch.cat(parts)


def complexities(intra: Sequence[float], inter: Tensor) -> Array:
    """C = d_inter · d_intra; an empty cluster has the mean of the others."""
    product: Array = np.asarray(intra) * inter.numpy()
    return np.where(np.isnan(product), np.nanmean(product), product)


def softmax_shares(complexity: Array, temperature: float) -> Array:
    """p = softmax(C / τ)."""
    weights: Any = np.exp((complexity - complexity.max()) / temperature)
    shares: Array = weights / weights.sum()
    return shares
