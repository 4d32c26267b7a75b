"""Global magnitude pruning: the worked numbers of its card, collapse, and the gradual form."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.weights.global_mp import (
    GlobalMagnitudePruning,
    GradualGlobalMagnitudePruning,
    check_floor,
    floor_of,
    global_magnitude_masks,
    minimum_threshold,
    official_removal,
)


def two_layers():
    """Weights [1, 2, 3] and [4, …, 10]."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 7, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
        model[1].weight.copy_(torch.arange(4.0, 11.0).reshape(7, 1))
    return model


def lenet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def counts(masks):
    return {n: int(m.sum()) for n, m in masks.items()}


# one shot


@pytest.mark.parametrize("budget", ["sparsity=0", "density=1", "params=1"])
@pytest.mark.parametrize("count", ["exact", "official"])
def test_no_sparsity_changes_no_bit(trained, budget, count):
    outcome = sc.prune(trained, "global-mp", budget, count=count)
    assert outcome.masks.density == 1
    for name, value in outcome.model.state_dict().items():
        assert torch.equal(value.view(torch.int32), trained.state_dict()[name].view(torch.int32))


@pytest.mark.parametrize(("count", "removed"), [("exact", 239_580), ("official", 239_579)])
def test_exact_count_on_lenet(count, removed):
    outcome = sc.prune(lenet(), "global-mp", "sparsity=0.9", count=count)
    assert outcome.masks.total == 266_200
    assert outcome.masks.total - outcome.masks.kept == removed


@pytest.mark.parametrize(
    ("budget", "removed"),
    # 11 weights: int(5.5) = 5 and int(3.3) = 3, and the last of them is kept
    [("sparsity=0.5", 4), ("sparsity=0.3", 2), ("sparsity=0.05", 0), ("density=0.5", 4)],
)
def test_official_count_truncates_as_the_public_code(budget, removed):
    model = nn.Linear(11, 1, bias=False)
    outcome = sc.prune(model, "global-mp", budget, count="official")
    assert 11 - outcome.masks.kept == removed


def test_official_removal_keeps_everything_at_sparsity_zero():
    assert [official_removal(asked) for asked in (0.0, 0.9, 1.0, 2.5)] == [0, 0, 0, 1]


def test_brute_force_example_empties_a_layer_and_says_so():
    outcome = sc.prune(two_layers(), "global-mp", "sparsity=0.5")
    assert outcome.model[0].weight.tolist() == [[0.0, 0.0, 0.0]]
    assert outcome.model[1].weight.flatten().tolist() == [0.0, 0.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert outcome.notes == ["layer collapse: nothing is left of 0.weight"]


def test_a_minimum_threshold_prevents_the_collapse():
    outcome = sc.prune(two_layers(), "global-mp", "sparsity=0.5", min_weights=1)
    assert outcome.masks.kept_by_tensor() == {"0.weight": 1, "1.weight": 4}
    assert outcome.model[0].weight.tolist() == [[0.0, 0.0, 3.0]]
    assert outcome.notes == []


networks = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4)
shares = st.floats(0, 1)


def drawn(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"w{i}": torch.randn(s, generator=generator, dtype=torch.float64)
        for i, s in enumerate(shapes)
    }


def total(weights):
    return sum(w.numel() for w in weights.values())


@given(networks, shares, st.floats(1e-3, 1e3), st.integers(0, 99))
def test_scaling_all_weights_changes_no_mask(shapes, share, factor, seed):
    weights = drawn(shapes, seed)
    keep = round(share * total(weights))
    scaled = global_magnitude_masks({n: factor * w for n, w in weights.items()}, keep)
    plain = global_magnitude_masks(weights, keep)
    assert all(torch.equal(scaled[n], plain[n]) for n in plain)


@given(networks, shares, st.floats(1, 100), st.integers(0, 99))
def test_a_layer_that_grows_never_loses_weights(shapes, share, factor, seed):
    weights = drawn(shapes, seed)
    keep = round(share * total(weights))
    before = counts(global_magnitude_masks(weights, keep))
    weights["w0"] = factor * weights["w0"]
    assert counts(global_magnitude_masks(weights, keep))["w0"] >= before["w0"]


@given(networks, shares, shares, st.integers(0, 99), st.booleans())
def test_a_sparser_mask_is_a_subset(shapes, one, other, seed, ties):
    weights = drawn(shapes, seed)
    if ties:
        weights = {n: w.round() for n, w in weights.items()}
    few, many = (round(s * total(weights)) for s in sorted((one, other)))
    sparse, dense = (global_magnitude_masks(weights, keep) for keep in (few, many))
    assert not any((sparse[n] & ~dense[n]).any() for n in weights)


@given(networks, shares, st.integers(0, 99))
def test_the_kept_weights_are_the_largest(shapes, share, seed):
    weights = drawn(shapes, seed)
    masks = global_magnitude_masks(weights, round(share * total(weights)))
    kept = torch.cat([w[masks[n]].abs() for n, w in weights.items()])
    removed = torch.cat([w[~masks[n]].abs() for n, w in weights.items()])
    if len(kept) and len(removed):
        assert kept.min() >= removed.max()


