"""PERP: after pruning, train only biases, norms and small adapters, and keep every zero.

Paper: "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv 2312.15230. A
recovery for what any method left (``recover="perp"``), and a method by itself: prune by `pruner`,
then recover. Adapters on the pruned layers keep the mask M (`secateurs.training.adapters`),

    mask-lora    W + s (B A) * M        scale-lora    W * (B A)

so merging them changes nothing; lora-prune masks its plain adapter only at the end, which changes
the function. Two modes:

 - ``retrain``: all of the model on the loss of the task, the gradient norm clipped;
 - ``reconstruct``: block by block, min mean (block(X) - Y)², where X is what the pruned and
   reconstructed blocks before it give, and Y what the dense block makes of that same X. Needs
   inputs only; head and what is outside the blocks stay. A method that looks at one layer at a
   time prunes each block when its turn comes, on that X, as in the authors' code; what another
   method pruned, or made smaller inside its blocks, is reconstructed afterwards.

AdamW, linear warm-up over a tenth of the steps and linear decay to 0. The baseline, all weights
trained under their masks, is ``recover="finetune"``; ``recover="lora"`` is the adapters alone. In
the authors' code the mask is W != 0; here it is the outcome's, so a weight that happens to be zero
still trains. The code's forward of scale-lora calls a dropout that does not exist; there is none
here. A head whose weight is the embedding's gets no adapter, because merging it would change the
embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from secateurs.calibration.blocks import find_blocks, is_norm, owner_of
from secateurs.calibration.layerwise import LayerwisePruner, largest_unit
from secateurs.calibration.moments import is_known, outputs_first
from secateurs.calibration.walk import Visit, walk
from secateurs.devices import device_of, to_device
from secateurs.errors import DivergedError, InputError, described, require
from secateurs.method import Pruner, masked_outcome
from secateurs.outcome import Outcome, check_output_folder
from secateurs.parts.allocation import importance_ranks
from secateurs.parts.budgets import Budget
from secateurs.parts.masks import Masks, named_parameters
from secateurs.recovery import Recovery
from secateurs.registry import Paper, Tags, create, register
from secateurs.settings import TrainSettings, option
from secateurs.state import model_state
from secateurs.structure.trace import traceable
from secateurs.task import Task
from secateurs.training import adapters as low_rank
from secateurs.training.batches import calibration_batches
from secateurs.training.loop import fit_once, total_steps
from secateurs.training.order import mix
from secateurs.workspace import Workspace

HALF: dict[torch.dtype, Literal["bf16", "fp16"]] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TRAINED, RECONSTRUCTED, MERGING = "trained parameters", "reconstruction", "merging"
"""Titles of the tables."""

Cut = Callable[[Visit], tuple[dict[str, Tensor], list[str]]]
"""Prunes a block that is dense so far: its masks by full name, and notes."""


@dataclass
class Selection:
    """What trains, by part; every parameter in one part only.

    Attributes:
        total: parameters of the model without adapters.
        notes: layers without an adapter, and adapters on layers that are not pruned.
    """

    parts: dict[str, list[nn.Parameter]]
    total: int
    notes: list[str] = field(default_factory=list)

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return sum(p.numel() for part in self.parts.values() for p in part)

    def rows(self) -> list[dict[str, Any]]:
        """Parameters and their share of the model, a part a row."""
        counts = {n: sum(p.numel() for p in part) for n, part in self.parts.items()}
        counts = {n: c for n, c in counts.items() if c} | {"all": self.trained}
        return [{"part": n, "parameters": c, "share": c / self.total} for n, c in counts.items()]


@register(
    "perp",
    paper=Paper(
        "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
        "arXiv",
        2023,
        "2312.15230",
    ),
    tags=Tags("U+SS", "weight+nm+block", "PAT", "any", fusion="peft", recovery="peft"),
    budgets=("sparsity", "density", "params", "n:m"),
)
@dataclass(frozen=True)
class Perp(Pruner, Recovery):
    """Prune by another method, then train biases, norms and adapters that keep the zeros."""

    needs: ClassVar[tuple[str, ...]] = ("training",)

    @property
    def needs_dense(self) -> bool:
        return self.mode == "reconstruct"

    pruner: str = option("magnitude", "the one-shot method that prunes")
    pruner_options: dict[str, Any] = option({}, "its hyper-parameters")
    mode: Literal["retrain", "reconstruct"] = option(
        "retrain", "on the loss of the task, or block by block towards what the dense block gives"
    )
    adapters: Literal["mask-lora", "scale-lora", "lora-prune", "lora", "none"] = option(
        "mask-lora", "on the pruned layers; lora is kept unmerged, in adapter_folder"
    )
    biases: bool = option(True, "train all biases, those of norms and of the head too")
    norms: bool = option(True, "train scales and shifts of normalisation layers")
    head: bool = option(True, "an ordinary adapter on the output layer, merged densely")
    rank: int = option(16, "of the adapters; their mean where the method tells blocks apart (cfsp)")
    alpha: float = option(32.0, "adapters are multiplied by alpha / rank")
    dropout: float = option(0.0, "of what a plain adapter is given")
    steps: int | None = option(
        None, "updates, of every block if reconstructed; those of the finetuning", "steps"
    )
    lr: float = option(5e-4, "learning rate of AdamW")
    weight_decay: float = option(0.0, "of AdamW")
    warmup: float = option(0.1, "share of the updates over which the rate rises")
    clip_norm: float | None = option(1.0, "clip the gradient norm to this, if retrained")
    samples: int = option(128, "inputs to reconstruct on", "samples")
    batch: int = option(8, "samples of an update, if reconstructed", "samples")
    recompute: bool = option(False, "form effective weights again in the backward pass")
    adapter_folder: str = option("", "for lora: where adapters are written, as peft reads them")

    def __post_init__(self) -> None:
        for name in ("rank", "samples", "batch"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.alpha > 0, "alpha", self.alpha, "above 0")
        require(self.steps is None or self.steps >= 0, "steps", self.steps, "0 or more")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "a share in [0, 1)")
        plain = self.adapters in ("lora", "lora-prune")
        accepted = "a share in [0, 1), with lora or lora-prune" if plain else "0 without lora"
        require(0 <= self.dropout < (1 if plain else 1e-12), "dropout", self.dropout, accepted)
        anything = self.biases or self.norms or self.head or self.adapters != "none"
        require(anything, "adapters", self.adapters, "biases, norms, head or adapters to train")
        unmerged = self.adapters == "lora"
        require(
            unmerged == bool(self.adapter_folder), "adapter_folder", self.adapter_folder,
            "a folder for adapters=lora, and none for kinds that are merged",
        )  # fmt: skip
        require(
            not unmerged or self.mode == "retrain", "adapters", self.adapters,
            "with mode=reconstruct kinds that are merged",
        )  # fmt: skip
        require(self.pruner != "perp", "pruner", self.pruner, "another method")
        self.inner()

    def inner(self) -> Pruner:
        """The method that prunes."""
        method = create(self.pruner, self.pruner_options)
        if not isinstance(method, Pruner):
            how = "a one-shot method; with others, recover=perp"
            raise InputError("pruner", self.pruner, how)
        return method

    def accept(self, budget: str | Budget) -> Budget:
        self.check()
        return self.inner().accept(budget)

    def prunable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return self.inner().prunable(model)

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
            raise InputError("task", None, "a Task: perp trains")
        self._check_folder()
        inner, work = self.inner(), work or Workspace()
        in_turn = isinstance(inner, LayerwisePruner) and prunes_block_by_block(inner)
        if self.mode == "reconstruct" and in_turn:
            assert isinstance(inner, LayerwisePruner)
            return self._prune_in_turn(inner, model, budget, task, seed, work)
        dense = copy.deepcopy(model) if self.mode == "reconstruct" else None
        outcome = inner.prune(model, budget, task, seed=seed, work=work.child("pruned"))
        self.recover(outcome, task, dense=dense, seed=seed, work=work)
        return outcome

    def recover(
        self,
        outcome: Outcome,
        task: Task,
        *,
        dense: nn.Module | None = None,
        seed: int = 0,
        work: Workspace | None = None,
    ) -> None:
        work = work or Workspace()
        if self.mode == "retrain":
            self._retrain(outcome, task, seed, work)
            return
        if dense is None:
            why = (
                "reconstruct, and no dense blocks to compare with: the method has trained the model"
            )
            raise InputError("mode", described(why), "retrain")
        require(
            not isinstance(outcome.model, fx.GraphModule), "mode",
            described("reconstruct of a rewritten graph, which has no blocks"), "retrain",
        )  # fmt: skip
        masks = outcome.masks

        def cut(visit: Visit) -> tuple[dict[str, Tensor], list[str]]:
            inside = {full_name(visit, n) for n in visit.block.state_dict()}
            return {n: masks[n] for n in masks if n in inside}, []

        self._reconstruct(outcome, cut, task, seed, work, dense)

    def settings(self, task: Task) -> TrainSettings:
        """The training: AdamW with warm-up and linear decay."""
        steps = total_steps(task, task.finetuning) if self.steps is None else self.steps
        return TrainSettings(
            steps=steps,
            optimizer="adamw",
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule="linear",
            warmup=int(self.warmup * steps),
            clip_norm=self.clip_norm,
        )

    def select(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        *,
        head: str | None = None,
        rank_weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> Selection:
        """Put adapters in and set what trains; all else must be frozen (`adapters.frozen`).

        Args:
            masks: of the pruned weights; without any, every layer inside the blocks is adapted.
            head: the output layer, if it is to have an adapter.
            rank_weights: of blocks, whose ranks are then in proportion, `rank` on average.

        Raises:
            InputError: nothing is left to train.
        """
        parameters = named_parameters_of(model)
        total = sum(p.numel() for p in model.parameters())
        own = layers_of(model, masks)
        bad = low_rank.obstacles(model, [*own, *([head] if head else [])])
        notes = [f"no adapter on {n}: it is {reason}" for n, reason in bad.items()]
        adapted: dict[str, low_rank.AdaptedLayer] = {}
        if self.adapters != "none":
            names = [n for n in own if n not in bad]
            ranks = ranks_of(names, rank_weights or {}, self.rank)
            adapted = low_rank.wrap(
                model, names, self.adapters, ranks, self.alpha, masks=masks,
                dropout=self.dropout, recompute=self.recompute, seed=seed,
            )  # fmt: skip
            if not names:
                notes.append("no adapters: no layer of a known kind in what was pruned")
            whole = [n for n in names if (m := masks.get(f"{n}.weight")) is None or bool(m.all())]
            if masks and whole:
                notes.append(f"adapters on layers of which nothing is pruned: {', '.join(whole)}")
        heads: dict[str, low_rank.AdaptedLayer] = {}
        if head and head not in own and head not in bad:
            heads = low_rank.wrap(model, [head], "lora", self.rank, self.alpha, seed=mix(seed, 1))
        parts = {
            "adapters": [p for a in adapted.values() for p in (a.down, a.up)],
            "head": [p for a in heads.values() for p in (a.down, a.up)],
            "biases": list(biases_of(parameters)) if self.biases else [],
            "norms": list(norms_of(model)) if self.norms else [],
        }
        first: dict[int, str] = {}
        for part, listed in parts.items():
            own_part = {id(p): p for p in listed if first.setdefault(id(p), part) == part}
            parts[part] = list(own_part.values())
        selection = Selection(parts, total, notes)
        if not selection.trained:
            options = "biases, norms, head or adapters that this model has"
            raise InputError("adapters", described("nothing to train"), options)
        for listed in parts.values():
            for parameter in listed:
                parameter.requires_grad_(True)
        return selection

    def _check_folder(self) -> None:
        """Raise `InputError` where adapters would overwrite something."""
        if self.adapter_folder:
            check_output_folder(Path(self.adapter_folder))

    def _retrain(self, outcome: Outcome, task: Task, seed: int, work: Workspace) -> None:
        self._check_folder()
        model = outcome.model
        half = HALF.get(weight_dtype(model))
        settings = self.settings(task)
        if half is not None:
            settings = replace(settings, precision=half)
        with low_rank.frozen(model):
            head = head_of(model) if self.head else None
            selection = self.select(
                model, outcome.masks, head=head, rank_weights=outcome.rank_weights, seed=seed
            )
            with in_float32(p for part in selection.parts.values() for p in part):
                fit_once(model, task, settings, seed=seed, work=work, name="perp")
            changes = self.adapters in ("lora", "lora-prune")
            before = task.measure(model) if changes else {}
            if self.adapters == "lora":
                self._keep_adapters(model, head)
            low_rank.merge(model)
        check_zeros(model, outcome.masks)
        outcome.notes += selection.notes
        outcome.tables[TRAINED] = selection.rows()
        if changes:
            after = task.measure(model)
            outcome.tables[MERGING] = [{"adapters": "in place", **before}, {"adapters": (
                "merged" if self.adapters == "lora-prune" else "kept aside"), **after}]  # fmt: skip

    def _keep_adapters(self, model: nn.Module, head: str | None) -> None:
        """Write the adapters of pruned layers to their folder, and take them out."""
        found = low_rank.adapters(model)
        dense = found.pop(head, None) if head and head in found else None
        low_rank.unwrap(model)
        low_rank.save_adapters(found, self.adapter_folder)
        if head and dense is not None:
            with torch.no_grad():
                model.get_parameter(f"{head}.weight").copy_(dense.merged())

    def _prune_in_turn(
        self,
        inner: LayerwisePruner,
        model: nn.Module,
        budget: Budget,
        task: Task,
        seed: int,
        work: Workspace,
    ) -> Outcome:
        params = outputs_first(model, inner.prunable(model))
        removals, notes = inner.removals(params, budget)
        outcome = Outcome(model, notes=notes)
        masks = self._reconstruct(
            outcome, lambda visit: inner.prune_block(visit, removals), task, seed, work
        )
        made = masked_outcome(
            model, Masks({n: masks[n] for n in removals}), unit=largest_unit(params, removals)
        )
        made.notes = [*outcome.notes, *made.notes]
        made.tables = outcome.tables
        return made

    def _reconstruct(
        self,
        outcome: Outcome,
        cut: Cut,
        task: Task,
        seed: int,
        work: Workspace,
        dense: nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """Reconstruct the blocks of a model; all masks.

        Args:
            dense: with the blocks to come near to; without it those of the model itself, which
                `cut` then prunes.
        """
        model = outcome.model
        weights = outcome.rank_weights
        device = device_of(model)
        loader = task.training_loader()
        batches = calibration_batches(loader, self.samples, self.batch, seed, task.unpack)
        batches = to_device(batches, device)
        blocks = {} if dense is None else same_blocks(model, dense, batches[:1])
        masks: dict[str, Tensor] = {}
        rows, notes = [], list(outcome.notes)
        parts: dict[str, int] = {}
        total = len(find_blocks(model))
        with (
            work.progress("perp: blocks", total) as advance,
            low_rank.frozen(model),
            nullcontext() if dense is None else traceable(dense),
        ):
            for visit in walk(model, batches):
                [rank] = ranks_of([full_name(visit, "layer")], weights, self.rank).values()

                def compute(visit: Visit = visit, rank: int = rank) -> dict[str, Any]:
                    targets = targets_of(visit, blocks.get(visit.name, visit.block))
                    own = replace(self, rank=rank)
                    return own._block(visit, targets, cut, task, mix(seed, visit.index))

                state = work.once(f"perp-block-{visit.index}", compute)
                visit.block.load_state_dict(state["block"])
                shapes = {n: p.shape for n, p in named_parameters_of(visit.block).items()}
                packed = {n: state["masks"][n] for n in state["masks"]}
                found = Masks.unpack(packed, {n: shapes[n] for n in packed}).to(device)
                masks |= {full_name(visit, n): m for n, m in found.items()}
                rows.append(state["row"])
                notes += state["notes"]
                for part, count in state["trained"].items():
                    parts[part] = parts.get(part, 0) + count
                work.event("block", **state["row"])
                advance(visit.index + 1)
        check_zeros(model, masks)
        size = sum(p.numel() for p in model.parameters())
        outcome.notes = list(dict.fromkeys(notes))
        outcome.tables[TRAINED] = [
            {"part": n, "parameters": c, "share": c / size} for n, c in parts.items()
        ]
        outcome.tables[RECONSTRUCTED] = rows
        return masks

    def _block(
        self, visit: Visit, targets: Sequence[Tensor], cut: Cut, task: Task, seed: int
    ) -> dict[str, Any]:
        """Prune a block and bring its outputs near to their targets; its state."""
        masks, notes = cut(visit)
        start = len(visit.name) + 1 if visit.name else 0
        own = {name[start:]: mask for name, mask in masks.items()}
        half = HALF.get(weight_dtype(visit.block))
        selection = self.select(visit.block, own, seed=seed)
        with in_float32(p for part in selection.parts.values() for p in part):
            before = block_error(visit, targets, half)
            self._fit_block(visit, targets, self.settings(task), half)
            after = block_error(visit, targets, half)
        low_rank.merge(visit.block)
        require_finite(visit.name, after)
        return {
            "block": model_state(visit.block),
            "masks": Masks(own).pack(),
            "row": {"block": visit.name or "the model", "before": before, "after": after},
            "trained": {row["part"]: row["parameters"] for row in selection.rows()},
            "notes": [*notes, *selection.notes],
        }

    def _fit_block(
        self, visit: Visit, targets: Sequence[Tensor], settings: TrainSettings, half: str | None
    ) -> None:
        """Batches in their order, again and again; nothing is clipped."""
        optimizer = settings.make_optimizer(visit.block.parameters())
        steps = settings.steps or 0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate_at(step, steps)
            place = step % len(targets)
            with torch.enable_grad():
                loss = difference(visit, place, targets[place], half)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()


def prunes_block_by_block(method: LayerwisePruner) -> bool:
    """Whether what it prunes is what `prune_block` prunes, a block after the other."""
    return all(
        getattr(type(method), name) is getattr(LayerwisePruner, name)
        for name in ("prune", "apply", "prune_block")
    )


def layers_of(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Layers that a mask covers; where there is no mask, linear ones inside the blocks."""
    if masks:
        return list(dict.fromkeys(name.rpartition(".")[0] for name in masks))
    blocks = find_blocks(model)
    return [
        name
        for name, layer in model.named_modules()
        if name and is_known(layer) and owner_of(name, blocks) is not None
    ]


def ranks_of(layers: Iterable[str], weights: Mapping[str, float], mean: int) -> dict[str, int]:
    """The rank of every layer: in proportion to the weight of its block, `mean` elsewhere."""
    values = torch.tensor(list(weights.values()), dtype=torch.float64)
    by_block = dict(zip(weights, importance_ranks(values, mean), strict=True)) if weights else {}
    return {name: by_block.get(owner_of(name, weights) or "", mean) for name in layers}


def head_of(model: nn.Module) -> str | None:
    """The output layer: what a transformers model names so, or the last linear one outside of
    its blocks."""
    names = {id(module): name for name, module in model.named_modules()}
    named = getattr(model, "get_output_embeddings", lambda: None)()
    if named is not None and id(named) in names:
        return names[id(named)]
    blocks = find_blocks(model)
    outside = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name and owner_of(name, blocks) is None
    ]
    return outside[-1] if outside else None


def named_parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def biases_of(parameters: Mapping[str, nn.Parameter]) -> Iterator[nn.Parameter]:
    """Every bias, norms' and attentions' among them."""
    for name, parameter in parameters.items():
        if name.rpartition(".")[2].endswith("bias") and parameter.ndim == 1:
            yield parameter


def norms_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """Scales and shifts of normalisation layers."""
    for module in model.modules():
        if is_norm(module):
            yield from module.parameters(recurse=False)


def full_name(visit: Visit, name: str) -> str:
    """A name inside a block as the whole model has it."""
    return f"{visit.name}.{name}".strip(".")


def check_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise `RuntimeError` where a removed weight is not zero: adapters must keep every one."""
    for name, weight in named_parameters(model, masks).items():
        if bool(weight[~masks[name].to(weight.device)].any()):
            raise RuntimeError(f"{name}: merged adapters revived removed weights")


def weight_dtype(model: nn.Module) -> torch.dtype:
    """Of the first weight matrix."""
    return next((p.dtype for p in model.parameters() if p.ndim > 1), torch.float32)


@contextmanager
def in_float32(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters of half precision are float32 inside it."""
    halves = [(p, p.dtype) for p in parameters if p.dtype in HALF]
    for parameter, _ in halves:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in halves:
            parameter.data = parameter.data.to(dtype)


def leading(output: Any) -> Tensor:
    """The first tensor of numbers that a block gives: its hidden states."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise InputError("block", described(type(output).__name__), "outputs with a tensor of numbers")


@torch.no_grad()
def targets_of(visit: Visit, block: nn.Module) -> list[Tensor]:
    """What a block makes of the inputs of a visit."""
    return [leading(block(*call.args, **call.kwargs)) for call in visit.calls]


def same_blocks(model: nn.Module, dense: nn.Module, batches: Sequence[Any]) -> dict[str, nn.Module]:
    """The dense blocks by the names of a smaller model's.

    Raises:
        InputError: what goes from block to block is not of the same shape in the two.
    """
    wanted, there = block_shapes(dense, batches), block_shapes(model, batches)
    for name in there:
        if there[name] != wanted.get(name):
            told = f"reconstruct, but {name or 'the model'} takes or gives other shapes than before"
            raise InputError("mode", described(told), "retrain, or removal inside of blocks only")
    return {name: dense.get_submodule(name) for name in there}


def block_shapes(model: nn.Module, batches: Sequence[Any]) -> dict[str, list[Any]]:
    """Shapes of what every block takes and gives."""
    found = {}
    for visit in walk(model, batches):
        seen = [(call.args, call.kwargs) for call in visit.calls]
        found[visit.name] = [
            leaf.shape for leaf in tree_leaves([seen, visit.run()]) if isinstance(leaf, Tensor)
        ]
    return found


def difference(visit: Visit, place: int, target: Tensor, half: str | None) -> Tensor:
    """Mean square of what the block gives for a batch minus its target."""
    call = visit.calls[place]
    context: AbstractContextManager[Any] = nullcontext()
    if half is not None:
        dtype = next(d for d, name in HALF.items() if name == half)
        context = torch.autocast(target.device.type, dtype)
    with context:
        output = leading(visit.block(*call.args, **call.kwargs))
    return (output.float() - target.float()).square().mean()


@torch.no_grad()
def block_error(visit: Visit, targets: Sequence[Tensor], half: str | None) -> float:
    """Mean over the batches."""
    errors = [float(difference(visit, i, target, half)) for i, target in enumerate(targets)]
    return math.fsum(errors) / len(errors)


def require_finite(block: str, error: float) -> None:
    """Raise `DivergedError` for a reconstruction that came to NaN or Inf."""
    if not math.isfinite(error):
        raise DivergedError(
            f"reconstruction of {block or 'the model'}: got {error}; accepted: finite errors "
            "(lower the learning rate)"
        )
