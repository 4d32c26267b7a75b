"""Models by name: our own, those of torchvision, timm and transformers, a user's, a saved one.

Weights are read from safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateurs.errors import InputError, described, require, unknown
from secateurs.outcome import PLAN, load, load_weights, outcome_folder
from secateurs.state import read_tensors
from secateurs.task import Task
from secateurs.zoo.datasets import Data, load_data
from secateurs.zoo.networks import Shape, find_network, make_network, networks
from secateurs.zoo.specs import Options, Spec, imported_function, parameters_of, parse_spec

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        make: a new module, with the weights of the source where it has any; fresh ones are
            drawn from torch's global generator.
        resize: width multiplier -> the same family, fresh weights; None where it has no width.
        pretrained: whether the source has weights.
        spec: as it was given.
        example_inputs: makes a batch of 1 as the model takes it.
        architecture: a new module whose weights are of no account: what loading needs.
    """

    make: Make
    resize: Callable[[float], nn.Module] | None
    pretrained: bool
    spec: str
    example_inputs: Callable[[], Any]
    architecture: Make


def load_model(
    spec: str, *, data: Data | None = None, weights: Path | None = None, width: float = 1.0
) -> ModelSource:
    """Find a model.

    ========================= ================================================================
    ``zoo:NAME``              `secateurs.zoo.networks`; options ``width``, ``init`` and its own
    ``torchvision:NAME``      its classification networks, fresh weights
    ``timm:NAME``             all of timm's, fresh weights
    ``pretrained:NAME``       `secateurs.zoo.pretrained`: weights from ordinary packages
    ``onnx:FILE``, FILE.onnx  whatever framework wrote it (`secateurs.deploy.onnx_import`)
    ``hf:NAME`` or FOLDER     of transformers, with its weights; ``fresh=true`` without them,
                              ``dtype`` (float32)
    ``python:MODULE:F``       the module that F returns, or the model of its Task; F may take
                              ``width``; ``trained=true`` says that it comes with weights
    FOLDER                    of a run or a saved outcome
    ========================= ================================================================

    Each may be followed by ``@FILE.safetensors``, which is loaded strictly.

    Args:
        data: gives the number of classes, channels and the size of the inputs; without it
            networks are made as their papers have them.
        weights: the same as ``@FILE``.
        width: multiplies the width, for those that have one.

    Raises:
        InputError: unknown kind, name or option; no such file or folder; weights that do not
            fit, with the first difference; data that the model is not made for.
    """
    parsed = parse_spec(spec, "model")
    if weights is not None:
        twice = parsed.weights is not None
        require(not twice, "weights", str(weights), "weights named once, not by @FILE as well")
        parsed = replace(parsed, weights=Path(weights))
    require(width > 0, "width", width, "a multiplier above 0")
    if (folder := _folder_of(parsed)) is not None:
        source = _saved(folder, parsed, data)
    elif parsed.kind in _KINDS:
        require(bool(parsed.name), "model", spec, f"{parsed.kind}:NAME")
        source = _KINDS[parsed.kind](parsed, Options(parsed, "model"), data)
    else:
        raise _unknown_kind(parsed)
    if width != 1.0:
        source = _resized(source, width)
    return source if parsed.weights is None else _with_weights(source, parsed.weights)


def has_weights(spec: str) -> bool:
    """Whether a model comes with trained weights; said from its spec, nothing is loaded.

    Raises:
        InputError: the spec is malformed or its kind unknown.
    """
    parsed = parse_spec(spec, "model")
    if parsed.weights is not None or _folder_of(parsed) is not None:
        return True
    if parsed.kind not in _KINDS:
        raise _unknown_kind(parsed)
    if parsed.kind == "hf":
        return parsed.options.get("fresh") != "true"
    if parsed.kind in ("pretrained", "onnx"):
        return True
    return parsed.kind == "python" and parsed.options.get("trained") == "true"


def _unknown_kind(spec: Spec) -> InputError:
    if spec.kind in networks():
        return InputError("model", spec.text, f"zoo:{spec.kind}")
    if not spec.name and (spec.text.endswith(".safetensors") or Path(spec.text).exists()):
        return InputError(
            "model", spec.text, f"a folder with {PLAN}, or MODEL@FILE.safetensors for weights"
        )
    return unknown("model", spec.kind, [*_KINDS, "FOLDER"])


def saved_outcome(spec: str) -> Path | None:
    """The folder with the plan, where a spec names a run or a saved outcome; None elsewhere."""
    return _folder_of(parse_spec(spec, "model"))


