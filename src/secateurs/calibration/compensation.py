"""OBS for structure: what it costs to remove whole units, and how their consumers make up.

Both run the traced graph once, operation by operation, on all calibration inputs at the same
time. Where a linear layer or convolution multiplies its inputs with a parameter, the inputs are
at hand, so their second moments are taken, used and dropped: memory is one Hessian.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateurs.calibration.moments import Moments, weight_from_matrices, weight_matrices
from secateurs.calibration.obs import DampedHessian, bundle_costs, damp, remove_columns
from secateurs.structure.arguments import argument
from secateurs.structure.axes import Group, Structure
from secateurs.structure.dimensions import Kept, kept_indices, size_of, units_of
from secateurs.structure.oracle import DenseWithZeros, interpreted
from secateurs.structure.parts import Part
from secateurs.structure.rules import op_name

_CONVOLUTIONS: dict[str, Any] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}


def consumer_layer(node: fx.Node, weight: Tensor) -> nn.Module | None:
    """The layer that a node is, around a weight; None for operations that have no solver."""
    name = op_name(node)
    if name == "linear":
        layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    elif name in _CONVOLUTIONS:
        groups = argument(node, "groups")
        options = {k: _each(argument(node, k)) for k in ("stride", "padding", "dilation")}
        layer = _CONVOLUTIONS[name](
            weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), groups=groups,
            bias=False, device="meta", **options,
        )  # fmt: skip
    else:
        return None
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _each(value: Any) -> Any:
    return value if isinstance(value, str | int) else tuple(value)


def _columns(layer: nn.Module, channels: Tensor) -> Tensor:
    """Columns of the weight matrices that belong to input channels (of a group)."""
    weight: Any = layer.weight
    window = math.prod(weight.shape[2:])
    return (channels[:, None] * window + torch.arange(window)).reshape(-1)


class _Consumers(DenseWithZeros, ABC):
    """Runs a part and meets its consumers: nodes that multiply with a parameter of the model.

    Args:
        damping: of the Hessians.
        notes: of raised damping and of consumers without a solver; all parts write here.
    """

    def __init__(
        self, structure: Structure, part: Part, kept: Kept, damping: float, notes: list[str]
    ) -> None:
        super().__init__(structure.trace, part, kept)
        self.structure, self.damping, self.notes = structure, damping, notes
        self.parameters = dict(structure.trace.model.named_parameters())

    def run_node(self, n: fx.Node) -> Any:
        name = self._weight_of(n)
        if name is not None and self._wanted(name):
            layer = consumer_layer(n, self.parameters[name].detach())
            if layer is None:
                self.notes.append(f"{name}: left as it is, {op_name(n)} has no solver")
            else:
                self._meet(name, layer, self.env[n.args[0]])  # type: ignore[index]
        return super().run_node(n)

    def _weight_of(self, n: fx.Node) -> str | None:
        if n not in self.zeroed or len(n.args) < 2 or not isinstance(n.args[1], fx.Node):
            return None
        weight = n.args[1]
        if weight.op != "get_attr":
            return None
        name = self.found.same.get(str(weight.target))
        return name if name in self.parameters else None

    def _hessians(self, layer: nn.Module, inputs: Tensor, name: str) -> list[DampedHessian]:
        moments = Moments(layer, name)
        moments.update(inputs)
        found = [damp(h, self.damping) for h in moments.hessian]
        raised = max(h.damping for h in found)
        if raised > self.damping:
            self.notes.append(f"{name}: damping raised from {self.damping:g} to {raised:g}")
        return found

    @abstractmethod
    def _wanted(self, name: str) -> bool:
        """Whether there is something to do for the consumer with this weight."""

    @abstractmethod
    def _meet(self, name: str, layer: nn.Module, inputs: Tensor) -> None:
        """Do it, with the consumer's inputs at hand."""


class _Costs(_Consumers):
    """Enters into `costs` what the removal of each unit costs each consumer."""

    costs: dict[str, list[Tensor]]

    def _groups(self, name: str) -> list[Group]:
        return [g for g in self.structure.free if (name, 1) in g.slices]

    def _wanted(self, name: str) -> bool:
        return bool(self._groups(name))

    def _meet(self, name: str, layer: nn.Module, inputs: Tensor) -> None:
        hessians = self._hessians(layer, inputs, name)
        matrices = weight_matrices(layer).detach()
        dim = self.found.tensors[name][1]
        for group in self._groups(name):
            owner = torch.from_numpy(units_of(dim, group.axis))
            bundles = [
                _columns(layer, (owner == u).nonzero().view(-1)).tolist() for u in range(group.size)
            ]
            total = torch.zeros(group.size, dtype=torch.float64)
            for matrix, hessian in zip(matrices, hessians, strict=True):
                total += bundle_costs(matrix, hessian, bundles).cpu()
            self.costs[group.name].append(total)


class _Compensation(_Consumers):
    """Adapts the weights of the consumers, each once, and enters their names into `done`."""

    done: set[str]

    def _wanted(self, name: str) -> bool:
        dim = self.found.tensors[name][1]
        return name not in self.done and len(kept_indices(dim, self.kept)) < size_of(dim)

    def _meet(self, name: str, layer: nn.Module, inputs: Tensor) -> None:
        self.done.add(name)
        dim = self.found.tensors[name][1]
        gone = torch.ones(size_of(dim), dtype=torch.bool)
        gone[torch.from_numpy(kept_indices(dim, self.kept))] = False
        columns = _columns(layer, gone.nonzero().view(-1))
        solved = [
            remove_columns(matrix, hessian, columns).weight
            for matrix, hessian in zip(
                weight_matrices(layer).detach(), self._hessians(layer, inputs, name), strict=True
            )
        ]
        self.parameters[name].data.copy_(weight_from_matrices(layer, torch.stack(solved)))


def removal_costs(
    structure: Structure, damping: float = 0.01
) -> tuple[dict[str, list[Tensor]], list[str]]:
    """What removing each unit alone costs each of its consumers, after compensation.

    1/2 tr(W_P [H⁻¹]_PP⁻¹ W_Pᵀ) for the columns P of the unit, in the dense model, on the inputs
    that the model was traced with.

    Returns:
        Group -> costs of its units by consumer; and notes of raised damping.
    """
    costs: dict[str, list[Tensor]] = defaultdict(list)
    notes: list[str] = []

    def interpreter(part: Part) -> DenseWithZeros:
        made = _Costs(structure, part, {}, damping, notes)
        made.costs = costs
        return made

    interpreted(structure.trace, interpreter)
    return dict(costs), notes


def compensate(structure: Structure, kept: Kept, damping: float = 0.01) -> list[str]:
    """Let the consumers of removed units make up for them, in place, in the order of execution.

    W_K ← W H_{:,K} (H_KK)⁻¹ for every linear layer and convolution that loses inputs, with the
    Hessian of the inputs it gets from the already compensated layers before it. Columns of
    removed units become zero; the model is still of full size.

    Returns:
        Notes: raised damping, consumers without a solver.
    """
    notes: list[str] = []
    done: set[str] = set()

    def interpreter(part: Part) -> DenseWithZeros:
        made = _Compensation(structure, part, kept, damping, notes)
        made.done = done
        return made

    interpreted(structure.trace, interpreter)
    return notes
