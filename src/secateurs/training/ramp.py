"""Where in a training a sparsity ramp lies."""

from __future__ import annotations

from secateurs.errors import require

LEAST_UPDATES = 20


def at_step(position: float, total_steps: int) -> int:
    """A position in a training: a fraction up to 1, or a step above 1."""
    return round(position * total_steps) if position <= 1 else int(position)


def ramp_steps(begin: float, end: float, frequency: int, total_steps: int) -> tuple[int, int, int]:
    """(first step, last step, steps between updates) of a ramp.

    The frequency is lowered where the ramp would otherwise have fewer than 20 updates.

    Raises:
        InputError: the ramp does not lie within the training.
    """
    require(begin >= 0, "begin", begin, "a fraction up to 1, or a step above 1")
    require(frequency >= 1, "frequency", frequency, "at least 1 step")
    first, last = at_step(begin, total_steps), at_step(end, total_steps)
    require(
        first <= last <= total_steps,
        "end",
        end,
        f"a point between begin (step {first}) and the last step ({total_steps})",
    )
    return first, last, min(frequency, max(1, (last - first) // LEAST_UPDATES))
