"""A pool of coarsely pruned candidates, sent as one ranked list.

For fixed weights the masks of all candidates are nested in every layer: each is a prefix of the
layer's weights ordered by magnitude. So a pool is the longest prefix of every layer and a table
of counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateurs.federated.messages import VALUES, Arrays, Layout, State
from secateurs.parts.masks import Masks
from secateurs.parts.topk import select_largest

POOLED, POOLED_VALUES, COUNTS = "ranked", "ranked-values", "counts"


def pool_of(layout: Layout, state: Mapping[str, Tensor], counts: Tensor) -> Arrays:
    """The message that holds every candidate.

    Args:
        state: of the model whose weights are ranked by magnitude; ties go to the lower index.
        counts: (candidates, layers) int64, kept weights of each layer in the layout's order.
    """
    positions, values = [], []
    for name, longest in zip(layout.masked, counts.max(0).values.tolist(), strict=True):
        weight = state[name].detach().cpu()
        [kept] = select_largest([weight.abs()], longest)
        indices = kept.flatten().nonzero().flatten()
        own = weight.flatten()[indices]
        order = own.abs().argsort(descending=True, stable=True)
        positions.append(layout.positions(name, indices[order]))
        values.append(own[order].to(layout.dtype))
    return {
        POOLED: torch.cat(positions),
        POOLED_VALUES: torch.cat(values),
        COUNTS: counts.to(torch.int32),
        **layout.pack_dense(state),
    }


def candidate_of(layout: Layout, pool: Arrays, number: int) -> tuple[State, Masks]:
    """State and masks of a candidate of a pool.

    Args:
        pool: what `pool_of` made.
    """
    longest = pool[COUNTS].max(0).values.tolist()
    positions = pool[POOLED].split(longest)
    values = pool[POOLED_VALUES].split(longest)
    flat = torch.zeros(layout.total, dtype=torch.bool)
    weights = torch.zeros(layout.total, dtype=layout.dtype)
    kept = pool[COUNTS][number].tolist()
    for count, places, own in zip(kept, positions, values, strict=True):
        flat[places[:count].long()] = True
        weights[places[:count].long()] = own[:count]
    masks = layout.shaped(flat)
    state = layout.unpack({**pool, VALUES: weights[flat]}, masks)
    return state, masks
