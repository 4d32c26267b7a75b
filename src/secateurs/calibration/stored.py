"""How the tensors of a checkpoint become those of a model, and back.

Mostly they are the same, by the same names. Transformers 5 holds some otherwise than the files do
and converts them as it loads and saves: the experts of a layer stand in the files one by one and
in the model as one array. What goes together is a `Part`; transformers' own rules convert it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described, library, require


@dataclass(frozen=True)
class Part:
    """Tensors that are converted together.

    Attributes:
        stored: names in the files.
        own: names in the model's state dict.
        patterns: of the rule by which each stored tensor is converted; none where it is the
            model's tensor as it is, maybe by another name.
    """

    stored: tuple[str, ...]
    own: tuple[str, ...]
    patterns: tuple[str, ...] = ()


class Conversion:
    """What transformers does between the files of a checkpoint and a model.

    Args:
        model: its parameters may be on the meta device.
        shapes: of the stored tensors.

    Attributes:
        ignored: stored tensors of which transformers knows that the model has no use for them,
            such as inverse frequencies, or layers that predict further tokens.

    Raises:
        InputError: stored tensors that the model does not have, of other shapes, or that could
            not be written back as they are stored; all name the tensor.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model = model
        self.ignored: tuple[str, ...] = ()
        self._rules: dict[str, Any] = {}
        state = model.state_dict()
        empty = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
        if all(name in state for name in shapes):
            self.parts = [Part((name,), (name,)) for name in shapes]
        else:
            self.parts = self._converted(state, empty)
        made = self.read(self.parts, empty)
        for name, tensor in made.items():
            own, shape = tuple(state[name].shape), tuple(tensor.shape)
            require(own == shape, f"checkpoint {name}", described(f"shape {shape}"), f"{own}")
        back = {n: tuple(t.shape) for n, t in self.write(self.parts, made).items()}
        for name, shape in shapes.items():
            if back.get(name) != shape and name not in self.ignored:
                ways = "tensors that transformers writes by the names by which it reads them"
                raise InputError("checkpoint", name, ways)

    def _converted(self, state: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[Part]:
        loading = library("transformers.core_model_loading", "hf")
        mapping = library("transformers.conversion_mapping", "hf")
        model: Any = self.model
        rules = mapping.get_model_conversion_mapping(model)
        renamings = [r for r in rules if isinstance(r, loading.WeightRenaming)]
        converters = [r for r in rules if isinstance(r, loading.WeightConverter)]
        self._rules = {pattern: r for r in converters for pattern in r.source_patterns}
        together: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(stored, key=loading.dot_natural_key):
            own, pattern = loading.rename_source_key(
                name, renamings, converters, model.base_model_prefix, state
            )
            if own not in state and name in state:
                own, pattern = name, None
            if own not in state and ignored(model, own):
                self.ignored += (name,)
                continue
            require(own in state, "checkpoint", name, "tensors that the model has")
            together.setdefault(own, []).append((name, pattern))
        model._weight_conversions = [rule for rule in rules if rule.was_used()]  # to be reverted
        parts = []
        for own, listed in together.items():
            names = tuple(name for name, _ in listed)
            patterns = tuple(pattern for _, pattern in listed if pattern is not None)
            one_way = len(patterns) == len(names) or len(names) == 1
            require(one_way, "checkpoint", ", ".join(names), f"one of them, for {own}")
            part = Part(names, (own,), patterns)
            if patterns:
                part = self._with_names(part, stored)
            parts.append(part)
        return parts

    def _with_names(self, part: Part, stored: Mapping[str, Tensor]) -> Part:
        """A part with the names of all tensors that are made of it."""
        try:
            return Part(part.stored, tuple(self._convert(part, stored)), part.patterns)
        except (RuntimeError, ValueError, TypeError) as error:
            given = described(
                f"{len(part.stored)} tensors, {part.stored[0]} first, that do not fit"
            )
            accepted = f"those that transformers makes it of ({error})"
            raise InputError(f"checkpoint {part.own[0]}", given, accepted) from None

    def _convert(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rule = copy.deepcopy(self._rules[part.patterns[0]])
        for name, pattern in zip(part.stored, part.patterns, strict=True):
            rule.add_tensor(part.own[0], name, pattern, tensors[name])
        model: Any = self.model
        made = rule.convert(part.own[0], model=model, config=model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    def read(self, parts: Iterable[Part], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model from stored ones."""
        made: dict[str, Tensor] = {}
        for part in parts:
            if part.patterns:
                made |= self._convert(part, tensors)
            else:
                made[part.own[0]] = tensors[part.stored[0]]
        return made

    def write(self, parts: Iterable[Part], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors from those of the model."""
        made: dict[str, Tensor] = {}
        converted: dict[str, Tensor] = {}
        for part in parts:
            if part.patterns:
                converted |= {n: tensors[n] for n in part.own}
            else:
                made[part.stored[0]] = tensors[part.own[0]]
        if converted:
            loading = library("transformers.core_model_loading", "hf")
            made |= loading.revert_weight_conversion(self.model, converted)
        return made


def ignored(model: Any, name: str) -> bool:
    """Whether transformers passes over a tensor in the files that the model does not have."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    # buffers that once were stored
    return any(re.search(p, name) for p in (*patterns, r"rotary_emb\.inv_freq", r"position_ids$"))
