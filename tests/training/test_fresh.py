"""Fresh weights for networks that changed their sizes."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.structure.surgery import resize
from secateurs.training.fresh import redraw


def make():
    """With an initialiser of its own: variance 2 / inputs, biases of 0.1, γ of 0.5."""
    model = nn.Sequential(nn.Linear(16, 200), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, 300))
    for layer in (model[0], model[3]):
        nn.init.normal_(layer.weight, 0, math.sqrt(2 / layer.in_features))
        nn.init.constant_(layer.bias, 0.1)
    nn.init.constant_(model[1].weight, 0.5)
    return model


def task_of(model):
    loader = DataLoader(TensorDataset(torch.randn(4, 16), torch.arange(4)), 4)
    return sc.classification(model, loader, loader)


def resized(size):
    model = make()
    structure = sc.axes(model, torch.randn(2, 16))
    resize(structure.trace, {structure["0"].axis: size})
    model[1].running_mean.fill_(3.0)
    return model


@pytest.mark.parametrize("size", [50, 800])
def test_the_tasks_own_rule_at_the_new_number_of_inputs(size):
    model = resized(size)
    redraw(model, task_of(make), 1)
    assert model[3].weight.std().item() == pytest.approx(math.sqrt(2 / size), rel=0.03)
    assert model[0].weight.std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.1)
    assert bool((model[0].bias == 0.1).all())
    assert bool((model[1].weight == 0.5).all())
    assert not model[1].running_mean.any()
    assert torch.equal(model[3].bias, torch.full((300,), 0.1))


@pytest.mark.parametrize("size", [50, 800])
def test_without_a_function_every_layer_draws_as_its_class_does(size):
    model = resized(size)
    redraw(model, task_of(make()), 1)
    bound = 1 / math.sqrt(size)
    assert model[3].weight.abs().max().item() == pytest.approx(bound, rel=1e-2)
    assert bool((model[1].weight == 1).all())
    assert not model[1].running_mean.any()


def test_it_is_drawn_by_its_seed_and_leaves_the_generator_alone():
    first, second, third = (resized(50) for _ in range(3))
    task = task_of(make)
    state = torch.get_rng_state()
    redraw(first, task, 1)
    redraw(second, task, 1)
    redraw(third, task, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[3].weight, second[3].weight)
    assert not torch.equal(first[3].weight, third[3].weight)


def test_a_layer_that_cannot_draw_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(InputError, match="1 of type Odd without reset_parameters"):
        redraw(nn.Sequential(nn.Linear(2, 2), Odd()), None, 0)
