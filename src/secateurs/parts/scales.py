"""Scales of normalisation layers: one γ a channel, in y = γ · (x − mean) / std + β.

A channel whose γ is zero says nothing but its β, whatever its filter holds. So |γ| is its
saliency, and a pull of all γ towards zero makes it tell more (network slimming, arXiv 1708.06519).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from secateurs.errors import InputError, described

_SCALED = (_NormBase, nn.LayerNorm, nn.GroupNorm)


def norm_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The γ of every batch, instance, layer and group norm by qualified name.

    Layers without a scale (``affine=False``) are left out; a scale that is used twice is listed
    once.

    Raises:
        InputError: the model has none.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        scale = module.weight if isinstance(module, _SCALED) else None
        if scale is not None and id(scale) not in seen:
            seen.add(id(scale))
            found[f"{prefix}.weight" if prefix else "weight"] = scale
    if not found:
        raise InputError(
            "model",
            described(f"{type(model).__name__} without scales"),
            "a model with normalisation layers that have scales (affine=True)",
        )
    return found


@torch.no_grad()
def add_l1_subgradient_(scales: Mapping[str, nn.Parameter], strength: float) -> None:
    """Add strength · sign(γ) to the gradients, in place.

    That is a sub-gradient of strength · Σ|γ|, the one that is 0 at γ = 0. Scales that do not
    train are passed over.
    """
    for scale in scales.values():
        if not scale.requires_grad:
            continue
        if scale.grad is None:
            scale.grad = torch.zeros_like(scale)
        scale.grad.add_(scale.sign(), alpha=strength)
