"""Block by block through a model, with the inputs that each block really gets.

    for visit in walk(model, batches):
        moments = visit.moments(visit.layers)     # what its layers are fed
        ...                                       # change the weights of visit.block in place

Behind the body the block is run as it is then, so that the next one sees what a pruned prefix
gives. Memory: the activations of all batches at one block. Weights may be anywhere:
`Weights.held` brings those of one block into memory and takes them away again.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from secateurs.calibration.blocks import find_blocks
from secateurs.calibration.forwards import BlockCall, Forward, halting
from secateurs.calibration.moments import Moments, collect_moments, is_known
from secateurs.devices import to_device
from secateurs.errors import InputError, described
from secateurs.structure.trace import as_call, traceable


class Weights(Protocol):
    """Where the weights of a model are while it is walked through."""

    def held(self, block: str) -> AbstractContextManager[None]:
        """The weights of a block are in memory inside it."""
        ...

    def wanted(self, block: str) -> bool:
        """Whether a block is still to be visited; others are only run."""
        ...


class InMemory:
    """All weights are where they always are."""

    def held(self, block: str) -> AbstractContextManager[None]:
        return nullcontext()

    def wanted(self, block: str) -> bool:
        return True


@dataclass
class Visit:
    """A block with the inputs of all batches.

    Attributes:
        name: qualified; "" where the whole model is the block.
        index, total: its number among those visited, from 0, and the number of blocks.
        block: the module, to be changed in place.
        calls: what it gets, a call a batch; none where no batch reaches it.
    """

    name: str
    index: int
    total: int
    block: nn.Module
    calls: Sequence[BlockCall] = field(repr=False)

    def run(self) -> list[Any]:
        """What the block gives now, a batch an entry."""
        with torch.no_grad():
            return [self.block(*call.args, **call.kwargs) for call in self.calls]

    @property
    def layers(self) -> dict[str, nn.Module]:
        """Layers whose weights multiply an input, by their name in the whole model."""
        return {
            f"{self.name}.{name}".strip("."): layer
            for name, layer in self.block.named_modules()
            if is_known(layer)
        }

    def moments(self, names: Iterable[str], *, products: bool = True) -> dict[str, Moments]:
        """Second moments of what some layers are fed; of those that no batch reaches, none.

        Args:
            names: of layers, as in `layers`.
            products: whether whole matrices are wanted, or squares alone.
        """
        cut = len(self.name) + 1 if self.name else 0
        found = collect_moments(
            self.block,
            [name[cut:] for name in names],
            lambda _: self.run(),
            products=products,
            unreached=True,
        )
        return {f"{self.name}.{name}".strip("."): m for name, m in found.items()}


def walk(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    blocks: Mapping[str, nn.Module] | None = None,
    only: Collection[str] | None = None,
    unreached: bool = False,
    weights: Weights | None = None,
) -> Generator[Visit]:
    """Visit every block in the order of execution.

    The model is in eval mode, without caches and gradients, until the iterator is closed.

    Args:
        batches: inputs as the model takes them: a tensor, a tuple, or a mapping of keywords; they
            are moved to where the model is.
        blocks: where to stop; `find_blocks` by default.
        only: the blocks to visit, all by default; others are only run.
        unreached: whether blocks that no batch reaches are visited at the end, without calls.
        weights: of a model that is larger than memory.

    Raises:
        InputError: no batch, batches that reach the blocks in different orders, or, unless
            `unreached`, that never reach one.
    """
    if not batches:
        raise InputError("batches", described("none"), "at least one batch of inputs")
    weights = weights or InMemory()
    blocks = dict(blocks or find_blocks(model))
    places = (p.device for p in model.parameters() if not p.is_meta)
    device = next(places, torch.device("cpu"))
    if "" in blocks:
        with traceable(model), weights.held(""):
            calls = [BlockCall("", *as_call(to_device(b, device))) for b in batches]
            yield Visit("", 0, 1, model, calls)
        return
    asked = [name for name in blocks if only is None or name in only]
    left = {name for name in asked if weights.wanted(name)}
    visited = 0
    with traceable(model), halting(blocks) as forwards:
        forwards += [Forward(partial(_called, model, b, device)) for b in batches]
        for forward in forwards:
            forward.advance()
        while left and (name := _standing(forwards)) is not None:
            block = blocks[name]
            with weights.held(name):
                if name in left:
                    calls = [f.call for f in forwards if f.call is not None]
                    visit = Visit(name, visited, len(asked), block, calls)
                    del calls
                    yield visit
                    visit.calls = ()
                    left.discard(name)
                    visited += 1
                if left:
                    _pass_on(forwards, block)
    missed = [name for name in asked if name in left]
    if missed and not unreached:
        shown = described(f"batches that never reach {', '.join(missed)}")
        raise InputError("batches", shown, "all blocks")
    for number, name in enumerate(missed, start=visited):
        with weights.held(name):
            yield Visit(name, number, len(asked), blocks[name], ())


def _called(model: nn.Module, batch: Any, device: torch.device) -> Any:
    args, kwargs = as_call(to_device(batch, device))
    return model(*args, **kwargs)


def _standing(forwards: Sequence[Forward]) -> str | None:
    """The block at which all forwards stand; None where all have ended."""
    places = {None if f.call is None else f.call.name for f in forwards}
    if len(places) > 1:
        names = ", ".join(sorted(str(p) for p in places))
        raise InputError("batches", described(f"batches at different blocks ({names})"), "one way")
    return places.pop()


def _pass_on(forwards: Sequence[Forward], block: nn.Module) -> None:
    """One batch after the other, so that inputs are freed as outputs come."""
    for forward in forwards:
        call = forward.call
        assert call is not None
        with torch.no_grad():
            output = block(*call.args, **call.kwargs)
        del call
        forward.advance(output)
        del output
