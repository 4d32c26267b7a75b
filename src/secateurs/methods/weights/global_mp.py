"""Global magnitude pruning: one list of |w| over all layers, the smallest go.

Paper: "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude
Pruning", arXiv 2209.14624. Mask of layer l: 1[|W_l| ≥ θ] with one θ for the whole network.
The Minimum Threshold (MT) keeps at least m weights in every layer, so that no layer is emptied
at extreme sparsity: the layers' shares s_l of the global cut are re-scaled to
min(1 − m/n_l, c · s_l) with c such that the total is exact, and each layer is then cut by its
own magnitudes.

Where paper and public code differ: the code removes one weight fewer than asked (it keeps the
k-th smallest); `count="official"` reproduces that, the default removes exactly round(s·N). The
code re-scales in a loop that never ends when the floor cannot be met; here that is an error
that says the largest sparsity that can. Its fixed point is what is computed here directly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from secateurs.errors import InputError, require
from secateurs.method import Pruner, TrainingPruner, masked_outcome, weights_to_keep
from secateurs.outcome import Outcome
from secateurs.parts.allocation import counts_from_densities, largest_by_name, per_tensor_masks
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks
from secateurs.parts.prunable import sizes
from secateurs.parts.schedules import Cubic
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.task import Task
from secateurs.training.attachment import Attachment
from secateurs.training.ramp import ramp_steps
from secateurs.workspace import Workspace

PAPER = Paper(
    "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
    "arXiv",
    2022,
    "2209.14624",
)
BUDGETS = ("sparsity", "density", "params")


def minimum_threshold(
    sparsity: Mapping[str, float], size: Mapping[str, int], floor: int
) -> dict[str, float]:
    """Sparsities with at least `floor` weights left a layer and the same total removed.

    Args:
        sparsity: removed share of each layer under the plain global cut.
        size: weights of each layer.
        floor: m, the least number of weights to keep in a layer (smaller layers stay dense).

    Raises:
        InputError: no such allocation exists.
    """
    removed = sum(sparsity[n] * size[n] for n in size)
    check_floor(size, removed, floor)
    cap = {n: max(0.0, 1 - floor / size[n]) for n in size}
    capped: set[str] = set()
    while True:
        free = [n for n in size if n not in capped]
        left = removed - sum(cap[n] * size[n] for n in capped)
        shared = {n: sparsity[n] for n in free}
        if not any(shared.values()):
            # the global cut spares all of these, so what is left is shared by their room
            shared = {n: cap[n] for n in free}
        weight = sum(shared[n] * size[n] for n in free)
        scale = left / weight if weight else 0.0
        over = {n for n in free if scale * shared[n] > cap[n] * (1 + 1e-12)}
        if not over:
            break
        capped |= over
    return {n: cap[n] if n in capped else scale * shared[n] for n in size}


def check_floor(size: Mapping[str, int], removed: float, floor: int) -> None:
    """Raise `InputError` unless `removed` weights can go and `floor` stay in every layer."""
    reachable = sum(max(0, n - floor) for n in size.values())
    if removed > reachable * (1 + 1e-12):
        raise InputError(
            "min_weights", floor, f"a floor that leaves room: at {floor} weights a layer the "
            f"largest sparsity is {reachable / sum(size.values()):.6g}"
        )  # fmt: skip


def global_magnitude_masks(
    params: Mapping[str, Tensor],
    keep: int,
    floor: int = 0,
    alive: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Masks that keep exactly `keep` weights of largest magnitude, at least `floor` a layer.

    Args:
        alive: masks of what is still there; whatever is gone stays gone.
    """
    scores = {name: p.detach().abs() for name, p in params.items()}
    if alive is not None:
        scores = {name: s.masked_fill(~alive[name], -1.0) for name, s in scores.items()}
    masks = largest_by_name(scores, keep)
    if floor == 0:
        return masks
    size = sizes(scores) if alive is None else {n: int(m.sum()) for n, m in alive.items()}
    sparsity = {n: 1 - int(m.sum()) / size[n] for n, m in masks.items()}
    shares = minimum_threshold(sparsity, size, floor)
    counts = counts_from_densities({n: 1 - s for n, s in shares.items()}, size, keep)
    return per_tensor_masks(scores, counts)


