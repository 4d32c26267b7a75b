"""Masks: True = keep. Kept apart from ``weight == 0``, because a kept weight may be zero.

A `Masks` object is a mapping from parameter name to a bool tensor of the parameter's shape.
It is applied with one fused multiply over all tensors, and saved one bit a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described


class Masks(Mapping[str, Tensor]):
    """Which weights stay, by parameter name.

    Args:
        masks: bool tensors; a tensor that is not bool is an error, not a cast.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise InputError(f"mask {name}", described(str(mask.dtype)), "a bool tensor")
        self._masks = dict(masks)
        self._multipliers: list[Tensor] | None = None

    @staticmethod
    def ones_like(params: Mapping[str, Tensor]) -> Masks:
        """Masks that keep everything."""
        return Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in params.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Replace some masks in place; names and shapes must be what they were."""
        for name, mask in masks.items():
            if name not in self._masks:
                raise InputError("masks", name, "names of masks: " + ", ".join(self))
            if mask.shape != self._masks[name].shape:
                raise _misfit(name, mask, self._masks[name])
            if mask.dtype != torch.bool:
                raise InputError(f"mask {name}", described(str(mask.dtype)), "a bool tensor")
            self._masks[name] = mask
        self._multipliers = None

    def clone(self) -> Masks:
        """A copy that shares no memory."""
        return Masks({n: m.clone() for n, m in self._masks.items()})

    def to(self, device: torch.device | str) -> Masks:
        """The same masks on a device."""
        return Masks({n: m.to(device) for n, m in self._masks.items()})

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Raise `InputError` where a mask has no parameter of its name and shape."""
        for name, mask in self._masks.items():
            if name not in params:
                raise InputError("masks", name, "names of parameters: " + ", ".join(params))
            if params[name].shape != mask.shape:
                raise _misfit(name, mask, params[name])

    @torch.no_grad()
    def apply_(self, params: Mapping[str, Tensor]) -> None:
        """Set removed weights to zero, with one fused multiply over all masked tensors."""
        if self._masks:
            torch._foreach_mul_([params[name] for name in self._masks], self._scaled(params))

    @torch.no_grad()
    def apply_to_gradients_(self, params: Mapping[str, Tensor]) -> None:
        """Set the gradients of removed weights to zero, fused likewise."""
        pairs = [(params[n].grad, m) for n, m in zip(self, self._scaled(params), strict=True)]
        held = [(g, m) for g, m in pairs if g is not None]
        if held:
            torch._foreach_mul_([g for g, _ in held], [m for _, m in held])

    @torch.no_grad()
    def apply_to_state_(
        self, params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Set the optimizer's moments of removed weights to zero (SGD, Adam and their kin)."""
        moments, multipliers = [], []
        for name, multiplier in zip(self, self._scaled(params), strict=True):
            for value in optimizer.state.get(params[name], {}).values():
                if isinstance(value, Tensor) and value.shape == multiplier.shape:
                    moments.append(value)
                    multipliers.append(multiplier.to(value.dtype))
        if moments:
            torch._foreach_mul_(moments, multipliers)

    def _scaled(self, params: Mapping[str, Tensor]) -> list[Tensor]:
        return self._scaled_to([params[name] for name in self._masks])

    def _scaled_to(self, targets: list[Tensor]) -> list[Tensor]:
        """Masks in the dtype of `targets`: with equal dtypes the multiply is one fused call."""
        stale = self._multipliers is None or any(
            m.dtype != t.dtype or m.device != t.device
            for m, t in zip(self._multipliers, targets, strict=True)
        )
        if stale:
            self._multipliers = [
                mask.to(device=t.device, dtype=t.dtype)
                for mask, t in zip(self._masks.values(), targets, strict=True)
            ]
        assert self._multipliers is not None
        return self._multipliers

    @property
    def total(self) -> int:
        """Number of maskable weights."""
        return sum(m.numel() for m in self._masks.values())

    @property
    def kept(self) -> int:
        """Number of weights that stay."""
        return sum(int(m.sum()) for m in self._masks.values())

    @property
    def density(self) -> float:
        """Fraction of maskable weights that stay."""
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        """Fraction of maskable weights that are removed."""
        return 1 - self.density

    def kept_by_tensor(self) -> dict[str, int]:
        """Kept weights by name."""
        return {n: int(m.sum()) for n, m in self._masks.items()}

    def empty_tensors(self) -> list[str]:
        """Names of tensors of which nothing is left (a collapsed layer)."""
        return [n for n, kept in self.kept_by_tensor().items() if kept == 0]

    def pack(self) -> dict[str, Tensor]:
        """One bit a weight: uint8 tensors by name, for `unpack` with the shapes."""
        return {
            name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))
            for name, mask in self._masks.items()
        }

    @staticmethod
    def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Masks:
        """Masks from `pack` and the shapes of the tensors.

        Raises:
            InputError: a packed tensor has not the number of bits that its shape asks for.
        """
        masks = {}
        for name, bits in packed.items():
            shape = tuple(shapes[name])
            count = int(np.prod(shape, dtype=np.int64))
            if bits.numel() != (count + 7) // 8:
                raise InputError(
                    f"mask {name}",
                    described(f"{bits.numel()} bytes"),
                    f"{(count + 7) // 8} bytes for the shape {shape}",
                )
            flat = np.unpackbits(bits.numpy(), count=count)
            masks[name] = torch.from_numpy(flat.astype(bool)).reshape(shape)
        return Masks(masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, {self.kept} of {self.total} weights kept)"


def _misfit(name: str, mask: Tensor, parameter: Tensor) -> InputError:
    return InputError(
        f"mask {name}",
        described(f"shape {tuple(mask.shape)}"),
        f"shape {tuple(parameter.shape)}",
    )


def named_parameters(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters of `model` that `names` lists, by the same names.

    Raises:
        InputError: the model has no parameter of that name.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in params:
            raise InputError("masks", name, "names of parameters: " + ", ".join(params))
    return {name: params[name] for name in names}