# minimum threshold


def test_worked_example_without_clipping():
    size = {"a": 100, "b": 1000, "c": 10_000}
    found = minimum_threshold({"a": 0.10, "b": 0.50, "c": 0.948}, size, 222)
    assert found["a"] == 0
    assert found["b"] == pytest.approx(0.500501, abs=5e-7)
    assert found["c"] == pytest.approx(0.948950, abs=5e-7)
    assert found["b"] / 0.5 == pytest.approx(1.001002, abs=5e-7)
    assert sum(found[n] * size[n] for n in size) == pytest.approx(0.9 * 11_100)


def test_worked_example_with_clipping():
    size = {"a": 100, "b": 1000, "c": 10_000, "d": 50_000}
    raw = {"a": 0.10, "b": 0.50, "c": 0.948, "d": 0.99}
    # only the proportions of the raw shares matter; their total is set to the one asked for
    factor = 0.95 * 61_100 / sum(raw[n] * size[n] for n in size)
    found = minimum_threshold({n: factor * s for n, s in raw.items()}, size, 800)
    assert list(found.values()) == pytest.approx([0, 0.2, 0.92, 0.9729])
    assert (1 - found["b"]) * 1000 == pytest.approx(800)
    assert (1 - found["c"]) * 10_000 == pytest.approx(800)
    assert sum(found[n] * size[n] for n in size) == pytest.approx(0.95 * 61_100)


def test_layers_that_the_global_cut_spares_give_what_a_threshold_takes():
    size = {"a": 12, "b": 6, "c": 22}
    found = minimum_threshold({"a": 0.0, "b": 0.5, "c": 0.0}, size, 10)
    assert found == pytest.approx({"a": 2 * 3 / 14 / 12, "b": 0, "c": 12 * 3 / 14 / 22})


def test_a_threshold_that_cannot_be_met_is_refused_with_the_largest_sparsity():
    size = {"a": 100, "b": 1000, "c": 10_000}
    with pytest.raises(InputError, match=r"min_weights: got 600.*largest sparsity is 0\.882883"):
        minimum_threshold({"a": 0.10, "b": 0.50, "c": 0.948}, size, 600)
    check_floor(size, 9800, 600)


def test_a_threshold_that_cannot_be_met_leaves_the_model_as_it_was(trained):
    before = {n: v.clone() for n, v in trained.state_dict().items()}
    with pytest.raises(InputError, match="min_weights"):
        sc.prune(trained, "global-mp", "sparsity=0.9", min_weights=500, inplace=True)
    assert all(torch.equal(trained.state_dict()[n], v) for n, v in before.items())


@given(networks, st.floats(0.02, 1), st.integers(1, 40), st.integers(0, 99))
def test_the_threshold_is_met_and_the_total_exact(shapes, share, floor, seed):
    weights = drawn(shapes, seed)
    size = {n: w.numel() for n, w in weights.items()}
    keep = round(share * total(weights))
    if sum(min(floor, n) for n in size.values()) > keep:
        with pytest.raises(InputError, match="min_weights"):
            global_magnitude_masks(weights, keep, floor)
        return
    kept = counts(global_magnitude_masks(weights, keep, floor))
    assert sum(kept.values()) == keep
    assert all(kept[n] >= min(floor, size[n]) for n in size)


def test_within_a_layer_the_threshold_changes_no_ranking():
    weights = drawn([(8, 8), (3, 3)])
    masks = global_magnitude_masks(weights, 10, floor=4)
    for name, mask in masks.items():
        assert weights[name][mask].abs().min() >= weights[name][~mask].abs().max()


def test_percent_is_of_the_whole_model():
    assert floor_of(266_200, None, 0.05) == 133
    assert floor_of(266_200, 7, None) == 7
    assert floor_of(266_200, None, None) == 0
    outcome = sc.prune(two_layers(), "global-mp", "sparsity=0.5", min_percent=10)
    assert outcome.masks.kept_by_tensor() == {"0.weight": 1, "1.weight": 4}


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"min_weights": 3, "min_percent": 0.1}, "min_percent"),
        ({"min_weights": -1}, "min_weights"),
        ({"min_percent": 100.0}, "min_percent"),
        ({"min_percent": -1.0}, "min_percent"),
    ],
)
@pytest.mark.parametrize("method", [GlobalMagnitudePruning, GradualGlobalMagnitudePruning])
def test_bad_thresholds_are_refused_by_name(method, options, argument):
    with pytest.raises(InputError) as caught:
        method(**options)
    assert caught.value.argument == argument


