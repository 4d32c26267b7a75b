"""Where a computation keeps what it has finished and tells what it is doing.

`once(name, compute)` is the whole resume protocol: what is on disk is read, what is not is
computed and then written, atomically. Without a folder everything is computed and nothing
kept. Long computations also leave snapshots and report their progress here.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from secateurs.errors import require
from secateurs.state import Tree, load_tree, save_tree


class Listener(Protocol):
    """Someone who wants to hear: a progress bar, an event log, a tracker."""

    def event(self, kind: str, values: dict[str, Any]) -> None:
        """Something happened: ``train`` (a step's loss), ``evaluate``, ``prune``, ``note``."""
        ...

    def begin(self, label: str, total: int) -> None:
        """A piece of work of `total` units begins."""
        ...

    def advance(self, label: str, done: int) -> None:
        """`done` units of it are finished."""
        ...

    def end(self, label: str) -> None:
        """It is finished, or given up."""
        ...


@dataclass
class Workspace:
    """A folder of finished steps, and those who listen.

    Attributes:
        folder: where states are kept; None keeps nothing.
        listeners: told of progress and events.
        snapshot_seconds: least time between two snapshots within one step.
        path: names of the enclosing steps, for labels.
    """

    folder: Path | None = None
    listeners: Sequence[Listener] = ()
    snapshot_seconds: float = 5.0
    path: tuple[str, ...] = ()
    _last_snapshot: float = field(default_factory=time.monotonic, repr=False)

    def child(self, name: str) -> Workspace:
        """A workspace inside this one."""
        named = re.fullmatch(r"[\w.=+-]*\w[\w.=+-]*", name)
        require(named is not None, "step", name, "letters, digits, . = + -")
        folder = None if self.folder is None else self.folder / name
        return Workspace(folder, self.listeners, self.snapshot_seconds, (*self.path, name))

    @property
    def label(self) -> str:
        """The names of the enclosing steps."""
        return "/".join(self.path)

    def once(self, name: str, compute: Callable[[], Tree]) -> Tree:
        """The state `name`: read if it is there, else computed and written."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return load_tree(path)
        state = compute()
        save_tree(path, state)
        self.event("done", step=name)
        return state

    def has(self, name: str) -> bool:
        """Whether the state `name` is finished."""
        return self.folder is not None and (self.folder / f"{name}.safetensors").exists()

    def snapshot(self, name: str, state: Callable[[], Tree], *, force: bool = False) -> None:
        """Keep the state of an unfinished step, at most every `snapshot_seconds`."""
        due = force or time.monotonic() - self._last_snapshot >= self.snapshot_seconds
        if self.folder is not None and due:
            save_tree(self.folder / f"{name}.snapshot", state())
            self._last_snapshot = time.monotonic()

    def last_snapshot(self, name: str) -> Tree | None:
        """The latest snapshot of an unfinished step, if there is one."""
        path = None if self.folder is None else self.folder / f"{name}.snapshot"
        return load_tree(path) if path is not None and path.exists() else None

    def drop_snapshot(self, name: str) -> None:
        """Forget the snapshots of a step that is finished."""
        if self.folder is not None:
            (self.folder / f"{name}.snapshot").unlink(missing_ok=True)

    def event(self, kind: str, **values: Any) -> None:
        """Tell the listeners that something happened here."""
        for listener in self.listeners:
            listener.event(kind, {"at": self.label, **values})

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar; the value is called with the number of units finished so far."""
        full = "/".join((*self.path, label)) if label else self.label
        for listener in self.listeners:
            listener.begin(full, total)

        def advance(done: int) -> None:
            for listener in self.listeners:
                listener.advance(full, done)

        try:
            yield advance
        finally:
            for listener in self.listeners:
                listener.end(full)


class EventLog:
    """Appends events to a file, a JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_with_newline(path)

    def event(self, kind: str, values: dict[str, Any]) -> None:
        """Write one line."""
        line = json.dumps({"event": kind, "time": time.time(), **values}, default=str)
        with open(self.path, "a") as file:
            file.write(line + "\n")

    def begin(self, label: str, total: int) -> None:
        """Note the beginning."""
        self.event("begin", {"at": label, "total": total})

    def advance(self, label: str, done: int) -> None:
        """Progress is not logged."""

    def end(self, label: str) -> None:
        """Note the end."""
        self.event("end", {"at": label})


def _end_with_newline(path: Path) -> None:
    """Close the line that a killed process may have left half-written."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a log; lines that a killed process left half-written are left out."""
    events = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
