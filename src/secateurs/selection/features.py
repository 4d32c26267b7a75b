"""Features of training samples, as a network that was trained on them sees them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, described, require
from secateurs.parts.costs import evaluating
from secateurs.selection.embeddings import Embeddings
from secateurs.selection.sources import from_arrays
from secateurs.task import Task
from secateurs.training.loop import own_randomness
from secateurs.training.order import mix
from secateurs.training.subset import in_order
from secateurs.workspace import Workspace


def training_embeddings(
    task: Task, model: nn.Module | None, *, seed: int = 0, work: Workspace | None = None
) -> Embeddings:
    """The training samples with their labels, numbered, and their features under `model`.

    Features are what goes into the last linear layer, averaged over tokens or pixels.

    Args:
        model: None where no features are wanted.
        seed: of what the data set draws.
        work: where the features are kept.

    Raises:
        InputError: the model has no linear layer, or targets are not one class a sample.
    """

    def compute() -> dict[str, Tensor]:
        with own_randomness():
            torch.default_generator.manual_seed(mix(seed, 4))
            return _read(task, model)

    read = (work or Workspace()).once("rows", compute)
    features = read.get("features")
    return from_arrays(
        None if features is None else features.numpy(),
        labels=read["labels"].numpy(),
        samples=task.training_loader().dataset,
    )


@torch.no_grad()
def _read(task: Task, model: nn.Module | None) -> dict[str, Tensor]:
    loader = in_order(task.training_loader())
    if model is None:
        return {"labels": torch.cat([_classes(task.unpack(batch)[1]) for batch in loader])}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    told = described("one without linear layers")
    require(bool(linear), "model", told, "one that ends in a linear layer, for embeddings")
    seen: list[Tensor] = []
    features, labels = [], []
    device = device_of(model)
    hook = linear[-1].register_forward_hook(lambda _, args, out: seen.append(args[0]))
    try:
        with evaluating(model):
            for batch in loader:
                inputs, target = task.unpack(batch)
                labels.append(_classes(target))
                seen.clear()
                task.forward(model, to_device(inputs, device))
                own = seen[-1].float()
                features.append(own.reshape(len(target), -1, own.shape[-1]).mean(1).cpu())
    finally:
        hook.remove()
    return {"features": torch.cat(features), "labels": torch.cat(labels)}


def _classes(target: object) -> Tensor:
    if not isinstance(target, Tensor) or target.ndim != 1:
        raise InputError("labels", described("targets of another kind"), "a class a sample")
    return target.cpu()
