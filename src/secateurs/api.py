"""Three lines: a task, `prune`, `save`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateurs.deploy.timing import TABLE, check_engines, compare_latency, latency_rows
from secateurs.devices import device_of
from secateurs.errors import InputError, described, require
from secateurs.method import (
    Codec,
    Method,
    Procedure,
    Pruner,
    Selector,
    TrainingPruner,
    masked_outcome,
)
from secateurs.outcome import Outcome, Promise
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import measure_cost
from secateurs.parts.masks import Masks
from secateurs.parts.peft_layers import refuse_adapters
from secateurs.parts.prunable import fixed_parameters
from secateurs.parts.scales import norm_scales
from secateurs.ray_connection import check_address, connected
from secateurs.recovery import Recover, Recovery, check_recovery, finetune, recovery
from secateurs.registry import create, options_as_dict
from secateurs.task import Task
from secateurs.training.loop import fit_once
from secateurs.training.peft_adapters import merged
from secateurs.workspace import Workspace

if TYPE_CHECKING:
    from secateurs.selection.embeddings import Embeddings
    from secateurs.selection.files import Names
    from secateurs.selection.result import Selection
    from secateurs.selection.sources import Encoder
    from secateurs.structure.axes import Structure


def prune(
    model: nn.Module,
    method: str | Method,
    budget: str | Budget,
    task: Task | None = None,
    *,
    base: nn.Module | None = None,
    seed: int = 0,
    recover: Recover = True,
    inplace: bool = False,
    with_latency: bool = False,
    engines: Sequence[str] = ("eager",),
    work: Workspace | None = None,
    **options: Any,
) -> Outcome:
    """Prune a model by a published method, let it recover, and measure what was won and lost.

    Args:
        model: the weights to start from. One-shot methods prune them; training pruners train
            on from them by ``task.training``; procedures take them as the initial weights. A
            `peft.PeftModel` with LoRA for ``loraprune`` and ``darex``, which merge it.
        method: a name of `secateurs.list_methods`, or a method object.
        budget: what to come down to, such as ``sparsity=0.9``.
        task: data, loss and metrics. Without one, only one-shot methods that need no data run,
            and nothing recovers or is scored.
        base: the model that `model` was fine-tuned from, for methods that prune the difference.
        seed: of everything random.
        recover: after one-shot methods, train with the masks kept: by ``task.finetuning``, or
            by ``task.training`` for methods that prune before training. Or how any method's
            result is to recover: ``finetune``, ``lora``, ``perp``, ``{"perp": {options}}``,
            ``none``.
        inplace: work on `model` itself; by default on a copy. On an error the copy is dropped,
            or the model gets its weights back.
        with_latency: time a forward pass before and after.
        engines: those of `secateurs.deploy.timing` in which it is timed; with more than
            ``eager``, the outcome has a table of them.
        work: where finished steps are kept (see `secateurs.Workspace`).
        options: hyper-parameters of the method, when it is given by name.

    Returns:
        The outcome; its model is in eval mode.

    Raises:
        InputError: unknown method or option, a budget the method cannot honour, a model with
            nothing to prune, missing data.
    """
    chosen = create(method, options) if isinstance(method, str) else method
    require(not (options and not isinstance(method, str)), "options", options, "a method's name")
    if isinstance(chosen, Selector):
        raise InputError(
            "method", chosen.name, "a method for models; secateurs.select runs this one"
        )
    parsed = chosen.accept(budget)
    check_engines(engines)
    how = recovery(recover)
    work = work or Workspace()
    _check_needs(chosen, model, task, base)
    check_recovery(how, task, chosen)
    dense = copy.deepcopy(model) if inplace else model
    net = model if inplace else copy.deepcopy(model)
    try:
        outcome = _run(chosen, net, dense, parsed, task, seed, how is True, work, base)
        if isinstance(how, Recovery):
            _recover(outcome, how, chosen, task, dense, seed, work)
    except BaseException:
        if inplace:
            _give_back(model, dense)
        raise
    outcome.method, outcome.options = chosen.name, options_as_dict(chosen)
    outcome.budget, outcome.seed = str(parsed), seed
    outcome.model.eval()
    _measure(outcome, merged(dense), task, engines if with_latency else ())
    outcome.promise = outcome.promise or promise_of(outcome, parsed)
    if not outcome.promise.kept:
        outcome.notes.append(f"budget {outcome.promise}")
    return outcome


def select(
    source: Any,
    method: str | Method,
    keep: float | str | Budget,
    task: Task | None = None,
    *,
    ids: Any = None,
    labels: Any = None,
    scores: Mapping[str, Any] | None = None,
    target: Any = None,
    encoder: Encoder | None = None,
    samples: Any = None,
    names: Names | None = None,
    seed: int = 0,
    forbid_empty_classes: bool = False,
    ray: str | None = None,
    work: Workspace | None = None,
    **options: Any,
) -> Selection:
    """Choose which samples of a data set to keep.

    Args:
        source: a path to Parquet, Arrow, npy or npz, one file or a folder of shards; a tensor
            or array (rows, width); a mapping with ``embeddings`` and further columns; a Hugging
            Face or torch data set, with an `encoder` where the method needs embeddings.
        method: a name of `secateurs.list_methods`, or a method object.
        keep: the fraction that stays, in (0, 1], or a budget such as ``keep=0.25``.
        task: for methods that train, or look at the outputs of a model.
        ids, labels: (rows,), where the source has none; rows are numbered without ids.
        scores: further columns by name, (rows,) each, which methods may use.
        target: another source, for methods that select for it.
        encoder: from a batch of samples to embeddings, for data sets.
        samples: the data set by row number, behind embeddings that were made from one, for the
            pictures of the report.
        names: of the columns in files, where they are not the usual ones.
        seed: of everything random.
        forbid_empty_classes: refuse a selection that leaves nothing of a class, which otherwise
            is noted.
        ray: address of a Ray cluster that does the work of the shards, or ``local``.
        work: where finished shards are kept, so that a killed selection goes on; several
            selections may share it (see `secateurs.selection.identity`).
        options: hyper-parameters of the method, when it is given by name.

    Returns:
        The selection: ids, scores, clusters, and who stays.

    Raises:
        InputError: unknown method or option, rows that cannot be used (NaN, zero vectors under
            cosine, ids that repeat), missing labels or columns, a fraction that cannot be kept.
    """
    from secateurs.selection.identity import identity, told_of_selection
    from secateurs.selection.sources import as_embeddings

    chosen = create(method, options) if isinstance(method, str) else method
    require(not (options and not isinstance(method, str)), "options", options, "a method's name")
    if not isinstance(chosen, Selector):
        raise InputError(
            "method", chosen.name, "a method for samples; secateurs.prune runs this one"
        )
    budget = chosen.accept(keep)
    if ray is not None:
        check_address(ray)
    work = work or Workspace()
    made = as_embeddings(
        source, ids=ids, labels=labels, scores=scores, encoder=encoder, samples=samples,
        names=names, work=_encoding(work, source, encoder),
    )  # fmt: skip
    aim = None
    if target is not None:
        aim = as_embeddings(
            target, encoder=encoder, names=names, work=_encoding(work, target, encoder)
        )
    _check_rows(chosen, made, aim, task)
    made.check_ids(work)
    if work.folder is not None:
        own = identity(told_of_selection(chosen, budget, seed, made, aim, task))
        work = replace(work, folder=work.folder / own)
    with _cluster(ray, made):
        selection = chosen.select(made, budget, task, target=aim, seed=seed, work=work)
    selection.method, selection.options = chosen.name, options_as_dict(chosen)
    selection.budget, selection.seed = str(budget), seed
    reached = selection.kept / selection.total
    selection.promise = selection.promise or Promise("keep", budget.value, reached, 1 / made.rows)
    selection.check_classes(forbid=forbid_empty_classes)
    if not selection.promise.kept:
        selection.notes.append(f"budget {selection.promise}")
    return selection


def _encoding(work: Workspace, source: Any, encoder: Encoder | None) -> Workspace:
    """Where what is read of a data set, and made of it by an encoder, is kept."""
    from secateurs.selection.identity import identity, told_of_encoder, told_of_samples

    read = hasattr(source, "__len__") and not isinstance(source, str | torch.Tensor | Mapping)
    if work.folder is None or not read:
        return work.child("encoded")
    told = {"samples": told_of_samples(source), "encoder": told_of_encoder(encoder)}
    return replace(work, folder=work.folder / f"encoded-{identity(told)}")


@contextmanager
def _cluster(address: str | None, source: Embeddings) -> Iterator[None]:
    """Shards are worked on at a Ray cluster meanwhile, where there is an address."""
    if address is None:
        yield
        return
    with connected(address):
        source.ray = address
        try:
            yield
        finally:
            source.ray = None


def _check_rows(
    method: Selector, source: Embeddings, target: Embeddings | None, task: Task | None
) -> None:
    """Refuse a source without what the method needs."""
    needs = method.required
    if "embeddings" in needs and not source.width:
        raise InputError(
            "embeddings", described("none"), f"{method.name} needs them, or an encoder"
        )
    if "labels" in needs and not source.labelled:
        raise InputError("labels", None, f"a label for every row: {method.name} needs them")
    if "scores" in needs and not source.columns:
        raise InputError("scores", None, f"columns of numbers: {method.name} needs them")
    if ("target" in needs) != (target is not None):
        wanted = "the rows to select for" if "target" in needs else "none"
        told = None if target is None else described(f"{target.rows} rows")
        raise InputError("target", told, f"{wanted}, for {method.name}")
    if task is None and set(needs) & {"batches", "training", "fresh-model"}:
        raise InputError("task", None, f"a Task: {method.name} needs {', '.join(needs)}")


def axes(model: nn.Module, example_inputs: Any) -> Structure:
    """Every axis of a model that can be shortened, and why the others cannot.

    Args:
        model: any module that torch.export can trace.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keywords.

    Returns:
        A mapping from name to `secateurs.structure.axes.Group`, which prints as a table.

    Raises:
        InputError: the model cannot be traced.
    """
    from secateurs.structure.axes import Structure
    from secateurs.structure.trace import trace

    return Structure(trace(model, example_inputs))


def prune_checkpoint(
    folder: str | Path,
    out: str | Path,
    method: str | Method,
    budget: str | Budget,
    batches: Sequence[Any] = (),
    *,
    work: Workspace | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Prune a transformers checkpoint that may be larger than memory, from disk to disk.

    Called again after it was killed, with the same arguments, it goes on at the block that was
    not finished; the files are the same, byte for byte.

    Args:
        folder: ``config.json`` and safetensors, as `save_pretrained` writes them.
        out: a folder that is new or empty, or one that an earlier call with the same arguments
            left; plain `from_pretrained` reads it afterwards.
        method: a layer-wise method (magnitude, wanda, sparsegpt), by name or as an object.
        batches: calibration inputs as the model takes them, for methods that look at inputs.
        options: hyper-parameters of the method, when it is given by name.

    Returns:
        What is written as ``secateurs.json``: what was asked, kept and total weights of every
        layer, notes.

    Raises:
        InputError: a method of another kind; a missing or truncated shard, or tensors that are
            not the model's; NaN in weights; another run's output.
    """
    from secateurs.calibration.prune_checkpoint import prune_shards

    chosen = create(method, options) if isinstance(method, str) else method
    require(not (options and not isinstance(method, str)), "options", options, "a method's name")
    return prune_shards(Path(folder), Path(out), chosen, budget, batches, work or Workspace())


