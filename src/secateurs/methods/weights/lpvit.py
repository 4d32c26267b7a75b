"""LPViT: blocks of weights that block-sparse products can skip, where the outputs feel it least.

Paper: "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", ECCV 2024, arXiv
2407.02068. With g = d/dW mean(f(x)²) over all logits f (no labels), blocks are ranked by the
mean of |w g| inside them. A layer that loses the lowest of its blocks, so that its weights move
by δ, is charged

    fisher:     D(a) = mean over mini-batches s of 1/2 (δ · g_s)²
    mean-grad:  D(a) = mean_ij (δ_ij ḡ_ij)² + 1/2 (δ · ḡ)² + μ/2 ‖δ‖²,   ḡ the mean of g_s

(the second term of the latter with `order=2`), and how many blocks each loses minimises

    Σ_l D_l(a_l) − β P_l(a_l) + λ cost_l(1 − a_l)

under the budget. P_l(a) = a · numel / (bh · bw) · e is the energy of the removed block products,
e by `secateurs.deploy.energy`, and β = mean_l max slope of D_l / mean_l max slope of P_l. The
network is then fine-tuned with its masks kept.

Where paper and public code differ, the paper's intention is the default:

 - the code adds β P instead of subtracting it, so that power is saved by keeping blocks
   (`legacy_power_sign`);
 - it makes the curves equally steep in the removed fraction, whatever a layer costs
   (`solver="slope"`), and stops within 2 % of the budget. `lagrangian` weighs by the cost and
   meets the budget to one block;
 - its final masks rank by |w|, through a wrong keyword (`final="l1"`);
 - it adds up the second term of `mean-grad` with a wrong cross term; here it is exact;
 - it takes gradients in training mode (`mode="train"`).

The paper has `mean-grad`, whose terms cancel between images; `fisher` is the card's proposal
and the default, being far better. Its teacher is another network; here `distillation` listens
to the dense model. Cost is that of the library: MACs of the whole forward pass, attention
products included. Layers are all Linear and Conv2d that a forward pass reaches, as (out, in · k²).
Blocks are not aligned with heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.deploy.energy import energy_model
from secateurs.devices import device_of, to_device
from secateurs.errors import InputError, described, require
from secateurs.method import Pruner, masked_outcome
from secateurs.outcome import Outcome, Promise
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import count_macs
from secateurs.parts.curves import (
    Curve,
    check_saving,
    envelope,
    equal_slopes,
    lagrangian,
    moving_average,
    slopes,
)
from secateurs.parts.masks import Masks, named_parameters
from secateurs.parts.patterns import Block
from secateurs.registry import Paper, Tags, register
from secateurs.settings import option
from secateurs.task import Task, logits_of
from secateurs.training.batches import calibration_batches
from secateurs.training.distillation import distilled
from secateurs.training.loop import own_randomness
from secateurs.training.order import mix
from secateurs.workspace import Workspace

CurveKind = Literal["fisher", "mean-grad"]
Ranking = Literal["taylor", "l1"]


@dataclass(frozen=True)
class LayerBlocks:
    """What the blocks of a layer hold; float64, in the order of `Block.pool`.

    Attributes:
        sizes: weights of each, (blocks,).
        changes: Σ w g_s of each and every mini-batch, (mini-batches, blocks): how much the
            outputs change, to first order, when the block goes.
        squares: Σ (w ḡ)² of each.
        norms: Σ w² of each.
        taylor, l1: the means of |w ḡ| and of |w|.
    """

    sizes: Tensor
    changes: Tensor
    squares: Tensor
    norms: Tensor
    taylor: Tensor
    l1: Tensor

    def first_to_go(self, ranking: Ranking) -> Tensor:
        """Block numbers by rising score; of equal ones the later goes first."""
        scores = self.taylor if ranking == "taylor" else self.l1
        return scores.argsort(descending=True, stable=True).flip(0)


def layer_blocks(weight: Tensor, gradient: Tensor, changes: Tensor, block: Block) -> LayerBlocks:
    """Sums over the blocks of a weight and its mean gradient; of `changes` see `LayerBlocks`."""
    weight, gradient = weight.detach().double(), gradient.double()
    sizes = block.unit_sizes(weight.shape).to(weight)
    product = weight * gradient
    return LayerBlocks(
        sizes,
        changes.double(),
        block.pool(product.square()) * sizes,
        block.pool(weight.square()) * sizes,
        block.pool(product.abs()),
        block.pool(weight.abs()),
    )


def distortion(
    blocks: LayerBlocks,
    removed: Tensor,
    order: Tensor,
    kind: CurveKind = "fisher",
    *,
    terms: int = 2,
    damping: float = 1e-7,
) -> Tensor:
    """D at several numbers of removed blocks.

    Args:
        removed: numbers of blocks, int64.
        order: block numbers, the first to go first.
        terms: of `mean-grad`: 1 for the squares alone, 2 with the quadratic form.
        damping: μ.
    """

    def gone(values: Tensor) -> Tensor:
        return F.pad(values[..., order].cumsum(-1), (1, 0))[..., removed]

    if kind == "fisher":
        return gone(blocks.changes).square().mean(0) / 2
    first = gone(blocks.squares) / blocks.sizes.sum()
    if terms == 1:
        return first
    return first + gone(blocks.changes.mean(0)).square() / 2 + damping / 2 * gone(blocks.norms)


@register(
    "lpvit",
    paper=Paper(
        "LPViT: Low-Power Semi-structured Pruning for Vision Transformers",
        "ECCV",
        2024,
        "2407.02068",
    ),
    tags=Tags("SS", "block", "PAT", "sens+mag", fusion="none+kd", recovery="retrain+kd"),
    budgets=("macs", "sparsity", "density"),
)
@dataclass(frozen=True)
class LPViT(Pruner):
    """Blocks of linear layers by distortion curves, energy and a MACs budget."""

    needs: ClassVar[tuple[str, ...]] = ("inputs",)

    block: tuple[int, int] = option(
        (16, 16), "rows and columns of a block (the paper: 16x16 to 64x32, DeiT-B 32x32)"
    )
    curve: CurveKind = option("fisher", "distortion: by mini-batch, or of the mean gradient")
    order: Literal[1, 2] = option(2, "of mean-grad: 1 without the quadratic term, 2 with it")
    damping: float = option(1e-7, "of mean-grad: μ of the quadratic term")
    points: int = option(101, "points of a curve", "points")
    smooth: float | None = option(
        None, "weight of a moving average along the curve; None: 0.5 for slope, otherwise 0"
    )
    ranking: Ranking = option("taylor", "order in which the curves take blocks: |w g| or |w|")
    final: Ranking = option("taylor", "ranking of the final masks; l1 as the released code has it")
    solver: Literal["lagrangian", "slope"] = option(
        "lagrangian", "equal loss per cost, or equal slopes in the removed fraction"
    )
    stencil: int = option(4, "half width of the derivative's stencil", "points")
    tolerance: float = option(0.02, "of slope: difference to the budget at which it stops")
    min_keep: float = option(0.05, "least share of its blocks that a layer keeps")
    power: bool = option(True, "weigh the energy of block products")
    energy: str | None = option(
        None, "JSON file of measured energies (secateurs.deploy.energy); None: passes of 16 inputs"
    )
    legacy_power_sign: bool = option(False, "the released code's sign, which rewards keeping")
    samples: int = option(
        512, "calibration inputs, or as many as there are (the paper: 2000 by 64)", "samples"
    )
    batch: int = option(
        1, "inputs a gradient is taken of: 1 for fisher; mean-grad is the same with any", "samples"
    )
    mode: Literal["eval", "train"] = option("eval", "of the network while gradients are taken")
    distillation: float = option(
        0.0, "share of the dense model's soft labels in fine-tuning (the paper: 0.5, of another)"
    )
    temperature: float = option(1.0, "of the soft labels")
    exclude: tuple[str, ...] = option((), "regular expressions of weights to leave dense")

    def __post_init__(self) -> None:
        self.tiles()
        require(self.points >= 2, "points", self.points, "at least 2")
        require(self.damping >= 0, "damping", self.damping, "0 or more")
        smooth = self.smooth
        require(smooth is None or 0 <= smooth < 1, "smooth", smooth, "a weight in [0, 1)")
        even = self.stencil >= 2 and self.stencil % 2 == 0
        require(even, "stencil", self.stencil, "an even number, 2 or more")
        require(self.tolerance > 0, "tolerance", self.tolerance, "above 0")
        require(0 <= self.min_keep <= 1, "min_keep", self.min_keep, "a share in [0, 1]")
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.batch >= 1, "batch", self.batch, "at least 1")
        require(0 <= self.distillation <= 1, "distillation", self.distillation, "in [0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")

    def tiles(self) -> Block:
        """The blocks as a pattern."""
        return Block(*self.block)

    def prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Weights of Linear and Conv2d layers."""
        modules = dict(model.named_modules())
        found = {
            name: parameter
            for name, parameter in super().prunable(model).items()
            if isinstance(modules[name.rpartition(".")[0]], nn.Linear | nn.Conv2d)
        }
        kinds = "Linear or Conv2d layers that are not excluded"
        require(bool(found), "model", described(f"{type(model).__name__} without any"), kinds)
        return found

    def recovery_task(self, task: Task, dense: nn.Module) -> Task:
        """The task, taught by the dense model where `distillation` says so."""
        if not self.distillation:
            return task
        return distilled(task, dense, alpha=self.distillation, temperature=self.temperature)

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
            raise InputError("task", None, "a Task: lpvit looks at what the model computes")
        params = self.prunable(model)
        macs = count_macs(model, task.example_inputs)
        params, notes = self._in_reach(params, macs)
        layers, unreached = self._look(model, params, task, seed)
        if unreached:
            notes.append("left dense, no gradient reached: " + ", ".join(unreached))
        size = {n: params[n].numel() for n in layers}
        cost = dict.fromkeys(layers, 1.0)
        total = float(sum(size.values()))
        if budget.kind == "macs":
            cost = {n: macs[n.rpartition(".")[0]] / size[n] for n in layers}
            total = float(sum(macs.values()))
        share = 1 - budget.value if budget.kind == "sparsity" else budget.value
        target = share * total if budget.relative else budget.value
        curves = self._curves(params, layers, cost)
        most = sum(c.most for c in curves.values())
        if total - target > most * (1 + 1e-9):
            least = 1 - most / total
            raise InputError(
                "budget", str(budget), f"at least {least:.6g} kept: each layer keeps "
                f"min_keep={self.min_keep:g} of its blocks, other layers stay dense"
            )  # fmt: skip
        removed = self._removed(curves, max(0.0, total - target), total)
        masks = self._masks(params, layers, removed)
        kept = {n: float(m.double().mean()) for n, m in masks.items()}
        reached = total - sum((1 - kept[n]) * size[n] * cost[n] for n in layers)
        largest = max(float(layers[n].sizes.max()) * cost[n] for n in layers)
        if self.solver == "slope":
            largest = max(largest, self.tolerance * total)
        return masked_outcome(
            model,
            Masks(masks),
            unit=int(max(b.sizes.max() for b in layers.values())),
            promise=_promise(budget, target, reached, total, largest),
            tables={"blocks": _rows(curves, layers, removed, cost, total)},
            notes=notes,
        )

    def _in_reach(
        self, params: Mapping[str, nn.Parameter], macs: Mapping[str, int]
    ) -> tuple[dict[str, nn.Parameter], list[str]]:
        """Weights that run and hold more than one block, and notes on the others."""
        run = {n: p for n, p in params.items() if macs.get(n.rpartition(".")[0])}
        tiled = {n: p for n, p in run.items() if len(self.tiles().unit_sizes(p.shape)) > 1}
        rows, cols = self.block
        require(
            bool(tiled), "block", f"{rows}x{cols}", "a block smaller than some matrix of the model"
        )
        notes = []
        if idle := [n for n in params if n not in run]:
            notes.append("left dense, no forward pass reaches them: " + ", ".join(idle))
        if small := [n for n in run if n not in tiled]:
            notes.append(f"left dense, one block of {rows}x{cols} or less: " + ", ".join(small))
        return tiled, notes

    def _look(
        self, model: nn.Module, params: Mapping[str, nn.Parameter], task: Task, seed: int
    ) -> tuple[dict[str, LayerBlocks], list[str]]:
        """What the blocks of each layer hold, and the layers without a gradient."""
        batches = calibration_batches(
            task.training_loader(), self.samples, self.batch, seed, task.unpack, fewer=True
        )
        tiles, count = self.tiles(), 0
        means: dict[str, Tensor] = {}
        changes: dict[str, list[Tensor]] = {}
        for found in gradients(model, params, task, batches, self.mode, seed):
            count += 1
            for name, gradient in found.items():
                weight, gradient = params[name].detach().double(), gradient.double()
                means[name] = means[name] + gradient if name in means else gradient
                sizes = tiles.unit_sizes(weight.shape).to(weight)
                changes.setdefault(name, []).append(tiles.pool(weight * gradient) * sizes)
        reached = [n for n in params if n in means]
        require(bool(reached), "model", described("outputs without a gradient"), "a trainable one")
        layers = {
            n: layer_blocks(params[n], means[n] / count, torch.stack(changes[n]), tiles)
            for n in reached
        }
        return layers, [n for n in params if n not in means]

    def _curves(
        self,
        params: Mapping[str, Tensor],
        layers: Mapping[str, LayerBlocks],
        cost: Mapping[str, float],
    ) -> dict[str, Curve]:
        """The objective of each layer over what it saves."""
        share = torch.linspace(0, 1, self.points, dtype=torch.float64)
        # without, slopes jump so that the bisection finds nothing between all and none
        usual = 0.5 if self.solver == "slope" else 0.0
        smooth = usual if self.smooth is None else self.smooth
        losses, removed = {}, {}
        for name, blocks in layers.items():
            count = len(blocks.sizes)
            # the int of the paper, with a hair more for products such as 0.1 · 10
            removed[name] = count - ((1 - share) * count + 1e-9).long()
            order = blocks.first_to_go(self.ranking)
            places = removed[name].to(order.device)
            raw = distortion(
                blocks, places, order, self.curve, terms=self.order, damping=self.damping
            )
            losses[name] = moving_average(raw.cpu(), smooth)
        energies = self._energies(params, layers, share) if self.power else {}
        beta = _exchange_rate(share, losses, energies, self.stencil)
        curves = {}
        for name, blocks in layers.items():
            count = len(blocks.sizes)
            least = max(1, ceil(self.min_keep * count - 1e-9))
            loss = envelope(losses[name]) if self.solver == "lagrangian" else losses[name]
            if name in energies:
                loss = loss + (beta if self.legacy_power_sign else -beta) * energies[name]
            sizes = blocks.sizes[blocks.first_to_go(self.ranking)].cpu()
            saved = F.pad(sizes.cumsum(0), (1, 0))[removed[name]] * cost[name]
            last = int((count - removed[name] >= least).sum()) - 1
            curves[name] = Curve(share, removed[name], saved, loss, last)
        return curves

    def _energies(
        self, params: Mapping[str, Tensor], layers: Mapping[str, LayerBlocks], share: Tensor
    ) -> dict[str, Tensor]:
        """P: energy of the removed block products of each layer, at each point."""
        model, (rows, cols) = energy_model(self.energy), self.block
        out = {}
        for name in layers:
            width = params[name][0].numel()
            products = params[name].numel() / (rows * cols)
            out[name] = share * products * model.of(rows, cols, width)
        return out

    def _removed(self, curves: Mapping[str, Curve], saving: float, total: float) -> dict[str, int]:
        if self.solver == "lagrangian":
            return lagrangian(curves, saving)
        check_saving(curves, saving)
        return equal_slopes(curves, saving, tolerance=self.tolerance * total, half=self.stencil)

    def _masks(
        self,
        params: Mapping[str, Tensor],
        layers: Mapping[str, LayerBlocks],
        removed: Mapping[str, int],
    ) -> dict[str, Tensor]:
        masks = {}
        for name, blocks in layers.items():
            kept = torch.ones(len(blocks.sizes), dtype=torch.bool, device=params[name].device)
            kept[blocks.first_to_go(self.final)[: removed[name]]] = False
            masks[name] = self.tiles().expand(kept, params[name].shape)
        return masks


