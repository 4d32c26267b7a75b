"""The networks: their sizes in closed form, any input size, widths, options, what is refused."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from secateurs.errors import InputError
from secateurs.parts.costs import count_macs
from secateurs.parts.prunable import prunable_parameters
from secateurs.zoo.networks import find_network, make_network, networks

IMAGES = [name for name, found in networks().items() if found.kind == "classification"]


def weights(model):
    return sum(p.numel() for p in prunable_parameters(model).values())


def linear(*sizes):
    return sum(a * b for a, b in pairwise(sizes))


def convs(*channels):
    return 9 * linear(*channels)


def residual(n):
    """CIFAR ResNet of depth 6n + 2, with 1x1 shortcuts at the two changes of width."""
    stages = (2 * n) * 9 * 16**2 + sum(
        9 * a * b + (2 * n - 1) * 9 * b * b + a * b for a, b in ((16, 32), (32, 64))
    )
    return 9 * 3 * 16 + stages + 64 * 10


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("lenet-300-100", {}, 266_200),
        ("mlp", {"inputs": (1, 14, 14), "hidden": (300, 100)}, linear(196, 300, 100, 10)),
        ("convnet", {}, convs(1, 32, 64, 64) + 640),
        ("conv-2", {}, convs(3, 64, 64) + linear(64 * 16 * 16, 256, 256, 10)),
        ("conv-4", {}, convs(3, 64, 64, 128, 128) + linear(128 * 8 * 8, 256, 256, 10)),
        (
            "conv-6",
            {},
            convs(3, 64, 64, 128, 128, 256, 256) + linear(256 * 4 * 4, 256, 256, 10),
        ),
        ("resnet-20", {}, 270_896),
        ("resnet-8", {}, residual(1)),
        ("resnet-32", {}, residual(5)),
        ("resnet-56", {}, residual(9)),
        ("resnet-110", {}, residual(18)),
        ("vgg-19", {}, 20_018_880 + 5_120),
        ("char-transformer", {}, 4 * (4 * 64**2 + 2 * 64 * 256) + 64 * 256),
        ("vit-tiny", {}, 4 * 48 + 4 * (4 * 48**2 + 2 * 48 * 192) + 480),
    ],
)
def test_weights_are_as_many_as_the_shapes_say(name, options, expected):
    assert weights(make_network(name, **options)) == expected


def test_resnet_20_is_the_one_of_the_card():
    assert residual(3) == 270_896
    parameters = prunable_parameters(make_network("resnet-20"))
    pointwise = [tuple(p.shape) for p in parameters.values() if p.shape[2:] == (1, 1)]
    assert pointwise == [(32, 16, 1, 1), (64, 32, 1, 1)]


@pytest.mark.parametrize(("name", "macs"), [("vgg-16", 313_196_544), ("vgg-16-a", 206_143_488)])
def test_vgg_convolutions_cost_what_the_card_says(name, macs):
    counted = count_macs(make_network(name), torch.zeros(1, 3, 32, 32))
    classifier = counted.pop("classifier")
    assert sum(counted.values()) == macs
    assert classifier in (512 * 10, 256 * 10)


def test_vgg_16_a_has_64_percent_fewer_parameters():
    dense, thin = (
        sum(p.numel() for p in make_network(name).parameters()) for name in ("vgg-16", "vgg-16-a")
    )
    assert 1 - thin / dense == pytest.approx(0.643, abs=5e-4)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("inputs", [(1, 8, 8), (3, 28, 28)])
def test_images_of_any_size(name, inputs):
    model = make_network(name, inputs=inputs, classes=7, width=0.25).eval()
    assert model(torch.randn(2, *inputs)).shape == (2, 7)


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in ("mlp", "lenet-300-100")])
def test_a_network_takes_images_of_another_size_than_it_was_built_for(name):
    model = make_network(name, inputs=(1, 16, 16), classes=3, width=0.25).eval()
    assert model(torch.randn(2, 1, 28, 20)).shape == (2, 3)


@pytest.mark.parametrize("name", networks())
def test_width_scales_the_hidden_layers_and_nothing_else(name):
    thin, wide = (dict(make_network(name, width=w).named_parameters()) for w in (0.5, 1.0))
    assert list(thin) == list(wide)
    classes = find_network(name).classes
    head = "lm_head.weight" if name == "llama" else "classifier.weight"
    assert thin[head].shape[0] == wide[head].shape[0] == classes
    assert 2 * thin[head].shape[1] == wide[head].shape[1]
    ratio = sum(p.numel() for p in thin.values()) / sum(p.numel() for p in wide.values())
    assert 0.2 < ratio < 0.6


@pytest.mark.parametrize("name", IMAGES)
def test_the_smallest_width_leaves_one_unit_a_layer(name):
    model = make_network(name, inputs=(1, 8, 8), width=1e-6).eval()
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_tokens_in_logits_out_and_no_look_ahead():
    model = make_network("char-transformer", inputs=(16,), classes=11).eval()
    tokens = torch.randint(11, (2, 12))
    before = model(tokens)
    assert before.shape == (2, 12, 11)
    tokens[:, 8:] = 0
    torch.testing.assert_close(model(tokens)[:, :8], before[:, :8])


@pytest.mark.parametrize("name", ["mlp", "convnet", "vit-tiny"])
def test_the_global_seed_decides_the_weights(name):
    def state(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in make_network(name).parameters()])

    assert torch.equal(state(0), state(0))
    assert not torch.equal(state(0), state(1))


@pytest.mark.parametrize(
    ("init", "deviation"),
    [("kaiming-normal", (2 / 784) ** 0.5), ("glorot-normal", (2 / (784 + 300)) ** 0.5)],
)
def test_initialisation_has_the_deviation_of_its_formula(init, deviation):
    layer = make_network("lenet-300-100", init=init).features.fc1
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert not layer.bias.any()


def test_convolutions_count_the_kernel_in_their_fan():
    conv = make_network("convnet", width=4).features[2].conv
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_options_come_as_values_or_as_texts():
    shapes = [
        [tuple(p.shape) for p in make_network("mlp", hidden=hidden, batch_norm=norm).parameters()]
        for hidden, norm in (((20, 10), True), ("20,10", "true"))
    ]
    assert shapes[0] == shapes[1]
    vgg = make_network("vgg-11", config="4,M,8", classes=2)
    assert [m.out_channels for m in vgg.modules() if isinstance(m, nn.Conv2d)] == [4, 8]


def test_an_mlp_without_hidden_layers_is_linear_and_takes_plain_features():
    model = make_network("mlp", inputs=(5,), classes=2, hidden=())
    assert weights(model) == 10
    assert model(torch.zeros(3, 5)).shape == (3, 2)


def test_listing_by_wildcard():
    assert list(networks("vgg-*")) == ["vgg-11", "vgg-16", "vgg-16-a", "vgg-19"]
    assert networks("nothing*") == {}
    assert find_network("resnet-56").options == {"depth": 56}
    assert all(found.summary.endswith((".", ":")) or found.summary for found in networks().values())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convnt", {}, "did you mean 'convnet'"),
        ("mlp", {"hiden": 3}, "did you mean 'hidden'"),
        ("mlp", {"hidden": "20,ten"}, "hidden of mlp: got '20,ten'"),
        ("mlp", {"hidden": (0,)}, "hidden: got"),
        ("mlp", {"init": "kaiming"}, "did you mean 'kaiming-normal'"),
        ("convnet", {"width": 0.0}, "width: got 0.0"),
        ("convnet", {"classes": 0}, "classes: got 0"),
        ("convnet", {"inputs": (8, 8)}, "inputs: got (8, 8)"),
        ("convnet", {"inputs": (1, 0, 8)}, "inputs: got (1, 0, 8)"),
        ("char-transformer", {"inputs": (1, 8, 8)}, "inputs: got (1, 8, 8)"),
        ("vgg-11", {"config": (8, "N")}, "config: got"),
        ("vgg-11", {"config": ("M",)}, "config: got"),
        ("resnet-20", {"depth": 21}, "depth: got 21"),
        ("conv-2", {"pairs": 4}, "pairs: got 4"),
        ("vit-tiny", {"dim": 50}, "dim: got 50"),
        ("vit-tiny", {"depth": 0}, "depth: got 0"),
        ("vit-tiny", {"inputs": (1, 9, 9)}, "patch: got 2"),
    ],
)
def test_refuses(name, arguments, message):
    with pytest.raises(InputError) as refusal:
        make_network(name, **arguments)
    assert message in str(refusal.value)
