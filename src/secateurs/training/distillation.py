"""Learning from a teacher's soft labels (Hinton et al., arXiv 1503.02531).

    loss = (1 − α) · task loss + α · τ² · KL(softmax(teacher / τ) ‖ softmax(student / τ))

The KL divergence is a sum over classes; the factor τ² keeps its gradients of one size for any
τ. How it is averaged is said, not guessed: DeiT's public code divides by samples x classes
(``elements``), Hinton et al. by samples (``samples``), which is as many times more as there are
classes. At α = 0 the teacher is not asked, at α = 1 the labels are not looked at.

The teacher sees the very inputs that the student sees, augmented alike, unless its answers are
stored (`with_stored_answers`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, described, require
from secateurs.state import Tree
from secateurs.task import Task, logits_of
from secateurs.training.order import mix
from secateurs.training.subset import BATCH, ROWS, in_order, numbered
from secateurs.workspace import Workspace

Reduction = Literal["samples", "elements", "sum"]


def soft_label_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "samples",
    *,
    scaled: bool = True,
) -> Tensor:
    """τ² · KL(softmax(teacher / τ) ‖ softmax(student / τ)) over the last dimension.

    Args:
        student, teacher: logits of the same shape (..., classes).
        temperature: τ, above 0.
        reduction: divide the sum by the number of samples (or tokens), by that of all entries,
            or not at all.
        scaled: whether the factor τ² is there; some codes leave it out.
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
    return divergence * (temperature**2 if scaled else 1.0) / count


@dataclass(frozen=True)
class DistilledTask(Task):
    """A task whose training loss listens to a teacher too; it is evaluated as before.

    Attributes:
        teacher: takes the same inputs and gives logits of the same shape.
        alpha: share of the teacher in the loss.
        temperature, reduction, scaled: of `soft_label_loss`.
        answers: (samples, ...), what the teacher says of every training sample, where it is
            not to be asked again; training batches then carry the numbers of their samples.
    """

    teacher: nn.Module | None = None
    alpha: float = 0.5
    temperature: float = 1.0
    reduction: Reduction = "elements"
    scaled: bool = True
    answers: Tensor | None = None

    def batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """(1 − α) · task loss + α · soft-label loss, with its graph."""
        rows: Tensor | None = None
        if self.answers is not None:
            batch, rows = batch[BATCH], batch[ROWS]
        inputs, target = self.unpack(batch)
        output = self.forward(model, inputs)
        if self.alpha == 0:
            return self.loss(output, target)
        student = logits_of(output)
        if self.answers is not None and rows is not None:
            taught = self.answers[rows.cpu()].to(student.device)
        else:
            taught = self.taught(inputs, student.device)
        soft = soft_label_loss(
            student, taught, self.temperature, self.reduction, scaled=self.scaled
        )
        if self.alpha == 1:
            return soft
        return (1 - self.alpha) * self.loss(output, target) + self.alpha * soft

    @torch.no_grad()
    def taught(self, inputs: Any, device: torch.device) -> Tensor:
        """The teacher's logits."""
        assert self.teacher is not None
        return logits_of(self.forward(self.teacher.to(device), inputs))


def distilled(
    task: Task,
    teacher: nn.Module,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    reduction: Reduction = "elements",
    scaled: bool = True,
) -> DistilledTask:
    """`task` with a copy of `teacher`, in eval mode, as a second source of labels."""
    require(0 <= alpha <= 1, "alpha", alpha, "a share in [0, 1]")
    require(temperature > 0, "temperature", temperature, "above 0")
    frozen = copy.deepcopy(teacher).eval().requires_grad_(False)
    return DistilledTask(
        **_own_fields(task), teacher=frozen, alpha=alpha, temperature=temperature,
        reduction=reduction, scaled=scaled,
    )  # fmt: skip


def undistilled(task: Task) -> Task:
    """The task that `distilled` was given; any other as it is.

    Raises:
        InputError: the teacher's answers are stored in its batches.
    """
    if not isinstance(task, DistilledTask):
        return task
    require(
        task.answers is None, "task", described("one with stored answers"), "the task before that"
    )
    return Task(**_own_fields(task))


def _own_fields(task: Task) -> dict[str, Any]:
    return {f.name: getattr(task, f.name) for f in fields(Task)}


def with_stored_answers(
    task: DistilledTask, *, seed: int = 0, work: Workspace | None = None
) -> DistilledTask:
    """The same, with the teacher asked once about every training sample, as it is read once.

    Where the data set augments, that is one view of many.

    Args:
        seed: of what the data set draws.
        work: where the answers are kept.

    Raises:
        InputError: an answer is not finite.
    """

    def compute() -> Tree:
        assert task.teacher is not None
        device = device_of(task.teacher)
        answers = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(seed, 3))
            for batch in in_order(task.training_loader()):
                inputs, _ = task.unpack(to_device(batch, device))
                answers.append(task.taught(inputs, device).cpu())
        return {"answers": torch.cat(answers)}

    answers = (work or Workspace()).once("answers", compute)["answers"]
    check_answers(answers)
    return replace(task, train=numbered(task), answers=answers)


def check_answers(logits: Tensor) -> None:
    """Refuse a teacher whose logits have NaN or Inf.

    Raises:
        InputError: the first such sample is named.
    """
    wrong = ~torch.isfinite(logits).flatten(1).all(1)
    if bool(wrong.any()):
        told = described(f"NaN or Inf for sample {int(wrong.nonzero()[0])}")
        raise InputError("teacher", told, "finite logits")