def _folder_of(spec: Spec) -> Path | None:
    if spec.kind in _KINDS or not Path(spec.title).is_dir():
        return None
    try:
        return outcome_folder(Path(spec.title))
    except InputError:
        return None


def _saved(folder: Path, spec: Spec, data: Data | None) -> ModelSource:
    """A folder that `secateurs.save` wrote; its own data says how the model is called."""

    def make() -> nn.Module:
        return load(folder).model

    def inputs() -> Any:
        if data is not None:
            return data.example()
        source = load(folder).source
        if "data" not in source:
            raise InputError("data", None, f"a data set: {folder} does not name its own")
        if source["data"].partition("?")[0] == "noise":
            return load_model(source["model"]).example_inputs()
        return load_data(source["data"]).example()

    return ModelSource(make, None, True, spec.text, inputs, make)


def _zoo(spec: Spec, options: Options, data: Data | None) -> ModelSource:
    found = find_network(spec.name)
    if data is not None and data.kind != found.kind:
        shown = described(f"{data.kind} data")
        raise InputError(f"data {data.name}", shown, f"{found.kind} data, for zoo:{spec.name}")
    classes = _classes(options, data, found.classes)
    base = _width(options)
    own = {k: v for k, v in spec.options.items() if k not in options.asked}
    inputs = found.inputs if data is None else _inputs(data)

    def resize(width: float) -> nn.Module:
        return make_network(spec.name, inputs=inputs, classes=classes, width=base * width, **own)

    def make() -> nn.Module:
        return resize(1.0)

    with torch.device("meta"):
        make()  # options are checked at the door, at no cost
    tokens = found.classes if found.kind == "language" else None
    example = _example(data, inputs, tokens)
    return ModelSource(make, resize, False, spec.text, example, make)


def _torchvision(spec: Spec, options: Options, data: Data | None) -> ModelSource:
    from torchvision import models

    names = models.list_models(module=models)
    if spec.name not in names:
        raise _unlisted("torchvision", spec.name, names)
    classes = _classes(options, data, 1000)
    options.done()
    inputs = (3, 224, 224) if data is None else _inputs(data)
    arguments: dict[str, Any] = {"num_classes": classes}
    if spec.name.startswith("vit_"):
        arguments["image_size"] = inputs[-1]
    if spec.name in ("googlenet", "inception_v3"):
        # their second outputs exist in training only, and no loss here knows of them
        arguments |= {"aux_logits": False, "init_weights": True}

    def make() -> nn.Module:
        model: nn.Module = models.get_model(spec.name, weights=None, **arguments)
        return model

    return _checked(ModelSource(make, None, False, spec.text, _example(data, inputs), make), data)


def _timm(spec: Spec, options: Options, data: Data | None) -> ModelSource:
    import timm

    name, _, tag = spec.name.partition(".")
    if not timm.is_model(name):
        raise _unlisted("timm", spec.name, timm.list_models())
    if tag and spec.name not in (tagged := timm.list_pretrained(f"{name}.*")):
        raise _unlisted("timm", spec.name, tagged)
    classes = _classes(options, data, 1000)
    options.done()
    default = timm.get_pretrained_cfg_value(spec.name, "input_size") or (3, 224, 224)
    inputs = tuple(default) if data is None else _inputs(data)
    arguments: dict[str, Any] = {"num_classes": classes, "in_chans": inputs[0]}
    if timm.get_pretrained_cfg_value(spec.name, "fixed_input_size"):
        arguments["img_size"] = inputs[1:]

    def make() -> nn.Module:
        model: nn.Module = timm.create_model(spec.name, pretrained=False, **arguments)
        return model

    return _checked(ModelSource(make, None, False, spec.text, _example(data, inputs), make), data)


def _pretrained(spec: Spec, options: Options, data: Data | None) -> ModelSource:
    from secateurs.zoo.pretrained import pretrained

    options.done()
    found = pretrained(spec.name)
    inputs = found.example if data is None else data.example
    return ModelSource(found.make, None, True, spec.text, inputs, found.architecture)


def _onnx(spec: Spec, options: Options, data: Data | None) -> ModelSource:
    from secateurs.deploy.onnx_import import import_onnx

    options.done()
    found = import_onnx(spec.name)

    def make() -> nn.Module:
        return copy.deepcopy(found.model)

    def inputs() -> Any:
        return found.example_inputs

    source = ModelSource(make, None, True, spec.text, inputs, make)
    return _checked(source, data)


