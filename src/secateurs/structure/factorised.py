"""Two thin layers for a wide one: convolutions and linear layers of low rank, as real layers.

    NC   kh x kw to r channels, then 1x1          VH   kh x 1 to r channels, then 1 x kw
    ND   the sum of r branches: 1x1 to all outputs, then kh x kw on each output alone

Stride, padding (its mode too), dilation and bias of the dense layer are kept: rows are the first
layer's for VH and columns the second's, and for ND all are the second's. The branches of ND could
be two layers, the second of them grouped by outputs; on a CPU that takes 1.3 to 1.7 times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from secateurs.errors import InputError, described
from secateurs.parts.costs import evaluating, forward
from secateurs.parts.low_rank import (
    Mode,
    RankPrice,
    Spectrum,
    full_rank,
    kernel_shape,
    weights_a_rank,
)
from secateurs.structure.substitution import Substitute, is_plain, owners

Layer = nn.Conv2d | nn.Linear


class Factorised(Substitute):
    """Branches of two thin layers, whose sum stands in for a dense layer; one but for ND.

    Args:
        dense: the layer that it stands in for; ungrouped where it is a convolution.
        mode: how its kernel is a matrix; NC for a linear layer.
        rank: channels between the two layers; for ND the number of branches.

    Raises:
        InputError: another layer, or a convolution with groups.
    """

    kind = "factorised"

    def __init__(self, dense: nn.Module, mode: Mode, rank: int) -> None:
        super().__init__()
        self.mode, self.rank = mode, rank
        biased = getattr(dense, "bias", None) is not None
        count = rank if mode == "ND" else 1
        self.branches = nn.ModuleList(
            nn.Sequential(*_pair(dense, mode, rank, biased and branch == 0))
            for branch in range(count)
        )

    @classmethod
    def of(cls, dense: nn.Module, found: Spectrum, rank: int) -> Self:
        """The dense layer cut to a rank of the decomposition of its weight."""
        made: Any = cls(dense, found.mode, rank)
        with torch.no_grad():
            for branch, weights in zip(made.branches, _arranged(found, rank), strict=True):
                for layer, weight in zip(branch, weights, strict=True):
                    layer.weight.copy_(weight.reshape(layer.weight.shape))
            if made.branches[0][1].bias is not None:
                made.branches[0][1].bias.copy_(dense.bias)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer takes and gives."""
        first, *others = self.branches
        y: Tensor = first(x)
        for branch in others:
            y = y + branch(x)
        return y

    def config(self) -> dict[str, Any]:
        return {"mode": self.mode, "rank": self.rank}

    @classmethod
    def shaped(cls, dense: nn.Module, config: Mapping[str, Any]) -> Self:
        return cls(dense, config["mode"], config["rank"])


def _arranged(found: Spectrum, rank: int) -> list[tuple[Tensor, Tensor]]:
    """The weights of every branch, outputs first."""
    left, right = found.factors(rank)
    n, c, kh, kw = kernel_shape(found.shape)
    if found.mode == "NC":
        return [(right, left)]
    if found.mode == "VH":
        columns = left.reshape(c, kh, rank).permute(2, 0, 1)
        return [(columns, right.reshape(rank, n, kw).transpose(0, 1))]
    return [(left[..., branch], right[:, branch]) for branch in range(rank)]


def _pair(dense: nn.Module, mode: Mode, rank: int, bias: bool) -> tuple[Layer, Layer]:
    """The thin layers of a branch, their weights not set."""
    if isinstance(dense, nn.Linear) and mode == "NC":
        return (
            _made(nn.Linear, dense, dense.in_features, rank, bias=False),
            _made(nn.Linear, dense, rank, dense.out_features, bias=bias),
        )
    if not isinstance(dense, nn.Conv2d) or dense.groups > 1:
        what = type(dense).__name__ + (" with groups" if isinstance(dense, nn.Conv2d) else "")
        raise InputError(
            "layer", described(f"{what}, mode {mode}"), "Conv2d without groups, or Linear as NC"
        )
    n, c = dense.out_channels, dense.in_channels
    whole, point = _along(dense, (0, 1)), _along(dense, ())
    rows, columns = _along(dense, (0,)), _along(dense, (1,))
    first, second = {"NC": (whole, point), "VH": (rows, columns), "ND": (point, whole)}[mode]
    between, groups = (n, n) if mode == "ND" else (rank, 1)
    return (
        _made(nn.Conv2d, dense, c, between, **first, bias=False),
        _made(nn.Conv2d, dense, between, n, **second, groups=groups, bias=bias),
    )


