"""Gates on a model: small networks that look at a sample and switch units of the model for it.

    z = FC2(relu(FC1(mean over positions of x))),   q = sigmoid(z),   g = 1[q ≥ 1/2]

x is the input of a block or layer, g multiplies what a `secateurs.structure.switches.Switch`
names. `Gated` hangs them on a model by hooks, so that its Python code and its modules stay what
they are, and takes them off again. `penalized` is a task whose loss has a term more, such as what
`Gated.means` is to come down to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, described, require
from secateurs.parts.gates import batch_means, binary_gate
from secateurs.structure.switches import Switch, Target, factor
from secateurs.task import Task, seeded
from secateurs.training.order import batches_from, steps_per_epoch


class Gate(nn.Module):
    """Looks at an input and opens or closes units, a row of zeros and ones a sample.

    Args:
        switch: whose units; says where the input has its channels.
        hidden: neurons between the two linear layers.
        open_bias: that z starts from, above 0 so that all units start open.
        noise: factor of the logistic noise that z gets while training.

    Attributes:
        gates: (samples, units), of the last forward pass.
        probabilities: q, likewise.
    """

    def __init__(self, switch: Switch, hidden: int, open_bias: float, noise: float) -> None:
        super().__init__()
        self.place, self.noise = switch.place, noise
        self.squeeze = nn.Linear(switch.width, hidden)
        self.decide = nn.Linear(hidden, switch.units)
        nn.init.constant_(self.decide.bias, open_bias)
        self.gates: Tensor | None = None
        self.probabilities: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, ..., channels, ...) -> (N, units)."""
        positions = [p for p in range(1, x.ndim) if p != self.place]
        pooled = x.mean(positions) if positions else x
        z = self.decide(self.squeeze(pooled).relu())
        if self.training and self.noise:
            z = z + self.noise * torch.rand_like(z).logit(eps=1e-6)
        self.probabilities = torch.sigmoid(z)
        self.gates = binary_gate(self.probabilities)
        return self.gates


class Gated(nn.Module):
    """A model with gates on it. Call `ungated` to have it back as it was.

    Args:
        model: stays the same object; its modules get hooks.
        seed: of the gates' weights.
    """

    def __init__(
        self,
        model: nn.Module,
        switches: Sequence[Switch],
        *,
        hidden: int = 16,
        open_bias: float = 1.5,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.names = model, [s.name for s in switches]

        def make() -> nn.Module:
            return nn.ModuleList(Gate(s, hidden, open_bias, noise) for s in switches)

        example = next(model.parameters())
        self.gates = seeded(make, seed).to(example.device, example.dtype)
        self._handles: list[Any] = []
        pairs = list(zip(switches, self.gates.children(), strict=True))
        for switch, gate in pairs:
            for target in switch.targets:
                self._hang(gate, target)
        for switch, gate in pairs:  # later: a gate sees its layer's input as the layer does
            reader = model.get_submodule(switch.reads)
            look = partial(_look, gate, switch)
            self._handles.append(reader.register_forward_pre_hook(look, with_kwargs=True))

    def _hang(self, gate: nn.Module, target: Target) -> None:
        module = self.model.get_submodule(target.path)
        if target.side == "input":
            self._handles.append(module.register_forward_pre_hook(partial(_enter, gate, target)))
        else:
            self._handles.append(module.register_forward_hook(partial(_leave, gate, target)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model."""
        return self.model(*args, **kwargs)

    def means(self) -> dict[str, Tensor]:
        """ḡ by switch: the share of the last batch for which each unit was open, (units,).

        Raises:
            InputError: there was no forward pass.
        """
        return {n: batch_means(g) for n, g in zip(self.names, self._last("gates"), strict=True)}

    def probabilities(self) -> dict[str, Tensor]:
        """The mean of q over the last batch, likewise."""
        last = zip(self.names, self._last("probabilities"), strict=True)
        return {n: batch_means(q) for n, q in last}

    def _last(self, what: str) -> list[Tensor]:
        found = [getattr(gate, what) for gate in self.gates.children()]
        if any(value is None for value in found):
            none = described("gates that have not seen a sample")
            raise InputError("gated model", none, "one after a forward pass")
        return found

    def ungated(self) -> nn.Module:
        """The model without gates and hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.model


def _look(
    gate: nn.Module, switch: Switch, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if len(args) != 1 or kwargs:
        called = described(f"{switch.reads}, called with {len(args)} arguments and {[*kwargs]}")
        raise InputError(
            "model", called, "blocks and layers that are called with their input alone"
        )
    gate(args[0])


def _enter(gate: Any, target: Target, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * factor(target, gate.gates, args[0].ndim), *args[1:])


def _leave(gate: Any, target: Target, _: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * factor(target, gate.gates, output.ndim)


@dataclass(frozen=True)
class Votes:
    """What the gates say over a whole data set.

    Attributes:
        open: share of the samples for which each unit is open, by switch; float64.
        probability: mean of q, likewise.
        samples: how many there were.
    """

    open: dict[str, Tensor]
    probability: dict[str, Tensor]
    samples: int

    @property
    def defect(self) -> float:
        """1/U Σ ḡ (1 − ḡ): 0 where all samples agree on every unit."""
        shares = torch.cat(list(self.open.values()))
        return float((shares * (1 - shares)).mean())

    @property
    def order(self) -> dict[str, Tensor]:
        """Scores that rank units by their share, and those of the same share by q."""
        return {n: s + self.probability[n] / (self.samples + 1) for n, s in self.open.items()}


@torch.no_grad()
def votes(gated: Gated, task: Task, seed: int) -> Votes:
    """What the gates say over an epoch of the task's training data, in eval mode."""
    loader = task.training_loader()
    device = device_of(gated)
    sums: dict[str, dict[str, Any]] = {"gates": {}, "probabilities": {}}
    samples, training = 0, gated.training
    gated.eval()
    for batch, _ in islice(batches_from(loader, seed, 0), steps_per_epoch(loader)):
        inputs, _ = task.unpack(to_device(batch, device))
        task.forward(gated, inputs)
        for what, total in sums.items():
            for name, rows in zip(gated.names, gated._last(what), strict=True):
                total[name] = total.get(name, 0) + rows.double().sum(0).cpu()
        samples += len(gated._last("gates")[0])
    gated.train(training)
    shares, means = ({n: t / samples for n, t in total.items()} for total in sums.values())
    return Votes(shares, means, samples)


@dataclass(frozen=True)
class PenalizedTask(Task):
    """A task whose training loss has a term more; it is evaluated as before.

    Attributes:
        inner: the task.
        penalty: the term, computed after the forward pass of each batch.
    """

    inner: Task | None = None
    penalty: Callable[[], Tensor] | None = None

    def batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The inner task's loss and the penalty, with their graph."""
        assert self.inner is not None
        assert self.penalty is not None
        return self.inner.batch_loss(model, batch) + self.penalty()


def penalized(task: Task, penalty: Callable[[], Tensor]) -> PenalizedTask:
    """`task` with `penalty()` added to the loss of every training batch."""
    require(callable(penalty), "penalty", penalty, "a function without arguments")
    own = {f.name: getattr(task, f.name) for f in fields(Task)}
    return PenalizedTask(**own, inner=task, penalty=penalty)
