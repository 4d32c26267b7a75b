"""The protocol of fair budgets, against the numbers of the paper's code."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.networks.rethinking_value import (
    RethinkingValue,
    drawn_by,
    reinitialize,
    scale_milestones,
    scratch_epochs,
    sparse_std,
    summary,
)
from secateurs.parts.masks import Masks
from secateurs.training.rounds import train_masked

VGG16, VGG16_A = 627_355_658, 413_095_946
"""FLOPs at 32x32 by the official counter."""


@pytest.fixture
def task(digits_task):
    return replace(digits_task, training=sc.TrainSettings(steps=40, lr=0.2))


def test_vgg_16_a_gets_242_epochs():
    ratio = VGG16 / VGG16_A
    assert ratio == pytest.approx(1.51867, abs=1e-5)
    assert scratch_epochs(160, VGG16, VGG16_A) == 242
    assert scale_milestones([80, 120], 160, 242) == [121, 181]


def test_the_imagenet_rule_is_twice_as_long_at_most():
    """Drops every third: 60 epochs of 180, 47 of 141."""
    assert scratch_epochs(90, 3.1, 1.0, cap=2) == 180
    assert scratch_epochs(90, 3.1, 1.0) == 279
    assert scratch_epochs(90, 1.57, 1.0, cap=2) == 141
    assert scale_milestones([30, 60], 90, 180) == [60, 120]
    assert scale_milestones([30, 60], 90, 141) == [47, 94]


@given(st.integers(1, 500), st.integers(1, 10**12), st.integers(1, 10**12))
def test_scratch_b_costs_at_most_what_the_large_training_cost(epochs, one, two):
    large, small = max(one, two), min(one, two)
    longer = scratch_epochs(epochs, large, small)
    assert longer * small <= epochs * large * (1 + 1e-12)
    assert (longer + 1) * small > epochs * large * (1 - 1e-12)
    assert scratch_epochs(epochs, large, large) == epochs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((160, 1.0, 2.0), "flops_large: got 1.0; accepted: at least 2.0"),
        ((160, 1.0, 0.0), "flops_small: got 0.0"),
        ((160, 2.0, 1.0, 0.5), "cap: got 0.5; accepted: at least 1"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        scratch_epochs(*arguments)


def make_conv():
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


def weights_of(model):
    return {n: p for n, p in model.named_parameters() if p.ndim > 1}


def test_fresh_weights_have_the_shapes_of_the_pruned_and_none_of_its_values():
    model = make_conv()
    before = copy.deepcopy(model)
    with torch.no_grad():
        before[1].running_mean.fill_(3.0)
    drawn = []
    generator = torch.get_rng_state()
    for seed in (0, 0, 1):
        fresh = copy.deepcopy(before)
        reinitialize(fresh, seed=seed)
        drawn.append(weights_of(fresh))
        assert not bool(fresh[1].running_mean.any())
    assert torch.equal(generator, torch.get_rng_state())
    for name, old in weights_of(before).items():
        first, again, other = (weights[name] for weights in drawn)
        assert first.shape == old.shape
        assert torch.equal(first, again)
        assert not bool((first == old).any())
        assert not bool((first == other).any())


def test_convolutions_are_drawn_by_fan_out():
    """N(0, 2/(kh·kw·C_out))."""
    model = make_conv()
    reinitialize(model)
    assert float(model[3].weight.detach().std()) == pytest.approx(math.sqrt(2 / 576), rel=0.02)


def test_the_spread_follows_the_surviving_connections():
    """64x64x3x3 with 10 % kept: n = 3686.4/64 = 57.6, std 0.18634."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False))
    places = torch.randperm(36_864, generator=torch.Generator().manual_seed(0))[:3686]
    mask = torch.zeros(36_864, dtype=torch.bool).index_fill(0, places, True).view(64, 64, 3, 3)
    assert sparse_std(mask) == pytest.approx(0.18634, abs=2e-5)
    reinitialize(model, Masks({"0.weight": mask}), seed=1)
    weight = model[0].weight.detach()
    assert float(weight[mask].std()) == pytest.approx(0.18634, rel=0.05)
    assert not bool(weight[~mask].any())
    reinitialize(model, Masks({"0.weight": mask}), sparse_aware=False, seed=1)
    assert float(model[0].weight.detach()[mask].std()) == pytest.approx(
        math.sqrt(2 / 576), rel=0.05
    )
    assert sparse_std(torch.ones(64, 64, 3, 3)) == pytest.approx(math.sqrt(2 / 576))


