"""Roles of weights in models of several libraries, seen and by name."""

import re

import pytest
import torch
from torch import nn

from secateurs.calibration.attention import named_roles, seen_roles
from secateurs.calibration.blocks import find_blocks, owner_of
from secateurs.parts.prunable import prunable_parameters
from secateurs.zoo.models import load_model

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(8)[None]


def timm_model(name, **options):
    return pytest.importorskip("timm").create_model(name, img_size=32, patch_size=2, **options)


def swin():
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    return timm_model("swin_tiny_patch4_window7_224", **sizes), IMAGE, "qkv", "attn.proj"


def swin_v2():
    """Multiplies with its qkv itself, and computes its position bias by layers."""
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    return timm_model("swinv2_tiny_window8_256", **sizes), IMAGE, "qkv", "attn.proj"


def transformers_swin():
    tf = pytest.importorskip("transformers")
    config = tf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return tf.SwinForImageClassification(config), IMAGE, "[qkv]_proj|query|key|value", "o_proj"


def transformers_vit():
    tf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = tf.ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8)
    return tf.ViTForImageClassification(config), IMAGE, "[qkv]_proj|query|key|value", "o_proj"


def torchvision_vit():
    """Its attention is one fused call, and its output projection is never called."""
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(32, 8, 2, 2, 16, 32), IMAGE, "in_proj", "out_proj"


def torchvision_swin():
    models = pytest.importorskip("torchvision.models.swin_transformer")
    made = models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4])
    return made, IMAGE, "qkv", "attn.proj"


def llama():
    tf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=64, vocab_size=50)
    return tf.LlamaForCausalLM(config), TOKENS, "[qkv]_proj", "o_proj"


def own():
    image = torch.randn(1, 1, 8, 8)
    return load_model("zoo:vit-tiny").make(), image, "query|key|value", "attention.out"


MODELS = [
    swin, swin_v2, transformers_swin, transformers_vit, torchvision_vit, torchvision_swin,
    llama, own,
]  # fmt: skip


def inside(model):
    blocks = find_blocks(model)
    params = prunable_parameters(model)
    return {n: p for n, p in params.items() if owner_of(n, blocks) is not None}, blocks


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_what_is_seen_is_what_the_names_say(make):
    model, inputs, qkv, proj = make()
    params, blocks = inside(model)
    seen = {n: role for n, role in seen_roles(model, inputs).items() if n in params}
    assert seen == named_roles(params, blocks)
    for role, pattern in (("qkv", qkv), ("proj", proj)):
        found = [n for n in params if seen[n] == role]
        assert found == [n for n in params if re.search(pattern, n)]
        assert len(found) >= 2


def test_layers_of_a_position_network_are_bias():
    model, inputs, *_ = swin_v2()
    params, _ = inside(model)
    roles = seen_roles(model, inputs)
    assert {n for n in params if "cpb_mlp" in n} == {n for n in params if roles[n] == "bias"}
    assert sum(role == "bias" for role in roles.values()) == 8


class Nameless(nn.Module):
    """Attention without a name that says so, in float64."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(6))

    def forward(self, x):
        a, b, c, d, e, f = self.layers
        y = d((a(x) @ b(x).mT).softmax(-1) @ c(x))
        return f(torch.relu(e(x + y)))


def test_names_play_no_part_in_what_is_seen():
    model = Nameless()
    roles = seen_roles(model, torch.randn(2, 3, 8, dtype=torch.float64))
    assert list(roles.values()) == ["qkv", "qkv", "qkv", "proj", "other", "other"]


def test_a_model_without_attention_has_none_and_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)).train()
    roles = seen_roles(model, torch.randn(1, 1, 8, 8))
    assert roles == {"0.weight": "other", "2.weight": "other"}
    assert model.training
    assert seen_roles(model, torch.randn(1, 1, 8, 8)) == roles
