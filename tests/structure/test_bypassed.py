"""A layer beside its bypass: shortened, saved, and found in a graph."""

import copy

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.outcome import Outcome
from secateurs.structure.bypassed import Bypassed
from secateurs.structure.layers import (
    consumers,
    grouped,
    is_projection,
    is_stem,
    scale_behind,
    weighted_layers,
)
from secateurs.structure.substitution import substitute
from secateurs.zoo.resnets import cifar_resnet

LAYERS = [
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 5, 5)),
    (lambda: nn.Conv1d(4, 6, 3, bias=False), (4, 7)),
    (lambda: nn.Linear(4, 6), (3, 4)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_what_is_left_of_the_layer_is_added_to_its_own_units(make, shape):
    layer = Bypassed(make().double())
    x = torch.randn(2, *shape, dtype=torch.float64)
    whole, around = layer(x), layer.bypass(x)
    dimension = layer.dimension
    kept = [1, 4, 5]
    expected = around.clone()
    index = torch.tensor(kept)
    expected.index_copy_(dimension, index, whole.index_select(dimension, index))
    cut = layer.shorten_(kept)
    assert cut["main.weight"] == {"0": kept}
    torch.testing.assert_close(layer(x), expected)
    again = layer.shorten_([0, 2])  # of what was left
    assert again["main.weight"] == {"0": [0, 2]}
    assert layer.kept.tolist() == [1, 5]
    main = layer.main
    assert main.weight.shape[0] == getattr(main, "out_features", getattr(main, "out_channels", 0))


def test_it_is_saved_and_loaded(tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2))

    model = make().eval()
    layers = {"0": Bypassed(model[0]), "2": Bypassed(model[2])}
    layers["0"].shorten_([7, 2])
    layers["2"].shorten_([3])
    outcome = Outcome(model)
    outcome.surgery.append(substitute(model, layers))
    sc.save(outcome, tmp_path / "out")
    x = torch.randn(2, 3, 9, 9)
    again = sc.load(tmp_path / "out", make).model
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_layers_and_their_places():
    torch.manual_seed(0)
    model = cifar_resnet((3, 8, 8), 10, 0.5, depth=8)
    structure = sc.axes(model, torch.randn(1, 3, 8, 8))
    found = structure.trace
    layers = weighted_layers(found)
    assert next(iter(layers)) == "conv"
    assert len(layers) == 10
    assert [p for p, n in layers.items() if is_stem(found, n)] == ["conv"]
    shortcuts = [p for p, n in layers.items() if is_projection(n)]
    assert shortcuts == ["stages.1.0.shortcut.0", "stages.2.0.shortcut.0"]
    assert scale_behind(found, layers["conv"]) == "norm.weight"
    assert scale_behind(found, layers["classifier"]) is None
    stream = consumers(structure, structure["stages.2.0.conv2"])
    assert set(stream) == {"classifier"}
    first = consumers(structure, structure["conv"])
    assert set(first) == {"stages.0.0.conv1", "stages.1.0.conv1", "stages.1.0.shortcut.0"}
    assert first["stages.0.0.conv1"].tolist() == list(range(8))


class Bottleneck(nn.Module):
    """1x1, depthwise, 1x1 beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.up = nn.Conv2d(4, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.down(self.deep(self.up(x)).relu())).flatten(1))


def test_a_bottleneck_has_no_projection_and_a_flattened_unit_has_several_inputs():
    structure = sc.axes(Bottleneck(), torch.randn(1, 1, 4, 4))
    layers = weighted_layers(structure.trace)
    assert not any(is_projection(n) for n in layers.values())
    assert [p for p, n in layers.items() if grouped(n)] == ["deep"]
    stream = consumers(structure, structure["stem"])
    assert stream["head"].tolist() == [u for u in range(4) for _ in range(16)]
    inner = consumers(structure, structure["up"])
    assert set(inner) == {"down"}


def test_layers_that_run_twice_or_share_weights_are_left_out():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))
            self.three.weight = self.two.weight

        def forward(self, x):
            return self.three(self.two(self.one(self.one(x))))

    assert weighted_layers(sc.axes(Twice(), torch.randn(1, 4)).trace) == {}
