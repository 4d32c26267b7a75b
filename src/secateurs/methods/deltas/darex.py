"""DAREx: drop nearly all of a fine-tuned model's delta, and rescale what is left by a chosen q.

Paper: "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models", arXiv
2410.09344. Of δ = W_tuned - W_base every entry is dropped with probability p, and

    W = W_base + (m ⊙ δ) / q,        m ~ Bernoulli(1-p).

DARE divides by 1-p, which is unbiased but amplifies the noise of the mask; at extreme p, or with
large deltas, a larger q is better (`secateurs.parts.rescaling`). It is found

 - by ``validation``: the task's metric on its evaluation set (1/q_v);
 - by ``output``: the least change of the outputs, without labels (1/q_e);
 - by ``analytic``: per layer, from the mean inputs alone; its η by one of the two searches;
 - by ``learned``: a factor a matrix trained to keep the top logits (an extra of the release).

The paper's own advice: with small deltas DAREx-q; where the fine-tuning can be changed, AdamR
(`secateurs.training.adamr`, ``optimizer=adamr``) and then DARE or DAREx; where deltas are large and
the checkpoint is fixed, the largest entries, by |δ| or by |δ_ij| ‖x_j‖ (Wanda's score), not
rescaled. Of a `peft.PeftModel` with LoRA the delta of a layer is scale · B A, not rounded to the
weights' precision; the outcome's model is the merged one.

Departures: the release tries q on one mask for ``validation``, here all trials average several.
Buffers, such as batch-norm statistics, are never dropped. The release computes in half precision
for decoders; here deltas are float32 unless `store` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from secateurs.calibration.output_change import Kind
from secateurs.deploy.delta_file import Entries, SparseDelta, base_hash, merge
from secateurs.devices import device_of, to_device
from secateurs.errors import described, require
from secateurs.method import Codec
from secateurs.methods.deltas.trials import Q, Trials, q_of
from secateurs.outcome import Outcome, Promise
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import dense_bytes
from secateurs.parts.deltas import (
    Difference,
    Structure,
    difference,
    same_bits,
    units_of,
)
from secateurs.parts.prunable import check_finite, matches_any, prunable_parameters
from secateurs.parts.rescaling import Grid
from secateurs.registry import Paper, Tags, options_as_dict, register
from secateurs.settings import option
from secateurs.task import Task
from secateurs.training import peft_adapters
from secateurs.training.peft_adapters import Lora
from secateurs.workspace import Workspace

HEADS = ("classifier", "lm_head", r"^head\.", r"^fc\.", r"^score\.")
"""Names that a task's own head usually has."""
HIGHEST_ETA = 1.5
SIGMAS = 4
"""A random mask keeps the budget within so many standard deviations."""


