"""How stable a subnetwork is: to pruning, to data order, along the line between two solutions.

Source: "Stabilizing the Lottery Ticket Hypothesis", arXiv 1903.01611, sections 3 and 4, and the
barrier of "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671.
Distances are over surviving prunable weights only. With normalisation layers the scale of a
weight means little, so the angle stands beside the distance.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described, require
from secateurs.parts.masks import Masks
from secateurs.task import Task
from secateurs.training.order import mix
from secateurs.training.rounds import masked_state, random_masks_like, train_masked
from secateurs.workspace import Workspace

State = Mapping[str, Tensor]


def distance(
    a: State, b: State, masks: Mapping[str, Tensor], metric: Literal["l2", "angle"] = "l2"
) -> float:
    """Distance of two states over the surviving weights: Euclidean, or the angle in degrees.

    Raises:
        InputError: a masked tensor is missing from one of them, nothing survives, or unknown
            metric.
    """
    require(metric in ("l2", "angle"), "metric", metric, "l2 or angle")
    for name in masks:
        if name not in a or name not in b:
            raise InputError("state", name, "two states with the masked tensors")
    if not any(bool(m.any()) for m in masks.values()):
        raise InputError("masks", described("no survivor"), "masks with at least one survivor")
    x = torch.cat([a[n][m.to(a[n].device)].double() for n, m in masks.items()])
    y = torch.cat([b[n][m.to(b[n].device)].double() for n, m in masks.items()]).to(x.device)
    if metric == "l2":
        return float((x - y).norm())
    # atan2 keeps small angles exact, where arccos of a cosine near 1 would not be
    u, v = x / x.norm(), y / y.norm()
    return math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))


def stability(
    model: nn.Module,
    task: Task,
    state: State,
    masks: Masks,
    *,
    start_step: int = 0,
    samples: int = 3,
    seed: int = 0,
    work: Workspace | None = None,
) -> list[dict[str, Any]]:
    """Stability to pruning and to data order of a mask and of random masks of its layer sizes.

    To pruning: the dense network and the subnetwork are trained from `state` with the same
    data order u. To data order: the subnetwork is trained with pairs of orders u, u'.

    Args:
        model: borrowed for the trainings; its weights are changed.
        state: the dense weights at `start_step`.
        masks: of the subnetwork.
        samples: data orders; all pairs of them are compared (3 in the paper for pruning).

    Returns:
        A row a mask and kind: mean, min and max of the distance, mean angle, mean quality.
    """
    require(samples >= 2, "samples", samples, "at least 2 data orders")
    work = work or Workspace()
    ones = Masks({n: torch.ones_like(m) for n, m in masks.items()})

    def train(name: str, kept: Masks, order: int) -> tuple[State, float]:
        model.load_state_dict(masked_state(state, kept))
        done = train_masked(
            model,
            kept,
            task,
            seed=mix(seed, order, 7),
            start_step=start_step,
            work=work,
            name=f"{name}-{order}",
        )
        return done.trained, done.metrics[task.primary]

    orders = range(samples)
    dense = [train("dense", ones, u)[0] for u in orders]
    rows = []
    for name, kept in (("method", masks), ("random", random_masks_like(masks, mix(seed, 8)))):
        trained = [train(name, kept, u) for u in orders]
        states = [s for s, _ in trained]
        quality = statistics.fmean(q for _, q in trained)
        to_pruning = list(zip(dense, states, strict=True))
        to_order = list(itertools.combinations(states, 2))
        for kind, pairs in (("pruning", to_pruning), ("data order", to_order)):
            lengths = [distance(a, b, kept) for a, b in pairs]
            rows.append(
                {
                    "mask": name,
                    "to": kind,
                    "distance": statistics.fmean(lengths),
                    "min": min(lengths),
                    "max": max(lengths),
                    "angle": statistics.fmean(distance(a, b, kept, "angle") for a, b in pairs),
                    task.primary: quality,
                }
            )
    return rows


def interpolation_barrier(
    a: State, b: State, error: Callable[[State], float], points: int = 30
) -> tuple[float, list[float]]:
    """The barrier on the straight line between two states, and the errors along it.

    barrier = max over α of error(α a + (1 − α) b) − mean of the two end errors, for `points`
    evenly spaced α from 0 to 1. Where the model has running statistics, `error` must refresh
    them before it evaluates.

    Raises:
        InputError: the states have different tensors, or fewer than 2 points.
    """
    require(points >= 2, "points", points, "at least 2")
    if set(a) != set(b):
        raise InputError("state", sorted(set(a) ^ set(b))[0], "two states of one model")
    errors = []
    for step in range(points):
        alpha = step / (points - 1)
        errors.append(error(interpolate(a, b, alpha)))
    return max(errors) - (errors[0] + errors[-1]) / 2, errors


def interpolate(a: State, b: State, alpha: float) -> dict[str, Tensor]:
    """α a + (1 − α) b, tensor by tensor; integers (counters) are those of `a`."""
    if alpha in (0, 1):
        return {n: t.clone() for n, t in (a if alpha == 1 else b).items()}
    return {
        n: torch.lerp(b[n], t, alpha) if t.is_floating_point() else t.clone() for n, t in a.items()
    }
