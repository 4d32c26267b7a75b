"""Switches: what is off can be removed, whatever lies between the maker and the consumer."""

import copy

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.structure.residual import residual_blocks
from secateurs.structure.surgery import shorten
from secateurs.structure.switches import Target, block_switches, channel_switches, factor
from secateurs.structure.trace import trace
from secateurs.training.gates import Gated
from secateurs.zoo.resnets import cifar_resnet


class Dense(nn.Module):
    """Both convolutions are summed over together by the last one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(10), nn.Conv2d(10, 3, 3)

    def forward(self, x):
        x = self.first(x)
        x = torch.cat([x, self.second(x.relu())], 1)
        return self.last(self.norm(x).sigmoid()).mean((2, 3))


class Tokens(nn.Module):
    """Linear layers over (N, T, C); the outer width is normalised over."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)
        self.wide, self.narrow = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.norm(self.embed(x.squeeze(1)))
        return self.narrow(nn.functional.gelu(self.wide(x))).mean(1)


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 5, 1), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


MAKERS = {
    "plain": (plain, {"0": ["4"], "4": ["8"]}),
    "concatenated": (Dense, {"first": ["second", "last"], "second": ["last"]}),
    "tokens": (Tokens, {"wide": ["narrow"]}),
    "residual": (
        lambda: cifar_resnet((1, 8, 8), 3, 0.25, depth=8),
        {f"stages.{s}.0.conv1": [f"stages.{s}.0.conv2"] for s in range(3)},
    ),
}
INPUTS = torch.randn(2, 1, 8, 8, dtype=torch.float64)


def settled(make):
    torch.manual_seed(0)
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return model


@pytest.mark.parametrize("name", MAKERS)
def test_axes_are_switched_where_they_are_summed(name):
    make, wanted = MAKERS[name]
    switches = channel_switches(sc.axes(settled(make), INPUTS))
    assert {s.name: [t.path for t in s.targets] for s in switches} == wanted
    assert all(s.reads == s.name for s in switches)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_switched_off_can_be_removed(name):
    """Gated by constants against the shortened model, in float64."""
    model = settled(MAKERS[name][0])
    dense = copy.deepcopy(model)
    structure = sc.axes(model, INPUTS)
    switches = channel_switches(structure)
    gated, on = Gated(model, switches), {}
    for number, (switch, gate) in enumerate(zip(switches, gated.gates.children(), strict=True)):
        constant = torch.ones(switch.units, dtype=torch.float64)
        constant[number % 2 :: 2] = -1
        on[switch.name] = constant.gt(0).nonzero().flatten().numpy()
        nn.init.zeros_(gate.decide.weight)
        gate.decide.bias.data = 20 * constant
    wanted = gated(INPUTS)
    assert all(set(mean.tolist()) == {0, 1} for mean in gated.means().values())
    assert gated.ungated() is model
    torch.testing.assert_close(model(INPUTS), dense(INPUTS), rtol=0, atol=0)
    kept = {structure[name].axis: units for name, units in on.items()}
    small = shorten(structure.trace, kept).model
    torch.testing.assert_close(small(INPUTS), wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(wanted, dense(INPUTS))


def test_blocks_are_told_by_their_input_and_switched_at_the_end_of_their_branch():
    found = trace(settled(MAKERS["residual"][0]), INPUTS)
    first, second, _ = block_switches(found, residual_blocks(found))
    assert first.name == first.reads == "stages.0.0"
    assert [(t.path, t.side) for t in first.targets] == [("stages.0.0.norm2", "output")]
    assert (first.place, first.width, second.width, first.units) == (1, 4, 4, 1)


def test_gates_are_laid_along_the_dimension_of_their_units():
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    spread = factor(Target("", "input", 1, (-1, 0, 1, 1)), gates, 4)
    assert spread.shape == (2, 4, 1, 1)
    assert spread.flatten(1).tolist() == [[1, 1, 0, 0], [1, 0, 1, 1]]
    assert factor(Target("", "input", 2, (1, 0)), gates, 3).tolist() == [[[0, 1]], [[1, 0]]]
    assert factor(Target("", "output", 0, (0,)), gates[:, :1], 3).shape == (2, 1, 1)


def test_a_model_without_inner_channels_is_refused():
    with pytest.raises(InputError, match="axes, none of them to be gated"):
        channel_switches(sc.axes(nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4)))