def floor_of(total: int, min_weights: int | None, min_percent: float | None) -> int:
    """The minimum threshold m as a number of weights."""
    if min_weights is not None and min_percent is not None:
        raise InputError("min_percent", min_percent, "one of min_weights and min_percent")
    require(min_weights is None or min_weights >= 0, "min_weights", min_weights, "0 or more")
    require(min_percent is None or 0 <= min_percent < 100, "min_percent", min_percent, "0 to 100 %")
    return min_weights or int(total * (min_percent or 0.0) / 100)


def official_removal(asked: float) -> int:
    """How many weights go when the public code is asked for s·N: it keeps the last of them."""
    return max(int(asked), 1) - 1


@register(
    "global-mp",
    paper=PAPER,
    tags=Tags("U", "weight", "PAT", "mag", rounds="one_shot"),
    budgets=BUDGETS,
)
@dataclass(frozen=True)
class GlobalMagnitudePruning(Pruner):
    """One-shot: cut the trained network once, then fine-tune with the mask kept."""

    min_weights: int | None = option(None, "minimum threshold: least weights a layer", "weights")
    min_percent: float | None = option(
        None, "the same as a percentage of all prunable weights (the paper: 0.05)", "%"
    )
    count: Literal["exact", "official"] = option(
        "exact", "official: one weight fewer than asked, as the public code"
    )
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        floor_of(0, self.min_weights, self.min_percent)

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
        total = sum(p.numel() for p in params.values())
        keep = weights_to_keep(model, params, budget)
        if self.count == "official":
            asked = budget.value * total if budget.kind == "sparsity" else total - keep
            keep = total - official_removal(asked)
        floor = floor_of(total, self.min_weights, self.min_percent)
        return masked_outcome(model, Masks(global_magnitude_masks(params, keep, floor)))


@register(
    "global-mp-gradual",
    paper=PAPER,
    tags=Tags("U", "weight", "PDT", "mag", rounds="gradual"),
    budgets=BUDGETS,
)
@dataclass(frozen=True)
class GradualGlobalMagnitudePruning(TrainingPruner):
    """Gradual: the same ranking at a rising sparsity while the network trains.

    The paper's own schedule is not public; this is the cubic one of Zhu & Gupta with global
    ranking. Masks are monotone: what is cut stays cut.
    """

    begin: float = option(0.0, "start of the ramp: fraction of training, or a step above 1")
    end: float = option(0.75, "end of the ramp: fraction of training, or a step above 1")
    frequency: int = option(100, "steps between updates; lowered to give 20 updates", "steps")
    min_weights: int | None = option(None, "minimum threshold: least weights a layer", "weights")
    min_percent: float | None = option(None, "the same as a percentage of all weights", "%")
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        floor_of(0, self.min_weights, self.min_percent)

    def start(self, at: Attachment) -> None:
        ramp_steps(self.begin, self.end, self.frequency, at.total_steps)
        check_floor(sizes(at.params), at.masks.total - at.keep, self._floor(at))
        self._cut(at)

    def after_step(self, at: Attachment) -> None:
        self._cut(at)

    def _floor(self, at: Attachment) -> int:
        return floor_of(at.masks.total, self.min_weights, self.min_percent)

    def _cut(self, at: Attachment) -> None:
        begin, end, frequency = ramp_steps(self.begin, self.end, self.frequency, at.total_steps)
        schedule = Cubic(at.sparsity, begin, end, frequency=frequency)
        if not schedule.updates(at.step):
            return
        total = at.masks.total
        keep = at.keep if at.step >= end else total - round(schedule(at.step) * total)
        at.masks.update(global_magnitude_masks(at.params, keep, self._floor(at), at.masks))
