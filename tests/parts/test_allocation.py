"""Allocations: the worked numbers of the papers, exact totals, and brute force."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.allocation import (
    METHODS,
    SHAPE_METHODS,
    allocate_counts,
    counts_from_densities,
    densities,
    fill_log_densities,
    kept_shares,
    lamp_scores,
    largest_by_name,
    per_tensor_masks,
    with_floor,
)

LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}
SMALL_CNN = {
    "conv1": (64, 3, 3, 3),
    "conv2": (128, 64, 3, 3),
    "conv3": (256, 128, 3, 3),
    "fc": (10, 256),
}


def resnet20():
    shapes = {"conv1": (16, 3, 3, 3)}
    for stage, (before, width) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
        for conv in range(6):
            shapes[f"{stage}.{conv}"] = (width, before if conv == 0 else width, 3, 3)
        if before != width:
            shapes[f"{stage}.shortcut"] = (width, before, 1, 1)
    return {**shapes, "fc": (10, 64)}


def total(shapes, density=None):
    return sum(math.prod(s) * (1 if density is None else density[n]) for n, s in shapes.items())


# worked numbers of the cards


@pytest.mark.parametrize(
    ("shapes", "density", "method", "expected"),
    [
        (LENET, 0.1, "erk", [0.07957, 0.23019, 1.0]),
        (LENET, 0.05, "erk", [0.03848, 0.11133, 0.91851]),
        (SMALL_CNN, 0.1, "erk", [1, 0.15074, 0.07423, 1]),
        (SMALL_CNN, 0.1, "er", [1, 0.15294, 0.07647, 0.67806]),
        (SMALL_CNN, 0.1, "erk+", [1, 0.15074, 0.07423, 1]),
    ],
)
def test_worked_numbers(shapes, density, method, expected):
    found = densities(shapes, density, method)
    assert list(found.values()) == pytest.approx(expected, abs=5e-6)
    assert total(shapes, found) == pytest.approx(density * total(shapes), rel=1e-12)


def test_erk_plus_leaves_the_rest_its_own_density():
    found = densities(SMALL_CNN, 0.1, "erk+")
    rest = {n: s for n, s in SMALL_CNN.items() if n != "fc"}
    assert total(rest, found) / total(rest) == pytest.approx(0.093779, abs=5e-7)


def test_erk_plus_with_a_sparse_last_layer():
    found = densities(SMALL_CNN, 0.1, "erk+", fc_density=0.5)
    assert found["fc"] == 0.5
    assert total(SMALL_CNN, found) == pytest.approx(0.1 * total(SMALL_CNN), rel=1e-12)


def test_erk_on_resnet20():
    shapes = resnet20()
    found = densities(shapes, 0.1, "erk")
    assert total(shapes) == 270_896
    assert found["3.3"] == pytest.approx(0.06174, abs=5e-6)
    assert found["1.3"] == pytest.approx(0.28015, abs=5e-6)
    assert found["2.shortcut"] == found["fc"] == 1


def test_uniform_plus_on_resnet20_keeps_its_budget():
    shapes = resnet20()
    found = densities(shapes, 0.1, "uniform+")
    assert found["conv1"] == 1
    assert found["fc"] == 0.2
    inner = [p for n, p in found.items() if n not in ("conv1", "fc")]
    assert inner == pytest.approx([0.098322] * len(inner), abs=5e-7)
    assert total(shapes, found) == pytest.approx(0.1 * 270_896, rel=1e-12)


def test_uniform_plus_has_no_floor_for_the_last_layer_when_dense_enough():
    found = densities(resnet20(), 0.5, "uniform+")
    assert found["fc"] == found["1.0"] < 0.5


def test_erk_keeps_weights_in_proportion_to_the_sum_of_dimensions():
    shapes = resnet20()
    found = densities(shapes, 0.05, "erk")
    ratios = [found[n] * math.prod(s) / sum(s) for n, s in shapes.items() if found[n] < 1]
    assert len(ratios) > 10
    assert max(ratios) / min(ratios) == pytest.approx(1, abs=1e-9)


def test_depthwise_convolutions_come_out_dense():
    shapes = {"depthwise": (64, 1, 3, 3), "pointwise": (256, 64, 1, 1), "fc": (1000, 256)}
    assert densities(shapes, 0.2, "erk")["depthwise"] == 1


def test_er_and_erk_are_the_same_without_kernels():
    assert densities(LENET, 0.07, "er") == pytest.approx(densities(LENET, 0.07, "erk"))


def test_a_power_of_zero_is_uniform():
    found = densities(LENET, 0.1, "erk", power=0.0)
    assert list(found.values()) == pytest.approx([0.1] * 3)


# what holds for any shapes

shape = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3)),
)
networks = st.lists(shape, min_size=1, max_size=5).map(
    lambda shapes: {f"layer{i}": s for i, s in enumerate(shapes)}
)


@given(networks, st.floats(0.001, 0.999), st.sampled_from(SHAPE_METHODS))
def test_densities_meet_the_budget_and_stay_within_one(shapes, density, method):
    try:
        found = densities(shapes, density, method)
    except InputError:
        # only a layer that must be dense can be too much
        assert method.endswith("+")
        return
    assert list(found) == list(shapes)
    assert all(0 < p <= 1 for p in found.values())
    assert total(shapes, found) == pytest.approx(density * total(shapes), rel=1e-9)


@given(networks, st.sampled_from(SHAPE_METHODS))
def test_density_one_is_dense(shapes, method):
    assert set(densities(shapes, 1, method).values()) == {1.0}


@given(networks, st.floats(0.01, 1), st.sampled_from(["uniform", "er", "erk"]), st.randoms())
def test_the_order_of_tensors_changes_no_density(shapes, density, method, random):
    names = list(shapes)
    random.shuffle(names)
    shuffled = densities({n: shapes[n] for n in names}, density, method)
    assert shuffled == pytest.approx(densities(shapes, density, method))


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_densities_outside_their_range_are_refused(density):
    with pytest.raises(InputError, match="density"):
        densities(LENET, density)


def test_dense_tensors_above_the_budget_are_refused_with_the_least_density():
    with pytest.raises(InputError) as caught:
        densities(LENET, 0.05, "erk", keep_dense=["fc2"])
    assert f"at least {30_000 / 266_200:.6g}" in str(caught.value)
    found = densities(LENET, 0.2, "erk", keep_dense=["fc2"])
    assert found["fc2"] == 1
    assert total(LENET, found) == pytest.approx(0.2 * 266_200)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="did you mean 'erk'"):
        densities(LENET, 0.1, "erkk")
    with pytest.raises(InputError, match="fc: got 'fc4'"):
        densities(LENET, 0.1, "erk+", fc="fc4")
    with pytest.raises(InputError, match="allocation: got 'globule'"):
        allocate_counts({"a": torch.ones(2, 2)}, 1, "globule")


# whole numbers of weights


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_counts_sum_to_what_is_kept(tensors, share):
    size = {f"w{i}": n for i, (n, _) in enumerate(tensors)}
    density = {f"w{i}": p for i, (_, p) in enumerate(tensors)}
    keep = round(share * sum(size.values()))
    counts = counts_from_densities(density, size, keep)
    assert sum(counts.values()) == keep
    assert all(0 <= counts[n] <= size[n] for n in size)


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1)), min_size=1, max_size=6))
def test_counts_are_within_one_weight_of_their_densities(tensors):
    size = {f"w{i}": n for i, (n, _) in enumerate(tensors)}
    density = {f"w{i}": p for i, (_, p) in enumerate(tensors)}
    keep = round(sum(density[n] * size[n] for n in size))
    counts = counts_from_densities(density, size, keep)
    assert all(abs(counts[n] - density[n] * size[n]) <= 1 + 1e-6 for n in size)


def drawn(shapes, seed, *, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {n: (4 * s).floor() for n, s in scores.items()} if ties else scores


@given(networks, st.floats(0, 1), st.sampled_from(METHODS), st.integers(0, 9), st.booleans())
def test_every_allocation_keeps_exactly_what_it_should(shapes, share, method, seed, ties):
    scores = drawn(shapes, seed, ties=ties)
    keep = round(share * total(shapes))
    try:
        counts = allocate_counts(scores, keep, method)
    except InputError:
        assert method.endswith("+")
        return
    masks = per_tensor_masks(scores, counts)
    assert sum(int(m.sum()) for m in masks.values()) == keep
    assert {n: int(m.sum()) for n, m in masks.items()} == counts


@given(
    networks,
    st.floats(0, 1),
    st.sampled_from(["global", "lamp", "uniform", "er", "erk"]),
    st.integers(0, 9),
    st.booleans(),
    st.randoms(),
)
def test_the_order_of_tensors_changes_no_mask(shapes, share, method, seed, ties, random):
    scores = drawn(shapes, seed, ties=ties)
    keep = round(share * total(shapes))
    names = list(shapes)
    random.shuffle(names)
    shuffled = {n: scores[n] for n in names}
    assert allocate_counts(shuffled, keep, method) == allocate_counts(scores, keep, method)
    one, other = largest_by_name(shuffled, keep), largest_by_name(scores, keep)
    assert list(one) == names
    assert all(torch.equal(one[n], other[n]) for n in names)


@given(networks, st.floats(0, 1), st.integers(0, 30), st.integers(0, 9))
def test_a_floor_is_met_and_the_total_stays(shapes, share, floor, seed):
    size = {n: math.prod(s) for n, s in shapes.items()}
    keep = round(share * sum(size.values()))
    assume(sum(min(floor, n) for n in size.values()) <= keep)
    counts = allocate_counts(drawn(shapes, seed), keep, "global", floor=floor)
    assert sum(counts.values()) == keep
    assert all(min(floor, size[n]) <= counts[n] <= size[n] for n in size)


def test_a_floor_takes_from_the_others_in_proportion():
    counts = with_floor({"a": 0, "b": 30, "c": 50}, {"a": 20, "b": 100, "c": 100}, 10)
    assert counts == {"a": 10, "b": 27, "c": 43}


def test_a_floor_that_cannot_be_met_is_refused():
    with pytest.raises(InputError, match="at most 5 weights"):
        with_floor({"a": 0, "b": 5}, {"a": 10, "b": 10}, 3)


def test_explicit_densities():
    scores = drawn({"a": (10, 10), "b": (5, 20)}, 0)
    assert allocate_counts(scores, 50, {"a": 0.4, "b": 0.1}) == {"a": 40, "b": 10}
    with pytest.raises(InputError, match=r"a density for each of \['b'\]"):
        allocate_counts(scores, 50, {"a": 0.5})


@pytest.mark.parametrize("keep", [-1, 5])
def test_more_or_fewer_weights_than_there_are_cannot_be_kept(keep):
    with pytest.raises(InputError, match="0 to 4 weights"):
        allocate_counts({"a": torch.ones(2, 2)}, keep)


# allocations that look at scores


@given(networks, st.floats(0, 1), st.integers(0, 9), st.booleans())
def test_no_swap_improves_the_global_mask(shapes, share, seed, ties):
    scores = drawn(shapes, seed, ties=ties)
    masks = largest_by_name(scores, round(share * total(shapes)))
    kept = torch.cat([scores[n][masks[n]] for n in shapes])
    removed = torch.cat([scores[n][~masks[n]] for n in shapes])
    if len(kept) and len(removed):
        assert kept.min() >= removed.max()


def test_the_global_mask_is_the_best_of_all_masks():
    scores = drawn({"a": (2, 2), "b": (1, 4)}, 0)
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    for keep in range(9):
        best = max(sum(flat[list(chosen)]) for chosen in combinations(range(8), keep))
        masks = largest_by_name(scores, keep)
        assert sum(scores[n][masks[n]].sum() for n in scores) == pytest.approx(float(best))


@given(shape, st.integers(0, 99))
def test_lamp_against_its_formula(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    scores = lamp_scores({"w": weight})["w"]
    w = weight.reshape(-1).numpy()
    brute = [u**2 / np.square(w[np.abs(w) >= abs(u)]).sum() for u in w]
    assert scores.shape == weight.shape
    assert scores.reshape(-1).numpy() == pytest.approx(np.array(brute), rel=1e-9)


def test_lamp_gives_every_tensor_one_score_of_one():
    scores = lamp_scores({"a": torch.randn(5, 4), "ties": torch.ones(3, 3)})
    for name in scores:
        assert int((scores[name] == 1).sum()) == 1
        assert scores[name].max() == 1


def test_lamp_ranks_as_the_magnitude_within_a_tensor_and_ignores_its_scale():
    weight = torch.randn(6, 5)
    one, scaled = lamp_scores({"w": weight})["w"], lamp_scores({"w": 7 * weight})["w"]
    assert torch.equal(one.reshape(-1).argsort(), weight.abs().reshape(-1).argsort())
    assert torch.allclose(one, scaled)


def test_lamp_keeps_what_is_gone_last():
    gone = torch.tensor([3.0, -torch.inf, 2.0, 0.0])
    scores = lamp_scores({"w": gone})["w"]
    assert scores.argmin() == 1
    assert scores[[0, 2, 3]].tolist() == pytest.approx([1, 4 / 13, 0])


def test_shares_of_the_global_cut():
    scores = {"a": torch.tensor([[1.0, 2.0, 3.0]]), "b": torch.arange(4.0, 11.0).reshape(1, 7)}
    assert kept_shares(scores, 5) == {"a": 0.0, "b": 5 / 7}


ALPHA = (100.0, 400.0, 1600.0)


@pytest.mark.parametrize(
    ("limit", "expected", "objective"),
    [
        (600, (1, 0.625, 0.15625), -2.32630),
        (30, (0.1, 0.025, 0.00625), None),
        (2100, (1, 1, 1), 0.0),
    ],
)
def test_log_densities_under_one_limit(limit, expected, objective):
    found, multipliers = fill_log_densities([ALPHA], [limit])
    assert found == pytest.approx(expected)
    assert len(multipliers) == 1
    if objective is not None:
        assert sum(math.log(p) for p in found) == pytest.approx(objective, abs=1e-5)


def test_log_densities_without_a_cap():
    found, _ = fill_log_densities([ALPHA], [600], cap=math.inf)
    assert found == pytest.approx((2, 0.5, 0.125))
    assert sum(math.log(p) for p in found) == pytest.approx(-2.07944, abs=1e-5)


def test_log_densities_under_two_limits():
    beta = (6400.0, 6400.0, 1600.0)
    found, multipliers = fill_log_densities([ALPHA, beta], [600, 4000])
    assert found == pytest.approx((0.29455, 0.25739, 0.29224), abs=1e-5)
    assert min(multipliers) > 0
    for cost, limit in ((ALPHA, 600), (beta, 4000)):
        assert sum(a * p for a, p in zip(cost, found, strict=True)) == pytest.approx(limit)
    slack, multipliers = fill_log_densities([ALPHA, beta], [600, 1e9])
    assert slack == pytest.approx((1, 0.625, 0.15625))
    assert multipliers[1] == 0


@given(st.lists(st.floats(1, 1e4), min_size=1, max_size=8), st.floats(0.01, 1), st.floats(0.5, 50))
def test_log_densities_spend_the_limit_whatever_the_unit(cost, share, scale):
    limit = share * sum(cost)
    found, _ = fill_log_densities([cost], [limit])
    assert sum(a * p for a, p in zip(cost, found, strict=True)) == pytest.approx(limit)
    again, _ = fill_log_densities([[scale * a for a in cost]], [scale * limit])
    assert again == pytest.approx(found)
    kept = [a * p for a, p in zip(cost, found, strict=True) if p < 1 - 1e-9]
    assert not kept or max(kept) == pytest.approx(min(kept)), "all that are not full keep as much"


@pytest.mark.parametrize(
    ("costs", "limits", "cap"),
    [
        ([ALPHA], [0.0], 1.0),
        ([(1.0, 0.0)], [1.0], 1.0),
        ([ALPHA], [], 1.0),
        ([ALPHA] * 3, [1.0] * 3, 1.0),
        ([ALPHA], [10.0], 0.0),
        ([ALPHA], [10.0, 20.0], 1.0),
    ],
)
def test_bad_limits_of_log_densities_are_refused(costs, limits, cap):
    with pytest.raises(InputError):
        fill_log_densities(costs, limits, cap)
