"""Feed-forward layers of a traced model: neurons that begin and end inside one block.

Found from the axes, not by names: an axis of role neuron whose every slice lies in one block,
and which some linear layer there reads. Gates, fused ones too, and up projections are the
layers that make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateurs.calibration.blocks import find_blocks, owner_of
from secateurs.calibration.moments import is_known
from secateurs.structure.axes import Group, Structure
from secateurs.structure.dimensions import units_of


@dataclass(frozen=True)
class FeedForward:
    """The neurons between the layers that make them and those that they are fed to.

    Attributes:
        group: their axis.
        block: the block that it lies in.
        behind, before: names of the weights that read and that make the neurons.
    """

    group: Group
    block: str
    behind: tuple[str, ...]
    before: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def size(self) -> int:
        return self.group.size


def feed_forward(structure: Structure, model: nn.Module) -> list[FeedForward]:
    """Axes of neurons that begin and end inside one block, in the order of the blocks."""
    blocks = find_blocks(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for group in structure.free:
        tensors = [name for name, _ in group.slices]
        owners = {owner_of(name, blocks) for name in tensors}
        block = owners.pop()
        if group.role != "neuron" or owners or block is None:
            continue
        sides: dict[bool, list[str]] = {True: [], False: []}
        for name, place in group.slices:
            layer = modules[name.rpartition(".")[0]]
            if is_known(layer) and name.endswith("weight"):
                sides[place == input_place(layer)].append(name)
        if sides[True]:
            found.append(FeedForward(group, block, tuple(sides[True]), tuple(sides[False])))
    order = {name: place for place, name in enumerate(blocks)}
    return sorted(found, key=lambda x: order[x.block])


def input_place(layer: nn.Module) -> int:
    """The dimension of a weight that runs over the layer's inputs; transformers' Conv1D has
    it first."""
    return 0 if type(layer).__name__ == "Conv1D" else 1


def layer_names(layer: FeedForward) -> list[str]:
    """The modules that are fed with the neurons."""
    return [name.rpartition(".")[0] for name in layer.behind]


def fed(layers: Sequence[FeedForward]) -> list[str]:
    """The same of several."""
    return [name for layer in layers for name in layer_names(layer)]


def columns(structure: Structure, group: Group, name: str) -> list[Tensor]:
    """A weight as matrices (D, neurons), float64; several where it holds each neuron more than
    once, as fused gates do."""
    owner, matrix = owners(structure, group, name)
    places = owner.argsort(stable=True)[int((owner < 0).sum()) :].view(group.size, -1)
    matrix = matrix.detach().double()
    return [matrix[:, places[:, k].to(matrix.device)] for k in range(places.shape[1])]


def owners(structure: Structure, group: Group, name: str) -> tuple[Tensor, Tensor]:
    """The neuron of every index of a weight, −1 for none, and the weight with these last."""
    place = dict(group.slices)[name]
    owner = torch.from_numpy(units_of(structure.trace.tensors[name][place], group.axis))
    return owner, structure.trace.model.get_parameter(name).movedim(place, -1).flatten(0, -2)


@torch.no_grad()
def silence(structure: Structure, layer: FeedForward, kept: Tensor) -> None:
    """Zero what the layers behind read of all other neurons, in place."""
    for name in layer.behind:
        owner, matrix = owners(structure, layer.group, name)
        gone = (owner >= 0) & ~torch.isin(owner, kept)
        matrix[:, gone.to(matrix.device)] = 0
