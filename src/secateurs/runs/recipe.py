"""A recipe: model, data, seed and a list of stages, as YAML.

    model: zoo:convnet
    data: digits
    training: {epochs: 10, lr: 0.05}
    stages:
      - train
      - prune: {method: global-mp, budget: sparsity=0.95}

A stage is `train` (the dense network, by `training`), `prune` (a method with its budget and
options; it recovers by `finetuning`, or trains itself, as the method does, or recovers as
`recover` says, see `secateurs.recovery`; `base` names what the model was fine-tuned from, for
methods that prune the difference) or `finetune` (a further
training with the masks kept). Everything is checked before anything runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from secateurs.deploy.timing import check_engines
from secateurs.errors import InputError, described, require, unknown
from secateurs.method import Method, Pruner, Selector
from secateurs.recovery import recovery
from secateurs.registry import build, create
from secateurs.settings import TrainSettings
from secateurs.task import Task

KEYS = (
    "model",
    "data",
    "seed",
    "batch_size",
    "threads",
    "label_smoothing",
    "latency",
    "engines",
    "training",
    "finetuning",
    "stages",
)
STAGES = ("train", "prune", "finetune")


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        kind: ``train``, ``prune`` or ``finetune``.
        method, budget, options, recover, base: of a ``prune`` stage.
        settings: of a ``finetune`` stage, over those of the recipe.
    """

    kind: str
    method: str = ""
    budget: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    recover: bool | str | dict[str, Any] = True
    settings: dict[str, Any] = field(default_factory=dict)
    base: str = ""

    def check(self) -> None:
        """Raise `InputError` for a method, option, budget or setting that cannot be."""
        if self.kind == "prune":
            recovery(self.recover)
            method = self.build_method()
            method.accept(self.budget)
            self._check_base("base" in method.needs)
        else:
            build(TrainSettings, self.settings)

    def _check_base(self, needed: bool) -> None:
        from secateurs.zoo.catalog import has_weights

        if needed != bool(self.base):
            accepted = "what the model was fine-tuned from" if needed else "none"
            raise InputError("base", self.base or None, f"{accepted}, for {self.method}")
        if needed:
            require(has_weights(self.base), "base", self.base, "a model with weights")

    def build_method(self) -> Method:
        """The method of a ``prune`` stage."""
        method = create(self.method, self.options)
        if isinstance(method, Selector):
            accepted = "a method for models; secateurs select runs this one"
            raise InputError("method", self.method, accepted)
        assert isinstance(method, Method)
        return method

    def as_yaml(self) -> Any:
        """The stage as it stands in a recipe."""
        if self.kind == "prune":
            base = {"base": self.base} if self.base else {}
            body = {"method": self.method, "budget": self.budget, **base, **self.options}
            return {"prune": body if self.recover is True else {**body, "recover": self.recover}}
        return {self.kind: self.settings} if self.settings else self.kind


