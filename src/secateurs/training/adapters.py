"""Low-rank adapters on frozen layers: put in, trained, merged exactly and taken out again.

With W (out, in) the frozen weight, A (r, in), B (out, r) and s = alpha / r, a layer computes

    lora         y = W x + b + s B A dropout(x)                    arXiv 2106.09685
    lora-prune   the same; when merged, W + s (B A) * M            arXiv 2312.15230
    mask-lora    y = (W + s (B A) * M) x + b                       the same
    scale-lora   y = (W * (B A)) x + b, all of A and B 1/sqrt(r)   the same

where M is the mask of the pruned weight. The last two leave the zeros where they are, so merging
them changes nothing; a plain adapter on a pruned weight can only be kept beside it
(`save_adapters`). A layer may also carry a mask of its outputs, which multiplies y: what LoRAPrune
(arXiv 2305.18403) trains under.

Before and after, the model has the same classes and the same names; only between `wrap` and
`merge` there are `AdaptedLayer`s in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateurs.calibration.moments import is_known, weight_from_matrices, weight_matrices
from secateurs.errors import InputError, described, require, unknown
from secateurs.state import write_json, write_tensors
from secateurs.training.order import mix

Kind = Literal["lora", "lora-prune", "mask-lora", "scale-lora"]
KEPT_SPARSE = ("mask-lora", "scale-lora")
"""Kinds whose effective weight has its zeros where the mask says, at every step."""


class AdaptedLayer(nn.Module):
    """A frozen layer with an adapter, in the layer's place.

    Adapters of half-precision weights are float32; the sum is made there and rounded once.

    Args:
        base: Linear, a convolution or transformers' Conv1D.
        mask: of the weight, in its shape, True = keep; all of it by default.
        dropout: of what A is given; for linear layers and the kinds that are not masked.
        outputs: whether the layer has a mask of its outputs, all ones at first.
        recompute: form the effective weight again in the backward pass, not keep it.
        generator: from which A is drawn.

    Attributes:
        down, up: A (r, in) and B (out, r).
        mask: (out, in) in the layout of the product B A; None keeps everything.
        outputs: (out,) or None.
    """

    mask: Tensor | None
    outputs: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        kind: Kind = "mask-lora",
        rank: int = 16,
        alpha: float = 32.0,
        *,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        outputs: bool = False,
        recompute: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check_options(kind, rank, alpha, dropout)
        weight = matrix_of(base)
        self.linear = not isinstance(base, nn.modules.conv._ConvNd)
        linear = self.linear or (not dropout and not outputs)
        require(linear, "dropout or outputs", type(base).__name__, "a linear layer for them")
        self.base, self.kind, self.rank, self.alpha = base, kind, rank, alpha
        self.scale, self.dropout, self.recompute = alpha / rank, dropout, recompute
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1], dtype=dtype))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank, dtype=dtype))
        self._start(generator)
        kept = None if mask is None else matrix_of(base, mask).contiguous()
        self.register_buffer("mask", kept, persistent=False)
        ones = weight.new_ones(len(weight), dtype=dtype)
        self.register_buffer("outputs", ones if outputs else None)
        self.train(base.training)

    @torch.no_grad()
    def _start(self, generator: torch.Generator | None) -> None:
        """The layer computes what it did without the adapter."""
        if self.kind == "scale-lora":
            self.down.fill_(self.rank**-0.5)
            self.up.fill_(self.rank**-0.5)
        else:
            drawn = torch.empty(self.down.shape, dtype=self.down.dtype)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            self.down.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer takes and gives."""
        if self.kind in KEPT_SPARSE or not self.linear:
            recomputed = self.recompute and torch.is_grad_enabled()
            y = checkpoint(self._merged_forward, x, use_reentrant=False) if recomputed else (
                self._merged_forward(x)
            )  # fmt: skip
        else:
            low = F.linear(F.dropout(x, self.dropout, self.training), self.down.to(x.dtype))
            y = self.base(x) + self.scale * F.linear(low, self.up.to(low.dtype))
        return y if self.outputs is None else y * self.outputs.to(y.dtype)

    def effective_weight(self, *, merging: bool = False) -> Tensor:
        """The weight that the layer computes with, (out, in), with its graph, in float32 at least.

        Args:
            merging: the one that `merged` gives, which for lora-prune is another.
        """
        weight = matrix_of(self.base)
        with torch.autocast(weight.device.type, enabled=False):
            product = self.up @ self.down
            weight = weight.to(product.dtype)
            if self.kind == "scale-lora":
                return weight * product
            product = self.scale * product
            masked = self.kind == "mask-lora" or (merging and self.kind == "lora-prune")
            if masked and self.mask is not None:
                product = product.masked_fill(~self.mask, 0)
            return weight + product

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight as the layer stores it, the adapter added and the mask applied again.

        Raises:
            InputError: a plain adapter on a pruned weight.
        """
        pruned = self.mask is not None and not bool(self.mask.all())
        if self.kind == "lora" and pruned:
            raise InputError(
                "kind", self.kind, "lora-prune, mask-lora or scale-lora to merge into a pruned "
                "weight; save_adapters keeps a plain adapter beside it",
            )  # fmt: skip
        weight = self.effective_weight(merging=True).to(matrix_of(self.base).dtype)
        if self.mask is not None:
            weight = weight.masked_fill(~self.mask, 0)
        return self._stored(weight)

    @property
    def weight(self) -> Tensor:
        """The effective weight as the layer would store it, for code that reads it."""
        return self._stored(self.effective_weight().to(matrix_of(self.base).dtype))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def extra_repr(self) -> str:
        return f"{self.kind}, rank={self.rank}, alpha={self.alpha:g}"

    def _stored(self, matrix: Tensor) -> Tensor:
        return weight_from_matrices(self.base, matrix.reshape(weight_matrices(self.base).shape))

    def _merged_forward(self, x: Tensor) -> Tensor:
        weight = self.effective_weight().to(matrix_of(self.base).dtype)
        bias: Any = self.base.bias
        if self.linear:
            return F.linear(x, weight, bias)
        convolution: Any = self.base
        result: Tensor = convolution._conv_forward(x, self._stored(weight), bias)
        return result


def wrap(
    model: nn.Module,
    names: Iterable[str],
    kind: Kind = "mask-lora",
    rank: int | Mapping[str, int] = 16,
    alpha: float | Mapping[str, float] = 32.0,
    *,
    masks: Mapping[str, Tensor] | None = None,
    dropout: float | Mapping[str, float] = 0.0,
    outputs: bool = False,
    recompute: bool = False,
    seed: int = 0,
) -> dict[str, AdaptedLayer]:
    """Put adapters on layers of a model, in place; their own weights are frozen.

    Args:
        names: of the layers. A layer that stands in several places gets one adapter.
        rank, alpha, dropout: of all, or by name.
        masks: by the names of the weights, such as an outcome's; missing ones keep everything.
        seed: of A, by the position among the names.

    Returns:
        The adapters by name.

    Raises:
        InputError: a name that is no layer of a known kind, a mask of another shape, a weight
            that another layer has too, so that merging would change that one, a missing rank.
    """
    names = list(dict.fromkeys(names))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, reason in obstacles(model, names).items():
        alone = "a Linear, a convolution or transformers' Conv1D whose weight no other layer has"
        raise InputError(f"names {name}", described(reason), alone)
    made: dict[str, AdaptedLayer] = {}
    for number, name in enumerate(names):
        layer = modules[name]
        own = rank if isinstance(rank, int) else rank.get(name)
        if own is None:
            raise InputError("rank", described(f"none for {name}"), "a rank for every layer")
        strength = alpha[name] if isinstance(alpha, Mapping) else alpha
        dropped = dropout[name] if isinstance(dropout, Mapping) else dropout
        mask = (masks or {}).get(f"{name}.weight")
        if mask is not None and mask.shape != layer.weight.shape:
            shapes = tuple(mask.shape), f"the weight's shape {tuple(layer.weight.shape)}"
            raise InputError(f"masks {name}.weight", *shapes)
        made[name] = AdaptedLayer(
            layer, kind, own, strength, mask=mask, dropout=dropped, outputs=outputs,
            recompute=recompute, generator=torch.Generator().manual_seed(mix(seed, number)),
        )  # fmt: skip
    for adapter in made.values():
        _weight(adapter.base).requires_grad_(False)
    replace_layers(model, {id(adapter.base): adapter for adapter in made.values()})
    return made


def obstacles(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of some layers, those that can have no adapter, and why.

    Raises:
        InputError: a name that the model does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    holders: dict[int, dict[int, str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), {}).setdefault(id(module), name)
    found = {}
    for name in names:
        if name not in modules or not name:
            raise unknown("names", name, [n for n, m in modules.items() if n and is_known(m)])
        layer = modules[name]
        if not is_known(layer):
            found[name] = f"a {type(layer).__name__}"
        elif others := set(holders.get(id(layer.weight), {})) - {id(layer)}:
            other = holders[id(layer.weight)][min(others)]
            found[name] = f"a weight shared with {other}"
    return found


def adapters(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapters in a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add all adapters to their weights and put the layers back.

    Raises:
        InputError: a plain adapter on a pruned weight; nothing is merged then.
    """
    merged = {name: adapter.merged() for name, adapter in adapters(model).items()}
    for name, adapter in adapters(model).items():
        _weight(adapter.base).copy_(merged[name])
    unwrap(model)


