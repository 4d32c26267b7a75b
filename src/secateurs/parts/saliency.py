"""Saliency: a score per weight, higher means keep.

All functions share one signature, (`Probe`) -> scores by name. A `Probe` holds what any of
them may look at: the weights, and where gradients are needed the model, a loss over batches
and a generator. The user's model is never touched: gradients are taken on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.devices import to_device
from secateurs.errors import InputError, described, require, unknown
from secateurs.parts.masks import named_parameters

BatchLoss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> mean loss of the batch."""


@dataclass(frozen=True)
class Probe:
    """What a saliency may look at.

    Attributes:
        model: the network.
        params: its prunable weights by name.
        batches: batches for the data-driven scores, read as often as needed.
        loss: (model, batch) -> mean loss.
        example_inputs: inputs of one sample, for data-free scores that run the model.
        generator: source of randomness, on the CPU.
        masks: weights that are already gone (scores there are still returned).
    """

    model: nn.Module
    params: Mapping[str, nn.Parameter]
    batches: Iterable[Any] = ()
    loss: BatchLoss | None = None
    example_inputs: Any = None
    generator: torch.Generator | None = None
    masks: Mapping[str, Tensor] | None = None

    def copy(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """A copy of the model in training mode without gradients, and its prunable weights."""
        twin = copy.deepcopy(self.model).train()
        if dtype is not None:
            twin = twin.to(dtype)
        twin.zero_grad(set_to_none=True)
        for parameter in twin.parameters():
            parameter.requires_grad_(True)
        return twin, named_parameters(twin, self.params)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.params.values())).device

    def batch_list(self, name: str) -> list[Any]:
        """The batches, on the device of the weights.

        Raises:
            InputError: there are none, or no loss, and the score `name` needs them.
        """
        batches = [to_device(batch, self.device) for batch in self.batches]
        if not batches or self.loss is None:
            raise InputError("saliency", name, "a task with training data: this score needs it")
        return batches

    def batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch."""
        assert self.loss is not None
        return self.loss(model, batch)

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Dropout draws from a stream of `generator`; torch's generators stay as they were."""
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
            torch.manual_seed(_drawn_seed(self.generator) if self.generator is not None else 0)
            yield


def _drawn_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (1,), generator=generator).item())


def magnitude(probe: Probe) -> dict[str, Tensor]:
    """|w|."""
    return {name: p.detach().abs() for name, p in probe.params.items()}


def random(probe: Probe) -> dict[str, Tensor]:
    """Uniform on [0, 1), one stream per tensor name."""
    require(probe.generator is not None, "generator", None, "a torch.Generator")
    assert probe.generator is not None
    base = _drawn_seed(probe.generator)
    return {name: uniform_like(p, base, name).to(p.device) for name, p in probe.params.items()}


def uniform_like(tensor: Tensor, seed: int, name: str) -> Tensor:
    """Uniform draws of the tensor's shape, on the CPU, from a stream of (seed, name)."""
    from zlib import crc32

    stream = torch.Generator().manual_seed((seed ^ crc32(name.encode()) << 20) & (2**63 - 1))
    return torch.rand(tensor.shape, generator=stream, dtype=torch.float64)


def weight_gradient(probe: Probe) -> dict[str, Tensor]:
    """|w · ∂L/∂w| with the gradient of the mean loss over all batches (first-order Taylor)."""
    batches = probe.batch_list("weight-gradient")
    twin, weights = probe.copy()
    with probe.own_randomness():
        for batch in batches:
            (probe.batch_loss(twin, batch) / len(batches)).backward()
    return {n: (w.detach() * _gradient(n, w)).abs() for n, w in weights.items()}


def snip(probe: Probe) -> dict[str, Tensor]:
    """|∂L/∂c| at c = 1 for multiplicative gates c, which is |w · ∂L/∂w| on one minibatch,
    normalised by its sum (Lee et al., arXiv 1810.02340, equation 4)."""
    first = probe.batch_list("snip")[:1]
    scores = weight_gradient(_with_batches(probe, first))
    total = float(sum(s.double().sum() for s in scores.values()))
    require(total > 0, "saliency", described("SNIP scores that are all zero"), "a gradient")
    return {name: score / total for name, score in scores.items()}


