"""Shortening a model: every parameter, buffer, attribute and size literal follows its axes.

The user's own module is resized in place. A size that its Python code states (12 heads in a
view) belongs to the module that executed that operation: it is looked up among the module's
integer attributes, set, and the module is run. What it must give is what the rewritten graph
gives (`secateurs.structure.rewrite`). Where the code hard-codes sizes all the same, the graph is
handed back instead.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described, require
from secateurs.structure.arguments import argument
from secateurs.structure.batch import free_batch
from secateurs.structure.dimensions import (
    Axis,
    Kept,
    counts_of,
    kept_indices,
    plain_axes,
    shortened_size,
)
from secateurs.structure.oracle import expected_outputs
from secateurs.structure.rewrite import (
    current_tensors,
    difference,
    literal_values,
    rewritten,
    same_outputs,
)
from secateurs.structure.rules import op_name
from secateurs.structure.scale import foldable
from secateurs.structure.trace import Trace, named_tensors, outputs_of, traceable

TRIES = 32
"""Settings of ambiguous attributes that are tried before the graph is handed back."""
AGREE = 1e-4
"""Relative difference up to which the resized module computes what the graph computes."""

Edits = dict[str, dict[str, Any]]
"""Module path -> attribute -> value."""


@dataclass
class Shortened:
    """A shortened model.

    Attributes:
        model: the resized module, or the rewritten graph.
        form: ``module`` or ``graph``.
        tensors: kept indices by tensor and dimension: what persistence needs.
        edits: attributes that were set.
        gap: largest relative difference from what the oracle expects; None if not checked.
        notes: what the user should know.
    """

    model: nn.Module
    form: str
    tensors: dict[str, dict[int, list[int]]]
    edits: Edits = field(default_factory=dict)
    gap: float | None = None
    notes: list[str] = field(default_factory=list)


def shorten(
    found: Trace, kept: Mapping[Axis, Any], *, check: bool = True, any_batch: bool = True
) -> Shortened:
    """Shorten the traced model to the kept units of some axes.

    Args:
        found: a trace of the model; afterwards it is of no more use.
        kept: indices of the units that stay, by plain axis; axes that are not listed stay whole.
        check: compare the outputs for the example inputs with `oracle.expected_outputs`.
        any_batch: let a graph take batches of any size, which needs a second export.

    Raises:
        InputError: an axis that is frozen, empty, or given units it does not have. On this and
            any other error the model is as it was.
    """
    units = _checked(kept)
    expected = expected_outputs(found, units) if check else None
    return _restoring(found, units, expected, any_batch)


def resize(found: Trace, counts: Mapping[Axis, int], *, any_batch: bool = True) -> Shortened:
    """Give axes of the traced model other sizes, larger ones too.

    The first units stay. An axis that becomes longer repeats its units from the first, so that
    all tensors have the new sizes; their values are to be drawn anew. What the module computes
    is compared with the rewritten graph, as ever; no oracle knows what added units should do.

    Raises:
        InputError: an axis that is frozen, or a size below 1. On this and any other error the
            model is as it was.
    """
    for axis, count in counts.items():
        require(count >= 1, "counts", count, "at least 1 unit")
        if axis.frozen is not None and count != axis.size:
            raise InputError("counts", described(f"a frozen axis ({axis.frozen})"), "free axes")
    units = {a: np.arange(n) % a.size for a, n in counts.items() if n != a.size}
    return _restoring(found, units, None, any_batch)


def _restoring(found: Trace, units: Kept, expected: Any, any_batch: bool) -> Shortened:
    """`_shortened`, the model being given its weights back on an error."""
    old = {name: (tensor.data, tensor.grad) for name, tensor in current_tensors(found).items()}
    try:
        dense = {n: data for n, (data, _) in old.items()} if any_batch else None
        return _shortened(found, units, expected, dense)
    except BaseException:
        for name, tensor in current_tensors(found).items():
            tensor.data, tensor.grad = old[name]
        raise


def _shortened(
    found: Trace, units: Kept, expected: Any, dense: Mapping[str, Tensor] | None
) -> Shortened:
    slices = _slices(found, units)
    notes: list[str] = []
    scales = _fold_scales(found, units, notes)
    with torch.no_grad():
        _slice_tensors(found, slices)
    counts = counts_of(units)
    graph = rewritten(found, counts, current_tensors(found), scales)
    graph.eval()
    with traceable(found.model), torch.no_grad():
        wanted = outputs_of(found, graph)
        edits = None if scales else _resize(found, units, wanted)
    gap = None
    if expected is not None:
        leaves = torch.utils._pytree.tree_leaves
        gap = max(map(difference, leaves(wanted), leaves(expected)), default=0.0)
    if edits is None:
        free = dense is not None and _free_batch(found, graph, dense)
        sizes = "batches of any size" if free else "this batch size"
        notes.append(
            "the model's Python code states sizes that no attribute holds: it is handed back as "
            f"a graph, for samples of the example inputs' shape and {sizes}"
        )
        graph.train(found.model.training)
        return Shortened(graph, "graph", slices, {}, gap, notes)
    return Shortened(found.model, "module", slices, edits, gap, notes)


def _free_batch(found: Trace, graph: nn.Module, dense: Mapping[str, Tensor]) -> bool:
    """`free_batch`, with the dense weights in the model meanwhile."""
    tensors = current_tensors(found)
    shortened = {name: tensor.data for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.data = dense[name]
    try:
        return free_batch(found, graph)
    finally:
        for name, tensor in tensors.items():
            tensor.data = shortened[name]


def _checked(kept: Mapping[Axis, Any]) -> dict[Axis, np.ndarray]:
    units: dict[Axis, np.ndarray] = {}
    for axis, given in kept.items():
        require([*plain_axes((axis,))] == [axis], "kept", axis, "plain axes")
        listed = np.asarray(given)
        whole = listed.dtype.kind in "iu" or listed.size == 0  # a mask is not a list of indices
        require(whole, "kept", described(f"{listed.dtype} values"), "indices of units")
        indices = np.unique(listed.astype(np.int64))
        fits = len(indices) > 0 and indices[0] >= 0 and indices[-1] < axis.size
        require(fits, "kept", indices.tolist(), f"at least one index in 0..{axis.size - 1}")
        if len(indices) == axis.size:
            continue
        if axis.frozen is not None:
            raise InputError("kept", described(f"a frozen axis ({axis.frozen})"), "free axes")
        units[axis] = indices
    return units


def _slices(found: Trace, units: Kept) -> dict[str, dict[int, list[int]]]:
    slices: dict[str, dict[int, list[int]]] = {}
    for name, dims in found.tensors.items():
        for place, dim in enumerate(dims):
            indices = kept_indices(dim, units)
            if not np.array_equal(indices, np.arange(math.prod(a.size for a in dim))):
                slices.setdefault(name, {})[place] = indices.tolist()
    return slices


def _slice_tensors(found: Trace, slices: Mapping[str, Mapping[int, list[int]]]) -> None:
    tensors = named_tensors(found.model)
    for name, places in slices.items():
        slice_tensor(tensors[name], places)


def slice_tensor(tensor: Tensor, places: Mapping[int, list[int]]) -> None:
    """Cut a tensor in place to the kept indices of some of its dimensions."""
    value = tensor.data
    for place, indices in places.items():
        value = value.index_select(place, torch.tensor(indices, device=value.device))
    tensor.grad = None
    tensor.data = value.clone(memory_format=torch.contiguous_format)


def _fold_scales(found: Trace, units: Kept, notes: list[str]) -> dict[Any, float]:
    """Fold changes of attention scales into query weights; what cannot be folded is returned."""
    count = counts_of(units)
    widths = {
        node: (math.prod(a.size for a in dim), shortened_size(dim, count))
        for node, dim in found.notes.scales
    }
    factors = {node: math.sqrt(new / old) for node, (old, new) in widths.items() if new != old}
    parameters = dict(found.model.named_parameters(remove_duplicate=False))
    folded = foldable(factors, {n: c for n, c in found.same.items() if n in parameters})
    done: set[str] = set()
    for node, sources in folded.items():
        for source in sources:
            for name in set(source.tensors) - done:
                value = parameters[name].data.clone()
                value[source.rows] *= factors[node]
                parameters[name].data = value
                done.add(name)
    stated = {node: 1 / math.sqrt(widths[node][0]) for node in factors if node not in folded}
    if stated:
        notes.append("attention scales are stated in the graph: they could not be folded")
    return stated


# --- the module's own attributes --------------------------------------------------------------


def _resize(found: Trace, units: Kept, wanted: Any) -> Edits | None:
    """Set the attributes of the modules until the model gives `wanted`; None if none does."""
    certain, ambiguous = _candidates(found, units)
    choices = list(ambiguous)
    options = [_choices(sorted({name for _, name in ambiguous[k]})) for k in choices]
    for chosen in itertools.islice(_combinations(options), TRIES):
        edits: Edits = defaultdict(dict)
        for path, changes in certain.items():
            edits[path].update(changes)
        for key, names in zip(choices, chosen, strict=True):
            for path, attribute in ambiguous[key]:
                if attribute in names:
                    edits[path][attribute] = key[-1]
        old = apply_edits(found.model, edits)
        try:
            result = outputs_of(found, found.model)
        except Exception:
            result = None
        if result is not None and same_outputs(result, wanted, AGREE):
            return dict(edits)
        apply_edits(found.model, old)
    return None


def _choices(names: list[str]) -> list[tuple[str, ...]]:
    """Attributes that may be meant by a size: all that equal it, none (it follows from a shape),
    or one of them."""
    single = [(name,) for name in names] if len(names) > 1 else []
    return [tuple(names), (), *single]


def _combinations(options: list[list[Any]]) -> Iterator[tuple[Any, ...]]:
    """All first choices; each size by itself otherwise; then everything."""
    first = tuple(o[0] for o in options)
    likely = [
        (*first[:place], other, *first[place + 1 :])
        for place, own in enumerate(options)
        for other in own[1:]
    ]
    seen = {first, *likely}
    yield from [first, *likely]
    yield from (chosen for chosen in itertools.product(*options) if chosen not in seen)


def apply_edits(model: nn.Module, edits: Edits) -> Edits:
    """Set attributes; returns the values they had."""
    old: Edits = {}
    for path, changes in edits.items():
        module = model.get_submodule(path)
        old[path] = {name: getattr(module, name) for name in changes}
        for name, value in changes.items():
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
    return old


def _candidates(
    found: Trace, units: Kept
) -> tuple[Edits, dict[tuple[Any, ...], list[tuple[str, str]]]]:
    """Attributes that follow from a layer's own tensors; and those that equal a changed literal.

    The latter by (class, old value, new value): modules of one class are treated alike.
    """
    certain: Edits = {}
    for path, module in found.model.named_modules():
        if changes := own_sizes(module):
            certain[path] = changes
    by_literal: dict[tuple[Any, ...], list[tuple[str, str]]] = defaultdict(list)
    modules = dict(found.model.named_modules())
    first = {id(module): path for path, module in modules.items()}
    called: dict[str | None, str] = {
        name: first[id(module)]
        for name, module in found.model.named_modules(remove_duplicate=False)
    }
    lists: dict[tuple[Any, str], list[tuple[Any, int, int]]] = defaultdict(list)
    for literal, old, new in literal_values(found, counts_of(units)):
        path = called.get(executed_by(literal.node))
        if path is None:
            continue
        if literal.place is not None:
            lists[literal.node, literal.argument].append((literal, old, new))
        module = modules[path]
        if isinstance(module, nn.modules.conv._ConvNd):
            if literal.argument == "groups":
                certain.setdefault(path, {})["groups"] = new
                transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
                side = "out_channels" if transposed else "in_channels"
                certain[path][side] = module.weight.shape[1] * new
            continue
        if isinstance(module, nn.GroupNorm):
            certain.setdefault(path, {})["num_groups"] = new
            continue
        while True:
            named = [
                n
                for n, v in vars(module).items()
                if type(v) is int
                and v == abs(old)
                and not n.startswith("_")
                and n not in certain.get(path, {})
            ]
            if named or not path:
                break
            path = path.rpartition(".")[0]
            module = modules[path]
        key = (type(module).__name__, abs(old), abs(new))
        for name in named:
            if (path, name) not in by_literal[key]:
                by_literal[key].append((path, name))
    for node, dims in found.dims.items():  # norms without tensors of their own
        attribute = {"instance_norm": "num_features", "group_norm": "num_channels"}.get(
            op_name(node)
        )
        path = called.get(executed_by(node))
        if attribute is None or path is None or not hasattr(modules[path], attribute):
            continue
        size = shortened_size(dims[1], counts_of(units))
        if size != getattr(modules[path], attribute):
            certain.setdefault(path, {})[attribute] = size
    for (node, listed_name), listed in lists.items():
        path = called[executed_by(node)]
        _whole_lists(modules[path], node, listed_name, listed, certain.setdefault(path, {}))
    return certain, {k: v for k, v in by_literal.items() if v}


def _whole_lists(
    module: nn.Module,
    node: Any,
    argument_name: str,
    changes: list[tuple[Any, int, int]],
    certain: dict[str, Any],
) -> None:
    """A list of sizes that is an attribute as a whole, such as those of a split."""
    old = list(argument(node, argument_name))
    new = list(old)
    for literal, _, value in changes:
        new[literal.place] = value
    for name, value in vars(module).items():
        # (8,) may be anything, not so (8, 8, 16)
        telling = len(old) > 1 or name == argument_name
        if isinstance(value, tuple | list) and telling and list(value) == old:
            certain[name] = new


def executed_by(node: Any) -> str | None:
    """Path of the innermost module whose code executed a node."""
    paths = calling(node)
    return paths[-1] if paths else None


def calling(node: Any) -> list[str]:
    """Paths of the modules in whose calls a node was executed, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [
        str(entry[0]).removeprefix("L['self'].").removeprefix("L['self']")
        for entry in stack.values()
    ]


