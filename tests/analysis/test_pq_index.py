"""The PQ index: closed forms, the axioms of a sparsity measure, the bound and the rule of SAP."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.analysis.pq_index import PQIMonitor, pq_index, pq_keep_bound, pq_prune_count
from secateurs.errors import InputError

NORMS = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0), (1.0, 1.2)]
vectors = st.lists(st.floats(0.01, 100), min_size=2, max_size=12)
norms = st.sampled_from(NORMS)


def index(values, p=0.5, q=1.0, **options):
    return float(pq_index(torch.tensor(values, dtype=torch.float64), p, q, **options))


@pytest.mark.parametrize(
    ("values", "p", "q", "expected", "bound"),
    [
        ([1, 1, 1, 1], 0.5, 1.0, 0.0, 4.0),
        ([1, 0, 0, 0], 0.5, 1.0, 0.75, 1.0),
        ([1, 0, 0, 0], 1.0, 2.0, 0.5, 1.0),
        ([3, 1, 0, 0], 0.5, 1.0, 0.53349, 1.866),
        ([3, 1, 0, 0], 1.0, 2.0, 0.36754, 1.6),
        ([4, 3, 2, 1], 0.5, 1.0, 0.05559, 3.778),
        ([4, 3, 2, 1], 1.0, 2.0, 0.08713, 3.333),
    ],
)
def test_worked_numbers(values, p, q, expected, bound):
    value = index(values, p, q)
    assert value == pytest.approx(expected, abs=1e-5)
    assert pq_keep_bound(value, 4, p, q) == pytest.approx(bound, abs=1e-3)
    assert pq_prune_count(value, 4, p, q) == 4 - math.ceil(bound - 1e-9)


@given(norms, st.integers(1, 50), st.integers(0, 50))
def test_equal_weights_among_zeros_are_kept_exactly(pair, nonzero, zeros):
    value = index([2.5] * nonzero + [0.0] * zeros, *pair)
    total = nonzero + zeros
    assert pq_keep_bound(value, total, *pair) == pytest.approx(nonzero)
    assert pq_prune_count(value, total, *pair, beta=1 - 1e-12) == zeros


@given(vectors, norms)
def test_it_lies_between_nothing_and_its_limit(values, pair):
    p, q = pair
    assert 0 <= index(values, p, q) <= 1 - len(values) ** (1 / q - 1 / p) + 1e-12


@given(vectors, norms, st.floats(1e-6, 1e6))
def test_scaling_and_signs_change_nothing(values, pair, scale):
    scaled = [-scale * v for v in values]
    assert index(scaled, *pair) == pytest.approx(index(values, *pair), abs=1e-9)


@given(vectors, norms)
def test_cloning_changes_nothing(values, pair):
    assert index(values + values, *pair) == pytest.approx(index(values, *pair), abs=1e-9)


@given(vectors, norms)
def test_adding_a_constant_to_all_lowers_it(values, pair):
    before = index(values, *pair)
    assert index([v + 10 for v in values], *pair) <= before
    if before > 1e-6:
        assert index([v + 10 for v in values], *pair) < before


@given(vectors, norms, st.data())
def test_taking_from_the_rich_lowers_it(values, pair, data):
    ordered = sorted(values)
    gap = ordered[-1] - ordered[0]
    moved = data.draw(st.floats(0, 0.5)) * gap
    fairer = [ordered[0] + moved, *ordered[1:-1], ordered[-1] - moved]
    assert index(fairer, *pair) <= index(values, *pair) + 1e-12
    if gap > 1 and moved > 0.1:
        assert index(fairer, *pair) < index(values, *pair)


@given(vectors, norms)
def test_one_entry_large_enough_raises_it(values, pair):
    assert index([*values[:-1], 1e6 * sum(values)], *pair) > index(values, *pair)


@given(vectors, norms, st.integers(1, 5))
def test_appending_zeros_raises_it(values, pair, zeros):
    assert index(values + [0.0] * zeros, *pair) > index(values, *pair)


@pytest.mark.parametrize(
    ("draw", "p", "q", "expected", "pruned"),
    [
        ("normal", 0.5, 1.0, 0.15279, 0.1528),
        ("normal", 1.0, 2.0, 1 - math.sqrt(2 / math.pi), 1 - 2 / math.pi),
        ("uniform", 0.5, 1.0, 1 / 9, 1 / 9),
        ("uniform", 1.0, 2.0, 0.13397, 0.25),
    ],
)
def test_a_million_draws_meet_the_closed_forms(draw, p, q, expected, pruned):
    generator = torch.Generator().manual_seed(0)
    make = torch.randn if draw == "normal" else torch.rand
    value = float(pq_index(make(10**6, generator=generator), p, q))
    assert value == pytest.approx(expected, abs=1e-3)
    assert pq_prune_count(value, 10**6, p, q) / 10**6 == pytest.approx(pruned, abs=2e-3)


def test_small_p_does_not_overflow_float32():
    """(Σ|w|^0.1)^10 overflows float32 from 8,000 normal weights on; the means do not."""
    weights = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert weights.abs().pow(0.1).sum().pow(10).isinf(), "the public code's formula"
    exact = weights.double().abs()
    expected = 1 - float(exact.pow(0.1).mean().pow(10) / exact.mean())
    assert float(pq_index(weights, 0.1, 1.0)) == pytest.approx(expected, rel=1e-9)
    tiny = float(pq_index(1e-30 * weights, 0.1, 1.0))
    assert tiny == pytest.approx(expected, rel=1e-5)


def test_it_vanishes_as_the_norms_meet():
    values = [4.0, 3.0, 2.0, 1.0]
    for gap in (1e-2, 1e-4, 1e-6, 1e-9):
        assert 0 <= index(values, 1.0, 1.0 + gap) <= 0.2 * gap


def test_only_survivors_count_zeros_among_them_included():
    weights = torch.tensor([3.0, 1.0, 0.0, 0.0, 50.0])
    mask = torch.tensor([True, True, True, True, False])
    assert float(pq_index(weights, 1.0, 2.0, mask)) == pytest.approx(index([3, 1, 0, 0], 1.0, 2.0))


@pytest.mark.parametrize("values", [[], [0.0, 0.0]])
def test_groups_without_magnitude_have_index_0(values):
    assert index(values) == 0.0
    gone = torch.zeros(3, dtype=torch.bool)
    assert index([1.0, 2.0, 3.0], mask=gone) == 0.0
    assert pq_prune_count(0.0, len(values), 0.5, 1.0) == 0


def test_along_a_dimension_every_row_is_a_vector():
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    weights[2] = 0
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[4] = False
    rows = pq_index(weights, 0.5, 1.0, mask, dim=1)
    each = [float(pq_index(w, 0.5, 1.0, m)) for w, m in zip(weights, mask, strict=True)]
    assert rows.tolist() == pytest.approx(each)
    assert rows[2] == rows[4] == 0.0


def test_the_share_that_the_removed_may_hold_shrinks_what_is_kept():
    """η = 1 at (1, 2): 2^(-2) of the bound at η = 0."""
    assert pq_keep_bound(0.3, 100, 1.0, 2.0, eta=1.0) == pytest.approx(
        0.25 * pq_keep_bound(0.3, 100, 1.0, 2.0)
    )


@given(st.integers(1, 10**6))
def test_gamma_and_beta(count):
    assert pq_prune_count(0.0, count, 0.5, 1.0) == 0
    assert pq_prune_count(0.5, count, 0.5, 1.0, gamma=1e9) in (0, count * 9 // 10)
    assert pq_prune_count(0.5, 2 * count, 0.5, 1.0, gamma=1e9) == 2 * count * 9 // 10


@pytest.mark.parametrize(("p", "q"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (2.0, 1.0)])
def test_norms_out_of_order_are_refused(p, q):
    with pytest.raises(InputError, match=r"p: got|q: got"):
        index([1.0, 2.0], p, q)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="weights: got 'NaN or Inf'"):
        index([1.0, bad])
    with pytest.raises(InputError, match="eta: got -1"):
        pq_keep_bound(0.5, 4, 0.5, 1.0, eta=-1)


def test_the_monitor_follows_all_survivors_and_each_layer():
    monitor = PQIMonitor(1.0, 2.0)
    weights = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([0.0, 0.0, 9.0])}
    masks = {"a": torch.tensor([True, True]), "b": torch.tensor([True, True, False])}
    assert monitor.record(weights, masks) == pytest.approx(0.36754, abs=1e-5)
    assert monitor.layers == [{"a": pytest.approx(index([3, 1], 1.0, 2.0)), "b": 0.0}]


@pytest.mark.parametrize(
    ("history", "phase"),
    [
        ([0.2], "regularising"),
        ([0.2, 0.1, 0.08], "regularising"),
        ([0.2, 0.1, 0.15, 0.19], "rising"),
        ([0.2, 0.1, 0.15, 0.12], "collapsing"),
        ([0.2, 0.1, 0.15, 0.05], "collapsing"),
    ],
)
def test_the_phases_of_the_curve(history, phase):
    assert PQIMonitor(history=list(history)).phase == phase