def _run(
    method: Method,
    model: nn.Module,
    dense: nn.Module,
    budget: Budget,
    task: Task | None,
    seed: int,
    recover: bool,
    work: Workspace,
    base: nn.Module | None,
) -> Outcome:
    match method:
        case Pruner():
            outcome = method.prune(model, budget, task, seed=seed, work=work)
            trains = method.time != "PTP" and "retrain" in method.tags.values("recovery")
            if recover and trains and task is not None and task.train is not None:
                settings = task.training if method.time == "PBT" else task.finetuning
                taught = method.recovery_task(task, dense)
                finetune(outcome, taught, settings, seed=seed, work=work)
            return outcome
        case TrainingPruner():
            assert task is not None
            return train_with(method, model, budget, task, seed=seed, work=work)
        case Procedure():
            assert task is not None
            return method.run(model, task, budget, seed=seed, work=work)
        case Codec():
            assert base is not None
            return method.encode(base, model, budget, task, seed=seed, work=work)
    raise InputError("method", method.name, "a Pruner, a TrainingPruner, a Procedure or a Codec")


def _recover(
    outcome: Outcome,
    how: Recovery,
    method: Method,
    task: Task | None,
    dense: nn.Module,
    seed: int,
    work: Workspace,
) -> None:
    """Recover as asked for by name; what the method measured itself is measured anew."""
    if isinstance(method, Codec):
        raise InputError("recover", type(how).__name__, f"true or false: {method.name} has a delta")
    assert task is not None
    before = dense if isinstance(method, Pruner) else None
    how.recover(outcome, task, dense=before, seed=seed, work=work.child("recovery"))
    outcome.after, outcome.metrics_after = None, {}


