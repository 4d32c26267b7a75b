"""Random pruning: a random mask drawn once before training, with sensible layer densities.

Paper: "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for
Sparse Training", arXiv 2202.02643. What matters is the width of the network and the density of
each layer: uniform, uniform+, ER, ERK, ERK+, or the densities that SNIP or GraSP would give
(their positions are thrown away, only the ratios stay).

Where the public code differs: its masks are Bernoulli draws, so the counts fluctuate; the
default here is exactly round(p_l n_l) positions without replacement (`exact=False` for theirs).
Its uniform+ misses its own budget (it divides by all weights instead of those that are left);
here the budget is kept. Its SNIP mode for ImageNet keeps SNIP's own mask; here positions are
always drawn anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, require
from secateurs.method import Pruner, masked_outcome, weights_to_keep
from secateurs.outcome import Outcome
from secateurs.parts.allocation import (
    SHAPE_METHODS,
    allocate_counts,
    counts_from_densities,
    kept_shares,
    per_tensor_masks,
)
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.parts.saliency import BatchLoss, Probe, grasp, snip, uniform_like
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.task import Task
from secateurs.training.batches import class_balanced, first_batch
from secateurs.workspace import Workspace


def random_masks(
    shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int], seed: int
) -> dict[str, Tensor]:
    """Masks with exactly `counts` random positions, from a stream of (seed, name) each."""
    scores = {n: uniform_like(torch.empty(s, device="meta"), seed, n) for n, s in shapes.items()}
    return per_tensor_masks(scores, counts)


def bernoulli_masks(
    shapes: Mapping[str, tuple[int, ...]], density: Mapping[str, float], seed: int
) -> dict[str, Tensor]:
    """Masks whose entries are kept with probability `density`, at least one a tensor."""
    masks = {}
    for name, shape in shapes.items():
        draws = uniform_like(torch.empty(shape, device="meta"), seed, name)
        mask = draws < density[name]
        mask.view(-1)[draws.argmin()] = True
        masks[name] = mask
    return masks


def snip_ratio(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    batch: Any,
    loss: BatchLoss,
    keep: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Density of each layer when SNIP keeps `keep` weights of a freshly drawn copy."""
    twin, weights = Probe(model, params).copy()
    with torch.no_grad():
        for weight in weights.values():
            # drawn on the CPU, so the same on every device
            weight.copy_(nn.init.xavier_normal_(torch.empty(weight.shape), generator=generator))
    return kept_shares(snip(Probe(twin, weights, [batch], loss)), keep)


def grasp_ratio(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    halves: list[Any],
    loss: BatchLoss,
    keep: int,
    temperature: float = 200.0,
) -> dict[str, float]:
    """Density of each layer when GraSP keeps `keep` weights."""
    return kept_shares(grasp(Probe(model, params, halves, loss), temperature), keep)


@register(
    "random-pruning",
    paper=Paper(
        "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline "
        "for Sparse Training",
        "ICLR",
        2022,
        "2202.02643",
    ),
    tags=Tags("U", "weight", "PBT", "rand", supervision="none"),
    budgets=("sparsity", "density", "params"),
)
@dataclass(frozen=True)
class RandomPruning(Pruner):
    """A fixed random mask; the sparse network is then trained from where it stands."""

    allocation: Literal["uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp"] = option(
        "erk", "how the density is spread over layers"
    )
    exact: bool = option(True, "exact counts; false draws each weight by itself (public code)")
    init: Literal["given", "scaled"] = option(
        "given", "scaled: draw the weights anew with fan-in times the density"
    )
    power: float = option(1.0, "exponent of the ER and ERK ratios")
    fc_density: float = option(1.0, "density of the last layer under erk+")
    keep_dense: tuple[str, ...] = option((), "regular expressions of layers dense in the budget")
    samples_per_class: int = option(25, "for grasp: samples of each class", "samples")
    temperature: float = option(200.0, "for grasp: the logits are divided by this")
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        require(self.samples_per_class >= 2, "samples_per_class", self.samples_per_class, ">= 2")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(0 < self.fc_density <= 1, "fc_density", self.fc_density, "a fraction in (0, 1]")

    def prune(
        self,
        model: nn.Module,
        budget: Budget,
        task: Task | None = None,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        params = self.prunable(model)
        keep = weights_to_keep(model, params, budget)
        counts = self._counts(model, params, keep, task, seed)
        shapes = {n: tuple(p.shape) for n, p in params.items()}
        if self.exact:
            masks = random_masks(shapes, counts, seed)
        else:
            density = {n: counts[n] / p.numel() for n, p in params.items()}
            masks = bernoulli_masks(shapes, density, seed)
        if self.init == "scaled":
            total = sum(p.numel() for p in params.values())
            self._redraw(params, keep / total, torch.Generator().manual_seed(seed))
        device = next(iter(params.values())).device
        return masked_outcome(model, Masks(masks).to(device))

    def _counts(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        keep: int,
        task: Task | None,
        seed: int,
    ) -> dict[str, int]:
        if self.allocation in SHAPE_METHODS:
            options: dict[str, Any] = {"power": self.power, "keep_dense": self.keep_dense}
            if self.allocation == "erk+":
                options["fc_density"] = self.fc_density
            return allocate_counts(params, keep, self.allocation, **options)
        if task is None:
            raise InputError("task", None, f"a Task: {self.allocation} ratios need batches")
        if self.allocation == "snip":
            generator = torch.Generator().manual_seed(seed)
            batch = first_batch(task, seed)
            shares = snip_ratio(model, params, batch, task.batch_loss, keep, generator)
        else:
            halves = class_balanced(task, seed, self.samples_per_class, parts=2)
            shares = grasp_ratio(model, params, halves, task.batch_loss, keep, self.temperature)
        size = {n: p.numel() for n, p in params.items()}
        return counts_from_densities(shares, size, keep)

    @torch.no_grad()
    def _redraw(
        self, params: Mapping[str, nn.Parameter], density: float, generator: torch.Generator
    ) -> None:
        """std = gain / sqrt(fan_in · d) with the gain of a leaky ReLU of slope 0.01."""
        gain = nn.init.calculate_gain("leaky_relu", 0.01)
        for weight in params.values():
            fan_in = weight[0].numel()
            std = gain / math.sqrt(fan_in * density)
            weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))
