"""Gradual magnitude pruning: counts along the ramp, frozen weights, blocks, resume."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.weights.gmp import GradualMagnitudePruning, kept_at
from secateurs.parts.schedules import Cubic
from secateurs.training.ramp import at_step, ramp_steps
from secateurs.workspace import Workspace


def attach(weight, budget, *, lr=0.0, steps=10, **options):
    """A method at work on one linear layer whose weights the test sets by hand."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    return GradualMagnitudePruning(**options).attach(layer, optimizer, budget, steps)


def step(at):
    at.model(torch.ones(1, at.model.in_features)).sum().backward()
    at.optimizer.step()


def mask_of(at):
    return at.masks["weight"].int().tolist()


# the ramp


def test_kept_count_of_the_card():
    assert kept_at(0.8991 / 0.9, 1000, 0.0, 100) == 101
    assert kept_at(Cubic(0.9, 0, 100)(90) / 0.9, 1000, 0.0, 100) == 101


@given(st.integers(1, 5000), st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 1))
def test_kept_counts_follow_the_ramp_to_half_a_weight(size, initial, share, progress):
    final_kept = round((1 - initial) * size * share)
    final = 1 - final_kept / size
    sparsity = initial + (final - initial) * progress
    assert abs(kept_at(progress, size, initial, final_kept) - (1 - sparsity) * size) <= 0.5 + 1e-6
    assert kept_at(1.0, size, initial, final_kept) == final_kept


def test_every_layer_follows_the_cubic_ramp(train_attached):
    steps, seen = 60, {}
    method = GradualMagnitudePruning(begin=10, end=50, frequency=10)
    at = train_attached(
        method, steps=steps, after=lambda at: seen.update({at.step: at.masks.kept_by_tensor()})
    )
    ramp = Cubic(0.9, 10, 50)
    period = ramp_steps(10, 50, 10, steps)[2]
    for now, kept in seen.items():
        updated = min(50, max(10, now - (now - 10) % period))
        for name, mask in at.masks.items():
            assert abs(kept[name] - (1 - ramp(updated)) * mask.numel()) <= 1


@pytest.mark.parametrize("frequency", [1, 3, 7, 1000])
@pytest.mark.parametrize("end", [0.75, 1.0, 41])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_target_is_exact_whatever_the_frequency(train_attached, frequency, end, scope):
    method = GradualMagnitudePruning(end=end, frequency=frequency, scope=scope)
    at = train_attached(method, budget="sparsity=0.87")
    assert at.masks.kept == at.masks.total - round(0.87 * at.masks.total)
    if scope == "layer":
        for mask in at.masks.values():
            assert abs(int(mask.sum()) - 0.13 * mask.numel()) <= 1


def test_power_one_is_linear(train_attached):
    kept = []
    method = GradualMagnitudePruning(end=1.0, frequency=1, power=1.0)
    train_attached(method, steps=20, after=lambda at: kept.append(at.masks.kept))
    drops = [early - late for early, late in pairwise(kept)]
    assert max(drops) - min(drops) <= 4


def test_initial_sparsity_holds_from_the_first_step(train_attached):
    seen = []
    method = GradualMagnitudePruning(initial=0.5, frequency=1)
    train_attached(method, steps=4, after=lambda at: seen.append(at.masks.sparsity))
    assert seen[0] == pytest.approx(0.5, abs=1e-3)
    assert seen[-1] == pytest.approx(0.9, abs=1e-3)


def test_initial_equal_to_the_target_is_constant(train_attached):
    seen = []
    method = GradualMagnitudePruning(initial=0.75, frequency=1, revive="never")
    at = train_attached(
        method, "sparsity=0.75", steps=6, after=lambda at: seen.append(at.masks.clone())
    )
    assert all(torch.equal(masks[n], at.masks[n]) for masks in seen for n in masks)


