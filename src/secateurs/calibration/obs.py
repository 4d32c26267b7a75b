"""The optimal brain surgeon: remove weights of a layer and let the others make up for them.

The layer's output error under a change Δ of its weights W (out, d) is the quadratic

    L(Δ) = 1/2 tr(Δ H Δᵀ),    H = (2/N) Σ x xᵀ    (`secateurs.calibration.moments`),

so what to remove and how to adapt the rest have closed forms (Hassibi & Stork, 1993). Everything
here takes H through `damp`, once, and then shares one factorisation:

    H = R Rᵀ,    U = R⁻¹,    H⁻¹ = Uᵀ U    with R and U upper triangular.

- `weight_costs`, `bundle_costs`: what it costs to remove each weight or each set of columns alone;
- `remove_columns`: whole columns at once, exactly (OBSPA, arXiv 2403.18955);
- `sweep_columns`: single weights, column after column, where only the columns to the right of
  the current one adapt (SparseGPT, arXiv 2301.00774).

All weights are matrices (out, d); layers that read the same inputs are stacked over `out`, and
the groups of a convolution are solved one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from secateurs.errors import InputError, described, require
from secateurs.parts.patterns import NM
from secateurs.parts.prunable import check_finite
from secateurs.parts.topk import select_largest

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal."""
RAISE = 10.0
"""A factorisation that fails is tried again with this many times the damping ..."""
RAISES = 8
"""... at most so often."""
LEAST = 1e-8
"""The first damping above 0."""
BLOCK_SIZE = 128
"""Columns after which a sweep brings all later ones up to date."""
SKEW = 1e-5
"""Largest |H - Hᵀ| beside the largest |H|, as float32 sums may leave it."""


@dataclass(frozen=True)
class DampedHessian:
    """A second moment made positive definite, and its factor.

    Attributes:
        matrix: H + damping x mean(diag H) x I, (d, d) float64.
        factor: R, upper triangular with R Rᵀ = matrix.
        damping: the share that was used in the end.
        dead: (d,) bool, inputs that were always zero; their H_ii is 1, and every solution
            has zeros in their columns.
        note: what a reader should know, such as that the damping had to be raised; "" if nothing.
    """

    matrix: Tensor
    factor: Tensor
    damping: float
    dead: Tensor
    note: str = ""

    @cached_property
    def inverse_root(self) -> Tensor:
        """U, upper triangular with Uᵀ U = H⁻¹."""
        factor = self.factor
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity, upper=True)


@dataclass(frozen=True)
class Compensated:
    """A layer after a removal.

    Attributes:
        weight: (out, d), in the dtype and on the device of the one that was given; removed
            weights are zero.
        mask: (out, d) bool, True = kept.
        cost: 1/2 tr(Δ H Δᵀ) with the damped H and Δ counted from the weights of live inputs.
    """

    weight: Tensor
    mask: Tensor
    cost: float


def damp(hessian: Tensor, damping: float = DAMPING) -> DampedHessian:
    """H + damping x mean(diag H) x I, factorised.

    Inputs that were always zero (H_ii = 0) get H_ii = 1 and do not count in the mean, so that
    solutions do not depend on the unit in which inputs are measured. A matrix that is not
    positive definite to rounding is tried again with 10 times the damping, and the note of the
    result says so.

    Args:
        hessian: (d, d), symmetric.
        damping: 0 or more; 0 asks for the exact solution.

    Raises:
        InputError: another shape, NaN or Inf, asymmetry, a negative diagonal, or a matrix that
            no damping made positive definite.
    """
    require(damping >= 0, "damping", damping, "0 or more, such as 0.01")
    matrix = _checked_hessian(hessian).to(torch.float64, copy=True)
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    live = ~dead
    scale = float(diagonal[live].mean()) if live.any() else 1.0
    matrix[dead, :] = 0
    matrix[:, dead] = 0
    diagonal[dead] = 1
    added, used = 0.0, damping
    for _ in range(RAISES + 1):
        diagonal += live * ((used - added) * scale)
        added = used
        factor = _upper_factor(matrix)
        if factor is not None:
            return DampedHessian(matrix, factor, used, dead, _note(damping, used, dead))
        used = max(used * RAISE, LEAST)
    raise InputError(
        "hessian",
        described(f"one that is not positive definite even with a damping of {added:g}"),
        "a second moment 2/N Σ x xᵀ, which has no negative eigenvalue",
    )


def weight_costs(weight: Tensor, hessian: DampedHessian) -> Tensor:
    """w_ij² / (2 [H⁻¹]_jj): the loss increase when a weight goes alone and its row adapts.

    Returns:
        (out, d) float64, zero for dead inputs.
    """
    live = _live(weight, hessian)
    return live.square() / (2 * hessian.inverse_root.square().sum(0))


