"""Operations of ONNX as functions of PyTorch, with shapes as plain integers.

onnx2torch 1.5.15 knows the operations up to about opset 17, and torch 2.13 writes opset 20: of
40 networks of torchvision and timm none comes back as it is. Two repairs, after each of which an
operation means what it meant (every import is checked in ONNX Runtime all the same):

1. `SAME_MEANING`: versions that only admit more types go to the converter of the version before.
2. `OURS`: operations that onnx2torch lacks, and those to which ONNX hands shapes, axes or
   slices as tensors. Nothing that traces a model (`torch.export`, the exporter, ours) can see
   through such a tensor, so our functions take Python integers; `onnx_import` puts them in.
   They enter onnx2torch's registry under a domain of our own, `DOMAIN`, and disturb nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOMAIN = "secateurs"
Integers = Sequence[int]
Attributes = Mapping[str, Any]

SAME_MEANING = (
    "Acos", "Asin", "Atan", "Cast", "Celu", "Constant", "Conv", "ConvTranspose",
    "Cos", "Dropout", "Einsum", "Elu", "Equal", "EyeLike", "GlobalAveragePool",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "IsInf",
    "IsNaN", "LessOrEqual", "Mod", "RoiAlign", "Round", "Selu", "Sin", "Softplus",
    "Softsign", "Tan",
)  # fmt: skip
"""Versions of these after the newest that onnx2torch has admit more types and nothing else."""
SAME_BEFORE = {
    "BatchNormalization": (7, 9),
    "Dropout": (7, 10),
    "IsNaN": (9, 13),
    "NonZero": (9, 13),
}
"""A version that onnx2torch lacks, and the later one that computes the same outside training."""


def reshape(x: Tensor, shape: Integers, *, allow_zero: bool = False) -> Tensor:
    """Another shape; 0 keeps a dimension (unless zeros are allowed), −1 takes the rest."""
    if allow_zero:
        return torch.reshape(x, tuple(shape))
    kept = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(shape)]
    return torch.reshape(x, kept)


def flatten(x: Tensor, *, axis: int) -> Tensor:
    """A matrix: the dimensions before the axis, and those from it on."""
    if axis == 1 and x.ndim > 1:
        return x.flatten(1)
    return x.reshape(x.shape[:axis].numel(), -1)


def expand(x: Tensor, shape: Integers) -> Tensor:
    """Broadcast with a shape; either may be 1 where the other is not."""
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape)))


def cut(
    x: Tensor,
    starts: Integers,
    ends: Integers,
    axes: Integers | None = None,
    steps: Integers | None = None,
) -> Tensor:
    """Slices along some axes (the first ones); a negative step walks backwards."""
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = place if axes is None else axes[place]
        step = 1 if steps is None else steps[place]
        if step > 0:
            x = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
        else:
            size = x.shape[axis]
            first = min(start, size - 1) if start >= 0 else max(start + size, 0)
            chosen = range(first, end if end >= 0 else max(end + size, -1), step)
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.long, device=x.device))
    return x


def concat(*tensors: Tensor, axis: int) -> Tensor:
    """Tensors one after the other along an axis."""
    return torch.cat(tensors, axis)


def transpose(x: Tensor, *, order: Integers | None) -> Tensor:
    """The dimensions in another order, reversed where none is given."""
    return x.permute(*(order or reversed(range(x.ndim))))


def divide(x: Tensor, y: Tensor) -> Tensor:
    """The quotient; of integers, without what is left over."""
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def tile(x: Tensor, repeats: Integers) -> Tensor:
    """Copies side by side, along every dimension."""
    return x.repeat(tuple(repeats))


def full(shape: Integers, *, value: Any, dtype: torch.dtype) -> Tensor:
    """A tensor of one value."""
    return torch.full(tuple(shape), value, dtype=dtype)


def arange(start: Any, limit: Any, delta: Any) -> Tensor:
    """Numbers from `start` to before `limit`."""
    return torch.arange(start, limit, delta)


def squeeze(x: Tensor, axes: Integers | None = None) -> Tensor:
    """Without the dimensions of 1 at these places, or without all of them."""
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


def unsqueeze(x: Tensor, axes: Integers) -> Tensor:
    """With dimensions of 1 at these places of the result."""
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


def split(x: Tensor, sizes: Integers | None = None, *, axis: int, parts: int) -> Any:
    """Parts of given sizes; without them equal ones, the last of what is left."""
    size = list(sizes) if sizes else -(-x.shape[axis] // parts)
    found = torch.split(x, size, axis)
    return found if parts > 1 else found[0]


def topk(x: Tensor, k: Integers, *, axis: int, largest: bool, ordered: bool, places: bool) -> Any:
    """The k largest or smallest values, and where they are, if that is asked for."""
    values, indices = torch.topk(x, k[0], axis, largest, ordered)
    return (values, indices) if places else values


def cumsum(x: Tensor, axis: Any, *, exclusive: bool, reverse: bool) -> Tensor:
    """Running sums along an axis, from either end, with or without the element itself."""
    axis = axis if isinstance(axis, int) else axis[0]
    y = x.flip(axis) if reverse else x
    total = y.cumsum(axis) - y if exclusive else y.cumsum(axis)
    return total.flip(axis) if reverse else total


def pad(
    x: Tensor, pads: Integers, value: Any = 0.0, axes: Integers | None = None, *, mode: str
) -> Tensor:
    """Values before and after the given axes (all): first all starts, then all ends."""
    places = range(x.ndim) if axes is None else [a % x.ndim for a in axes]
    before = dict(zip(places, pads[: len(places)], strict=True))
    after = dict(zip(places, pads[len(places) :], strict=True))
    amounts = [(before.get(a, 0), after.get(a, 0)) for a in reversed(range(x.ndim))]
    if mode != "constant":
        spatial, outer = amounts[: max(x.ndim - 2, 0)], amounts[max(x.ndim - 2, 0) :]
        if 3 <= x.ndim <= 5 and not any(map(any, outer)):
            return F.pad(x, [n for pair in spatial for n in pair], mode)
        for axis, (first, last) in enumerate(reversed(amounts)):
            x = _padded(x, axis, first, last, mode) if first or last else x
        return x
    fill = value.item() if isinstance(value, Tensor) else value
    return F.pad(x, [n for pair in amounts for n in pair], "constant", fill)


def _padded(x: Tensor, axis: int, first: int, last: int, mode: str) -> Tensor:
    """Values before and after any one axis; torch has only the last ones."""
    size = x.shape[axis]
    places = torch.arange(-first, size + last, device=x.device)
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        places = places.remainder(period)
        places = torch.minimum(places, period - places)
    elif mode == "replicate":
        places = places.clamp(0, size - 1)
    return x.index_select(axis, places.remainder(size))


def reduce(
    x: Tensor, axes: Integers | None = None, *, kind: str, keep: bool, skip_empty: bool = False
) -> Tensor:
    """A sum, mean, maximum ... over some axes; without any over all, or of each element alone."""
    if not axes and skip_empty:
        return OF_EACH[kind](x) if kind in OF_EACH else x
    dims = tuple(axes or range(x.ndim))
    if kind == "ReduceProd":
        for axis in sorted((a % x.ndim for a in dims), reverse=True):
            x = x.prod(axis, keepdim=keep)
        return x
    return REDUCTIONS[kind](x, dims, keep)


REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceL1": lambda x, dims, keep: x.abs().sum(dims, keep),
    "ReduceL2": lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keep),
    "ReduceLogSum": lambda x, dims, keep: x.sum(dims, keep).log(),
    "ReduceLogSumExp": lambda x, dims, keep: x.logsumexp(dims, keep),
    "ReduceMax": lambda x, dims, keep: x.amax(dims, keep),
    "ReduceMean": lambda x, dims, keep: x.mean(dims, keep),
    "ReduceMin": lambda x, dims, keep: x.amin(dims, keep),
    "ReduceSum": lambda x, dims, keep: x.sum(dims, keep),
    "ReduceSumSquare": lambda x, dims, keep: x.square().sum(dims, keep),
}
OF_EACH: dict[str, Callable[[Tensor], Tensor]] = {
    "ReduceL1": torch.abs,
    "ReduceL2": torch.abs,
    "ReduceLogSum": torch.log,
    "ReduceSumSquare": torch.square,
}
"""Reductions over no axes at all that are not the identity."""


def resize(
    x: Tensor,
    roi: Any = None,
    scales: Sequence[float] | None = None,
    sizes: Integers | None = None,
    *,
    mode: str,
    coordinates: str,
    nearest: str = "round_prefer_floor",
    antialias: bool = False,
    axes: Integers | None = None,
    cubic: float = -0.75,
    inside: bool = False,
) -> Tensor:
    """Interpolation along any axes.

    Args:
        scales, sizes: of the axes (all), one of the two.
        mode: ``nearest``, ``linear`` or ``cubic``; `coordinates` and `nearest` as ONNX has them.
        cubic: coefficient of the cubic kernel.
        inside: places outside weigh nothing, instead of what the edge has.
    """
    places = range(x.ndim) if axes is None else [a % x.ndim for a in axes]
    target: list[Any] = list(x.shape)
    factors = [1.0] * x.ndim
    for number, place in enumerate(places):
        size = x.shape[place]
        if sizes:
            target[place] = sizes[number]
            factors[place] = sizes[number] / size
        elif scales:
            factors[place] = factor = scales[number]
            # ONNX Runtime multiplies in float32
            whole = float(factor).is_integer()
            target[place] = int(factor) * size if whole else int(np.float32(factor) * size)
    plain = _torch_mode(x, target, factors, mode, coordinates, nearest)
    # torch's kernels: with antialias it looks at no place outside
    own = inside == antialias and (mode != "cubic" or cubic == (-0.5 if antialias else -0.75))
    if plain is not None and own:
        corners = None if mode == "nearest" else coordinates == "align_corners"
        return F.interpolate(x, target[2:], mode=plain, align_corners=corners, antialias=antialias)
    if antialias:
        raise NotImplementedError(
            f"antialias at {coordinates} coordinates, exclude_outside={int(inside)}, "
            f"cubic_coeff_a={cubic:g}"
        )
    for axis in range(x.ndim):
        if factors[axis] != 1:
            at = _sources(x.shape[axis], target[axis], factors[axis], coordinates)
            x = _interpolated(x, axis, at, mode, nearest, cubic, inside)
    return x


def _torch_mode(
    x: Tensor,
    target: Sequence[Any],
    factors: Sequence[float],
    mode: str,
    coordinates: str,
    nearest: str,
) -> str | None:
    """What torch calls an interpolation; None where it has none that computes the same."""
    if not 3 <= x.ndim <= 5 or any(factor != 1 for factor in factors[:2]):
        return None
    sides = list(zip(x.shape[2:], target[2:], factors[2:], strict=True))
    if any(after != before * factor for before, after, factor in sides):
        return None  # the factor is not that of the sizes
    if mode == "nearest":
        whole = all(float(factor).is_integer() for factor in factors)
        floor = (nearest, coordinates) == ("floor", "asymmetric")
        rounded = nearest.startswith("round") and coordinates.endswith("half_pixel")
        return "nearest" if whole and floor else "nearest-exact" if whole and rounded else None
    if coordinates == "asymmetric" or (mode == "cubic" and x.ndim != 4):
        return None
    if coordinates == "pytorch_half_pixel" and any(after == 1 for after in target[2:]):
        return None
    return {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim] if mode == "linear" else "bicubic"


def _sources(before: int, after: int, factor: float, coordinates: str) -> Tensor:
    """Where along an axis the values of a resized one come from, in float32 as ONNX Runtime has."""
    at, scale = torch.arange(after, dtype=torch.float32), torch.tensor(factor)
    if coordinates == "align_corners":
        return at * (before - 1) / (after - 1) if after > 1 else at
    if coordinates == "asymmetric":
        return at / scale
    if coordinates == "pytorch_half_pixel" and after == 1:
        return at
    return (at + 0.5) / scale - 0.5


def _interpolated(
    x: Tensor, axis: int, at: Tensor, mode: str, nearest: str, cubic: float, inside: bool
) -> Tensor:
    """Values at places between those of an axis, as weighted sums of their neighbours."""
    last = x.shape[axis] - 1
    if mode == "nearest":
        rounded = {
            "floor": at.floor(),
            "ceil": at.ceil(),
            "round_prefer_floor": (at - 0.5).ceil(),
            "round_prefer_ceil": (at + 0.5).floor(),
        }[nearest]
        return x.index_select(axis, rounded.clamp(0, last).long().to(x.device))
    at = at.clamp(0, last) if mode == "linear" else at
    first = at.floor()
    neighbours = [first + step for step in ((0, 1) if mode == "linear" else (-1, 0, 1, 2))]
    distances = [(at - place).abs() for place in neighbours]
    weights = [1 - d if mode == "linear" else _cubic(d, cubic) for d in distances]
    if inside:
        weights = [
            w.where((place >= 0) & (place <= last), 0.0)
            for w, place in zip(weights, neighbours, strict=True)
        ]
        total = sum(weights[1:], weights[0])
        weights = [w / total for w in weights]
    shape = [-1 if place == axis else 1 for place in range(x.ndim)]
    parts = [
        x.index_select(axis, place.clamp(0, last).long().to(x.device)) * w.to(x).view(shape)
        for place, w in zip(neighbours, weights, strict=True)
    ]
    return sum(parts[1:], parts[0])


def _cubic(d: Tensor, a: float) -> Tensor:
    """Keys' kernel at distances of 0 to 2."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    return near.where(d <= 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)


