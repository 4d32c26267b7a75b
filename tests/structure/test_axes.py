"""The listing of axes: sizes, savings, roles, reasons."""

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.parts.costs import count_macs
from secateurs.structure.surgery import shorten
from secateurs.zoo.networks import make_network


class Block(nn.Module):
    """Attention with four heads of 8 over a residual stream of 16."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 3 * 32)
        self.out = nn.Linear(32, 16)
        self.heads, self.width = 4, 8
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, self.width).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, self.heads * self.width))
        return self.head(x)


def test_parameters_and_macs_are_those_of_the_model():
    model = make_network("convnet")
    inputs = torch.randn(1, 1, 8, 8)
    structure = sc.axes(model, inputs)
    assert structure.parameters() == sum(p.numel() for p in model.parameters())
    assert structure.macs() == sum(count_macs(model, inputs).values())


def test_savings_of_a_unit_are_what_its_removal_saves():
    inputs = torch.randn(1, 1, 8, 8)
    for name in [g.name for g in sc.axes(make_network("convnet"), inputs).free]:
        model = make_network("convnet")
        structure = sc.axes(model, inputs)
        group = structure[name]
        before = structure.parameters(), structure.macs()
        shorten(structure.trace, {group.axis: range(1, group.size)})
        assert sum(p.numel() for p in model.parameters()) == before[0] - group.parameters
        assert sum(count_macs(model, inputs).values()) == before[1] - group.macs


def test_granularity_is_what_a_unit_takes_of_the_tensor_that_makes_it():
    structure = sc.axes(Block(), torch.randn(2, 5, 16))
    # the 96 outputs of qkv are (query, key, value) of 4 heads of 8
    assert {g.role: g.granularity for g in structure.free} == {"head": 24, "head width": 12}


def test_parameters_on_a_free_axis_are_all_but_those_between_frozen_ones():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(torch.relu(self.a(x))) + self.c(x)

    structure = sc.axes(Net(), torch.randn(2, 4))
    assert [g.size for g in structure.free] == [6]
    assert structure.free_parameters == 6 * 4 + 6 + 3 * 6  # not the biases b and c, nor c.weight


def test_attention_has_heads_and_widths():
    structure = sc.axes(Block(), torch.randn(1, 5, 16))
    roles = {g.role: g.size for g in structure.free}
    assert roles == {"head": 4, "head width": 8}
    frozen = {g.frozen for g in structure.values()}
    assert {"an input", "an output"} <= frozen


def test_an_axis_under_a_norm_says_so():
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    [group] = sc.axes(model, torch.randn(1, 3)).free
    assert group.normalized == ("layer_norm",)
    assert ("1.weight", 0) in group.slices


def test_an_operation_without_a_rule_freezes_and_is_named():
    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.first(x)
            return self.second(y * torch.linalg.qr(y)[0].sum(1, keepdim=True))

    structure = sc.axes(Rotated(), torch.randn(3, 4))
    assert not structure.free
    assert any("qr" in name for name in structure.unruled)


def test_the_table_names_every_free_axis():
    structure = sc.axes(make_network("convnet"), torch.randn(1, 1, 8, 8))
    text = str(structure)
    assert all(g.name in text for g in structure.free)


def test_unknown_axes_are_refused_with_a_suggestion():
    structure = sc.axes(make_network("convnet"), torch.randn(1, 1, 8, 8))
    name = structure.free[0].name
    with pytest.raises(InputError, match=f"did you mean '{name}'"):
        structure[name + "x"]


def test_a_model_that_does_not_take_the_inputs_is_refused():
    with pytest.raises(InputError, match="example_inputs: got inputs on which Linear fails"):
        sc.axes(nn.Linear(3, 2), torch.randn(1, 4))
