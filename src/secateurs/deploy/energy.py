"""Energy of the products that a block-sparse layer makes, by block shape and input width.

A layer multiplies each kept block (rows x cols) once per input vector. What one such product
costs depends on the accelerator: measured values belong into a table of one's own,

    {"unit": "nJ", "blocks": [{"rows": 16, "cols": 16, "width": 384, "energy": 1.7}, ...]}

Without one, `PASSES` is what the released code of LPViT (arXiv 2407.02068) counts: an input of
width d is streamed in d // 16 passes of 16 numbers, whatever the shape of the block. It has no
unit; only the ratios between layers count.
"""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from secateurs.errors import InputError, described, require


class EnergyModel(Protocol):
    """What one product with a block costs."""

    def of(self, rows: int, cols: int, width: int) -> float:
        """Energy of one block product in a layer whose input is `width` wide."""
        ...


@dataclass(frozen=True)
class Passes:
    """Passes of `lanes` numbers over the input, rounded down as in the released code."""

    lanes: int = 16

    def of(self, rows: int, cols: int, width: int) -> float:
        """width // lanes."""
        return float(width // self.lanes)


PASSES = Passes()
"""The model of the released code."""


@dataclass(frozen=True)
class Measured:
    """One measured value.

    Attributes:
        rows, cols: of the block.
        width: of the layer's input.
        energy: of one product, in the unit of the table.
    """

    rows: int
    cols: int
    width: int
    energy: float

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.energy >= 0, "energy", self.energy, "0 or more")


@dataclass(frozen=True)
class EnergyTable:
    """Measured energies, linear in the width between two measured ones, constant beyond them.

    Attributes:
        blocks: the measurements.
        unit: for reports.
    """

    blocks: tuple[Measured, ...]
    unit: str = ""

    def of(self, rows: int, cols: int, width: int) -> float:
        """Energy of one block product.

        Raises:
            InputError: blocks of that shape were not measured.
        """
        own = sorted((m.width, m.energy) for m in self.blocks if (m.rows, m.cols) == (rows, cols))
        if not own:
            shapes = sorted({f"{m.rows}x{m.cols}" for m in self.blocks})
            raise InputError("block", f"{rows}x{cols}", "a measured one: " + ", ".join(shapes))
        widths, energies = [w for w, _ in own], [e for _, e in own]
        place = bisect.bisect_left(widths, width)
        if place == 0 or place == len(own):
            return energies[min(place, len(own) - 1)]
        share = (width - widths[place - 1]) / (widths[place] - widths[place - 1])
        return energies[place - 1] + share * (energies[place] - energies[place - 1])

    @staticmethod
    def read(path: str | Path) -> EnergyTable:
        """A table from a JSON file.

        Raises:
            InputError: no such file, or it is not of the form above.
        """
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise InputError("energy", str(path), f"a JSON file ({error})") from None
        try:
            blocks = tuple(
                Measured(int(b["rows"]), int(b["cols"]), int(b["width"]), float(b["energy"]))
                for b in values["blocks"]
            )
            unit = str(values.get("unit", ""))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            form = "blocks with rows, cols, width and energy each"
            raise InputError(
                "energy", str(path), f"{form} ({type(error).__name__}: {error})"
            ) from None
        require(bool(blocks), "energy", described(f"{path} without blocks"), "at least one")
        keys = [(m.rows, m.cols, m.width) for m in blocks]
        twice = next((k for k in keys if keys.count(k) > 1), None)
        require(twice is None, "energy", twice, "each block shape and width once")
        return EnergyTable(blocks, unit)


def energy_model(path: str | None) -> EnergyModel:
    """The measured table in a file, or the model of the released code where there is none."""
    return PASSES if path is None else EnergyTable.read(path)
