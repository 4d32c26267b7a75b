"""Other sizes for the axes of a model, larger ones too: shapes, attributes, load."""

import copy

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.outcome import Outcome
from secateurs.parts.costs import measure_cost
from secateurs.structure.removal import remake
from secateurs.structure.surgery import resize
from secateurs.zoo.convolutional import convnet
from secateurs.zoo.resnets import cifar_resnet


def conv():
    return convnet((1, 8, 8), 10, config=(6, "M", 8))


def residual():
    return cifar_resnet((1, 8, 8), 10, 0.5, depth=8)


class Blocks(nn.Module):
    """Depthwise and grouped convolutions, a concatenation, a flattened map, layer norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.GroupNorm(2, 6)
        self.grouped = nn.Conv2d(12, 8, 3, stride=2, padding=1, groups=2)
        self.hidden = nn.Linear(32, 12)
        self.last = nn.LayerNorm(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = torch.cat([x, self.norm(self.deep(x))], 1)
        return self.head(self.last(self.hidden(self.grouped(x).relu().flatten(1))))


class HardCoded(nn.Module):
    """A size in the code: only the graph can follow."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 12), nn.Linear(12, 10)

    def forward(self, x):
        return self.two(self.one(x.flatten(1)).reshape(-1, 3, 4).relu().reshape(-1, 12))


MAKERS = [conv, residual, Blocks, HardCoded]


def counts_of(structure, factor):
    return {g.axis: max(1, int(g.size * factor)) for g in structure.free}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("factor", [2, 1.5, 0.5])
def test_all_sizes_follow_and_the_model_is_made_again_at_load(make, factor, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8)
    model = make().eval()
    structure = sc.axes(model, x)
    counts = counts_of(structure, factor)
    parameters = structure.parameters(lambda a: counts.get(a, a.size))
    macs = structure.macs(lambda a: counts.get(a, a.size))
    outcome = Outcome(model)
    remake(outcome, structure, counts)
    small = outcome.model
    assert sum(p.numel() for p in small.parameters()) == parameters
    assert measure_cost(small, x).macs == macs
    assert small(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    small(x).sum().backward()
    for name, parameter in small.named_parameters():
        with torch.no_grad():
            parameter.normal_()
        assert parameter.grad.shape == parameter.shape, name
    sc.save(outcome, tmp_path / "out")
    again = sc.load(tmp_path / "out", make).model
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
    rows = outcome.tables["axes"]
    assert [r["kept"] for r in rows] == [counts[a] for a in counts]


def test_some_axes_grow_while_others_shrink():
    model = residual().eval()
    structure = sc.axes(model, torch.randn(1, 1, 8, 8))
    counts = {g.axis: g.size + (-1) ** i * 2 for i, g in enumerate(structure.free)}
    done = resize(structure.trace, counts)
    assert done.form == "module"
    assert model.classifier.in_features == model.stages[2][0].conv2.out_channels
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)


def test_the_first_units_stay():
    model = conv().eval()
    before = copy.deepcopy(model)
    structure = sc.axes(model, torch.randn(1, 1, 8, 8))
    resize(structure.trace, {structure["features.0.conv"].axis: 4})
    assert torch.equal(model.features[0].conv.weight, before.features[0].conv.weight[:4])
    assert torch.equal(model.features[2].conv.weight, before.features[2].conv.weight[:, :4])


def test_frozen_axes_and_empty_ones_are_refused_and_nothing_happens():
    model = conv()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    structure = sc.axes(model, torch.randn(1, 1, 8, 8))
    free = structure["features.0.conv"].axis
    frozen = next(g.axis for g in structure.values() if g.frozen)
    for counts in ({free: 0}, {free: 3, frozen: frozen.size + 1}):
        with pytest.raises(InputError, match="counts"):
            resize(structure.trace, counts)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
