"""How models and data are named: ``KIND:NAME?option=value&option=value@FILE.safetensors``.

Only as much as a spec needs is written: ``digits``, ``zoo:convnet``, ``zoo:mlp?hidden=64,32``,
``fashion-mnist:/data/fashion?limit=6000&size=14``, ``zoo:convnet@trained.safetensors``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from secateurs.errors import InputError, described, require, unknown

ONNX_SUFFIX = ".onnx"
"""A bare file with this ending is ``onnx:FILE``."""
WEIGHTS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Spec:
    """A spec, taken apart.

    Attributes:
        text: as it was given.
        kind: what stands before the first colon; the whole name where there is none.
        name: what stands after it, without options and weights.
        options: in the order given.
        weights: file named after ``@``.
    """

    text: str
    kind: str
    name: str = ""
    options: dict[str, str] = field(default_factory=dict)
    weights: Path | None = None

    @property
    def title(self) -> str:
        """The spec without its weights."""
        return self.text.rpartition("@")[0] if self.weights is not None else self.text


def parse_spec(text: str, argument: str) -> Spec:
    """Take a spec apart; nothing is looked up.

    Args:
        argument: what the spec is for, named in errors.

    Raises:
        InputError: the text is empty, or an option is not ``key=value`` or given twice.
    """
    require(isinstance(text, str) and bool(text.strip()), argument, text, "a name such as zoo:mlp")
    rest, weights = text, None
    if text.endswith(WEIGHTS_SUFFIX) and "@" in text:
        rest, _, file = text.rpartition("@")
        weights = Path(file)
    whole, _, query = rest.partition("?")
    kind, _, name = whole.partition(":")
    if kind.endswith(ONNX_SUFFIX) and not name:
        kind, name = "onnx", kind
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise InputError(f"{argument} {whole}", part, "options written key=value, joined by &")
        require(key not in options, f"{argument} {whole}", part, f"option {key!r} once")
        options[key] = value
    return Spec(text, kind, name, options, weights)


class Options:
    """The options of a spec as their reader takes them; what nobody took is an error."""

    def __init__(self, spec: Spec, argument: str) -> None:
        self.values, self.argument = spec.options, f"{argument} {spec.title.partition('?')[0]}"
        self.asked: list[str] = []

    def text(self, name: str, default: str = "", choices: tuple[str, ...] = ()) -> str:
        """A word, one of `choices` where there are any."""
        self.asked.append(name)
        value = self.values.get(name, default)
        if choices and value not in choices:
            raise unknown(f"{self.argument} option {name}", value, choices)
        return value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int | None:
        """A whole number of at least `least`."""
        value = self.text(name)
        if not value:
            return default
        if not value.lstrip("-").isdecimal() or int(value) < least:
            raise InputError(f"{self.argument} option {name}", value, f"an integer >= {least}")
        return int(value)

    def fraction(self, name: str, default: float) -> float:
        """A number between 0 and 1, both excluded."""
        value = self.text(name, str(default))
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        require(0 < number < 1, f"{self.argument} option {name}", value, "a fraction in (0, 1)")
        return number

    def flag(self, name: str) -> bool:
        """``true`` or ``false``; false where it is not given."""
        return self.text(name, "false", ("true", "false")) == "true"

    def done(self) -> None:
        """Raise `InputError` for an option that nobody asked for."""
        for name in self.values:
            if name not in self.asked:
                if not self.asked:
                    raise InputError(self.argument, f"?{name}=...", "no options")
                raise unknown(f"{self.argument} option", name, self.asked)


def imported_function(spec: Spec, argument: str) -> Callable[..., Any]:
    """The function that ``python:module:function`` names; it can be called without arguments.

    The module is one that Python finds, one in the working folder, or the path of a ``.py``
    file. Its code runs.

    Raises:
        InputError: there is no such module or function, or the function needs arguments.
    """
    where, _, function = spec.name.rpartition(":")
    require(bool(where and function), argument, spec.text, "python:module:function")
    module = _module(where, argument)
    made = getattr(module, function, None)
    if not callable(made):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise unknown(f"{argument} function of {where}", function, names)
    needed = [
        name
        for name, parameter in parameters_of(made).items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise InputError(
            argument,
            spec.text,
            f"a function that is called without arguments; this one needs {', '.join(needed)}",
        )
    return made


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function by name; none where Python cannot tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled code without a signature
        return {}


def _module(where: str, argument: str) -> ModuleType:
    if where.endswith(".py"):
        path = Path(where)
        require(path.is_file(), argument, where, "an existing file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    with _working_folder_first():
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            name = error.name or ""
            if where == name or where.startswith(name + "."):
                raise InputError(argument, where, "a module that Python finds") from None
            raise InputError(
                argument, where, described(f"a module that imports; it lacks {name!r}")
            ) from error


@contextmanager
def _working_folder_first() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def check_hub_name(argument: str, name: str) -> None:
    """Raise `InputError` for what can only be a path but does not exist; a hub would be asked
    for it in vain, and for long."""
    path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    require(not path or Path(name).exists(), argument, name, "an existing folder, or OWNER/NAME")
