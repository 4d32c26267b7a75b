"""Iterative rounds: what is removed, what is put back, and that a killed run goes on."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.masks import Masks
from secateurs.parts.prunable import prunable_parameters
from secateurs.state import model_state
from secateurs.training.loop import fit
from secateurs.training.rounds import (
    iterative_rounds,
    masked_state,
    random_masks_like,
    remove_smallest,
    remove_smallest_overall,
)
from secateurs.workspace import Workspace


def ones(model):
    return Masks.ones_like(prunable_parameters(model))


def a_quarter(weights, masks, number):
    return remove_smallest(weights, masks, {n: int(m.sum()) // 4 for n, m in masks.items()})


def nothing(weights, masks, number):
    return dict(masks)


def run(task, remove=a_quarter, rounds=2, **options):
    model = task.fresh_model(3)
    return iterative_rounds(model, ones(model), task, remove, rounds, **options)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


twenty = st.lists(st.integers(-9, 9), min_size=20, max_size=20)


@given(twenty, st.lists(st.booleans(), min_size=20, max_size=20), st.data())
def test_exactly_the_smallest_survivors_go(values, kept, data):
    """Against sorting: ties go to the later position, what is gone stays gone."""
    weights, masks = {"w": torch.tensor(values).float()}, {"w": torch.tensor(kept)}
    count = data.draw(st.integers(0, sum(kept)))
    new = remove_smallest(weights, masks, {"w": count})["w"].tolist()
    survivors = sorted((i for i in range(20) if kept[i]), key=lambda i: (abs(values[i]), -i))
    assert new == [kept[i] and i not in survivors[:count] for i in range(20)]


@given(twenty, twenty, st.integers(0, 40))
def test_over_all_tensors_the_smallest_of_all_go(first, second, count):
    weights = {"a": torch.tensor(first).float(), "b": torch.tensor(second).float()}
    new = remove_smallest_overall(weights, Masks.ones_like(weights), count)
    every = sorted(abs(v) for v in first + second)
    removed = sorted(float(v) for n in "ab" for v in weights[n][~new[n]].abs())
    assert removed == every[:count]


def test_a_round_that_empties_a_layer_is_noted(tiny_task, recorder):
    """Layers [1, 2, 3] and [10, 20, 30], half of all removed: nothing is left of the first."""
    weights = {"small": torch.tensor([1.0, 2.0, 3.0]), "large": torch.tensor([10.0, 20.0, 30.0])}
    new = remove_smallest_overall(weights, Masks.ones_like(weights), 3)
    assert Masks(new).empty_tensors() == ["small"]

    def drop_the_last(trained, masks, number):
        return {**masks, "4.weight": torch.zeros_like(masks["4.weight"])}

    ear = recorder()
    run(tiny_task(steps=2), drop_the_last, 1, work=Workspace(listeners=[ear]))
    assert [e["text"] for e in ear.of("note")] == ["round 1 leaves nothing of 4.weight"]


def test_masks_are_nested_and_of_the_size_asked_for(tiny_task):
    tickets = run(tiny_task(), rounds=3)
    for before, after in zip(tickets.rounds, tickets.rounds[1:], strict=False):
        for name, mask in after.masks.items():
            assert not bool((mask & ~before.masks[name]).any())
            old = int(before.masks[name].sum())
            assert int(mask.sum()) == old - old // 4


@pytest.mark.parametrize("rewind", [0, 7])
def test_what_a_round_starts_from_is_the_rewound_state(tiny_task, rewind):
    """Survivors, biases, normalisation and running statistics are those of step k, bit for bit."""
    task = tiny_task()
    tickets = run(task, rewind_step=rewind)
    early = task.fresh_model(3)
    fit(early, task, task.training, stop_step=rewind)
    assert_same(tickets.rewound, model_state(early))
    state, masks = tickets.ticket(2)
    for name, tensor in state.items():
        kept = masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor[kept], tickets.rewound[name][kept])
        assert not bool(tensor[~kept].any())
    last = task.fresh_model(3)
    last.load_state_dict(state)
    trained_by_hand(last, masks, task, rewind)
    assert_same(model_state(last), tickets.rounds[2].trained)


def trained_by_hand(model, masks, task, start):
    """A fresh optimizer over the ticket from step k on, without the rounds."""
    from secateurs.training.keeping import MaskKeeper

    fit(
        model,
        task,
        task.training,
        start_step=start,
        attach=lambda net, optimizer, _: [MaskKeeper(net, optimizer, masks)],
    )


def test_no_rounds_are_an_ordinary_training(tiny_task):
    task = tiny_task()
    model = task.fresh_model(3)
    fit(model, task, task.training)
    assert_same(run(task, rounds=0).rounds[-1].trained, model_state(model))


def test_removing_nothing_changes_nothing(tiny_task):
    tickets = run(tiny_task(), nothing, rounds=2)
    for later in tickets.rounds[1:]:
        assert_same(later.trained, tickets.rounds[0].trained)


def test_the_optimizer_starts_empty_unless_its_state_is_kept(tiny_task):
    """With Adam moments kept from step k, removing nothing is one uninterrupted training."""
    task = tiny_task(optimizer="adam", lr=0.01)
    whole = task.fresh_model(3)
    fit(whole, task, task.training)
    kept = run(task, nothing, rounds=1, rewind_step=9, keep_optimizer=True)
    for done in kept.rounds:
        assert_same(done.trained, model_state(whole))
    fresh = run(task, nothing, rounds=1, rewind_step=9)
    assert not torch.equal(fresh.rounds[0].trained["0.weight"], whole.state_dict()["0.weight"])


def test_reset_at_the_end_trains_on_in_between(tiny_task):
    task = tiny_task()
    each, end = run(task), run(task, reset="end")
    assert_same(each.rounds[0].trained, end.rounds[0].trained)
    middle = task.fresh_model(3)
    middle.load_state_dict(masked_state(end.rounds[0].trained, end.rounds[1].masks))
    trained_by_hand(middle, end.rounds[1].masks, task, 0)
    assert_same(end.rounds[1].trained, model_state(middle))
    last = task.fresh_model(3)
    last.load_state_dict(end.ticket(2)[0])
    trained_by_hand(last, end.rounds[2].masks, task, 0)
    assert_same(end.rounds[2].trained, model_state(last))


def test_the_early_stopping_step_is_that_of_least_loss(tiny_task):
    tickets = run(tiny_task(), rounds=0, evaluate_every=5)
    done = tickets.rounds[0]
    best = min(done.evaluations, key=lambda e: e[1]["loss"])
    assert [step for step, _ in done.evaluations] == [5, 10, 15, 20, 25, 30]
    assert done.record()["early_stop_step"] == best[0]
    assert done.record()["early_stop_accuracy"] == best[1]["accuracy"]


def test_until_ends_the_rounds(tiny_task):
    tickets = run(tiny_task(), rounds=9, until=lambda done: done.masks.density < 0.7)
    assert [r.masks.kept for r in tickets.rounds] == [176, 132, 99]


@pytest.mark.parametrize(("name", "stop_at"), [("to-rewind", 2), ("round-0", 20), ("round-1", 11)])
def test_killed_rounds_go_on_to_the_same_bits(tiny_task, recorder, tmp_path, name, stop_at):
    task = tiny_task(noise=0.5)
    whole = run(task, rewind_step=5)
    ear = recorder()
    heard = ear.event

    def event(kind, values):
        inside = name in (values["at"], values.get("stage"))
        ear.stop_at = stop_at if inside else None
        heard(kind, values)

    ear.event = event
    with pytest.raises(KeyboardInterrupt):
        run(task, rewind_step=5, work=Workspace(tmp_path, [ear], snapshot_seconds=0.0))
    again = recorder()
    resumed = run(task, rewind_step=5, work=Workspace(tmp_path, [again]))
    for one, two in zip(whole.rounds, resumed.rounds, strict=True):
        assert_same(one.trained, two.trained)
        assert one.record() == two.record()
    trainings = ["to-rewind", "round-0", "round-1", "round-2"]
    heard_again = [(e["at"] or e["stage"], e["step"]) for e in again.of("train")]
    made_again = list(dict.fromkeys(where for where, _ in heard_again))
    assert made_again == trainings[trainings.index(name) :]
    assert heard_again[0] == (name, stop_at), "it went on at another step"


def test_refusals(tiny_task):
    task = tiny_task()
    with pytest.raises(InputError, match="rewind_step: got 30"):
        run(task, rewind_step=30)
    with pytest.raises(InputError, match="rounds: got -1"):
        run(task, rounds=-1)
    with pytest.raises(InputError, match="reset: got 'never'"):
        run(task, reset="never")
    with pytest.raises(InputError, match="leaves at least one weight"):
        run(task, lambda w, masks, _: {n: torch.zeros_like(m) for n, m in masks.items()})

    def revive(weights, masks, number):
        return a_quarter(weights, masks, 0) if number == 0 else dict(ones(task.fresh_model(0)))

    with pytest.raises(InputError, match="masks within those of the round before"):
        run(replace(task, training=replace(task.training, steps=2)), revive)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_random_masks_have_the_counts_of_the_given(scope):
    masks = Masks({"a": torch.rand(40, 30) > 0.3, "b": torch.rand(20, 10) > 0.8})
    drawn = random_masks_like(masks, 5, scope=scope)
    assert drawn.kept == masks.kept
    assert (drawn.kept_by_tensor() == masks.kept_by_tensor()) == (scope == "layer")
    assert not torch.equal(drawn["a"], masks["a"])
    assert torch.equal(drawn["a"], random_masks_like(masks, 5, scope=scope)["a"])
    assert not torch.equal(drawn["a"], random_masks_like(masks, 6, scope=scope)["a"])
    # about as many of the old ones are hit as chance says, 1200 · 0.7 · 0.7 in the layer scope
    if scope == "layer":
        hit = int((drawn["a"] & masks["a"]).sum()) / int(masks["a"].sum())
        assert hit == pytest.approx(int(masks["a"].sum()) / 1200, abs=0.06)
