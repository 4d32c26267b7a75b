"""Gradients of arrays that many weights read, rescaled so that the array's scale does not matter.

STABLE-RPS (arXiv 2310.11611): ψ.grad ← ψ.grad / (γ + 1e-6) in every step, with the γ of
`secateurs.parts.hashing.gradient_divisors`. It acts after the backward pass, the unscaling of mixed
precision and clipping, and before the optimizer's step with its weight decay. Under Adam, which is
free of the gradient's scale, it changes next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from secateurs.errors import InputError, described
from secateurs.parts.hashing import gradient_divisors
from secateurs.structure.shared import SharedArray, SharedLayer, shared_arrays, shared_layers
from secateurs.training.keeping import BeforeStep

GUARD = 1e-6
"""Added to γ, as in the public code."""


class GradientRescaler:
    """Divides the gradient of an array by γ + 1e-6, once a step.

    Rescaled twice, the updates would depend on the array's scale again: that is refused.
    """

    def __init__(self, array: SharedArray, layers: Sequence[SharedLayer]) -> None:
        self.array = array
        places = {(own.place.array, own.place.offset): own for own in layers}  # tied ones once
        gamma = gradient_divisors(
            ((own.addresses()[0], own.place.scale) for own in places.values()),
            len(array), array.grad_scale,
        )  # fmt: skip
        self.divisor = (gamma + GUARD).to(array.values.dtype)

    def __call__(self) -> None:
        gradient = self.array.values.grad
        if gradient is None:
            return
        # a new gradient, or one that was zeroed and summed up anew, has another version
        if getattr(gradient, "_rescaled_at", None) == gradient._version:
            raise InputError("gradient", described("rescaled twice"), "once in every step")
        self.divisor = self.divisor.to(gradient.device)
        gradient.div_(self.divisor)
        gradient._rescaled_at = gradient._version  # type: ignore[attr-defined]


def rescale_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[BeforeStep]:
    """Hang the rescaling of all arrays of a model on its optimizer; nothing where there is none."""
    layers = list(shared_layers(model).values())
    return [
        BeforeStep(
            optimizer,
            GradientRescaler(array, [own for own in layers if own.array_read is array]),
        )
        for array in shared_arrays(model)
        if array.grad_scale != "none"
    ]