def test_an_emptied_layer_stays_empty():
    model = make_conv()
    masks = Masks({"3.weight": torch.zeros_like(model[3].weight, dtype=torch.bool)})
    reinitialize(model, masks)
    assert not bool(model[3].weight.detach().any())


def test_a_layer_that_cannot_be_drawn_anew_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(InputError, match="model: got 1 of type Odd"):
        reinitialize(nn.Sequential(nn.Linear(2, 2), Odd()))


def test_zeros_stay_exactly_zero_over_100_steps(task):
    model = task.fresh_model(0)
    masks = Masks({n: torch.rand(w.shape) < 0.1 for n, w in weights_of(model).items()})
    reinitialize(model, masks, seed=5)
    settings = sc.TrainSettings(steps=100, lr=0.1, momentum=0.9, weight_decay=5e-3)
    start = copy.deepcopy(model.state_dict())
    trained = train_masked(model, masks, replace(task, training=settings), seed=0)
    for name, mask in masks.items():
        assert not bool(trained.trained[name][~mask].any())
        assert bool((trained.trained[name][mask] != start[name][mask]).all())


def test_filters_go_by_l1_norm_and_of_equals_the_first_stays():
    """Norms 2, 3, 2, 1 with half to go: filters 1 and 0 stay."""
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False))
    filters = torch.tensor([[1.0, -1.0], [0.0, 3.0], [2.0, 0.0], [-0.5, 0.5]])
    with torch.no_grad():
        model[0].weight.copy_(filters.view(4, 2, 1, 1))
    outcome = sc.prune(model, "one-shot", "sparsity=0.5", pattern="row")
    assert outcome.masks["0.weight"].flatten(1).tolist() == [
        [True, True], [True, True], [False, False], [False, False],
    ]  # fmt: skip