def unwrap(model: nn.Module) -> None:
    """Take all adapters out; the layers are what they were before `wrap`."""
    found = adapters(model).values()
    for adapter in found:
        adapter.base.train(adapter.training)
    replace_layers(model, {id(adapter): adapter.base for adapter in found})


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Nothing of the model trains but what is then set to; afterwards all is as it was.

    Adapters that an error left in the model are taken out.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    except BaseException:
        unwrap(model)
        raise
    finally:
        for parameter, trains in before:
            parameter.requires_grad_(trains)
            parameter.grad = None


def save_adapters(found: Mapping[str, AdaptedLayer], folder: str | Path) -> Path:
    """Write plain adapters (kind lora) as a folder that `peft.PeftModel.from_pretrained` reads.

    It goes with the model as it is without them.

    Args:
        found: by name, as `wrap` and `adapters` give them.

    Raises:
        InputError: other kinds, a convolution, or a mask of outputs, none of which peft has.
    """
    for name, adapter in found.items():
        plain = adapter.kind == "lora" and adapter.linear and adapter.outputs is None
        require(plain, f"adapter {name}", described(repr(adapter.kind)), "lora on linear layers")
    require(bool(found), "adapters", described("none"), "at least one")
    first = next(iter(found.values()))
    tensors = {}
    for name, adapter in found.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.down
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.up
    folder = Path(folder)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "rank_pattern": {n: a.rank for n, a in found.items() if a.rank != first.rank},
        "alpha_pattern": {n: a.alpha for n, a in found.items() if a.alpha != first.alpha},
        "target_modules": list(found),
        "fan_in_fan_out": any(type(a.base).__name__ == "Conv1D" for a in found.values()),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)
    return folder


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def matrix_of(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A layer's weight, or a tensor of its shape, as (out, in)."""
    return weight_matrices(layer, weight).flatten(0, 1)


def replace_layers(model: nn.Module, others: Mapping[int, nn.Module]) -> None:
    """Put other modules in the places of some, wherever those stand."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in others and others[id(child)] is not module:
                setattr(module, name, others[id(child)])


def _check_options(kind: str, rank: int, alpha: float, dropout: float) -> None:
    if kind not in get_args(Kind):
        raise unknown("kind", kind, get_args(Kind))
    require(rank >= 1, "rank", rank, "at least 1")
    require(alpha > 0, "alpha", alpha, "above 0")
    require(0 <= dropout < 1, "dropout", dropout, "a share in [0, 1)")
    masked = kind in KEPT_SPARSE
    require(not (dropout and masked), "dropout", dropout, f"0 for {kind}, which has no input")