def train_with(
    method: TrainingPruner,
    model: nn.Module,
    budget: Budget,
    task: Task,
    *,
    seed: int = 0,
    work: Workspace | None = None,
    name: str = "train",
) -> Outcome:
    """Train `model` in place by ``task.training`` with a training pruner attached."""
    trained = fit_once(
        model,
        task,
        task.training,
        seed=seed,
        work=work,
        name=name,
        attach=lambda net, optimizer, total: [
            method.attach(net, optimizer, budget, total, seed=seed)
        ],
    )
    state = trained.hooks[0]
    masks = Masks.unpack(state["masks"], state["shapes"])
    return masked_outcome(model, masks.to(device_of(model)))


def promise_of(outcome: Outcome, budget: Budget) -> Promise:
    """The budget as asked and as reached, in its own terms; the tolerance is one unit."""
    masks, unit = outcome.masks, outcome.unit
    if budget.kind in ("sparsity", "density", "n:m") and masks.total:
        density = masks.density
        if budget.kind == "sparsity":
            return Promise("sparsity", budget.value, 1 - density, unit / masks.total)
        return Promise(budget.kind, budget.value, density, unit / masks.total)
    total = sum(p.numel() for p in outcome.model.parameters())
    fixed = fixed_parameters(outcome.model, _masked(outcome))
    nonzero = fixed + masks.kept
    dense = outcome.before.parameters if outcome.before is not None else total
    if budget.kind in ("sparsity", "density"):
        reached = nonzero / dense
        reached = 1 - reached if budget.kind == "sparsity" else reached
        return Promise(budget.kind, budget.value, reached, unit / dense)
    scale = dense if budget.relative else 1
    return Promise(budget.kind, budget.value * scale, nonzero, unit)


