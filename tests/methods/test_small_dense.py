"""The small dense network: the widest of its family within the budget, trained from scratch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.networks.small_dense import next_size, size_at, width_for


def family(width):
    hidden = max(1, round(32 * width))
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def size_of(hidden):
    return 75 * hidden + 10


@given(st.integers(size_of(1), size_of(32)))
def test_the_width_is_the_largest_within_the_parameters(parameters):
    width = width_for(family, parameters)
    size = size_at(family, width)
    hidden = (parameters - 10) // 75
    assert size == size_of(hidden)
    if hidden < 32:
        assert next_size(family, width, size) == size_of(hidden + 1)


def test_the_whole_network_where_it_fits():
    assert width_for(family, size_of(32)) == 1.0
    assert width_for(family, 10**9) == 1.0


def test_a_budget_below_the_narrowest_is_refused_with_the_least():
    with pytest.raises(InputError, match="at least 85 parameters"):
        width_for(family, 84)


def test_sizes_are_found_without_making_weights():
    made = []

    def resize(width):
        model = family(width)
        made.append(next(model.parameters()).device.type)
        return model

    width_for(resize, 1000)
    assert set(made) == {"meta"}


@pytest.mark.parametrize("budget", ["sparsity=0.5", "sparsity=0.9", "density=0.3", "params=900"])
def test_it_has_no_more_parameters_than_the_budget_leaves(digits_task, budget):
    model = digits_task.fresh_model(0)
    total = sum(p.numel() for p in model.parameters())
    weights = total - 32 - 16 - 10
    outcome = sc.prune(model, "small-dense", budget, digits_task)
    allowed = {
        "sparsity=0.5": 58 + weights - round(0.5 * weights),
        "sparsity=0.9": 58 + weights - round(0.9 * weights),
        "density=0.3": 58 + round(0.3 * weights),
        "params=900": 900,
    }[budget]
    parameters = sum(p.numel() for p in outcome.model.parameters())
    assert parameters <= allowed
    assert outcome.after.parameters == outcome.after.nonzero == parameters
    assert outcome.promise.asked == allowed
    assert outcome.promise.kept
    assert next_size(digits_task.resize, outcome.source["width"], parameters) > allowed
    [row] = outcome.tables["the small network"]
    assert (row["parameters"], row["allowed"]) == (parameters, allowed)
    assert outcome.notes == []  # its size is a fact, not a warning


def test_no_sparsity_is_the_network_itself(digits_task):
    outcome = sc.prune(digits_task.fresh_model(0), "small-dense", "sparsity=0", digits_task)
    assert outcome.source == {"width": 1.0}
    fresh = digits_task.fresh_model(0)
    sc.fit(fresh, digits_task, digits_task.training)
    assert all(torch.equal(v, fresh.state_dict()[n]) for n, v in outcome.model.state_dict().items())


def test_it_is_a_function_of_the_seed_and_learns(digits_task):
    def weights(seed):
        model = digits_task.fresh_model(0)
        outcome = sc.prune(model, "small-dense", "sparsity=0.5", digits_task, seed=seed)
        assert outcome.metrics_after["accuracy"] > 0.5
        return outcome.model[0].weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_it_needs_a_family(digits_task):
    with pytest.raises(InputError, match=r"task\.resize: got None"):
        sc.prune(
            digits_task.fresh_model(0),
            "small-dense",
            "sparsity=0.5",
            replace(digits_task, resize=None),
        )
