"""Prune a folder of `save_pretrained` that is larger than memory into another such folder.

    secateurs.prune_checkpoint("llama", "llama-2of4", "wanda", "2:4", batches)

What is in memory at any time: one block, its activations for all calibration inputs, and what
the method needs to know of one block's layers (`secateurs.calibration.shards`). Before anything is
written the first batch runs through the whole model, and all batches up to its first block: inputs
that do not fit are refused, and leave no folder behind.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from secateurs.calibration.layerwise import LayerwisePruner, Removal
from secateurs.calibration.moments import outputs_first
from secateurs.calibration.shards import PROGRESS, Checkpoint, OnDisk
from secateurs.calibration.walk import walk
from secateurs.errors import InputError, described, library, require
from secateurs.method import Method
from secateurs.parts.budgets import Budget
from secateurs.registry import options_as_dict
from secateurs.state import write_json
from secateurs.structure.trace import as_call
from secateurs.workspace import Workspace

PLAN = "secateurs.json"


def prune_shards(
    source: Path,
    target: Path,
    chosen: Method,
    budget: str | Budget,
    batches: Sequence[Any],
    work: Workspace,
) -> dict[str, Any]:
    """What `secateurs.prune_checkpoint` does, for a method object."""
    from secateurs import __version__

    if not isinstance(chosen, LayerwisePruner):
        raise InputError("method", chosen.name, "a layer-wise method, such as magnitude or wanda")
    parsed = chosen.accept(budget)
    needed = chosen.statistic != "none"
    require(bool(batches) or not needed, "batches", described("none"), "calibration inputs")
    checkpoint = Checkpoint(source)
    weights = OnDisk(empty_model(source, checkpoint.dtype), checkpoint, target)
    params = outputs_first(weights.model, chosen.prunable(weights.model))
    removals, notes = chosen.removals(params, parsed)
    plan = {
        "method": chosen.name,
        "options": options_as_dict(chosen),
        "budget": str(parsed),
        "checkpoint": checkpoint.identity,
        "inputs": fingerprint(batches),
        "versions": {"secateurs": __version__, "torch": torch.__version__},
    }
    plan = json.loads(json.dumps(plan))  # as it is read back
    there = _begun(target, plan)
    if "layers" in there:
        return there
    total = len(weights.blocks)
    with weights.outside_on_demand() if needed else nullcontext():
        if needed and not there:
            with work.progress("one batch through the model", total) as advance:
                _try(weights, batches, advance)
        with work.progress(f"{chosen.name}: blocks", total) as advance:
            for visit in chosen.visits(weights.model, removals, batches, weights):
                masks, told = chosen.prune_block(visit, removals)
                kept = {name: int(mask.sum()) for name, mask in masks.items()}
                del masks
                _claim(target, plan)
                weights.write(visit.name, {"kept": kept, "notes": told})
                advance(sum(not weights.wanted(b) for b in weights.blocks))
    for block in filter(weights.wanted, weights.blocks):
        weights.copy(block)  # nothing is removed in it
    weights.finish()
    return _finished(target, plan, weights, removals, notes)


def empty_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a ``config.json``, its parameters without memory.

    Args:
        dtype: where the configuration has none.

    Raises:
        InputError: no configuration, or one that transformers does not know.
    """
    transformers, accelerate = library("transformers", "hf"), library("accelerate", "hf")
    require((folder / "config.json").is_file(), "folder", str(folder), "a folder with config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError("config.json", described(str(error)), "a model of transformers") from None
    named = (config.architectures or [""])[0]
    known = hasattr(transformers, named)
    require(known, "architectures", named, "a class of transformers, in config.json")
    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype or dtype)  # tables of angles stay what they are
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            model = getattr(transformers, named)(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return model.eval()


def _try(weights: OnDisk, batches: Sequence[Any], advance: Callable[[int], None]) -> None:
    """Run the first batch through all blocks, and the others up to the first.

    Raises:
        InputError: the model fails on them.
    """
    model = weights.model
    try:
        for visit in walk(model, batches[:1], unreached=True, weights=weights):
            if visit.index + 1 == visit.total and visit.calls:
                visit.run()  # the walk itself ends before the last block
            advance(visit.index + 1)
        with closing(walk(model, batches, unreached=True, weights=weights)) as visits:
            next(visits)
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as failure:
        shown = described(f"inputs on which {type(model).__name__} fails")
        named = ", ".join(main_inputs(model))
        accepted = f"inputs of a forward pass, as {named} ({type(failure).__name__}: {failure})"
        raise InputError("batches", shown, accepted) from failure


def main_inputs(model: nn.Module) -> list[str]:
    """What the towers of a model of transformers look at, of what its own forward takes."""
    taken = inspect.signature(model.forward).parameters
    named = dict.fromkeys(getattr(module, "main_input_name", None) for module in model.modules())
    return [str(name) for name in named if name in taken]


def fingerprint(batches: Sequence[Any]) -> str:
    """SHA-256 over calibration inputs: tensors and plain values, and where each stands."""
    digest = hashlib.sha256()
    for args, kwargs in map(as_call, batches):
        ordered = {name: kwargs[name] for name in sorted(kwargs)}
        for path, leaf in tree_flatten_with_path((args, ordered))[0]:
            digest.update(f"{keystr(path)}: {type(leaf).__name__} ".encode())
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
                flat = leaf.detach().cpu().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
            elif isinstance(leaf, bool | int | float | str):
                digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _begun(target: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the same call left in a folder; nothing if it is new or empty."""
    begun = target / PLAN
    if begun.is_file():
        there: dict[str, Any] = json.loads(begun.read_text())
        for key, value in plan.items():
            if there.get(key) != value:
                shown = described(f"a run with {key} {there.get(key)}")
                raise InputError("output folder", shown, f"a new folder, or {key} {value}")
        return there
    free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    require(free, "output folder", str(target), "a folder that is new or empty")
    return {}


def _claim(target: Path, plan: Mapping[str, Any]) -> None:
    """Take the folder, now that there is something to write."""
    if not (target / PLAN).exists():
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / PLAN, plan)


def _finished(
    target: Path,
    plan: Mapping[str, Any],
    weights: OnDisk,
    removals: Mapping[str, Removal],
    notes: Sequence[str],
) -> dict[str, Any]:
    told = [weights.told(block) for block in weights.blocks]
    kept = {name: count for block in told for name, count in block["kept"].items()}
    sizes = {n: weights.model.get_parameter(n).numel() for n in removals}
    layers = [{"name": n, "kept": kept[n], "total": sizes[n]} for n in removals]
    total = sum(layer["total"] for layer in layers)
    result = {
        **plan,
        "sparsity": 1 - sum(layer["kept"] for layer in layers) / total,
        "layers": layers,
        "notes": [*notes, *(note for block in told for note in block["notes"])],
    }
    write_json(target / PLAN, result)
    shutil.rmtree(target / PROGRESS)
    return result
