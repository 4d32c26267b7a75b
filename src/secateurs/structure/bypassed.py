"""A layer with a bypass beside it: some of its filters may go, its output keeps its width.

    out = b(x);   out[kept] += main(x)

As all units of the output stay, nothing that reads them changes, and no axis has to be free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateurs.parts.bypass import Bypass, image_dimensions, widths_of
from secateurs.structure.substitution import Substitute
from secateurs.structure.surgery import own_sizes, slice_tensor


class Bypassed(Substitute):
    """A convolution or linear layer and its bypass.

    Attributes:
        main: the layer, with the filters that are left.
        bypass: the way around it.
        kept: (filters,), the output units that `main` adds to.
    """

    kind = "bypassed"
    kept: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.dimension = -1 - image_dimensions(layer)
        self.outputs = widths_of(layer)[1]
        self.main, self.bypass = layer, Bypass(layer)
        self.register_buffer("kept", torch.arange(self.outputs, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """What the layer takes -> (..., outputs, ...)."""
        around: Tensor = self.bypass(x)
        main: Tensor = self.main(x)
        if len(self.kept) == self.outputs:
            return around + main
        return around.index_add(self.dimension, self.kept, main)

    def shorten_(self, kept: Sequence[int]) -> dict[str, dict[str, list[int]]]:
        """Leave these filters of the layer.

        Returns:
            Kept indices by tensor of this module and dimension, as plans have them.
        """
        cut = {f"main.{n}": {"0": list(kept)} for n, _ in self.main.named_parameters()}
        for name in cut:
            slice_tensor(self.get_parameter(name), {0: list(kept)})
        for attribute, value in own_sizes(self.main).items():
            setattr(self.main, attribute, value)
        self.kept = self.kept[torch.tensor(list(kept), device=self.kept.device)]
        return cut

    def config(self) -> dict[str, Any]:
        """How many filters are left."""
        return {"kept": len(self.kept)}

    @classmethod
    def shaped(cls, dense: nn.Module, config: Mapping[str, Any]) -> Self:
        made = cls(dense)
        made.shorten_(range(config["kept"]))
        return made
