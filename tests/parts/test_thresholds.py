"""Masks from thresholds: the surrogate, the last unit, the way to a budget."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.posynomial import Posynomial
from secateurs.parts.thresholds import (
    counts_of,
    frozen_masks,
    projected,
    relative,
    threshold_mask,
)


@pytest.mark.parametrize(
    ("distance", "width", "slope"), [(0.0, 0.5, 0.5), (1.0, 0.5, 0.20998717), (1.0, 0.1, 4.5396e-4)]
)
def test_the_surrogate_of_the_card(distance, width, slope):
    scores = torch.tensor([1.0 + distance], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    mask = threshold_mask(scores, threshold, width)
    assert mask.tolist() == [1.0]
    mask.sum().backward()
    assert scores.grad.item() == pytest.approx(slope, rel=1e-4)
    assert threshold.grad.item() == pytest.approx(-slope, rel=1e-4)


def test_where_no_unit_passes_the_best_one_stays_without_a_gradient():
    scores = torch.tensor([0.5, 0.9, 0.7], dtype=torch.float64, requires_grad=True)
    mask = threshold_mask(scores, torch.tensor(2.0, dtype=torch.float64))
    assert mask.tolist() == [0, 1, 0]
    mask.sum().backward()
    assert scores.grad[1] == 0
    assert bool((scores.grad[[0, 2]] > 0).all())


def test_relative_norms_do_not_see_the_scale():
    norms = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(relative(norms), torch.tensor([1 / 3, 2 / 3, 2.0]))
    torch.testing.assert_close(relative(10 * norms), relative(norms))
    assert relative(torch.zeros(2)).tolist() == [0, 0]


def test_a_frozen_mask_is_never_empty():
    masks = frozen_masks([torch.tensor([-0.1, 0.0, 0.2]), torch.tensor([-3.0, -1.0])])
    assert [m.tolist() for m in masks] == [[False, True, True], [False, True]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=5), min_size=1, max_size=3),
    st.floats(0, 1),
    st.booleans(),
)
def test_projection_meets_the_budget_and_leaves_no_room(margins, share, fill):
    margins = [torch.tensor(m, dtype=torch.float64) for m in margins]
    sizes = [len(m) for m in margins]
    terms = {(i,): 3.0 + i for i in range(len(sizes))} | {(): 2.0}
    if len(sizes) > 1:
        terms[(0, 1)] = 1.0
    cost = Posynomial.of_terms(terms, len(sizes))
    least, most = cost.at(np.ones(len(sizes))), cost.at(np.array(sizes, float))
    target = least + share * (most - least)
    begun = frozen_masks(margins)
    kept = projected(begun, margins, cost, target, fill=fill)
    counts = counts_of(kept)
    assert cost.at(counts) <= target
    assert (counts >= 1).all()
    for own, margin in zip(kept, margins, strict=True):  # within a gate the order holds
        if fill and own.any() and not own.all():
            assert margin[own].min() >= margin[~own].max()
    if fill:
        for i, own in enumerate(kept):
            if not own.all():
                assert cost.at(counts + np.eye(len(counts))[i]) > target
    elif cost.at(counts_of(begun)) <= target:
        assert all(torch.equal(a, b) for a, b in zip(kept, begun, strict=True))


def test_the_smallest_margin_goes_first_against_brute_force():
    margins = [torch.tensor([0.3, 0.1, 0.2]), torch.tensor([0.05, 0.4])]
    cost = Posynomial.of_terms({(0,): 2.0, (1,): 3.0}, 2)
    kept = projected(frozen_masks(margins), margins, cost, 8.0)
    # 12 → −0.05 of the second (9) → −0.1 of the first (7); nothing fits into the 1 that is left
    assert [k.tolist() for k in kept] == [[True, False, True], [False, True]]


def test_a_width_of_nothing_is_refused():
    with pytest.raises(InputError, match="width"):
        threshold_mask(torch.ones(2), torch.tensor(0.0), 0.0)
