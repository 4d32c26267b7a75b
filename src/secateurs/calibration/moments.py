"""Second moments of what a layer multiplies its weights with.

A linear layer computes W x for each row x of its input; a convolution does the same for each
window of its input, unfolded to a vector in the order of `weight.reshape(out, -1)`: channel by
channel, within a channel kernel position by kernel position. With these vectors, per group,

    H = (2/N) Σ x xᵀ,    so that    1/2 tr(Δ H Δᵀ) = (1/N) Σ ‖Δ x‖²

is the mean square by which the output moves when the weights move by Δ. N counts the vectors,
that is batch x tokens for a linear layer and batch x output positions for a convolution: the
mean then depends neither on the batch size nor on sequence lengths that differ between batches.
Published code often divides by sequences or images instead; `Moments.samples` converts, and the
solver in `secateurs.calibration.obs` gives the same weights for any multiple of H.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.errors import InputError, described, require, unknown
from secateurs.parts.experts import are_experts, expert_matrices, inputs_come_first

CHUNK = 1 << 22
"""Unfolded numbers that are converted to float64 and multiplied at once (32 MB)."""

_ACCEPTED = (
    "Linear, Conv1d, Conv2d, Conv3d or transformers' Conv1D, or a subclass with the same forward"
)
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS: tuple[type[_Convolution], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Moments:
    """Streaming first and second moments of one layer's inputs, in float64.

    Memory is one (groups, d, d) matrix, on the device of the first input, whatever the number
    of inputs, or one (groups, d) without `products`. d is in_features, or in_channels / groups x
    kernel positions.

    Args:
        layer: Linear, Conv1d, Conv2d, Conv3d or transformers' Conv1D.
        name: what errors call it.
        products: whether the whole matrix is wanted, or squares and means alone.

    Attributes:
        rows: N, the number of vectors seen.
        samples: entries of the first dimension seen (sequences or images); an input without a
            batch dimension is one.

    Raises:
        InputError: any other kind of layer, or one whose class has its own forward, so that
            nobody knows what it multiplies its weights with.
    """

    def __init__(self, layer: nn.Module, name: str = "layer", *, products: bool = True) -> None:
        _check_kind(layer, name)
        self.layer, self.name = layer, name
        self.rows = 0
        self.samples = 0
        self._whole = products
        self._products: Tensor | None = None
        self._sums: Tensor | None = None

    @torch.no_grad()
    def update(self, inputs: Tensor) -> None:
        """Take in one input of the layer, in the shape in which the layer takes it.

        Raises:
            InputError: a shape that the layer does not take, or NaN or Inf.
        """
        windows = _windows(self.layer, inputs.detach(), self.name)
        _check_finite(self.name, inputs)
        groups = _groups(self.layer)
        if self._products is None or self._sums is None:
            width = _width(self.layer)
            shape = (groups, width, width) if self._whole else (groups, width)
            self._products = torch.zeros(shape, dtype=torch.float64, device=inputs.device)
            self._sums = self._products.new_zeros(groups, width)
        for chunk in _chunks(windows, _dimensions(self.layer)):
            vectors = _stacked(chunk, groups).double()
            if self._whole:
                self._products.baddbmm_(vectors, vectors.mT)
            else:
                self._products += vectors.square().sum(2)
            self._sums += vectors.sum(2)
            self.rows += vectors.shape[2]
        unbatched = inputs.ndim == 1 + _dimensions(self.layer)
        self.samples += 1 if unbatched else inputs.shape[0]

    @property
    def hessian(self) -> Tensor:
        """(2/N) Σ x xᵀ, (groups, d, d)."""
        require(self._whole, self.name, described("squares alone"), "moments with products=True")
        return self._seen(self._products) * (2 / self.rows)

    @property
    def squares(self) -> Tensor:
        """(1/N) Σ x², (groups, d)."""
        total = self._seen(self._products)
        return (total.diagonal(dim1=-2, dim2=-1) if self._whole else total) / self.rows

    @property
    def mean(self) -> Tensor:
        """(1/N) Σ x, (groups, d)."""
        return self._seen(self._sums) / self.rows

    def in_order(self, columns: Tensor) -> Moments:
        """The same moments with the inputs in another order: `columns`, (d,) indices."""
        other = copy.copy(self)
        if self._products is not None and self._sums is not None:
            columns = columns.to(self._sums.device)
            taken = self._products[..., columns]
            other._products = taken[:, columns] if self._whole else taken
            other._sums = self._sums[..., columns]
        return other

    def _seen(self, total: Tensor | None) -> Tensor:
        if total is None or self.rows == 0:
            raise InputError(self.name, described("a layer that has seen no input"), "an input")
        return total


def collect_moments(
    model: nn.Module,
    names: Iterable[str],
    run: Callable[[nn.Module], Any],
    *,
    products: bool = True,
    unreached: bool = False,
) -> dict[str, Moments]:
    """The moments of the inputs that some layers get while `run(model)` is at work.

    The model is in eval mode and without gradients meanwhile; modes are restored and hooks
    removed, also when `run` fails. A layer that is called twice counts both calls.

    Args:
        names: of the layers, as in `model.named_modules()`.
        run: calls the model on whatever it likes, such as batches in a loop.
        products: whether whole matrices are wanted, or squares and means alone.
        unreached: whether a layer may stay without input, as the experts of a mixture do; it is
            then left out of the answer.

    Raises:
        InputError: a name the model does not have, a layer of another kind (`Moments`), NaN in
            an input, or a layer that was never called; all name the layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    moments: dict[str, Moments] = {}
    for name in names:
        if name not in modules:
            raise unknown("names", name, modules)
        shown = name or type(model).__name__
        moments[name] = Moments(modules[name], shown, products=products)
    with _hooked(moments), _in_eval_mode(model), torch.no_grad():
        run(model)
    for moment in moments.values():
        if moment.rows == 0 and not unreached:
            raise InputError(
                moment.name,
                described("a layer that saw no sample"),
                "a run that calls this layer; a fused module may use its weights without it",
            )
    return {name: moment for name, moment in moments.items() if moment.rows}


