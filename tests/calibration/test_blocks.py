"""Blocks are found from the tree, whatever the model is called."""

import pytest
import torch
from torch import nn

from secateurs.calibration.blocks import find_blocks, owner_of

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, num_layers=2))


def albert():
    from transformers import AlbertConfig, AlbertModel

    return AlbertModel(AlbertConfig(**SMALL, embedding_size=16))


def clip():
    from transformers import CLIPConfig, CLIPModel

    vision = {**SMALL, "image_size": 32, "patch_size": 16, "num_hidden_layers": 2}
    vision.pop("vocab_size")
    text = {**SMALL, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision))


def timm_model(name):
    import timm

    return timm.create_model(name)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (llama, [f"model.layers.{i}" for i in range(3)]),
        (mixtral, [f"model.layers.{i}" for i in range(3)]),
        (t5, [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)]),
        (albert, ["encoder.albert_layer_groups.0.albert_layers.0"]),
        (
            clip,
            [f"text_model.encoder.layers.{i}" for i in range(3)]
            + [f"vision_model.encoder.layers.{i}" for i in range(2)],
        ),
        (lambda: timm_model("vit_tiny_patch16_224"), [f"blocks.{i}" for i in range(12)]),
        (
            lambda: timm_model("swin_tiny_patch4_window7_224"),
            [f"layers.{s}.blocks.{b}" for s, d in enumerate((2, 2, 6, 2)) for b in range(d)],
        ),
        (
            lambda: timm_model("resnet18"),
            [f"layer{s}.{b}" for s in range(1, 5) for b in range(2)],
        ),
        (
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3
            ),
            [f"layers.{i}" for i in range(3)],
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), [""]),
    ],
)
def test_blocks_are_the_stacked_layers_of_any_architecture(make, names):
    assert list(find_blocks(make())) == names


def test_a_block_that_stands_in_two_places_is_listed_once():
    layer = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    assert list(find_blocks(nn.Sequential(layer, layer, nn.Linear(4, 2)))) == ["0"]


def test_the_owner_of_a_weight_is_the_block_it_lies_in():
    blocks = find_blocks(llama())
    assert owner_of("model.layers.2.mlp.up_proj.weight", blocks) == "model.layers.2"
    assert owner_of("model.embed_tokens.weight", blocks) is None
    assert owner_of("0.weight", {"": torch.nn.Identity()}) == ""