def _made(kind: type[Any], dense: nn.Module, *sizes: int, **options: Any) -> Any:
    """A layer on the dense one's device that draws nothing from torch's generator."""
    weight: Any = dense.weight
    return skip_init(kind, *sizes, **options, device=weight.device, dtype=weight.dtype)


def _along(dense: nn.Conv2d, sides: tuple[int, ...]) -> dict[str, Any]:
    """The shape of a convolution along some sides of its kernel, and a point along the others."""
    points = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}

    def along(name: str, point: int) -> Any:
        value = getattr(dense, name)
        if isinstance(value, str):
            return value  # "same" and "valid" are what they say for every kernel
        return tuple(value[side] if side in sides else point for side in (0, 1))

    shape = {name: along(name, point) for name, point in points.items()}
    return {**shape, "padding_mode": dense.padding_mode}


@dataclass(frozen=True)
class Site:
    """A layer that may be factorised, with how often its kernel is applied in one pass.

    Attributes:
        layer: the dense layer.
        inputs, between, outputs: positions (samples times places) of what it is given, of rows
            of outputs with columns of inputs, and of what it gives.
    """

    layer: Layer
    inputs: int
    between: int
    outputs: int

    def price(self, mode: Mode, counted: str) -> RankPrice:
        """What a rank costs, in ``macs`` or ``params``."""
        shape = kernel_shape(self.layer.weight.shape)
        first, second = weights_a_rank(shape, mode)
        if counted == "params":
            return RankPrice(prod(shape), first + second, full_rank(shape, mode))
        places = {
            "NC": (self.outputs, self.outputs),
            "VH": (self.between, self.outputs),
            "ND": (self.inputs, self.outputs),
        }[mode]
        a_rank = first * places[0] + second * places[1]
        return RankPrice(prod(shape) * self.outputs, a_rank, full_rank(shape, mode))


def sites(model: nn.Module, example_inputs: Any) -> dict[str, Site]:
    """Every ungrouped Conv2d and every Linear that a pass over the inputs calls, in that order.

    Left out are layers with a forward of their own, layers that the model has under two names or
    whose weight another has too, as neither could be exchanged alone, and layers whose weight is
    read without calling them (the projection of attention).
    """
    counts: dict[str, list[int]] = {}
    handles = []
    named = owners(model)
    for name, module in model.named_modules():
        if not name or not _can_be_factorised(module) or named[id(module.weight)] > 1:
            continue
        handles.append(module.register_forward_hook(_counting(counts, name)))
    try:
        with evaluating(model), torch.no_grad():
            forward(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Site(model.get_submodule(name), *found)  # type: ignore[arg-type]
        for name, found in counts.items()
    }


def _can_be_factorised(module: nn.Module) -> bool:
    """Whether it is an ordinary layer without groups."""
    return is_plain(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1


def _counting(counts: dict[str, list[int]], name: str) -> Any:
    def note(module: Layer, args: tuple[Tensor, ...], output: Tensor) -> None:
        n, c, *_ = module.weight.shape
        inputs, outputs = args[0].numel() // c, output.numel() // n
        between = outputs
        if isinstance(module, nn.Conv2d):
            between = outputs // output.shape[-1] * args[0].shape[-1]
        found = counts.setdefault(name, [0, 0, 0])
        for place, count in enumerate((inputs, between, outputs)):
            found[place] += count

    return note
