"""LoRA that peft trained, taken out of its model: the matrices A and B of every layer.

A `peft.PeftModel` has the model inside, with its layers wrapped. `detach` puts the layers back and
says what the adapters were, so that their training can go on in `secateurs.training.adapters`;
`merged` adds them to the weights, as peft's ``merge_and_unload`` does, on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.calibration.moments import weight_from_matrices
from secateurs.errors import InputError, described, require
from secateurs.parts.deltas import low_rank_delta
from secateurs.parts.peft_layers import is_peft
from secateurs.training.adapters import AdaptedLayer, obstacles, replace_layers


@dataclass(frozen=True)
class Lora:
    """An adapter: W + scale · up down.

    Attributes:
        down, up: A (rank, inputs) and B (outputs, rank).
        scale: of their product.
        dropout: of what A is given.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def alpha(self) -> float:
        """scale · rank, whatever peft divided it by."""
        return self.scale * self.rank

    def delta(self, layer: nn.Module) -> Tensor:
        """scale · up down in the layout of a layer's weight, in float32 at least."""
        product = low_rank_delta(self.down.detach(), self.up.detach(), self.scale)
        return weight_from_matrices(layer, product[None])


def detach(model: nn.Module) -> tuple[nn.Module, dict[str, Lora]]:
    """The model inside a peft model, its layers put back in place, and its adapters by layer.

    Its parameters can be trained again; a model without peft is given back as it is.

    Raises:
        InputError: adapters that are not one plain LoRA of linear layers, active and not merged.
    """
    if not any(is_peft(module) for module in model.modules()):
        return model, {}
    inner = getattr(model, "get_base_model", lambda: model)()
    if not is_peft(model) or is_peft(inner):
        told = f"{type(model).__name__} without LoRA of peft.get_peft_model"
        raise InputError("model", described(told), "a peft.PeftModel with LoRA, or none of peft's")
    found: dict[str, Lora] = {}
    layers: dict[int, nn.Module] = {}
    inside: set[int] = set()
    for name, module in inner.named_modules():
        if not is_peft(module) or id(module) in inside:
            continue
        inside.update(id(part) for part in module.modules())
        lora = _read(name, module)
        base: Any = module.base_layer
        layers[id(module)] = base.train(module.training)
        if lora is not None:
            found[name] = lora
    replace_layers(inner, layers)
    for parameter in inner.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return inner, found


def adopt(layers: Mapping[str, AdaptedLayer], found: Mapping[str, Lora]) -> None:
    """Let adapters of the same ranks begin where others are."""
    with torch.no_grad():
        for name, lora in found.items():
            layers[name].down.copy_(lora.down)
            layers[name].up.copy_(lora.up)


@torch.no_grad()
def add(model: nn.Module, found: Mapping[str, Lora]) -> None:
    """Add adapters to the weights of their layers, in place; the sum is rounded once.

    Raises:
        InputError: a weight that another layer has too, which merging would change.
    """
    for name, reason in obstacles(model, found).items():
        raise InputError(f"adapter {name}", described(f"on {reason}"), "a weight of its own")
    for name, lora in found.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        delta = lora.delta(layer)
        weight.copy_(weight.to(delta.dtype) + delta.to(weight.device))


def merged(model: nn.Module) -> nn.Module:
    """The model with peft's adapters merged, a copy; itself where there are none."""
    if not any(is_peft(module) for module in model.modules()):
        return model
    inner, found = detach(copy.deepcopy(model))
    add(inner, found)
    return inner


def _read(name: str, module: Any) -> Lora | None:
    """The active adapter of a layer, if it has it."""

    def check(fits: bool, told: str) -> None:
        require(fits, f"adapter {name}", described(told), "one plain LoRA, active and not merged")

    base: Any = getattr(module, "base_layer", None)
    linear = isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"
    plain = linear and hasattr(module, "lora_A") and not is_peft(base)
    check(plain, f"peft's {type(module).__name__} around {type(base).__name__}")
    active = list(module.active_adapters)
    check(len(active) == 1, f"active adapters {', '.join(active) or 'none'}")
    check(not module.merged and not module.disable_adapters, "an adapter merged or switched off")
    own = active[0]
    if own not in module.lora_A:
        return None
    variant = getattr(module, "lora_variant", {}).get(own)
    check(variant is None, f"LoRA's variant {type(variant).__name__}")
    check(module.lora_B[own].bias is None, "LoRA with a bias of its own")
    dropout = getattr(module.lora_dropout[own], "p", 0.0)
    down, up = module.lora_A[own].weight, module.lora_B[own].weight
    return Lora(down.detach(), up.detach(), float(module.scaling[own]), float(dropout))
