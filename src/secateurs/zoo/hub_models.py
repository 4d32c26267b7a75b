"""Models of transformers, by name or folder: weights from safetensors only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateurs.errors import InputError, described, require
from secateurs.zoo.datasets import Data
from secateurs.zoo.specs import check_hub_name


@dataclass(frozen=True)
class HubModel:
    """A configuration with the class that it is for.

    Attributes:
        name: on the hub, or a folder.
        config: of transformers.
        head: the model's class, or one of the Auto classes.
        dtype: of the weights.
        other_classes: the output layer is not the stored one and starts fresh.
    """

    name: str
    config: Any
    head: Any
    dtype: torch.dtype
    other_classes: bool

    def fresh(self) -> nn.Module:
        """The model with fresh weights, drawn from torch's global generator."""
        if hasattr(self.head, "from_config"):
            model: nn.Module = self.head.from_config(self.config)
        else:
            model = self.head(self.config)
        return model.to(self.dtype)

    def trained(self) -> nn.Module:
        """The model with its stored weights.

        Raises:
            InputError: they cannot be had, or are not safetensors.
        """
        try:
            model: nn.Module = self.head.from_pretrained(
                self.name,
                config=self.config,
                dtype=self.dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=self.other_classes,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise _not_available(self.name, error, "weights in safetensors") from None
        return model

    def example_inputs(self) -> Any:
        """A batch of 1: 16 tokens, or an image of the configured size.

        Raises:
            InputError: the model takes something else.
        """
        config, name = self.config, _main_input(self.config, self.head)
        if name == "input_ids":
            return torch.ones(1, 16, dtype=torch.long)
        side = getattr(config, "image_size", None)
        if name == "pixel_values" and side is not None:
            height, width = (side, side) if isinstance(side, int) else tuple(side)
            return torch.zeros(1, getattr(config, "num_channels", 3), height, width)
        raise InputError("data", None, f"a data set: {self.name} takes {name}")


def hub_model(name: str, data: Data | None, classes: int | None, dtype: torch.dtype) -> HubModel:
    """Find a model of transformers and the head that the data calls for.

    With data: a causal language model, an image classifier or a sequence classifier; without:
    what the configuration names under ``architectures``.

    Args:
        name: on the hub or in its cache, or a folder of ``save_pretrained``.
        classes: outputs of a classifier; where they are not the stored number, its output layer
            starts fresh.

    Raises:
        InputError: the model cannot be had, or has no head of that kind.
    """
    import transformers

    check_hub_name("model hf", name)
    folder = Path(name)
    if folder.is_dir():
        require((folder / "config.json").is_file(), "model", name, "a folder with config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _not_available(name, error, "a model of transformers") from None
    head = _head(config, data)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    other = False
    if classes is not None and (data is None or data.kind == "classification"):
        other = config.num_labels != classes
        config.num_labels = classes
    if data is not None and data.kind == "language":
        size = getattr(config, "vocab_size", 0)
        shown = described(f"a vocabulary of {data.classes}")
        require((data.classes or 0) <= size, f"data {data.name}", shown, f"at most {size}: {name}")
    return HubModel(name, config, head, dtype, other)


def _head(config: Any, data: Data | None) -> Any:
    import transformers

    if data is None:
        named = (config.architectures or [""])[0]
        return getattr(transformers, named, transformers.AutoModel)
    if data.kind == "language":
        kind = "CausalLM"
    elif isinstance(data.example(), Mapping):
        kind = "SequenceClassification"
    else:
        kind = "ImageClassification"
    auto = getattr(transformers, f"AutoModelFor{kind}")
    if type(config) not in auto._model_mapping:
        shown = described(f"a {config.model_type}")
        raise InputError("model", shown, f"a model with a head for {kind}, which the data needs")
    return auto


def _main_input(config: Any, head: Any) -> str:
    """Name of the argument that the model's input goes to."""
    if hasattr(head, "_model_mapping"):
        head = head._model_mapping[type(config)]
    return str(getattr(head, "main_input_name", "input_ids"))


def _not_available(name: str, error: Exception, what: str) -> InputError:
    reason = str(error).strip().partition("\n")[0]
    offline = "; the hub is not asked, HF_HUB_OFFLINE is set"
    hint = offline if os.environ.get("HF_HUB_OFFLINE") else ""
    return InputError("model", f"hf:{name}", f"{what}, on the hub or in a folder ({reason}{hint})")
