"""A budget for a structure: what is counted, what it is now, what it must come down to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from secateurs.errors import unknown
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import measure_latency
from secateurs.structure.axes import Counts, Structure
from secateurs.structure.choice import Cost
from secateurs.structure.dimensions import shortened_size
from secateurs.structure.rewrite import rewritten
from secateurs.task import batch_size


@dataclass(frozen=True)
class StructureCost:
    """A cost as a function of kept counts, and the budget in its terms.

    Attributes:
        of: kept counts by axis -> parameters, MACs of one sample, or seconds.
        whole: the cost with nothing removed.
        target: what the budget allows.
        asked: the budget in the terms of its promise: a share if `relative`, else the target;
            `reached` says a cost in the same terms.
    """

    of: Cost
    whole: float
    target: float
    asked: float
    relative: bool
    removed: bool = False

    def reached(self, cost: float) -> float:
        """A cost in the terms of the budget."""
        share = cost / self.whole if self.relative else cost
        return 1 - share if self.removed else share


def structure_cost(structure: Structure, budget: Budget, example_inputs: Any) -> StructureCost:
    """What a budget means for a structure.

    ``sparsity`` and ``density`` are shares of all parameters, as ``params`` is, ``keep`` of the
    units of all free axes. MACs are those of one pass over `example_inputs`; the structure may be
    traced on more samples.

    Raises:
        InputError: a kind that says nothing about a structure.
    """
    if budget.kind in ("params", "sparsity", "density"):
        of: Cost = structure.parameters
    elif budget.kind == "macs":
        traced = structure.trace.args or structure.trace.kwargs
        scale = batch_size(example_inputs) / batch_size(traced)

        def of(counts: Counts) -> float:
            return structure.macs(counts) * scale

    elif budget.kind == "latency":

        def of(counts: Counts) -> float:
            return _seconds(structure, counts)

    elif budget.kind == "keep":
        of = units_cost(structure)
    else:
        kinds = ("params", "sparsity", "density", "macs", "latency", "keep")
        raise unknown("budget", budget.kind, kinds)
    whole = of(lambda axis: axis.size)
    removed = budget.kind == "sparsity"
    share = 1 - budget.value if removed else budget.value
    target = share * whole if budget.relative else budget.value
    # amounts are promised as amounts, like everywhere
    shares = budget.kind in ("sparsity", "density", "keep")
    return StructureCost(of, whole, target, budget.value if shares else target, shares, removed)


def units_cost(structure: Structure) -> Cost:
    """How many units of the free axes stay."""
    axes = [group.axis for group in structure.free]
    return lambda counts: sum(map(counts, axes))


def _seconds(structure: Structure, counts: Counts) -> float:
    """Measured latency of the rewritten graph with tensors of the shortened sizes."""
    found = structure.trace
    tensors = {}
    for name, tensor in {
        **dict(found.model.named_parameters()), **dict(found.model.named_buffers())
    }.items():  # fmt: skip
        if name not in found.tensors:
            continue
        places = [slice(0, shortened_size(dim, counts)) for dim in found.tensors[name]]
        cut = tensor.detach()[tuple(places)].contiguous()
        tensors[name] = torch.nn.Parameter(cut, False) if tensor.requires_grad else cut
    graph = rewritten(found, counts, tensors).eval()
    inputs: Any = found.args or found.kwargs
    return measure_latency(graph, inputs, warmup=2, repeats=10).median / 1e3
