"""Pruning plasticity: how well a network recovers when it is pruned at a given moment.

Source: "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021,
arXiv 2106.10404, section 3: the quality after a share p of the weights was cut at step t and
the network was trained on for k steps, minus the quality just before the cut. Above 0 the
network has recovered fully. With regeneration, the cut is followed at once by one exchange of
connections: the smallest survivors go and as many grow where the gradient is largest, so both
arms have the same number of weights. A dense network that trains on stands beside them, because
k further steps help by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateurs.devices import device_of, to_device
from secateurs.errors import require
from secateurs.parts.allocation import largest_by_name, per_tensor_masks
from secateurs.parts.masks import Masks, named_parameters
from secateurs.parts.prunable import prunable_parameters
from secateurs.parts.regrowth import prune_and_regrow
from secateurs.parts.saliency import Probe
from secateurs.state import Tree, model_state
from secateurs.task import Task
from secateurs.training.keeping import MaskKeeper
from secateurs.training.loop import fit_once, own_randomness, total_steps
from secateurs.training.order import batches_from, mix
from secateurs.workspace import Workspace


def plasticity(
    model: nn.Module,
    task: Task,
    fraction: float,
    at: Sequence[int],
    steps: int,
    *,
    scope: Literal["global", "layer"] = "global",
    regrow_rate: float = 0.5,
    exclude: Sequence[str] = (),
    seed: int = 0,
    work: Workspace | None = None,
) -> list[dict[str, Any]]:
    """Plasticity of a training by ``task.training``, at several of its steps.

    The training is normal up to each moment and goes on normally after it: learning rate, data
    order and the optimizer's state are carried over, and removed weights stay zero.

    Args:
        model: holds the initial weights; borrowed for the trainings, its weights are changed.
        fraction: p, share of the prunable weights that is cut by magnitude.
        at: the moments t, in updates.
        steps: k, updates between the cut and the second measurement; 0 measures the bare cut.
        scope: rank all layers together, or each by itself.
        regrow_rate: share of a layer's survivors that are exchanged in the arm ``regrown``.
        exclude: regular expressions of weights to leave dense.

    Returns:
        A row a moment and arm (``dense``, ``pruned``, ``regrown``): quality before the cut and
        after the further steps, and their difference, signed so that more is better.

    Raises:
        InputError: a moment after which the training has no `steps` updates left.
    """
    total = total_steps(task, task.training)
    require(0 <= fraction < 1, "fraction", fraction, "a share in [0, 1)")
    require(0 <= regrow_rate < 1, "regrow_rate", regrow_rate, "a share in [0, 1)")
    require(steps >= 0, "steps", steps, "0 or more updates")
    require(scope in ("global", "layer"), "scope", scope, "global or layer")
    for moment in at:
        require(0 <= moment <= total - steps, "at", moment, f"steps from 0 to {total - steps}")
    work = work or Workspace()
    rows, last, optimizer = [], 0, None
    for moment in sorted(set(at)):
        reached = fit_once(
            model,
            task,
            task.training,
            seed=seed,
            start_step=last,
            stop_step=moment,
            work=work,
            name=f"to-{moment}",
            optimizer_state=optimizer,
            keep_optimizer=True,
        )
        last, optimizer = moment, reached.optimizer
        state, before = model_state(model), task.measure(model)[task.primary]
        dense = Masks.ones_like(prunable_parameters(model, exclude=exclude))
        pruned = cut(model, dense, fraction, scope)
        regrown = regenerated(model, pruned, task, regrow_rate, seed, moment)
        for arm, masks in (("dense", dense), ("pruned", pruned), ("regrown", regrown)):
            model.load_state_dict(state)
            after = _quality_after(
                model, masks, task, moment, steps, optimizer, seed, work, f"{arm}-{moment}"
            )
            gain = after - before if task.higher_is_better else before - after
            rows.append(
                {"step": moment, "arm": arm, "before": before, "after": after, "plasticity": gain}
            )
        model.load_state_dict(state)
    return rows


def cut(
    model: nn.Module, dense: Masks, fraction: float, scope: Literal["global", "layer"] | str
) -> Masks:
    """Masks without the `fraction` of least magnitude, of all weights or of each tensor's."""
    scores = {n: p.detach().abs() for n, p in named_parameters(model, dense).items()}
    if scope == "global":
        return Masks(largest_by_name(scores, dense.total - round(fraction * dense.total)))
    keep = {n: s.numel() - round(fraction * s.numel()) for n, s in scores.items()}
    return Masks(per_tensor_masks(scores, keep))


def regenerated(
    model: nn.Module, masks: Masks, task: Task, rate: float, seed: int, step: int
) -> Masks:
    """Masks after one exchange in each layer, by the dense gradient of the batch of `step`."""
    params = named_parameters(model, masks)
    masks.apply_(params)
    batch, _ = next(batches_from(task.training_loader(), seed, step))
    held = to_device(batch, device_of(model))
    with own_randomness():
        torch.manual_seed(mix(seed, step, 1))  # the dropout of that step
        growth = _gradients(Probe(model, params, [held], task.batch_loss))
    exchanged = {
        n: prune_and_regrow(p.detach(), masks[n], growth[n], rate) for n, p in params.items()
    }
    return Masks(exchanged)


def _gradients(probe: Probe) -> Mapping[str, Tensor]:
    """|∂L/∂w| on a copy of the model, so that running statistics are not touched."""
    twin, weights = probe.copy()
    for batch in probe.batches:
        probe.batch_loss(twin, batch).backward()
    return {n: w.grad.abs() for n, w in weights.items() if w.grad is not None}


def _quality_after(
    model: nn.Module,
    masks: Masks,
    task: Task,
    moment: int,
    steps: int,
    optimizer: Tree,
    seed: int,
    work: Workspace,
    name: str,
) -> float:
    """The primary metric once the masks are applied and `steps` updates are made under them."""
    fit_once(
        model,
        task,
        task.training,
        seed=seed,
        start_step=moment,
        stop_step=moment + steps,
        work=work,
        name=name,
        optimizer_state=optimizer,
        attach=lambda net, held, _: [
            MaskKeeper(net, held, masks.clone(), optimizer_state="zeroed")
        ],
    )
    return task.measure(model)[task.primary]
