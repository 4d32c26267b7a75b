"""Lottery tickets and rewinding against the worked numbers of the papers."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.weights.lottery_ticket import (
    LotteryRewinding,
    LotteryTicket,
    noisy,
    resampled,
    rewind_steps,
)
from secateurs.parts.masks import Masks, named_parameters
from secateurs.parts.prunable import prunable_parameters
from secateurs.state import model_state
from secateurs.training.loop import fit

LENET = {"fc1.weight": 784 * 300, "fc2.weight": 300 * 100, "fc3.weight": 100 * 10}


def left_by(plan, size):
    """Weights left of every tensor after each round of a plan."""
    left = [dict(size)]
    for counts in plan:
        left.append({n: left[-1][n] - counts[n] for n in size})
    return left


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@pytest.fixture
def task(digits_task):
    return replace(digits_task, training=sc.TrainSettings(steps=40, lr=0.2))


@pytest.mark.parametrize(
    ("rounds", "percent"),
    [(1, 80.04), (3, 51.28), (7, 21.07), (12, 6.95), (15, 3.58), (20, 1.19)],
)
def test_the_counts_of_lenet_are_those_of_the_paper(rounds, percent):
    """20 % of each layer and 10 % of the last: 0.8^k · 265,200 + 0.9^k · 1000 of 266,200."""
    left = left_by(LotteryTicket().plan(LENET, 1000), LENET)[rounds]
    assert sum(left.values()) / 266_200 == pytest.approx(percent / 100, abs=6e-5)
    assert left["fc3.weight"] == pytest.approx(0.9**rounds * 1000, abs=3)
    for name in ("fc1.weight", "fc2.weight"):
        assert left[name] == pytest.approx(0.8**rounds * LENET[name], abs=3)


sizes = st.dictionaries(
    st.sampled_from("abcdef"), st.integers(1, 500), min_size=1, max_size=4
).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, sum(size.values()))))


@given(sizes, st.floats(0.05, 0.95), st.none() | st.integers(1, 12), st.booleans())
def test_every_plan_ends_exactly_at_the_budget(given_sizes, rate, rounds, overall):
    size, keep = given_sizes
    method = LotteryTicket(rate=rate, rounds=rounds, scope="global" if overall else "layer")
    plan = method.plan(size, keep)
    assert sum(size.values()) - sum(sum(counts.values()) for counts in plan) == keep
    assert rounds is None or len(plan) <= rounds
    if not overall:
        assert all(count >= 0 for left in left_by(plan, size) for count in left.values())


@given(sizes, st.floats(0.05, 0.95))
def test_over_all_layers_a_round_removes_the_rounded_share_of_the_survivors(given_sizes, rate):
    size, keep = given_sizes
    left = sum(size.values())
    plan = LotteryTicket(rate=rate, scope="global").plan(size, keep)
    for counts in plan[:-1]:
        assert sum(counts.values()) == round(rate * left)
        left -= sum(counts.values())


def test_ten_rounds_to_five_percent_take_a_quarter_each():
    """r = 1 − 0.05^(1/10) = 0.2589."""
    size = {"a": 40_000, "b": 20_000}
    plan = LotteryTicket(rounds=10, output_rate=1.0).plan(size, 3000)
    assert len(plan) == 10
    left = [sum(sizes.values()) for sizes in left_by(plan, size)]
    assert left[-1] == 3000
    for before, after in pairwise(left):
        assert 1 - after / before == pytest.approx(0.2589, abs=2e-4)


def test_layers_with_rates_of_their_own():
    plan = LotteryTicket(rate=0.2, rates={"^c": 0.1, "b": 0.0}).plan(
        {"a": 100, "b": 100, "c": 100, "out": 100}, 300
    )
    assert plan[0] == {"a": 20, "b": 0, "c": 10, "out": 10}
    with pytest.raises(InputError, match="rates: got 'x'; accepted: a pattern of one of a"):
        LotteryTicket(rates={"x": 0.1}).plan({"a": 10}, 5)


@pytest.mark.parametrize(
    ("rewind", "step"), [(0, 0), (20, 20), ("20", 20), ("4%", 40), ("2.5%", 25), ("3ep", 150)]
)
def test_rewind_points(rewind, step):
    assert rewind_steps(rewind, total=1000, per_epoch=50) == step


@pytest.mark.parametrize("rewind", [1000, -1, "100%", "20ep", "soon", "4 epochs", ""])
def test_rewind_points_that_are_none(rewind):
    with pytest.raises(InputError, match="rewind: got"):
        rewind_steps(rewind, total=1000, per_epoch=50)


@pytest.mark.parametrize(
    "options",
    [
        *({"rate": 0.0}, {"rate": 1.0}, {"rounds": -1}, {"output_rate": 0.0}),
        *({"rates": {"a": 1.0}}, {"stability_samples": -1}, {"evaluate_every": -1}),
        {"scope": "global", "rates": {"a": 0.1}},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=list(options)[-1]):
        LotteryTicket(**options)


def test_no_rounds_are_ordinary_training_bit_for_bit(task):
    model = task.fresh_model(0)
    outcome = sc.prune(model, "lottery-ticket", "sparsity=0", task)
    assert len(outcome.history) == 1
    fit(model, task, task.training)
    assert_same(outcome.model.state_dict(), model.state_dict())


def test_the_history_is_that_of_the_rounds(task):
    outcome = sc.prune(
        task.fresh_model(0), "lottery-ticket", "sparsity=0.5", task, evaluate_every=20
    )
    assert [row["round"] for row in outcome.history] == [0, 1, 2, 3, 4]
    total = outcome.masks.total
    kept = [round(row["density"] * total) for row in outcome.history]
    assert kept[0] == total
    assert kept[1] == total - round(0.2 * 2048) - round(0.2 * 512) - round(0.1 * 160)
    assert kept[-1] == outcome.masks.kept == total - round(0.5 * total)
    assert outcome.metrics_before == {k: outcome.history[0][k] for k in ("accuracy", "loss")}
    assert all(row["early_stop_step"] in (20, 40) for row in outcome.history)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_rewinding_to_step_0_is_the_lottery_ticket_bit_for_bit(task, scope):
    model = task.fresh_model(0)
    one = sc.prune(model, "lottery-ticket", "sparsity=0.6", task, scope=scope)
    two = sc.prune(model, "lottery-rewinding", "sparsity=0.6", task, scope=scope, rewind=0)
    assert_same(one.model.state_dict(), two.model.state_dict())
    late = sc.prune(model, "lottery-rewinding", "sparsity=0.6", task, scope=scope, rewind=8)
    assert not torch.equal(one.model[0].weight, late.model[0].weight)


def test_rewinding_defaults_to_two_percent_and_one_ranking():
    assert (LotteryRewinding().rewind, LotteryRewinding().scope) == ("2%", "global")
    assert (LotteryTicket().rewind, LotteryTicket().scope) == (0, "layer")


def with_controls(task, *controls, **options):
    model = task.starting_model(0)
    outcome = sc.prune(model, "lottery-ticket", "sparsity=0.6", task, controls=controls, **options)
    return outcome, outcome.tables["controls"]


CONTROLS = ("reinit", "random-mask", "global-random", "ticket-sample", "prune-at-init")


def test_every_control_is_trained_beside_the_ticket(task):
    outcome, rows = with_controls(task, *CONTROLS, noise=(0.5, 2.0))
    assert [r["control"] for r in rows] == ["ticket", *CONTROLS, "noise-0.5", "noise-2"]
    assert rows[0]["loss"] == outcome.metrics_after["loss"] == task.measure(outcome.model)["loss"]
    assert len({row["loss"] for row in rows}) == len(rows)
    alone = sc.prune(task.fresh_model(0), "lottery-ticket", "sparsity=0.6", task)
    assert_same(alone.model.state_dict(), outcome.model.state_dict())


def control(task, name, seed=0):
    """State and masks of a control, before it is trained."""
    from secateurs.training.rounds import iterative_rounds, remove_smallest_overall

    model = task.fresh_model(0)
    tickets = iterative_rounds(
        model,
        Masks.ones_like(prunable_parameters(model)),
        task,
        lambda weights, masks, _: remove_smallest_overall(weights, masks, masks.kept * 3 // 5),
        1,
        seed=seed,
    )
    state, masks = LotteryTicket()._control(name, tickets, task, seed)
    return tickets, state, masks


def test_the_reinit_control_has_the_mask_and_new_weights(task):
    tickets, state, masks = control(task, "reinit")
    assert_same(dict(masks), dict(tickets.rounds[-1].masks))
    for name in masks:
        assert not bool((state[name] == tickets.rewound[name]).any())


def test_random_mask_controls_have_the_weights_and_the_counts(task):
    tickets, state, masks = control(task, "random-mask")
    last = tickets.rounds[-1].masks
    assert_same(state, tickets.rewound)
    assert masks.kept_by_tensor() == last.kept_by_tensor()
    assert any(not torch.equal(masks[n], last[n]) for n in masks)
    _, state, overall = control(task, "global-random")
    assert overall.kept == last.kept
    assert overall.kept_by_tensor() != last.kept_by_tensor()


def test_pruning_at_initialisation_keeps_the_largest_initial_weights(task):
    tickets, _, masks = control(task, "prune-at-init")
    assert masks.kept_by_tensor() == tickets.rounds[-1].masks.kept_by_tensor()
    for name, mask in masks.items():
        size = tickets.rewound[name].abs()
        assert float(size[mask].min()) >= float(size[~mask].max())


def test_a_ticket_sample_draws_from_the_tickets_own_values(task):
    tickets, state, masks = control(task, "ticket-sample")
    for name, mask in masks.items():
        own = set(tickets.rewound[name][mask].tolist())
        assert set(state[name][mask].tolist()) <= own
        assert torch.equal(state[name][~mask], tickets.rewound[name][~mask])
    assert not torch.equal(state["0.weight"], tickets.rewound["0.weight"])


def test_resampling_and_noise_have_the_right_spread():
    """10^4 draws: the standard deviation within 5 %."""
    weight = 0.3 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    state, masks = {"w": weight, "b": torch.zeros(3)}, Masks({"w": weight.abs() > 0})
    drawn = resampled(state, masks, 1)
    assert float(drawn["w"].std()) == pytest.approx(0.3, rel=0.05)
    for scale in (0.5, 3.0):
        changed = noisy(state, masks, scale, 1)
        assert float((changed["w"] - weight).std()) == pytest.approx(0.3 * scale, rel=0.05)
        assert torch.equal(changed["b"], state["b"])
    assert not torch.equal(noisy(state, masks, 1.0, 1)["w"], noisy(state, masks, 1.0, 2)["w"])
    assert torch.equal(weight, state["w"])


def test_reinit_needs_a_function_for_fresh_models(task):
    fixed = task.with_model(task.fresh_model(0))
    with pytest.raises(InputError, match="controls: got 'reinit'"):
        with_controls(fixed, "reinit")
    assert len(with_controls(fixed, "random-mask")[1]) == 2


def test_the_stability_table_stands_beside_the_ticket(task):
    outcome = sc.prune(
        task.fresh_model(0), "lottery-rewinding", "sparsity=0.7", task, stability_samples=2
    )
    rows = outcome.tables["stability"]
    assert [(r["mask"], r["to"]) for r in rows] == [
        ("method", "pruning"), ("method", "data order"), ("random", "pruning"),
        ("random", "data order"),
    ]  # fmt: skip
    assert all(0 < row["min"] <= row["distance"] <= row["max"] for row in rows)
    assert task.measure(outcome.model) == outcome.metrics_after, "it left other weights behind"


def test_a_collapsed_layer_is_noted(task):
    """Weights of the second layer a hundred times smaller than the rest: one ranking empties it."""
    model = task.fresh_model(0)
    with torch.no_grad():
        model[2].weight.mul_(1e-9)
    frozen = replace(task, training=sc.TrainSettings(steps=1, lr=1e-12))
    outcome = sc.prune(model, "lottery-ticket", "sparsity=0.5", frozen, scope="global")
    assert outcome.notes == ["layer collapse: nothing is left of 2.weight"]
    kept = named_parameters(outcome.model, outcome.masks)
    assert not bool(kept["2.weight"].any())


def test_the_optimizers_state_can_be_kept_at_the_rewind_point(task):
    model = task.fresh_model(0)
    both = [
        sc.prune(model, "lottery-rewinding", "sparsity=0.6", task, rewind=8, optimizer_state=state)
        for state in ("drop", "keep")
    ]
    assert not torch.equal(both[0].model[0].weight, both[1].model[0].weight)
    whole = task.fresh_model(0)
    fit(whole, task, task.training)
    assert both[1].metrics_before == task.measure(whole), "round 0 is the uninterrupted training"
    assert both[0].metrics_before != both[1].metrics_before


def test_resetting_at_the_end_only_is_another_method(task):
    model = task.fresh_model(0)
    each = sc.prune(model, "lottery-ticket", "sparsity=0.5", task)
    end = sc.prune(model, "lottery-ticket", "sparsity=0.5", task, reset="end")
    assert each.history[0] == end.history[0]
    assert each.history[2] != end.history[2]
    assert each.masks.kept == end.masks.kept
    assert model_state(each.model).keys() == model_state(end.model).keys()
