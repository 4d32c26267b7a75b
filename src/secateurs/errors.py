"""Errors that a user can act on: they name the argument, the value, and what is accepted."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class SecateursError(Exception):
    """Anything the library refuses on purpose; the command line turns it into exit code 2."""


class InputError(SecateursError, ValueError):
    """What the user gave cannot be used.

    Args:
        argument: name of the argument, option, key or file that is at fault.
        value: the value as given.
        accepted: what would be accepted, in words.
    """

    def __init__(self, argument: str, value: Any, accepted: str) -> None:
        self.argument, self.value, self.accepted = argument, value, accepted
        shown = value if isinstance(value, _Verbatim) else repr(value)
        super().__init__(f"{argument}: got {shown}; accepted: {accepted}")

    def __reduce__(self) -> tuple[Any, ...]:
        """So that it comes back whole from other processes."""
        return type(self), (self.argument, self.value, self.accepted)


class ConversionError(SecateursError, RuntimeError):
    """A model could not be carried to or from another format, or computes something else there.

    The message names the place: the operation, the output, the difference.
    """


class DivergedError(SecateursError, ArithmeticError):
    """Training produced a loss that is not finite; the message names the stage and the step."""


class _Verbatim(str):
    """A value shown without quotes, for descriptions instead of literal values."""


def described(text: str) -> str:
    """Mark a description (``"a tensor of shape (3, 4)"``) to be shown without quotes."""
    return _Verbatim(text)


def unknown(argument: str, value: str, choices: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not among `choices`, with the closest one suggested."""
    names = sorted(choices)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return InputError(argument, value, "one of " + ", ".join(names) + hint)


def require(condition: bool, argument: str, value: Any, accepted: str) -> None:
    """Raise `InputError` unless `condition` holds."""
    if not condition:
        raise InputError(argument, value, accepted)


def library(name: str, extra: str) -> Any:
    """The module `name` of an optional library.

    Raises:
        InputError: it is not installed; the extra of secateurs that brings it is named.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        missing = described("none installed")
        raise InputError(name, missing, f"pip install 'secateurs[{extra}]'") from None
