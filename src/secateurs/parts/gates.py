"""Binary gates that learn, what makes them agree, and what makes them close.

A gate is open or closed, g = 1[q ≥ 1/2] with q in (0, 1), and is trained as if it were q itself:
∂g/∂q = 1 (straight-through). Over a batch of N samples unit u is open for the share
ḡ_u = 1/N Σ_n g_nu of them. Two terms shape the shares (arXiv 2302.10798):

    R_pol = 1/U Σ_u ḡ_u (1 − ḡ_u)         0 where all samples agree, 1/4 where half of them do
    R_act = max(0, Σ_u c_u ḡ_u − s)       what is open costs more than the budget s allows
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from secateurs.errors import described, require


def binary_gate(probability: Tensor) -> Tensor:
    """1 where `probability` is at least 1/2, else 0; the gradient passes straight through."""
    hard = (probability >= 0.5).to(probability.dtype)
    # in this order the sum is 0 or 1 to the bit
    return hard + (probability - probability.detach())


def batch_means(gates: Tensor) -> Tensor:
    """ḡ, (units,): means over the batch of gates (N, units); over all processes' batches.

    Products of means are to be taken of these: halves that agree within and disagree with each
    other are a split vote.
    """
    shape = described(f"shape {tuple(gates.shape)}")
    require(gates.ndim == 2 and len(gates) > 0, "gates", shape, "(samples, units)")
    means = gates.mean(0)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_reduce

        total: Tensor = all_reduce(means)
        means = total / dist.get_world_size()
    return means


def polarization(means: Tensor) -> Tensor:
    """R_pol of the shares ḡ of all units; its gradient, (1 − 2ḡ)/U, makes majorities grow."""
    return (means * (1 - means)).mean()


def over_budget(cost: Tensor, budget: float | Tensor) -> Tensor:
    """R_act: what a cost is above its budget, 0 below."""
    return F.relu(cost - torch.as_tensor(budget, dtype=cost.dtype, device=cost.device))