def bundle_costs(
    weight: Tensor, hessian: DampedHessian, bundles: Tensor | Sequence[Sequence[int]]
) -> Tensor:
    """1/2 tr(W_P [H⁻¹]_PP⁻¹ W_Pᵀ) for each bundle P of columns, removed alone.

    Args:
        weight: (out, d).
        bundles: the columns of each, such as the kernel positions of one channel or what one
            head feeds: (n, k) int64, or sequences that may differ in length and may overlap.

    Returns:
        (n,) float64.
    """
    live = _live(weight, hessian)
    width = live.shape[1]
    listed = bundles.cpu() if isinstance(bundles, Tensor) else bundles
    indices = [_checked_columns("bundles", bundle, width) for bundle in listed]
    costs = live.new_zeros(len(indices))
    for size in {len(index) for index in indices} - {0}:
        places = [place for place, index in enumerate(indices) if len(index) == size]
        columns = torch.stack([indices[place] for place in places]).to(live.device)
        roots = hessian.inverse_root[:, columns].movedim(0, 1)  # (bundles, d, size)
        gram = torch.linalg.cholesky(roots.mT @ roots)
        parts = live[:, columns].permute(1, 2, 0)  # (bundles, size, out)
        solved = torch.linalg.solve_triangular(gram, parts, upper=False)
        costs[places] = solved.square().sum((1, 2)) / 2
    return costs


def remove_columns(
    weight: Tensor, hessian: DampedHessian, columns: Tensor | Sequence[int]
) -> Compensated:
    """Set whole columns P to zero and let the others, K, make up for them as well as they can.

    W_K ← W H_{:,K} (H_KK)⁻¹ = W_K + W_P H_PK (H_KK)⁻¹, the least-squares fit of the old outputs
    to the inputs that are left; the loss rises by 1/2 tr(W_P [H⁻¹]_PP⁻¹ W_Pᵀ), which is computed
    from the Schur complement [H⁻¹]_PP⁻¹ = H_PP − H_PK (H_KK)⁻¹ H_KP.

    Args:
        weight: (out, d).
        columns: indices to remove, each once.
    """
    live = _live(weight, hessian)
    matrix = hessian.matrix
    removed = _checked_columns("columns", columns, live.shape[1]).to(matrix.device)
    stays = torch.ones(live.shape[1], dtype=torch.bool, device=matrix.device)
    stays[removed] = False
    kept = stays.nonzero().view(-1)
    lost = live[:, removed]
    factor, failed = torch.linalg.cholesky_ex(matrix[kept][:, kept])
    require(not failed, "hessian", described("one that is singular to rounding"), "more damping")
    shift = torch.cholesky_solve(matrix[kept][:, removed] @ lost.t(), factor).t()
    schur = lost @ matrix[removed][:, removed] - shift @ matrix[kept][:, removed]
    solution = torch.zeros_like(live)
    solution[:, kept] = live[:, kept] + shift
    mask = stays.expand_as(live).contiguous()
    cost = max(0.0, float((schur * lost).sum()) / 2)  # rounding can leave a tiny negative
    return Compensated(solution.to(weight), mask.to(weight.device), cost)