def upsample(x: Tensor, scales: Sequence[float], *, mode: str) -> Tensor:
    """The interpolation of early opsets, ``nearest`` or ``linear``."""
    return resize(x, None, scales, mode=mode, coordinates="asymmetric", nearest="floor")


def take(x: Tensor, indices: Any, *, axis: int) -> Tensor:
    """The slices at some places of an axis, as `numpy.take`; places may be counted from the end."""
    if isinstance(indices, int):
        return x.select(axis, indices)
    axis %= x.ndim
    if not isinstance(indices, Tensor):
        indices = torch.tensor(indices, device=x.device)
    places = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    picked = x.index_select(axis, places.flatten())
    if places.ndim == 1:
        return picked
    return picked.reshape(x.shape[:axis] + places.shape + x.shape[axis + 1 :])


def take_elements(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    """Single elements along an axis; places may be counted from the end."""
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices).long())


def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """The data with its slices at `indices` (..., depth) replaced by the updates."""
    depth = indices.shape[-1]
    places = indices.long().reshape(-1, depth).unbind(1)
    return data.index_put(tuple(places), updates.reshape(-1, *data.shape[depth:]))


def scatter_elements(data: Tensor, indices: Tensor, updates: Tensor, *, axis: int) -> Tensor:
    """The data with single elements replaced along an axis."""
    places = torch.where(indices < 0, indices + data.shape[axis], indices).long()
    return data.scatter(axis, places, updates)


