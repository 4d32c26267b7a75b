"""A run: one execution of a recipe in a folder, resumable at any moment.

    recipe.yaml      resolved, fixed when the run begins
    environment.json versions and machine
    events.jsonl     what happened, append-only
    work/            finished steps and snapshots
    outcome/         the result, as `secateurs.save` writes it
    report.html

The folder appears together with its recipe, and the outcome appears whole, both by a rename.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateurs.api import prune
from secateurs.devices import default_device
from secateurs.errors import InputError, described
from secateurs.outcome import PLAN, Outcome, check_output_folder, load, save
from secateurs.recovery import finetune
from secateurs.runs.recipe import Recipe, Stage, changed, short_hash
from secateurs.settings import TrainSettings
from secateurs.state import write_bytes, write_json
from secateurs.task import Task
from secateurs.training.loop import fit_once
from secateurs.workspace import EventLog, Listener, Workspace, read_events
from secateurs.zoo.pretrained import companions
from secateurs.zoo.specs import parse_spec

RECIPE, EVENTS, ENVIRONMENT, REPORT = (
    "recipe.yaml",
    "events.jsonl",
    "environment.json",
    "report.html",
)


def environment() -> dict[str, Any]:
    """Versions and machine, for the report."""
    names = ("secateurs", "torch", "numpy", "accelerate", "transformers", "timm", "torchvision")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        **versions,
    }


class Run:
    """A folder with a recipe.

    Args:
        folder: of a run that `create` made.
        shared: folder of dense trainings that several runs have in common.

    Attributes:
        created: whether this object made the folder.

    Raises:
        InputError: the folder is not a run.
    """

    def __init__(self, folder: Path, shared: Path | None = None) -> None:
        self.folder, self.shared, self.created = folder, shared, False
        if not (folder / RECIPE).is_file():
            raise InputError("run", str(folder), f"a folder with {RECIPE}")
        self.recipe = Recipe.read(folder / RECIPE)

    @staticmethod
    def create(recipe: Recipe, folder: Path, shared: Path | None = None) -> Run:
        """A new run; the folder appears with its recipe in it.

        Raises:
            InputError: the folder is there already and is not empty.
        """
        check_output_folder(folder)
        if recipe.threads is None:
            recipe = replace(recipe, threads=torch.get_num_threads())
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_bytes(partial / RECIPE, recipe.as_yaml().encode())
        write_json(partial / ENVIRONMENT, environment())
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
        run = Run(folder, shared)
        run.created = True
        return run

    @property
    def finished(self) -> bool:
        """Whether the outcome is there."""
        return (self.folder / "outcome" / PLAN).is_file()

    @property
    def begun(self) -> bool:
        """Whether anything was trained or finished, so that it is worth resuming."""
        events = read_events(self.folder / EVENTS)
        return any(event["event"] in ("train", "done", "finished") for event in events)

    def discard(self) -> None:
        """Take a refused run back: no folder stays if this object made it and nothing has begun.

        A run that another process works on by now is left alone.
        """
        if self.created and not self.begun:
            with suppress(InputError), locked(self.folder / ".lock", "run", patience=0.0):
                shutil.rmtree(self.folder)

    def outcome(self) -> Outcome:
        """The outcome of a finished run, with its model."""
        return load(self.folder / "outcome")

    def execute(
        self, listeners: Sequence[Listener] = (), *, snapshot_seconds: float = 5.0
    ) -> Outcome:
        """Run the stages that are not finished, and return the outcome.

        Raises:
            InputError: another process is executing this run.
        """
        with locked(self.folder / ".lock", "run"), _threads(self.recipe.threads):
            if self.finished:
                return self.outcome()
            log = EventLog(self.folder / EVENTS)
            work = Workspace(self.folder / "work", (log, *listeners), snapshot_seconds)
            outcome = self._stages(work)
            outcome.source |= {"model": self.recipe.model, "data": self.recipe.data}
            self._save_for_transformers(outcome, work)
            self._save_onnx(outcome)
            save(outcome, self.folder / "outcome")
            shutil.rmtree(self.folder / "work", ignore_errors=True)
            work.event("finished", **outcome.metrics_after)
            return outcome

    def _save_for_transformers(self, outcome: Outcome, work: Workspace) -> None:
        """A folder for `from_pretrained`, where a configuration can have the model's shape."""
        from secateurs.deploy.transformers_folder import save_pretrained, transformers_model

        if transformers_model(outcome.model) is None:
            return
        folder = self.folder / "transformers"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            save_pretrained(outcome, folder, self.recipe.make_task().example_inputs)
            for file in companions(self.recipe.model):
                shutil.copyfile(file, folder / file.name)
        except InputError as reason:
            outcome.notes.append(f"no folder for transformers: {reason}")
            work.event("transformers", reason=str(reason))

    def _save_onnx(self, outcome: Outcome) -> None:
        """What came as an ONNX file leaves as one, too."""
        if parse_spec(self.recipe.model, "model").kind != "onnx":
            return
        from secateurs.deploy.onnx_export import export_onnx

        inputs = self.recipe.make_task().example_inputs
        export_onnx(outcome.model, inputs, self.folder / "model.onnx")

    def _stages(self, work: Workspace) -> Outcome:
        from secateurs.zoo.catalog import base_model, has_weights

        recipe = self.recipe
        task = recipe.make_task()
        model = task.starting_model(recipe.seed).to(default_device())
        outcome: Outcome | None = None
        for number, stage in enumerate(recipe.stages):
            place = work.child(f"{number}-{stage.kind}")
            work.event("stage", number=number, stage=stage.kind, method=stage.method)
            if stage.kind == "train":
                self._train(model, task, stage, place)
            elif stage.kind == "prune":
                before = outcome
                outcome = prune(
                    model,
                    stage.build_method(),
                    stage.budget,
                    task,
                    base=base_model(stage.base, recipe.data) if stage.base else None,
                    seed=recipe.seed,
                    recover=stage.recover,
                    with_latency=recipe.latency,
                    engines=recipe.engines,
                    work=place,
                )
                model = outcome.model
                trained_before = has_weights(recipe.model) or any(
                    s.kind == "train" for s in recipe.stages[:number]
                )
                if not trained_before and not outcome.history:
                    # fresh weights are no dense network to compare with
                    outcome.metrics_before = {}
                if before is not None:
                    outcome.before = before.before
                    outcome.metrics_before = before.metrics_before
                    outcome.surgery = before.surgery + outcome.surgery
            else:
                outcome = self._finetune(outcome or Outcome(model), task, stage, place)
        if outcome is None:
            outcome = Outcome(model, metrics_after=task.measure(model))
        return outcome

    def _train(self, model: nn.Module, task: Task, stage: Stage, work: Workspace) -> None:
        settings = changed(task.training, stage.settings)
        if self.shared is not None:
            work = replace(work, folder=self.shared / dense_identity(self.recipe, settings))
        fit_once(model, task, settings, seed=self.recipe.seed, work=work)

    def _finetune(self, outcome: Outcome, task: Task, stage: Stage, work: Workspace) -> Outcome:
        settings = changed(task.finetuning, stage.settings)
        finetune(outcome, task, settings, seed=self.recipe.seed, work=work)
        outcome.model.eval()
        outcome.metrics_after = task.measure(outcome.model)
        return outcome


def dense_identity(recipe: Recipe, settings: TrainSettings) -> str:
    """A hash of everything that a dense training depends on."""
    facts = (recipe.model, recipe.data, recipe.seed, recipe.batch_size, recipe.label_smoothing)
    return "dense-" + short_hash([*facts, recipe.threads, vars(settings)])


def needs_dense(recipe: Recipe) -> bool:
    """Whether the recipe begins with the training of the dense network."""
    return recipe.stages[0].kind == "train"


@contextmanager
def locked(path: Path, what: str, patience: float = 15.0) -> Iterator[None]:
    """Hold a file lock; a process that dies lets go of it.

    Raises:
        InputError: another process still holds it after `patience` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise InputError(
                        what, str(path.parent), described("one that no other process works on")
                    ) from None
                time.sleep(0.2)
        yield


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
