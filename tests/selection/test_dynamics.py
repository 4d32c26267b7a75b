"""Scores out of trainings: closed forms, autograd, hand-made runs; watching, kills, resuming."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.selection import dynamics as dy

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 6, generator=GENERATOR)
Y = (X[:, 0] + 0.5 * torch.randn(60, generator=GENERATOR) > 0).long() + (X[:, 1] > 0.8).long()


def make():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def task(**fields):
    data = TensorDataset(X[:40], Y[:40])
    made = sc.classification(
        make, DataLoader(data, 8, shuffle=True), DataLoader(TensorDataset(X[40:], Y[40:]), 16),
        training=sc.TrainSettings(epochs=4, lr=0.1),
    )  # fmt: skip
    return replace(made, **fields)


# ------------------------------------------------------------ closed forms


def test_el2n_in_closed_form():
    def of(logits, label):
        return float(dy.el2n(torch.tensor([logits], dtype=torch.float64), torch.tensor([label])))

    assert of([0.0, 0.0], 0) == pytest.approx(math.sqrt(0.5))
    for classes in (2, 5, 10):
        assert of([3.0] * classes, 1) == pytest.approx(math.sqrt(1 - 1 / classes))
    assert of([900.0, 0.0, 0.0], 0) == 0
    assert of([900.0, 0.0, 0.0], 2) == pytest.approx(math.sqrt(2))


def test_margins_in_closed_form_and_without_labels():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2]]))
    assert torch.allclose(dy.margins(logits), torch.tensor([0.2, 0.7, 0.0]), atol=1e-6)


def gradient_norms(model, own, names, inputs=X):
    found = []
    for x, y in zip(inputs[:40], Y[:40], strict=True):
        model.zero_grad()
        own.loss(model(x[None]), y[None]).backward()
        squares = [p.grad.square().sum() for n, p in model.named_parameters() if n in names]
        found.append(float(torch.stack(squares).sum().sqrt()))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_grand_is_the_norm_that_autograd_has(bias):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3, bias=bias)
    ).double()  # fmt: skip
    model(torch.randn(32, 6, dtype=torch.float64) + 1)  # running statistics of their own
    own = task(train=DataLoader(TensorDataset(X[:40].double(), Y[:40]), 16))
    whole = dy.read_rows(own, model, dy.read_grand, own.train)
    last = dy.read_rows(own, model, dy.read_last_layer_grand, own.train)
    assert model.training, "the mode was not put back"
    model.eval()
    every = [n for n, _ in model.named_parameters()]
    assert torch.allclose(whole, gradient_norms(model, own, every, X.double()), rtol=1e-10)
    ends = [n for n in every if n.startswith("4.")]
    assert torch.allclose(last, gradient_norms(model, own, ends, X.double()), rtol=1e-10)


def test_grand_of_a_fixed_layer_counts_the_others_only():
    model, own = make(), task()
    model[0].requires_grad_(False)
    read = dy.read_rows(own, model, dy.read_grand, dy.in_order(own.train))
    assert torch.allclose(read, gradient_norms(model.eval(), own, ["3.weight", "3.bias"]), 1e-4)


def test_last_layer_grand_refuses_a_model_that_does_not_end_in_one():
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU())
    with pytest.raises(InputError, match="ends in a linear layer"):
        dy.read_rows(task(), model, dy.read_last_layer_grand, task().train)


# ------------------------------------------------------------ accumulators


def forgetting_of(sequence, never_learned="inf"):
    counted = dy.Forgetting(1)
    for correct in sequence:
        counted.see_correct(torch.tensor([0]), torch.tensor([bool(correct)]))
    return counted.scores(never_learned)[0]


def test_forgetting_events_of_known_sequences():
    assert forgetting_of([1, 0, 1, 1, 0, 0, 1]) == 2
    assert forgetting_of([0, 0, 0]) == math.inf
    assert forgetting_of([0, 0, 0], "zero") == 0
    assert forgetting_of([0, 1, 1]) == 0, "a first wrong answer forgets nothing"


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_forgetting_counts_as_a_loop_would_whatever_the_batches(shown):
    counted = dy.Forgetting(5)
    for correct in shown:
        for rows in ([3, 0], [4, 1, 2]):
            counted.see_correct(torch.tensor(rows), torch.tensor([correct[r] for r in rows]))
    for row in range(5):
        own = [correct[row] for correct in shown]
        events = sum(a and not b for a, b in pairwise(own))
        assert counted.scores()[row] == (events if any(own) else math.inf)


def test_online_errors_are_summed_over_the_first_presentations_only():
    counted = dy.ErrorSums(3, 2)
    logits = torch.zeros(2, 4)
    for rows in ([0, 1], [0, 2], [0, 1]):
        counted.see(torch.tensor(rows), logits, torch.tensor([0, 3]))
    assert counted.scores() == pytest.approx(math.sqrt(0.75) * np.array([2, 2, 1]), rel=1e-6)


def test_memorization_of_four_runs_made_by_hand():
    member = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1]]).bool()
    right = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0]]).bool()
    whole = dy.Memorization(2)
    for one, other in zip(member, right, strict=True):
        whole.see_run(one, other)
    assert whole.scores() == pytest.approx([1 - 0.5, 2 / 3 - 0])
    first, second = dy.Memorization(2), dy.Memorization(2)
    for number, (one, other) in enumerate(zip(member, right, strict=True)):
        (first if number % 2 else second).see_run(one, other)
    first.add(second)
    assert np.array_equal(first.scores(), whole.scores())
    assert whole.known.tolist() == [True, True]


def test_a_row_that_every_run_had_has_no_estimate():
    counted = dy.Memorization(3)
    for member in ([1, 0, 1], [1, 0, 0]):
        counted.see_run(torch.tensor(member).bool(), torch.tensor([True, True, True]))
    assert counted.known.tolist() == [False, False, True]
    assert counted.scores().tolist() == [0, 0, 0]


@given(st.integers(2, 7), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_influences_are_those_of_two_loops(runs, rows, tests, seed):
    draw = np.random.default_rng(seed)
    member, right = draw.random((runs, rows)) < 0.6, draw.random((runs, tests)) < 0.5
    change = np.zeros((rows, tests))
    for i in [i for i in range(rows) if len(set(member[:, i])) == 2]:
        for t in range(tests):
            shares = [right[member[:, i] == had, t] for had in (True, False)]
            inside, outside = (s.mean() for s in shares)
            change[i, t] = inside - outside
    made = [torch.from_numpy(member), torch.from_numpy(right)]
    assert dy.influences(*made, "max") == pytest.approx(change.max(1))
    assert dy.influences(*made, "sum-abs") == pytest.approx(abs(change).sum(1))


# ------------------------------------------------------------ trainings


class Sequence:
    """Remembers all that it is told."""

    def __init__(self):
        self.rows, self.right = [], []

    def see(self, rows, logits, target):
        assert torch.equal(target, Y[rows])
        self.rows.append(rows)
        self.right.append(logits.argmax(1) == target)

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


def test_a_watched_training_is_the_training_and_shows_every_row_every_epoch():
    own, told = task(), Sequence()
    plain, watched = own.fresh_model(0), own.fresh_model(0)
    sc.fit(plain, own, own.training, seed=1)
    watch = dy.Watch(own, [told])
    sc.fit(watched, watch.task, own.training, seed=1, attach=watch.attach, evaluate_every=3)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    rows = torch.cat(told.rows)
    assert len(rows) == 4 * 40
    for epoch in rows.split(40):
        assert sorted(epoch.tolist()) == list(range(40))


class KilledError(Exception):
    pass


class KillAt:
    def __init__(self, step):
        self.step = step

    def event(self, kind, values): ...
    def begin(self, label, total): ...
    def end(self, label): ...
    def advance(self, label, done):
        if done == self.step and "forgetting" in label:
            raise KilledError


def test_forgetting_goes_on_after_a_kill_with_the_same_counts(tmp_path):
    whole = dy.forgetting_scores(task(), seed=2)
    work = sc.Workspace(tmp_path, [KillAt(12)], snapshot_seconds=0)
    with pytest.raises(KilledError):
        dy.forgetting_scores(task(), seed=2, work=work)
    again = sc.Workspace(tmp_path, snapshot_seconds=0)
    assert np.array_equal(dy.forgetting_scores(task(), seed=2, work=again), whole)
    assert np.array_equal(dy.forgetting_scores(task(), seed=2, work=again), whole)
    assert set(whole[np.isfinite(whole)]) != {0.0}, "nothing was forgotten: the test says little"


def test_early_scores_are_the_means_of_the_runs_and_are_kept(tmp_path):
    own, work = task(), sc.Workspace(tmp_path)
    found = dy.early_scores(own, dy.read_el2n, runs=2, epoch=1, seed=5, work=work)
    expected = []
    for run in range(2):
        seed = dy.mix(5, run)
        model = own.fresh_model(seed)
        sc.fit(model, own, own.training, seed=seed, stop_step=5)
        model.eval()
        with torch.no_grad():
            expected.append(dy.el2n(model(X[:40]), Y[:40]))
    assert found == pytest.approx(torch.stack(expected).mean(0).numpy(), abs=1e-6)
    poisoned = task(model=lambda: 1 / 0)
    again = dy.early_scores(poisoned, dy.read_el2n, runs=2, epoch=1, seed=5, work=work)
    assert np.array_equal(found, again)
    three = dy.early_scores(own, dy.read_el2n, runs=3, epoch=1, seed=5, work=work)
    assert not np.array_equal(found, three)


def test_early_is_a_twentieth_of_the_training_but_at_least_an_epoch():
    own = task()
    assert dy.early_step(own, own.training, None) == 5
    assert dy.early_step(own, sc.TrainSettings(epochs=200), None) == 50
    assert dy.early_step(own, sc.TrainSettings(steps=3), None) == 3
    with pytest.raises(InputError, match="epoch: got 5"):
        dy.early_step(own, own.training, 5)


def test_online_scores_are_those_of_one_training():
    found = dy.online_el2n_scores(task(), epochs=2, seed=1)
    assert found.shape == (40,)
    assert (found > 0).all()
    assert (found < 2 * math.sqrt(2)).all()
    with pytest.raises(InputError, match="epoch"):
        dy.online_el2n_scores(task(), epochs=5)


def test_members_of_runs_are_about_the_ratio_and_go_by_run_and_seed():
    members = torch.stack([dy.members_of(4000, 0.7, 1, run) for run in range(4)]).double()
    assert (members.mean(1) - 0.7).abs().max() < 0.03
    assert not torch.equal(members[0], members[1])
    together = (members[0] * members[1]).mean()
    assert abs(float(together) - 0.49) < 0.03, "runs are not independent"
    assert torch.equal(dy.members_of(10, 0.7, 1, 0), dy.members_of(4000, 0.7, 1, 0)[:10])


def test_what_only_training_on_it_teaches_is_memorized(tmp_path):
    draw = torch.randn(36, 6, generator=torch.Generator().manual_seed(1)).abs() + 1
    inputs = draw * torch.tensor([1.0] * 30 + [-1.0] * 6)[:, None]
    target = torch.cat([torch.zeros(30), torch.tensor([1.0] * 6)]).long()
    inputs[0], target[0] = torch.tensor([5.0, 0, 0, 0, 0, 0]), 1  # nothing else tells of it
    train = DataLoader(TensorDataset(inputs, target), 6, shuffle=True)
    held_out = DataLoader(TensorDataset(inputs[1:9] + 0.1, target[1:9]), 8)
    own = task(train=train, evaluate=held_out, training=sc.TrainSettings(epochs=25, lr=0.1))
    found = dy.subset_runs(own, runs=8, seed=0, work=sc.Workspace(tmp_path))
    scores = found.memorization().scores()
    assert abs(scores[1:]).max() < 0.3 < scores[0]
    poisoned = replace(own, model=lambda: 1 / 0)
    work = sc.Workspace(tmp_path)
    assert np.array_equal(dy.memorization_scores(poisoned, runs=8, work=work), scores)
    influence = dy.influence_scores(poisoned, "sum-abs", runs=8, work=work)
    assert influence.shape == (36,)
    assert (influence >= dy.influence_scores(poisoned, "max", runs=8, work=work) - 1e-12).all()


@pytest.mark.parametrize(("call", "told"), [
    (lambda: dy.memorization_scores(task(), runs=1), "at least 2, for memorization"),
    (lambda: dy.memorization_scores(task(), runs=2, ratio=1.0), "ratio"),
    (lambda: dy.early_scores(task(), dy.read_el2n, runs=0), "runs"),
    (lambda: dy.early_scores(task(), dy.read_el2n, epoch=9), "at most 4, the epochs"),
    (lambda: dy.early_scores(task(), dy.read_el2n, epoch=0), "above 0"),
    (lambda: dy.class_logits(torch.zeros(3, 4, 5)), r"outputs of shape \(3, 4, 5\)"),
    (lambda: dy.class_logits(torch.full((2, 2), math.nan)), "NaN or Inf"),
    (lambda: dy.ErrorSums(3, 0), "presentations"),
    (lambda: dy.Forgetting(3).load_state_dict(dy.Forgetting(4).state_dict()), "4 rows"),
])  # fmt: skip
def test_it_refuses_what_cannot_be_scored(call, told):
    with pytest.raises(InputError, match=told):
        call()