def test_a_shrunk_network_is_the_masked_one():
    """conv – BN – ReLU – conv: channels with zero filter, γ and β, against copied slices."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)
    )
    model(torch.randn(16, 3, 9, 9))  # running statistics that are not 0 and 1
    outcome = sc.prune(model, "one-shot", "sparsity=0.5", pattern="row", exclude=["3.weight"])
    masked, rows = outcome.model, outcome.masks["0.weight"].flatten(1)
    kept = rows.all(1)
    assert int(kept.sum()) == 4
    assert torch.equal(rows.any(1), kept)
    small = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)
    ).eval()
    with torch.no_grad():
        masked[1].weight[~kept] = masked[1].bias[~kept] = 0
        for place in (0, 1):
            for name, tensor in small[place].state_dict().items():
                if tensor.ndim:
                    tensor.copy_(masked[place].state_dict()[name][kept])
        small[3].weight.copy_(masked[3].weight[:, kept])
        small[3].bias.copy_(masked[3].bias)
        inputs = torch.randn(4, 3, 9, 9)
        torch.testing.assert_close(small(inputs), masked(inputs), rtol=1e-5, atol=1e-5)


def audited(task, budget="sparsity=0.5", **options):
    return sc.prune(task.fresh_model(0), "rethinking-value", budget, task, **options)


def test_scratch_b_at_ratio_1_is_scratch_e(task):
    rows = {row["arm"]: row for row in audited(task, "sparsity=0").history}
    assert rows["scratch-b"]["steps"] == rows["scratch-e"]["steps"] == 40
    for key in ("accuracy", "loss", "macs", "parameters"):
        assert rows["scratch-b"][key] == rows["scratch-e"][key]


@pytest.mark.parametrize(("cap", "steps"), [(None, 160), (2.0, 80)])
def test_scratch_b_costs_what_the_large_network_cost(task, cap, steps):
    """A quarter of the multiply-accumulates is left, so it trains four times as long."""
    outcome = audited(task, "density=0.25", cap=cap)
    rows = {row["arm"]: row for row in outcome.history}
    assert outcome.before.macs == 4 * outcome.after.effective_macs
    assert rows["scratch-b"]["steps"] == steps
    assert rows["scratch-e"]["steps"] == 40
    assert rows["finetune"]["steps"] is None
    assert rows["finetune"]["loss"] == outcome.metrics_after["loss"]


def test_the_scratch_arm_is_the_mask_with_fresh_weights_trained_alone(task):
    from secateurs.training.order import mix

    outcome = audited(task, arms=["scratch-e"])
    model = copy.deepcopy(outcome.model)
    drawn = task.fresh_model(mix(0, 201))
    reinitialize(model, outcome.masks, seed=mix(0, 201), drawn=drawn)
    alone = train_masked(model, outcome.masks, task, seed=mix(0, 202))
    assert outcome.history[0]["loss"] == alone.metrics["loss"]


def test_scratch_weights_are_drawn_as_the_large_networks_were(task):
    """A family that starts at 0.05 and not at torch's 0.125: so does the network from scratch."""
    make = task.model

    def quiet():
        net = make()
        for layer in (net[0], net[2], net[4]):
            nn.init.normal_(layer.weight, std=0.05)
            nn.init.constant_(layer.bias, 0.25)
        return net

    pruned, masks = make(), Masks({"0.weight": torch.rand(32, 64) < 0.5})
    drawn = drawn_by(task.with_model(quiet), pruned, 7)
    reinitialize(pruned, masks, sparse_aware=False, seed=7, drawn=drawn)
    weight = pruned[0].weight.detach()
    assert float(weight[masks["0.weight"]].std()) == pytest.approx(0.05, rel=0.1)
    assert not bool(weight[~masks["0.weight"]].any())
    assert bool((pruned[4].bias == 0.25).all())
    reinitialize(pruned, masks, seed=7, drawn=drawn)
    spread = sparse_std(masks["0.weight"])
    assert float(pruned[0].weight.detach()[masks["0.weight"]].std()) == pytest.approx(
        spread, rel=0.1
    )
    assert float(pruned[2].weight.detach().std()) == pytest.approx(0.05, rel=0.2)


def test_smaller_layers_are_drawn_with_the_spread_for_their_inputs():
    """He et al. on the large network, variance 2/fan_in: so it is on the small one."""

    def make(first, second):
        net = nn.Sequential(
            nn.Linear(64, first), nn.BatchNorm1d(first), nn.ReLU(), nn.Linear(first, second)
        )
        for place in (0, 3):
            nn.init.kaiming_normal_(net[place].weight)
            nn.init.zeros_(net[place].bias)
        return net

    large, small = make(400, 100), make(100, 60)
    small(torch.randn(32, 64))  # running statistics that are not 0 and 1
    reinitialize(small, drawn=large, seed=3)
    assert float(small[0].weight.detach().std()) == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert float(small[3].weight.detach().std()) == pytest.approx(math.sqrt(2 / 100), rel=0.05)
    assert not bool(small[0].bias.any() | small[3].bias.any() | small[1].running_mean.any())
    assert bool((small[1].weight == 1).all() & (small[1].running_var == 1).all())
    again = make(100, 60)
    reinitialize(again, drawn=large, seed=3)
    assert torch.equal(again[3].weight, small[3].weight)


