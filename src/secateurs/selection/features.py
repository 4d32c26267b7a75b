"""Features of samples, as a network sees them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described, require
from secateurs.parts.costs import evaluating
from secateurs.selection.embeddings import Embeddings
from secateurs.selection.sources import from_arrays
from secateurs.task import Task, batch_size
from secateurs.training.loop import own_randomness
from secateurs.training.order import mix
from secateurs.training.subset import in_order
from secateurs.workspace import Workspace

Take = Literal["features", "outputs"]
"""What of a network is an embedding: what goes into its last linear layer, averaged over tokens or
pixels; or what comes out of it, a vector a sample."""


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
    read = (work or Workspace()).once("rows", lambda: read_rows(task, model, seed=seed))
    if "labels" not in read:
        raise InputError("labels", described("targets of another kind"), "a class a sample")
    features = read.get("vectors")
    return from_arrays(
        None if features is None else features.numpy(),
        labels=read["labels"].numpy(),
        samples=task.training_loader().dataset,
    )


@torch.no_grad()
def read_rows(
    task: Task, model: nn.Module | None, take: Take = "features", *, seed: int = 0
) -> dict[str, Tensor]:
    """Training samples in their order, on the CPU.

    Args:
        model: None where no embeddings are wanted.
        take: which part of it is the embedding.
        seed: of what the data set draws.

    Returns:
        ``labels`` (n,), where targets are one class a sample; ``vectors`` (n, width), float32,
        where there is a model.

    Raises:
        InputError: the model has no linear layer for its features, or its outputs are not one
            vector a sample.
    """
    vectors, labels = [], []
    with own_randomness():
        torch.default_generator.manual_seed(mix(seed, 4))
        loader = in_order(task.training_loader())
        if model is None:
            labels = [task.unpack(batch)[1] for batch in loader]
        else:
            reader = _Reader(task, model, take)
            with evaluating(model):
                for batch in loader:
                    inputs, target = task.unpack(batch)
                    labels.append(target)
                    vectors.append(reader(inputs, batch_size(target)))
    found = {"vectors": torch.cat(vectors)} if vectors else {}
    if all(isinstance(target, Tensor) and target.ndim == 1 for target in labels):
        found["labels"] = torch.cat([target.cpu() for target in labels])
    return found


class _Reader:
    """From a batch of inputs to its embeddings."""

    def __init__(self, task: Task, model: nn.Module, take: Take) -> None:
        self.task, self.model, self.take = task, model, take
        self.linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        told = described("one without linear layers")
        good = take == "outputs" or bool(self.linear)
        require(good, "model", told, "one that ends in a linear layer, for embeddings")

    def __call__(self, inputs: object, count: int) -> Tensor:
        if self.take == "outputs":
            output = self.task.forward(self.model, inputs)
            told = getattr(output, "shape", type(output).__name__)
            good = isinstance(output, Tensor) and output.ndim == 2 and len(output) == count
            shape = tuple(told) if isinstance(told, torch.Size) else told
            told = described(f"outputs of shape {shape} of {count} samples")
            require(good, "model", told, "one whose outputs are a vector a sample")
            return output.float().cpu()
        seen: list[Tensor] = []
        hook = self.linear[-1].register_forward_hook(lambda _, args, out: seen.append(args[0]))
        try:
            self.task.forward(self.model, inputs)
        finally:
            hook.remove()
        require(bool(seen), "model", described("one that does not call its last linear layer"),
                "one that ends in a linear layer, for embeddings")  # fmt: skip
        own = seen[-1].float()
        return own.reshape(count, -1, own.shape[-1]).mean(1).cpu()