@dataclass(frozen=True)
class Recipe:
    """What a run does, whole and checked.

    Attributes:
        model, data: specifications, see `secateurs.zoo`.
        seed: of weights, data order and whatever is random.
        batch_size: of training and evaluation.
        threads: of torch; None takes what the machine gives and is fixed when a run begins,
            since sums depend on it.
        label_smoothing: of the training loss.
        latency: whether forward passes are timed.
        engines: in which; see `secateurs.deploy.timing`.
        training, finetuning: changes to the task's own settings.
        stages: in order.
    """

    model: str
    data: str
    stages: tuple[Stage, ...]
    seed: int = 0
    batch_size: int = 64
    threads: int | None = None
    label_smoothing: float = 0.0
    latency: bool = True
    engines: tuple[str, ...] = ("eager",)
    training: dict[str, Any] = field(default_factory=dict)
    finetuning: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "an integer of 64 bits")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "[0, 1)")
        check_engines(self.engines)
        require(bool(self.stages), "stages", [], "at least one stage: " + ", ".join(STAGES))
        build(TrainSettings, self.training)
        build(TrainSettings, self.finetuning)
        for stage in self.stages:
            stage.check()
        if any(stage.base for stage in self.stages):
            from secateurs.zoo.catalog import has_weights

            require(has_weights(self.model), "model", self.model,
                    "a model with weights, fine-tuned from the base")  # fmt: skip

    @staticmethod
    def parse(text: str) -> Recipe:
        """A recipe from YAML.

        Raises:
            InputError: malformed YAML, duplicate or unknown keys, or values that cannot be.
        """
        return Recipe.from_dict(parse_yaml(text, "recipe"))

    @staticmethod
    def read(path: Path) -> Recipe:
        """A recipe from a file."""
        return Recipe.parse(read_text(path, "recipe"))

    @staticmethod
    def from_dict(values: Any) -> Recipe:
        """A recipe from plain values."""
        check_keys(values, KEYS, "recipe", required=("model", "data", "stages"))
        stages = values["stages"]
        if not isinstance(stages, list):
            raise InputError("stages", stages, "a list of stages: " + ", ".join(STAGES))
        plain = {k: v for k, v in values.items() if k != "stages"}
        recipe: Recipe = build(Recipe, {**plain, "stages": tuple(map(parse_stage, stages))})
        return recipe

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` takes back."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "stages"
        }
        if self.engines == ("eager",):
            del values["engines"]  # recipes from before there was a choice keep their identity
        return plain_values({**values, "stages": [stage.as_yaml() for stage in self.stages]})

    def as_yaml(self) -> str:
        """The recipe as a file."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)

    def identity(self) -> str:
        """A short hash of everything that determines the result."""
        return short_hash(self.as_dict())

    def make_task(self) -> Task:
        """The task, with the recipe's settings."""
        from secateurs.zoo.catalog import make_task

        task = make_task(
            self.model,
            self.data,
            batch_size=self.batch_size,
            seed=self.seed,
            label_smoothing=self.label_smoothing,
        )
        return dataclasses.replace(
            task,
            training=changed(task.training, self.training),
            finetuning=changed(task.finetuning, self.finetuning),
        )


def changed(settings: TrainSettings, changes: Mapping[str, Any]) -> TrainSettings:
    """Settings with some fields changed; changing the epochs takes a number of steps back."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    if "epochs" in changes and "steps" not in changes:
        values["steps"] = None
    result: TrainSettings = build(TrainSettings, {**values, **changes})
    return result


def parse_stage(value: Any) -> Stage:
    """A stage from its YAML: a name, or a mapping from the name to its settings."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise InputError("stages", value, "a name or NAME: {settings}, one a list entry")
    ((kind, body),) = value.items()
    body = {} if body is None else body
    if kind not in STAGES:
        raise unknown("stage", kind, STAGES)
    if not isinstance(body, dict):
        raise InputError(kind, body, "settings as a mapping")
    if kind != "prune":
        return Stage(kind, settings=body)
    for key in ("method", "budget"):
        if key not in body:
            raise InputError("prune", described(f"no {key!r}"), "method and budget")
    own = ("method", "budget", "recover", "base")
    rest = {k: v for k, v in body.items() if k not in own}
    recover = body.get("recover", True)
    if not isinstance(recover, bool | str | dict):
        raise InputError("recover", recover, "true, false, a name, or a name with options")
    base = str(body.get("base") or "")
    return Stage("prune", str(body["method"]), str(body["budget"]), rest, recover, base=base)


def stages_for(method: str, budget: str, options: Mapping[str, Any], *, fresh: bool) -> list[Stage]:
    """The stages of pruning by one method: trained first where the method expects it.

    Args:
        options: of the method; ``base`` and ``recover`` among them are the stage's own.
        fresh: whether the model comes without trained weights.
    """
    own = {k: v for k, v in options.items() if k not in ("base", "recover")}
    base, recover = str(options.get("base") or ""), options.get("recover", True)
    prune = Stage("prune", method, budget, own, recover, base=base)
    made = create(method, own)
    after_training = isinstance(made, Pruner) or "peft" in made.tags.values("recovery")
    if fresh and made.time != "PBT" and after_training:
        return [Stage("train"), prune]
    return [prune]


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping without duplicate keys."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise InputError(str(key), described(f"twice, line {line}"), "every key once")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, what: str) -> Any:
    """YAML as plain values.

    Raises:
        InputError: malformed, or a key stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        place = str(getattr(error, "problem_mark", "")).strip()
        raise InputError(what, described("malformed YAML"), f"YAML ({place})") from None


def read_text(path: Path, what: str) -> str:
    """The text of a file.

    Raises:
        InputError: it is missing or not text.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        raise InputError(what, str(path), "a readable text file") from None


def check_keys(
    values: Any, known: tuple[str, ...], what: str, required: tuple[str, ...] = ()
) -> None:
    """Raise `InputError` unless `values` is a mapping with known keys and all required ones."""
    if not isinstance(values, dict):
        raise InputError(what, values, "a mapping with the keys " + ", ".join(known))
    for key in values:
        if key not in known:
            raise unknown(f"{what} key", str(key), known)
    for key in required:
        if key not in values:
            raise InputError(what, described(f"no {key!r}"), "a key " + ", ".join(required))


def plain_values(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {k: plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    return value


def short_hash(value: Any) -> str:
    """Twelve hexadecimal digits of the canonical JSON of plain values."""
    canonical = json.dumps(plain_values(value), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
