"""Zeros everywhere against the real removal, in float64."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from secateurs.structure.axes import Structure
from secateurs.structure.masking import exact, masked
from secateurs.structure.surgery import shorten
from secateurs.structure.trace import trace
from secateurs.zoo.networks import make_network

NETWORKS = ("convnet", "resnet-8", "conv-2", "mlp")


def scattered(name):
    torch.manual_seed(0)
    options = {"hidden": (9, 7)} if name == "mlp" else {}
    model = make_network(name, inputs=(1, 8, 8), width=0.25, **options).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def structure_of(model):
    return Structure(trace(model, torch.randn(3, 1, 8, 8, dtype=torch.float64)))


def drawn(structure, seed):
    generator = np.random.default_rng(seed)
    return {
        g.axis: np.sort(generator.permutation(g.size)[: generator.integers(1, g.size)])
        for g in structure.free
        if generator.random() < 0.7 and g.size > 1
    }


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6))
def test_zeros_give_what_the_shortened_model_gives(name, seed):
    model = scattered(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    structure = structure_of(model)
    kept = drawn(structure, seed)
    inputs = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    with masked(structure, kept), torch.no_grad():
        zeros = model(inputs)
        inside = {n: t.clone() for n, t in model.state_dict().items()}
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    small = shorten(structure.trace, kept, check=False).model
    torch.testing.assert_close(small(inputs), zeros, rtol=1e-10, atol=1e-10)
    for tensor, own in small.state_dict().items():
        if own.is_floating_point():  # norms of weights are the same, too
            assert inside[tensor].abs().sum() == pytest.approx(float(own.abs().sum()))


def test_it_puts_the_weights_back_after_an_error():
    model = scattered("convnet")
    structure = structure_of(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), masked(structure, drawn(structure, 3)):
        raise ZeroDivisionError
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_where_a_statistic_is_taken_zeros_are_not_exact():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3),
    ).double()  # fmt: skip
    structure = structure_of(model.eval())
    normed, plain = structure["0"].axis, structure["3"].axis
    assert exact([plain])
    assert not exact([normed, plain])
    inputs = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    kept = {normed: np.arange(4)}
    with masked(structure, kept), torch.no_grad():
        zeros = model(inputs)
    small = shorten(structure.trace, kept, check=False).model
    assert not torch.allclose(small(inputs), zeros, rtol=1e-3)
