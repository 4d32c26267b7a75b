"""A model as if units were removed, without removing them: all that runs over them is zero.

Zeros in the layers that make a unit silence it, biases and norms included; zeros in those that
consume it would do as well. With both, weights of the removed units are nowhere to be seen, so
that norms of weights are those of the shortened model too. Exact where no statistic is taken over
a removed unit (`exact`); nothing is traced or copied, so that many removals can be tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from secateurs.structure.axes import Structure
from secateurs.structure.dimensions import Axis, Dim, Kept, kept_indices, plain_axes
from secateurs.structure.rewrite import current_tensors


def exact(axes: Iterable[Axis]) -> bool:
    """Whether zeros are as good as a removal: no norm, mean or softmax runs over the axes."""
    return not any(axis.over for axis in axes)


@contextmanager
def masked(structure: Structure, kept: Kept) -> Iterator[None]:
    """Meanwhile the traced model has zeros wherever a tensor runs over removed units.

    Args:
        kept: indices of the units that stay, by axis; axes that are not listed stay whole.
    """
    old: dict[str, Tensor] = {}
    tensors = current_tensors(structure.trace)
    try:
        for name, shape in structure.trace.tensors.items():
            if any(_shortened(dim, kept) for dim in shape):
                old[name] = tensors[name].data
                tensors[name].data = zeroed(tensors[name].data, shape, kept)
        yield
    finally:
        for name, value in old.items():
            tensors[name].data = value


def zeroed(values: Tensor, dims: Iterable[Dim], kept: Kept) -> Tensor:
    """A copy with zeros at the indices of removed units, along every dimension."""
    result = values.clone()
    for place, dim in enumerate(dims):
        if _shortened(dim, kept):
            gone = torch.ones(values.shape[place], dtype=torch.bool, device=values.device)
            gone[torch.from_numpy(kept_indices(dim, kept)).to(values.device)] = False
            result[(slice(None),) * place + (gone,)] = 0
    return result


def _shortened(dim: Dim, kept: Mapping[Axis, object]) -> bool:
    return any(axis in kept for axis in plain_axes(dim))
