"""DIMAP: all weights of one kind, wherever they stand, share one threshold; no data is looked at.

Paper: "Data-independent Module-Aware Pruning for Hierarchical Vision Transformers", ICLR 2024,
arXiv 2404.13648. Within a layer, with |w_(1)| ≥ |w_(2)| ≥ ...,

    score(w_(j)) = w_(j)² / Σ_{i ≤ j} w_(i)²

(by what share the layer's norm changes when its smallest survivor goes), which is the LAMP score
of arXiv 2010.07611. The layers of a module are then ranked together, and each module loses the
same share of its weights: QKV (all queries, keys and values; where they are layers of their
own, the three are scored as one fused matrix), PRJ (attention output projections) and MLP (the
other layers of blocks with attention). Everything else is AUX and stays: patch embedding and
merging, norms, position tables, biases; also the head, on which the paper is silent.

How many stay at which stage is then no choice but an outcome: the higher stages of a Swin lose
more. There is no public code. Modules are found from one forward pass where a task gives inputs
(`secateurs.calibration.attention`), from names otherwise, or given; in a model without attention
all layers inside blocks are MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.calibration.attention import Role, named_roles, seen_roles
from secateurs.calibration.blocks import find_blocks, owner_of
from secateurs.errors import InputError, described, require, unknown
from secateurs.method import Pruner, masked_outcome
from secateurs.outcome import Outcome, Promise
from secateurs.parts.allocation import lamp_scores, largest_by_name
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.parts.prunable import matches_any, prunable_parameters, sizes
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.task import Task
from secateurs.workspace import Workspace

Modules = Mapping[str, Mapping[str, Tensor]]
"""Weights by module: {module: {parameter name: weight}}."""

Scope = Literal["module", "model", "layer"]
MODULES: dict[Role, str] = {"qkv": "qkv", "proj": "proj", "other": "mlp"}


def default_modules(
    params: Mapping[str, nn.Parameter], model: nn.Module, example_inputs: Any = None
) -> dict[str, dict[str, nn.Parameter]]:
    """QKV, PRJ and MLP of a model; weights that are in none of them stay dense.

    Args:
        params: the prunable weights.
        example_inputs: what one forward pass is watched on; without them names decide.

    Raises:
        InputError: no layer is inside a block.
    """
    blocks = find_blocks(model)
    owners = {n: b for n in params if (b := owner_of(n, blocks)) is not None}
    inside = {n: params[n] for n in owners}
    kinds = "Linear or convolution layers in its blocks"
    require(bool(inside), "model", described(f"{type(model).__name__} without any"), kinds)
    roles = named_roles(inside, blocks)
    if example_inputs is not None:
        seen = seen_roles(model, example_inputs)
        roles |= {n: role for n, role in seen.items() if n in inside}
    attentive = {owners[n] for n, role in roles.items() if role == "qkv"}
    if not attentive:
        return {"mlp": inside}
    modules: dict[str, dict[str, nn.Parameter]] = {name: {} for name in MODULES.values()}
    for name, role in roles.items():
        if role in MODULES and owners[name] in attentive:
            modules[MODULES[role]][name] = inside[name]
    return {name: weights for name, weights in modules.items() if weights}


def given_modules(
    params: Mapping[str, nn.Parameter], patterns: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, nn.Parameter]]:
    """Modules as regular expressions of parameter names say.

    Raises:
        InputError: an empty module, a weight in two, or a qkv or proj that is not a matrix.
    """
    modules: dict[str, dict[str, nn.Parameter]] = {}
    taken: dict[str, str] = {}
    for module, own in patterns.items():
        found = {n: p for n, p in params.items() if matches_any(n, own)}
        if not found:
            accepted = "patterns of some of " + ", ".join(params)
            raise InputError(f"modules {module}", list(own), accepted)
        for name, weight in found.items():
            twice = f"one module for {name}, which is in {taken.get(name)} too"
            require(name not in taken, f"modules {module}", list(own), twice)
            shape = described(f"{name} of shape {tuple(weight.shape)}")
            matrix = weight.ndim == 2 or module not in ("qkv", "proj")
            require(matrix, f"modules {module}", shape, "matrices")
            taken[name] = module
        modules[module] = found
    return modules


def fused(weights: Mapping[str, Tensor], separate: bool = True) -> dict[str, list[str]]:
    """Names of weights that are scored as one, by the name of the first.

    Queries, keys and values that are layers of one parent are one matrix.

    Args:
        separate: whether every weight stands alone.
    """
    if separate:
        return {name: [name] for name in weights}
    groups: dict[str, list[str]] = {}
    for name in weights:
        parent = name.removesuffix(".weight").rpartition(".")[0]
        groups.setdefault(parent, []).append(name)
    return {names[0]: names for names in groups.values()}


def cumulative_magnitude(modules: Modules) -> dict[str, dict[str, Tensor]]:
    """The score of every weight, float64, by module and layer; largest 1 in each layer."""
    out = {}
    for module, weights in modules.items():
        groups = fused(weights, separate=module != "qkv")
        joined = {
            first: torch.cat([weights[n].detach().double().flatten() for n in names])
            for first, names in groups.items()
        }
        scores = lamp_scores(joined)
        parts = {
            n: part.reshape(weights[n].shape)
            for first, names in groups.items()
            for n, part in zip(
                names, scores[first].split([weights[n].numel() for n in names]), strict=True
            )
        }
        out[module] = {n: parts[n] for n in weights}
    return out


def module_prune(
    modules: Modules, ratio: float | Mapping[str, float], scope: Scope = "module"
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Masks by parameter name, and by module the largest score that went.

    From each module int(ratio · size) weights go, the lowest scores of all its layers; ties go
    by name and position. With `scope` ``model`` all modules are one (which is LAMP), with
    ``layer`` every layer loses the ratio of its module.

    Args:
        ratio: removed share, one for all or one a module; ``model`` takes their mean by size.

    Raises:
        InputError: a ratio outside [0, 1).
    """
    ratios = dict(ratio) if isinstance(ratio, Mapping) else dict.fromkeys(modules, ratio)
    for module in modules:
        require(0 <= ratios[module] < 1, f"ratio {module}", ratios[module], "a share in [0, 1)")
    scores = cumulative_magnitude(modules)
    size = {m: sum(p.numel() for p in weights.values()) for m, weights in modules.items()}
    if scope == "model":
        all_scores = {n: s for own in scores.values() for n, s in own.items()}
        removed = sum(ratios[m] * size[m] for m in modules)
        masks = largest_by_name(all_scores, sum(size.values()) - whole(removed))
    else:
        masks = {}
        for module, own in scores.items():
            groups = [[n] for n in own] if scope == "layer" else [list(own)]
            for names in groups:
                count = sum(own[n].numel() for n in names)
                keep = count - whole(ratios[module] * count)
                masks |= largest_by_name({n: own[n] for n in names}, keep)
    thresholds = {
        module: max(
            (float(s[~masks[n]].max()) for n, s in own.items() if not masks[n].all()), default=0.0
        )
        for module, own in scores.items()
    }
    return masks, thresholds


