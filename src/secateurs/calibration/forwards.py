"""Forward passes that stop at every block.

A model's own code knows what happens between its blocks: embeddings, masks, rotary tables, the
merging of patches or of image tokens, the way from encoder to decoder. So it is not taken apart.
Every batch runs the whole model in a thread of its own, which halts where a block is called,
hands out what the block was given, positional and by keyword, and goes on with what it gets
back. Only one of the threads runs at any time; the others hold nothing but their activations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class BlockCall:
    """A block that was called, and with what."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Abandoned(BaseException):
    """Raised inside a halted forward that nobody will finish."""


class Forward:
    """One forward pass, halted at a block.

    Attributes:
        call: the block call at which it stands; None once the model has returned.
        output: what the model returned.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.call: BlockCall | None = None
        self.output: Any = None
        self._failure: BaseException | None = None
        self._answer: Any = None
        self._abandoned = False
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._thread.start()

    def advance(self, answer: Any = None) -> None:
        """Let it run to the next block, `answer` being what the present one gave.

        Raises:
            Whatever the model raises.
        """
        self._answer, self.call = answer, None
        self._go.release()
        self._halted.acquire()
        self._answer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def halt_at(self, call: BlockCall) -> Any:
        """For the thread itself: wait until somebody gives what the block would have."""
        self.call = call
        self._halted.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
        return self._answer

    def abandon(self) -> None:
        """Give up a forward that is not needed any more, and free what it holds."""
        if self._thread.is_alive():
            self._abandoned, self.call = True, None
            self._go.release()
            self._thread.join()

    def owns(self, thread: threading.Thread) -> bool:
        """Whether it runs in a thread."""
        return thread is self._thread

    def _work(self, run: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad():
                    self.output = run()
        except _Abandoned:
            pass
        except BaseException as failure:
            self._failure = failure
        self._halted.release()


@contextmanager
def halting(blocks: Mapping[str, nn.Module]) -> Iterator[list[Forward]]:
    """While it is open, forwards in the list halt at the blocks; other threads do not.

    At the end all forwards are abandoned, and the blocks are as they were.
    """
    forwards: list[Forward] = []
    own = {name: "forward" in vars(block) for name, block in blocks.items()}
    before = {name: block.forward for name, block in blocks.items()}

    def stopping(name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            thread = threading.current_thread()
            for running in forwards:
                if running.owns(thread):
                    return running.halt_at(BlockCall(name, args, kwargs))
            return before[name](*args, **kwargs)

        return forward

    for name, block in blocks.items():
        block.forward = stopping(name)
    try:
        yield forwards
    finally:
        for forward in forwards:
            forward.abandon()
        for name, block in blocks.items():
            if own[name]:
                block.forward = before[name]
            else:
                del block.forward