def grasp(probe: Probe, temperature: float = 200.0) -> dict[str, Tensor]:
    """Gradient signal preservation, w · Hg, as a score to keep (Wang et al., arXiv 2002.07376).

    The paper removes the largest of −w · Hg; here higher means keep, so the sign is turned.
    g is the gradient of the sum of the batch losses on logits divided by `temperature`, Hg its
    product with the Hessian of the same losses. Normalised by |Σ score| + 1e-10.
    """
    batches = probe.batch_list("grasp")
    twin, weights = probe.copy()
    cooled = _Cooled(twin, temperature)
    tensors = list(weights.values())
    gradient = [torch.zeros_like(w) for w in tensors]
    with probe.own_randomness():
        for batch in batches:
            loss = probe.batch_loss(cooled, batch)
            parts = torch.autograd.grad(loss, tensors, allow_unused=True)
            for total, part in zip(gradient, parts, strict=True):
                if part is not None:
                    total += part
        for batch in batches:
            loss = probe.batch_loss(cooled, batch)
            parts = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
            terms = [(g * p).sum() for g, p in zip(gradient, parts, strict=True) if p is not None]
            torch.stack(terms).sum().backward()
    scores = {n: w.detach() * _gradient(n, w) for n, w in weights.items()}
    norm = abs(float(sum(s.double().sum() for s in scores.values()))) + 1e-10
    return {name: score / norm for name, score in scores.items()}


class _Cooled(nn.Module):
    """A model whose logits are divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if isinstance(output, Tensor):
            return output / self.temperature
        output.logits = output.logits / self.temperature
        return output


def synflow(probe: Probe) -> dict[str, Tensor]:
    """|w| · ∂R/∂|w| with R = 1ᵀ f(1; |w|), data-free (Tanaka et al., arXiv 2006.05467).

    All parameters and buffers are replaced by their magnitudes, masked weights count as zero,
    and the sum of the outputs on an input of ones is differentiated in float64. To be iterated:
    `one-shot` does so when asked for several iterations.
    """
    if probe.example_inputs is None:
        raise InputError("example_inputs", None, "inputs of one sample: synflow runs the model")
    twin, weights = probe.copy(torch.float64)
    twin.eval()
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            if tensor.is_floating_point():
                tensor.abs_()
        if probe.masks is not None:
            for name, mask in probe.masks.items():
                weights[name].mul_(mask)
    total_output(twin, _ones(to_device(probe.example_inputs, probe.device))).backward()
    return {n: (w.detach() * _gradient(n, w)).abs() for n, w in weights.items()}


def total_output(model: nn.Module, inputs: Any) -> Tensor:
    """The sum of everything a model puts out."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return (output if isinstance(output, Tensor) else output.logits).sum()


def _ones(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            return inputs
        return torch.ones_like(inputs, dtype=torch.float64)
    if isinstance(inputs, Mapping):
        return {k: _ones(v) for k, v in inputs.items()}
    return type(inputs)(_ones(v) for v in inputs)


def _gradient(name: str, weight: nn.Parameter) -> Tensor:
    if weight.grad is None:
        raise InputError(name, described("a weight the loss does not depend on"), "exclude it")
    return weight.grad


def _with_batches(probe: Probe, batches: list[Any]) -> Probe:
    from dataclasses import replace

    return replace(probe, batches=batches)


Saliency = Callable[[Probe], dict[str, Tensor]]

SALIENCIES: dict[str, Saliency] = {
    "magnitude": magnitude,
    "random": random,
    "weight-gradient": weight_gradient,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
}


def saliency(name: str) -> Saliency:
    """A saliency by name."""
    if name not in SALIENCIES:
        raise unknown("saliency", name, SALIENCIES)
    return SALIENCIES[name]
