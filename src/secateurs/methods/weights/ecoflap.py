"""ECoFLaP: how much every block matters to the loss, then layer by layer.

Paper: "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models", ICLR
2024, arXiv 2310.02998 (its text could not be reached; this follows the code at 59dac0a).

Coarse: the score of a matrix W, on the dense model, is its gradient along random directions,

    Σ over batches, draws of |L(W + εz) − L(W − εz)| / 2ε,    z ~ N(0, I) of the shape of W,

two forward passes each and no backward. Scores are summed over the matrices of a group (a block,
a layer, or a whole sub-network), and the budget is handed out in proportion to them, no group
going beyond `max_sparsity` (`secateurs.parts.allocation.water_fill`). Fine: every matrix comes
down to the share of its group by Wanda, SparseGPT or magnitude, each block on what the pruned
ones before it give.

First-order scores are the paper's ablation, with g the gradient on a batch: `first-abs`
Σ |W| · mean |g|, `first-square` Σ W² · mean g², `first-gradient` Σ mean |g|.

Differences from the code: weights come back from a copy (adding and subtracting ε leaves
rounding behind); losses are taken in float32 also of half-precision models; what the shares
hand out too much is taken back, not added once more. Where the code prunes language models
within rows and vision models within whole matrices, `scope` is one for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateurs.calibration.blocks import find_blocks, owner_of, sub_networks
from secateurs.calibration.layerwise import LayerwisePruner
from secateurs.devices import to_device
from secateurs.errors import InputError, described, require
from secateurs.method import Pruner
from secateurs.methods.weights.magnitude import Magnitude
from secateurs.methods.weights.sparsegpt import SparseGPT
from secateurs.methods.weights.wanda import Wanda
from secateurs.outcome import Outcome
from secateurs.parts.allocation import default_cap, water_fill
from secateurs.parts.budgets import Budget
from secateurs.parts.patterns import NM, parse_pattern
from secateurs.parts.saliency import BatchLoss
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.structure.trace import traceable
from secateurs.task import Task
from secateurs.training.batches import labelled_batches
from secateurs.training.order import mix
from secateurs.workspace import Workspace

Scores = dict[str, float]
"""Matrix -> importance, 0 or more."""

FirstOrder = Literal["abs", "square", "gradient"]


class Group(NamedTuple):
    """Matrices of one sparsity: a block, a matrix or a network, and whose budget they share."""

    network: str
    name: str


ELEMENTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "abs": (torch.abs, lambda weight, mean: weight.abs() * mean),
    "square": (torch.square, lambda weight, mean: weight.square() * mean),
    "gradient": (torch.abs, lambda weight, mean: mean),
}
"""What is averaged of a gradient over the batches, and what becomes of it with the weight."""


@register(
    "ecoflap",
    paper=Paper(
        "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models",
        "ICLR",
        2024,
        "2310.02998",
    ),
    tags=Tags("U", "weight+block", "PTP", "loss+mag+sens", recovery="none"),
    budgets=("sparsity", "density"),
)
@dataclass(frozen=True)
class ECoFLaP(Pruner):
    """A sparsity per block by its importance to the loss, then Wanda or another inside."""

    needs: ClassVar[tuple[str, ...]] = ("batches",)

    inner: Literal["wanda", "sparsegpt", "magnitude"] = option(
        "wanda", "the method that prunes the layers"
    )
    score: Literal["zeroth", "first-abs", "first-square", "first-gradient"] = option(
        "zeroth", "of a matrix: by forward passes alone, or by gradients"
    )
    group: Literal["block", "layer", "model"] = option(
        "block", "what has one sparsity: a block, a matrix, or a whole sub-network (tower)"
    )
    aggregate: Literal["sum", "avg"] = option(
        "sum", "of the scores in a group; avg divides by its weights"
    )
    max_sparsity: float | None = option(
        None, "of any group; none: 0.1 above the budget, from 0.8 on halfway to 1"
    )
    per_model: bool = option(False, "meet the budget in every sub-network by itself")
    score_samples: int | None = option(
        None, "labelled samples for scores; none: 32, and 128 for gradients", "samples"
    )
    score_batch: int = option(8, "samples of one loss", "samples")
    draws: int = option(1, "directions a batch; more of them use fewer batches", "draws")
    epsilon: float = option(1e-3, "how far weights are moved along a direction")
    scope: Literal["own", "row", "matrix"] = option(
        "own", "compare weights within rows or whole matrices; own: as the inner method does"
    )
    pattern: str = option("unstructured", "unstructured or block:RxC")
    samples: int = option(128, "calibration inputs of the inner method", "samples")
    batch: int = option(8, "calibration inputs that run at once", "samples")
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        cap, least = self.max_sparsity, 1 if self.score_samples is None else self.score_samples
        require(cap is None or 0 <= cap < 1, "max_sparsity", cap, "a fraction in [0, 1)")
        require(least >= 1, "score_samples", self.score_samples, "at least 1")
        require(self.score_batch >= 1, "score_batch", self.score_batch, "at least 1")
        require(self.draws >= 1, "draws", self.draws, "at least 1")
        require(self.epsilon > 0, "epsilon", self.epsilon, "above 0")
        require(
            self.scope == "own" or self.inner != "sparsegpt",
            "scope", self.scope, "own for sparsegpt, which compares blocks of columns",
        )  # fmt: skip
        require(
            not isinstance(parse_pattern(self.pattern), NM),
            "pattern", self.pattern, "unstructured or block:RxC; N:M is the same share everywhere",
        )  # fmt: skip
        self.layerwise()

    def layerwise(self) -> LayerwisePruner:
        """The method that prunes the layers."""
        shared: dict[str, Any] = {
            "pattern": self.pattern,
            "samples": self.samples,
            "batch": self.batch,
            "exclude": self.exclude,
        }
        if self.inner == "sparsegpt":
            return SparseGPT(**shared)
        kind = Wanda if self.inner == "wanda" else Magnitude
        return kind(**shared) if self.scope == "own" else kind(**shared, scope=self.scope)

    def prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.layerwise().prunable(model)

    def prune(
        self,
        model: nn.Module,
        budget: Budget,
        task: Task | None = None,
        *,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Outcome:
        if task is None:
            raise InputError("task", None, "a Task: ecoflap measures its loss")
        params = self.prunable(model)
        sparsity = budget.value if budget.kind == "sparsity" else 1 - budget.value
        cap = default_cap(sparsity) if self.max_sparsity is None else self.max_sparsity
        require(cap >= sparsity, "max_sparsity", cap, f"at least the sparsity, {sparsity:g}")
        scores = self.scores(model, params, task, seed, work)
        share, rows = self.allocation(model, params, scores, sparsity, cap)
        outcome = self.layerwise().prune(
            model, budget, task, seed=seed, work=work,
            densities={name: 1 - share[name] for name in params},
        )  # fmt: skip
        outcome.tables["allocation"] = rows
        if not any(scores.values()):
            outcome.notes.append("all scores are zero: every group has the same sparsity")
        return outcome

    def scores(
        self,
        model: nn.Module,
        params: Mapping[str, nn.Parameter],
        task: Task,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> Scores:
        """Of every matrix, on the model as it is."""
        zeroth = self.score == "zeroth"
        samples = self.score_samples or (32 if zeroth else 128)
        if zeroth:
            samples = max(1, samples // self.draws)
        loader = task.training_loader()
        batches = labelled_batches(loader, samples, self.score_batch, seed, task.unpack)
        if not zeroth:
            kind: Any = self.score.removeprefix("first-")
            return first_order_scores(model, params, task.batch_loss, batches, kind)
        return zeroth_order_scores(
            model, params, task.batch_loss, batches,
            epsilon=self.epsilon, draws=self.draws, seed=seed, work=work,
        )  # fmt: skip

    def allocation(
        self,
        model: nn.Module,
        params: Mapping[str, Tensor],
        scores: Mapping[str, float],
        sparsity: float,
        cap: float,
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The sparsity of every matrix, and a table of the groups."""
        groups = self.groups(model, params)
        size = {g: sum(params[n].numel() for n in own) for g, own in groups.items()}
        score = {g: sum(scores[n] for n in own) for g, own in groups.items()}
        if self.aggregate == "avg":
            score = {g: s / size[g] for g, s in score.items()}
        filled: dict[Group, float] = {}
        for network in dict.fromkeys(g.network for g in groups):
            own = {g: s for g, s in score.items() if g.network == network}
            filled.update(water_fill(own, size, sparsity, cap))
        rows = [
            {
                "group": g.name or "model",
                "weights": size[g],
                "score": score[g],
                "sparsity": filled[g],
            }
            for g in groups
        ]
        return {n: filled[g] for g, own in groups.items() for n in own}, rows

    def groups(self, model: nn.Module, params: Mapping[str, Tensor]) -> dict[Group, list[str]]:
        """What shares a sparsity, by the network whose budget it is part of."""
        blocks = find_blocks(model)
        networks = sub_networks(model, blocks)
        found: dict[Group, list[str]] = defaultdict(list)
        for name in params:
            block = owner_of(name, blocks)
            assert block is not None, "a layer-wise method prunes what lies in blocks"
            names = {"block": block, "layer": name, "model": networks[block]}
            network = networks[block] if self.per_model else ""
            found[Group(network, names[self.group])].append(name)
        return found


