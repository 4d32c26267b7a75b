"""Widths under limits: closed forms, certificates, rounding against brute force."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.posynomial import Posynomial
from secateurs.parts.width_program import (
    cheapest_step,
    nearest_shares,
    solve_widths,
    spend,
    within,
)

ONES, LOW = np.ones(2), np.full(2, 1e-3)
CARD = Posynomial.of_terms({(0,): 100, (0, 1): 400, (1,): 200}, 2)


def test_the_program_of_the_card():
    found = solve_widths(np.array([2.0, 2.0]), [(CARD, 350.0)], LOW, ONES)
    assert found.factors == pytest.approx([0.914214, 0.457107], abs=1e-6)
    assert found.factors[0] == pytest.approx(2 * found.factors[1])
    assert CARD.at(found.factors) == pytest.approx(350)
    assert found.multipliers[0] > 0


def test_a_limit_that_allows_everything_changes_nothing():
    found = solve_widths(np.array([2.0, 1.0]), [(CARD, 700.0)], LOW, ONES)
    assert found.factors.tolist() == [1, 1]
    assert found.multipliers == (0.0,)


def test_the_plan_is_free_of_scale():
    one = solve_widths(np.array([2.0, 2.0]), [(CARD, 350.0)], LOW, ONES)
    seven = Posynomial(CARD.coefficients * 7, CARD.exponents)
    two = solve_widths(np.array([2.0, 2.0]), [(seven, 2450.0)], LOW, ONES)
    assert two.factors == pytest.approx(one.factors, rel=1e-7)


def test_two_limits_that_are_both_tight():
    other = Posynomial.of_terms({(0,): 1.0}, 2)
    found = solve_widths(np.array([2.0, 2.0]), [(CARD, 350.0), (other, 0.5)], LOW, ONES)
    assert found.factors == pytest.approx([0.5, (350 - 50) / 400], abs=1e-6)
    assert min(found.multipliers) > 0


def test_below_the_narrowest_widths_is_refused():
    for solve in (
        lambda: solve_widths(ONES, [(CARD, 10.0)], np.full(2, 0.5), ONES),
        lambda: nearest_shares(np.eye(2), ONES, [(CARD, 10.0)], np.full(2, 0.5), ONES),
        lambda: within([(CARD, 10.0)], np.full(2, 0.5), ONES),
    ):
        with pytest.raises(InputError, match="at least 250, the narrowest"):
            solve()


chains = st.lists(st.integers(2, 40), min_size=3, max_size=6)


def chain(sizes):
    """Weights of layers between widths, in units; the first and the last are fixed."""
    inner = len(sizes) - 2
    terms, gains = {}, np.zeros(inner)
    for place, (left, right) in enumerate(pairwise(sizes)):
        ends = tuple(v for v in (place - 1, place) if 0 <= v < inner)
        fixed = (left if place == 0 else 1) * (right if place == inner else 1)
        terms[ends] = terms.get(ends, 0) + fixed
        gains[list(ends)] += 1
    return Posynomial.of_terms(terms, inner), gains, np.array(sizes[1:-1], float)


@settings(max_examples=40, deadline=None)
@given(chains, st.floats(0.05, 1), st.floats(0.0, 0.5))
def test_it_is_never_worse_than_random_feasible_widths_and_rises_with_the_limit(sizes, share, more):
    units, gains, widths = chain(sizes)
    cost = units.scaled(widths)
    low, high = 1 / widths, np.ones(len(widths))
    least, whole = cost.at(low), cost.at(high)
    limit = least + share * (whole - least)
    found = solve_widths(gains, [(cost, limit)], low, high)
    best = gains @ np.log(found.factors)
    assert cost.at(found.factors) <= limit * (1 + 1e-9)
    assert found.gap <= 1e-4
    rng = np.random.default_rng(0)
    for _ in range(50):
        tried = np.exp(rng.uniform(np.log(low), 0))
        if cost.at(tried) <= limit:
            assert gains @ np.log(tried) <= best + 1e-6
    wider = solve_widths(gains, [(cost, limit * (1 + more))], low, high)
    assert gains @ np.log(wider.factors) >= best - 1e-6


def stepper(tops, multiple=1):
    def wider(v, width):
        following = width + multiple
        return following if following <= tops[v] else None

    return wider


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=4, max_size=5), st.floats(0.1, 1))
def test_rounded_widths_leave_less_than_a_step_and_are_a_step_from_the_best(sizes, share):
    cost, gains, widths = chain(sizes)
    low, high = 1 / widths, np.ones(len(widths))
    least = cost.at(np.ones(len(widths)))
    limit = least + share * (cost.at(widths) - least)
    factors = solve_widths(gains, [(cost.scaled(widths), limit)], low, high).factors
    start = np.maximum(1, (factors * widths + 1e-9).astype(int))
    wider = stepper(widths)
    found = spend(start, gains, [(cost, limit)], wider)
    assert (found >= start).all()
    assert cost.at(found) <= limit
    step = cheapest_step(found, cost, wider)
    assert step is None or limit - cost.at(found) < step
    ways = product(*(range(1, int(n) + 1) for n in widths))
    best = max(
        (w for w in ways if cost.at(np.array(w, float)) <= limit),
        key=lambda w: gains @ np.log(np.array(w, float)),
    )
    # what one more unit of the best bargain would bring, were there room
    largest_step = max(g * np.log1p(1 / n) for g, n in zip(gains, found, strict=True))
    assert gains @ np.log(np.array(best, float)) <= gains @ np.log(found) + largest_step + 1e-9


def test_a_depthwise_separable_block_against_brute_force():
    """Check 10: 1x1 (8 → n), depthwise 3x3 (n), 1x1 (n → m), head (m → 5)."""
    cost = Posynomial.of_terms({(0,): 8 + 9, (0, 1): 1, (1,): 5}, 2)
    gains, widths = np.array([3.0, 2.0]), np.array([24.0, 16.0])
    for limit in (120.0, 250.0, 500.0, 700.0):
        factors = solve_widths(gains, [(cost.scaled(widths), limit)], 1 / widths, ONES).factors
        start = (factors * widths + 1e-9).astype(int)
        found = spend(start, gains, [(cost, limit)], stepper(widths))
        best = max(
            gains @ np.log([a, b])
            for a, b in product(range(1, 25), range(1, 17))
            if cost.at(np.array([a, b], float)) <= limit
        )
        step = max(g * np.log1p(1 / n) for g, n in zip(gains, found, strict=True))
        assert gains @ np.log(found) >= best - step


def test_given_densities_are_met_where_they_can_be():
    """Two layers, three widths: r = (0.5, 0.8) gives p = (0.5, 0.4, 0.8)."""
    incidence = np.array([[1.0, 0], [1, 1], [0, 1]])
    cost = Posynomial.of_terms({(0,): 10, (0, 1): 10, (1,): 10}, 2)
    limit = cost.at(np.array([0.5, 0.8]))
    found = nearest_shares(incidence, np.array([0.5, 0.4, 0.8]), [(cost, limit)], LOW, ONES)
    assert found == pytest.approx([0.5, 0.8], abs=1e-3)
    twice = nearest_shares(incidence, np.array([0.05, 0.04, 0.08]), [(cost, limit)], LOW, ONES)
    assert cost.at(twice) <= limit * (1 + 1e-9)
    assert cost.at(twice) == pytest.approx(limit, rel=1e-3), "only their proportions count"


def test_factors_within_limits_are_left_and_others_brought_in():
    inside = np.array([0.5, 0.5])
    assert within([(CARD, 350.0)], LOW, inside) == pytest.approx(inside)
    brought = within([(CARD, 350.0)], LOW, ONES)
    assert CARD.at(brought) == pytest.approx(350)