def test_layers_draw_their_own_weights_where_the_task_cannot(task):
    """A module instead of a function, or a network with other tensors."""
    model = task.fresh_model(0)
    assert drawn_by(task.with_model(model), model, 0) is None
    assert drawn_by(task, make_conv(), 0) is None
    outcome = sc.prune(
        model, "rethinking-value", "sparsity=0.5", task.with_model(model), arms=["scratch-e"]
    )
    assert outcome.history[0]["accuracy"] > 0.2


def test_the_large_network_is_trained_where_the_audited_method_expects_it(task):
    outcome = audited(task, arms=["finetune"])
    from secateurs.training.loop import fit

    model = task.fresh_model(0)
    fit(model, task, task.training)
    direct = sc.prune(model, "global-mp", "sparsity=0.5", task)
    assert outcome.metrics_before == task.measure(model)
    assert outcome.metrics_after == direct.metrics_after
    before_training = audited(task, arms=["finetune"], audited="gmp")
    untrained = task.measure(task.fresh_model(0))
    assert before_training.metrics_before == untrained


def test_the_dense_and_the_pruned_network_are_timed_when_asked(task):
    """The protocol counts costs itself, for Scratch-B; the latency comes on top."""
    plain = audited(task, arms=["finetune"])
    timed = audited(task, arms=["finetune"], with_latency=True)
    assert plain.before.latency is plain.after.latency is None
    assert timed.before.latency.repeats == timed.after.latency.repeats > 1
    assert replace(timed.before, latency=None) == plain.before
    assert replace(timed.after, latency=None) == plain.after


def test_every_arm_is_run_with_every_seed(task):
    outcome = audited(task, seeds=3, arms=["finetune", "scratch-e"])
    assert [(row["arm"], row["seed"]) for row in outcome.history] == [
        (arm, seed) for seed in range(3) for arm in ("finetune", "scratch-e")
    ]
    losses = {row["loss"] for row in outcome.history}
    assert len(losses) == 6
    table = {row["arm"]: row for row in outcome.tables["arms"]}
    values = [row["accuracy"] for row in outcome.history if row["arm"] == "scratch-e"]
    assert table["scratch-e"]["mean"] == pytest.approx(sum(values) / 3)
    assert table["scratch-e"]["runs"] == 3


def test_the_summary_is_mean_and_sample_deviation():
    rows = [
        {"arm": "a", "steps": 5, "parameters": 7, "macs": 9, "accuracy": v} for v in (0.5, 0.7)
    ] + [{"arm": "b", "steps": 6, "parameters": 7, "macs": 9, "accuracy": 0.4}]
    first, second = summary(rows, "accuracy")
    assert (first["mean"], first["std"]) == pytest.approx((0.6, 0.1 * math.sqrt(2)))
    assert (second["arm"], second["std"], second["runs"]) == ("b", 0.0, 1)


@pytest.mark.parametrize("name", ["one-shot", "granet", "lottery-ticket", "small-dense"])
def test_any_method_can_be_put_to_the_test(task, name):
    outcome = audited(task, audited=name, arms=["finetune", "scratch-e"])
    assert outcome.promise.kept
    assert len(outcome.tables["arms"]) == 2
    assert outcome.method == "rethinking-value"
    assert outcome.options["audited"] == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audited": "rethinking-value"}, "audited: got 'rethinking-value'"),
        ({"audited": "no-such"}, "method: got 'no-such'"),
        ({"audited_options": {"rat": 1}}, "option: got 'rat'"),
        ({"arms": ()}, "arms"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"cap": 0.5}, "cap: got 0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RethinkingValue(**options)


def test_several_seeds_need_fresh_models(task):
    fixed = task.with_model(task.fresh_model(0))
    with pytest.raises(InputError, match="task.model: got a module"):
        sc.prune(fixed.model, "rethinking-value", "sparsity=0.5", fixed, seeds=2)
