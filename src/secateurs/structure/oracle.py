"""Is a shortened model right? The dense model, with what consumes the removed units at zero.

The dense graph is run at full size on the dense weights; wherever an operation sums over
removed units, one of its operands is set to zero there, as if the parameters that consume those
units had zero slices. A shortened model must give the same outputs. A mistake in the analysis
(two dimensions tied in the wrong order, say) shows: the dense sum then lacks other terms than
the shortened one.

Where a statistic is taken over removed units (a mean, a norm, a softmax), the operation is run
on the kept units alone.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export._tree_utils import reorder_kwargs
from torch.utils._pytree import tree_leaves

from secateurs.structure.arguments import (
    Call,
    argument,
    argument_of,
    with_argument,
    with_size,
)
from secateurs.structure.dimensions import Dim, Kept, kept_indices, plain_axes
from secateurs.structure.parts import Part, replaced
from secateurs.structure.rewrite import SAME_ELSEWHERE, literal_values
from secateurs.structure.rules import Meeting
from secateurs.structure.trace import Trace, outputs_of, traceable


def expected_outputs(found: Trace, kept: Kept) -> Any:
    """What the shortened model must give for the example inputs.

    Args:
        found: a trace whose model still has its dense weights.
        kept: units that stay, by axis.
    """
    return interpreted(found, lambda part: DenseWithZeros(found, part, kept))


def interpreted(found: Trace, interpreter: Callable[[Part], DenseWithZeros]) -> Any:
    """What the model gives for the example inputs when an interpreter runs each of its parts."""
    own: dict[str, nn.Module] = {}
    for part in found.parts:
        own[part.path] = module = copy.copy(found.model.get_submodule(part.path))
        module.forward = interpreter(part).run
    with traceable(found.model):
        return outputs_of(found, replaced(found.model, own))


class DenseWithZeros(fx.Interpreter):
    """Runs the dense graph without the contributions of removed units."""

    def __init__(self, found: Trace, part: Part, kept: Kept) -> None:
        super().__init__(part.graph)
        self.found, self.kept = found, kept
        self.zeroed: dict[fx.Node, list[Meeting]] = defaultdict(list)
        self.statistics: dict[fx.Node, list[Meeting]] = defaultdict(list)
        for meeting in found.notes.contractions:
            self.zeroed[meeting.node].append(meeting)
        for meeting in found.notes.statistics:
            self.statistics[meeting.node].append(meeting)
        self.literals = defaultdict(list)
        for literal, _, new in literal_values(found, self._count):
            self.literals[literal.node].append((literal, new))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module
        spec = module._in_spec
        flat = tree_leaves((args, reorder_kwargs(kwargs, spec)))
        result = super().run(*flat, enable_io_processing=False)
        return module.graph.process_outputs(result)

    def _count(self, axis: Any) -> int:
        units = self.kept.get(axis)
        return axis.size if units is None else len(units)

    def run_node(self, n: fx.Node) -> Any:
        if n in self.statistics and any(self._touched(m) for m in self.statistics[n]):
            return self._over_kept(n)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(SAME_ELSEWHERE.get(target, target), args, kwargs)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        for meeting in self.zeroed.get(n, ()):
            dim = self._dim(meeting)
            if not self._removed(dim):
                continue
            args, kwargs = _replaced(
                n, meeting.argument, args, kwargs, lambda t, m=meeting, d=dim: self._zero(t, m, d)
            )
        return args, kwargs

    def _zero(self, tensor: Tensor, meeting: Meeting, dim: Dim) -> Tensor:
        mask = torch.zeros(tensor.shape[meeting.place], dtype=tensor.dtype, device=tensor.device)
        mask[self._indices(dim, tensor)] = 1
        return tensor * mask.view([-1] + [1] * (tensor.ndim - 1 - meeting.place))

    def _indices(self, dim: Dim, tensor: Tensor) -> Tensor:
        return torch.from_numpy(kept_indices(dim, self.kept)).to(tensor.device)

    def _removed(self, dim: Dim) -> bool:
        return any(a in self.kept for a in plain_axes(dim))

    def _touched(self, meeting: Meeting) -> bool:
        return self._removed(self._dim(meeting))

    def _dim(self, meeting: Meeting) -> Dim:
        dims: Any = self.found.dims[argument_node(meeting.node, meeting.argument)]
        return dims[meeting.place]

    def _over_kept(self, n: fx.Node) -> Any:
        """Run a node on kept units alone, and lay the result back into its full shape."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)

        def shortened(node: fx.Node) -> Any:
            value = self.env[node]
            if not isinstance(value, Tensor) or self.found.dims.get(node) is None:
                return value
            for place, dim in enumerate(self.found.dims[node]):
                if self._removed(dim):
                    value = value.index_select(place, self._indices(dim, value))
            return value

        args, kwargs = fx.map_arg((n.args, n.kwargs), shortened)
        for literal, new in self.literals.get(n, ()):
            old = argument_of(n, args, kwargs, literal.argument)
            sized = with_size(old, literal.place, new)
            args, kwargs = with_argument(n, args, kwargs, literal.argument, sized)
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        full = torch.zeros(n.meta["val"].shape, dtype=result.dtype, device=result.device)
        index = tuple(
            self._indices(dim, result).view([-1] + [1] * (full.ndim - 1 - place))
            for place, dim in enumerate(self.found.dims[n])
        )
        if not index:
            return result
        full[index] = result
        return full


def argument_node(node: fx.Node, name: str) -> fx.Node:
    """The node that a tensor argument comes from; ``tensors.1`` is one of a list."""
    name, _, number = name.partition(".")
    value = argument(node, name)
    found: fx.Node = value[int(number)] if number else value
    return found


def _replaced(n: fx.Node, name: str, args: Any, kwargs: Any, change: Any) -> Call:
    name, _, number = name.partition(".")
    old = argument_of(n, args, kwargs, name)
    if number:
        new = [change(x) if i == int(number) else x for i, x in enumerate(old)]
    else:
        new = change(old)
    return with_argument(n, args, kwargs, name, new)
