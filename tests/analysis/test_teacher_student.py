"""The theory against the card's table, its limits, and perceptrons that are drawn and trained."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from secateurs.analysis.teacher_student import (
    best_keep,
    crossover,
    exponents,
    frontier,
    kept_margins,
    max_margin,
    perceptron_theory,
    pool_curve,
    simulate,
    theory_curve,
)
from secateurs.errors import InputError

TABLE = [
    (3, 1, "hard", 0.1428, 0.9010, 0.3178),
    (10, 1, "hard", 0.0492, 0.9881, 0.0999),
    (2, 0.5, "hard", 0.3210, 0.5330, 0.5650),
    (2, 0.5, "easy", 0.1818, 0.8412, 1.1965),
    (10, 0.3, "hard", 0.0511, 0.9871, 0.1003),
    (10, 0.3, "easy", 0.0696, 0.9762, 1.1976),
]


@pytest.mark.parametrize(("load", "keep", "order", "error", "overlap", "margin"), TABLE)
def test_the_table_of_the_card(load, keep, order, error, overlap, margin):
    found = perceptron_theory(load, keep, order)
    assert found.error == pytest.approx(error, abs=2e-4)
    assert found.overlap == pytest.approx(overlap, abs=2e-4)
    assert found.margin == pytest.approx(margin, abs=2e-4)


def test_random_pruning_is_less_data():
    expected = {0.5: 0.3288, 1: 0.2657, 2: 0.1885, 5: 0.0938, 20: 0.0249}
    for kept, error in expected.items():
        assert perceptron_theory(kept).error == pytest.approx(error, abs=2e-4)
        pruned = perceptron_theory(kept / 0.4, 0.4, "random")
        assert pruned.error == pytest.approx(perceptron_theory(kept).error, abs=1e-9)


@given(st.floats(0.3, 15), st.floats(0.1, 1), st.sampled_from(["hard", "easy"]))
@settings(max_examples=12, deadline=None)
def test_the_two_equations_hold_by_another_quadrature(load, keep, order):
    found = perceptron_theory(load, keep, order)
    low, high = kept_margins(keep, order)
    overlap, margin, s = found.overlap, found.margin, math.sqrt(1 - found.overlap**2)

    def integral(kernel, power):
        def value(t):
            ends = kernel((low - overlap * t) / s) - kernel((high - overlap * t) / s)
            return norm.pdf(t) * ends * (margin - t) ** power

        cuts = [c for c in (-3, -1, 0, low / max(overlap, 0.1)) if -9 < c < margin]
        return quad(value, -9, margin, points=cuts or None, limit=400)[0]

    assert 2 * load / s * integral(norm.pdf, 1) == pytest.approx(overlap, abs=1e-6)
    assert 2 * load * integral(norm.sf, 2) == pytest.approx(s**2, abs=1e-6)
    assert margin > 0


def test_kept_margins_hold_the_kept_fraction():
    for keep in (0.1, 0.5, 0.9):
        for order in ("hard", "easy"):
            low, high = kept_margins(keep, order)
            assert 2 * (norm.cdf(high) - norm.cdf(low)) == pytest.approx(keep)


def test_keeping_nearly_all_is_keeping_all():
    whole = perceptron_theory(4.0)
    for order in ("hard", "easy"):
        assert perceptron_theory(4.0, 1 - 1e-6, order).error == pytest.approx(whole.error, abs=1e-5)


def test_errors_fall_with_the_load_and_without_pruning_as_its_inverse():
    loads = [0.5, 1, 3, 10, 40, 80]
    for keep, order in ((1, "hard"), (0.4, "hard"), (0.4, "easy")):
        curve = theory_curve(loads, keep, order)
        errors = [record["error"] for record in curve]
        assert errors == sorted(errors, reverse=True)
        assert [record["kept"] for record in curve] == [keep * load for load in loads]
        assert exponents(loads, errors)[-1] == pytest.approx(1, abs=0.05)


def test_a_larger_pool_is_worth_more_than_a_power_law():
    """Kept load 3 out of pools 1 to 6 times as large, then the best pool for every load."""
    errors = [r["error"] for r in pool_curve(3, [1, 0.7, 0.5, 0.3, 0.15], "hard")]
    assert errors == pytest.approx([0.1428, 0.1078, 0.0812, 0.0511, 0.0262], abs=2e-4)
    best = frontier([1, 1.5, 2, 2.5], [0.02, 0.05, 0.1, 0.3, 1])
    steep = exponents([1, 1.5, 2, 2.5], [r["error"] for r in best])
    assert (np.diff(steep[-2:]) > 0).all()
    assert steep[-1] > 2


def test_hard_examples_win_with_much_data_and_easy_ones_with_little():
    assert 6 < crossover(0.3) < 8
    assert crossover(0.5) == pytest.approx(5, abs=0.2)
    assert best_keep(3, 0.9) == "easy"
    assert best_keep(12, 3.6) == "hard"
    keep, where = 0.3, crossover(0.3)
    for load in (where - 0.05, where + 0.05):
        hard, easy = (perceptron_theory(load, keep, order).error for order in ("hard", "easy"))
        assert (hard < easy) == (load > where)


@pytest.mark.parametrize(("load", "keep", "order"), [
    (3, 1, "hard"), (2, 0.5, "hard"), (2, 0.5, "easy"), (10, 0.3, "hard"), (10, 0.3, "easy"),
    (10, 0.3, "random"),
])  # fmt: skip
def test_perceptrons_that_are_drawn_pruned_and_trained_do_so(load, keep, order):
    errors = [simulate(load, keep, order, dimension=100, seed=s).error for s in range(8)]
    spread = np.std(errors, ddof=1) / math.sqrt(len(errors))
    theory = perceptron_theory(load, keep, order).error
    assert abs(np.mean(errors) - theory) < 2.5 * spread + 0.006


def test_a_pruner_a_little_astray_is_worse_than_one_that_knows_nothing():
    def mean(angle, keep):
        seeds = range(6)
        return np.mean([
            simulate(3 / keep, keep, angle=angle, dimension=60, seed=s).error for s in seeds
        ])  # fmt: skip

    assert mean(0.7, 1.0) == pytest.approx(mean(0.0, 1.0))
    assert mean(0.0, 0.2) + 0.05 < mean(math.pi / 2, 0.2) < mean(0.3, 0.2) - 0.03


def test_the_largest_margin_of_points_that_are_known():
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    vector, margin = max_margin(rows)
    assert vector == pytest.approx([math.sqrt(0.5)] * 2)
    assert margin == pytest.approx(math.sqrt(0.5))


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_no_other_direction_has_a_larger_margin(seed, width, count):
    draw = np.random.default_rng(seed)
    rows = draw.normal(size=(count, width))
    rows *= np.sign(rows[:, :1])
    vector, margin = max_margin(rows)
    others = np.concatenate([
        vector + 0.05 * draw.normal(size=(200, width)), draw.normal(size=(200, width))
    ])  # fmt: skip
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    assert (rows @ others.T).min(0).max() <= margin + 1e-9
    assert np.linalg.norm(vector) == pytest.approx(1)
    assert (rows @ vector).min() == pytest.approx(margin)


@pytest.mark.parametrize(("call", "told"), [
    (lambda: perceptron_theory(0), "alpha_tot"),
    (lambda: perceptron_theory(math.inf), "alpha_tot"),
    (lambda: perceptron_theory(1e8), "error is above"),
    (lambda: perceptron_theory(1, 0), "keep"),
    (lambda: perceptron_theory(1, 1.1), "keep"),
    (lambda: perceptron_theory(1, 0.5, "hardest"), "did you mean 'hard'"),
    (lambda: crossover(1.0), "no crossover"),
    (lambda: simulate(1, 0.001, dimension=10), "leaves one of 10"),
    (lambda: max_margin(np.array([[1.0, 0], [-1, 0]])), "not separable"),
])  # fmt: skip
def test_it_refuses(call, told):
    with pytest.raises(InputError, match=told):
        call()
