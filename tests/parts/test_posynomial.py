"""Costs as polynomials: values, gradients, convexity in the logarithm."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.posynomial import Posynomial

COST = Posynomial.of_terms({(): 7.0, (0,): 2.0, (0, 1): 3.0, (1, 1): 5.0}, 2)


def written(x, y):
    return 7 + 2 * x + 3 * x * y + 5 * y * y


def test_it_is_the_sum_of_its_terms_for_arrays_and_tensors():
    assert COST.at(np.array([4, 6])) == written(4, 6)
    x = torch.tensor([4.0, 6.0], dtype=torch.float64, requires_grad=True)
    COST(x).backward()
    assert x.grad.tolist() == [2 + 3 * 6, 3 * 4 + 10 * 6]
    assert COST.scaled(np.array([2.0, 3.0])).at(np.array([2.0, 2.0])) == written(4, 6)


def test_a_gradient_at_zero_is_finite():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    COST(x).backward()
    assert x.grad.tolist() == [2, 0]


points = st.tuples(*[st.floats(-3, 3)] * 2).map(np.array)


@given(points, points, st.floats(0, 1))
def test_its_logarithm_is_convex_with_that_gradient(u, v, share):
    (left, slope), (right, _) = COST.log_at(u), COST.log_at(v)
    assert left == pytest.approx(np.log(written(*np.exp(u))))
    middle, _ = COST.log_at(share * u + (1 - share) * v)
    assert middle <= share * left + (1 - share) * right + 1e-9
    assert right >= left + slope @ (v - u) - 1e-9


def test_large_exponents_do_not_overflow():
    value, slope = COST.log_at(np.array([800.0, 800.0]))
    assert value == pytest.approx(1600 + np.log(8))
    assert slope.sum() == pytest.approx(2)


@pytest.mark.parametrize("terms", [{}, {(0,): 0.0}, {(0,): -1.0}, {(0,): float("nan")}])
def test_what_is_no_cost_is_refused(terms):
    with pytest.raises(InputError, match="term"):
        Posynomial.of_terms(terms, 1)
