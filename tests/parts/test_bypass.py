"""Bypasses: their cost, their shapes, what they refuse."""

import pytest
import torch
from torch import nn

from secateurs.errors import InputError
from secateurs.parts.bypass import Bypass, GroupedLinear, bypass_groups, bypass_weights
from secateurs.parts.costs import measure_cost

LAYERS = [
    (nn.Conv2d(32, 32, 3, padding=1), (32, 6, 6)),
    (nn.Conv2d(6, 8, 3, stride=2, padding=1), (6, 7, 7)),
    (nn.Conv2d(4, 6, (1, 3), padding=(0, 2), dilation=(1, 2)), (4, 5, 5)),
    (nn.Conv2d(4, 12, 1, stride=2), (4, 6, 6)),
    (nn.Conv1d(5, 7, 3), (5, 9)),
    (nn.Conv3d(2, 4, 3, padding=1), (2, 3, 4, 5)),
    (nn.Linear(24, 16), (24,)),
    (nn.Linear(24, 16), (3, 24)),
]


def test_the_cost_of_the_card():
    layer = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    assert bypass_groups(32, 32) == 8
    assert bypass_weights(layer) == 288 + 128
    assert bypass_weights(layer) / layer.weight.numel() == pytest.approx(0.045, abs=1e-3)


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_it_gives_what_the_layer_gives_at_the_counted_cost(layer, shape):
    x = torch.randn(2, *shape)
    bypass = Bypass(layer)
    assert bypass(x).shape == layer(x).shape
    assert sum(p.numel() for p in bypass.parameters()) == bypass_weights(layer)
    one = measure_cost(nn.Sequential(bypass), x[:1]).macs
    positions = measure_cost(nn.Sequential(layer), x[:1]).macs // layer.weight.numel()
    assert one == bypass_weights(layer) * positions


def test_a_grouped_linear_layer_is_block_diagonal():
    layer = GroupedLinear(6, 4, 2, dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    whole = torch.block_diag(*layer.weight.detach())
    torch.testing.assert_close(layer(x), x @ whole.T)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(3), nn.GRU(2, 2)])
def test_other_layers_are_refused(layer):
    with pytest.raises(InputError, match="a convolution without groups, or a linear layer"):
        Bypass(layer)
