"""A task: model, data, loss and metrics. Whatever trains or scores goes through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, described, require, unknown
from secateurs.settings import TrainSettings

Loss = Callable[[Any, Tensor], Tensor]
"""(model output, target) -> scalar mean over the batch."""

Split = Callable[[Any], tuple[Any, Any]]
"""batch -> (inputs, target)."""


def _identity(value: float) -> float:
    return value


@dataclass(frozen=True)
class Metric:
    """A mean over samples.

    Attributes:
        each: (output, target) -> one value per sample (or token), any shape.
        finish: applied to the mean over the whole evaluation set, such as exp for perplexity.
        higher_is_better: the direction of quality.
    """

    each: Callable[[Any, Any], Tensor]
    finish: Callable[[float], float] = _identity
    higher_is_better: bool = True


@dataclass(frozen=True)
class Task:
    """What is to be done well.

    Attributes:
        model: a module, or a function without arguments that makes one with fresh weights
            (drawn from torch's global generator, which the library seeds).
        train: loader of training batches; None where only evaluation is needed.
        evaluate: loader of held-out batches.
        loss: (output, target) -> mean loss.
        metrics: by name; `primary` is the one that decides.
        example_inputs: a batch of inputs as the model takes them, for costs and traces.
        primary: name of the deciding metric.
        split: batch -> (inputs, target); by default pairs and dictionaries with ``labels``.
        training: how the model is trained from scratch.
        finetuning: how a pruned model recovers.
        resize: width multiplier -> a model of the same family with fresh weights; what the
            small-dense baseline needs.
        name: for reports.
        losses: of the tasks that the model serves, by name, where there are several; `loss` is
            their sum.
    """

    model: nn.Module | Callable[[], nn.Module]
    train: DataLoader[Any] | None
    evaluate: DataLoader[Any]
    loss: Loss
    metrics: Mapping[str, Metric]
    example_inputs: Any
    primary: str = "accuracy"
    split: Split | None = None
    training: TrainSettings = field(default_factory=TrainSettings)
    finetuning: TrainSettings = field(default_factory=lambda: TrainSettings(lr=0.01, epochs=3))
    resize: Callable[[float], nn.Module] | None = None
    name: str = "task"
    losses: Mapping[str, Loss] | None = None

    def __post_init__(self) -> None:
        if self.primary not in self.metrics:
            raise unknown("primary", self.primary, self.metrics)

    def fresh_model(self, seed: int) -> nn.Module:
        """A model with the weights that `seed` draws; the global generator is left as it was.

        Raises:
            InputError: the task holds a module, not a function that makes one.
        """
        if isinstance(self.model, nn.Module):
            raise InputError(
                "task.model", described("a module"), "a function that returns a fresh model"
            )
        return seeded(self.model, seed)

    def starting_model(self, seed: int) -> nn.Module:
        """The given module, or a fresh one."""
        return self.model if isinstance(self.model, nn.Module) else self.fresh_model(seed)

    def training_loader(self) -> DataLoader[Any]:
        """The training loader.

        Raises:
            InputError: the task has none.
        """
        if self.train is None:
            raise InputError("task.train", None, "a loader of training batches")
        return self.train

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """Inputs and target of a batch."""
        return self.split(batch) if self.split is not None else split_batch(batch)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """The model's output for inputs on any device; dictionaries are keyword arguments."""
        inputs = to_device(inputs, device_of(model))
        return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)

    def batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch on any device, with its graph."""
        inputs, target = self.unpack(to_device(batch, device_of(model)))
        return self.loss(self.forward(model, inputs), target)

    def measure(self, model: nn.Module, loader: Iterable[Any] | None = None) -> dict[str, float]:
        """Loss and metrics over `loader` (the evaluation set by default), in eval mode.

        The model's mode is restored. Samples count equally, whatever the batch sizes.
        """
        device = device_of(model)
        sums = dict.fromkeys(self.metrics, 0.0)
        counts = dict.fromkeys(self.metrics, 0)
        loss, samples = 0.0, 0
        with _evaluating(model):
            for batch in self.evaluate if loader is None else loader:
                inputs, target = self.unpack(to_device(batch, device))
                output = self.forward(model, inputs)
                size = batch_size(target)
                loss += float(self.loss(output, target)) * size
                samples += size
                for name, metric in self.metrics.items():
                    values = metric.each(output, target)
                    sums[name] += float(values.double().sum())
                    counts[name] += values.numel()
        require(samples > 0, "task.evaluate", described("an empty loader"), "at least one batch")
        means = {n: m.finish(sums[n] / max(counts[n], 1)) for n, m in self.metrics.items()}
        return {**means, "loss": loss / samples}

    @property
    def named_losses(self) -> Mapping[str, Loss]:
        """The losses of the tasks that the model serves: `losses`, or the only one as ``loss``."""
        return self.losses or {"loss": self.loss}

    def measure_losses(
        self, model: nn.Module, loader: Iterable[Any] | None = None
    ) -> dict[str, float]:
        """The mean of each of `named_losses` over `loader`, as `measure` takes it."""
        device = device_of(model)
        sums, samples = dict.fromkeys(self.named_losses, 0.0), 0
        with _evaluating(model):
            for batch in self.evaluate if loader is None else loader:
                inputs, target = self.unpack(to_device(batch, device))
                output = self.forward(model, inputs)
                size = batch_size(target)
                samples += size
                for name, loss in self.named_losses.items():
                    sums[name] += float(loss(output, target)) * size
        require(samples > 0, "task", described("no batches"), "at least one batch")
        return {name: total / samples for name, total in sums.items()}

    def with_model(self, model: nn.Module | Callable[[], nn.Module]) -> Task:
        """The same task for another model."""
        return replace(self, model=model)

    @property
    def higher_is_better(self) -> bool:
        """Direction of the primary metric."""
        return self.metrics[self.primary].higher_is_better


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; a loader that shuffles does so the same way every time."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        for module, training in modes:
            module.training = training


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Call `make` under a seed and leave torch's generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, target) of a pair, or of a dictionary with ``labels``."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise InputError("batch", described(f"keys {sorted(batch)}"), "a key 'labels'")
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    raise InputError(
        "batch",
        described(type(batch).__name__),
        "a pair (inputs, target), a dictionary with 'labels', or Task(split=...)",
    )


def batch_size(value: Any) -> int:
    """Number of samples of a nested batch: the first dimension of its first tensor."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else 1
    if isinstance(value, Mapping):
        return batch_size(next(iter(value.values())))
    if isinstance(value, list | tuple):
        return batch_size(value[0])
    raise InputError("batch", described(type(value).__name__), "tensors")


