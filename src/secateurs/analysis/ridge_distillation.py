"""Why a teacher that saw more helps a student that sees less, in ridge regression.

Columns of X are samples, y = Xᵀθ + noise, A = X Xᵀ; f are the student's, t the teacher's:

    θ_t    = (A_t + λ)⁻¹ X_t y_t
    θ_s    = (A_f + λ)⁻¹ X_f (α X_fᵀ θ_t + (1 − α) y_f)
    E[θ_s] = (A_f + λ)⁻¹ A_f (1 − α λ (A_t + λ)⁻¹) θ

over the noise. The more the teacher saw, the smaller the bias; α itself adds to it, and what it
buys is a smaller variance. Source: arXiv 2403.07854, derived anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateurs.errors import described, require


def ridge(inputs: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """(X Xᵀ + λ)⁻¹ X y.

    Args:
        inputs: X, (width, samples). targets: y, (samples,) or (samples, several).
        penalty: λ, above 0.
    """
    return torch.linalg.solve(_damped(inputs @ inputs.T, penalty), inputs @ targets)


def ridge_student(
    inputs: Tensor, targets: Tensor, teacher: Tensor, penalty: float, alpha: float
) -> Tensor:
    """θ_s of the samples that are kept, taught by θ_t."""
    require(0 <= alpha <= 1, "alpha", alpha, "a share in [0, 1]")
    taught = alpha * (inputs.T @ teacher) + (1 - alpha) * targets
    return ridge(inputs, taught, penalty)


def expected_student(
    kept: Tensor, seen: Tensor, truth: Tensor, penalty: float, alpha: float
) -> Tensor:
    """E[θ_s].

    Args:
        kept, seen: A_f of the student and A_t of the teacher, (width, width).
        truth: θ, (width,).
    """
    require(0 <= alpha <= 1, "alpha", alpha, "a share in [0, 1]")
    of_teacher = torch.linalg.solve(_damped(seen, penalty), truth)
    return torch.linalg.solve(_damped(kept, penalty), kept @ (truth - alpha * penalty * of_teacher))


def _damped(moment: Tensor, penalty: float) -> Tensor:
    require(penalty > 0, "penalty", penalty, "above 0")
    square = moment.ndim == 2 and moment.shape[0] == moment.shape[1]
    require(square, "moment", described(f"shape {tuple(moment.shape)}"), "a square matrix")
    return moment + penalty * torch.eye(len(moment), dtype=moment.dtype)