def test_nothing_is_cut_before_the_ramp(train_attached):
    seen = []
    method = GradualMagnitudePruning(begin=0.5, end=0.8, frequency=1)
    train_attached(method, steps=20, after=lambda at: seen.append(at.masks.density))
    assert seen[:11] == [1.0] * 11
    assert seen[11] < 1
    assert len(set(seen[16:])) == 1


def test_no_sparsity_trains_as_if_it_were_not_there(train_attached, digits_task, run_steps):
    at = train_attached(GradualMagnitudePruning(frequency=1), "sparsity=0", steps=20)
    plain = digits_task.fresh_model(0)
    run_steps(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), 0, 20)
    for one, other in zip(at.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_masks_only_shrink_without_revival(train_attached):
    seen = []
    method = GradualMagnitudePruning(revive="never", frequency=1)
    train_attached(method, after=lambda at: seen.append(at.masks.clone()))
    for before, after in pairwise(seen):
        assert not any((after[n] & ~before[n]).any() for n in before)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_without_revival_a_kept_zero_does_not_make_room_for_what_is_gone(scope):
    weight = torch.tensor([[0.1, 0.5, 0.4, 0.3, 0.2, 0.6]])
    at = attach(weight, "density=0.5", initial=0.2, end=1.0, revive="never", scope=scope)
    assert mask_of(at) == [[0, 1, 1, 1, 1, 1]]
    with torch.no_grad():
        at.model.weight.zero_()
    step(at)
    assert mask_of(at)[0][0] == 0


def test_global_scope_ranks_all_layers_together(train_attached):
    method = GradualMagnitudePruning(scope="global", end=0.5, frequency=1, revive="never")
    at = train_attached(method)
    shares = {n: int(m.sum()) / m.numel() for n, m in at.masks.items()}
    assert max(shares.values()) > 2 * min(shares.values())


# what becomes of removed weights


@pytest.mark.parametrize(("revive", "expected"), [("frozen", [1, 0, 1]), ("never", [1, 1, 0])])
def test_revival_example_of_the_card(revive, expected):
    at = attach(
        torch.tensor([[0.5, 0.4, 0.3]]), "sparsity=0.34", initial=1 / 3, end=1.0, revive=revive
    )
    assert mask_of(at) == [[1, 1, 0]]
    assert at.model.weight.tolist() == [[0.5, pytest.approx(0.4), 0.0]]
    with torch.no_grad():
        at.model.weight[0, 1] = 0.2
    step(at)
    assert mask_of(at) == [expected]
    revived = 0.3 if revive == "frozen" else 0.0
    assert at.model.weight[0, 2].item() == pytest.approx(revived)


def test_frozen_values_do_not_decay_and_removed_weights_stay_zero(train_attached):
    seen = []
    method = GradualMagnitudePruning(frequency=1)

    def watch(at):
        for name, mask in at.masks.items():
            assert not at.params[name][~mask].any()
            assert not at.extra["shadow"][name][mask].any()
        seen.append({n: s.clone() for n, s in at.extra["shadow"].items()})

    at = train_attached(method, after=watch, weight_decay=0.1, momentum=0.9)
    for before, after in pairwise(seen):
        for name in before:
            both = (before[name] != 0) & (after[name] != 0)
            assert torch.equal(before[name][both], after[name][both])
    assert "shadow" not in at.extra


def test_gradients_of_removed_weights_are_exactly_zero(train_attached):
    def watch(at):
        if at.step:
            for name, mask in before.items():
                assert not at.params[name].grad[~mask].any()
        before.update({n: m.clone() for n, m in at.masks.items()})

    before = {}
    at = train_attached(GradualMagnitudePruning(frequency=1), after=watch)
    assert at.masks.sparsity > 0.8


def test_finalizing_changes_neither_the_forward_pass_nor_the_keys(digits_task, run_steps):
    model = digits_task.fresh_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    at = sc.create("gmp").attach(model, optimizer, "sparsity=0.9", 30)
    run_steps(model, optimizer, 0, 30)
    before = model(digits_task.example_inputs)
    outcome = at.finalize()
    assert torch.equal(model(digits_task.example_inputs), before)
    assert list(model.state_dict()) == list(digits_task.fresh_model(0).state_dict())
    assert outcome.masks.kept == round(0.1 * outcome.masks.total)
    weights = model[0].weight.clone()
    run_steps(model, optimizer, 0, 1)
    assert int((model[0].weight != 0).sum()) > int((weights != 0).sum())


# resume


@pytest.mark.parametrize("revive", ["frozen", "never"])
@pytest.mark.parametrize("interrupt", [1, 22, 44, 50])
def test_a_run_resumed_in_mid_ramp_gives_the_same_masks(train_attached, revive, interrupt):
    method = GradualMagnitudePruning(revive=revive, frequency=3)
    whole = train_attached(method)
    resumed = train_attached(method, interrupt=interrupt)
    assert all(torch.equal(whole.masks[n], resumed.masks[n]) for n in whole.masks)
    assert all(torch.equal(whole.params[n], resumed.params[n]) for n in whole.params)


def test_a_resumed_run_gives_frozen_weights_back(train_attached):
    """Strong decay lets survivors shrink below weights that were cut before the interruption."""
    method, seen = GradualMagnitudePruning(frequency=3), []
    fields = {"weight_decay": 0.3, "after": lambda at: seen.append(at.masks.clone())}
    whole = train_attached(method, **fields)
    cut, last = (~seen[22]["0.weight"], seen[-1]["0.weight"])
    assert (cut & last).any()
    resumed = train_attached(method, interrupt=22, **fields)
    assert all(torch.equal(whole.masks[n], resumed.masks[n]) for n in whole.masks)
    assert all(torch.equal(whole.params[n], resumed.params[n]) for n in whole.params)


def test_a_state_in_memory_is_not_changed_by_further_training(digits_task, run_steps):
    model = digits_task.fresh_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    at = GradualMagnitudePruning(frequency=1).attach(model, optimizer, "sparsity=0.9", 40)
    run_steps(model, optimizer, 0, 20)
    state = at.state_dict()
    before = {n: s.clone() for n, s in state["extra"]["shadow"].items()}
    run_steps(model, optimizer, 20, 40)
    at.finalize()
    assert all(torch.equal(state["extra"]["shadow"][n], before[n]) for n in before)


class KilledError(Exception):
    """Somebody pulled the plug."""


class Killer:
    """Listens to the training and ends it at a step."""

    def __init__(self, step):
        self.step = step

    def advance(self, label, done):
        if done == self.step:
            raise KilledError

    def begin(self, label, total): ...

    def end(self, label): ...

    def event(self, kind, values): ...


def test_a_killed_training_goes_on_from_its_snapshot(digits_task, trained, tmp_path):
    def prune(folder, *listeners):
        work = Workspace(folder, listeners, snapshot_seconds=0)
        return sc.prune(trained, "gmp", "sparsity=0.9", digits_task, work=work, frequency=3)

    with pytest.raises(KilledError):
        prune(tmp_path / "killed", Killer(50))
    resumed, whole = prune(tmp_path / "killed"), prune(None)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    assert all(torch.equal(resumed.masks[n], whole.masks[n]) for n in whole.masks)


# layers of their own


def test_overrides_hold_for_their_layers_and_the_total_is_exact(train_attached):
    method = GradualMagnitudePruning(overrides={r"^4\.": 0.5, r"^2\.": 0.0}, frequency=1)
    at = train_attached(method, budget="sparsity=0.7")
    kept = at.masks.kept_by_tensor()
    assert kept["4.weight"] == 80
    assert kept["2.weight"] == 512
    assert at.masks.kept == at.masks.total - round(0.7 * at.masks.total)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"^4": 0.5, "weight": 0.5}, r"one pattern that matches 4\.weight"),
        ({"^9": 0.5}, r"a pattern of one of 0\.weight, 2\.weight, 4\.weight"),
        ({"^0": 0.0}, "leave room for 272 weights"),
    ],
)
def test_overrides_that_cannot_be_are_refused(train_attached, overrides, message):
    with pytest.raises(InputError, match=message):
        train_attached(GradualMagnitudePruning(overrides=overrides), steps=1)