def sweep_columns(
    weight: Tensor,
    hessian: DampedHessian,
    removal: float | NM | Tensor,
    *,
    block_size: int = BLOCK_SIZE,
    dtype: torch.dtype | None = None,
) -> Compensated:
    """Remove single weights, column after column, each time adapting all columns to the right.

    With e_j = (w_j − q_j) / U_jj for the removed part of column j, all later columns change by
    −e_j U_{j,:}; the loss rises by Σ 1/2 ‖e_j‖². The updates of a block's errors to everything
    right of the block are one matrix product, which changes the time and not the result.

    Args:
        weight: (out, d). Groups of N:M are consecutive columns: for a convolution, sort the
            columns of weight and H by kernel position first.
        removal: what goes. A sparsity: that share of each block of columns, of the lowest
            w² / (2 U_jj²) when the sweep arrives there; round(sparsity x out x d) in all.
            `NM`: n of each m stay, chosen when the sweep arrives at the group.
            A mask (out, d), True = keep.
        block_size: columns in a block. For a sparsity it is part of the method; otherwise it
            only changes the time.
        dtype: to compute in; by default that of the weight, but at least float32.

    Raises:
        InputError: a sparsity outside [0, 1], a width that m does not divide, a mask of another
            shape or dtype, or what `weight` and `hessian` are refused for.
    """
    _check_weight(weight, hessian)
    out, width = weight.shape
    _check_removal(removal, out, width)
    require(block_size >= 1, "block_size", block_size, "at least 1")
    if isinstance(removal, NM):
        block_size = -(-block_size // removal.m) * removal.m  # groups do not straddle blocks
    span = removal.m if isinstance(removal, NM) else block_size
    dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
    device = hessian.matrix.device
    # transposed: a column of W is then contiguous, as are the columns of a block
    rest = weight.detach().t().to(device, dtype).clone(memory_format=torch.contiguous_format)
    rest[hessian.dead] = 0
    mask = torch.empty_like(rest, dtype=torch.bool)
    errors = rest.new_empty(min(block_size, width), out)
    gone = torch.empty_like(errors)  # 1 or 0: a product with floats is faster than with bools
    cost = 0.0
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        size = stop - start
        root = hessian.inverse_root[start:stop, start:].to(dtype)
        pivots = root.diagonal().tolist()
        block, later = rest[start:stop], rest[stop:]
        for j in range(size):
            if j % span == 0:
                group = slice(j, min(j + span, size))
                costs = (block[group] / root.diagonal()[group, None]).square_().div_(2)
                columns = slice(start + group.start, start + group.stop)
                mask[columns] = _kept(removal, costs.t(), columns).t()
                gone[group] = ~mask[columns]
            error = torch.div(block[j], pivots[j], out=errors[j]).mul_(gone[j])
            block[j + 1 :].addr_(root[j, j + 1 : size], error, alpha=-1)
        later.addmm_(root[:, size:].t(), errors[:size], alpha=-1)
        cost += float(errors[:size].square().sum(dtype=torch.float64)) / 2
    rest.mul_(mask)
    solution, kept = rest.t().to(weight).contiguous(), mask.t().to(weight.device).contiguous()
    return Compensated(solution, kept, cost)


def _kept(removal: float | NM | Tensor, costs: Tensor, columns: slice) -> Tensor:
    """Which weights of some columns stay, (out, columns) bool, by their costs of that shape."""
    if isinstance(removal, Tensor):
        return removal[:, columns]
    if isinstance(removal, NM):
        return removal.mask(costs)
    # rounded at the ends of blocks, so that the total is exact
    before, after = (round(removal * len(costs) * end) for end in (columns.start, columns.stop))
    return select_largest([costs], costs.numel() - (after - before))[0]


def _upper_factor(matrix: Tensor) -> Tensor | None:
    """R, upper triangular with R Rᵀ = matrix; None unless it is positive definite to rounding.

    The Cholesky factor of the matrix with rows and columns reversed, reversed. Its squared
    pivots are what is left of the diagonal once all later inputs are projected out; those of
    dependent inputs are rounding errors, of any sign.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if failed:
        return None
    factor = lower.flip(0, 1)
    least = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal()
    return factor if bool((factor.diagonal().square() > least).all()) else None


def _note(asked: float, used: float, dead: Tensor) -> str:
    notes = []
    if used != asked:
        notes.append(f"damping raised from {asked:g} to {used:g}: H was not positive definite")
    if dead.any():
        notes.append(f"{int(dead.sum())} of {len(dead)} inputs were always zero: weights dropped")
    return "; ".join(notes)


def _live(weight: Tensor, hessian: DampedHessian) -> Tensor:
    """The weight in float64 beside the Hessian, with zeros in the columns of dead inputs."""
    _check_weight(weight, hessian)
    return weight.detach().to(hessian.matrix).masked_fill(hessian.dead, 0)


def _check_weight(weight: Tensor, hessian: DampedHessian) -> None:
    width = len(hessian.matrix)
    if weight.ndim != 2 or weight.shape[1] != width or not weight.is_floating_point():
        given = described(f"{weight.dtype} of shape {tuple(weight.shape)}")
        raise InputError("weight", given, f"a floating point matrix (out, {width})")
    check_finite({"weight": weight})


def _checked_hessian(hessian: Tensor) -> Tensor:
    matrix = hessian.detach()
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] >= 1
    if not (square and matrix.is_floating_point()):
        given = described(f"{matrix.dtype} of shape {tuple(matrix.shape)}")
        raise InputError("hessian", given, "a floating point matrix (d, d), one for each group")
    accepted = "a symmetric, finite second moment 2/N Σ x xᵀ"
    largest = float(matrix.abs().max())
    require(math.isfinite(largest), "hessian", described("NaN or Inf"), accepted)
    skew = float((matrix - matrix.t()).abs().max())
    require(skew <= SKEW * largest, "hessian", described("an asymmetric matrix"), accepted)
    least = float(matrix.diagonal().min())
    require(least >= 0, "hessian", described(f"a diagonal entry of {least:g}"), accepted)
    return matrix


def _checked_columns(argument: str, columns: Tensor | Sequence[int], width: int) -> Tensor:
    index = torch.as_tensor(columns).cpu()
    if index.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    accepted = f"distinct column indices, 0 to {width - 1}"
    integers = index.ndim == 1 and index.dtype != torch.bool and not index.is_floating_point()
    given = described(f"{index.dtype} of shape {tuple(index.shape)}")
    require(integers, argument, given, accepted)
    inside = int(index.min()) >= 0 and int(index.max()) < width
    require(inside and len(index.unique()) == len(index), argument, index.tolist(), accepted)
    return index.long()


def _check_removal(removal: float | NM | Tensor, out: int, width: int) -> None:
    if isinstance(removal, Tensor):
        fits = removal.dtype == torch.bool and removal.shape == (out, width)
        given = described(f"{removal.dtype} of shape {tuple(removal.shape)}")
        require(fits, "removal", given, f"a bool mask ({out}, {width}), True = kept")
    elif isinstance(removal, NM):
        fits = removal.fits(torch.Size((out, width)))
        require(fits, "removal", str(removal), f"N:M with an M that divides the width {width}")
    else:
        require(0 <= removal <= 1, "removal", removal, "a sparsity, 0 to 1")
