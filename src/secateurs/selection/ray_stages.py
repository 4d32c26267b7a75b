"""The work of shards as a Ray Data stage: a shard is a row, its answer comes back as bytes.

Nodes read the shards by themselves, so files must be where every node finds them. Sums over
shards are exact (see `secateurs.selection.kmeans`), so the answers are those of one process.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from safetensors.torch import load, save

from secateurs.errors import InputError
from secateurs.state import Tree, flatten, unflatten


def computed_on_ray(compute: Callable[[int], Tree], numbers: Sequence[int]) -> Iterator[Tree]:
    """`compute` of every number on the connected cluster, in their order, each when it is done.

    Raises:
        InputError: what a shard's work refused, as it would be here.
    """
    import ray

    if not numbers:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    shared = ray.put(compute)

    def stage(row: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        return {"tree": packed(ray.get(shared)(int(row["shard"])))}

    rows = ray.data.from_items([{"shard": n} for n in numbers], override_num_blocks=len(numbers))
    try:
        for row in rows.map(stage, num_cpus=1).iter_rows():
            yield unpacked(row["tree"])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise


def packed(tree: Tree) -> bytes:
    """A tree as bytes, without pickle."""
    tensors, skeleton = flatten(tree)
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    head = json.dumps(skeleton).encode()
    return len(head).to_bytes(8, "little") + head + save(own)


def unpacked(data: bytes) -> Tree:
    """The tree that `packed` put into bytes."""
    length = int.from_bytes(data[:8], "little")
    return unflatten(load(data[8 + length :]), json.loads(data[8 : 8 + length]))