def test_excluded_layers_stay_dense_and_out_of_the_count(train_attached):
    at = train_attached(GradualMagnitudePruning(exclude=("^0",), frequency=1))
    assert list(at.masks) == ["2.weight", "4.weight"]
    assert at.masks.kept == 672 - round(0.9 * 672)
    assert at.model[0].weight.all()


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"initial": 1.0}, "initial"),
        ({"frequency": 0}, "frequency"),
        ({"power": 0.0}, "power"),
        ({"overrides": {"^0": 1.0}}, "overrides ^0"),
        ({"block": (0, 2)}, "block"),
        ({"block": (2, 2), "pool": "mean"}, "pool"),
        ({"block": (2, 2), "scope": "global"}, "scope"),
    ],
)
def test_bad_options_are_refused_by_name(options, argument):
    with pytest.raises(InputError) as caught:
        GradualMagnitudePruning(**options)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"begin": -1}, "begin"),
        ({"begin": 0.5, "end": 0.25}, "end"),
        ({"end": 11}, "end"),
        ({"initial": 0.95}, "initial"),
    ],
)
def test_ramps_outside_the_training_are_refused_and_leave_no_hook(options, argument):
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(InputError) as caught:
        GradualMagnitudePruning(**options).attach(layer, optimizer, "sparsity=0.9", 10)
    assert caught.value.argument == argument
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("position", "expected"), [(0, 0), (0.25, 10), (1, 40), (1.0, 40), (2, 2), (39, 39)]
)
def test_positions_are_fractions_up_to_one_and_steps_above(position, expected):
    assert at_step(position, 40) == expected


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 2000), st.integers(1, 3000))
def test_a_ramp_has_twenty_updates_where_there_is_room(one, other, frequency, steps):
    begin, end, period = ramp_steps(*sorted((one, other)), frequency, steps)
    assert 0 <= begin <= end <= steps
    assert 1 <= period <= frequency
    assert (end - begin) // period >= min(20, end - begin)