def own_sizes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a standard layer that its own tensors determine, where they differ."""
    weight: Any = getattr(module, "weight", None)
    wanted: dict[str, Any] = {}
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        wanted = {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
    elif isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups
        wanted = {"out_channels": weight.shape[0], "in_channels": weight.shape[1] * groups}
    elif isinstance(module, nn.Linear):
        wanted = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = weight if weight is not None else module.running_mean
        wanted = {"num_features": known.shape[0]} if known is not None else {}
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        wanted = {"normalized_shape": tuple(weight.shape)}
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        wanted = {"num_channels": weight.shape[0]}
    elif isinstance(module, nn.Embedding):
        wanted = {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    elif isinstance(module, nn.PReLU):
        wanted = {"num_parameters": weight.shape[0]}
    elif isinstance(module, nn.RNNBase):
        first: Any = module.weight_ih_l0
        second: Any = module.weight_hh_l0
        wanted = {"input_size": first.shape[1], "hidden_size": second.shape[1]}
    elif type(module).__name__ == "Conv1D" and weight is not None:
        wanted = {"nx": weight.shape[0], "nf": weight.shape[1]}
    return {
        n: v for n, v in wanted.items() if hasattr(module, n) and not _equal(getattr(module, n), v)
    }


def _equal(old: Any, new: Any) -> bool:
    return tuple(old) == tuple(new) if isinstance(new, tuple) else bool(old == new)
