"""The training loop, on Hugging Face Accelerate.

Everything that is random at update t is drawn from (seed, t): data order, dropout and
augmentation. So a training can start at any step, stop at any step, and be resumed from a
snapshot with the very same numbers. Whoever wants to act after the backward pass or after the
step hangs hooks on the optimizer (`secateurs.training.attachment`); the loop knows of them
only that their state belongs into the snapshot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateurs.devices import device_of, to_device
from secateurs.errors import DivergedError, InputError, require
from secateurs.settings import TrainSettings
from secateurs.state import Tree, model_state
from secateurs.task import Task
from secateurs.training.order import batches_from, mix, steps_per_epoch
from secateurs.workspace import Workspace


class Hook(Protocol):
    """Something attached to the optimizer whose state must survive a restart."""

    def state_dict(self) -> Tree:
        """Its state, as a tree of tensors and plain values."""
        ...

    def load_state_dict(self, state: Tree) -> None:
        """Take a state back."""
        ...

    def finish(self) -> None:
        """The last step of the whole training has been made."""
        ...

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        ...


Attach = Callable[[nn.Module, torch.optim.Optimizer, int], Sequence[Hook]]
"""(model, optimizer, total steps) -> the hooks that were attached."""


@dataclass
class History:
    """What a training tells afterwards.

    Attributes:
        steps: updates made.
        losses: (update number, loss) every `every` updates.
        evaluations: (updates made so far, metrics).
    """

    steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def as_tree(self) -> Tree:
        """For `Workspace.once` and snapshots."""
        return {"steps": self.steps, "losses": self.losses, "evaluations": self.evaluations}

    @staticmethod
    def from_tree(tree: Tree) -> History:
        """The inverse of `as_tree`."""
        return History(tree["steps"], list(tree["losses"]), list(tree["evaluations"]))


def total_steps(task: Task, settings: TrainSettings) -> int:
    """Updates of a whole training of `task` by `settings`."""
    if settings.steps is not None:
        return settings.steps
    return settings.total_steps(steps_per_epoch(task.training_loader()))


def fit(
    model: nn.Module,
    task: Task,
    settings: TrainSettings,
    *,
    seed: int = 0,
    start_step: int = 0,
    stop_step: int | None = None,
    attach: Attach | None = None,
    work: Workspace | None = None,
    name: str = "train",
    evaluate_every: int = 0,
    optimizer_state: Tree | None = None,
    on_end: Callable[[torch.optim.Optimizer], None] | None = None,
) -> History:
    """Train `model` in place from update `start_step` to `stop_step`.

    The optimizer is fresh; the learning rate and the data order are those of a training that
    began at 0, so a run over [0, k) followed by one over [k, T) differs from a run over [0, T)
    only in the optimizer's state.

    Args:
        model: trained where Accelerate trains, given back where it was, in training mode.
        settings: the whole training; ``settings.total_steps`` is T.
        seed: of data order, augmentation and dropout.
        start_step, stop_step: the part of the training to run; to the end by default.
        attach: called once with the model and the optimizer before the first step.
        work: where snapshots are kept and progress is told.
        name: of this training within `work`.
        evaluate_every: updates between two evaluations on ``task.evaluate``; 0 for none.
        optimizer_state: state to begin with, as `Trained.optimizer`; empty by default.
        on_end: called with the optimizer after the last step.

    Raises:
        DivergedError: the loss is NaN or Inf; the step is named.
        InputError: start and stop do not lie within the training.
    """
    work = work or Workspace()
    total = total_steps(task, settings)
    stop = total if stop_step is None else stop_step
    require(0 <= start_step <= total, "start_step", start_step, f"a step from 0 to {total}")
    require(start_step <= stop <= total, "stop_step", stop, f"{start_step} to {total}")
    accelerator = _accelerator(settings.precision)
    history = History(start_step)
    optimizer = settings.make_optimizer(model.parameters())
    base_rates = [group["lr"] for group in optimizer.param_groups]
    home = device_of(model)
    model.to(accelerator.device)
    model.train()
    if optimizer_state is not None:
        # torch keeps the very tensors it is given, and the steps would change them
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    hooks = attach(model, optimizer, total) if attach is not None else ()
    # attach may have put parameters into groups of their own
    base_rates += [settings.lr] * (len(optimizer.param_groups) - len(base_rates))
    own_forward = "forward" in vars(model)

    def snapshot() -> Tree:
        return {
            "model": model_state(model),
            "optimizer": optimizer.state_dict(),
            "hooks": [hook.state_dict() for hook in hooks],
            "history": history.as_tree(),
        }

    if (saved := work.last_snapshot(name)) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for hook, state in zip(hooks, saved["hooks"], strict=True):
            hook.load_state_dict(state)
        history = History.from_tree(saved["history"])

    wrapped, prepared = accelerator.prepare(model, optimizer)
    batches = batches_from(
        task.training_loader(),
        seed,
        history.steps,
        accelerator.process_index,
        accelerator.num_processes,
    )
    log_every = max(1, (stop - start_step) // 200)
    try:
        with work.progress(name, stop - start_step) as advance, own_randomness():
            advance(history.steps - start_step)
            for step in range(history.steps, stop):
                _seed(mix(seed, step, 1), accelerator.device)
                batch, weight = next(batches)
                rate = settings.rate_at(step, total)
                for group, base in zip(optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = base * (rate / settings.lr)
                loss = task.batch_loss(wrapped, to_device(batch, accelerator.device))
                _check(loss, f"{work.label}/{name}" if work.label else name, step)
                accelerator.backward(loss * weight if weight != 1.0 else loss)
                if settings.clip_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), settings.clip_norm)
                prepared.step()
                prepared.zero_grad()
                history.steps = step + 1
                if step % log_every == 0 or step + 1 == stop:
                    history.losses.append((step, loss.item()))
                    work.event("train", stage=name, step=step, loss=loss.item(), lr=rate)
                if evaluate_every and (step + 1) % evaluate_every == 0:
                    metrics = task.measure(model)
                    history.evaluations.append((step + 1, metrics))
                    work.event("evaluate", stage=name, step=step + 1, **metrics)
                advance(step + 1 - start_step)
                if accelerator.is_main_process:
                    work.snapshot(name, snapshot)
        if stop == total:
            for hook in hooks:
                hook.finish()
        if on_end is not None:
            on_end(optimizer)
    finally:
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        if not own_forward:
            vars(model).pop("forward", None)  # Accelerate leaves it bound to the instance
        for hook in hooks:
            hook.remove()
        model.to(home)
    return history


@dataclass
class Trained:
    """A finished training.

    Attributes:
        history: what it told.
        hooks: final states of the hooks that were attached.
        optimizer: final state of the optimizer, if it was to be kept.
    """

    history: History
    hooks: list[Tree]
    optimizer: Tree | None = None


def fit_once(
    model: nn.Module,
    task: Task,
    settings: TrainSettings,
    *,
    work: Workspace | None = None,
    name: str = "train",
    attach: Attach | None = None,
    keep_optimizer: bool = False,
    **options: Any,
) -> Trained:
    """`fit`, unless `work` holds the finished training `name`; then `model` takes its weights.

    Args:
        keep_optimizer: whether the optimizer's final state is wanted.
        options: further arguments of `fit`.
    """
    work = work or Workspace()
    attached: list[Hook] = []
    final: dict[str, Tree] = {}

    def keep(optimizer: torch.optim.Optimizer) -> None:
        if keep_optimizer:
            final["optimizer"] = optimizer.state_dict()

    def attach_and_note(net: nn.Module, optimizer: torch.optim.Optimizer, total: int) -> list[Hook]:
        attached.extend(attach(net, optimizer, total) if attach is not None else ())
        return attached

    def compute() -> Tree:
        history = fit(
            model,
            task,
            settings,
            work=work,
            name=name,
            attach=attach_and_note,
            on_end=keep,
            **options,
        )
        return {
            **final,
            "model": model_state(model),
            "history": history.as_tree(),
            "hooks": [hook.state_dict() for hook in attached],
        }

    tree = work.once(name, compute)
    work.drop_snapshot(name)
    model.load_state_dict(tree["model"])
    return Trained(History.from_tree(tree["history"]), tree["hooks"], tree.get("optimizer"))


def _accelerator(precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") not in (None, precision):
        # Accelerate keeps one precision per process; a later stage may ask for another
        AcceleratorState._reset_state()
    try:
        return Accelerator(mixed_precision=precision)
    except ValueError as error:
        raise InputError("precision", precision, f"what this machine can do ({error})") from None


def _seed(value: int, device: torch.device) -> None:
    """What dropout draws from. `torch.manual_seed` visits every kind of device, which takes
    longer (0.14 ms) than a step of a small network on the CPU."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)


def _check(loss: Tensor, name: str, step: int) -> None:
    if not torch.isfinite(loss):
        kind = "NaN" if torch.isnan(loss) else "Inf"
        raise DivergedError(
            f"loss: {kind} at step {step} of {name}; accepted: finite losses "
            "(lower the learning rate, or check the data)"
        )


@contextmanager
def own_randomness() -> Iterator[None]:
    """Give the caller's generators back as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