@register(
    "darex",
    paper=Paper(
        "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models",
        "ICLR",
        2025,
        "2410.09344",
    ),
    tags=Tags("U+S", "delta", "PTP", "rand+mag+act", fusion="peft", supervision="none",
              recovery="none"),
    budgets=("sparsity", "density"),
)  # fmt: skip
@dataclass(frozen=True)
class DareExtreme(Codec):
    """Keep a hundredth of what fine-tuning changed, at random and rescaled, or the largest."""

    takes_adapters: ClassVar[bool] = True

    q: float | Literal["auto", "dare", "validation", "output", "analytic", "learned"] = option(
        "auto", "what survivors are divided by: a number, dare (1-p) or how it is found; "
        "auto: output where dropping is random, 1 elsewhere"
    )  # fmt: skip
    criterion: Literal["random", "magnitude", "wanda"] = option(
        "random", "which entries stay: any, the largest |delta|, or the largest |delta| times input"
    )
    structure: Structure = option("none", "what stays or goes as one: entries, rows or columns")
    scope: Literal["auto", "global", "layer"] = option(
        "auto", "one q, or of analytic and learned one a layer, which is their auto"
    )
    include: tuple[str, ...] = option(
        (), "regular expressions of tensors to drop from, such as mlp,self_attn; all others stay"
    )
    exclude: tuple[str, ...] = option(
        HEADS, "regular expressions of tensors to take from the fine-tuned model whole"
    )
    kind: Kind = option("hidden", "output to compare: what the last layer is given, or top logits")
    top: int = option(5, "logits a position that are compared", "logits")
    samples: int = option(128, "training inputs, unlabelled, to find q on", "samples")
    seeds: int = option(4, "masks that a trial averages over", "masks")
    outliers: int = option(1, "of these, how many that are farthest from the mean are left out")
    low: float | None = option(None, "lowest q tried [1-p], or lowest eta [step]")
    high: float | None = option(None, "highest q tried [1], or highest eta [1.5]")
    step: float = option(0.05, "of the coarse grid")
    decay: float = option(0.1, "step of the fine grid, as a share of the coarse one's")
    patience: int = option(3, "a grid is left after more misses in a row", "values")
    eta: float | Literal["validation", "output"] = option(
        "output", "of analytic: weight of the bias, or how it is found"
    )
    mode: Literal["exact", "release"] = option(
        "exact", "of analytic: the least value in float64, or the release's scan in float16"
    )
    gamma: float = option(0.05, "of analytic: probability with which the bound may fail")
    stop: float = option(0.8, "of analytic, release: share of outputs at which the scan ends")
    absolute: bool = option(True, "of analytic: least |f| as published, not least f")
    store: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "auto", "precision of the stored delta; auto: float32, and float64 among float64 weights"
    )

    def __post_init__(self) -> None:
        if not isinstance(self.q, str):
            require(self.q > 0, "q", self.q, "a divisor above 0")
        if not isinstance(self.eta, str):
            require(self.eta > 0, "eta", self.eta, "above 0")
        require(
            self.criterion == "random" or self.q not in ("dare", "analytic", "learned"),
            "q", self.q, f"auto, a number, validation or output, with criterion={self.criterion}",
        )  # fmt: skip
        require(
            self.scope != "layer" or self.q in ("analytic", "learned"),
            "scope", self.scope, "layer only with q=analytic or q=learned",
        )  # fmt: skip
        for name in ("top", "samples", "seeds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        inside = f"0 to {self.seeds - 1}, fewer than seeds"
        require(0 <= self.outliers < self.seeds, "outliers", self.outliers, inside)
        require(0 < self.gamma < 1, "gamma", self.gamma, "a probability in (0, 1)")
        require(0 < self.stop <= 1, "stop", self.stop, "a share in (0, 1]")
        require(self.step > 0, "step", self.step, "above 0")
        low = self.step if self.low is None else self.low
        high = max(low, 1.0) if self.high is None else self.high
        require(self.high is None or high >= low, "high", high, f"at least {low:g}")
        self._grid(low, high)

    def encode(
        self,
        base: nn.Module,
        model: nn.Module,
        budget: Budget,
        task: Task | None = None,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        model, lora = peft_adapters.detach(model)
        prunable_parameters(model)  # refuses what has no weights, or NaN in them
        before = to_device(dict(base.state_dict()), device_of(model))
        names = self._names(model)
        exact = self._low_rank(model, lora, before)
        peft_adapters.add(model, lora)
        tuned = model.state_dict()
        found = difference(before, tuned, names)
        found.values.update({n: delta for n, delta in exact.items() if n in names})
        require(bool(found.values), "model", described("weights that are all the base's"),
                "a model that was fine-tuned from it")  # fmt: skip
        check_finite(found.values)
        p = budget.value if budget.kind == "sparsity" else 1 - budget.value
        trials = Trials(self, before, model, found, p, task, seed)
        outcome = Outcome(model=model)
        q = self._chosen_q(trials, outcome, work or Workspace())
        masks = trials.masks(0)
        delta = SparseDelta(
            base_hash(base.state_dict()),
            self._entries(before, tuned, found, masks, q),
            found.whole, found.rows, found.tied,
            method=self.name, options=options_as_dict(self), seed=seed, p=p, q=q,
        )  # fmt: skip
        model.load_state_dict(merge(before, delta))
        outcome.delta = delta
        outcome.promise = self._promise(budget, delta)
        outcome.tables["delta"] = [
            {"tensor": name, "kept": int(mask.sum()), "total": mask.numel(), "q": q_of(q, name)}
            for name, mask in masks.items()
        ]
        outcome.tables["bytes"] = [
            {"what": "the fine-tuned model", "bytes": dense_bytes(model)},
            {"what": "the delta, a file", "bytes": delta.file_bytes},
        ]
        return outcome

    def _low_rank(
        self, model: nn.Module, lora: Mapping[str, Lora], before: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The deltas of adapters on layers that are the base's, where they are not all zero."""
        found = {}
        for name, own in lora.items():
            weight, layer = f"{name}.weight", model.get_submodule(name)
            delta = own.delta(layer)
            if weight in before and same_bits(before[weight], layer.get_parameter("weight")):
                found.update({weight: delta} if bool(delta.any()) else {})
        return found

    def _names(self, model: nn.Module) -> set[str]:
        """Parameters that are dropped from, tied ones by their first name."""
        found = [n for n, p in model.named_parameters() if p.is_floating_point()]
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                hits = any(matches_any(name, [pattern]) for name in found)
                require(hits or pattern in HEADS, argument, pattern,
                        "a regular expression matching one of " + ", ".join(found))  # fmt: skip
        chosen = {
            name
            for name in found
            if (not self.include or matches_any(name, self.include))
            and not matches_any(name, self.exclude)
        }
        require(bool(chosen), "exclude", self.exclude, "patterns that leave something to drop from")
        return chosen

    def _entries(
        self,
        before: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        found: Difference,
        masks: Mapping[str, Tensor],
        q: Q,
    ) -> dict[str, Entries]:
        """What is stored; with q = 1 the kept entries are the fine-tuned ones to the bit."""
        entries = {}
        for name, mask in masks.items():
            values, target = found.values[name][mask] / q_of(q, name), None
            if q_of(q, name) == 1 and self.store in ("auto", "float32"):
                common = tuned[name][tuple(slice(size) for size in mask.shape)]
                target = common[mask]
            if self.store != "auto":
                values = values.to(getattr(torch, self.store))
            entries[name] = Entries.of(before[name], mask, values, tuned[name].dtype, target)
        return entries

    def _promise(self, budget: Budget, delta: SparseDelta) -> Promise:
        """Random masks meet a budget on average; the others to a unit a tensor."""
        masks = [e.mask for e in delta.entries.values()]
        units = [units_of(mask.shape, self.structure) for mask in masks]
        sizes = [mask.numel() / count for mask, count in zip(masks, units, strict=True)]
        if self.criterion == "random":
            squares = sum(n * size**2 for n, size in zip(units, sizes, strict=True))
            weights = SIGMAS * math.sqrt(delta.p * (1 - delta.p) * squares)
        else:
            weights = 1 if self.structure == "none" else sum(sizes)
        density = delta.kept / delta.total
        reached = 1 - density if budget.kind == "sparsity" else density
        return Promise(budget.kind, budget.value, reached, max(weights, 1) / delta.total)

    # ------------------------------------------------------------ the choice of q

    def _chosen_q(self, trials: Trials, outcome: Outcome, work: Workspace) -> Q:
        """q, with what was tried on the way in the outcome's tables."""
        p, way = trials.p, self.q
        if way == "auto":
            way = "output" if self.criterion == "random" else 1.0
        if p == 0 and isinstance(way, str):
            return 1.0  # nothing is dropped
        if way == "dare":
            return 1 - p
        if not isinstance(way, str):
            if way < 1 - p and self.criterion == "random":
                outcome.notes.append(f"q {way:g} is below 1-p = {1 - p:g}: that is never of use")
            return float(way)
        if "validation" in (way, self.eta if way == "analytic" else ""):
            outcome.notes.append("q was chosen on the evaluation set that also scores the outcome")
        found = work.once("q", lambda: self._found_q(way, trials))
        outcome.tables["search"] = found["tried"]
        q: Q = found["q"]
        return q

    def _found_q(self, way: str, trials: Trials) -> dict[str, Any]:
        layerwise = self.scope != "global"
        if way == "learned":
            return trials.learned(layerwise)
        if way == "analytic":
            return self._analytic(trials, layerwise)
        low = 1 - trials.p if self.low is None else self.low
        grid = self._grid(low, max(low, 1.0) if self.high is None else self.high)
        q, tried = grid.search(trials.score(way))
        return {"q": q, "tried": tried}

    def _analytic(self, trials: Trials, layerwise: bool) -> dict[str, Any]:
        """A q a layer for the best η."""

        def found_for(eta: float) -> Q:
            return trials.analytic(eta, layerwise)

        if not isinstance(self.eta, str):
            return {"q": found_for(self.eta), "tried": []}
        low = self.step if self.low is None else self.low
        grid = self._grid(low, max(low, HIGHEST_ETA) if self.high is None else self.high)
        score = trials.score(self.eta)
        eta, tried = grid.search(lambda value: score(found_for(value)))
        return {"q": found_for(eta), "tried": tried}

    def _grid(self, low: float, high: float) -> Grid:
        return Grid(low, high, self.step, self.decay, self.patience)
