"""What a method returns, and how it is kept: safetensors plus one JSON file, never pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateurs.deploy.delta_file import DELTA, SparseDelta, load_delta, save_delta
from secateurs.errors import InputError, described, require
from secateurs.parts.costs import Cost
from secateurs.parts.masks import Masks, named_parameters
from secateurs.state import read_tensors, write_json, write_tensors

WEIGHTS, MASKS, PLAN = "model.safetensors", "masks.safetensors", "outcome.json"
FORMAT = 1


@dataclass(frozen=True)
class Promise:
    """What the budget asked for and what came out.

    Attributes:
        kind: of the budget.
        asked, reached: in the budget's own terms.
        tolerance: largest difference that still counts as kept (one unit of the method).
    """

    kind: str
    asked: float
    reached: float
    tolerance: float

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return abs(self.asked - self.reached) <= self.tolerance * (1 + 1e-9)

    def __str__(self) -> str:
        verdict = "reached" if self.kept else "MISSED"
        return (
            f"{self.kind}: asked {self.asked:.6g}, {verdict} {self.reached:.6g} "
            f"(tolerance {self.tolerance:.2g})"
        )


@dataclass
class Outcome:
    """The pruned model with what it cost and what it is worth, before and after.

    Attributes:
        model: the pruned model.
        masks: True = keep, by parameter name; empty where nothing was masked.
        method, options, budget, seed: what was asked for.
        source: specifications (``model``, ``data``, ``width``) from which the model can be made
            again, where there are any.
        unit: weights of the largest unit that was removed as one.
        primary, higher_is_better: the task's deciding metric.
        promise: the budget, asked and reached.
        before, after: costs of the dense and of the pruned model.
        metrics_before, metrics_after: of the task, if there was one.
        history: a record a round, an epoch or an arm, as the method has them.
        tables: further results of a method, by title, each a list of rows.
        delta: what leads from the base to the model, of methods that prune the difference.
        rank_weights: how large adapters of a recovery should be, block by block, relative to
            each other; empty where the method does not say.
        surgery: how the model was made smaller than the dense one, step by step: plans of
            `secateurs.structure.persistence`; empty where nothing was.
        notes: what the user should know, such as layers that were left dense or emptied.
    """

    model: nn.Module
    masks: Masks = field(default_factory=lambda: Masks({}))
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    budget: str = ""
    seed: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    unit: int = 1
    primary: str = ""
    higher_is_better: bool = True
    promise: Promise | None = None
    before: Cost | None = None
    after: Cost | None = None
    metrics_before: dict[str, float] = field(default_factory=dict)
    metrics_after: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rank_weights: dict[str, float] = field(default_factory=dict)
    surgery: list[dict[str, Any]] = field(default_factory=list)
    delta: SparseDelta | None = None
    notes: list[str] = field(default_factory=list)

    def layers(self) -> list[dict[str, Any]]:
        """Kept and total weights of every masked tensor."""
        return [
            {"name": name, "kept": kept, "total": self.masks[name].numel()}
            for name, kept in self.masks.kept_by_tensor().items()
        ]

    def as_dict(self) -> dict[str, Any]:
        """Everything but tensors, as plain values."""
        return {
            "method": self.method,
            "options": self.options,
            "budget": self.budget,
            "seed": self.seed,
            "source": self.source,
            "unit": self.unit,
            "primary": self.primary,
            "higher_is_better": self.higher_is_better,
            "promise": None if self.promise is None else vars(self.promise),
            "before": None if self.before is None else self.before.as_dict(),
            "after": None if self.after is None else self.after.as_dict(),
            "metrics_before": self.metrics_before,
            "metrics_after": self.metrics_after,
            "layers": self.layers(),
            "history": self.history,
            "tables": self.tables,
            "surgery": self.surgery,
            "notes": self.notes,
        }


def save(outcome: Outcome, folder: str | Path) -> Path:
    """Write an outcome into a new folder: weights, masks at one bit a weight, a JSON plan.

    A pruned difference to a base is a file beside them, which together with the base is enough.

    The folder appears whole or not at all.

    Raises:
        InputError: the folder exists and is not empty.
    """
    target = Path(folder)
    check_output_folder(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_tensors(partial / WEIGHTS, outcome.model.state_dict(), {"format": "pt"})
        shapes = {name: list(mask.shape) for name, mask in outcome.masks.items()}
        write_tensors(partial / MASKS, outcome.masks.pack(), {"shapes": json.dumps(shapes)})
        if outcome.delta is not None:
            save_delta(partial / DELTA, outcome.delta)
        versions = {"torch": torch.__version__, "format": FORMAT}
        write_json(partial / PLAN, {**outcome.as_dict(), "versions": versions})
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_output_folder(folder: Path) -> None:
    """Raise `InputError` unless `folder` is empty, or new in a place where it can be made."""
    try:
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        folder.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder.parent, os.W_OK)
    except OSError:
        free, writable = True, False
    require(free, "output folder", str(folder), "a folder that is new or empty")
    require(writable, "output folder", str(folder), "a place where a folder can be made")


def load(folder: str | Path, model: nn.Module | Callable[[], nn.Module] | None = None) -> Outcome:
    """Read an outcome back.

    Args:
        folder: what `save` wrote, or a run that ended in one.
        model: the dense model, or a function that makes it; may be left out when the model
            came from a name (``zoo:...``, ``torchvision:...``, ``timm:...``).

    Returns:
        The outcome; its model is in eval mode, as `prune` gives it.

    Raises:
        InputError: the folder holds no outcome, a file is truncated, or the weights do not fit
            the model (the first difference is named).
    """
    folder = outcome_folder(Path(folder))
    plan = read_plan(folder / PLAN)
    if model is None:
        model = _model_from_source(plan["source"])
    net = model if isinstance(model, nn.Module) else model()
    if plan.get("surgery"):
        from secateurs.structure.persistence import rebuild

        net = rebuild(net, plan["surgery"])
    weights, _ = read_tensors(folder / WEIGHTS)
    load_weights(net.eval(), weights)
    packed, metadata = read_tensors(folder / MASKS)
    if "shapes" not in metadata:
        raise InputError("file", str(folder / MASKS), "masks as secateurs.save writes them")
    masks = Masks.unpack(packed, json.loads(metadata["shapes"]))
    masks.check(named_parameters(net, masks))
    return Outcome(
        model=net,
        masks=masks,
        delta=load_delta(folder) if (folder / DELTA).is_file() else None,
        promise=Promise(**plan["promise"]) if plan["promise"] else None,
        before=Cost.from_dict(plan["before"]) if plan["before"] else None,
        after=Cost.from_dict(plan["after"]) if plan["after"] else None,
        **{
            key: plan[key]
            for key in (
                "method", "options", "budget", "seed", "source", "unit", "primary",
                "higher_is_better", "metrics_before",
                "metrics_after", "history", "tables", "surgery", "notes",
            )
        },
    )  # fmt: skip


def outcome_folder(folder: Path) -> Path:
    """The folder that holds the plan: `folder` itself, or its ``outcome``."""
    for candidate in (folder, folder / "outcome"):
        if (candidate / PLAN).is_file():
            return candidate
    raise InputError("folder", str(folder), f"a folder with {PLAN}, as secateurs.save writes it")


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load a state dict strictly.

    Raises:
        InputError: a tensor is missing, unexpected or of another shape; the first is named.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise InputError("weights", described(f"no tensor {name!r}"), "the model's tensors")
        if weights[name].shape != tensor.shape:
            raise InputError(
                f"weights {name}",
                described(f"shape {tuple(weights[name].shape)}"),
                f"shape {tuple(tensor.shape)}, the model's",
            )
    if extra := [name for name in weights if name not in own]:
        raise InputError("weights", extra[0], "tensors that the model has")
    model.load_state_dict(weights)


def read_plan(path: Path) -> dict[str, Any]:
    """The plain values of an outcome.

    Raises:
        InputError: the file is not what `save` wrote, or a newer format.
    """
    try:
        plan = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError("file", str(path), f"whole JSON ({error})") from None
    if not isinstance(plan, dict) or "versions" not in plan:
        raise InputError("file", str(path), "a plan written by secateurs.save")
    if plan["versions"]["format"] > FORMAT:
        raise InputError(str(path), plan["versions"]["format"], f"a format up to {FORMAT}")
    return plan


def _model_from_source(source: dict[str, Any]) -> nn.Module:
    if "model" not in source:
        raise InputError("model", None, "the dense model or a function that makes it")
    from secateurs.zoo.catalog import remake

    return remake(**source)
