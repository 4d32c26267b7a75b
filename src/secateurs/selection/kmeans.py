"""k-means over shards: fitted on a sample, then by passes over all rows, spherical or plain.

    assign   a_i = argmax_j ⟨x_i, c_j⟩            (spherical: ‖x_i‖ = ‖c_j‖ = 1)
             a_i = argmin_j ‖x_i − c_j‖           (plain)
    update   c_j = Σ_{a_i = j} x_i / n_j, of length 1 again if spherical

Products are float32 in blocks of rows, by faiss where it is installed and by torch elsewhere.
Rows whose two nearest centres float32 cannot tell apart are decided again in float64, so the
nearest are the same for both, and for any number of threads.
Sums are exact: entries are rounded to multiples of 2⁻²⁸ (of the largest) first, which is what
float32 can tell, so that float64 adds them without an error. Sums of parts are then the same in
any order: cuts between shards, resumed runs and workers of a cluster change nothing, and within
a fit only rows that moved are added and taken away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import described, library, require
from secateurs.selection.embeddings import BLOCK_ROWS, Array, Embeddings, Metric
from secateurs.selection.score_table import hashed
from secateurs.state import Tree
from secateurs.workspace import Workspace

Engine = Literal["auto", "faiss", "torch"]
PRODUCTS = 1 << 24
"""Entries of the matrix of products that is held at once."""
FRACTION_BITS = 28
SNAPSHOT_EVERY = 5
"""Iterations on the sample between two snapshots."""


@dataclass(frozen=True)
class KMeans:
    """How to cluster.

    Attributes:
        clusters: k.
        iterations: at most, on the sample; it ends where nothing moves.
        points: rows of the sample, a cluster.
        passes: over all rows, afterwards.
        spherical: by direction, on the sphere; plain is by Euclidean distance.
        engine: of the products.
    """

    clusters: int
    iterations: int = 100
    points: int = 256
    passes: int = 0
    spherical: bool = True
    engine: Engine = "auto"

    def __post_init__(self) -> None:
        require(self.clusters >= 1, "clusters", self.clusters, "at least 1")
        require(self.iterations >= 0, "iterations", self.iterations, "0 or more")
        require(self.points >= 1, "points", self.points, "at least 1")
        require(self.passes >= 0, "passes", self.passes, "0 or more")

    @property
    def metric(self) -> Metric:
        """What nearness is."""
        return "cosine" if self.spherical else "euclidean"

    def fit(
        self,
        source: Embeddings,
        *,
        seed: int = 0,
        among: Sequence[Array] | None = None,
        initial: Tensor | None = None,
        work: Workspace | None = None,
    ) -> Tensor:
        """The centres, float32, (clusters, width).

        Args:
            among: bool arrays, a shard each: rows to cluster; all by default.
            initial: centres to begin with; rows drawn from the sample by default.
            work: where shards' sums and the fit are kept.

        Raises:
            InputError: fewer rows than clusters.
        """
        work = work or Workspace()
        total = source.rows if among is None else sum(int(mask.sum()) for mask in among)
        rows = "rows" if among is None else "rows that take part"
        require(self.clusters <= total, "clusters", self.clusters, f"at most {total}, the {rows}")

        def on_sample() -> Tree:
            sample = sample_rows(
                source, self.clusters * self.points, seed, self.metric, among, work.child("sample")
            )
            begin = sample[: self.clusters] if initial is None else initial.float()
            good = begin.shape == (self.clusters, source.width)
            told = described(f"shape {tuple(begin.shape)}")
            require(good, "initial", told, f"({self.clusters}, {source.width})")
            scale = fixed_point_scale(sample)
            return {"centres": self.fit_sample(sample, begin, scale, work), "scale": scale}

        fitted = work.once("fit", on_sample)
        centres, scale = fitted["centres"], fitted["scale"]
        for number in range(self.passes):
            centres = self._pass(source, centres, scale, among, work.child(f"pass-{number}"))
        return centres

    def fit_sample(
        self, sample: Tensor, centres: Tensor, scale: float, work: Workspace | None = None
    ) -> Tensor:
        """Lloyd's iterations on rows in memory, from given centres.

        A cluster that is left empty gets the row that is farthest from its own centre.
        """
        work = work or Workspace()
        kept = work.last_snapshot("lloyd")
        done = 0 if kept is None else kept["done"]
        centres = self._on_sphere(centres.double()) if kept is None else kept["centres"]
        sums = torch.zeros(centres.shape, dtype=torch.float64)
        counts = torch.zeros(len(centres), dtype=torch.float64)
        own = torch.full((len(sample),), -1)
        with work.progress("k-means", self.iterations) as advance:
            for iteration in range(done, self.iterations):
                nearest = self.nearest(sample, centres)
                moved = (nearest != own).nonzero().view(-1)
                if not len(moved):
                    break
                for some in moved.split(BLOCK_ROWS):
                    rows, was = sample[some], own[some]
                    add_by_cluster(sums, counts, rows, nearest[some], scale)
                    add_by_cluster(sums, counts, rows[was >= 0], was[was >= 0], scale, sign=-1)
                own = nearest
                centres = self._centres(sums, counts, centres)
                self._fill_empty(sample, centres, own, counts)
                advance(iteration + 1)
                if (iteration + 1) % SNAPSHOT_EVERY == 0:
                    state = {"done": iteration + 1, "centres": centres}
                    work.snapshot("lloyd", partial(dict, state))
        work.drop_snapshot("lloyd")
        return centres

    def _pass(
        self,
        source: Embeddings,
        centres: Tensor,
        scale: float,
        among: Sequence[Array] | None,
        work: Workspace,
    ) -> Tensor:
        """One Lloyd step over all rows."""

        def sums_of(number: int) -> Tree:
            sums = torch.zeros(centres.shape, dtype=torch.float64)
            counts, first = torch.zeros(len(centres), dtype=torch.float64), 0
            for block in source.vectors(number, self.metric):
                if among is not None:
                    part = torch.from_numpy(among[number][first : first + len(block)])
                    first += len(block)
                    block = block[part]
                add_by_cluster(sums, counts, block, self.nearest(block, centres), scale)
            return {"sums": sums, "counts": counts}

        parts = source.each(work, "sums", sums_of)
        sums = torch.stack([part["sums"] for part in parts]).sum(0)
        counts = torch.stack([part["counts"] for part in parts]).sum(0)
        return self._centres(sums, counts, centres)

    def _centres(self, sums: Tensor, counts: Tensor, before: Tensor) -> Tensor:
        """Means; of an empty cluster, and of rows that cancel, what there was before."""
        means = sums / counts.clamp_min(1)[:, None]
        there = counts > 0
        if self.spherical:
            there &= torch.linalg.vector_norm(means, dim=1) > 0
        return self._on_sphere(torch.where(there[:, None], means, before.double()))

    def _on_sphere(self, centres: Tensor) -> Tensor:
        if self.spherical:
            centres = centres / torch.linalg.vector_norm(centres, dim=1, keepdim=True)
        return centres.float()

    def _fill_empty(self, sample: Tensor, centres: Tensor, own: Tensor, counts: Tensor) -> None:
        empty = (counts == 0).nonzero().view(-1)
        if len(empty):
            far = self.distances(sample, centres, own)
            rows = far.argsort(descending=True, stable=True)[: len(empty)]
            centres[empty[: len(rows)]] = sample[rows]

    def assign(
        self, source: Embeddings, centres: Tensor, work: Workspace | None = None
    ) -> list[Tree]:
        """Of every shard ``cluster`` (int32) and ``distance`` (float32) of its rows."""

        def assigned(number: int) -> Tree:
            clusters, distances = [], []
            for block in source.vectors(number, self.metric):
                nearest = self.nearest(block, centres)
                clusters.append(nearest.int())
                distances.append(self.distances(block, centres, nearest).float())
            return {"cluster": torch.cat(clusters), "distance": torch.cat(distances)}

        return source.each(work or Workspace(), "assigned", assigned)

    def nearest(self, rows: Tensor, centres: Tensor) -> Tensor:
        """The cluster of every row, int64; the smaller number of equals.

        It is the answer of float64, whatever multiplied in float32 and in whatever order.
        """
        at = torch.zeros(rows.shape[1]) if self.spherical else centres.mean(0)
        moved = centres - at  # distances do not change, and float32 tells them better
        search = _search(moved, self.spherical, self.engine)
        longest = float(torch.linalg.vector_norm(moved, dim=1).max())
        step = max(1, min(BLOCK_ROWS, PRODUCTS // len(centres)))
        parts = []
        for first in range(0, len(rows), step):
            block = rows[first : first + step]
            near = block if self.spherical else block - at
            best, lead = search(near)
            error = 2 * product_error(near, longest, self.spherical)
            unsure = (~(lead > error)).nonzero().view(-1)  # NaN is unsure, too
            if len(unsure):
                doubted = _scores(near[unsure], moved, self.spherical)
                enough = doubted.amax(1, keepdim=True) - error[unsure, None]
                best[unsure] = self._decided(block[unsure], centres, ~(doubted < enough))
            parts.append(best)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _decided(self, rows: Tensor, centres: Tensor, among: Tensor) -> Tensor:
        """The nearest of some centres by float64; the smaller number of equals.

        Args:
            among: (rows, centres), bool: which of them can be nearest.
        """
        scores = torch.full(among.shape, -torch.inf, dtype=torch.float64)
        row, centre = among.nonzero(as_tuple=True)
        step = max(1, PRODUCTS // rows.shape[1])
        for some, its in zip(row.split(step), centre.split(step), strict=True):
            one, other = rows[some].double(), centres[its].double()
            terms = one * other if self.spherical else -(one - other).square()
            scores[some, its] = terms.sum(1)
        return scores.argmax(1)

    def distances(self, rows: Tensor, centres: Tensor, own: Tensor) -> Tensor:
        """1 − ⟨x, c⟩, or ‖x − c‖ if plain, of every row to its own centre, float64."""
        parts = []
        for first in range(0, len(rows), BLOCK_ROWS):
            block = rows[first : first + BLOCK_ROWS].double()
            near = centres[own[first : first + BLOCK_ROWS]].double()
            if self.spherical:
                parts.append((1 - (block * near).sum(1)).clamp_min(0))
            else:
                parts.append(torch.linalg.vector_norm(block - near, dim=1))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def product_error(rows: Tensor, longest: float, spherical: bool) -> Tensor:
    """What float32 can be wrong by in ⟨x, c⟩, or ⟨x, c⟩ − ‖c‖²/2 if plain; (rows,), float64.

    Whatever the order in which d terms are added, the error of ⟨x, c⟩ is at most γ ‖x‖ ‖c‖ with
    γ = du / (1 − du), u = 2⁻²⁴ (Higham, Accuracy and Stability, 3.1). (‖x‖ + ‖c‖)²/2 in its place
    also bounds ‖x‖² + ‖c‖² − 2⟨x, c⟩, as faiss computes it. Eight terms more, and a thousandth,
    cover the norms, the shift and the difference of two scores; powers of two what underflows.

    γ is the worst case: an error grows rather as √d. But of 40,000 random rows in 512 dimensions
    only 122 were nearer than that to a tie of two of 500 centres, and to decide them again took
    3 % (torch) to 10 % (faiss, with its search for two) of the time.
    """
    terms = rows.shape[1] + 8
    gamma = 1.001 * terms * 2.0**-24 / (1 - terms * 2.0**-24)
    lost = terms**0.5 * 2.0**-63  # of a norm whose squares underflow
    length = torch.linalg.vector_norm(rows, dim=1).double() + lost
    longest += lost
    reach = length * longest if spherical else (length + longest).square() / 2
    return gamma * reach + terms * 2.0**-125


def _scores(rows: Tensor, centres: Tensor, spherical: bool) -> Tensor:
    """⟨x, c⟩, or ⟨x, c⟩ − ‖c‖²/2, of all rows and centres; the nearest has the largest."""
    bias = torch.zeros(len(centres)) if spherical else -0.5 * centres.square().sum(1)
    return torch.addmm(bias, rows, centres.T)


def _search(
    centres: Tensor, spherical: bool, engine: Engine
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from rows to the numbers of their nearest centres, and the lead of their scores
    over the second, in float32; infinite where there is no second."""
    if engine == "faiss" or (engine == "auto" and find_spec("faiss") is not None):
        faiss = library("faiss", "data")
        index = (faiss.IndexFlatIP if spherical else faiss.IndexFlatL2)(centres.shape[1])
        index.add(np.ascontiguousarray(centres.numpy()))

        def by_faiss(rows: Tensor) -> tuple[Tensor, Tensor]:
            far, near = index.search(rows.contiguous().numpy(), min(2, len(centres)))
            lead = torch.from_numpy(far[:, 0] - far[:, -1] if spherical else far[:, -1] - far[:, 0])
            alone = len(centres) == 1
            lead = torch.full_like(lead, torch.inf) if alone else lead if spherical else lead / 2
            return torch.from_numpy(near[:, 0].copy()), lead

        return by_faiss

    def by_torch(rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = _scores(rows, centres, spherical)
        first = scores.max(1)
        second = scores.scatter_(1, first.indices[:, None], -torch.inf).amax(1)
        return first.indices, first.values - second

    return by_torch


def fixed_point_scale(rows: Tensor) -> float:
    """A power of two: entries times it are rounded to whole numbers before they are summed."""
    largest = max(float(rows.max()), -float(rows.min()), 2.0**-100)  # abs() would be a copy
    return 2.0 ** (FRACTION_BITS - math.ceil(math.log2(largest)))


def add_by_cluster(
    sums: Tensor, counts: Tensor, rows: Tensor, own: Tensor, scale: float, sign: int = 1
) -> None:
    """Add (or take away) rows to the sums of their clusters, in place and without rounding.

    The rows are rounded to multiples of 1/scale. Float64 holds such sums exactly up to 2²⁵ rows
    of the largest size in one cluster.

    Args:
        sums: (clusters, width), float64. counts: (clusters,), float64.
    """
    from scipy.sparse import csr_array

    for first in range(0, len(rows), BLOCK_ROWS):
        block, cluster = rows[first : first + BLOCK_ROWS], own[first : first + BLOCK_ROWS]
        fixed = (block.double() * scale).round_().numpy()
        ones = np.full(len(fixed), float(sign))
        at = (cluster.numpy(), np.arange(len(fixed)))
        chosen = csr_array((ones, at), shape=(len(sums), len(fixed)))
        sums += torch.from_numpy(chosen @ fixed).div_(scale)
        counts += sign * torch.bincount(cluster, minlength=len(counts))


def sample_rows(
    source: Embeddings,
    count: int,
    seed: int,
    metric: Metric,
    among: Sequence[Array] | None = None,
    work: Workspace | None = None,
) -> Tensor:
    """At most `count` rows, those whose hashed ids are least, in the order of the hashes.

    So the sample is the same however the rows are ordered and cut into shards.
    """
    work = work or Workspace()
    shards = range(len(source.shards))
    keys = [hashed(source.ids_of(number), seed) for number in shards]
    if among is not None:
        keys = [key[mask] for key, mask in zip(keys, among, strict=True)]
    every = np.concatenate(keys)
    limit = np.partition(every, count - 1)[count - 1] if count < len(every) else every.max()
    chosen = []
    for number in shards:
        mask = np.ones(source.shards[number].rows, bool) if among is None else among[number].copy()
        mask[mask] = keys[number] <= limit
        chosen.append(mask)

    def taken(number: int) -> Tree:
        return source.take_from(number, chosen[number], metric)

    parts = source.each(work, "rows", taken)
    order = torch.from_numpy(np.argsort(every[every <= limit], kind="stable"))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    rows = torch.empty(len(order), source.width)
    for where in place.split([len(part) for part in parts]):
        rows[where] = parts.pop(0)
    return rows[:count]
