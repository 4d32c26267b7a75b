"""Magnitude, layer by layer: the smallest weights of every matrix go, the same share of each.

score(w) = |w|. The baseline of every one-shot method for transformers: no data, no order, no
compensation; over the layers inside the blocks, so that embeddings and heads stay whole. In one
ranking over all layers it is `global-mp`; composed with other allocations, `one-shot`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from secateurs.calibration.layerwise import LayerwisePruner, Pruned, Removal, Scope, mask_of
from secateurs.calibration.moments import Moments
from secateurs.registry import Tags, register
from secateurs.settings import option


@register(
    "magnitude",
    paper=None,
    tags=Tags("U+SS", "weight+nm+block", "PTP", "mag"),
    budgets=("sparsity", "density", "n:m"),
)
@dataclass(frozen=True)
class Magnitude(LayerwisePruner):
    """|w|, the same share of every layer inside the blocks."""

    scope: Scope = option("matrix", "compare within the whole matrix, or within each output row")

    def prune_layer(self, weight: Tensor, removal: Removal, moments: Moments | None) -> Pruned:
        mask = mask_of(weight.abs(), removal, self.scope)
        return Pruned(weight * mask, mask)
