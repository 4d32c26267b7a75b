"""What a delta is worth when it is dropped and rescaled: the trials by which DAREx finds q."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateurs.calibration.moments import (
    Moments,
    collect_moments,
    is_known,
    weight_from_matrices,
    weight_matrices,
)
from secateurs.calibration.output_change import Kind, OutputChange
from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, require
from secateurs.parts.allocation import counts_from_densities
from secateurs.parts.deltas import Difference, largest_masks, random_masks, units_of
from secateurs.parts.rescaling import mean_without, row_q, spread
from secateurs.task import Task, logits_of
from secateurs.training.batches import calibration_inputs
from secateurs.training.order import mix

if TYPE_CHECKING:
    from secateurs.methods.deltas.darex import DareExtreme

Q = float | dict[str, float]
"""What differences are divided by: one number, or one a tensor."""
LEARNING_STEPS, LEARNING_RATE, LEARNING_PATIENCE, FIRST_FACTOR = 200, 1e-2, 5, 1e-4


def q_of(q: Q, name: str) -> float:
    """The number of one tensor."""
    return q[name] if isinstance(q, dict) else q


class Trials:
    """The fine-tuned model with its delta dropped and rescaled, in a copy of its own.

    Args:
        method: whose options hold.
        before: state dict of the base.
        model: fine-tuned; it is left as it is.
        found: the difference of the two.
        p: drop rate.
        task: source of inputs and metric.
    """

    def __init__(
        self,
        method: DareExtreme,
        before: Mapping[str, Tensor],
        model: nn.Module,
        found: Difference,
        p: float,
        task: Task | None,
        seed: int,
    ) -> None:
        self.method, self.before, self.model, self.found = method, before, model, found
        self.p, self.task, self.seed = p, task, seed
        self._made: dict[int, dict[str, Tensor]] = {}
        self._moments: dict[str, Moments] | None = None

    def masks(self, number: int) -> dict[str, Tensor]:
        """Masks number 0, 1, ... of the seed; the outcome has number 0, the trials all others.

        The largest entries are always the same.
        """
        number = number if self.method.criterion == "random" else 0
        if number not in self._made:
            self._made[number] = self._draw(number)
        return self._made[number]

    def _draw(self, number: int) -> dict[str, Tensor]:
        values, structure = self.found.values, self.method.structure
        if self.method.criterion == "random":
            generator = torch.Generator().manual_seed(mix(self.seed, number))
            return random_masks(values, self.p, generator, structure)
        units = {n: units_of(v.shape, structure) for n, v in values.items()}
        keep = sum(units.values()) - round(self.p * sum(units.values()))
        counts = counts_from_densities(dict.fromkeys(units, 1 - self.p), units, keep)
        return largest_masks(self._scores(), counts, structure)

    def _scores(self) -> dict[str, Tensor]:
        """|δ|, times the norm of the input where Wanda's score is asked for and known."""
        scores = {n: v.abs() for n, v in self.found.values.items()}
        if self.method.criterion == "wanda":
            for layer, moments in self.moments.items():
                weight, module = f"{layer}.weight".removeprefix("."), moments.layer
                matrices = weight_matrices(module, scores[weight])
                scaled = matrices * moments.squares.sqrt().to(matrices)[:, None]
                scores[weight] = weight_from_matrices(module, scaled)
        return scores

    @property
    def moments(self) -> dict[str, Moments]:
        """Means and squares of the inputs of all layers whose weight is dropped from."""
        if self._moments is None:
            names = [
                name
                for name, module in self.model.named_modules()
                if is_known(module) and self._has_weight(name)
            ]
            task, inputs = self._given("the inputs of layers"), self._inputs()
            self._moments = collect_moments(
                self.model, names, lambda net: task.forward(net, inputs),
                products=False, unreached=True,
            )  # fmt: skip
        return self._moments

    def _has_weight(self, layer: str) -> bool:
        name = f"{layer}.weight".removeprefix(".")
        found = self.found.values.get(name)
        return found is not None and found.shape == self.model.get_parameter(name).shape

    def _given(self, what: str) -> Task:
        if self.task is None:
            raise InputError("task", None, f"a Task, for {what}; or q=dare, or a number")
        return self.task

    def _inputs(self) -> Any:
        task = self._given("inputs")
        samples = self.method.samples
        inputs = calibration_inputs(task.training_loader(), samples, self.seed, task.unpack)
        return to_device(inputs, device_of(self.model))

    def score(self, way: str) -> Callable[[Q], float]:
        """How good a q is; higher is better."""
        task = self._given(f"q by {way}")
        trial = copy.deepcopy(self.model).eval()
        random = self.method.criterion == "random"
        seeds = self.method.seeds if random else 1
        outliers = self.method.outliers if random else 0
        if way == "validation":
            sign = 1 if task.higher_is_better else -1

            def quality() -> float:
                return sign * task.measure(trial)[task.primary]
        else:
            change = self._change(task, self.method.kind)
            self._check_reach(change, trial)

            def quality() -> float:
                return -change(trial)

        def score(q: Q) -> float:
            found = []
            for number in range(1, seeds + 1):
                self._put(trial, self.masks(number), q)
                found.append(quality())
            return mean_without(found, outliers)

        return score

    def _change(self, task: Task, kind: Kind) -> OutputChange:
        return OutputChange(self.model, self._inputs(), task.forward, kind, self.method.top)

    def _check_reach(self, change: OutputChange, trial: nn.Module) -> None:
        """Refuse a comparison that no q could change."""
        nothing = {n: torch.zeros_like(v, dtype=torch.bool) for n, v in self.found.values.items()}
        self._put(trial, nothing, 1.0)
        if change(trial) == 0:
            raise InputError(
                "kind", self.method.kind,
                f"topk_logits: the delta does not reach what {change.layer or 'it'} is given",
            )  # fmt: skip

    @torch.no_grad()
    def _put(self, trial: nn.Module, masks: Mapping[str, Tensor], q: Q) -> None:
        weights = self._weights(masks, {n: q_of(q, n) for n in masks})
        for name, weight in weights.items():
            trial.get_parameter(name).copy_(weight)

    def _weights(self, masks: Mapping[str, Tensor], q: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights with the delta dropped and divided, with their graph."""
        weights = {}
        for name, mask in masks.items():
            values, dtype = self.found.values[name], self.model.get_parameter(name).dtype
            weight = (self.before[name].to(values.dtype) + values * mask / q[name]).to(dtype)
            if name in self.found.rows:
                weight = torch.cat([weight, self.found.rows[name]])
            weights[name] = weight
        return weights

    def analytic(self, eta: float, layerwise: bool) -> Q:
        """The analytic q of every tensor, or its mean over the layers."""
        method, layers = self.method, {}
        for layer, moments in self.moments.items():
            weight, bias = (f"{layer}.{kind}".removeprefix(".") for kind in ("weight", "bias"))
            matrices = weight_matrices(moments.layer, self.found.values[weight])
            terms = (matrices * moments.mean.to(matrices)[:, None]).flatten(0, 1)
            if bias in self.found.values:
                terms = torch.cat([terms, self.found.values[bias].to(terms)[:, None]], dim=1)
            rows = row_q(
                terms, self.p, eta, gamma=method.gamma, stop=method.stop, mode=method.mode,
                absolute=method.absolute,
            )  # fmt: skip
            layers[weight] = float(rows.mean())
        require(bool(layers), "q", "analytic", "another: no layer of this model is known to it")
        if not layerwise:
            return sum(layers.values()) / len(layers)
        return spread(layers, list(self.found.values))

    def learned(self, layerwise: bool) -> dict[str, Any]:
        """q = |factor| + (1-p), the factors trained on the outcome's own mask.

        The loss is the mean square change of the top logits; the best of all steps is taken.
        """
        task, masks, names = self._given("q=learned"), self.masks(0), list(self.found.values)
        change = self._change(task, "topk_logits")
        matrices = [n for n in names if self.found.values[n].ndim >= 2] if layerwise else []
        factors = [
            torch.full((), FIRST_FACTOR, device=device_of(self.model), requires_grad=True)
            for _ in matrices or [""]
        ]
        optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, LEARNING_STEPS)
        net = copy.deepcopy(self.model).eval().requires_grad_(False)
        tried: list[dict[str, Any]] = []
        best: dict[str, Any] = {"score": float("-inf")}
        misses = 0
        for step in range(LEARNING_STEPS):
            divisors = [factor.abs() + (1 - self.p) for factor in factors]
            own = dict(zip(matrices or ["all"], divisors, strict=True))
            q = spread(own, names)
            output = task.forward(_Bound(net, self._weights(masks, q)), change.inputs)
            loss = change.of(logits_of(output))
            row = {"grid": "step", "value": step, "score": -float(loss.detach())}
            tried.append(row)
            misses = 0 if row["score"] > best["score"] else misses + 1
            if misses == 0:
                best = {"score": row["score"], "q": {n: float(v.detach()) for n, v in q.items()}}
            if misses > LEARNING_PATIENCE:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = best["q"] if layerwise else next(iter(best["q"].values()))
        return {"q": found, "tried": tried}


class _Bound(nn.Module):
    """A module called with other weights."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._call = lambda args, kwargs: functional_call(model, dict(weights), args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with them."""
        return self._call(args, kwargs)
