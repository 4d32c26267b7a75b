"""Where units of a model can be switched off while it runs, so that what is off can be removed.

A `Switch` has a module whose input tells what is to be switched, and targets: inputs or outputs
of modules that are multiplied by 0 or 1, sample by sample. Two kinds:

 - a residual block: the output of F in act(skip(x) + F(x)); it is told by x;
 - the channels of an axis: the inputs of all layers that sum over them; they are told by the
   input of the layer that makes them. A channel that is 0 wherever it is summed can be removed
   exactly, whatever norms and activations it passed before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from secateurs.errors import InputError, described
from secateurs.structure.axes import Group, Structure
from secateurs.structure.dimensions import Axis, plain_axes, units_of
from secateurs.structure.oracle import argument_node
from secateurs.structure.residual import Residual
from secateurs.structure.rules import op_name
from secateurs.structure.surgery import executed_by
from secateurs.structure.trace import Trace

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Target:
    """A tensor that is multiplied.

    Attributes:
        path: of the module whose first input or whose output it is.
        place: its dimension that the units lie along; 0 where whole samples are switched.
        owner: unit of every entry of that dimension, −1 for entries of other units.
    """

    path: str
    side: Literal["input", "output"]
    place: int
    owner: tuple[int, ...]


@dataclass(frozen=True)
class Switch:
    """Units that are switched together, by one input.

    Attributes:
        name: of the block or axis.
        units: how many.
        reads: path of the module whose first input decides.
        place, width: dimension and number of that input's channels.
    """

    name: str
    units: int
    reads: str
    place: int
    width: int
    targets: tuple[Target, ...]


def block_switches(found: Trace, blocks: Mapping[str, Residual]) -> list[Switch]:
    """A switch of one unit a residual block."""
    switches = []
    for path, block in blocks.items():
        shape: Any = block.input.meta["val"].shape
        place = _channels_at(block.input)
        target = Target(block.end, "output", 0, (0,))
        switches.append(Switch(path, 1, path, place, shape[place], (target,)))
    return switches


def channel_switches(structure: Structure) -> list[Switch]:
    """A switch an axis of channels or neurons that is made by one layer and only summed over.

    Widths of residual streams, heads, and axes that a norm takes its statistics over have none.

    Raises:
        InputError: no axis has.
    """
    calls, summing = _calls(structure.trace), _summing(structure.trace)
    found = [
        switch
        for group in structure.free
        if (switch := _channel_switch(structure, group, calls, summing)) is not None
    ]
    if not found:
        raise InputError(
            "model", described(f"{len(structure)} axes, none of them to be gated"),
            "a model with inner channels that convolutions or linear layers make and sum over",
        )  # fmt: skip
    return found


def _channel_switch(
    structure: Structure,
    group: Group,
    calls: Mapping[str, list[fx.Node]],
    summing: Mapping[Axis, list[fx.Node]],
) -> Switch | None:
    if group.role not in ("channel", "neuron") or group.normalized or group.granularity != 1:
        return None
    weights = [n.rpartition(".")[0] for n, place in group.slices if place == 0]
    makers = [p for p in dict.fromkeys(weights) if p in calls and _mixes(structure.trace, p)]
    consumers = summing.get(group.axis, [])
    if len(makers) != 1 or not consumers or len(calls[makers[0]]) != 1:
        return None
    [maker] = makers
    reads: Any = calls[maker][0].args[0]
    shape = reads.meta["val"].shape
    targets = []
    for node in consumers:
        path = executed_by(node)
        if path is None or len(calls.get(path, ())) != 1 or node not in calls[path]:
            return None  # what a function sums up, or a layer that is called twice
        operand: Any = node.args[0]
        dims: Any = structure.trace.dims[operand]
        place = 1 if op_name(node).startswith("conv") else len(dims) - 1
        if operand.meta["val"].shape[0] != shape[0]:
            return None  # its first dimension is not that of the samples
        owner = tuple(units_of(dims[place], group.axis).tolist())
        targets.append(Target(path, "input", place, owner))
    own = 1 if op_name(calls[maker][0]).startswith("conv") else len(shape) - 1
    return Switch(group.name, group.size, maker, own, shape[own], tuple(targets))


def _mixes(found: Trace, path: str) -> bool:
    """Whether a layer's outputs see all its inputs: a depthwise one only hands channels on."""
    layer: Any = found.model.get_submodule(path)
    return isinstance(layer, nn.Linear) or layer.groups == 1


def _calls(found: Trace) -> dict[str, list[fx.Node]]:
    """Path of a convolution or linear layer -> its operations in the graph."""
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in found.dims:
        path = executed_by(node) if node.op == "call_function" else None
        plain = op_name(node) == "linear" or op_name(node).startswith("conv")
        if path and plain and isinstance(found.model.get_submodule(path), LAYERS):
            calls[path].append(node)
    return calls


def _summing(found: Trace) -> dict[Axis, list[fx.Node]]:
    """Axis -> the operations that sum over it."""
    summing: dict[Axis, list[fx.Node]] = defaultdict(list)
    for meeting in found.notes.contractions:
        dims: Any = found.dims[argument_node(meeting.node, meeting.argument)]
        for axis in dict.fromkeys(plain_axes(dims[meeting.place])):
            summing[axis].append(meeting.node)
    return summing


def _channels_at(node: fx.Node) -> int:
    """The dimension of an input's channels: the last one where a layer takes it so, else 1."""
    last = {"linear", "layer_norm", "rms_norm"}
    value: Any = node.meta["val"]
    return value.ndim - 1 if any(op_name(user) in last for user in node.users) else 1


def factor(target: Target, gates: Tensor, ndim: int) -> Tensor:
    """What a target of `ndim` dimensions is multiplied with: gates (N, units), laid along it."""
    place = target.place
    if place == 0:
        return gates.view([-1] + [1] * (ndim - 1))
    owner = torch.tensor(target.owner, device=gates.device)
    spread = torch.where(owner >= 0, gates[:, owner.clamp_min(0)], torch.ones_like(gates[:, :1]))
    return spread.view([len(gates), *[1] * (place - 1), len(owner), *[1] * (ndim - 1 - place)])
