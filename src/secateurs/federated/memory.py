"""Peak memory of a computation, in bytes of tensors that were alive at the same time.

Every operation that PyTorch dispatches is watched; each storage that it makes is counted from
then on until it is freed. The count depends on shapes alone, so it is the same on every machine
and in every run. What kernels need inside an operation is not seen, nor is Python's own memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Counts storages while it is entered.

    Args:
        held: tensors that are there already and count, such as a model's.

    Attributes:
        now, peak: bytes alive, and the most that ever were.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        size = storage.nbytes()
        known = self._known.get(place)
        if known is None:
            weakref.finalize(storage, self._forget, place)
        if known != size:
            self._known[place] = size
            self.now += size - (known or 0)
            self.peak = max(self.peak, self.now)

    def _forget(self, place: int) -> None:
        self.now -= self._known.pop(place, 0)


def held_by(model: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]
