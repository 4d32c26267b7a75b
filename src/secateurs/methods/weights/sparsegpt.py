"""SparseGPT: column after column goes, and the columns to its right make up for it.

Paper: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
arXiv 2301.00774. With H = 2/N Σ x xᵀ + λI and Uᵀ U = H⁻¹, a removed w_j costs w_j² / (2 U_jj²)
and changes all later columns by −(w_j / U_jj) U_j: (`secateurs.calibration.obs.sweep_columns`,
the solver that OBSPA uses too). The mask of a block of `block_size` columns is chosen when the
sweep arrives there, over all its rows together; N:M group by group. λ is `damping` times the
mean diagonal and is raised, with a note, where H cannot be factorised.

Where the paper is silent: other patterns (block:RxC) take their mask from w² / [H⁻¹]_jj summed
over a tile, before the sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateurs.calibration.layerwise import LayerwisePruner, Pruned, Removal, Statistic, mask_of
from secateurs.calibration.moments import Moments
from secateurs.calibration.obs import (
    BLOCK_SIZE,
    DAMPING,
    Compensated,
    DampedHessian,
    damp,
    sweep_columns,
    weight_costs,
)
from secateurs.errors import require
from secateurs.parts.patterns import NM, Unstructured
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option


@register(
    "sparsegpt",
    paper=Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "ICML",
        2023,
        "2301.00774",
    ),
    tags=Tags("U+SS", "weight+nm+block", "PTP", "loss"),
    budgets=("sparsity", "density", "n:m"),
)
@dataclass(frozen=True)
class SparseGPT(LayerwisePruner):
    """Optimal brain surgeon in one sweep over the columns of every layer."""

    needs: ClassVar[tuple[str, ...]] = ("inputs",)
    statistic: ClassVar[Statistic] = "products"

    damping: float = option(DAMPING, "share of the mean diagonal added to the Hessian")
    block_size: int = option(BLOCK_SIZE, "columns whose mask is chosen together", "columns")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.damping >= 0, "damping", self.damping, "0 or more")
        require(self.block_size >= 1, "block_size", self.block_size, "at least 1")

    def prune_layer(self, weight: Tensor, removal: Removal, moments: Moments | None) -> Pruned:
        assert moments is not None
        hessian = moments.hessian
        ends = [removal.keep * g // len(weight) for g in range(len(weight) + 1)]
        solved, notes = [], []
        for group, matrix in enumerate(weight):
            damped = damp(hessian[group], self.damping)
            own = Removal(ends[group + 1] - ends[group], removal.pattern)
            solved.append(self._swept(matrix, damped, own))
            notes.append(damped.note)
        if moments.rows < weight.shape[2]:
            notes.append(f"only {moments.rows} vectors for {weight.shape[2]} inputs")
        return Pruned(
            torch.stack([s.weight for s in solved]),
            torch.stack([s.mask for s in solved]),
            "; ".join(dict.fromkeys(n for n in notes if n)),
        )

    def _swept(self, matrix: Tensor, hessian: DampedHessian, removal: Removal) -> Compensated:
        what: float | NM | Tensor
        if isinstance(removal.pattern, NM):
            what = removal.pattern
        elif isinstance(removal.pattern, Unstructured):
            what = 1 - removal.keep / matrix.numel()
        else:
            what = mask_of(weight_costs(matrix, hessian)[None], removal, "matrix")[0]
        return sweep_columns(matrix, hessian, what, block_size=self.block_size)