# blocks


def test_block_oracle_of_the_card():
    tiles = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    weight = tiles.repeat_interleave(2, 0).repeat_interleave(2, 1) * torch.tensor([1, -1, 1, -1])
    at = attach(weight, "sparsity=0.5", block=(2, 2), end=0.0)
    assert mask_of(at) == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(("pool", "survivor"), [("avg", 0), ("max", 1)])
def test_tiles_are_ranked_by_mean_or_maximum(pool, survivor):
    weight = torch.tensor([[3.0, 3.0, 5.0, 0.1]])
    at = attach(weight, "sparsity=0.5", block=(1, 2), pool=pool, end=0.0)
    assert mask_of(at)[0][2 * survivor] == 1
    assert sum(mask_of(at)[0]) == 2


@pytest.mark.parametrize("shape", [(5, 5), (1, 7), (7, 1), (3, 4)])
def test_blocks_at_the_edge_are_cut_off_and_never_fail(shape):
    at = attach(torch.randn(shape), "sparsity=0.5", block=(2, 2), end=0.0)
    tiles = nn.functional.max_pool2d(
        at.masks["weight"][None, None].float(), 2, ceil_mode=True
    )  # 1 where anything of a tile is left
    back = tiles[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)[: shape[0], : shape[1]]
    assert torch.equal(at.masks["weight"], back.bool())


def test_convolutions_are_not_cut_in_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = GradualMagnitudePruning(block=(2, 2), end=0.0)
    at = method.attach(model, optimizer, "sparsity=0.5", 4)
    scores = model[0].weight.abs()
    assert int(at.masks["0.weight"].sum()) == 72
    assert scores[at.masks["0.weight"]].min() > scores[~at.masks["0.weight"]].max()
    assert int(at.masks["2.weight"].sum()) == 32