def whole(count: float) -> int:
    """int(ratio · size), with a hair more for products such as 0.29 · 100."""
    return int(count + 1e-9)


@register(
    "dimap",
    paper=Paper(
        "Data-independent Module-Aware Pruning for Hierarchical Vision Transformers",
        "ICLR",
        2024,
        "2404.13648",
    ),
    tags=Tags("U", "weight", "PAT", "mag"),
    budgets=("sparsity", "density"),
)
@dataclass(frozen=True)
class DataIndependentModuleAwarePruning(Pruner):
    """One threshold for all attention inputs, one for their outputs, one for feed-forward."""

    scope: Scope = option(
        "module", "rank within modules; within the whole model (LAMP); within layers"
    )
    modules: dict[str, tuple[str, ...]] = option(
        {}, "modules of one's own: regular expressions of weights by name; the rest stays dense"
    )
    ratios: dict[str, float] = option(
        {}, "own sparsity of modules by name; the others share what is left of the budget"
    )
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        for module, ratio in self.ratios.items():
            require(0 <= ratio < 1, f"ratios {module}", ratio, "a sparsity in [0, 1)")

    def prune(
        self,
        model: nn.Module,
        budget: Budget,
        task: Task | None = None,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        params = prunable_parameters(model, exclude=self.exclude)
        if self.modules:
            modules = given_modules(params, self.modules)
        else:
            inputs = None if task is None else task.example_inputs
            modules = default_modules(params, model, inputs)
        size = {m: sum(sizes(weights).values()) for m, weights in modules.items()}
        asked = budget.value if budget.kind == "sparsity" else 1 - budget.value
        masks, thresholds = module_prune(modules, self._ratios(size, asked), self.scope)
        # in the order of the model
        masks = {n: masks[n] for n in params if n in masks}
        total = sum(size.values())
        kept = sum(int(m.sum()) for m in masks.values())
        share = kept / total if budget.kind == "density" else 1 - kept / total
        cuts = {"module": len(modules), "model": 1, "layer": len(masks)}[self.scope]
        dense = [n for n in params if n not in masks]
        return masked_outcome(
            model,
            Masks(masks),
            promise=Promise(budget.kind, budget.value, share, cuts / total),
            tables={"modules": _rows(modules, masks, thresholds)},
            notes=["left dense: " + ", ".join(dense)] if dense else [],
        )

    def _ratios(self, size: Mapping[str, int], asked: float) -> dict[str, float]:
        """The sparsity of each module, such that the whole is as asked."""
        for module in self.ratios:
            if module not in size:
                raise unknown("ratios", module, size)
        free = sum(n for m, n in size.items() if m not in self.ratios)
        left = asked * sum(size.values()) - sum(r * size[m] for m, r in self.ratios.items())
        rest = left / free if free else 0.0
        if not -1e-9 <= rest < 1 or (not free and abs(left) > len(size)):
            raise InputError("ratios", self.ratios, f"sparsities that allow for {asked:g} in all")
        return {m: self.ratios.get(m, max(0.0, rest)) for m in size}


def _rows(
    modules: Modules, masks: Mapping[str, Tensor], thresholds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A module a row; layers are listed with the masks."""
    return [
        {
            "module": module,
            "layers": len(weights),
            "kept": sum(int(masks[n].sum()) for n in weights),
            "total": sum(sizes(weights).values()),
            "largest score removed": thresholds[module],
        }
        for module, weights in modules.items()
    ]
