"""The convolutions and linear layers of a traced model, and their places in its graph."""

from __future__ import annotations

from collections import Counter

import numpy as np
from torch import fx, nn

from secateurs.structure.arguments import argument
from secateurs.structure.axes import Group, Structure
from secateurs.structure.dimensions import plain_axes, units_of
from secateurs.structure.oracle import argument_node
from secateurs.structure.rules import op_name
from secateurs.structure.trace import Trace

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NAMES = ("conv1d", "conv2d", "conv3d", "linear")


def weighted_layers(found: Trace) -> dict[str, fx.Node]:
    """Convolutions and linear layers by path, with the one operation that each of them runs.

    In the order of execution. Layers that run twice, or share their weight, are left out.
    """
    read: dict[fx.Node, str] = {}
    times: Counter[str] = Counter()
    for part in found.parts:
        for node in part.graph.graph.nodes:
            for operand in node.all_input_nodes:
                name = found.same.get(str(operand.target)) if operand.op == "get_attr" else None
                if name is not None:
                    times[name] += 1
                    if op_name(node) in _NAMES and operand is node.args[1]:
                        read[node] = name
    tied = {c for name, c in found.same.items() if name != c}
    layers = {}
    for node, name in read.items():
        path, _, last = name.rpartition(".")
        plain = type(found.model.get_submodule(path)) in _KINDS and bool(path)
        if plain and last == "weight" and times[name] == 1 and name not in tied:
            layers[path] = node
    return layers


def grouped(node: fx.Node) -> bool:
    """Whether a layer's operation is a convolution in groups."""
    return op_name(node) != "linear" and argument(node, "groups") != 1


def is_stem(found: Trace, node: fx.Node) -> bool:
    """Whether it is a convolution of the model's input."""
    if op_name(node) == "linear":
        return False
    channels = found.dims[argument_node(node, "input")][1]
    return all(a.frozen == "an input" for a in plain_axes(channels))


def is_projection(node: fx.Node) -> bool:
    """Whether it is a 1x1 convolution on a shortcut: what it reads is read by a layer beside it,
    and what it gives is added, behind a norm at most."""
    if op_name(node) == "linear":
        return False
    kernel = argument_node(node, "weight").meta["val"].shape[2:]
    beside = [u for u in argument_node(node, "input").users if u is not node]
    last = node
    while len(last.users) == 1:
        last = next(iter(last.users))
        if op_name(last) == "add":
            return all(k == 1 for k in kernel) and any(op_name(u) in _NAMES for u in beside)
        if not op_name(last).endswith("_norm"):
            break
    return False


def scale_behind(found: Trace, node: fx.Node) -> str | None:
    """The name of γ of the norm that reads a layer's output, and nothing else does."""
    users = list(node.users)
    if len(users) != 1 or op_name(users[0]) not in ("batch_norm", "instance_norm", "group_norm"):
        return None
    weight = argument(users[0], "weight")
    return found.same.get(str(weight.target)) if isinstance(weight, fx.Node) else None


def consumers(structure: Structure, group: Group) -> dict[str, np.ndarray] | None:
    """The layers that sum over an axis: for every input of theirs, the unit that it belongs to.

    −1 stands for none. None where anything but an ordinary layer sums over the axis (a product of
    activations, a convolution in groups).
    """
    found = structure.trace
    layers = {node: path for path, node in weighted_layers(found).items() if not grouped(node)}
    units: dict[str, np.ndarray] = {}
    for meeting in found.notes.contractions:
        dim = found.dims[argument_node(meeting.node, meeting.argument)][meeting.place]
        if group.axis not in set(plain_axes(dim)):
            continue
        if meeting.node not in layers or meeting.argument != "weight":
            return None
        units[layers[meeting.node]] = units_of(dim, group.axis)
    return units