def logits_of(output: Any) -> Tensor:
    """The logits: the output itself, or the field ``logits`` of a transformers output.

    Raises:
        InputError: there is no such field.
    """
    if isinstance(output, Tensor):
        return output
    mapped = isinstance(output, Mapping)
    found = output.get("logits") if mapped else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        fields = f" with {', '.join(map(str, output))}" if mapped else ""
        told = described(f"a {type(output).__name__}{fields}")
        raise InputError("output of the model", told, "a tensor, or an output with logits")
    return found


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Cross entropy over the last class dimension of (N, C) logits."""

    def loss(output: Any, target: Tensor) -> Tensor:
        logits = logits_of(output)
        accepted = f"0 to {logits.shape[-1] - 1}, the model's outputs"
        if target.is_cuda and not target.is_floating_point():
            # torch checks every label on a CPU; on a GPU it can only abort the process
            highest = int(target.max())
            require(highest < logits.shape[-1], "labels", highest, accepted)
        try:
            return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
        except IndexError:
            raise InputError("labels", int(target.max()), accepted) from None

    return loss


def _correct(output: Any, target: Tensor) -> Tensor:
    return (logits_of(output).argmax(-1) == target).float()


def _token_loss(output: Any, target: Tensor) -> Tensor:
    logits = logits_of(output)
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none")


def classification(
    model: nn.Module | Callable[[], nn.Module],
    train: DataLoader[Any] | None,
    evaluate: DataLoader[Any],
    *,
    label_smoothing: float = 0.0,
    example_inputs: Any = None,
    **fields: Any,
) -> Task:
    """A classification task with cross entropy and top-1 accuracy."""
    if example_inputs is None:
        example_inputs = first_inputs(evaluate)
    return Task(
        model=model,
        train=train,
        evaluate=evaluate,
        loss=cross_entropy(label_smoothing),
        metrics={"accuracy": Metric(_correct)},
        example_inputs=example_inputs,
        **fields,
    )


def language_modelling(
    model: nn.Module | Callable[[], nn.Module],
    train: DataLoader[Any] | None,
    evaluate: DataLoader[Any],
    *,
    example_inputs: Any = None,
    **fields: Any,
) -> Task:
    """Next-token prediction: batches are (tokens, targets), both (N, T); perplexity decides."""
    if example_inputs is None:
        example_inputs = first_inputs(evaluate)

    def loss(output: Any, target: Tensor) -> Tensor:
        return _token_loss(output, target).mean()

    perplexity = Metric(_token_loss, lambda nll: math.exp(min(nll, 700.0)), False)
    return Task(
        model=model,
        train=train,
        evaluate=evaluate,
        loss=loss,
        metrics={"perplexity": perplexity},
        example_inputs=example_inputs,
        primary="perplexity",
        **fields,
    )


def multitask(
    model: nn.Module | Callable[[], nn.Module],
    train: DataLoader[Any] | None,
    evaluate: DataLoader[Any],
    losses: Mapping[str, Loss],
    metrics: Mapping[str, Metric],
    *,
    example_inputs: Any = None,
    **fields: Any,
) -> Task:
    """Several tasks of one model: its loss is the sum of theirs, the first metric decides.

    Args:
        losses: (output, target) -> mean loss, by task; a weight is a factor inside.
        metrics: of any of them.

    Raises:
        InputError: no loss, or no metric.
    """
    require(bool(losses), "losses", described("none"), "a loss for every task")
    require(bool(metrics), "metrics", described("none"), "at least one metric")

    def loss(output: Any, target: Any) -> Tensor:
        return torch.stack([own(output, target) for own in losses.values()]).sum()

    return Task(
        model=model,
        train=train,
        evaluate=evaluate,
        loss=loss,
        metrics=metrics,
        example_inputs=first_inputs(evaluate) if example_inputs is None else example_inputs,
        losses=dict(losses),
        **{"primary": next(iter(metrics)), **fields},
    )


def joint_classification(
    model: nn.Module | Callable[[], nn.Module],
    train: DataLoader[Any] | None,
    evaluate: DataLoader[Any],
    heads: Mapping[str, int],
    *,
    label_smoothing: float = 0.0,
    **fields: Any,
) -> Task:
    """Several classifications by one model, whose logits lie side by side.

    Targets are (N, tasks). ``accuracy`` is the mean over the tasks, and that of each task is
    under its name.

    Args:
        heads: number of classes by task, in the order of logits and targets.
    """
    losses: dict[str, Loss] = {}
    metrics: dict[str, Metric] = {}
    corrects: list[Callable[[Any, Any], Tensor]] = []
    entropy, first = cross_entropy(label_smoothing), 0
    for column, (name, classes) in enumerate(heads.items()):
        own, first = slice(first, first + classes), first + classes

        def loss(output: Any, target: Tensor, own: slice = own, column: int = column) -> Tensor:
            return entropy(logits_of(output)[..., own], target[:, column])

        def correct(output: Any, target: Tensor, own: slice = own, column: int = column) -> Tensor:
            return _correct(logits_of(output)[..., own], target[:, column])

        losses[name], metrics[f"{name} accuracy"] = loss, Metric(correct)
        corrects.append(correct)

    def mean(output: Any, target: Tensor) -> Tensor:
        return torch.stack([own(output, target) for own in corrects]).mean(0)

    shown = {"accuracy": Metric(mean), **metrics}
    return multitask(model, train, evaluate, losses, shown, **fields)


def first_inputs(loader: DataLoader[Any]) -> Any:
    """One sample of inputs from a loader, with a batch dimension of 1."""
    inputs, _ = split_batch(next(iter(loader)))
    return head(inputs, 1)


def head(value: Any, count: int) -> Any:
    """The first `count` samples of a nested batch."""
    if isinstance(value, Tensor):
        return value[:count]
    if isinstance(value, Mapping):
        return {k: head(v, count) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(head(v, count) for v in value)
    return value
