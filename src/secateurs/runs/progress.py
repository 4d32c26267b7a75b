"""Progress bars in the terminal, and the trackers that Accelerate knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from secateurs.errors import InputError, unknown
from secateurs.runs.matrix import Bench
from secateurs.runs.workers import Watch

TRACKERS = ("tensorboard", "mlflow", "wandb")


def make_progress(console: Console) -> Progress:
    """The columns that all our bars have."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class ProgressBars:
    """A listener that shows one bar for every piece of work under way."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self._bars = progress, dict[str, TaskID]()

    def event(self, kind: str, values: dict[str, Any]) -> None:
        """Show the latest loss or note beside the bar."""
        if kind == "train":
            label = "/".join(filter(None, (values["at"], values["stage"])))
            if label in self._bars:
                self.progress.update(self._bars[label], note=f"loss {values['loss']:.4f}")
        elif kind == "note":
            self.progress.console.print(f"note: {values['text']}")

    def begin(self, label: str, total: int) -> None:
        """Add a bar."""
        self._bars[label] = self.progress.add_task(label, total=total, note="")

    def advance(self, label: str, done: int) -> None:
        """Move it."""
        self.progress.update(self._bars[label], completed=done)

    def end(self, label: str) -> None:
        """Take it away."""
        self.progress.remove_task(self._bars.pop(label))


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """A function that shows a benchmark's jobs as bars: all of them, and each under way."""
    with make_progress(console) as progress:
        whole = progress.add_task("benchmark", total=None, note="")
        bars: dict[str, TaskID] = {}

        def watch(bench: Bench) -> None:
            states = bench.states()
            failed = states.get("failed", 0)
            progress.update(
                whole,
                total=sum(states.values()),
                completed=states.get("done", 0) + failed,
                note=f"[red]{failed} failed" if failed else "",
            )
            running = {job: (title, share) for job, title, share in bench.running()}
            for job in set(bars) - set(running):
                progress.remove_task(bars.pop(job))
            for job, (title, share) in running.items():
                if job not in bars:
                    bars[job] = progress.add_task(f"  {title}", total=100, note="%")
                progress.update(bars[job], completed=round(100 * share))

        yield watch


class Tracker:
    """A listener that sends losses and metrics to TensorBoard, MLflow or Weights & Biases.

    Raises:
        InputError: unknown tracker, or its package is not installed.
    """

    def __init__(self, name: str, run: str, folder: Path, config: dict[str, Any]) -> None:
        from accelerate import tracking

        if name not in TRACKERS:
            raise unknown("track", name, TRACKERS)
        available = {
            "tensorboard": tracking.is_tensorboard_available,
            "mlflow": tracking.is_mlflow_available,
            "wandb": tracking.is_wandb_available,
        }
        if not available[name]():
            raise InputError("track", name, f"a tracker that is installed: pip install {name}")
        cls = tracking.LOGGER_TYPE_TO_CLASS[name]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.tracker = cls(run, folder) if cls.requires_logging_directory else cls(run)
            if hasattr(self.tracker, "start"):
                self.tracker.start()
            self.tracker.store_init_configuration(_flat(config))
        except Exception as error:
            raise InputError("track", name, f"a tracker that starts ({error})") from None
        self._steps: dict[str, int] = {}

    def event(self, kind: str, values: dict[str, Any]) -> None:
        """Send the numbers of an event, under the name of the step they belong to."""
        if kind == "done":
            return
        at = "/".join(filter(None, (values["at"], str(values.get("stage", "")))))
        numbers = {
            f"{at or kind}/{key}": value
            for key, value in values.items()
            if isinstance(value, int | float) and key not in ("step", "number", "round")
        }
        if numbers:
            self._steps[at] = self._steps.get(at, -1) + 1
            step = values.get("step", values.get("round", self._steps[at]))
            self.tracker.log(numbers, step=step)

    def begin(self, label: str, total: int) -> None:
        """Nothing to send."""

    def advance(self, label: str, done: int) -> None:
        """Nothing to send."""

    def end(self, label: str) -> None:
        """Nothing to send."""

    def close(self) -> None:
        """Finish sending."""
        self.tracker.finish()


def _flat(config: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """Values a tracker takes: nested ones as text."""
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
