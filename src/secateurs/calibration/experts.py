"""What the experts of a mixture are fed, each by itself, where all are one parameter.

No hook sees which tokens a router sends to an expert: the module that holds the array multiplies
with slices of it. So the products themselves are watched while a block runs. A factor that lies
in the memory of a watched parameter is one of its experts (its offset says which), strides say
whether it is transposed, and the other factor is the expert's inputs. What transformers would do
in one kernel runs expert by expert meanwhile (`secateurs.parts.experts.one_by_one`).

Rows of zeros in a batched product are padding, such as tokens of other experts, and no input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateurs.calibration.moments import Moments
from secateurs.errors import InputError, described
from secateurs.parts.experts import one_by_one

_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
"""Products by name, and where the first of their two factors stands."""


@dataclass
class Fed:
    """What the experts of one parameter were given.

    Attributes:
        inputs_first: whether the parameter is (experts, inputs, outputs); None before a product.
        moments: by expert; one that got no token has none.
    """

    inputs_first: bool | None = None
    moments: dict[int, Moments] = field(default_factory=dict)


@contextmanager
def watching(
    block: nn.Module, experts: Mapping[str, nn.Parameter], *, products: bool = True
) -> Iterator[dict[str, Fed]]:
    """What experts are fed by all that runs inside it, by the name of the parameter.

    Args:
        block: the module that runs.
        experts: parameters in it that hold a matrix for each expert.
        products: whether whole second moments are wanted, or squares alone.
    """
    fed = {name: Fed() for name in experts}
    if not experts:
        yield fed
        return
    with one_by_one(block), _Watch(experts, fed, products):
        yield fed


class _Watch(TorchDispatchMode):
    def __init__(
        self, experts: Mapping[str, nn.Parameter], fed: dict[str, Fed], products: bool
    ) -> None:
        super().__init__()
        self.experts, self.fed, self.products = experts, fed, products
        self._memory = {p.untyped_storage().data_ptr(): name for name, p in experts.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = _PRODUCTS.get(func.overloadpacket.__name__)
        if place is not None:
            left, right = args[place : place + 2]
            if right.ndim == 1:  # a matrix times a vector
                right = right[:, None]
            self._take(right, left, inputs_dim=-2)
            self._take(left, right.mT, inputs_dim=-1)
        return func(*args, **(kwargs or {}))

    def _take(self, factor: Tensor, rows: Tensor, inputs_dim: int) -> None:
        """Enter what the experts in `factor` are multiplied with, (..., rows, inputs)."""
        name = self._memory.get(factor.untyped_storage().data_ptr())
        found = name and _experts_in(factor, self.experts[name])
        if not name or not found:
            return
        numbers, transposed = found
        inputs_first = transposed == (inputs_dim == -1)
        fed = self.fed[name]
        if fed.inputs_first not in (None, inputs_first):
            both = described("experts that are multiplied from both sides")
            raise InputError(name, both, "one side; exclude this weight")
        fed.inputs_first = inputs_first
        for number, own in zip(numbers, rows if rows.ndim == 3 else [rows], strict=True):
            given = own[own.any(1)] if rows.ndim == 3 else own
            if not len(given):
                continue
            if number not in fed.moments:
                layer = nn.Linear(own.shape[1], 1, bias=False, device="meta")
                shown = f"{name}, expert {number}"
                fed.moments[number] = Moments(layer, shown, products=self.products)
            fed.moments[number].update(given)


def _experts_in(factor: Tensor, experts: Tensor) -> tuple[list[int], bool] | None:
    """Which experts a view of a parameter is, and whether transposed; None if of parts of them."""
    view = factor if factor.ndim == 3 else factor[None]
    step, rows, columns = experts.stride()
    whole = (*experts.shape[1:], rows, columns)
    seen = (*view.shape[1:], *view.stride()[1:])
    transposed = seen != whole
    first, inside = divmod(int(view.storage_offset() - experts.storage_offset()), step)
    if inside or (transposed and seen != (whole[1], whole[0], whole[3], whole[2])):
        return None
    numbers = [first + i * view.stride(0) // step for i in range(len(view))]
    inside_all = all(0 <= number < len(experts) for number in numbers)  # not of a neighbour
    return (numbers, transposed) if inside_all else None
