"""How good a compressed data set is to train on, hard labels or a teacher's, under one protocol.

From arXiv 2502.06434 and its code (Rethinking-Dataset-Compression): every method gets as many
images, of one resolution, and one recipe.

    hard   cross entropy on the stored labels; AdamW, rate 10⁻³, weight decay 0.01 (none of biases
           and norms), a cosine, 300 epochs of batches of 128, no mixing of images
    soft   the same on images that CutMix has mixed, with τ = 20 and labels unused:
           KL(softmax(teacher / τ) ‖ softmax(student / τ)), without the factor τ²

The labels of a random subset and of both kinds belong into every comparison, and so do the bytes
that stored labels take: of soft labels, that of every view that training will see.
Decided here: the cosine falls with every update, the code's with every epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from secateurs.devices import device_of
from secateurs.errors import described, require
from secateurs.settings import TrainSettings, check_choices, option
from secateurs.task import Task, logits_of
from secateurs.training.distillation import distilled
from secateurs.training.loop import fit_once
from secateurs.training.order import sample_count
from secateurs.workspace import Workspace

RECIPE = TrainSettings(
    epochs=300, optimizer="adamw", lr=1e-3, weight_decay=0.01, decayed="matrices"
)


@dataclass(frozen=True)
class Protocol:
    """How every compressed set is trained on."""

    labels: Literal["hard", "soft"] = option("hard", "the stored labels, or a teacher's")
    mixing: Literal["auto", "none", "cutmix"] = option(
        "auto", "of images: cutmix where labels are soft, or as said"
    )
    temperature: float = option(20.0, "tau of soft labels")
    batch_size: int = option(128, "of a training batch", "images")
    recipe: TrainSettings = RECIPE

    def __post_init__(self) -> None:
        check_choices(self)
        require(self.labels == "soft" or self.mixing != "cutmix", "mixing", self.mixing,
                "none with hard labels, which are not mixed")  # fmt: skip
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")

    def task(self, task: Task, data: Dataset[Any], teacher: nn.Module | None = None) -> Task:
        """`task`, trained on `data`, (image, class) a sample.

        Raises:
            InputError: soft labels without a teacher.
        """
        soft = self.labels == "soft"
        told = described("none" if teacher is None else "a network")
        accepted = "a network for soft labels, none for hard ones"
        require(soft == (teacher is not None), "teacher", told, accepted)
        mixed = soft and self.mixing != "none"
        collate = mixed_batch if mixed else default_collate
        rows = sample_count(data)
        loader = DataLoader(data, min(self.batch_size, rows), shuffle=True, collate_fn=collate)
        own = replace(task, train=loader, split=None, training=self.recipe)
        if teacher is None:
            return own
        return distilled(own, teacher, alpha=1.0, temperature=self.temperature,
                         reduction="samples", scaled=False)  # fmt: skip

    def compare(
        self,
        task: Task,
        sets: Mapping[str, Dataset[Any]],
        teacher: nn.Module | None = None,
        *,
        seeds: Sequence[int] = (0,),
        work: Workspace | None = None,
    ) -> list[dict[str, Any]]:
        """A fresh model of `task` trained on every set with every seed, a record each.

        Returns:
            Records of ``set``, ``labels``, ``seed``, ``images``, ``image_bytes`` (of the pixels
            as they are in memory), ``label_bytes``, ``updates`` and the metrics.

        Raises:
            InputError: sets of different sizes.
        """
        sizes = {name: sample_count(data) for name, data in sets.items()}
        require(len(set(sizes.values())) == 1, "sets", sizes, "as many images in each")
        records, work = [], work or Workspace()
        for name, data in sets.items():
            own = self.task(task, data, teacher)
            for seed in seeds:
                model = task.fresh_model(seed)
                trained = fit_once(model, own, own.training, seed=seed,
                                   work=work.child(f"{self.labels}-{seed}"), name=name)  # fmt: skip
                updates, size = trained.history.steps, sizes[name]
                metrics = task.measure(model)
                classes = _outputs(task, model)
                views = math.ceil(updates * min(self.batch_size, size) / size)
                records.append({
                    "set": name, "labels": self.labels, "seed": seed, "images": size,
                    "image_bytes": image_bytes(data), "updates": updates,
                    "label_bytes": label_bytes(size, classes if teacher else 0, views), **metrics,
                })  # fmt: skip
        return records


def label_bytes(images: int, classes: int, views: int) -> int:
    """Of labels that are stored: eight an image; soft ones two a class for every view."""
    return 2 * classes * images * views if classes else 8 * images


def image_bytes(data: Any) -> int:
    """Of all images as they are held in memory, before a transform."""
    images = getattr(data, "images", None)
    if isinstance(images, Tensor):
        return images.numel() * images.element_size()
    return sum(x.numel() * x.element_size() for x, _ in (data[n] for n in range(len(data))))


@torch.no_grad()
def _outputs(task: Task, model: nn.Module) -> int:
    inputs = task.example_inputs.to(device_of(model))
    return int(logits_of(task.forward(model.eval(), inputs)).shape[-1])


def mixed_batch(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch whose images CutMix has mixed; its labels are those from before."""
    images, labels = default_collate(samples)
    return cut_mix(images), labels


def cut_mix(images: Tensor, alpha: float = 1.0) -> Tensor:
    """Into every image the same box of another one is pasted (Yun et al., arXiv 1905.04899).

    The box has √(1 − λ) of each side, λ of Beta(α, α), its centre anywhere; what lies outside
    is cut off. It draws from torch's generator.

    Args:
        images: (N, C, H, W).
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    cut, made = math.sqrt(1 - share), images.clone()
    spans = []
    for length in images.shape[-2:]:
        centre, half = int(torch.randint(length, ())), int(length * cut) // 2
        spans.append(slice(max(centre - half, 0), min(centre + half, length)))
    other = torch.randperm(len(images))
    made[:, :, spans[0], spans[1]] = images[other][:, :, spans[0], spans[1]]
    return made
