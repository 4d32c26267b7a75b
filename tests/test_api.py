"""prune(): one call from model to outcome, and what it leaves untouched."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import DivergedError, InputError
from secateurs.methods.weights.lottery_ticket import LotteryTicket
from secateurs.methods.weights.random_pruning import RandomPruning
from secateurs.parts.budgets import Budget


def make_net(width=1.0):
    hidden = max(1, round(16 * width))
    return nn.Sequential(
        nn.Linear(8, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 3)
    )


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(48, 8, generator=generator)
    data = TensorDataset(points, (points[:, 0] > 0).long() + (points[:, 1] > 0).long())
    return sc.classification(
        make_net,
        DataLoader(data, 8, shuffle=True),
        DataLoader(data, 48),
        training=sc.TrainSettings(steps=12),
        finetuning=sc.TrainSettings(steps=6),
        resize=make_net,
    )


def of(model):
    return copy.deepcopy(model.state_dict())


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


KINDS = ["global-mp", "gmp", "lottery-ticket", "small-dense", "rethinking-value"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", KINDS)
def test_the_users_model_is_left_untouched(task, method, training):
    model = task.fresh_model(0).train(training)
    before, generator = of(model), torch.get_rng_state()
    outcome = sc.prune(model, method, "sparsity=0.5", task)
    assert_same(before, model.state_dict())
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(generator, torch.get_rng_state())
    assert outcome.model is not model
    assert not outcome.model.training


@pytest.mark.parametrize("method", KINDS)
def test_in_place_gives_the_same_outcome(task, method):
    model = task.fresh_model(0)
    apart = sc.prune(model, method, "sparsity=0.5", task)
    inside = sc.prune(model, method, "sparsity=0.5", task, inplace=True)
    assert_same(apart.model.state_dict(), inside.model.state_dict())
    assert (inside.before, inside.after) == (apart.before, apart.after)
    assert inside.metrics_before == apart.metrics_before
    assert (inside.model is model) == (method != "small-dense")


def diverge_at(task, calls):
    """The task with a loss that is NaN from its `calls`-th evaluation on."""
    made = []

    def loss(output, target):
        made.append(0)
        return task.loss(output, target) * (torch.nan if len(made) > calls else 1.0)

    return replace(task, loss=loss)


@pytest.mark.parametrize("method", ["global-mp", "gmp", "lottery-ticket", "spa"])
def test_an_error_in_place_gives_the_weights_back(task, method):
    model = task.fresh_model(0).eval()
    before = of(model)
    with pytest.raises(DivergedError):
        sc.prune(model, method, "sparsity=0.5", diverge_at(task, 3), inplace=True)
    assert_same(before, model.state_dict())
    assert not model.training
    after = sc.prune(model, method, "sparsity=0.5", task)
    fresh = sc.prune(task.fresh_model(0), method, "sparsity=0.5", task)
    assert_same(after.model.state_dict(), fresh.model.state_dict())


def test_costs_and_metrics_are_those_of_before_and_after(task):
    model = task.fresh_model(0)
    outcome = sc.prune(model, "global-mp", "sparsity=0.75", task, with_latency=True)
    assert outcome.metrics_before == task.measure(model)
    assert outcome.metrics_after == task.measure(outcome.model)
    weights = 8 * 16 + 16 * 3
    total = sum(p.numel() for p in model.parameters())
    assert outcome.before.parameters == outcome.before.nonzero == total
    assert outcome.after.nonzero == total - weights * 3 // 4
    assert outcome.before.macs == weights
    assert outcome.after.effective_macs == weights // 4
    assert outcome.before.latency.median > 0
    assert outcome.after.latency.median > 0
    assert sc.prune(model, "global-mp", "sparsity=0.75", task).after.latency is None
    assert (outcome.method, outcome.budget, outcome.seed) == ("global-mp", "sparsity=0.75", 0)
    assert outcome.options["count"] == "exact"


def test_both_models_are_timed_in_the_engines_asked_for(task, monkeypatch):
    from secateurs.deploy import timing
    from secateurs.report.headline import ENGINES

    def broken(model, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setitem(timing.ENGINES, "compile", broken)
    model = task.fresh_model(0)
    outcome = sc.prune(
        model, "global-mp", "sparsity=0.75", task, with_latency=True, engines=["eager", "compile"]
    )
    eager, failed = outcome.tables[ENGINES]
    assert eager["promised"] == 0.25
    assert eager["dense"]["median"] == outcome.before.latency.median
    assert eager["pruned"]["median"] == outcome.after.latency.median
    assert (failed["engine"], failed["ratio"]) == ("compile", None)
    assert "not timed in compile: RuntimeError: no compiler" in outcome.notes
    only_eager = sc.prune(model, "global-mp", "sparsity=0.75", task, with_latency=True)
    assert ENGINES not in only_eager.tables
    with pytest.raises(InputError, match="did you mean 'compile'"):
        sc.prune(model, "global-mp", "sparsity=0.75", task, engines=["compiled"])


def test_without_a_task_one_shot_methods_prune_and_nothing_else_is_done():
    model = make_net()
    outcome = sc.prune(model, "global-mp", "density=0.25")
    assert outcome.promise.kept
    assert outcome.metrics_after == {}
    kept = outcome.masks
    for name, mask in kept.items():
        assert torch.equal(outcome.model.get_parameter(name), model.get_parameter(name) * mask)


def test_recovery_can_be_left_out(task):
    model = task.fresh_model(0)
    raw = sc.prune(model, "global-mp", "sparsity=0.5", task, recover=False)
    for name, mask in raw.masks.items():
        assert torch.equal(raw.model.get_parameter(name), model.get_parameter(name) * mask)
    recovered = sc.prune(model, "global-mp", "sparsity=0.5", task)
    assert recovered.metrics_after["loss"] < raw.metrics_after["loss"]


def test_methods_that_prune_before_training_recover_by_the_whole_training(task):
    """`task.training` makes 12 updates, `task.finetuning` 6."""
    assert updates(task, "random-pruning") == 12
    assert updates(task, "global-mp") == 6


def updates(task, method):
    class Ear:
        steps = 0

        def event(self, kind, values):
            self.steps += kind == "train"

        def begin(self, label, total): ...

        def advance(self, label, done): ...

        def end(self, label): ...

    ear = Ear()
    sc.prune(task.fresh_model(0), method, "sparsity=0.5", task, work=sc.Workspace(listeners=[ear]))
    return ear.steps


@pytest.mark.parametrize("budget", ["params=100", "params=0.5", "density=0.3", "sparsity=0.123"])
def test_a_promise_is_in_the_terms_of_the_budget(task, budget):
    outcome = sc.prune(task.fresh_model(0), "global-mp", budget, task)
    parsed = Budget.parse(budget)
    total = sum(p.numel() for p in outcome.model.parameters())
    assert outcome.promise.kept
    assert outcome.promise.kind == parsed.kind
    asked = parsed.value * (total if parsed.kind == "params" and parsed.relative else 1)
    assert outcome.promise.asked == pytest.approx(asked)
    zeros = sum(int((outcome.model.get_parameter(n) == 0).sum()) for n in outcome.masks)
    if parsed.kind == "params":
        assert outcome.promise.reached == total - zeros
    else:
        sparsity = zeros / outcome.masks.total
        reached = sparsity if parsed.kind == "sparsity" else 1 - sparsity
        assert outcome.promise.reached == pytest.approx(reached)


def test_a_missed_budget_is_noted(task):
    outcome = sc.prune(task.fresh_model(0), "lottery-ticket", "sparsity=0.5", task, rounds=0)
    assert not outcome.promise.kept
    assert outcome.notes == [f"budget {outcome.promise}"]


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("gmp", lambda t: None, "task: got None; accepted: a Task: gmp needs training"),
        ("gmp", lambda t: replace(t, train=None), "task.train: got None"),
        ("small-dense", lambda t: replace(t, resize=None), "task.resize: got None"),
        ("no-such", lambda t: t, "method: got 'no-such'"),
    ],
)
def test_what_is_missing_is_named(task, method, change, message):
    with pytest.raises(InputError, match=message):
        sc.prune(make_net(), method, "sparsity=0.5", change(task))


def test_options_go_with_a_name_only(task):
    model = task.fresh_model(0)
    with pytest.raises(InputError, match="options: got {'exact': False}"):
        sc.prune(model, RandomPruning(), "sparsity=0.5", task, exact=False)
    named = sc.prune(model, "random-pruning", "sparsity=0.5", task, exact=False)
    built = sc.prune(model, RandomPruning(exact=False), "sparsity=0.5", task)
    assert_same(named.model.state_dict(), built.model.state_dict())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (RandomPruning(allocation="erkk"), "allocation"),
        (LotteryTicket(scope="globl"), "scope"),
        (LotteryTicket(controls=("reinti",)), "controls"),
    ],
)
def test_method_objects_are_checked_like_names(task, method, message):
    with pytest.raises(InputError, match=message):
        sc.prune(task.fresh_model(0), method, "sparsity=0.5", task)


def test_training_pruners_built_by_hand_are_checked_too():
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sc.list_methods()["gmp"](scope="globl")
    with pytest.raises(InputError, match="scope"):
        method.attach(model, optimizer, "sparsity=0.5", 10)