def _masked(outcome: Outcome) -> dict[str, nn.Parameter]:
    params = dict(outcome.model.named_parameters(remove_duplicate=False))
    return {name: params[name] for name in outcome.masks}


def _check_needs(
    method: Method, model: nn.Module, task: Task | None, base: nn.Module | None
) -> None:
    if "base" in method.needs and base is None:
        raise InputError(
            "base", None, f"what the model was fine-tuned from: {method.name} needs it"
        )
    if "base" not in method.needs and base is not None:
        raise InputError("base", described("a module"), f"none: {method.name} has no use for it")
    if not method.takes_adapters:
        refuse_adapters(model)
    if base is not None:
        refuse_adapters(base, "base")
    if "norm-scales" in method.needs:
        norm_scales(model)  # refuses a model without any
    if task is None and set(method.needs) - {"nothing", "base"}:
        raise InputError("task", None, f"a Task: {method.name} needs {', '.join(method.needs)}")
    if task is None:
        return
    if "training" in method.needs and task.train is None:
        raise InputError("task.train", None, f"a loader: {method.name} trains")
    if "fresh-model" in method.needs and isinstance(task.model, nn.Module):
        raise InputError("task.model", "a module", f"a function: {method.name} makes fresh models")
    if "resize" in method.needs and task.resize is None:
        raise InputError("task.resize", None, f"a function of the width: {method.name} needs it")


@torch.no_grad()
def _give_back(model: nn.Module, before: nn.Module) -> None:
    """Weights, sizes and modes of a model as they were; what was not resized is the same object."""
    _put_layers_back(model, before)
    for module, original in zip(model.modules(), before.modules(), strict=True):
        for attribute, value in vars(original).items():
            if not attribute.startswith("_") and isinstance(value, int | tuple):  # bools, too
                setattr(module, attribute, value)
        _put_back(module._parameters, original._parameters)
        _put_back(module._buffers, original._buffers)


def _put_layers_back(model: nn.Module, before: nn.Module) -> None:
    """Undo the exchange of layers: a layer of another class is replaced by the one before."""
    for name in [name for name in model._modules if name not in before._modules]:
        del model._modules[name]
    for name, original in before._modules.items():
        present = model._modules.get(name)
        if present is None or original is None or type(present) is not type(original):
            model._modules[name] = original
        else:
            _put_layers_back(present, original)


def _put_back(own: dict[str, Any], old: dict[str, Any]) -> None:
    """Copy tensors into those that have their shapes; others are replaced."""
    for name, tensor in old.items():
        present = own.get(name)
        if present is None or tensor is None or present.shape != tensor.shape:
            own[name] = tensor
        else:
            present.copy_(tensor)


def _measure(outcome: Outcome, dense: nn.Module, task: Task | None, engines: Sequence[str]) -> None:
    """Costs and metrics, before and after."""
    if task is None:
        return
    outcome.primary, outcome.higher_is_better = task.primary, task.higher_is_better
    inputs = task.example_inputs
    device = device_of(outcome.model)
    home = device_of(dense)
    dense.to(device)
    before = outcome.before or measure_cost(dense, inputs)
    after = outcome.after or measure_cost(outcome.model, inputs, outcome.masks)
    if engines:
        # also of costs that a procedure counted itself
        found = compare_latency(
            dense, outcome.model, inputs, engines=engines, masks=outcome.masks or None
        )
        if eager := found.get("eager"):
            before = replace(before, latency=eager.dense)
            after = replace(after, latency=eager.pruned)
        if set(found) != {"eager"}:
            promised = after.effective_macs / before.macs if before.macs else None
            outcome.tables[TABLE] = latency_rows(found, promised)
        outcome.notes += [f"not timed in {e}: {o.failure}" for e, o in found.items() if o.failure]
    outcome.before, outcome.after = before, after
    if not outcome.metrics_before:
        outcome.metrics_before = task.measure(dense)
    dense.to(home)
    if not outcome.metrics_after:
        outcome.metrics_after = task.measure(outcome.model)
