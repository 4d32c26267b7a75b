"""The rescaling of random survivors against sampling, closed forms and the release's own scan."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.deltas import random_masks
from secateurs.parts.rescaling import (
    Grid,
    error_bound,
    expected_square,
    least_error_q,
    mean_without,
    phi,
    row_q,
    spread,
)

TERMS = torch.tensor([0.5, -0.2, 0.1, 0.3], dtype=torch.float64)
TOTAL, SQUARES = 0.7, 0.39


def outputs(terms, p, q, masks, seed=0):
    """What `masks` random masks make of a sum of terms."""
    generator = torch.Generator().manual_seed(seed)
    values = {"c": terms.expand(masks, -1)}
    return (terms * random_masks(values, p, generator)["c"] / q).sum(1)


def test_phi():
    assert phi(0.9) == pytest.approx(0.36410, abs=5e-6)
    assert phi(0.99) == pytest.approx(0.21327, abs=5e-6)
    assert phi(0.5) == 0.5
    assert phi(0.5 + 1e-12) == pytest.approx(0.5, abs=1e-9)
    assert phi(0) == phi(1) == 0


@given(st.floats(1e-6, 1 - 1e-6))
def test_phi_is_symmetric_and_its_formula(p):
    assert phi(p) == pytest.approx(phi(1 - p), rel=1e-9)
    if abs(p - 0.5) > 1e-3:
        assert phi(p) == pytest.approx((1 - 2 * p) / math.log((1 - p) / p), rel=1e-6)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_dare_is_unbiased_with_the_variance_of_the_card(p):
    found = outputs(TERMS, p, 1 - p, 20_000)
    variance = p / (1 - p) * SQUARES
    assert abs(found.mean() - TOTAL) <= 4 * math.sqrt(variance / 20_000)
    fourth = (found - found.mean()).pow(4).mean()
    error = math.sqrt(float(fourth - variance**2) / 20_000)
    assert abs(found.var() - variance) <= 4 * error


@pytest.mark.parametrize(("p", "best"), [(0.9, 0.81633), (0.99, 0.79796)])
def test_the_least_mean_square_error(p, best):
    assert least_error_q(TOTAL, SQUARES, p) == pytest.approx(best, abs=5e-6)
    grid = [round(0.01 * k, 2) for k in range(round(100 * (1 - p)), 100)]
    kept = outputs(TERMS, p, 1.0, 1_000_000)  # of which 40,000 entries stay at p = 0.99
    empirical = {q: float((kept / q - TOTAL).square().mean()) for q in grid}
    for q in (grid[0], 0.5, best):
        expected = expected_square(TOTAL, SQUARES, p, q)
        assert float((kept / q - TOTAL).square().mean()) == pytest.approx(expected, rel=0.02)
    assert min(grid, key=lambda q: expected_square(TOTAL, SQUARES, p, q)) == round(best, 2)
    assert abs(min(empirical, key=empirical.get) - best) <= 0.02


@given(
    st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.floats(0.01, 0.99)
)  # fmt: skip
def test_no_q_below_one_minus_p_is_best(terms, p):
    total, squares = sum(terms), sum(t * t for t in terms)
    if abs(total) > 1e-3:
        best = least_error_q(total, squares, p)
        assert best >= 1 - p
        for other in (best * 0.99, best * 1.01):
            here = expected_square(total, squares, p, best)
            assert here <= expected_square(total, squares, p, other) + 1e-12


def test_the_tail_bound_holds():
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(2000, generator=generator, dtype=torch.float64) * 0.01
    found = outputs(terms, 0.9, 0.1, 5000)
    bound = error_bound(float(terms.square().sum()), 0.9)
    beyond = float(((found - terms.sum()).abs() > bound).double().mean())
    assert beyond < 0.05
    spread_of_error = math.sqrt(9 * float(terms.square().sum()))
    assert bound < 6 * spread_of_error, "a bound that says nothing"


@pytest.mark.parametrize(("p", "exact", "release"), [(0.9, 0.456, 0.139), (0.99, 0.998, 0.136)])
def test_the_analytic_rule(p, exact, release):
    assert row_q(TERMS[None], p, 0.45).item() == pytest.approx(exact, abs=1e-9)
    assert row_q(TERMS[None], p, 0.45, mode="release").item() == pytest.approx(release, abs=1e-9)


@pytest.mark.parametrize("absolute", [True, False])
def test_the_analytic_rule_is_the_least_over_the_grid(absolute):
    generator = torch.Generator().manual_seed(1)
    terms = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    scale = torch.cat([torch.linspace(-30, -1, 20), torch.linspace(0.02, 0.4, 20)]).double()
    terms = (terms + 0.5) * scale[:, None]
    p, eta = 0.9, 0.6
    grid = torch.tensor([0.1 + 0.001 * k for k in range(899)], dtype=torch.float64)
    total, squares = terms.sum(1)[:, None], terms.square().sum(1)[:, None]
    found = eta * (1 - 0.1 / grid) * total + math.log(40)
    found = found + eta**2 * phi(p) * squares / (4 * grid**2)
    expected = grid[(found.abs() if absolute else found).argmin(1)]
    assert torch.allclose(row_q(terms, p, eta, absolute=absolute), expected)
    assert (total < 0).any()
    assert expected.unique().numel() > 5


def test_outputs_without_a_say_do_not_stop_the_scan_of_the_others():
    rows = torch.cat([TERMS[None], torch.zeros(9, 4, dtype=torch.float64)])
    halted = row_q(rows, 0.9, 0.45, mode="release", stop=0.8)
    assert halted[0] == pytest.approx(0.101, abs=1e-9), "nine of ten rows tie at the second step"
    assert row_q(rows, 0.9, 0.45, mode="release", stop=1.0)[0] == pytest.approx(0.139, abs=1e-9)


def test_nothing_dropped_nothing_to_rescale():
    assert row_q(TERMS[None], 0.0, 0.45).item() == 1.0


# ---------------------------------------------------------------- the search


def counted(scores):
    """Scores in the order of asking; the last one for ever after."""
    asked = []

    def score(value):
        asked.append(value)
        return scores[min(len(asked), len(scores)) - 1]

    return score, asked


def test_the_search_stops_after_more_than_three_misses():
    score, _ = counted([1, 2, 1, 1, 1, 1, 1, 1])
    _, tried = Grid(0.1, 1.0).search(score)
    assert [row["value"] for row in tried if row["grid"] == "coarse"] == pytest.approx(
        [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]
    )
    score, _ = counted([1, 2, 1, 1, 1, 1, 1, 1])
    _, tried = Grid(0.1, 1.0, patience=0).search(score)
    assert sum(row["grid"] == "coarse" for row in tried) == 3


def test_a_tie_is_no_miss_and_the_later_value_wins():
    best, tried = Grid(0.1, 0.3).search(lambda q: 1.0)
    assert best == pytest.approx(0.3)
    assert [r["value"] for r in tried if r["grid"] == "coarse"] == pytest.approx(
        [0.1, 0.15, 0.2, 0.25, 0.3]
    )


@given(st.floats(0.02, 0.95), st.sampled_from([0.05, 0.1]))
def test_the_top_of_a_hill_is_found_to_a_fine_step(top, step):
    best, tried = Grid(0.01, 1.0, step).search(lambda q: -((q - top) ** 2))
    assert abs(best - top) <= step * 0.1 + 1e-9
    assert all(0.01 - 1e-9 <= row["value"] <= 1 + 1e-9 for row in tried)


def test_no_value_is_asked_for_twice():
    score, asked = counted([3, 2, 1, 1, 1, 1])
    Grid(0.01, 1.0).search(score)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("low", {"low": 0.0, "high": 1.0}),
        ("low", {"low": 0.5, "high": 0.4}),
        ("step", {"low": 0.1, "high": 1.0, "step": 0.0}),
        ("decay", {"low": 0.1, "high": 1.0, "decay": 1.0}),
        ("patience", {"low": 0.1, "high": 1.0, "patience": -1}),
    ],
)
def test_impossible_grids_are_refused(name, fields):
    with pytest.raises(InputError, match=name):
        Grid(**fields)


def test_the_farthest_values_are_left_out():
    values = [1.0, 2.0, 3.0, 50.0]
    assert mean_without(values, 0) == statistics.fmean(values)
    assert mean_without(values, 1) == 2.0
    assert mean_without(values, 2) == pytest.approx(2.5)
    assert values == [1.0, 2.0, 3.0, 50.0]


def test_a_bias_takes_its_weights_q_and_the_rest_the_mean():
    found = spread({"a.weight": 0.2, "b.weight": 0.4}, ["a.weight", "a.bias", "norm.bias", "emb"])
    assert found == pytest.approx({"a.weight": 0.2, "a.bias": 0.2, "norm.bias": 0.3, "emb": 0.3})


def test_bad_numbers_are_refused():
    for call in (
        lambda: phi(1.1),
        lambda: error_bound(1.0, 1.0),
        lambda: error_bound(1.0, 0.5, gamma=0.0),
        lambda: row_q(TERMS[None], 1.0, 0.5),
        lambda: least_error_q(0.0, 1.0, 0.5),
    ):
        with pytest.raises(InputError):
            call()
