"""Costs: counts in closed form, bytes of sparse forms, and a model that stays as it was."""

import json

import pytest
import torch
from torch import nn

from secateurs.errors import InputError
from secateurs.parts.costs import (
    Cost,
    bitmask_bytes,
    count_macs,
    csr_bytes,
    dense_bytes,
    measure_cost,
    measure_latencies,
    measure_latency,
)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Flatten(), nn.Linear(8 * 6 * 6, 10)),
    )


IMAGES = torch.randn(2, 3, 6, 6)
CONV, LINEAR = 2 * 36 * 8 * 27, 2 * 288 * 10


def test_macs_of_convolutions_and_linear_layers():
    assert count_macs(network(), IMAGES) == {"0": CONV, "3.1": LINEAR}


def test_macs_of_attention_are_counted_without_the_fused_kernel():
    length, width = 5, 8
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, dropout=0.0)
    macs = count_macs(layer.eval(), torch.randn(1, length, width))
    projections = length * width * (3 * width + width)
    scores = 2 * length * length * width
    assert macs["linear1"] == macs["linear2"] == length * width * 16
    assert sum(macs.values()) == projections + scores + 2 * length * width * 16


def test_a_module_that_is_used_twice_costs_twice():
    layer = nn.Linear(4, 4)
    assert sum(count_macs(nn.Sequential(layer, layer), torch.ones(1, 4)).values()) == 32


def test_cost_without_masks():
    model = network()
    cost = measure_cost(model, IMAGES)
    parameters = 8 * 27 + 8 + 16 + 2880 + 10
    assert (cost.parameters, cost.nonzero) == (parameters, parameters)
    assert (cost.macs, cost.effective_macs) == (CONV + LINEAR, CONV + LINEAR)
    assert cost.dense_bytes == cost.sparse_bytes == 4 * (parameters + 16) + 8
    assert cost.batch == 2
    assert cost.latency is None


def masked_to(model, densities):
    masks = {}
    for name, density in densities.items():
        parameter = dict(model.named_parameters())[name]
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[: round(density * parameter.numel())] = True
        masks[name] = mask.reshape(parameter.shape)
    return masks


def test_masked_weights_cost_neither_macs_nor_parameters():
    model = network()
    masks = masked_to(model, {"0.weight": 0.25, "3.1.weight": 0.1})
    cost = measure_cost(model, IMAGES, masks)
    assert cost.macs == CONV + LINEAR
    assert cost.effective_macs == CONV // 4 + LINEAR // 10
    assert cost.parameters - cost.nonzero == 216 * 3 // 4 + 2880 * 9 // 10
    saved = 216 * 4 - bitmask_bytes(216, 54) + 2880 * 4 - bitmask_bytes(2880, 288)
    assert cost.dense_bytes - cost.sparse_bytes == saved


def test_a_model_that_is_one_layer_saves_its_masked_macs():
    layer = nn.Linear(8, 4)
    cost = measure_cost(layer, torch.ones(1, 8), masked_to(layer, {"weight": 0.5}))
    assert (cost.macs, cost.effective_macs) == (32, 16)


def test_a_mask_that_would_make_a_tensor_larger_is_not_counted():
    model = network()
    cost = measure_cost(model, IMAGES, masked_to(model, {"0.weight": 1.0}))
    assert cost.sparse_bytes == cost.dense_bytes


def test_bytes_of_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert dense_bytes(model) == 64
    assert measure_cost(model, torch.ones(1, 4)).parameters == 16


def test_equal_bytes_of_the_gmp_card():
    assert bitmask_bytes(4_210_000, 421_000) == 4 * 421_000 + 526_250 == 2_210_250


@pytest.mark.parametrize(
    ("elements", "nonzero", "width", "size"), [(9, 2, 4, 10), (8, 0, 4, 1), (16, 4, 2, 10)]
)
def test_a_bit_mask_takes_whole_bytes(elements, nonzero, width, size):
    assert bitmask_bytes(elements, nonzero, width) == size


def test_bytes_of_relative_indices():
    assert csr_bytes(1000, 5) == 4000 + 625
    assert csr_bytes(3, 4, width=2) == 6 + 2


@pytest.mark.parametrize("with_latency", [False, True])
def test_modes_weights_and_statistics_are_left_as_they_were(with_latency):
    model = network().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    measure_cost(model, IMAGES, with_latency=with_latency)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_latency_is_ordered_and_positive():
    latency = measure_latency(network(), IMAGES, warmup=1, repeats=10)
    assert 0 < latency.low <= latency.median <= latency.high
    assert latency.repeats == 10
    with pytest.raises(InputError, match="repeats"):
        measure_latency(network(), IMAGES, repeats=0)


def test_models_take_turns_while_they_are_timed():
    order = []

    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            assert not self.training
            order.append(self.name)
            return x

    one, two = Named("one"), Named("two").eval()
    latencies = measure_latencies([one, two], IMAGES, warmup=1, repeats=3)
    assert [latency.repeats for latency in latencies] == [3, 3]
    assert order == ["two", "one", "one", "two", "two", "one", "one", "two"]
    assert one.training
    assert not two.training


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"input": x}, lambda x: (x,)])
def test_inputs_of_every_form(wrap):
    layer = nn.Linear(4, 2)
    cost = measure_cost(layer, wrap(torch.ones(3, 4)))
    assert (cost.macs, cost.batch) == (24, 3)


@pytest.mark.parametrize("with_latency", [False, True])
def test_a_cost_survives_json(with_latency):
    cost = measure_cost(network(), IMAGES, with_latency=with_latency)
    assert Cost.from_dict(json.loads(json.dumps(cost.as_dict()))) == cost


class Queries(nn.Module):
    """Learned queries, viewed before the first layer sees them."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 4))
        self.layer, self.frozen = nn.Linear(4, 5), nn.Linear(5, 4).requires_grad_(False)

    def forward(self, x):
        return x + self.frozen(self.layer(self.queries.expand(len(x), -1, -1)))


def test_macs_behind_learned_queries():
    model = Queries()
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    assert count_macs(model, torch.randn(2, 3, 4)) == {"layer": 2 * 3 * 20, "frozen": 2 * 3 * 20}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == asked
