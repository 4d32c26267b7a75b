"""A pruned model in products that skip its zeros, checked against the masked one.

``2:4`` are torch's semi-structured kernels; layers that they do not take stay dense, which is right
and no faster, and the note says so. ``block`` are the kept blocks alone
(`secateurs.deploy.block_sparse`), of the size that the masks have. A packed model is used only
if it gives on the example inputs what the masked one gives.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateurs.deploy.block_sparse import to_block_sparse
from secateurs.deploy.semi_structured import pack_semi_structured
from secateurs.errors import InputError, described, require, unknown
from secateurs.parts.costs import evaluating, forward
from secateurs.structure.rewrite import difference

PACKED = ("2:4", "block")
"""Kinds of packing."""
CLOSE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of an output beside its largest value, by dtype: sums in another order."""


def packed(
    model: nn.Module, kind: str, example_inputs: Any, masks: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, str]:
    """A packed copy of a pruned model, for inference, and a note on what became of its layers.

    Args:
        kind: of `PACKED`.
        example_inputs: on which the two are compared.
        masks: True = keep, by parameter name; without them, a weight that is not zero is kept.

    Raises:
        InputError: no mask has the pattern, or the packed model gives something else.
    """
    if kind not in PACKED:
        raise unknown("kind", kind, PACKED)
    made, note = _two_of_four(model) if kind == "2:4" else _blocks(model, masks)
    gap, dtype = _gap(made, model, example_inputs)
    limit = CLOSE.get(dtype, CLOSE[torch.float32])
    told = described(f"outputs that differ by {gap:.2g} from those of the masked model")
    require(gap <= limit, f"the model packed as {kind}", told, f"at most {limit:g}")
    return made, note


def _two_of_four(model: nn.Module) -> tuple[nn.Module, str]:
    made = copy.deepcopy(model)
    told = pack_semi_structured(made)
    parts = [f"{len(told.packed)} layers in sparse kernels"] if told.packed else []
    for reason, count in Counter(told.dense.values()).items():
        parts.append(f"dense fallback of {count} layers ({reason})")
    return made, "; ".join(parts)


def _blocks(model: nn.Module, masks: Mapping[str, Tensor] | None) -> tuple[nn.Module, str]:
    linear = {f"{n}.weight".strip("."): m for n, m in model.named_modules() if type(m) is nn.Linear}
    if masks is None:
        masks = {n: m.weight.detach() != 0 for n, m in linear.items()}
    own = {n: mask for n, mask in masks.items() if n in linear and not bool(mask.all())}
    block = block_of(own)
    if min(block) < 2:
        told = described(f"{type(model).__name__} without blocks of zeros in its linear layers")
        raise InputError("model", told, "one that was pruned with pattern=block:RxC, or by lpvit")
    high, wide = block
    return to_block_sparse(model, own, block), f"{len(own)} layers in blocks of {high}x{wide}"


def block_of(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of the largest blocks that are kept or removed as one in all masks."""
    sides = []
    for turned in (False, True):
        edges, size = 0, 1
        for mask in masks.values():
            lines = mask.t() if turned else mask
            changes = (lines[1:] != lines[:-1]).any(1).nonzero().flatten() + 1
            edges = math.gcd(edges, *changes.tolist())
            size = max(size, len(lines))
        sides.append(edges or size)
    return sides[0], sides[1]


@torch.no_grad()
def _gap(made: nn.Module, model: nn.Module, inputs: Any) -> tuple[float, torch.dtype]:
    outputs = []
    for net in (made, model):
        with evaluating(net):
            outputs.append([x for x in tree_leaves(forward(net, inputs)) if isinstance(x, Tensor)])
    pairs = zip(*outputs, strict=True)
    dtype = next((x.dtype for x in outputs[1] if x.is_floating_point()), torch.float32)
    return max((difference(x, y) for x, y in pairs), default=0.0), dtype
