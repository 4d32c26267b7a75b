"""Wanda: a weight counts for its size times how large its input is.

Paper: "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv
2306.11695. Within every output row the lowest

    S_ij = |W_ij| · ‖X_j‖₂

go, X_j being all values that input j takes on the calibration inputs; nothing else changes.
Blocks are pruned in order, each on what the pruned ones before it give. The norm is taken per
input vector (‖X_j‖₂ / sqrt(N)), which ranks the same. `scope="matrix"` compares all weights of a
layer, which codes for vision models do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateurs.calibration.layerwise import (
    LayerwisePruner,
    Pruned,
    Removal,
    Scope,
    Statistic,
    mask_of,
)
from secateurs.calibration.moments import Moments
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """|W_ij| · sqrt(E x_j²).

    Args:
        weight: (groups, out, d).
        squares: (groups, d), the mean square of every input.
    """
    return weight.abs().float() * squares.sqrt().float().unsqueeze(1)


@register(
    "wanda",
    paper=Paper(
        "A Simple and Effective Pruning Approach for Large Language Models",
        "ICLR",
        2024,
        "2306.11695",
    ),
    tags=Tags("U+SS", "weight+nm+block", "PTP", "mag+sens"),
    budgets=("sparsity", "density", "n:m"),
)
@dataclass(frozen=True)
class Wanda(LayerwisePruner):
    """|w| times the norm of its input, within every output row."""

    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    statistic: ClassVar[Statistic] = "squares"

    scope: Scope = option("row", "compare within each output row, or within the whole matrix")

    def prune_layer(self, weight: Tensor, removal: Removal, moments: Moments | None) -> Pruned:
        assert moments is not None
        mask = mask_of(wanda_scores(weight, moments.squares), removal, self.scope)
        return Pruned(weight * mask, mask)
