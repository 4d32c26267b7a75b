"""A bypass: a cheap way around a layer, at its full output width.

    b(x) = PW(DW(x))

DW is depthwise with the kernel, stride, padding and dilation of the layer, PW is 1x1 in groups;
neither has a bias, nor is there a norm between them. Where the kernel is a single place (and in a
linear layer) DW would be a factor per input, which PW holds already: it is left out. The cost per
output position is C_i · k² + C_i · C_o / groups: 416 instead of 9216 for 3x3 with 32 channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described

_DIMENSIONS: dict[Any, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.Linear: 0}
GROUPS = 8
"""Most groups of the 1x1 part."""


def image_dimensions(layer: nn.Module) -> int:
    """Spatial dimensions of a layer that can have a bypass; 0 for a linear one.

    Raises:
        InputError: another kind of layer, or a grouped convolution.
    """
    dimensions = _DIMENSIONS.get(type(layer))
    if dimensions is None or getattr(layer, "groups", 1) != 1:
        raise InputError(
            "layer", described(repr(layer)), "a convolution without groups, or a linear layer"
        )
    return int(dimensions)


def widths_of(layer: Any) -> tuple[int, int, tuple[int, ...]]:
    """Inputs, outputs and kernel."""
    outputs, inputs, *kernel = layer.weight.shape
    return int(inputs), int(outputs), tuple(kernel)


def bypass_groups(inputs: int, outputs: int) -> int:
    """Groups of the 1x1 part: gcd(inputs, outputs, 8)."""
    return math.gcd(inputs, outputs, GROUPS)


def bypass_weights(layer: nn.Module) -> int:
    """Parameters of a bypass around `layer`, which are its multiply-accumulates a position."""
    inputs, outputs, kernel = widths_of(layer)
    image_dimensions(layer)
    places = math.prod(kernel)
    deep = inputs * places if places > 1 else 0
    return deep + inputs * outputs // bypass_groups(inputs, outputs)


class Bypass(nn.Module):
    """PW(DW(x)) beside a layer: its inputs to its outputs, with fresh weights."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        dimensions = image_dimensions(layer)
        inputs, outputs, kernel = widths_of(layer)
        groups = bypass_groups(inputs, outputs)
        like: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.depth: nn.Module = nn.Identity()
        self.point: nn.Module
        if dimensions == 0:
            self.point = GroupedLinear(inputs, outputs, groups, **like)
            return
        kind = type(layer)
        place = {n: getattr(layer, n) for n in ("stride", "padding", "dilation", "padding_mode")}
        once: dict[str, Any] = {}
        if math.prod(kernel) > 1:
            self.depth = kind(inputs, inputs, kernel, groups=inputs, bias=False, **place, **like)
        else:
            once = {n: place[n] for n in ("stride", "padding", "padding_mode")}
        self.point = kind(inputs, outputs, 1, groups=groups, bias=False, **once, **like)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer takes -> what it gives."""
        result: Tensor = self.point(self.depth(x))
        return result


class GroupedLinear(nn.Module):
    """A linear layer without bias whose inputs and outputs are cut into equal groups.

    Attributes:
        weight: (groups, outputs of a group, inputs of a group).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        groups: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        shape = (groups, outputs // groups, inputs // groups)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform up to 1/sqrt(inputs of a group), as `nn.Linear` draws."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        parts = x.unflatten(-1, (self.weight.shape[0], self.weight.shape[2]))
        return torch.einsum("...gi,goi->...go", parts, self.weight).flatten(-2)
