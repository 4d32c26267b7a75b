"""Scales of normalisation layers: one γ a channel, in y = γ · (x − mean) / std + β.

A channel whose γ is zero says nothing but its β, whatever its filter holds. So |γ| is its
saliency, and a pull of all γ towards zero makes it tell more (network slimming, arXiv 1708.06519).
A pull on some of them alone makes room for a removal that is decided (MaskSparsity, arXiv
2201.06776).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from secateurs.errors import InputError, described, require, unknown

Pull = Literal["l1", "l2", "smooth_l1"]
"""What is added to the gradient of a scale."""

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


def add_l1_subgradient_(scales: Mapping[str, nn.Parameter], strength: float) -> None:
    """Add strength · sign(γ) to the gradients, in place.

    That is a sub-gradient of strength · Σ|γ|, the one that is 0 at γ = 0. Scales that do not
    train are passed over.
    """
    add_pull_(scales, strength)


@torch.no_grad()
def add_pull_(
    scales: Mapping[str, nn.Parameter],
    strength: float,
    *,
    doomed: Mapping[str, Tensor] | None = None,
    kind: Pull = "l1",
    rate: float | None = None,
) -> None:
    """Add a pull towards zero to the gradients, in place, on all scales or on some of them.

        l1: s · sign(γ)      l2: s · γ      smooth_l1: s · γ where |γ| < rate · s, else s · sign(γ)

    Args:
        doomed: True = pulled, by name and in the shape of the scale; a scale that is not listed
            gets no pull. All of them without it.
        rate: the learning rate of the step, for ``smooth_l1``.

    Raises:
        InputError: a mask of a scale that is not there, or of another shape.
    """
    if kind not in get_args(Pull):
        raise unknown("kind", kind, get_args(Pull))
    require(kind != "smooth_l1" or rate is not None, "rate", rate, "a learning rate, for smooth_l1")
    for name, mask in (doomed or {}).items():
        if name not in scales:
            raise unknown("doomed", name, scales)
        shapes = described(f"shape {tuple(mask.shape)}")
        expected = f"shape {tuple(scales[name].shape)}, the scale's"
        require(mask.shape == scales[name].shape, f"doomed {name}", shapes, expected)
    for name, scale in scales.items():
        mask_of = None if doomed is None else doomed.get(name)
        if not scale.requires_grad or (doomed is not None and mask_of is None):
            continue
        if scale.grad is None:
            scale.grad = torch.zeros_like(scale)
        pull = scale if kind == "l2" else scale.sign()
        if kind == "smooth_l1" and rate is not None:
            pull = torch.where(scale.abs() < rate * strength, scale, pull)
        if mask_of is not None:
            pull = torch.where(mask_of.to(scale.device), pull, torch.zeros_like(pull))
        scale.grad.add_(pull, alpha=strength)
