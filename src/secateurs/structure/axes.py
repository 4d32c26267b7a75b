"""The axes of a model that can be shortened, and what shortening them saves.

    structure = secateurs.axes(model, example_inputs)
    print(structure)                       # a table
    structure["layer1.0.conv1"].size       # 64

A `Group` is an axis with everything tied to it. Costs are functions of how many units stay of
each axis, evaluated from the traced dimensions without running anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from secateurs.errors import unknown
from secateurs.structure.dimensions import Axis, Dim, plain_axes, shortened_size
from secateurs.structure.rules import op_name
from secateurs.structure.trace import Trace

Counts = Callable[[Axis], int]
"""Axis -> how many of its units stay."""


@dataclass(eq=False)
class Group:
    """An axis with all that depends on it.

    Attributes:
        name: of the layer that makes its units; ``#1`` where one layer makes several axes, the
            tensor and dimension where it is frozen.
        role: channel, neuron, head, head width or width (of a residual stream).
        size: units.
        granularity: entries of the tensor that makes them which one unit takes: 64 for a head of
            64, 1 for a channel.
        slices: (tensor, dimension) of every parameter and buffer that the axis runs over.
        normalized: operations that take a statistic over it; shortening it changes what the
            other units see.
        frozen: why it cannot be shortened; None if it can.
        parameters: parameters that one unit less saves, all other axes being whole.
        macs: multiply-accumulates that one unit less saves, for the example inputs.
    """

    axis: Axis
    name: str
    role: str
    size: int
    granularity: int
    slices: tuple[tuple[str, int], ...]
    normalized: tuple[str, ...]
    frozen: str | None
    parameters: int
    macs: int


class Structure(Mapping[str, Group]):
    """All axes of a traced model by name, the free ones first.

    Attributes:
        trace: the traced graph.
    """

    def __init__(self, found: Trace) -> None:
        self.trace = found
        self._parameters = [
            tuple(a for dim in found.tensors[n] for a in dim)
            for n, _ in found.model.named_parameters()
        ]
        self._macs = [dim for _, dim in found.notes.macs]
        self._groups = self._find()

    def __getitem__(self, name: str) -> Group:
        if name not in self._groups:
            raise unknown("axis", name, self._groups)
        return self._groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def free(self) -> list[Group]:
        """Groups that can be shortened."""
        return [g for g in self._groups.values() if g.frozen is None]

    @property
    def unruled(self) -> Mapping[str, str]:
        """Operations without a rule, which froze what they touch, and why."""
        return self.trace.notes.unruled

    def parameters(self, counts: Counts | None = None) -> int:
        """Parameters when `counts` units stay of every axis; tied ones once."""
        return sum(shortened_size(dim, counts or _whole) for dim in self._parameters)

    @property
    def free_parameters(self) -> int:
        """Parameters that lie on at least one free axis."""
        free = {group.axis for group in self.free}
        return self.parameters() - self.parameters(lambda a: 0 if a in free else a.size)

    def cost_dims(self, kind: Literal["params", "macs"]) -> Sequence[Dim]:
        """The dimensions whose sizes add up to a cost: of parameters, or of operations."""
        return self._parameters if kind == "params" else self._macs

    def macs(self, counts: Counts | None = None) -> int:
        """Multiply-accumulates for the example inputs, likewise."""
        return sum(shortened_size(dim, counts or _whole) for dim in self._macs)

    def _find(self) -> dict[str, Group]:
        slices: dict[Axis, list[tuple[str, int]]] = defaultdict(list)
        for name, dims in self.trace.tensors.items():
            for place, dim in enumerate(dims):
                for axis in dict.fromkeys(plain_axes(dim)):
                    slices[axis].append((name, place))
        roles = self._roles(slices)
        names = self._names(slices)
        saved = self._saved(set(slices))
        groups = [
            Group(
                axis=axis,
                name=names[axis],
                role=roles[axis],
                size=axis.size,
                granularity=self._granularity(axis, *found[0]),
                slices=tuple(found),
                normalized=axis.over,
                frozen=axis.frozen,
                parameters=saved[axis][0],
                macs=saved[axis][1],
            )
            for axis, found in slices.items()
            if axis.size > 1
        ]
        groups.sort(key=lambda g: g.frozen is not None)
        return {g.name: g for g in groups}

    def _granularity(self, axis: Axis, tensor: str, place: int) -> int:
        dim = self.trace.tensors[tensor][place]
        return shortened_size(dim, _whole) - shortened_size(dim, lambda a: a.size - (a is axis))

    def _saved(self, axes: set[Axis]) -> dict[Axis, tuple[int, int]]:
        """Parameters and MACs that one unit less of each axis saves."""
        saved: dict[Axis, tuple[int, int]] = {}
        for index, dims in enumerate((self._parameters, self._macs)):
            touched: dict[Axis, list[Dim]] = defaultdict(list)
            for dim in dims:
                for axis in set(plain_axes(dim)):
                    touched[axis].append(dim)
            for axis in axes:

                def one_less(a: Axis, axis: Axis = axis) -> int:
                    return a.size - (a is axis)

                gain = sum(
                    shortened_size(d, _whole) - shortened_size(d, one_less) for d in touched[axis]
                )
                saved[axis] = (gain, 0) if index == 0 else (saved[axis][0], gain)
        return saved

    def _names(self, slices: Mapping[Axis, list[tuple[str, int]]]) -> dict[Axis, str]:
        """The layer that makes the units; for frozen axes the tensor and its dimension.

        A number tells apart what would be called the same.
        """
        base: dict[Axis, str] = {}
        for axis, found in slices.items():
            tensor, place = next(((n, p) for n, p in found if p == 0), found[0])
            free = axis.frozen is None and axis.size > 1
            base[axis] = (tensor.rpartition(".")[0] or tensor) if free else f"{tensor}[{place}]"
        several = Counter(base.values())
        numbers: Counter[str] = Counter()
        names = {}
        for axis, name in base.items():
            names[axis] = name if several[name] == 1 else f"{name}#{numbers[name]}"
            numbers[name] += 1
        return names

    def _roles(self, slices: Mapping[Axis, Any]) -> dict[Axis, str]:
        roles = dict.fromkeys(slices, "neuron")
        made: Counter[Axis] = Counter()
        used: Counter[Axis] = Counter()
        for node, dims in self.trace.dims.items():
            if node.op != "call_function":
                continue
            name = op_name(node)
            if name.startswith("conv"):
                roles.update(dict.fromkeys(plain_axes(dims[1]), "channel"))
            per_channel = len(node.args) > 6 and node.args[6] != 1  # grouped: no stream of its own
            if name.startswith(("conv", "linear")) and not per_channel:
                made.update(set(plain_axes(dims[1 if name.startswith("conv") else -1])))
                operand = self.trace.dims.get(node.args[0])  # type: ignore[arg-type]
                if operand:
                    place = 1 if name.startswith("conv") else -1
                    used.update(set(plain_axes(operand[place])))
        for axis in slices:
            if made[axis] > 1 and used[axis] > 1:
                roles[axis] = "width"
        for node in self.trace.dims:
            roles.update(self._attention_roles(node))
        return roles

    def _attention_roles(self, node: fx.Node) -> dict[Axis, str]:
        """Heads are the batch dimensions of products of activations, widths what they sum over."""
        name = op_name(node)
        if name not in ("scaled_dot_product_attention", "matmul", "bmm"):
            return {}
        operands = [a for a in node.args[:3] if isinstance(a, fx.Node)]
        if any(a.op == "get_attr" for a in operands):
            return {}
        found: dict[Axis, str] = {}
        for operand in operands:
            dims = self.trace.dims.get(operand) or []
            if len(dims) >= 3:
                for dim in dims[:-2]:
                    found.update(dict.fromkeys(plain_axes(dim), "head"))
                found.update(dict.fromkeys(plain_axes(dims[-1]), "head width"))
        return found

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("axis", "role", "units", "entries/unit", "params/unit", "MACs/unit", "")
        ]
        for g in self._groups.values():
            remark = f"frozen: {g.frozen}" if g.frozen else ", ".join(g.normalized)
            numbers = (g.size, g.granularity, g.parameters, g.macs)
            rows.append((g.name, g.role, *map(str, numbers), remark))
        widths = [max(len(r[c]) for r in rows) for c in range(6)]
        return "\n".join(
            "  ".join([r[0].ljust(widths[0]), r[1].ljust(widths[1]),
                       *(r[c].rjust(widths[c]) for c in range(2, 6)), r[6]]).rstrip()
            for r in rows
        )  # fmt: skip


def _whole(axis: Axis) -> int:
    return axis.size