def trilu(x: Tensor, k: Any = 0, *, upper: bool) -> Tensor:
    """The upper or lower triangle, from the k-th diagonal."""
    diagonal = k if isinstance(k, int) else k[0]
    return x.triu(diagonal) if upper else x.tril(diagonal)


def fold(
    x: Tensor,
    image: Integers,
    block: Integers,
    *,
    dilations: Integers | None,
    pads: Integers | None,
    strides: Integers | None,
) -> Tensor:
    """Sliding blocks, (N, C * block, L), summed into images (N, C, H, W)."""
    pads = list(pads or (0, 0, 0, 0))
    if pads[:2] != pads[2:]:
        raise NotImplementedError(f"uneven pads {pads}")
    around = tuple(dilations or (1, 1)), tuple(pads[:2]), tuple(strides or (1, 1))
    return F.fold(x, tuple(image), tuple(block), *around)


def depth_to_space(x: Tensor, *, block: int, depth_first: bool) -> Tensor:
    """(N, C b², H, W) -> (N, C, H b, W b); the blocks are before the channels, or after."""
    if not depth_first:
        return F.pixel_shuffle(x, block)
    parts = x.unflatten(1, (block, block, -1)).permute(0, 3, 4, 1, 5, 2)
    return parts.flatten(4).flatten(2, 3)


