"""Which parameters may be pruned: weights of the right layers, each once, and finite."""

import pytest
import torch
from torch import nn

from secateurs.errors import InputError
from secateurs.parts.prunable import (
    check_finite,
    fixed_parameters,
    matches_any,
    prunable_parameters,
    sizes,
)


class Zoo(nn.Module):
    """One layer of every kind that matters here."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.conv = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose1d(4, 4, 2)
        self.norm = nn.BatchNorm2d(8)
        self.layer_norm = nn.LayerNorm([4, 4])
        self.slope = nn.PReLU()
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 5, proj_size=2)
        self.pair = nn.Bilinear(2, 3, 4)
        self.head = nn.Linear(8, 10)


def test_lists_the_weights_of_the_right_layers_in_order():
    assert list(prunable_parameters(Zoo())) == [
        "conv.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "lstm.weight_hr_l0",
        "pair.weight",
        "head.weight",
    ]


def test_hands_out_the_parameters_themselves():
    model = Zoo()
    assert prunable_parameters(model)["head.weight"] is model.head.weight


def test_a_model_that_is_one_layer():
    assert list(prunable_parameters(nn.Linear(3, 2))) == ["weight"]


def test_a_shared_weight_is_listed_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert list(prunable_parameters(model)) == ["0.weight"]
    assert fixed_parameters(model, prunable_parameters(model)) == 8


def test_a_weight_shared_with_an_embedding_is_left_out_unless_asked_for():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7))
    model[2].weight = model[0].weight
    assert list(prunable_parameters(model)) == ["1.weight"]
    assert list(prunable_parameters(model, include=[r"^2\."])) == ["2.weight"]


def test_the_transposed_linear_layers_of_transformers_count():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))
            self.bias = nn.Parameter(torch.ones(4))

    assert list(prunable_parameters(nn.Sequential(Conv1D()))) == ["0.weight"]


def test_include_and_exclude_filter_by_regular_expression():
    model = Zoo()
    assert list(prunable_parameters(model, include=["conv", "head"], exclude=["^conv"])) == [
        "head.weight"
    ]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_without_a_match_is_refused(argument):
    with pytest.raises(InputError, match=r"'haed'; accepted: .*head\.weight") as caught:
        prunable_parameters(Zoo(), **{argument: ["haed"]})
    assert caught.value.argument == argument


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(InputError, match="a regular expression"):
        matches_any("head.weight", ["("])


@pytest.mark.parametrize(
    "build",
    [
        lambda: prunable_parameters(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())),
        lambda: prunable_parameters(nn.Linear(2, 2), exclude=["weight"]),
    ],
)
def test_nothing_to_prune_is_refused(build):
    with pytest.raises(InputError, match="with nothing to prune"):
        build()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([float("nan"), 1.0], "NaN"),
        ([float("inf"), 1.0], "Inf"),
        ([float("inf"), -float("inf")], "Inf"),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_layer(values, kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, :2] = torch.tensor(values)
    with pytest.raises(InputError, match=f"1.weight: got {kind} in the weights"):
        prunable_parameters(model)


def test_a_sum_that_overflows_is_not_mistaken_for_infinity():
    check_finite({"big": torch.full((4,), torch.finfo(torch.float32).max)})


def test_sizes_and_fixed_parameters_add_up():
    model = Zoo()
    params = prunable_parameters(model)
    everything = sum(p.numel() for p in model.parameters())
    assert sum(sizes(params).values()) + fixed_parameters(model, params) == everything