def _hub(spec: Spec, options: Options, data: Data | None) -> ModelSource:
    from secateurs.zoo.hub_models import hub_model

    fresh = options.flag("fresh")
    dtype = options.text("dtype", "float32", ("float32", "bfloat16", "float16"))
    classes = _classes(options, data, None)
    options.done()
    found = hub_model(spec.name, data, classes, getattr(torch, dtype))
    example = found.example_inputs if data is None else data.example
    make = found.fresh if fresh else found.trained
    return ModelSource(make, None, not fresh, spec.text, example, found.fresh)


def _python(spec: Spec, options: Options, data: Data | None) -> ModelSource:
    trained = options.flag("trained")
    options.done()
    function = imported_function(spec, "model")
    wide = "width" in parameters_of(function)

    def checked(model: Any) -> nn.Module:
        if isinstance(model, Task):
            model = model.model if isinstance(model.model, nn.Module) else model.model()
        if not isinstance(model, nn.Module):
            shown = described(f"a {type(model).__name__}")
            raise InputError(f"model {spec.text}", shown, "a function that returns a torch module")
        return model

    def make() -> nn.Module:
        return checked(function())

    def resize(width: float) -> nn.Module:
        return checked(function(width=width))

    def inputs() -> Any:
        if data is None:
            raise InputError("data", None, f"a data set: {spec.text} does not say what it takes")
        return data.example()

    return ModelSource(make, resize if wide else None, trained, spec.text, inputs, make)


_KINDS: dict[str, Callable[[Spec, Options, Data | None], ModelSource]] = {
    "zoo": _zoo,
    "torchvision": _torchvision,
    "timm": _timm,
    "pretrained": _pretrained,
    "onnx": _onnx,
    "hf": _hub,
    "python": _python,
}


def _classes(options: Options, data: Data | None, default: Any) -> Any:
    """Number of outputs: of the option ``classes``, of the data, or the default without data."""
    classes = options.integer("classes", None if data is None else data.classes)
    if classes is None and data is not None:
        raise InputError(
            f"{options.argument} option classes", None,
            f"?classes=N: {data.name} does not say how many there are",
        )  # fmt: skip
    return default if classes is None else classes


def _inputs(data: Data) -> Shape:
    if data.inputs is None:
        shown = described("samples without one shape")
        raise InputError(f"data {data.name}", shown, "samples that are a tensor of one shape")
    return data.inputs


def _width(options: Options) -> float:
    text = options.text("width", "1")
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    require(width > 0, f"{options.argument} option width", text, "a multiplier above 0")
    return width


def _example(data: Data | None, inputs: Shape, vocabulary: int | None = None) -> Callable[[], Any]:
    """Inputs of the data, or numbers of the right shape."""
    if data is not None:
        return data.example
    stream = torch.Generator().manual_seed(0)
    if vocabulary is not None:
        return lambda: torch.randint(vocabulary, (1, *inputs), generator=stream.manual_seed(0))
    return lambda: torch.randn(1, *inputs, generator=stream.manual_seed(0))


def _checked(source: ModelSource, data: Data | None) -> ModelSource:
    """The source, after one forward pass on a sample of the data has shown that it takes it."""
    if data is None:
        return source
    inputs = data.example()
    shown = described(f"inputs of shape {tuple(getattr(inputs, 'shape', ()))}")
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            source.make().eval()(inputs)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"data {data.name}", shown, f"what {source.spec} takes ({reason})"
        ) from None
    return source


def _resized(source: ModelSource, width: float) -> ModelSource:
    """The same family at another width."""
    resize = source.resize
    if resize is None:
        raise InputError("width", width, f"1: {source.spec} has no width to change")

    def make() -> nn.Module:
        return resize(width)

    return replace(source, make=make, architecture=make, resize=lambda w: resize(width * w))


def _with_weights(source: ModelSource, path: Path) -> ModelSource:
    """The source with the weights of a file."""
    require(path.is_file(), "weights", str(path), "an existing safetensors file")

    def make() -> nn.Module:
        model = source.architecture()
        weights, _ = read_tensors(path)
        load_weights(model, _with_tied(model, weights))
        return model

    return replace(source, make=make, pretrained=True)


def _with_tied(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights with the second names of tied tensors, which many writers leave out."""
    first: dict[int, str] = {}
    own = model.state_dict()
    for name, tensor in own.items():
        if name in weights:
            first.setdefault(tensor.data_ptr(), name)
    tied = {
        name: weights[first[tensor.data_ptr()]]
        for name, tensor in own.items()
        if name not in weights and tensor.numel() and tensor.data_ptr() in first
    }
    return {**weights, **tied}


def _unlisted(library: str, name: str, names: Iterable[str]) -> InputError:
    """An error for a name that is not among the many of a library."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
    return InputError("model", f"{library}:{name}", f"a name that {library} lists{hint}")
