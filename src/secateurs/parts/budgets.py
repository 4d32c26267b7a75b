"""The small language of promises: ``sparsity=0.9``, ``params=2M``, ``macs=0.5``, ``2:4`` ...

A budget is parsed once, at the door. A method states which kinds it can honour
(`Method.budgets`); asking for another is an error that lists them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from secateurs.errors import InputError, unknown

FRACTIONS = {"sparsity", "density", "keep"}
"""Kinds whose value is a fraction of what is there: removed, kept, kept (samples, tokens, units
of a structure)."""

QUANTITIES = {"params", "macs", "bytes", "latency"}
"""Kinds that take a fraction of the dense model (at most 1, no unit) or an absolute amount."""

_UNITS = {
    "params": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9},
    "macs": {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
    "bytes": {
        "": 1.0,
        "b": 1.0,
        "kb": 1e3,
        "mb": 1e6,
        "gb": 1e9,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
    },
    "latency": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
}

_EXAMPLES = (
    "sparsity=0.9, density=0.1, keep=0.25, params=2M or params=0.3, macs=0.5, bytes=10MB, "
    "latency=8ms or latency=0.6, or N:M such as 2:4"
)


@dataclass(frozen=True)
class Budget:
    """What a pruned thing must come down to.

    Attributes:
        kind: ``sparsity``, ``density``, ``keep``, ``params``, ``macs``, ``bytes``, ``latency``
            or ``n:m``.
        value: a fraction, or an absolute amount (weights, MACs, bytes, seconds); for ``n:m``
            the density n/m.
        relative: whether `value` is a fraction of the dense model.
        n, m: kept and total weights of a group, for ``n:m``.
    """

    kind: str
    value: float
    relative: bool = True
    n: int = 0
    m: int = 0

    @staticmethod
    def parse(text: str | Budget) -> Budget:
        """Parse the budget language.

        Raises:
            InputError: the text is malformed, the kind unknown or the value out of range.
        """
        if isinstance(text, Budget):
            return text
        if not isinstance(text, str):
            raise InputError("budget", text, _EXAMPLES)
        stripped = text.strip()
        if match := re.fullmatch(r"(\d+)\s*:\s*(\d+)", stripped):
            n, m = int(match[1]), int(match[2])
            if not 0 < n <= m:
                raise InputError("budget", text, "N:M with 0 < N <= M, such as 2:4")
            return Budget("n:m", n / m, True, n, m)
        match = re.fullmatch(r"([A-Za-z_]+)\s*=\s*([0-9.eE+-]+)\s*([A-Za-z]*)", stripped)
        if match is None:
            raise InputError("budget", text, _EXAMPLES)
        kind, unit = match[1].lower(), match[3].lower()
        if kind not in FRACTIONS | QUANTITIES:
            raise unknown("budget", kind, FRACTIONS | QUANTITIES | {"N:M"})
        try:
            value = float(match[2])
        except ValueError:
            raise InputError("budget", text, _EXAMPLES) from None
        return Budget._checked(kind, value, unit, text)

    @staticmethod
    def _checked(kind: str, value: float, unit: str, text: str) -> Budget:
        if kind in FRACTIONS:
            if unit:
                raise InputError("budget", text, f"{kind}=FRACTION without a unit")
            low_open = kind != "sparsity"
            inside = (0 < value <= 1) if low_open else (0 <= value < 1)
            if not inside:
                raise InputError("budget", text, f"{kind} in {'(0, 1]' if low_open else '[0, 1)'}")
            return Budget(kind, value)
        if not 0 < value < math.inf:
            raise InputError("budget", text, f"{kind} above 0, and finite")
        if not unit and value <= 1:
            return Budget(kind, value)
        scales = _UNITS[kind]
        if unit not in scales:
            units = ", ".join(u for u in scales if u)
            raise InputError("budget", text, f"{kind}=FRACTION up to 1, or an amount in {units}")
        return Budget(kind, value * scales[unit], relative=False)

    def kept(self, prunable: int, fixed: int = 0) -> int:
        """How many of `prunable` weights stay.

        ``params`` counts the whole model, so the `fixed` parameters (biases, norms) are
        subtracted first. Exact to one weight: ``round(sparsity * prunable)`` are removed.

        Raises:
            InputError: the kind says nothing about a number of weights, or cannot be reached.
        """
        if self.kind in ("sparsity",):
            return prunable - round(self.value * prunable)
        if self.kind in ("density", "n:m"):
            return round(self.value * prunable)
        if self.kind == "params":
            asked = self.value * (prunable + fixed) if self.relative else self.value
            kept = round(asked) - fixed
            if kept < 0:
                raise InputError(
                    "budget",
                    str(self),
                    f"params of at least {fixed + 1}: {fixed} of the model's "
                    f"{prunable + fixed} parameters are not prunable",
                )
            return min(kept, prunable)
        raise InputError("budget", str(self), "sparsity=, density= or params= for single weights")

    def kept_samples(self, total: int) -> int:
        """How many of `total` samples stay under ``keep=FRACTION``, exact to one.

        Raises:
            InputError: another kind of budget, or a fraction that leaves nothing.
        """
        if self.kind != "keep":
            raise InputError("budget", str(self), "keep=FRACTION for samples")
        kept = round(self.value * total)
        if kept < 1:
            raise InputError("keep", self.value, f"a fraction that leaves one of {total} samples")
        return kept

    def sparsity(self, prunable: int, fixed: int = 0) -> float:
        """The fraction of `prunable` weights that this budget removes."""
        return 1 - self.kept(prunable, fixed) / prunable

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        if self.kind == "latency" and not self.relative:
            return f"latency={_number(self.value * 1e3)}ms"
        return f"{self.kind}={_number(self.value)}"


def _number(value: float) -> str:
    """All digits that matter, so that the text parses to the same budget."""
    return f"{value:.0f}" if float(value).is_integer() else repr(float(value))
