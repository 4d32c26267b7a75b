"""A surgery as plain values: enough to do it again on the dense model, without pickle.

A resized module is rebuilt from the kept indices of its tensors and the attributes that were
set; a rewritten graph by tracing the dense model again, with the same kept units; exchanged layers
by what they say of themselves (`secateurs.structure.substitution`). A method may add a form of its
own by `rebuilds`. Several surgeries one after the other are a list of such plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described, unknown
from secateurs.registry import discover
from secateurs.structure.axes import Structure
from secateurs.structure.dimensions import Axis, Kept, shortened_size, size_of
from secateurs.structure.rules import flat
from secateurs.structure.substitution import FORM, resubstitute
from secateurs.structure.surgery import Shortened, apply_edits, resize, shorten, slice_tensor
from secateurs.structure.trace import named_tensors, trace

Plan = dict[str, Any]
Rebuild = Callable[[nn.Module, Plan], nn.Module]
"""(dense model, plan) -> the model of the plan's shapes, whose weights are loaded after."""

_FORMS: dict[str, Rebuild] = {FORM: resubstitute}


def rebuilds(form: str) -> Callable[[Rebuild], Rebuild]:
    """Decorator: the function that does again, at load, surgeries of this ``form``."""

    def enter(rebuild: Rebuild) -> Rebuild:
        _FORMS[form] = rebuild
        return rebuild

    return enter


def plan_of(structure: Structure, kept: Kept, made: Shortened) -> Plan:
    """What `rebuild` needs: form, kept units by axis, and how tensors and attributes changed."""
    names = {g.axis: g.name for g in structure.values()}
    # an axis may be chosen whole: nothing to be said of it
    kept = {a: units for a, units in kept.items() if len(units) != a.size}
    found = structure.trace
    return {
        "form": made.form,
        "axes": {names[a]: [int(i) for i in units] for a, units in kept.items()},
        "sizes": sorted(_size_changes(structure, kept)),
        "tensors": {
            n: {str(p): i for p, i in places.items()} for n, places in made.tensors.items()
        },
        "edits": made.edits,
        "inputs": describe((list(found.args), found.kwargs)),
    }


def _size_changes(structure: Structure, kept: Kept) -> set[tuple[int, int]]:
    """(before, after) of every dimension in the traced model that changes."""

    def count(axis: Axis) -> int:
        return len(kept[axis]) if axis in kept else axis.size

    found = structure.trace
    dims = {d for v in (*found.tensors.values(), *flat(found.dims.values())) for d in v}
    sizes = {(size_of(d), shortened_size(d, count)) for d in dims}
    return {(before, after) for before, after in sizes if before != after}


def rebuild(model: nn.Module, plans: list[Plan]) -> nn.Module:
    """Do the surgeries of `plans` on a dense model, in place; weights are to be loaded after.

    Raises:
        InputError: the model does not have the tensors, sizes or attributes of a plan, or a plan
            is of a form that no installed method makes.
    """
    discover()  # a method may have brought a form or a kind of layer
    for plan in plans:
        if plan["form"] not in _FORMS:
            raise unknown("form of surgery", plan["form"], _FORMS)
        model = _FORMS[plan["form"]](model, plan)
    return model


@rebuilds("module")
def _rebuild_module(model: nn.Module, plan: Plan) -> nn.Module:
    tensors = named_tensors(model)
    for name, places in plan["tensors"].items():
        if name not in tensors:
            raise InputError("model", described(f"no tensor {name!r}"), "the dense model")
        for place, indices in places.items():
            size = tensors[name].shape[int(place)] if tensors[name].ndim > int(place) else 0
            if max(indices) >= size:
                raise InputError(
                    f"model {name}", described(f"dimension {place} of {size}"),
                    f"the dense model, with more than {max(indices)} there",
                )  # fmt: skip
    for name, places in plan["tensors"].items():
        slice_tensor(tensors[name], {int(p): i for p, i in places.items()})
    try:
        apply_edits(model, plan["edits"])
    except AttributeError as error:
        raise InputError("model", described(str(error)), "the dense model of the plan") from None
    return model


@rebuilds("graph")
def _rebuild_graph(model: nn.Module, plan: Plan) -> nn.Module:
    args, kwargs = restore(plan["inputs"])
    found = trace(model, tuple(args) if args else kwargs)
    structure = Structure(found)
    kept = {structure[name].axis: units for name, units in plan["axes"].items()}
    if any(len(units) > axis.size for axis, units in kept.items()):
        return resize(found, {axis: len(units) for axis, units in kept.items()}).model
    return shorten(found, kept, check=False).model


def describe(value: Any) -> Any:
    """Nested inputs as plain values: tensors by shape and dtype."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"items": {k: describe(v) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [describe(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise InputError("example_inputs", described(type(value).__name__), "tensors and plain values")


def restore(value: Any) -> Any:
    """Inputs of the described shapes: zeros, which trace like any others."""
    if isinstance(value, list):
        return [restore(v) for v in value]
    if "shape" in value:
        return torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]))
    if "items" in value:
        return {k: restore(v) for k, v in value["items"].items()}
    return value["value"]
