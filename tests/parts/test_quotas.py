"""Quotas: the card's numbers, a generic solver, the KKT conditions, and exact totals."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from secateurs.errors import InputError
from secateurs.parts.quotas import box_quotas, project_on_box, quota_floor

SIZES = (1000, 400, 50, 550)
COMPLEXITY = np.array([0.10, 0.20, 0.40, 0.30]) * np.array([0.2, 0.3, 0.5, 0.4])


def shares(temperature):
    weights = np.exp(COMPLEXITY / temperature)
    return weights / weights.sum()


def test_the_worked_example():
    assert shares(0.1) == pytest.approx([0.0888, 0.1325, 0.5373, 0.2414], abs=5e-5)
    for temperature, wanted in (
        (0.1, (144.08, 170.28, 50, 235.64)),
        (0.5, (170.47, 181.02, 50, 198.51)),
    ):
        found = project_on_box(shares(temperature) * 600, [1] * 4, SIZES, 600)
        assert found == pytest.approx(wanted, abs=0.005)
        quotas = box_quotas(shares(temperature), SIZES, 600)
        assert quotas.sum() == 600
        assert np.abs(quotas - found).max() < 1


@st.composite
def instances(draw, largest=30):
    groups = draw(st.integers(1, largest))
    sizes = draw(st.lists(st.integers(0, 40), min_size=groups, max_size=groups))
    low = [min(s, draw(st.integers(0, 3))) for s in sizes]
    weight = st.one_of(st.just(0.0), st.floats(1e-6, 1), st.floats(1, 1e4))
    weights = draw(st.lists(weight, min_size=groups, max_size=groups))
    assume(sum(weights) > 0)
    total = draw(st.integers(sum(low), sum(sizes)))
    return np.array(weights), np.array(sizes), np.array(low), total


@given(instances())
@settings(max_examples=100, deadline=None)
def test_the_projection_meets_its_kkt_conditions(instance):
    """One multiplier for all strictly inside; those at a bound would go beyond it."""
    weights, sizes, low, total = instance
    target = weights / weights.sum() * total
    x = project_on_box(target, low, sizes, total)
    near = 1e-9 * max(total, 1)
    assert abs(x.sum() - total) <= near
    assert np.all((low <= x) & (x <= sizes))
    nu = x - target
    free = (x > low + near) & (x < sizes - near)
    at_low, at_high = (x <= low + near) & (sizes > low), (x >= sizes - near) & (sizes > low)
    if free.any():
        one = nu[free].mean()
        assert np.ptp(nu[free]) <= near
        assert np.all(nu[at_low & ~free] >= one - near)
        assert np.all(nu[at_high & ~free] <= one + near)
    elif at_low.any() and at_high.any():
        assert nu[at_high].max() <= nu[at_low].min() + near


@given(instances(largest=8))
@settings(max_examples=25, deadline=None)
def test_a_generic_solver_finds_nothing_better(instance):
    weights, sizes, low, total = instance
    target = weights / weights.sum() * total
    x = project_on_box(target, low, sizes, total)
    scale = max(float(sizes.sum()), 1.0)
    solved = minimize(
        lambda z: 0.5 * np.sum((z - target / scale) ** 2),
        np.clip(target, low, sizes) / scale,
        jac=lambda z: z - target / scale,
        bounds=list(zip(low / scale, sizes / scale, strict=True)),
        constraints={"type": "eq", "fun": lambda z: z.sum() - total / scale,
                     "jac": lambda z: np.ones_like(z)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assume(solved.success)
    assert x / scale == pytest.approx(solved.x, abs=1e-4)
    assert np.sum((x - target) ** 2) <= np.sum((solved.x * scale - target) ** 2) + 1e-6 * scale**2


@given(instances())
@settings(max_examples=100, deadline=None)
def test_quotas_are_whole_feasible_and_sum_to_the_total(instance):
    weights, sizes, low, total = instance
    quotas = box_quotas(weights, sizes, total, low)
    assert quotas.sum() == total
    assert np.all((low <= quotas) & (quotas <= sizes))
    exact = project_on_box(weights / weights.sum() * total, low, sizes, total)
    assert np.abs(quotas - exact).max() < 1 + 1e-6


def test_the_ends():
    sizes = [5, 0, 3, 2]
    assert box_quotas([1, 1, 1, 1], sizes, 10).tolist() == sizes
    assert box_quotas([9, 1, 1, 1], sizes, 3).tolist() == [1, 0, 1, 1]
    # fractional parts alike: the smaller index first
    assert box_quotas([1, 1, 1], [9, 9, 9], 10).tolist() == [4, 3, 3]
    assert box_quotas([1, 1, 1], [3, 9, 9], 10).tolist() == [3, 4, 3]


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="total: got 11; accepted: 3 to 10"):
        box_quotas([1, 1, 1], [5, 3, 2], 11)
    with pytest.raises(InputError, match="total: got 2; accepted: 3 to 10"):
        box_quotas([1, 1, 1], [5, 3, 2], 2)
    with pytest.raises(InputError, match="weights"):
        box_quotas([0, 0], [5, 3], 2)
    with pytest.raises(InputError, match="weights"):
        box_quotas([1, -1], [5, 3], 2)
    with pytest.raises(InputError, match="target"):
        project_on_box([float("nan")], [0], [1], 1)
    with pytest.raises(InputError, match="low"):
        project_on_box([1.0], [2], [1], 1)


def test_a_share_counts_as_it_is_written():
    assert int(0.57 * 100) == 56
    for percent in range(101):
        assert quota_floor(percent / 100, 100, 1) == percent
        assert quota_floor(percent / 100, 1000, 7) == percent * 10 // 7
    assert quota_floor(0.5, 7, 2) == 1