def zeroth_order_scores(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    loss: BatchLoss,
    batches: Sequence[Any],
    *,
    epsilon: float = 1e-3,
    draws: int = 1,
    seed: int = 0,
    work: Workspace | None = None,
) -> Scores:
    """Σ |L(W + εz) − L(W − εz)| / 2ε over batches and draws of z, a matrix at a time.

    The weights are afterwards what they were, bit for bit, and so are torch's generators; z is a
    function of (seed, name, batch, draw).

    Args:
        params: matrices to be scored, parameters of the model.
        loss: (model, batch) -> mean loss.
        draws: directions a batch.

    Raises:
        InputError: a loss that is not one finite number.
    """
    scores: Scores = {}
    with _losses(model, loss) as loss_of:
        taken = [to_device(batch, _device(params)) for batch in batches]
        with (work or Workspace()).progress("ecoflap: matrices", len(params)) as advance:
            for number, (name, parameter) in enumerate(params.items(), 1):
                total = 0.0
                for index, batch in enumerate(taken):
                    for draw in range(draws):
                        own = mix(seed, crc32(name.encode()), index, draw)
                        step = epsilon * _direction(parameter, own)
                        total += abs(_rise(loss_of, parameter, step, batch))
                scores[name] = total / (2 * epsilon)
                advance(number)
    return scores


