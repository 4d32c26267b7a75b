"""Layers whose weights are read from one small array: many weights, one stored number.

    W_l = λ_l · G_l ⊙ ψ[h_l]

with the array ψ, the slots h (`secateurs.parts.hashing`), signs G and a scale λ of every layer.
Slots and signs are functions of a few integers: they are computed when a weight is needed, in the
forward and again in the backward pass, or kept in memory where speed matters more (`cache`, 5 bytes
a weight, which count as the model's). What is stored is ψ, biases and norms. While a pass is made,
the weights that it uses exist, as in any network, and there is no product less.

One layer holds the array as its submodule, so it is one parameter, and once in a state dict; the
others refer to it. Copies, `to` and loading keep that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secateurs.errors import InputError, described, require
from secateurs.parts.hashing import (
    PRIME,
    GradScale,
    UniversalHash,
    fold,
    independent,
    tiled,
)
from secateurs.parts.prunable import check_finite, matches_any
from secateurs.structure.persistence import rebuilds
from secateurs.structure.substitution import (
    Substitute,
    is_plain,
    owners,
    resubstitute,
    substitute,
)

FORM = "shared"
Map = Literal["fold", "hash", "tile"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHARED_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS, nn.Embedding)


class SharedArray(nn.Module):
    """ψ, and how its gradient is divided.

    Attributes:
        values: the only parameter, (size,).
        grad_scale: of `secateurs.parts.hashing.gradient_divisors`.
    """

    def __init__(self, values: Tensor, grad_scale: GradScale = "v1") -> None:
        super().__init__()
        self.values, self.grad_scale = nn.Parameter(values), grad_scale

    def __len__(self) -> int:
        return self.values.numel()

    def extra_repr(self) -> str:
        return f"{len(self)}, grad_scale={self.grad_scale}"


@dataclass(frozen=True)
class Place:
    """Where a weight lies among all locations, and what leads from there to slots and signs.

    Attributes:
        array: number of the array.
        size: slots of it.
        offset: location of the weight's first entry; entries follow in row-major order.
        tiles: rows of tiles before it, for the tile map.
        shape: of the weight.
        scale: λ.
        u, g: the hashes of slots and signs.
        map, block: how locations become slots; for embeddings a tile is one row high.
        embedding: whether the rows are read by number.
        padding: row that is zero.
    """

    array: int
    size: int
    offset: int
    tiles: int
    shape: tuple[int, ...]
    scale: float
    u: UniversalHash
    g: UniversalHash
    map: Map = "fold"
    block: tuple[int, int] = (32, 32)
    embedding: bool = False
    padding: int | None = None

    @property
    def count(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape)

    def positions(self, rows: Tensor | None, device: torch.device) -> Tensor:
        """Entries of the weight by number: all of them, or those of some rows."""
        if rows is None:
            return torch.arange(self.count, device=device).view(self.shape)
        width = self.count // self.shape[0]
        return rows[..., None] * width + torch.arange(width, device=device)

    def slots(self, positions: Tensor) -> Tensor:
        """The slot of every entry."""
        if self.map == "fold":
            return fold(positions + self.offset, self.size, self.u)
        if self.map == "hash":
            return independent(positions + self.offset, self.size, self.u)
        width = self.count // self.shape[0]
        outputs, inputs = positions // width, positions % width
        if self.embedding:
            return tiled(outputs + self.tiles, inputs, self.size, self.u, self.tile)
        # the public code tiles the transposed matrix
        shifted = inputs + self.tiles * self.tile[0]
        return tiled(shifted, outputs, self.size, self.u, self.tile)

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of a tile of this weight."""
        return (1, self.block[1]) if self.embedding else self.block

    @property
    def tile_rows(self) -> int:
        """Rows of tiles that this weight takes."""
        rows = self.shape[0] if self.embedding else self.count // self.shape[0]
        return -(-rows // self.tile[0])

    def signs(self, positions: Tensor) -> Tensor:
        """The sign of every entry, int8; 0 in a row of padding."""
        signs = self.g.signs(positions)
        if self.padding is not None:
            width = self.count // self.shape[0]
            signs = signs.masked_fill(positions // width == self.padding, 0)
        return signs

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a plan."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Place:
        """The inverse of `as_dict`."""
        return Place(
            **{
                **values,
                "shape": tuple(values["shape"]),
                "block": tuple(values["block"]),
                "u": UniversalHash(**values["u"]),
                "g": UniversalHash(**values["g"]),
            }
        )


class _Gather(torch.autograd.Function):
    """λ · G ⊙ ψ[h], keeping nothing for the backward pass but where to look again."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: SharedLayer, rows: Tensor | None) -> Tensor:
        ctx.layer, ctx.rows, ctx.size = layer, rows, values.numel()
        slots, signs = layer.addresses(rows)
        taken = values.index_select(0, slots.flatten()).view(slots.shape)
        return taken * layer.place.scale * signs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        slots, signs = ctx.layer.addresses(ctx.rows)
        shares = gradient * ctx.layer.place.scale * signs
        total = gradient.new_zeros(ctx.size)
        return total.index_add_(0, slots.flatten(), shares.flatten()), None, None


class SharedLayer(Substitute):
    """A layer that reads its weight from an array.

    Args:
        dense: the layer that it stands in for. Its bias starts from zero.
        place: where its weight lies.
        array: what it reads; not a submodule unless it is handed to `hold`.
        cache: keep slots (int32) and signs (int8) in memory.
    """

    op_kinds: ClassVar[tuple[type[nn.Module], ...]] = ()
    bias: nn.Parameter | None
    slots: Tensor | None
    signs: Tensor | None
    _op: tuple[Any]
    _source: tuple[SharedArray]

    def __init__(
        self, dense: nn.Module, place: Place, array: SharedArray, *, cache: bool = False
    ) -> None:
        super().__init__()
        weight: Any = getattr(dense, "weight", None)
        if not isinstance(dense, self.op_kinds) or tuple(weight.shape) != place.shape:
            raise InputError(
                "layer", described(f"{type(dense).__name__} of another kind or shape"),
                f"{self.op_kinds[0].__name__} with a weight of {place.shape}",
            )  # fmt: skip
        self.place, self.cache = place, cache
        bias: Any = getattr(dense, "bias", None)
        zeros = None if bias is None else nn.Parameter(torch.zeros_like(bias))
        self.register_parameter("bias", zeros)
        # a tuple, as a module would be registered: stride, padding and the like of the dense layer
        self._op = (_without_parameters(dense),)
        self.read(array)
        for name, values in zip(("slots", "signs"), self._cached(), strict=True):
            self.register_buffer(name, values, persistent=False)

    def _cached(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if not self.cache:
            return None, None
        positions = self.place.positions(None, self.array_read.values.device)
        return self.place.slots(positions).int(), self.place.signs(positions)

    def read(self, array: SharedArray) -> None:
        """Read this array from now on."""
        require(len(array) == self.place.size, "array", len(array), f"{self.place.size} slots")
        self._source = (array,)

    def hold(self) -> None:
        """Have the array as a submodule: one layer of all that read it does."""
        self.array = self.array_read

    @property
    def array_read(self) -> SharedArray:
        """The array."""
        return self._source[0]

    def addresses(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Slots and signs of the weight, or of some of its rows."""
        if self.slots is not None and self.signs is not None:
            whole = self.slots, self.signs
            return whole if rows is None else (whole[0][rows], whole[1][rows])
        positions = self.place.positions(rows, self.array_read.values.device)
        return self.place.slots(positions), self.place.signs(positions)

    @property
    def weight(self) -> Tensor:
        """The weight as it is now, with its graph."""
        return self.gathered()

    def gathered(self, rows: Tensor | None = None) -> Tensor:
        """The weight, or some of its rows."""
        found: Tensor = _Gather.apply(self.array_read.values, self, rows)
        return found

    def config(self) -> dict[str, Any]:
        return {
            "place": self.place.as_dict(),
            "cache": self.cache,
            "grad_scale": self.array_read.grad_scale,
        }

    @classmethod
    def shaped(cls, dense: nn.Module, config: Mapping[str, Any]) -> Self:
        place = Place.from_dict(config["place"])
        like: Any = dense.weight
        array = SharedArray(like.new_empty(place.size), config["grad_scale"])
        return cls(dense, place, array, cache=config["cache"])

    def dense(self, weight: nn.Parameter) -> nn.Module:
        """The plain layer with this weight and a copy of the bias."""
        layer: nn.Module = copy.deepcopy(self._op[0])
        layer.weight = weight
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{self._op[0]!r}, {self.place.map}, offset={self.place.offset}"


class SharedLinear(SharedLayer):
    """y = W x + b."""

    kind = "shared-linear"
    op_kinds = (nn.Linear,)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return F.linear(x, self.weight, self.bias)


class SharedConvolution(SharedLayer):
    """Convolutions of one to three dimensions, with stride, padding, dilation and groups."""

    kind = "shared-convolution"
    op_kinds = _CONVOLUTIONS

    def forward(self, x: Tensor) -> Tensor:
        """What the dense convolution takes and gives."""
        y: Tensor = self._op[0]._conv_forward(x, self.weight, self.bias)
        return y


class SharedEmbedding(SharedLayer):
    """Rows by number; only those that are asked for are gathered."""

    kind = "shared-embedding"
    op_kinds = (nn.Embedding,)

    def forward(self, tokens: Tensor) -> Tensor:
        """(…) int -> (…, width)."""
        return self.gathered(tokens.long())


_LAYERS: tuple[type[SharedLayer], ...] = (SharedLinear, SharedConvolution, SharedEmbedding)


def _without_parameters(dense: nn.Module) -> nn.Module:
    """A copy of a layer that holds nothing but its settings."""
    shell = copy.copy(dense)
    shell._parameters = dict.fromkeys(dense._parameters)
    return shell


@dataclass(frozen=True)
class Shareable:
    """A weight that may be read from an array: its layers by path, which have it in common."""

    name: str
    paths: tuple[str, ...]
    layers: tuple[nn.Module, ...]

    @property
    def weight(self) -> nn.Parameter:
        """The weight itself."""
        weight = self.layers[0].weight
        assert isinstance(weight, nn.Parameter)
        return weight


def shareable(
    model: nn.Module, *, exclude: Sequence[str] = (), min_size: int = 0
) -> list[Shareable]:
    """Weights of linear layers, convolutions and embeddings, tied ones once, in module order.

    Left out are layers with a forward of their own, and weights that something else has too.

    Args:
        exclude: regular expressions of weights to leave as they are.
        min_size: parameters that a layer must have.

    Raises:
        InputError: a pattern that matches nothing, nothing to share, weights of several dtypes or
            with NaN or Inf.
    """
    groups: dict[int, dict[str, nn.Module]] = {}
    named = owners(model)
    for path, module in model.named_modules(remove_duplicate=False):
        if path and _can_be_shared(module) and _size(module) >= min_size:
            groups.setdefault(id(module.weight), {})[path] = module
    found = [
        Shareable(f"{next(iter(own))}.weight", tuple(own), tuple(own.values()))
        for key, own in groups.items()
        if len(own) == named[key]
    ]
    for pattern in exclude:
        if not any(matches_any(own.name, [pattern]) for own in found):
            names = ", ".join(own.name for own in found)
            raise InputError("exclude", pattern, f"a regular expression matching one of {names}")
    found = [own for own in found if not matches_any(own.name, exclude)]
    if not found:
        raise InputError(
            "model", described(f"{type(model).__name__} with nothing to prune"),
            "a model with linear layers, convolutions or embeddings to share the weights of",
        )  # fmt: skip
    check_finite({own.name: own.weight for own in found})
    kinds = {str(own.weight.dtype) for own in found}
    require(
        len(kinds) == 1, "model", described(" and ".join(sorted(kinds))), "weights of one dtype"
    )
    return found


def _can_be_shared(module: nn.Module) -> bool:
    changing = isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse)
    return is_plain(module, SHARED_KINDS) and not changing


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def place_of(own: Shareable, **fields: Any) -> Place:
    """The place of a weight, with what follows from its layers filled in."""
    embeddings = [layer for layer in own.layers if isinstance(layer, nn.Embedding)]
    padding = next((e.padding_idx for e in embeddings if e.padding_idx is not None), None)
    shape = tuple(own.weight.shape)
    return Place(shape=shape, embedding=bool(embeddings), padding=padding, **fields)


def share(
    model: nn.Module,
    places: Sequence[tuple[Shareable, Place]],
    arrays: Mapping[int, SharedArray],
    *,
    cache: bool = False,
) -> dict[str, Any]:
    """Exchange layers for ones that read arrays, in place.

    Returns:
        The plan, to be appended to ``outcome.surgery``.
    """
    made: dict[str, Substitute] = {}
    same: dict[str, str] = {}
    for own, place in places:
        array = arrays[place.array]
        require(len(array) < PRIME, "array", len(array), f"fewer than {PRIME} slots")
        first: dict[int, str] = {}
        for path, layer in zip(own.paths, own.layers, strict=True):
            if id(layer) in first:
                same[path] = first[id(layer)]
            else:
                made[path] = _kind_of(layer)(layer, place, array, cache=cache)
                first[id(layer)] = path
    plan = {**substitute(model, made), "form": FORM, "same": same}
    _repeat(model, same)
    _hold(shared_layers(model))
    return plan


def _kind_of(layer: nn.Module) -> type[SharedLayer]:
    return next(kind for kind in _LAYERS if isinstance(layer, kind.op_kinds))


def _repeat(model: nn.Module, same: Mapping[str, str]) -> None:
    """One layer under several paths stays one."""
    for path, first in same.items():
        model.set_submodule(path, model.get_submodule(first))


def _hold(layers: Mapping[str, SharedLayer]) -> None:
    """Every array is held by the first layer that reads it, and read by the others."""
    held: dict[int, SharedArray] = {}
    for layer in layers.values():
        number = layer.place.array
        if number in held:
            layer.read(held[number])
        else:
            held[number] = layer.array_read
            layer.hold()


@rebuilds(FORM)
def _reshare(model: nn.Module, plan: dict[str, Any]) -> nn.Module:
    resubstitute(model, plan)
    _repeat(model, plan["same"])
    _hold(shared_layers(model))
    return model


def shared_layers(model: nn.Module) -> dict[str, SharedLayer]:
    """The layers that read an array, by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SharedLayer)}


def shared_arrays(model: nn.Module) -> list[SharedArray]:
    """The arrays of a model."""
    return [m for m in model.modules() if isinstance(m, SharedArray)]


def unshare(model: nn.Module) -> nn.Module:
    """A copy of the model with plain layers, which computes the same; tied weights stay tied."""
    dense = copy.deepcopy(model)
    weights: dict[tuple[int, int], nn.Parameter] = {}
    plain: dict[int, nn.Module] = {}
    with torch.no_grad():
        for path, layer in list(dense.named_modules(remove_duplicate=False)):
            if not isinstance(layer, SharedLayer):
                continue
            key = (layer.place.array, layer.place.offset)
            if key not in weights:
                weights[key] = nn.Parameter(layer.weight.detach())
            if id(layer) not in plain:
                plain[id(layer)] = layer.dense(weights[key])
            dense.set_submodule(path, plain[id(layer)])
    return dense


def memory_report(model: nn.Module) -> dict[str, int]:
    """Numbers that a model stores.

    Returns:
        ``original``: parameters of the model with plain layers; ``read``: weights that are read
        from arrays; ``shared``: slots; ``unshared``: all other parameters; ``stored``: both;
        ``index_bytes``: of slots and signs that are kept in memory.
    """
    layers = shared_layers(model).values()
    weights = {(own.place.array, own.place.offset): own.place.count for own in layers}
    shared = sum(len(array) for array in shared_arrays(model))
    stored = sum(p.numel() for p in model.parameters())
    cached = [t for own in layers for t in (own.slots, own.signs) if t is not None]
    return {
        "original": stored - shared + sum(weights.values()),
        "read": sum(weights.values()),
        "shared": shared,
        "unshared": stored - shared,
        "stored": stored,
        "index_bytes": sum(t.numel() * t.element_size() for t in cached),
    }
