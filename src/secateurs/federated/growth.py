"""Growing connections from gradients that clients hold: bounded buffers, merged on the server.

A client sends, of each layer, the K largest |gradient| among weights that are gone. The gradients
are taken layer by layer while the backward pass goes, and each is freed before the next is made,
so a client holds one dense gradient of one layer and O(K) values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import described, require
from secateurs.parts.masks import Masks, named_parameters
from secateurs.parts.topk import select_largest

Gradients = tuple[Tensor, Tensor]
"""Indices into the flattened tensor in ascending order, int64, and the values there."""


def largest_inactive(gradient: Tensor, mask: Tensor, count: int) -> Gradients:
    """The `count` largest |gradient| where the mask has nothing; ties go to the lower index.

    Zeros are left out: there is nothing to gain at such a weight.
    """
    scores = gradient.detach().abs().masked_fill_(mask, -1.0).flatten()
    growable = int((scores > 0).sum())
    [chosen] = select_largest([scores], min(count, growable))
    indices = chosen.nonzero().flatten()
    return indices, gradient.detach().flatten()[indices]


def inactive_gradients(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    masks: Masks,
    counts: Mapping[str, int],
) -> dict[str, Gradients]:
    """The largest gradients of removed weights, for some layers; nothing else gets a gradient.

    Args:
        model: in the mode in which the gradient is wanted.
        loss: (model, batch) -> mean loss.
        batches: with several, gradients add up first, so a layer's is kept dense meanwhile.
        counts: largest number to keep, by name of the layer.
    """
    wanted = named_parameters(model, dict.fromkeys(counts, torch.empty(0)))
    by_place = {id(p): name for name, p in wanted.items()}
    found: dict[str, Gradients] = {}
    listed = list(batches)
    require(bool(listed), "batches", described("none"), "at least one")
    remaining = dict.fromkeys(counts, len(listed))

    def collect(parameter: Tensor) -> None:
        name = by_place[id(parameter)]
        remaining[name] -= 1
        if remaining[name] == 0:
            assert parameter.grad is not None
            found[name] = largest_inactive(parameter.grad, masks[name], counts[name])
            parameter.grad = None

    required = [(p, p.requires_grad) for p in model.parameters()]
    handles = []
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in by_place)
            parameter.grad = None
        handles = [p.register_post_accumulate_grad_hook(collect) for p in wanted.values()]
        for batch in listed:
            loss(model, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required_grad in required:
            parameter.requires_grad_(required_grad)
            parameter.grad = None
    # a layer that the loss does not reach has nothing to grow
    none = (torch.empty(0, dtype=torch.int64), torch.empty(0))
    return {name: found.get(name, none) for name in counts}


def merge_growth(replies: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    """Weighted mean of what clients sent about a layer, what was not sent counting as 0.

    Args:
        replies: in a fixed order, in which they are summed.
        weights: of the clients; they are normalised.

    Returns:
        Distinct indices in ascending order, and double precision means.
    """
    total = sum(weights)
    indices = torch.cat([i for i, _ in replies])
    distinct, place = indices.unique(return_inverse=True)
    sums = torch.zeros(len(distinct), dtype=torch.float64)
    scaled = [v.double() * (w / total) for (_, v), w in zip(replies, weights, strict=True)]
    return distinct, sums.index_add_(0, place, torch.cat(scaled))


def drop_and_grow(weight: Tensor, mask: Tensor, count: int, gradients: Gradients) -> Tensor:
    """Exchange the `count` smallest active weights for the largest gradients.

    Only positions that were inactive before can grow; where fewer arrived, as many are dropped
    as can be grown. The number of kept weights stays what it is.

    Args:
        weight, mask: of one layer; True = keep.
        gradients: merged, of inactive positions.

    Returns:
        The new mask.
    """
    indices, values = gradients
    mask = mask.cpu()
    shown = described("an index of a kept weight")
    require(not bool(mask.flatten()[indices].any()), "gradients", shown, "removed weights only")
    kept = int(mask.sum())
    exchanged = min(count, kept, len(indices))
    scores = weight.detach().cpu().abs().double().masked_fill(~mask, -1.0)
    [survivors] = select_largest([scores], kept - exchanged)
    [grown] = select_largest([values.abs()], exchanged)
    survivors.view(-1)[indices[grown]] = True
    return survivors


def blocks_of(names: Sequence[str]) -> list[list[str]]:
    """Layers grouped by the module tree, from input to output.

    Names share a block as far as their first component; a group with more than half of all
    layers is split by the next one. A last layer that is a group by itself (a classifier) joins
    the block before it.
    """
    groups = _grouped(list(names), 0, max(len(names) // 2, 1))
    if len(groups) > 2 and len(groups[-1]) == 1:
        *groups, tail = groups
        groups[-1] = groups[-1] + tail
    return groups


def _grouped(names: list[str], depth: int, most: int) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        # the last component is the parameter's own
        found.setdefault(parts[min(depth, len(parts) - 1)], []).append(name)
    groups: list[list[str]] = []
    for group in found.values():
        divisible = len(group) > most and depth < max(n.count(".") for n in group)
        groups += _grouped(group, depth + 1, most) if divisible else [group]
    return groups