def gradients(
    model: nn.Module,
    params: Mapping[str, Tensor],
    task: Task,
    batches: Sequence[Any],
    mode: Literal["eval", "train"] = "eval",
    seed: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """d/dW mean(f(x)²) over all logits, for each batch of inputs.

    On a copy of the model; weights that the outputs do not depend on are not listed.
    """
    twin = copy.deepcopy(model).train(mode == "train").requires_grad_(True)
    own = named_parameters(twin, params)
    device = device_of(twin)
    for step, inputs in enumerate(batches):
        with own_randomness():
            torch.manual_seed(mix(seed, step, 1))
            logits = logits_of(task.forward(twin, to_device(inputs, device)))
            found = torch.autograd.grad(
                logits.square().mean(), list(own.values()), allow_unused=True
            )
        yield {n: g for n, g in zip(own, found, strict=True) if g is not None}


def _exchange_rate(
    share: Tensor, losses: Mapping[str, Tensor], energies: Mapping[str, Tensor], half: int
) -> float:
    """β: mean largest slope of the distortions over that of the energies."""
    steepest = [
        sum(float(slopes(share, y, half).max()) for y in curves.values())
        for curves in (losses, energies)
    ]
    # narrow inputs may take no energy at all
    return steepest[0] / steepest[1] if steepest[1] else 0.0


def _promise(
    budget: Budget, target: float, reached: float, total: float, largest: float
) -> Promise:
    """The budget in its own terms; amounts as amounts."""
    if budget.kind == "macs":
        return Promise("macs", target, reached, largest)
    share = 1 - reached / total if budget.kind == "sparsity" else reached / total
    return Promise(budget.kind, budget.value, share, largest / total)


def _rows(
    curves: Mapping[str, Curve],
    layers: Mapping[str, LayerBlocks],
    removed: Mapping[str, int],
    cost: Mapping[str, float],
    total: float,
) -> list[dict[str, Any]]:
    """A layer a row: blocks, its share of the cost before, the objective it was charged."""
    rows = []
    for name, curve in curves.items():
        blocks = layers[name]
        place = int((curve.units - removed[name]).abs().argmin())
        rows.append(
            {
                "weight": name,
                "kept": len(blocks.sizes) - removed[name],
                "total": len(blocks.sizes),
                "share of cost": float(blocks.sizes.sum()) * cost[name] / total,
                "objective": float(curve.loss[place]),
            }
        )
    return rows