def narrow_in_the_middle():
    """The second layer's weights are a hundredth of the others'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 10))
    with torch.no_grad():
        model[2].weight /= 100
    return model


def test_layers_collapse_at_98_percent_and_not_under_a_threshold():
    plain = sc.prune(narrow_in_the_middle(), "global-mp", "sparsity=0.98")
    held = sc.prune(narrow_in_the_middle(), "global-mp", "sparsity=0.98", min_weights=10)
    assert plain.masks.kept_by_tensor()["2.weight"] == 0
    assert plain.notes == ["layer collapse: nothing is left of 0.weight, 2.weight"]
    assert min(held.masks.kept_by_tensor().values()) >= 10
    assert held.notes == []
    assert plain.masks.kept == held.masks.kept
    images = torch.rand(5, 64)
    assert plain.model(images).std(0).max() == 0
    assert held.model(images).std(0).max() > 0


# recovery


def test_removed_weights_stay_zero_through_finetuning(digits_task, trained):
    outcome = sc.prune(trained, "global-mp", "sparsity=0.8", digits_task)
    weights = dict(outcome.model.named_parameters())
    for name, mask in outcome.masks.items():
        assert not weights[name][~mask].any()
        assert not torch.equal(weights[name][mask], dict(trained.named_parameters())[name][mask])
    assert outcome.promise.kept
    assert outcome.metrics_after["accuracy"] > 0.6


def test_excluded_layers_stay_dense(trained):
    outcome = sc.prune(trained, "global-mp", "sparsity=0.8", exclude=["^4"])
    assert list(outcome.masks) == ["0.weight", "2.weight"]
    assert outcome.model[4].weight.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_layer(trained, bad):
    with torch.no_grad():
        trained[2].weight[0, 0] = bad
    with pytest.raises(InputError, match=r"^2\.weight"):
        sc.prune(trained, "global-mp", "sparsity=0.5")


# gradual

GRADUAL = GradualGlobalMagnitudePruning(end=0.5, frequency=1)


@pytest.mark.parametrize("min_weights", [None, 25])
def test_gradual_masks_only_shrink_and_end_at_the_target(train_attached, min_weights):
    method = GradualGlobalMagnitudePruning(end=0.5, frequency=1, min_weights=min_weights)
    seen = []
    at = train_attached(method, after=lambda at: seen.append(at.masks.clone()))
    for before, after in pairwise(seen):
        assert not any((after[n] & ~before[n]).any() for n in before)
    assert len({masks.kept for masks in seen}) > 15
    assert at.masks.kept == at.keep == at.masks.total - round(0.9 * at.masks.total)
    assert min(at.masks.kept_by_tensor().values()) >= (min_weights or 0)


def test_gradual_masks_only_shrink_where_kept_weights_are_zero():
    weights = {"a": torch.zeros(6), "b": torch.tensor([3.0, 0.0, 2.0, 0.0])}
    alive = {"a": torch.tensor([False] * 5 + [True]), "b": torch.tensor([True] * 4)}
    for keep in range(5, -1, -1):
        masks = global_magnitude_masks(weights, keep, alive=alive)
        assert sum(counts(masks).values()) == keep
        assert not any((masks[n] & ~alive[n]).any() for n in alive)


@given(networks, st.lists(shares, min_size=1, max_size=5), st.integers(0, 15), st.integers(0, 99))
def test_gradual_masks_only_shrink_under_a_threshold_whatever_happens(shapes, ramp, floor, seed):
    alive = {n: torch.ones_like(w, dtype=torch.bool) for n, w in drawn(shapes).items()}
    size = {n: m.numel() for n, m in alive.items()}
    least = sum(min(floor, n) for n in size.values())
    for update, share in enumerate(sorted(ramp, reverse=True)):
        keep = max(least, round(share * sum(size.values())))
        weights = {n: w * alive[n] for n, w in drawn(shapes, seed + update).items()}
        masks = global_magnitude_masks(weights, keep, floor, alive)
        assert sum(counts(masks).values()) == keep
        assert not any((masks[n] & ~alive[n]).any() for n in alive)
        assert all(int(masks[n].sum()) >= min(floor, size[n]) for n in size)
        alive = masks


@pytest.mark.parametrize("interrupt", [7, 30, 45])
def test_a_gradual_run_resumed_in_mid_ramp_gives_the_same_masks(train_attached, interrupt):
    whole = train_attached(GRADUAL)
    resumed = train_attached(GRADUAL, interrupt=interrupt)
    assert all(torch.equal(whole.masks[n], resumed.masks[n]) for n in whole.masks)
    assert all(torch.equal(whole.params[n], resumed.params[n]) for n in whole.params)


def test_a_threshold_that_cannot_be_met_is_refused_before_training(train_attached):
    with pytest.raises(InputError, match="min_weights"):
        train_attached(GradualGlobalMagnitudePruning(min_weights=200), steps=1)


def test_gradual_without_sparsity_trains_as_if_it_were_not_there(train_attached, digits_task,
                                                                 run_steps):  # fmt: skip
    at = train_attached(GRADUAL, budget="sparsity=0", steps=20)
    plain = digits_task.fresh_model(0)
    run_steps(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), 0, 20)
    for one, other in zip(at.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
