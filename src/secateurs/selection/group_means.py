"""Means of the embeddings of every group of rows, exact: the same for any order and any shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateurs.selection.embeddings import Array, Embeddings, Metric
from secateurs.selection.kmeans import FRACTION_BITS, add_by_cluster, fixed_point_scale
from secateurs.state import Tree
from secateurs.workspace import Workspace


def group_means(
    source: Embeddings,
    groups: Sequence[Array],
    count: int,
    metric: Metric = "cosine",
    work: Workspace | None = None,
) -> Tensor:
    """The means, float64, (count, width); of a group without rows NaN.

    Entries are rounded to multiples of 2⁻²⁸ of the largest, so that sums have no order.

    Args:
        groups: of every shard, the group of its rows, from 0.
        metric: for cosine, embeddings are brought to length 1 first; means are not.
    """
    work = work or Workspace()
    scale = 2.0**FRACTION_BITS
    if metric == "euclidean":

        def largest(number: int) -> Tree:
            blocks = source.vectors(number, metric)
            return {"largest": max(float(block.abs().max()) for block in blocks)}

        tops = [part["largest"] for part in source.each(work, "largest", largest)]
        scale = fixed_point_scale(torch.tensor(max(tops)))

    def sums_of(number: int) -> Tree:
        sums = torch.zeros(count, source.width, dtype=torch.float64)
        counts, first = torch.zeros(count, dtype=torch.float64), 0
        for block in source.vectors(number, metric):
            own = torch.from_numpy(groups[number][first : first + len(block)])
            add_by_cluster(sums, counts, block, own.long(), scale)
            first += len(block)
        return {"sums": sums, "counts": counts}

    parts = source.each(work, "group-sums", sums_of)
    sums = torch.stack([part["sums"] for part in parts]).sum(0)
    counts = torch.stack([part["counts"] for part in parts]).sum(0)
    return sums / torch.where(counts > 0, counts, torch.nan)[:, None]