def unfolded(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The vectors that a layer multiplies its weights with, (groups, d, N).

    `weight_matrices(layer) @ unfolded(layer, inputs)` is the output without the bias, with
    channels first and all positions of all samples behind.
    """
    _check_kind(layer, "layer")
    return _stacked(_windows(layer, inputs, "inputs"), _groups(layer))


def weight_matrices(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight as (groups, out / groups, d): what multiplies the vectors of each group.

    Args:
        weight: another tensor in the shape of the layer's weight, taken in its place.
    """
    _check_kind(layer, "layer")
    weight = _weight(layer) if weight is None else weight
    matrix = weight.t() if _is_transposed(layer) else weight
    return matrix.reshape(_groups(layer), -1, _width(layer))


def outputs_first(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as (outputs, inputs, ...): views of those that are stored otherwise.

    Experts of one array come last, as the positions of a kernel do.
    """
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in params}
    views = {}
    for name, parameter in params.items():
        owner = owners[name]
        if are_experts(owner, name, parameter):
            parameter = expert_matrices(parameter, inputs_first=inputs_come_first(owner)).movedim(
                0, 2
            )
        views[name] = parameter.t() if _is_transposed(owner) else parameter
    return views


def weight_from_matrices(layer: nn.Module, matrices: Tensor) -> Tensor:
    """A weight in the shape that the layer stores, from matrices of `weight_matrices`."""
    _check_kind(layer, "layer")
    weight = _weight(layer)
    shape = tuple(weight_matrices(layer).shape)
    require(tuple(matrices.shape) == shape, "matrices", tuple(matrices.shape), f"shape {shape}")
    if _is_transposed(layer):
        return matrices[0].t().contiguous()
    return matrices.reshape(weight.shape)


@contextmanager
def _hooked(moments: dict[str, Moments]) -> Iterator[None]:
    """Each layer tells its moments about its inputs."""

    def hook(moment: Moments) -> Callable[..., None]:
        def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            moment.update(args[0] if args else next(iter(kwargs.values())))

        return take

    handles = [
        moment.layer.register_forward_pre_hook(hook(moment), with_kwargs=True)
        for moment in moments.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def is_known(layer: nn.Module) -> bool:
    """Whether it is a layer of which it is known what it multiplies its weights with."""
    return _is_transposed(layer) or any(
        isinstance(layer, base)
        and all(
            getattr(type(layer), method) is getattr(base, method)
            for method in ("forward", "_conv_forward")
            if hasattr(base, method)
        )
        for base in (nn.Linear, *_CONVOLUTIONS)
    )


def _check_kind(layer: nn.Module, name: str) -> None:
    require(is_known(layer), name, described(f"a {type(layer).__name__}"), _ACCEPTED)


def _is_transposed(layer: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: linear, with the weight stored as (in, out)."""
    return type(layer).__name__ == "Conv1D"


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, _CONVOLUTIONS) else 1


def _dimensions(layer: nn.Module) -> int:
    """Over how many dimensions its windows slide."""
    return len(layer.kernel_size) if isinstance(layer, _CONVOLUTIONS) else 0


def _width(layer: nn.Module) -> int:
    """d, the length of the vectors."""
    weight = _weight(layer)
    return weight.shape[0] if _is_transposed(layer) else weight[0].numel()


def _windows(layer: nn.Module, inputs: Tensor, name: str) -> Tensor:
    """A view (samples, channels, *positions, *kernel); a linear layer has only the first two."""
    if not isinstance(layer, _CONVOLUTIONS):
        _check_shape(name, inputs, inputs.ndim >= 1 and inputs.shape[-1] == _width(layer), layer)
        return inputs.reshape(-1, _width(layer))
    dimensions = _dimensions(layer)
    batched = inputs if inputs.ndim == 2 + dimensions else inputs[None]
    fits = batched.ndim == 2 + dimensions and batched.shape[1] == layer.in_channels
    _check_shape(name, inputs, fits, layer)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(batched, _padding(layer), mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return windows


def _padding(layer: _Convolution) -> list[int]:
    """What the layer adds before and after each dimension, the last one first, for `F.pad`."""
    if layer.padding == "valid":
        return [0, 0] * len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [part for total in reversed(totals) for part in (total // 2, total - total // 2)]
    assert not isinstance(layer.padding, str)
    return [part for part in reversed(layer.padding) for _ in range(2)]


def _stacked(windows: Tensor, groups: int) -> Tensor:
    """(samples, channels, *positions, *kernel) as (groups, d, samples x positions)."""
    dimensions = (windows.ndim - 2) // 2
    split = windows.unflatten(1, (groups, -1))
    positions = range(3, 3 + dimensions)
    kernel = range(3 + dimensions, 3 + 2 * dimensions)
    moved = split.permute(1, 2, *kernel, 0, *positions)
    width = prod(moved.shape[1 : 2 + dimensions])
    return moved.reshape(groups, width, moved.shape[2 + dimensions :].numel())


def _chunks(windows: Tensor, dimensions: int) -> Iterator[Tensor]:
    """Views of up to `CHUNK` elements, halved over samples and then over positions."""
    halved = [axis for axis in (0, *range(2, 2 + dimensions)) if windows.shape[axis] > 1]
    if windows.numel() <= CHUNK or not halved:
        yield windows
        return
    for half in windows.chunk(2, halved[0]):
        yield from _chunks(half, dimensions)


def _check_shape(name: str, inputs: Tensor, fits: bool, layer: nn.Module) -> None:
    if not (fits and inputs.is_floating_point()):
        given = described(f"{inputs.dtype} of shape {tuple(inputs.shape)}")
        raise InputError(name, given, f"a floating point input of {layer}")


def _check_finite(name: str, inputs: Tensor) -> None:
    # one pass and no temporary: NaN and Inf both survive a sum, an overflow is re-checked
    total = inputs.detach().sum(dtype=torch.float64)
    if not torch.isfinite(total) and not torch.isfinite(inputs).all():
        kind = "NaN" if torch.isnan(inputs).any() else "Inf"
        raise InputError(name, described(f"{kind} in the inputs"), "finite inputs")
