"""Random masks: exact counts, streams of their own, ratios of SNIP and GraSP, the user's model."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.weights.random_pruning import (
    RandomPruning,
    bernoulli_masks,
    grasp_ratio,
    random_masks,
    snip_ratio,
)
from secateurs.parts.allocation import counts_from_densities, densities, largest_by_name
from secateurs.parts.prunable import prunable_parameters
from secateurs.parts.saliency import Probe, grasp
from secateurs.training.batches import class_balanced, first_batch

ALLOCATIONS = ("uniform", "uniform+", "er", "erk", "erk+", "snip", "grasp")
BY_SHAPE = ALLOCATIONS[:5]


def same(one, other):
    return all(torch.equal(one[n], other[n]) for n in one)


def untouched(model, state, modes):
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    return all(torch.equal(model.state_dict()[n], v) for n, v in state.items())


# masks

shapes = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4).map(
    lambda shapes: {f"w{i}": s for i, s in enumerate(shapes)}
)


@given(shapes, st.floats(0, 1), st.integers(0, 2**40))
def test_random_masks_have_exactly_their_counts(shapes, share, seed):
    counts = {n: round(share * math.prod(s)) for n, s in shapes.items()}
    masks = random_masks(shapes, counts, seed)
    assert {n: int(m.sum()) for n, m in masks.items()} == counts
    assert {n: tuple(m.shape) for n, m in masks.items()} == shapes
    assert same(masks, random_masks(shapes, counts, seed))


def test_every_position_is_as_likely_as_any_other():
    times = sum(random_masks({"w": (4, 5)}, {"w": 5}, seed)["w"].int() for seed in range(2000))
    # 2000 draws of probability 1/4: five standard deviations are 97
    assert times.sum() == 10_000
    assert (times - 500).abs().max() < 97


@pytest.mark.parametrize(("draw", "much"), [(random_masks, 200), (bernoulli_masks, 0.5)])
def test_layers_have_streams_of_their_own(draw, much):
    masks = draw({"a": (20, 20), "b": (20, 20)}, {"a": much, "b": much}, 0)
    assert not torch.equal(masks["a"], masks["b"])
    assert torch.equal(masks["b"], draw({"b": (20, 20)}, {"b": much}, 0)["b"])


def test_seeds_give_other_masks():
    one, other = (random_masks({"a": (9, 9)}, {"a": 40}, s) for s in (0, 1))
    assert not same(one, other)


def test_masks_do_not_depend_on_the_global_generator(trained):
    masks = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        masks.append(sc.prune(trained, "random-pruning", "sparsity=0.5").masks)
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*masks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_same_seed_gives_the_same_mask_on_a_gpu(digits_task, allocation):
    model = digits_task.fresh_model(0)
    options = {"allocation": allocation, "init": "scaled", "recover": False}
    here = sc.prune(model, "random-pruning", "sparsity=0.2", digits_task, **options)
    there = sc.prune(model.cuda(), "random-pruning", "sparsity=0.2", digits_task, **options)
    assert same(here.masks, there.masks.to("cpu"))


def test_bernoulli_counts_lie_within_three_standard_deviations():
    size, density = {"a": (100, 100), "b": (50, 80)}, {"a": 0.1, "b": 0.6}
    for seed in range(5):
        for name, mask in bernoulli_masks(size, density, seed).items():
            n, p = math.prod(size[name]), density[name]
            assert 0 < abs(int(mask.sum()) - n * p) < 3 * math.sqrt(n * p * (1 - p))


def test_bernoulli_masks_leave_at_least_one_weight():
    masks = bernoulli_masks({"tiny": (2, 3)}, {"tiny": 0.0}, 0)
    assert int(masks["tiny"].sum()) == 1


# the method


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_every_allocation_keeps_exactly_what_it_should(digits_task, allocation, sparsity):
    model = digits_task.fresh_model(0)
    if allocation == "uniform+":
        sparsity *= 0.3  # the first layer, three quarters of all weights, stays dense
    outcome = sc.prune(
        model,
        "random-pruning",
        f"sparsity={sparsity}",
        digits_task,
        recover=False,
        allocation=allocation,
    )
    total = outcome.masks.total
    assert outcome.masks.kept == total - round(sparsity * total)
    for name, parameter in outcome.model.named_parameters():
        original = model.get_parameter(name)
        mask = outcome.masks.get(name, torch.ones_like(original, dtype=torch.bool))
        assert torch.equal(parameter[mask], original[mask])
        assert not parameter[~mask].any()


@pytest.mark.parametrize("allocation", BY_SHAPE)
def test_layer_counts_are_those_of_the_allocation(digits_task, allocation):
    model = digits_task.fresh_model(0)
    outcome = sc.prune(model, "random-pruning", "density=0.8", allocation=allocation)
    sizes = {n: m.numel() for n, m in outcome.masks.items()}
    share = densities({n: m.shape for n, m in outcome.masks.items()}, 0.8, allocation)
    keep = round(0.8 * sum(sizes.values()))
    assert outcome.masks.kept_by_tensor() == counts_from_densities(share, sizes, keep)


def test_options_reach_the_allocation(digits_task):
    model = digits_task.fresh_model(0)

    def kept(**options):
        return sc.prune(model, "random-pruning", "density=0.3", **options).masks.kept_by_tensor()

    assert kept(keep_dense=["^2"])["2.weight"] == 512
    assert kept(allocation="erk+", fc_density=0.5)["4.weight"] == 80
    assert kept(power=0.0) == kept(allocation="uniform")
    assert list(kept(exclude=["^0"])) == ["2.weight", "4.weight"]


def test_bernoulli_option_fluctuates_around_the_budget(digits_task):
    model = digits_task.fresh_model(0)
    kept = {
        sc.prune(model, "random-pruning", "sparsity=0.5", seed=s, exact=False).masks.kept
        for s in range(4)
    }
    assert len(kept) > 1
    # 2720 weights of probability about 1/2
    assert all(abs(k - 1360) < 5 * math.sqrt(2720 / 4) for k in kept)


def test_the_scaled_initialisation_has_the_fan_in_of_the_sparse_network():
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 200))
    outcome = sc.prune(model, "random-pruning", "density=0.25", init="scaled", allocation="uniform")
    gain = math.sqrt(2 / (1 + 0.01**2))
    for name, mask in outcome.masks.items():
        kept = outcome.model.get_parameter(name)[mask]
        expected = gain / math.sqrt(mask.shape[1] * 0.25)
        assert kept.std().item() == pytest.approx(expected, rel=0.03)


def test_the_zero_pattern_is_the_same_after_training(digits_task):
    model = digits_task.fresh_model(0)
    before = sc.prune(model, "random-pruning", "sparsity=0.8", digits_task, recover=False)
    after = sc.prune(model, "random-pruning", "sparsity=0.8", digits_task)
    assert same(before.masks, after.masks)
    for name, mask in after.masks.items():
        weight = after.model.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        assert not torch.equal(weight, before.model.get_parameter(name))


# ratios of SNIP and GraSP


def test_snip_ratio_draws_the_weights_anew(digits_task):
    """Two models that differ by their weights only get the same ratios from one seed."""
    batch = first_batch(digits_task, 0)
    ratios = []
    for scale in (1.0, 0.01):
        model = digits_task.fresh_model(0)
        with torch.no_grad():
            model[0].weight.mul_(scale)
        params = prunable_parameters(model)
        generator = torch.Generator().manual_seed(0)
        ratios.append(snip_ratio(model, params, batch, digits_task.batch_loss, 500, generator))
    assert ratios[0] == ratios[1]
    size = {n: p.numel() for n, p in params.items()}
    assert sum(ratios[0][n] * size[n] for n in size) == pytest.approx(500)


def test_grasp_ratio_is_that_of_its_scores(digits_task):
    model = digits_task.fresh_model(0)
    params = prunable_parameters(model)
    halves = class_balanced(digits_task, 0, 10, parts=2)
    loss = digits_task.batch_loss
    ratios = grasp_ratio(model, params, halves, loss, 500)
    masks = largest_by_name(grasp(Probe(model, params, halves, loss)), 500)
    assert ratios == {n: int(m.sum()) / m.numel() for n, m in masks.items()}
    assert len({round(r, 3) for r in ratios.values()}) == 3


@pytest.mark.parametrize("allocation", ["snip", "grasp"])
def test_positions_of_the_scores_are_thrown_away(digits_task, allocation):
    model = digits_task.fresh_model(0)
    options = {"allocation": allocation, "recover": False}
    one = sc.prune(model, "random-pruning", "sparsity=0.7", digits_task, **options)
    shapes = {n: tuple(m.shape) for n, m in one.masks.items()}
    assert same(one.masks, random_masks(shapes, one.masks.kept_by_tensor(), 0))


@pytest.mark.parametrize("allocation", ["snip", "grasp"])
@pytest.mark.parametrize("training", [True, False])
def test_ratios_leave_the_users_model_as_it_was(digits_task, allocation, training):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10)
    ).train(training)
    model[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    params = prunable_parameters(model)
    loss, halves = digits_task.batch_loss, class_balanced(digits_task, 0, 4, parts=2)
    if allocation == "snip":
        snip_ratio(model, params, halves[0], loss, 100, torch.Generator())
    else:
        grasp_ratio(model, params, halves, loss, 100)
    assert untouched(model, state, modes)
    assert not any(inputs.requires_grad for inputs, _ in halves)


@pytest.mark.parametrize("allocation", ["snip", "grasp"])
def test_ratios_need_a_task(digits_task, allocation):
    with pytest.raises(InputError, match=f"task: got None; accepted: a Task: {allocation}"):
        sc.prune(digits_task.fresh_model(0), "random-pruning", "sparsity=0.5",
                 allocation=allocation)  # fmt: skip


# batches of the same number of samples of every class


def test_class_balanced_batches(digits_task):
    halves = class_balanced(digits_task, 3, 6, parts=2)
    for inputs, target in halves:
        assert inputs.shape == (30, 64)
        assert torch.bincount(target).tolist() == [3] * 10
    assert not torch.equal(halves[0][0], halves[1][0])
    again = class_balanced(digits_task, 3, 6, parts=2)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(halves, again, strict=True))
    other = class_balanced(digits_task, 4, 6, parts=2)
    assert not torch.equal(halves[0][0], other[0][0])


def test_a_class_with_too_few_samples_is_refused_and_named():
    labels = torch.tensor([0] * 20 + [1] * 3)
    loader = DataLoader(TensorDataset(torch.randn(23, 4), labels), 5, shuffle=True)
    task = sc.classification(lambda: nn.Linear(4, 2), loader, loader)
    with pytest.raises(InputError, match="samples_per_class: got 4; accepted: at most 3, all of"):
        class_balanced(task, 0, 4)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"samples_per_class": 1}, "samples_per_class"),
        ({"temperature": 0.0}, "temperature"),
        ({"fc_density": 0.0}, "fc_density"),
        ({"fc_density": 1.5}, "fc_density"),
    ],
)
def test_bad_options_are_refused_by_name(options, argument):
    with pytest.raises(InputError) as caught:
        RandomPruning(**options)
    assert caught.value.argument == argument


def test_a_budget_below_the_dense_layers_is_refused_with_the_least(digits_task):
    with pytest.raises(InputError, match=f"at least {512 / 2720:.6g}"):
        sc.prune(digits_task.fresh_model(0), "random-pruning", "density=0.1", keep_dense=["^2"])
