"""Prune and regrow: the worked example of GraNet, exact counts, the best positions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.parts.regrowth import prune_and_regrow


def test_worked_example_of_the_granet_card():
    weight = torch.tensor([0.5, 0.1, 0.0, 0.0, 0.3])
    mask = torch.tensor([True, True, False, False, True])
    gradient = torch.tensor([0.0, 9.0, 1.0, 2.0, 0.0])
    new = prune_and_regrow(weight, mask, gradient, 0.34)
    assert new.tolist() == [True, True, False, True, False]
    assert weight.tolist() == pytest.approx([0.5, 0.1, 0.0, 0.0, 0.3])


def test_the_sign_of_the_gradient_does_not_matter():
    weight, mask = torch.tensor([1.0, 0.5, 0.0, 0.0]), torch.tensor([True, True, False, False])
    gradient = torch.tensor([0.0, 0.0, 1.0, -2.0])
    assert prune_and_regrow(weight, mask, gradient, 0.5).tolist() == [True, False, False, True]


cases = st.tuples(
    st.integers(1, 8), st.integers(1, 8), st.floats(0, 0.999), st.integers(0, 99), st.booleans()
)


def drawn(rows, cols, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    mask = torch.rand(rows, cols, generator=generator) < 0.5
    growth = torch.randn(rows, cols, generator=generator)
    if ties:
        weight, growth = torch.ones_like(weight), torch.ones_like(growth)
    return weight * mask, mask, growth


@given(cases)
def test_as_many_are_grown_as_are_dropped(case):
    rows, cols, rate, seed, ties = case
    weight, mask, growth = drawn(rows, cols, seed, ties)
    before = mask.clone()
    new = prune_and_regrow(weight, mask, growth, rate)
    assert new.sum() == mask.sum()
    assert new.dtype == torch.bool
    assert new is not mask
    assert torch.equal(mask, before)


@given(cases)
def test_the_smallest_go_and_the_steepest_come(case):
    rows, cols, rate, seed, _ = case
    weight, mask, growth = drawn(rows, cols, seed, ties=False)
    exchanged = math.ceil(rate * int(mask.sum()))
    alive = weight[mask].abs().sort(descending=True).values
    stay = torch.zeros_like(mask)
    if len(alive) > exchanged:
        stay = mask & (weight.abs() >= alive[len(alive) - exchanged - 1])
    order = growth.abs().masked_fill(stay, -1).reshape(-1).argsort(descending=True)
    expected = stay.reshape(-1).clone()
    expected[order[:exchanged]] = True
    new = prune_and_regrow(weight, mask, growth, rate)
    assert torch.equal(new.reshape(-1), expected)


def test_a_rate_of_zero_changes_nothing():
    weight, mask, growth = drawn(5, 5, 0, ties=False)
    assert torch.equal(prune_and_regrow(weight, mask, growth, 0.0), mask)


def test_nothing_grows_where_nothing_is_kept():
    assert not prune_and_regrow(torch.ones(3), torch.zeros(3).bool(), torch.ones(3), 0.5).any()


def test_a_kept_weight_of_zero_is_dropped_before_one_that_is_not():
    weight, mask = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([True, True, False])
    new = prune_and_regrow(weight, mask, torch.tensor([0.0, 0.0, 1.0]), 0.5)
    assert new.tolist() == [False, True, True]
