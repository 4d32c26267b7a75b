"""Prune a folder of `save_pretrained` that is larger than memory into another such folder.

    secateurs.prune_checkpoint("llama", "llama-2of4", "wanda", "2:4", batches)

What is in memory at any time: one block, its activations for all calibration inputs, and what
the method needs to know of one block's layers (`secateurs.calibration.shards`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateurs.calibration.layerwise import LayerwisePruner, Removal
from secateurs.calibration.moments import outputs_first
from secateurs.calibration.shards import PROGRESS, Checkpoint, OnDisk
from secateurs.errors import InputError, described, library, require
from secateurs.method import Method
from secateurs.parts.budgets import Budget
from secateurs.registry import options_as_dict
from secateurs.state import write_json
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
    weights = OnDisk(empty_model(source), checkpoint, target)
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
    there = _claim(target, plan)
    if "layers" in there:
        return there
    total = len(weights.blocks)
    outside = weights.outside_on_demand() if needed else nullcontext()
    with outside, work.progress(f"{chosen.name}: blocks", total) as advance:
        for visit in chosen.visits(weights.model, batches, weights):
            masks, told = chosen.prune_block(visit, removals)
            kept = {name: int(mask.sum()) for name, mask in masks.items()}
            del masks
            weights.write(visit.name, {"kept": kept, "notes": told})
            advance(sum(not weights.wanted(b) for b in weights.blocks))
    weights.finish()
    return _finished(target, plan, weights, removals, notes)


def empty_model(folder: Path) -> Any:
    """The model of a ``config.json``, its parameters without memory.

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
    with accelerate.init_empty_weights(include_buffers=False):
        model = getattr(transformers, named)(config)
    model.tie_weights()
    return model.to(config.dtype or torch.float32).eval()


def fingerprint(batches: Sequence[Any]) -> str:
    """SHA-256 over the tensors of calibration inputs."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _claim(target: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Take a new folder, or one that the same call began; the plan as it stands there."""
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
    target.mkdir(parents=True, exist_ok=True)
    write_json(begun, plan)
    return dict(plan)


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
