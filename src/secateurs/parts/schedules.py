"""Sparsity as a function of the step: constant, linear, cubic, cosine, exponential per round.

Every schedule is a frozen dataclass that is called with the step and answers the sparsity.
`updates(step)` says whether the masks are refreshed after that step; the last step of the
ramp is always one, so the final sparsity is reached whatever the frequency.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from secateurs.errors import require, unknown


@dataclass(frozen=True)
class Schedule:
    """A ramp from `initial` to `final` sparsity between two steps.

    Attributes:
        final: sparsity at and after `end` (fraction removed, in [0, 1)).
        begin, end: first and last step of the ramp (steps, counted from 0).
        initial: sparsity before and at `begin`.
        frequency: steps between two mask updates.
    """

    final: float
    begin: int = 0
    end: int = 0
    initial: float = 0.0
    frequency: int = 1

    def __post_init__(self) -> None:
        require(0 <= self.initial < 1, "initial", self.initial, "a sparsity in [0, 1)")
        require(0 <= self.final < 1, "final", self.final, "a sparsity in [0, 1)")
        require(self.begin >= 0, "begin", self.begin, "a step of at least 0")
        require(self.end >= self.begin, "end", self.end, f"a step of at least begin={self.begin}")
        require(self.frequency > 0, "frequency", self.frequency, "at least 1 step")

    def ramp(self, progress: float) -> float:
        """Share of the way from initial to final at `progress` in [0, 1]; a straight line."""
        return progress

    def share(self, step: int) -> float:
        """Share of the way from initial to final at `step`."""
        if step >= self.end:
            return 1.0
        if step <= self.begin:
            return 0.0
        return self.ramp((step - self.begin) / (self.end - self.begin))

    def __call__(self, step: int) -> float:
        share = self.share(step)
        # the ends exactly, without rounding
        return self.final if share == 1 else self.initial + (self.final - self.initial) * share

    def updates(self, step: int) -> bool:
        """Whether the masks are recomputed at `step`."""
        if not self.begin <= step <= self.end:
            return False
        return step == self.end or (step - self.begin) % self.frequency == 0


@dataclass(frozen=True)
class Constant(Schedule):
    """The final sparsity at once, from `begin` on."""

    def share(self, step: int) -> float:
        return 1.0 if step >= self.begin else 0.0

    def updates(self, step: int) -> bool:
        return step == self.begin


@dataclass(frozen=True)
class Linear(Schedule):
    """Equal amounts per step."""


@dataclass(frozen=True)
class Cubic(Schedule):
    """1 − (1 − progress)^power: fast while many weights are redundant, slow near the target.

    Zhu & Gupta, arXiv 1710.01878, equation 1 (power 3).
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.power > 0, "power", self.power, "above 0")

    def ramp(self, progress: float) -> float:
        return 1 - (1 - progress) ** self.power


@dataclass(frozen=True)
class Cosine(Schedule):
    """(1 − cos(π · progress)) / 2: slow, fast, slow."""

    def ramp(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Exponential(Schedule):
    """Equal fractions of the surviving weights per step: density falls geometrically."""

    def __call__(self, step: int) -> float:
        progress = self.share(step)
        if progress in (0, 1):
            return self.final if progress else self.initial
        density = (1 - self.initial) * ((1 - self.final) / (1 - self.initial)) ** progress
        low, high = sorted((self.initial, self.final))
        return min(max(1 - density, low), high)  # powers round beyond the ends


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cubic": Cubic,
    "cosine": Cosine,
    "exponential": Exponential,
}


def schedule(name: str, **fields: float | int) -> Schedule:
    """A schedule by name, with its fields."""
    if name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    return SCHEDULES[name](**fields)  # type: ignore[arg-type]


def rate_for(density: float, rounds: int) -> float:
    """The per-round rate r that leaves `density` after `rounds`: r = 1 − density^(1/rounds)."""
    require(0 < density <= 1, "density", density, "a fraction in (0, 1]")
    require(rounds >= 1, "rounds", rounds, "at least 1")
    return float(1 - density ** (1 / rounds))


@dataclass(frozen=True)
class CosineDecay:
    """A rate that falls from `initial` to `floor` along half a cosine over `steps`."""

    initial: float
    steps: int
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        progress = min(step / self.steps, 1.0) if self.steps > 0 else 1.0
        return self.floor + (self.initial - self.floor) * (1 + math.cos(math.pi * progress)) / 2
