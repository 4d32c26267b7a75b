"""Learning from a teacher's soft labels (Hinton et al., arXiv 1503.02531).

    loss = (1 − α) · task loss + α · τ² · KL(softmax(teacher / τ) ‖ softmax(student / τ))

The KL divergence is a sum over classes; the factor τ² keeps its gradients of one size for any
τ. How it is averaged is said, not guessed: DeiT's public code divides by samples x classes
(``elements``), Hinton et al. by samples (``samples``), which is as many times more as there are
classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.errors import described, require
from secateurs.task import Task, logits_of

Reduction = Literal["samples", "elements", "sum"]


def soft_label_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: Reduction = "samples"
) -> Tensor:
    """τ² · KL(softmax(teacher / τ) ‖ softmax(student / τ)) over the last dimension.

    Args:
        student, teacher: logits of the same shape (..., classes).
        temperature: τ, above 0.
        reduction: divide the sum by the number of samples (or tokens), by that of all entries,
            or not at all.
    """
    require(temperature > 0, "temperature", temperature, "above 0")
    shapes = described(f"{tuple(student.shape)} and {tuple(teacher.shape)}")
    require(student.shape == teacher.shape, "logits", shapes, "student and teacher of one shape")
    divergence = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    entries = student.numel()
    count = {"samples": entries // student.shape[-1], "elements": entries, "sum": 1}[reduction]
    return divergence * temperature**2 / count


@dataclass(frozen=True)
class DistilledTask(Task):
    """A task whose training loss listens to a teacher too; it is evaluated as before.

    Attributes:
        teacher: takes the same inputs and gives logits of the same shape.
        alpha: share of the teacher in the loss.
        temperature, reduction: of `soft_label_loss`.
    """

    teacher: nn.Module | None = None
    alpha: float = 0.5
    temperature: float = 1.0
    reduction: Reduction = "elements"

    def batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """(1 − α) · task loss + α · soft-label loss, with its graph."""
        assert self.teacher is not None
        inputs, target = self.unpack(batch)
        output = self.forward(model, inputs)
        student = logits_of(output)
        self.teacher.to(student.device)
        with torch.no_grad():
            taught = logits_of(self.forward(self.teacher, inputs))
        soft = soft_label_loss(student, taught, self.temperature, self.reduction)
        return (1 - self.alpha) * self.loss(output, target) + self.alpha * soft


def distilled(
    task: Task,
    teacher: nn.Module,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    reduction: Reduction = "elements",
) -> DistilledTask:
    """`task` with a copy of `teacher`, in eval mode, as a second source of labels."""
    require(0 <= alpha <= 1, "alpha", alpha, "a share in [0, 1]")
    require(temperature > 0, "temperature", temperature, "above 0")
    own = {f.name: getattr(task, f.name) for f in fields(Task)}
    frozen = copy.deepcopy(teacher).eval().requires_grad_(False)
    return DistilledTask(
        **own, teacher=frozen, alpha=alpha, temperature=temperature, reduction=reduction
    )