def space_to_depth(x: Tensor, *, block: int) -> Tensor:
    """(N, C, H b, W b) -> (N, C b², H, W), the blocks before the channels."""
    parts = x.unflatten(3, (-1, block)).unflatten(2, (-1, block))
    return parts.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int) -> Tensor:
    """`values[1]` at the indices along a new axis of size `depth`, `values[0]` elsewhere.

    Indices from −depth to −1 count from the end; others are nowhere.
    """
    size = int(depth if isinstance(depth, int | float) else depth[0])
    places = torch.where(indices < 0, indices + size, indices)[..., None]
    chosen = (places == torch.arange(size, device=indices.device)).movedim(-1, axis)
    return torch.where(chosen, values[1], values[0])


def places_of_nonzero(x: Tensor) -> Tensor:
    """(rank, count): where values are not zero, a place a column."""
    return x.nonzero().T


def clip(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """Values between two bounds, of which either may be missing."""
    return x if low is None and high is None else torch.clamp(x, low, high)


def shape_of(x: Tensor, *, start: int, end: int | None) -> Tensor:
    """Some of the sizes, as a tensor."""
    return torch.tensor(x.shape[start:end], device=x.device)


def size_of(x: Tensor) -> Tensor:
    """The number of elements, as a tensor."""
    return torch.tensor(x.numel(), device=x.device)


def cast_like(x: Tensor, other: Tensor) -> Tensor:
    """In the other tensor's type."""
    return x.to(other.dtype)


def normalise(x: Tensor, scale: Tensor, shift: Any = None, *, axis: int, eps: float) -> Tensor:
    """Layer norm over the dimensions from the axis on."""
    size = x.shape[axis:]
    bias = None if shift is None else shift.expand(size)
    return F.layer_norm(x, size, scale.expand(size), bias, eps)


def normalise_rms(x: Tensor, scale: Tensor, *, axis: int, eps: float) -> Tensor:
    """Root mean square norm over the dimensions from the axis on."""
    return F.rms_norm(x, x.shape[axis:], scale.expand(x.shape[axis:]), eps)


def normalise_groups(x: Tensor, scale: Tensor, shift: Tensor, *, groups: int, eps: float) -> Tensor:
    """Group norm; scale and shift are for each channel, or (before opset 21) for each group."""
    repeats = x.shape[1] // scale.shape[0]
    scale, shift = (t.repeat_interleave(repeats) if repeats > 1 else t for t in (scale, shift))
    return F.group_norm(x, groups, scale, shift, eps)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    heads: int | None,
    key_heads: int | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Scaled dot-product attention over (N, heads, T, d), or (N, T, heads * d) with `heads`."""
    flat = query.ndim == 3
    if flat:
        assert heads is not None
        assert key_heads is not None
        query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
        key, value = (t.unflatten(-1, (key_heads, -1)).transpose(1, 2) for t in (key, value))
    mixed = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return mixed.transpose(1, 2).flatten(2) if flat else mixed


def pool(
    x: Tensor,
    *,
    largest: bool,
    kernel: Integers,
    strides: Integers,
    pads: Integers,
    dilations: Integers,
    ceil: bool,
    count_pads: bool,
) -> Tensor:
    """Maximum or mean of windows; the mean is over all places, or over those not padded.

    With `ceil`, a last window may reach over the end, but must begin before the padding there.
    """
    rank = len(kernel)
    before, after = pads[:rank], pads[rank:]
    around = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
    even = before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    inner = tuple(before) if even else (0,) * rank
    kept: list[Any] = [...]
    for size, start, stride in zip(x.shape[2:], before, strides, strict=True):
        # of the windows that torch makes over explicit padding, those that begin before its end
        kept.append(slice(-(-(size + start) // stride)) if ceil and not even else slice(None))
    if largest:
        x = x if even else F.pad(x, around, value=-math.inf)
        return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1](
            x, tuple(kernel), tuple(strides), inner, tuple(dilations), ceil
        )[tuple(kept)]
    mean = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    if even:
        return mean(x, tuple(kernel), tuple(strides), inner, ceil, count_pads)
    window = tuple(kernel), tuple(strides), 0, ceil
    share = mean(F.pad(x, around), *window)[tuple(kept)]
    if count_pads:
        return share
    return share / mean(F.pad(torch.ones_like(x), around), *window)[tuple(kept)]


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float,
    beta: float,
    transposed: tuple[bool, bool],
) -> Tensor:
    """alpha a b + beta c, of matrices that may each be transposed before."""
    a, b = (m.T if turn else m for m, turn in zip((a, b), transposed, strict=True))
    product = a @ b if alpha == 1 else alpha * (a @ b)
    if c is None:
        return product
    return product + (c if beta == 1 else beta * c)


def normalise_instances(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float) -> Tensor:
    """Instance norm: every channel of every sample by itself."""
    return F.instance_norm(x, weight=scale, bias=shift, eps=eps)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Integers | None,
    pads: Integers | None,
    dilations: Integers | None,
    groups: int,
) -> Tensor:
    """A convolution whose weights are computed; `pads` are those of either side."""
    function = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    around = tuple(strides or [1]), tuple(pads or [0]), tuple(dilations or [1])
    return function(x, weight, bias, *around, groups)


def convolve_transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Integers,
    pads: Integers,
    dilations: Integers,
    output_padding: Integers,
    groups: int,
) -> Tensor:
    """A transposed convolution of which `pads` are cut off, first all starts, then all ends."""
    rank = weight.ndim - 2
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    y = function(
        x, weight, bias, tuple(strides), 0, tuple(output_padding), groups, tuple(dilations)
    )
    for axis, (first, last) in enumerate(zip(pads[:rank], pads[rank:], strict=True), 2):
        y = y.narrow(axis, first, y.shape[axis] - first - last)
    return y


def gelu(x: Tensor, *, approximate: str) -> Tensor:
    """x Φ(x), or its approximation by tanh."""
    return F.gelu(x, approximate=approximate)


def swish(x: Tensor, *, alpha: float) -> Tensor:
    """x σ(αx)."""
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def overall_maximum(x: Tensor) -> Tensor:
    """The maximum over the dimensions after batch and channels, which become 1."""
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


class Operation(nn.Module):
    """An operation of the graph: one of the functions above with its options.

    Args:
        function: takes the operation's inputs by position.
        numbers: positions of the inputs that it wants as Python numbers.
        options: keyword arguments, from the operation's attributes.
    """

    def __init__(
        self, function: Callable[..., Any], numbers: tuple[int, ...] = (), **options: Any
    ) -> None:
        super().__init__()
        self.function, self.numbers, self.options = function, numbers, options

    def forward(
        self, a: Any = None, b: Any = None, c: Any = None, d: Any = None, *more: Any
    ) -> Any:
        """The function, with tensors of numbers read on the spot."""
        inputs = [a, b, c, d, *more]
        while inputs and inputs[-1] is None:
            inputs.pop()
        return self.function(*map(self.plain, range(len(inputs)), inputs), **self.options)

    def plain(self, position: int, value: Any) -> Any:
        """An input as the function wants it."""
        return value.tolist() if position in self.numbers and isinstance(value, Tensor) else value


def _given(attributes: Attributes, **names: str) -> dict[str, Any]:
    """Options from those attributes that are there: in early opsets what later is an input."""
    return {ours: attributes[name] for ours, name in names.items() if name in attributes}


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise NotImplementedError(what)


def _reduction(kind: str) -> Callable[[Attributes, int], Operation]:
    def make(at: Attributes, outputs: int) -> Operation:
        keep, skip = at.get("keepdims", 1) == 1, at.get("noop_with_empty_axes", 0) == 1
        axes = _given(at, axes="axes")
        return Operation(reduce, (1,), kind=kind, keep=keep, skip_empty=skip, **axes)

    return make


def _pad(at: Attributes, outputs: int) -> Operation:
    mode = at.get("mode", "constant")
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    _refuse(mode not in modes, f"mode {mode!r}")
    numbers = {"pads": at["pads"], "value": at.get("value", 0.0)} if "pads" in at else {}
    return Operation(pad, (1, 2, 3), mode=modes[mode], **numbers)


def _resize(at: Attributes, outputs: int) -> Operation:
    mode = at.get("mode", "nearest")
    coordinates = at.get("coordinate_transformation_mode", "half_pixel")
    known = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    _refuse(coordinates not in known, f"coordinates {coordinates!r}")
    policy = at.get("keep_aspect_ratio_policy", "stretch")
    _refuse(policy != "stretch", f"keep_aspect_ratio_policy {policy!r}")
    return Operation(
        resize, (2, 3), mode=mode, coordinates=coordinates,
        nearest=at.get("nearest_mode", "round_prefer_floor"),
        antialias=at.get("antialias", 0) == 1, cubic=at.get("cubic_coeff_a", -0.75),
        inside=at.get("exclude_outside", 0) == 1, **_given(at, axes="axes"),
    )  # fmt: skip


def _upsample(at: Attributes, outputs: int) -> Operation:
    # before opset 11 coordinates are asymmetric
    return Operation(upsample, (1,), mode=at.get("mode", "nearest"), **_given(at, scales="scales"))


def _constant_of_shape(at: Attributes, outputs: int) -> Operation:
    value = at["value"].to_torch() if "value" in at else torch.zeros(1)
    return Operation(full, (0,), value=value.item(), dtype=value.dtype)


def _split(at: Attributes, outputs: int) -> Operation:
    sizes = _given(at, sizes="split")
    return Operation(split, (1,), axis=at.get("axis", 0), parts=outputs, **sizes)


def _top(at: Attributes, outputs: int) -> Operation:
    return Operation(
        topk, (1,), axis=at.get("axis", -1), largest=at.get("largest", 1) == 1,
        ordered=at.get("sorted", 1) == 1, places=outputs > 1,
        **({"k": [at["k"]]} if "k" in at else {}),
    )  # fmt: skip


def _scatter(function: Callable[..., Any]) -> Callable[[Attributes, int], Operation]:
    def make(at: Attributes, outputs: int) -> Operation:
        _refuse(at.get("reduction", "none") != "none", f"reduction {at.get('reduction')!r}")
        return Operation(
            function, **({} if function is scatter_nd else {"axis": at.get("axis", 0)})
        )

    return make


def _attention(at: Attributes, outputs: int) -> Operation:
    _refuse(outputs > 1, "a cache of keys and values")
    _refuse(at.get("softcap", 0.0) != 0, "softcap")
    return Operation(
        attention, heads=at.get("q_num_heads"), key_heads=at.get("kv_num_heads"),
        causal=at.get("is_causal", 0) == 1, scale=at.get("scale"),
    )  # fmt: skip


def _convolution(at: Attributes, outputs: int) -> Operation:
    pads = at.get("pads")
    if pads is not None:
        half = len(pads) // 2
        _refuse(pads[:half] != pads[half:], "computed weights and uneven pads")
        pads = pads[:half]
    return Operation(
        convolve, strides=at.get("strides"), pads=pads, dilations=at.get("dilations"),
        groups=at.get("group", 1),
    )  # fmt: skip


def _transposed_convolution(at: Attributes, outputs: int) -> Operation:
    _refuse("pads" not in at, "computed weights, or padding for an unknown size")
    ones = [1] * (len(at["pads"]) // 2)
    return Operation(
        convolve_transposed, strides=at.get("strides", ones), pads=at["pads"],
        dilations=at.get("dilations", ones), groups=at.get("group", 1),
        output_padding=at.get("output_padding", [0] * len(ones)),
    )  # fmt: skip


def _pool(largest: bool) -> Callable[[Attributes, int], Operation]:
    def make(at: Attributes, outputs: int) -> Operation:
        kernel = at["kernel_shape"]
        ones = [1] * len(kernel)
        dilations = at.get("dilations", ones)
        _refuse(outputs > 1, "indices of a pooling")
        _refuse(not largest and dilations != ones, "a dilated mean")
        auto = at.get("auto_pad", "NOTSET")
        _refuse(auto.startswith("SAME"), f"{auto} of an unknown size")
        pads = at.get("pads", [0] * 2 * len(kernel)) if auto == "NOTSET" else [0] * 2 * len(kernel)
        return Operation(
            pool, largest=largest, kernel=kernel, strides=at.get("strides", ones), pads=pads,
            dilations=dilations, ceil=at.get("ceil_mode", 0) == 1,
            count_pads=at.get("count_include_pad", 0) == 1,
        )  # fmt: skip

    return make


def _gemm(at: Attributes, outputs: int) -> Operation:
    turned = at.get("transA", 0) == 1, at.get("transB", 0) == 1
    alpha, beta = at.get("alpha", 1.0), at.get("beta", 1.0)
    return Operation(gemm, alpha=alpha, beta=beta, transposed=turned)


def _group_norm(at: Attributes, outputs: int) -> Operation:
    return Operation(normalise_groups, groups=at["num_groups"], eps=at.get("epsilon", 1e-5))


def _norm(function: Callable[..., Any]) -> Callable[[Attributes, int], Operation]:
    def make(at: Attributes, outputs: int) -> Operation:
        _refuse(outputs > 1, "mean or deviation as outputs")
        return Operation(function, axis=at.get("axis", -1), eps=at.get("epsilon", 1e-5))

    return make


OURS: dict[str, Callable[[Attributes, int], Operation]] = {
    "Add": lambda at, n: Operation(torch.add),
    "Attention": _attention,
    "AveragePool": _pool(largest=False),
    "CastLike": lambda at, n: Operation(cast_like),
    "Clip": lambda at, n: Operation(clip, (1, 2), **_given(at, low="min", high="max")),
    "Col2Im": lambda at, n: Operation(
        fold, (1, 2), dilations=at.get("dilations"), pads=at.get("pads"), strides=at.get("strides")
    ),
    "ConstantOfShape": _constant_of_shape,
    "Concat": lambda at, n: Operation(concat, axis=at.get("axis", 1)),
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "CumSum": lambda at, n: Operation(
        cumsum, (1,), exclusive=at.get("exclusive", 0) == 1, reverse=at.get("reverse", 0) == 1
    ),
    "DepthToSpace": lambda at, n: Operation(
        depth_to_space, block=at["blocksize"], depth_first=at.get("mode", "DCR") == "DCR"
    ),
    "Div": lambda at, n: Operation(divide),
    "Expand": lambda at, n: Operation(expand, (1,)),
    "Flatten": lambda at, n: Operation(flatten, axis=at.get("axis", 1)),
    "Gather": lambda at, n: Operation(take, axis=at.get("axis", 0)),
    "GatherElements": lambda at, n: Operation(take_elements, axis=at.get("axis", 0)),
    "Gelu": lambda at, n: Operation(gelu, approximate=at.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalMaxPool": lambda at, n: Operation(overall_maximum),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": lambda at, n: Operation(
        normalise_instances, eps=at.get("epsilon", 1e-5)
    ),
    "LayerNormalization": _norm(normalise),
    "MatMul": lambda at, n: Operation(torch.matmul),
    "MaxPool": _pool(largest=True),
    "Mish": lambda at, n: Operation(F.mish),
    "Mul": lambda at, n: Operation(torch.mul),
    "NonZero": lambda at, n: Operation(places_of_nonzero),
    "OneHot": lambda at, n: Operation(one_hot, (1,), axis=at.get("axis", -1)),
    "Pad": _pad,
    "RMSNormalization": _norm(normalise_rms),
    "Range": lambda at, n: Operation(arange, (0, 1, 2)),
    "Reshape": lambda at, n: Operation(
        reshape, (1,), allow_zero=at.get("allowzero", 0) == 1, **_given(at, shape="shape")
    ),
    "Resize": _resize,
    "ScatterElements": _scatter(scatter_elements),
    "ScatterND": _scatter(scatter_nd),
    "Shape": lambda at, n: Operation(shape_of, start=at.get("start", 0), end=at.get("end")),
    "Size": lambda at, n: Operation(size_of),
    "SpaceToDepth": lambda at, n: Operation(space_to_depth, block=at["blocksize"]),
    "Slice": lambda at, n: Operation(
        cut, (1, 2, 3, 4), **_given(at, starts="starts", ends="ends", axes="axes")
    ),
    "Split": _split,
    "Squeeze": lambda at, n: Operation(squeeze, (1,), **_given(at, axes="axes")),
    "Sub": lambda at, n: Operation(torch.sub),
    "Swish": lambda at, n: Operation(swish, alpha=at.get("alpha", 1.0)),
    "Tile": lambda at, n: Operation(tile, (1,)),
    "TopK": _top,
    "Transpose": lambda at, n: Operation(transpose, order=at.get("perm")),
    "Trilu": lambda at, n: Operation(trilu, (1,), upper=at.get("upper", 1) == 1),
    "Unsqueeze": lambda at, n: Operation(unsqueeze, (1,), **_given(at, axes="axes")),
    "Upsample": _upsample,
    "Where": lambda at, n: Operation(torch.where),
    **{kind: _reduction(kind) for kind in (*REDUCTIONS, "ReduceProd")},
}
"""(attributes, number of outputs) -> the operation, for every opset."""


@cache
def extend_onnx2torch() -> None:
    """Enter `OURS` under `DOMAIN`, and the versions of `SAME_MEANING`, into its registry."""
    from onnx import defs
    from onnx2torch.node_converters.registry import add_converter, get_converter
    from onnx2torch.utils.common import OperationConverterResult, onnx_mapping_from_node

    def convert(node: Any, graph: Any) -> Any:
        used = [name for name in node.output_values if name]
        module = OURS[node.operation_type](node.attributes, len(used))
        return OperationConverterResult(module, onnx_mapping_from_node(node))

    for kind in OURS:
        add_converter(kind, version=1, domain=DOMAIN)(convert)
    for kind, (lacking, later) in SAME_BEFORE.items():
        add_converter(kind, version=lacking)(get_converter(kind, later))
    newer = sorted(
        (schema.name, schema.since_version)
        for schema in defs.get_all_schemas_with_history()
        if not schema.domain and schema.name in SAME_MEANING
    )
    known: dict[str, Any] = {}
    for kind, version in newer:
        try:
            known[kind] = get_converter(kind, version)
        except NotImplementedError:
            if kind in known:
                add_converter(kind, version=version)(known[kind])
