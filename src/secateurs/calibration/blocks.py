"""The blocks of a model: the layers that are stacked, whatever the model is called.

Found from the module tree alone. A block has a normalisation and a weight matrix, and stands in
a `ModuleList` or `Sequential` among others of its kind, with no such stack inside it: decoder
layers, residual blocks of a stage of Swin or ResNet, both towers of a vision-language model.
The experts of a mixture have no normalisation, the sublayers of T5 stand beside others of
another kind, so neither is taken for a block. A model without stacks is one block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import takewhile

from torch import nn


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks by qualified name, in the order of the tree; ``{"": model}`` where there is none."""
    found = {name: block for name, block in _stacked(model, "") if name}
    seen: set[int] = set()
    blocks = {}
    for name, block in found.items():
        if id(block) not in seen:
            seen.add(id(block))
            blocks[name] = block
    return blocks or {"": model}


def owner_of(name: str, blocks: Collection[str]) -> str | None:
    """The block that a qualified name lies in."""
    if "" in blocks:
        return ""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in blocks:
            return prefix
    return None


def sub_networks(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, str]:
    """The sub-network (encoder, decoder, tower) of every block; "" where there is but one.

    Sub-networks are the children of the smallest module that holds all blocks. If that is a
    stack itself, or all of these children are (stages, one after the other), there is but one.
    """
    stacks = nn.ModuleList | nn.Sequential
    levels = zip(*(name.split(".") for name in blocks), strict=False)
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)]
    depth = len(common) + 1
    found = {name: ".".join(name.split(".")[:depth]) for name in blocks}
    children = [model.get_submodule(name) for name in dict.fromkeys(found.values())]
    holder = model.get_submodule(".".join(common))
    if (
        len(children) == 1
        or isinstance(holder, stacks)
        or all(isinstance(c, stacks) for c in children)
    ):
        return dict.fromkeys(blocks, "")
    return found


def _stacked(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    stack = _is_stack(module)
    for name, child in module.named_children():
        inside = f"{path}.{name}".lstrip(".")
        deeper = list(_stacked(child, inside))
        if deeper:
            yield from deeper
        elif stack and _is_block(child):
            yield inside, child


def _is_stack(module: nn.Module) -> bool:
    """Whether a kind of block comes again in it; a single block is a stack too."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    # iterating lists a module that stands in several places each time
    kinds = [type(child) for child in module if _is_block(child)]
    return len(kinds) == 1 == len(module) or len(set(kinds)) < len(kinds)


def _is_block(module: nn.Module) -> bool:
    parameters = [(m, p) for m in module.modules() for p in m.parameters(recurse=False)]
    matrices = any(p.ndim >= 2 for _, p in parameters)
    return matrices and any(is_norm(m) for m, _ in parameters if m is not module)


def is_norm(module: nn.Module) -> bool:
    """A scale per channel and no matrix: every kind of normalisation, whatever its name."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return False
    return all(p.ndim <= 1 for p in module.parameters(recurse=False))
