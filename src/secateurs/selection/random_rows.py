"""Random rows: the baseline of every selection, and with a teacher hard to beat."""

from __future__ import annotations

import numpy as np

from secateurs.parts.budgets import Budget
from secateurs.selection.embeddings import Array, Embeddings
from secateurs.selection.result import Selection
from secateurs.selection.score_table import ScoreTable, random_scores


def random_selection(
    source: Embeddings, budget: Budget, seed: int = 0, *, per_class: bool = False
) -> Selection:
    """Rows by a hash of id and seed: exactly the budget, the same for any shards and order.

    Args:
        per_class: every class in proportion to its size.
    """
    scores = [random_scores(source.ids_of(n), seed) for n in range(len(source.shards))]
    if per_class:
        names, groups = source.classes()
        table = ScoreTable(scores, source.ids_of, groups)
        sizes = table.sizes(len(names))
        kept = table.largest_per_group(class_counts(sizes, budget.kept_samples(source.rows)))
    else:
        kept = ScoreTable(scores, source.ids_of).largest(budget.kept_samples(source.rows))
    return Selection.of(source, kept, scores, budget=str(budget), seed=seed)


def class_counts(sizes: Array, total: int) -> Array:
    """`total` shared among classes as their sizes are, by largest remainders."""
    shares = sizes * (total / sizes.sum())
    counts = np.floor(shares).astype(np.int64)
    order = np.argsort(counts - shares, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts
