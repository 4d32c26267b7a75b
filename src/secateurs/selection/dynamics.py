"""Scores of training samples out of trainings: how hard each is for a network that learns it.

    EL2N          ‖softmax(z) − onehot(y)‖₂                       at an early checkpoint
    GraNd         ‖∂ loss / ∂θ‖₂ of one sample                    at an early checkpoint
                  = ‖p − y‖₂ √(1 + ‖h‖²) of the last layer alone, h its inputs
    margin        −(p₍₁₎ − p₍₂₎), the two largest probabilities   at an early checkpoint
    forgetting    transitions from right to wrong between presentations, over a training
    EL2N online   Σ of EL2N over the first presentations of one training
    memorization  P(right | trained on it) − P(right | not), over trainings on random subsets
    influence     the same difference for a test sample: its largest over all, or Σ of absolutes

The first three are means over several trainings. Higher always means harder. The checkpoint is
read in eval mode, over the training set in its order.

Three things make a score: a formula of a batch (`el2n`, `last_layer_grand`, ...), an accumulator
that is told rows, logits and targets (`Forgetting`, `ErrorSums`, `Memorization`), and a driver
that trains (`early_scores`, `forgetting_scores`, ...). Accumulators see what a training sees
through `Watch`, which hangs in `secateurs.training.loop.fit` and is part of its snapshots; a
finished training is a finished step of the workspace.

Sources: Paul et al., arXiv 2107.07075 (EL2N, GraNd; code mansheej/data_diet); Toneva et al., arXiv
1812.05159 (forgetting); Feldman and Zhang, arXiv 2008.03703 (memorization, influence; code
google-research/heldout-influence-estimation). A training set that augments its samples is read as
it is: give a task whose training set does not, to score. Rows never learned have infinite
forgetting as in data_diet; two other codes leave them at 0, as if they were easy. The sources
divide by no run at all as by 1e-10, which makes a row that every run had look memorized; of 2000
runs none is such, of 8 one in twenty is: it has no estimate here, and scores 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateurs.devices import device_of, to_device
from secateurs.errors import described, require
from secateurs.parts.costs import evaluating
from secateurs.selection.score_table import hashed
from secateurs.settings import TrainSettings
from secateurs.state import Tree
from secateurs.task import Task, logits_of
from secateurs.training.loop import fit, total_steps
from secateurs.training.order import mix, steps_per_epoch
from secateurs.training.subset import BATCH, ROWS, in_order, numbered, task_on, training_rows
from secateurs.workspace import Workspace

Floats = NDArray[np.float64]
NeverLearned = Literal["inf", "zero"]
Influence = Literal["max", "sum-abs"]
GRADIENTS = 1 << 24
"""Entries of gradients of single samples that are held at once."""
CUSTOMARY = 0.05
"""Where nobody says, a checkpoint is early at this share of the training: 10 epochs of 200."""


# ------------------------------------------------------------ formulas of a batch


def el2n(logits: Tensor, target: Tensor) -> Tensor:
    """‖softmax(z) − onehot(y)‖₂, (n,), in [0, √2].

    Args:
        logits: (n, classes). target: (n,) classes.
    """
    errors = logits.softmax(-1)
    errors[torch.arange(len(target), device=errors.device), target] -= 1
    return torch.linalg.vector_norm(errors, dim=-1)


def margins(logits: Tensor) -> Tensor:
    """The largest probability less the second, (n,), in [0, 1]; no label is looked at."""
    top = logits.softmax(-1).topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def last_layer_grand(logits: Tensor, target: Tensor, features: Tensor, bias: bool = True) -> Tensor:
    """Norm of the gradient of each sample's cross entropy for the last layer's weights, (n,).

    Args:
        features: (n, width), the inputs of that layer.
        bias: whether it has one.
    """
    return el2n(logits, target) * (features.square().sum(1) + float(bias)).sqrt()


# ------------------------------------------------------------ reading a network

Reading = Callable[[Task, nn.Module, Any], Tensor]
"""(task, model in eval mode, batch on its device) -> (n,), a number a sample."""


def read_el2n(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """EL2N of a batch."""
    inputs, target = task.unpack(batch)
    return el2n(class_logits(task.forward(model, inputs)), target)


def read_margin(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """Minus the margin of a batch."""
    inputs, _ = task.unpack(batch)
    return -margins(class_logits(task.forward(model, inputs)))


def read_correct(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """Whether each sample of a batch is classified right."""
    inputs, target = task.unpack(batch)
    return class_logits(task.forward(model, inputs)).argmax(-1) == target


def read_last_layer_grand(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """GraNd of the last layer.

    Raises:
        InputError: what the model puts out is not what a linear layer does.
    """
    inputs, target = task.unpack(batch)
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        seen.append((layer, args[0], output))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        logits = class_logits(task.forward(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    ends = seen and seen[-1][2].shape == logits.shape and torch.equal(seen[-1][2], logits)
    told = described(type(model).__name__)
    require(bool(ends), "model", told, "a model that ends in a linear layer, or last_layer=false")
    layer, features, _ = seen[-1]
    return last_layer_grand(logits, target, features, layer.bias is not None)


def read_grand(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """Norms of the gradients of single samples for all weights that are trained."""
    from torch.utils._pytree import tree_map

    inputs, target = task.unpack(batch)
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    fixed = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], one: Any, label: Tensor) -> Tensor:
        alone = tree_map(lambda x: x[None], one)
        arguments, keywords = ((), alone) if isinstance(alone, dict) else ((alone,), {})
        state = {**weights, **fixed}
        output = torch.func.functional_call(model, state, arguments, keywords)
        return task.loss(output, label[None])

    size = max(1, GRADIENTS // max(1, sum(p.numel() for p in params.values())))
    each = torch.func.vmap(
        torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=size, randomness="different"
    )
    with torch.enable_grad():
        gradients = each(params, inputs, target)
    squares = [g.flatten(1).double().square().sum(1) for g in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def class_logits(output: Any) -> Tensor:
    """Logits of shape (n, classes).

    Raises:
        InputError: of another shape, or not finite.
    """
    logits = logits_of(output)
    told = described(f"outputs of shape {tuple(logits.shape)}")
    require(logits.ndim == 2 and logits.shape[1] >= 2, "model", told, "logits, (n, classes)")
    require(bool(torch.isfinite(logits).all()), "model", described("NaN or Inf in its logits"),
            "finite logits")  # fmt: skip
    return logits if logits.dtype == torch.float64 else logits.float()


def read_rows(task: Task, model: nn.Module, reading: Reading, loader: Iterable[Any]) -> Tensor:
    """A reading of every sample of a loader, in its order, in eval mode, on the CPU."""
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        parts = [reading(task, model, to_device(batch, device)).cpu() for batch in loader]
    return torch.cat(parts)


# ------------------------------------------------------------ accumulators


class Accumulator(Protocol):
    """Is told what a network answered, sample by sample; a tree when it must be kept."""

    def see(self, rows: Tensor, logits: Tensor, target: Tensor) -> None:
        """Rows were shown: their numbers (n,), logits (n, classes) and classes (n,), on the CPU."""
        ...

    def state_dict(self) -> Tree:
        """All it remembers."""
        ...

    def load_state_dict(self, state: Tree) -> None:
        """Take that back."""
        ...


class _Counts:
    """Tensors of one entry a row, by name."""

    def __init__(self, **counts: Tensor) -> None:
        self.counts = counts

    def state_dict(self) -> Tree:
        return {name: values.clone() for name, values in self.counts.items()}

    def load_state_dict(self, state: Tree) -> None:
        for name, values in self.counts.items():
            told = described(f"{len(state[name])} rows")
            require(state[name].shape == values.shape, name, told, f"{len(values)} rows")
            values.copy_(state[name])


class Forgetting(_Counts):
    """Counts how often a row that was right is wrong at its next presentation."""

    def __init__(self, rows: int) -> None:
        super().__init__(
            last=torch.zeros(rows, dtype=torch.bool),
            learned=torch.zeros(rows, dtype=torch.bool),
            events=torch.zeros(rows, dtype=torch.int32),
        )

    def see(self, rows: Tensor, logits: Tensor, target: Tensor) -> None:
        self.see_correct(rows, logits.argmax(-1) == target)

    def see_correct(self, rows: Tensor, correct: Tensor) -> None:
        """Rows were shown, and answered right or wrong."""
        last, learned, events = self.counts["last"], self.counts["learned"], self.counts["events"]
        events[rows] += (last[rows] & ~correct).int()
        last[rows] = correct
        learned[rows] |= correct

    def scores(self, never_learned: NeverLearned = "inf") -> Floats:
        """The counts; of rows never answered right, infinity or 0."""
        counts = self.counts["events"].double()
        if never_learned == "inf":
            counts[~self.counts["learned"]] = torch.inf
        return counts.numpy()


class ErrorSums(_Counts):
    """Adds EL2N over the first `presentations` of every row."""

    def __init__(self, rows: int, presentations: int) -> None:
        require(presentations >= 1, "presentations", presentations, "at least 1")
        super().__init__(
            sums=torch.zeros(rows, dtype=torch.float64), seen=torch.zeros(rows, dtype=torch.int32)
        )
        self.presentations = presentations

    def see(self, rows: Tensor, logits: Tensor, target: Tensor) -> None:
        sums, seen = self.counts["sums"], self.counts["seen"]
        new = seen[rows] < self.presentations
        sums[rows] += el2n(logits, target).double() * new
        seen[rows] += new.int()

    def scores(self) -> Floats:
        """The sums."""
        return self.counts["sums"].numpy().copy()


class Memorization(_Counts):
    """How often rows were right in trainings that had them, and in trainings that had not.

    Counters of parts of the trainings add up (`add`).
    """

    def __init__(self, rows: int) -> None:
        names = ("n_in", "right_in", "n_out", "right_out")
        super().__init__(**{name: torch.zeros(rows, dtype=torch.int32) for name in names})

    def see_run(self, member: Tensor, correct: Tensor) -> None:
        """A training on the rows where `member` holds ended; `correct` over all rows, bool."""
        for side, had in (("in", member), ("out", ~member)):
            self.counts[f"n_{side}"] += had.int()
            self.counts[f"right_{side}"] += (had & correct).int()

    def add(self, other: Memorization) -> None:
        """Count the trainings of another as well."""
        for name, values in self.counts.items():
            values += other.counts[name]

    @property
    def known(self) -> NDArray[np.bool_]:
        """Rows that some training had and some had not, (rows,)."""
        there: NDArray[np.bool_] = ((self.counts["n_in"] > 0) & (self.counts["n_out"] > 0)).numpy()
        return there

    def scores(self) -> Floats:
        """The difference of the two shares; 0 where nothing is known."""
        made = {name: values.double() for name, values in self.counts.items()}
        inside, outside = (made[f"right_{s}"] / made[f"n_{s}"].clamp_min(1) for s in ("in", "out"))
        found: Floats = np.where(self.known, (inside - outside).numpy(), 0.0)
        return found


def influences(members: Tensor, correct: Tensor, kind: Influence = "max") -> Floats:
    """How much training on each row changes what is right on test samples, (rows,).

    Args:
        members: (runs, rows), bool: who was trained on.
        correct: (runs, tests), bool.
        kind: the largest over the test samples, or the sum of absolute values; 0 for a row that
            all runs had, or none.
    """
    right = correct.double()
    found = []
    for some in members.split(4096, dim=1):
        had = some.double()
        inside, outside = had.sum(0)[:, None], (1 - had).sum(0)[:, None]
        change = had.T @ right / inside.clamp_min(1) - (1 - had).T @ right / outside.clamp_min(1)
        change *= (inside > 0) & (outside > 0)
        found.append(change.amax(1) if kind == "max" else change.abs().sum(1))
    return torch.cat(found).numpy()


class Watch:
    """A task whose trainings tell accumulators what was shown and answered.

        watch = Watch(task, [Forgetting(rows)])
        fit(model, watch.task, settings, attach=watch.attach)

    It is one of the hooks of that training, and kept in its snapshots.

    Raises:
        InputError: rows have no numbers (see `training_rows`), or several processes train, each
            of which would see only its share.
    """

    def __init__(self, task: Task, accumulators: Sequence[Accumulator]) -> None:
        spread = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        require(not spread, "task", described("a training by several processes"), "one process")
        self.inner, self.accumulators = task, tuple(accumulators)
        self.rows: Tensor | None = None
        self.task = replace(task, train=numbered(task), split=self._split, loss=self._loss)

    def _split(self, batch: Any) -> tuple[Any, Any]:
        own = isinstance(batch, dict) and set(batch) == {ROWS, BATCH}
        self.rows = batch[ROWS].cpu() if own else None
        return self.inner.unpack(batch[BATCH] if own else batch)

    def _loss(self, output: Any, target: Tensor) -> Tensor:
        if self.rows is not None:
            logits = class_logits(output).detach().cpu()
            for accumulator in self.accumulators:
                accumulator.see(self.rows, logits, target.cpu())
            self.rows = None
        return self.inner.loss(output, target)

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, total: int) -> list[Watch]:
        """For `fit`."""
        return [self]

    def state_dict(self) -> Tree:
        """Of all accumulators."""
        return {"accumulators": [a.state_dict() for a in self.accumulators]}

    def load_state_dict(self, state: Tree) -> None:
        """Take it back."""
        for accumulator, own in zip(self.accumulators, state["accumulators"], strict=True):
            accumulator.load_state_dict(own)

    def finish(self) -> None:
        """Nothing is left to do."""

    def remove(self) -> None:
        """Nothing hangs on the optimizer."""


# ------------------------------------------------------------ trainings that score


def early_step(task: Task, settings: TrainSettings, epoch: float | None) -> int:
    """The update at which a checkpoint is early: after `epoch`, or a twentieth of the training
    but at least one epoch where that is None.

    Raises:
        InputError: the training ends before.
    """
    total, per_epoch = total_steps(task, settings), steps_per_epoch(task.training_loader())
    if epoch is None:
        return min(total, max(round(CUSTOMARY * total), per_epoch))
    step = round(epoch * per_epoch)
    accepted = f"above 0, and at most {total / per_epoch:g}, the epochs of the training"
    require(1 <= step <= total, "epoch", epoch, accepted)
    return step


def early_scores(
    task: Task,
    reading: Reading,
    *,
    runs: int = 10,
    epoch: float | None = None,
    settings: TrainSettings | None = None,
    seed: int = 0,
    work: Workspace | None = None,
) -> Floats:
    """Means over `runs` trainings of what is read at an early checkpoint, a training row each.

    Args:
        reading: such as `read_el2n`.
        epoch: of the checkpoint, see `early_step`.
        settings: of the whole training; ``task.training`` by default.
        work: where finished trainings are kept.
    """
    require(runs >= 1, "runs", runs, "at least 1")
    settings, work = settings or task.training, work or Workspace()
    rows, stop = training_rows(task), early_step(task, settings, epoch)
    total = np.zeros(rows)
    for run in range(runs):

        def compute(run: int = run) -> Tree:
            model = _trained(task, settings, mix(seed, run), work, f"run-{run:03}", stop)
            read = read_rows(task, model, reading, in_order(task.training_loader()))
            return {"read": read.double()}

        total += work.once(f"read-{run:03}", compute)["read"].numpy()
        work.drop_snapshot(f"run-{run:03}")
    return total / runs


def _trained(
    task: Task, settings: TrainSettings, seed: int, work: Workspace, name: str, stop: int | None
) -> nn.Module:
    model = task.fresh_model(seed)
    fit(model, task, settings, seed=seed, stop_step=stop, work=work, name=name)
    return model


def watched_scores(
    task: Task,
    accumulator: Accumulator,
    *,
    settings: TrainSettings | None = None,
    seed: int = 0,
    work: Workspace | None = None,
    name: str = "watched",
    stop_step: int | None = None,
) -> None:
    """Tell an accumulator all that one training shows."""
    settings, work = settings or task.training, work or Workspace()

    def compute() -> Tree:
        watch = Watch(task, [accumulator])
        fit(
            task.fresh_model(seed), watch.task, settings,
            seed=seed, stop_step=stop_step, work=work, name=f"{name}-training",
            attach=watch.attach,
        )  # fmt: skip
        return accumulator.state_dict()

    accumulator.load_state_dict(work.once(name, compute))
    work.drop_snapshot(f"{name}-training")


def forgetting_scores(
    task: Task,
    *,
    runs: int = 1,
    never_learned: NeverLearned = "inf",
    settings: TrainSettings | None = None,
    seed: int = 0,
    work: Workspace | None = None,
) -> Floats:
    """Forgetting events over whole trainings, the mean over `runs`, a training row each.

    A row is never learned, hence infinite, if it is so in any of the runs.
    """
    require(runs >= 1, "runs", runs, "at least 1")
    counted = [Forgetting(training_rows(task)) for _ in range(runs)]
    for run, own in enumerate(counted):
        watched_scores(task, own, settings=settings, seed=mix(seed, run), work=work,
                       name=f"forgetting-{run:03}")  # fmt: skip
    found: Floats = np.mean([own.scores(never_learned) for own in counted], axis=0)
    return found


def online_el2n_scores(
    task: Task,
    *,
    runs: int = 1,
    epochs: int = 10,
    settings: TrainSettings | None = None,
    seed: int = 0,
    work: Workspace | None = None,
) -> Floats:
    """EL2N summed over the first `epochs` presentations in training, the mean over `runs`.

    Raises:
        InputError: the training has fewer epochs.
    """
    require(runs >= 1, "runs", runs, "at least 1")
    settings = settings or task.training
    stop = early_step(task, settings, float(epochs))
    counted = [ErrorSums(training_rows(task), epochs) for _ in range(runs)]
    for run, own in enumerate(counted):
        watched_scores(task, own, settings=settings, seed=mix(seed, run), work=work,
                       name=f"online-{run:03}", stop_step=stop)  # fmt: skip
    found: Floats = np.mean([own.scores() for own in counted], axis=0)
    return found


def members_of(rows: int, ratio: float, seed: int, run: int) -> Tensor:
    """Who is trained on in a run, (rows,), bool: by a hash of row and run, so no mask is kept."""
    below = hashed(np.arange(rows), mix(seed, run)) < np.uint64(int(ratio * 2.0**64))
    return torch.from_numpy(below)


@dataclass(frozen=True)
class SubsetRuns:
    """Trainings on random subsets, and what each got right.

    Attributes:
        members: (runs, rows), bool: who was trained on.
        correct: (runs, rows), bool, over the training set.
        tests: (runs, tests), bool, over ``task.evaluate``.
    """

    members: Tensor
    correct: Tensor
    tests: Tensor

    def memorization(self) -> Memorization:
        """The counters of all runs."""
        counted = Memorization(self.members.shape[1])
        for member, correct in zip(self.members, self.correct, strict=True):
            counted.see_run(member, correct)
        return counted


def subset_runs(
    task: Task,
    *,
    runs: int = 2000,
    ratio: float = 0.7,
    settings: TrainSettings | None = None,
    seed: int = 0,
    work: Workspace | None = None,
) -> SubsetRuns:
    """Train on `runs` random subsets of about `ratio` of the rows.

    Raises:
        InputError: fewer than 2 runs, or a ratio outside (0, 1).
    """
    require(runs >= 2, "runs", runs, "at least 2, for memorization")
    require(0 < ratio < 1, "ratio", ratio, "a share in (0, 1)")
    settings, work = settings or task.training, work or Workspace()
    rows = training_rows(task)
    members = torch.stack([members_of(rows, ratio, seed, run) for run in range(runs)])
    found: list[Tree] = []
    for run in range(runs):

        def compute(run: int = run) -> Tree:
            own = task_on(task, members[run])
            model = _trained(own, settings, mix(seed, run), work, f"subset-{run:04}", None)
            loaders = {
                "correct": in_order(task.training_loader()),
                "tests": in_order(task.evaluate, "task.evaluate"),
            }
            return {
                side: _packed(read_rows(task, model, read_correct, loader))
                for side, loader in loaders.items()
            }

        found.append(work.once(f"right-{run:04}", compute))
        work.drop_snapshot(f"subset-{run:04}")
    return SubsetRuns(members, *(
        torch.stack([_unpacked(one[side]) for one in found]) for side in ("correct", "tests")
    ))  # fmt: skip


def _packed(bits: Tensor) -> Tree:
    return {"bits": torch.from_numpy(np.packbits(bits.numpy())), "count": len(bits)}


def _unpacked(tree: Tree) -> Tensor:
    return torch.from_numpy(np.unpackbits(tree["bits"].numpy(), count=tree["count"])).bool()


def memorization_scores(task: Task, **options: Any) -> Floats:
    """Memorization of every training row; options as for `subset_runs`."""
    return subset_runs(task, **options).memorization().scores()


def influence_scores(task: Task, kind: Influence = "max", **options: Any) -> Floats:
    """Influence of every training row on ``task.evaluate``; options as for `subset_runs`.

    It looks at held-out labels: give it a task whose evaluation set is not the one that judges.
    """
    found = subset_runs(task, **options)
    return influences(found.members, found.tests, kind)
