"""2:4 weights in the kernels that skip their zeros.

NVIDIA's sparse tensor cores (compute capability 8.0 and later) multiply a matrix of which two in
every four consecutive inputs are zero at up to twice the speed, in half precision, from half the
memory and 2 bits a weight. torch packs such weights (`torch.sparse.to_sparse_semi_structured`).
Elsewhere the dense product of the same weights is right, only no faster: it stays, and the answer
says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described, require

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest difference of a packed layer's output beside the dense one's largest, by dtype."""


@dataclass(frozen=True)
class Packed:
    """What became of the linear layers of a model.

    Attributes:
        packed: names of layers that run in sparse kernels now.
        dense: names of 2:4 layers that stay dense, and why.
    """

    packed: tuple[str, ...]
    dense: Mapping[str, str]


def is_two_of_four(weight: Tensor) -> bool:
    """Whether of every four consecutive inputs of an output at least two have weight zero."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool((weight.detach().reshape(-1, 4) != 0).sum(1).le(2).all())


@torch.no_grad()
def pack_semi_structured(model: nn.Module) -> Packed:
    """Put all 2:4 linear layers of a model into sparse kernels, in place, where it can be done.

    Every layer is checked against its dense product on random inputs before it is replaced. A
    packed model is for inference; `unpack_semi_structured` undoes it.

    Raises:
        InputError: no linear layer is 2:4, or a kernel gives other outputs than the dense layer.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and not _is_packed(layer) and is_two_of_four(layer.weight)
    }
    if not layers:
        shown = described(f"{type(model).__name__} without a 2:4 linear layer")
        raise InputError("model", shown, "one that was pruned with the budget 2:4")
    packed, dense = [], {}
    for name, layer in layers.items():
        if reason := unsupported(layer.weight):
            dense[name] = reason
            continue
        weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
        _compare(name, layer, weight)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        packed.append(name)
    return Packed(tuple(packed), dense)


@torch.no_grad()
def unpack_semi_structured(model: nn.Module) -> None:
    """Dense weights again, in place."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and _is_packed(layer):
            layer.weight = nn.Parameter(layer.weight.detach().to_dense())


def unsupported(weight: Tensor) -> str:
    """Why the sparse kernels do not take a weight; empty if they do."""
    if weight.device.type != "cuda":
        return f"no sparse kernels on {weight.device.type}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if weight.dtype not in TOLERANCE:
        return f"no sparse kernels for {str(weight.dtype).removeprefix('torch.')}"
    rows, columns = weight.shape
    if rows % 64 or columns % 64:
        return f"its sizes {rows} x {columns} are not multiples of 64"
    return ""


def _is_packed(layer: nn.Linear) -> bool:
    return isinstance(layer.weight.data, torch.sparse.SparseSemiStructuredTensor)


def _compare(name: str, layer: nn.Linear, weight: Tensor) -> None:
    generator = torch.Generator(device=weight.device).manual_seed(0)
    inputs = torch.randn(
        64, layer.in_features, generator=generator, device=weight.device, dtype=layer.weight.dtype
    )
    wanted = nn.functional.linear(inputs, layer.weight)
    gap = float((nn.functional.linear(inputs, weight) - wanted).abs().max() / wanted.abs().max())
    limit = TOLERANCE[layer.weight.dtype]
    require(gap <= limit, f"layer {name}", described(f"a gap of {gap:.2g}"), f"at most {limit:g}")