def first_order_scores(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    loss: BatchLoss,
    batches: Sequence[Any],
    kind: FirstOrder = "abs",
) -> Scores:
    """Σ |W| · mean |g|, Σ W² · mean g² or Σ mean |g|, g being the gradient on a batch.

    Args:
        params: matrices to be scored, parameters of the model.
        loss: (model, batch) -> mean loss.

    Raises:
        InputError: a loss that is not one finite number.
    """
    averaged, weighed = ELEMENTS[kind]
    with _losses(model, loss, gradients=params) as loss_of:
        sums = {name: torch.zeros_like(p) for name, p in params.items()}
        for batch in batches:
            value = loss_of(to_device(batch, _device(params)))
            gradients = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += averaged(gradient)
        return {
            name: float(weighed(p.detach(), sums[name] / len(batches)).double().sum())
            for name, p in params.items()
        }


def _direction(parameter: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return drawn.to(parameter.device)


def _rise(
    loss_of: Callable[[Any], Tensor], parameter: nn.Parameter, step: Tensor, batch: Any
) -> float:
    """L(W + step) − L(W − step); W itself is set aside meanwhile and not written to."""
    before = parameter.data
    try:
        parameter.data = before + step
        above = float(loss_of(batch))
        parameter.data = before - step
        return above - float(loss_of(batch))
    finally:
        parameter.data = before


def _device(params: Mapping[str, Tensor]) -> torch.device:
    return next(iter(params.values())).device


@contextmanager
def _losses(
    model: nn.Module, loss: BatchLoss, gradients: Mapping[str, nn.Parameter] | None = None
) -> Iterator[Callable[[Any], Tensor]]:
    """batch -> loss, in eval mode and at least float32; with gradients of some parameters.

    The model is as it was afterwards, and torch's generators too.
    """
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    wanted = {id(p) for p in (gradients or {}).values()}

    def loss_of(batch: Any) -> Tensor:
        with torch.set_grad_enabled(gradients is not None):
            value = loss(model, tree_map(_widened, batch))
        shown = described(f"shape {tuple(value.shape)}" if value.numel() != 1 else f"{value}")
        require(value.numel() == 1, "task.loss", shown, "one number a batch")
        require(bool(torch.isfinite(value)), "task.loss", shown, "a finite number")
        return value

    devices = list(range(torch.cuda.device_count()))
    with traceable(model), _in_float32(model), torch.random.fork_rng(devices):
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in wanted)
            yield loss_of
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Half-precision tensors of a model in float32, which holds each of their values exactly."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if _is_half(t)]
    kinds = [t.dtype for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, kind in zip(tensors, kinds, strict=True):
            tensor.data = tensor.data.to(kind)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and _is_half(value) else value


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
