"""PAGCP: the decay, the order, the visits against an exhaustive replay, the bound, the budget."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.channels.pagcp import (
    PerformanceAwareChannelPruning,
    Trial,
    Visit,
    efficient,
    removable,
    solve_decay,
    visit_units,
    visiting_order,
    within,
)
from secateurs.structure.axes import Structure
from secateurs.structure.surgery import shorten
from secateurs.structure.trace import trace
from secateurs.task import multitask
from secateurs.zoo.catalog import make_task
from secateurs.zoo.resnets import cifar_resnet

RATIOS = [round(0.05 * k, 2) for k in range(1, 20)]


@pytest.mark.parametrize(
    ("first", "units", "factor", "decay"),
    [
        (0.1, 2, 1.2, (1.2 / 1.1 - 1) / 0.1),
        (0.1, 3, 1.331, 1.0),
        (0.06, 60, 6.0, 0.973794),
        (0.05, 10, 1.5, 0.957210),
        (0.05, 60, 5.0, 0.976971),
        (0.05, 3, 5.0, None),
    ],
)
def test_the_decay_makes_the_product_the_factor(first, units, factor, decay):
    found = solve_decay(first, units, factor)
    product = np.prod([1 + first * found**i for i in range(units)])
    assert product == pytest.approx(factor, rel=1e-9)
    if decay is not None:
        assert found == pytest.approx(decay, abs=1e-6)


@pytest.mark.parametrize(("first", "units", "factor"), [(0.5, 4, 1.5), (0.1, 1, 2.0)])
def test_a_factor_that_no_decay_reaches_is_refused(first, units, factor):
    with pytest.raises(InputError, match="total_factor|solve"):
        solve_decay(first, units, factor)


def test_units_are_visited_by_the_macs_they_save():
    saved = {"a": 10.0, "b": 30.0, "c": 20.0}
    assert visiting_order(saved, 0.9) == ["b", "c", "a"]
    assert visiting_order(saved, 1.0) == ["b", "c", "a"]
    assert visiting_order(saved, 1.04) == ["a", "c", "b"]


def first_units(unit, removed):
    return np.arange(100)


def visits_of(evaluate, size, ratios=RATIOS, first=0.05, decay=1.0, **options):
    return visit_units(
        list(size), size, first_units, evaluate, ratios=ratios, first=first, decay=decay, **options
    )


def test_a_loss_that_never_changes_vetoes_nothing():
    visits = visits_of(lambda removed: {"still": 3.0}, {"a": 20, "b": 40})
    assert [v.count for v in visits] == [19, 38]
    assert [v.ratio for v in visits] == [0.95, 0.95]


def test_a_loss_that_doubles_vetoes_everything():
    def doubles(removed):
        return {"still": 1.0, "doubles": 1.0 if not removed else 2.0}

    visits = visits_of(doubles, {"a": 20, "b": 40}, decay=0.5)
    assert [(v.count, v.allowance, len(v.tried)) for v in visits] == [(0, 0.05, 1), (0, 0.05, 1)]
    assert efficient(visits, {}, 1.0) == {}


def test_ratios_that_remove_nothing_are_not_evaluated():
    asked = []

    def evaluate(removed):
        asked.append({unit: len(gone) for unit, gone in removed.items()})
        return {"loss": 1.0 + 0.02 * sum(map(len, removed.values()))}

    [visit] = visits_of(evaluate, {"a": 8}, first=0.05)
    # 0.05 and 0.10 of 8 are none, 0.15 and 0.20 are one, 0.25 to 0.35 are two, 0.40 three
    assert asked == [{}, {"a": 1}, {"a": 2}, {"a": 3}]
    assert (visit.ratio, visit.count) == (0.25, 2)
    assert [ratio for ratio, _ in visit.tried] == [0.15, 0.25, 0.4]


def test_what_was_accepted_stays_removed_for_later_units():
    seen = []

    def evaluate(removed):
        seen.append({unit: len(gone) for unit, gone in removed.items()})
        return {"loss": 1.0}

    visits_of(evaluate, {"a": 20, "b": 20}, ratios=[0.5, 0.95])
    assert seen == [{}, {"a": 10}, {"a": 19}, {"a": 19, "b": 10}, {"a": 19, "b": 19}]


def test_the_public_code_forgets_a_unit_of_which_all_ratios_pass():
    seen = []

    def evaluate(removed):
        seen.append({unit: len(gone) for unit, gone in removed.items()})
        return {"loss": 1.0}

    visits = visits_of(evaluate, {"a": 20, "b": 20}, ratios=[0.5, 0.95], decay=0.5, published=True)
    assert seen == [{}, {"a": 10}, {"a": 19}, {"b": 10}, {"b": 19}]
    assert [(v.count, v.allowance) for v in visits] == [(19, 0.05), (19, 0.05)]


def test_the_public_code_looks_the_ratio_up_where_it_is_not():
    """0.1 and 0.2 of four are none; 0.3 and 0.4 are one, and the second of the list is 0.2."""

    def evaluate(removed):
        return {"loss": 1.0 if sum(map(len, removed.values())) < 2 else 3.0}

    ratios = [0.1, 0.2, 0.3, 0.4, 0.5]
    [ours] = visits_of(evaluate, {"a": 4}, ratios=ratios)
    [theirs] = visits_of(evaluate, {"a": 4}, ratios=ratios, published=True)
    assert (ours.ratio, ours.count) == (0.3, 1)
    assert (theirs.ratio, theirs.count) == (0.2, 0)


def replay(table, size, ratios, first, decay):
    """The rules of the card, written down once more without any sharing."""
    base, theta, counts, found = dict(table[0, 0]), first, {"a": 0, "b": 0}, []
    for unit in ("a", "b"):
        best = 0
        for ratio in ratios:
            count = min(int(ratio * size[unit] + 1e-9), size[unit] - 1)
            if not count:
                continue
            trial = {**counts, unit: count}
            losses = table[trial["a"], trial["b"]]
            if max(losses[k] / base[k] for k in base) > 1 + theta:
                break
            best = count
        found.append((unit, best, theta))
        if best:
            counts[unit] = best
            base = {k: max(base[k], table[counts["a"], counts["b"]][k]) for k in base}
            theta *= decay
    return found


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0.8, 1.4), min_size=32, max_size=32),
    first=st.floats(0.01, 0.4),
    decay=st.floats(0.3, 1.5),
)
def test_visits_equal_an_exhaustive_replay(values, first, decay):
    size, ratios = {"a": 4, "b": 4}, [0.25, 0.5, 0.75]
    cells = [(a, b) for a in range(4) for b in range(4)]
    table = {c: {"x": values[2 * i], "y": values[2 * i + 1]} for i, c in enumerate(cells)}

    def evaluate(removed):
        return table[len(removed.get("a", ())), len(removed.get("b", ()))]

    visits = visits_of(evaluate, size, ratios, first, decay)
    assert [(v.unit, v.count, v.allowance) for v in visits] == replay(
        table, size, ratios, first, decay
    )
    bound = np.prod([1 + v.allowance for v in visits if v.count])
    last = evaluate({v.unit: range(v.count) for v in visits if v.count})
    assert all(last[k] <= bound * table[0, 0][k] * (1 + 1e-9) for k in last)


def visit(unit, rise, count=1):
    return Visit(unit, 0.5, count, 0.05, {}, rise, [])


def test_the_cheapest_units_are_kept():
    visits = [visit("a", 0.4), visit("b", 0.1), visit("c", 0.3), visit("d", 0.0, count=0)]
    saved = {"a": 100.0, "b": 10.0, "c": 100.0}
    assert list(efficient(visits, saved, 1.0)) == ["c", "a", "b"]
    assert list(efficient(visits, saved, 0.5)) == ["c", "a"]
    assert list(efficient(visits, saved, 0.1)) == ["c"]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    prices=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    share=st.floats(0, 1),
)
def test_what_the_target_allows_is_given_back_from_the_last_unit_on(counts, prices, share):
    asked = {str(i): c for i, c in enumerate(counts)}

    def cost(given):
        return 200 - sum(prices[int(u)] * c for u, c in given.items())

    target = 200 - share * (200 - cost(asked))
    left = within(asked, cost, target)
    assert cost(left) <= target
    assert all(0 < left[u] <= asked[u] for u in left)
    for unit, count in left.items():
        assert cost({**left, unit: count - 1}) > target  # not one more could be given back
    if target == 200:
        assert not left


def test_the_least_efficient_units_are_spared_first():
    def cost(given):
        return 10 - sum(given.values())

    assert within({"good": 2, "fair": 2, "bad": 2}, cost, 7) == {"good": 2, "fair": 1}
    assert within({"bad": 2, "fair": 2, "good": 2}, cost, 4) == {"bad": 2, "fair": 2, "good": 2}


def test_a_loss_that_says_nothing_is_refused():
    for loss in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="loss quiet"):
            visits_of(lambda removed, loss=loss: {"loss": 1.0, "quiet": loss}, {"a": 4})
    visits = visits_of(lambda removed: {"quiet": 0.001 * len(removed)}, {"a": 20}, floor=0.01)
    assert visits[0].count == 19


def images(count=48, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 1, 8, 8, generator=generator, dtype=dtype)


class Trunk(nn.Module):
    """A trunk with a residual sum that serves two heads."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.back, self.norm = nn.Conv2d(10, 12, 3, padding=1), norm(12)
        self.label, self.pixel = nn.Linear(12, 4), nn.Conv2d(12, 1, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.norm(x + self.back(self.inner(x).relu())).relu()
        return self.label(x.mean((2, 3))), self.pixel(x)


def two_tasks(make=Trunk, finetuning=None):
    x = images()
    data = DataLoader(TensorDataset(x, torch.arange(48) % 4), 16)
    losses = {
        "label": lambda out, target: F.cross_entropy(out[0], target[0]),
        "pixel": lambda out, target: F.mse_loss(out[1], target[1]),
    }
    right = sc.Metric(lambda out, target: (out[0].argmax(1) == target[0]).double())
    return multitask(
        lambda: make().double(), data, data, losses, {"accuracy": right}, example_inputs=x[:1],
        split=lambda batch: (batch[0], (batch[1], batch[0])),
        finetuning=finetuning or sc.TrainSettings(steps=4, lr=0.01),
    )  # fmt: skip


def trial_of(task, model, norm="l1"):
    structure = Structure(trace(model, task.example_inputs))
    units = {g.name: g for g in structure.free}
    return Trial(structure, units, task, list(task.evaluate), norm)


def group_norm(channels):
    return nn.GroupNorm(1, channels)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group_norm])
def test_losses_of_candidates_are_those_of_the_shortened_model(norm):
    """Under zeros, or where a statistic runs over the filters on a shortened copy."""
    task = two_tasks(lambda: Trunk(norm))
    model = task.fresh_model(0).eval()
    before = copy.deepcopy(model.state_dict())
    trial = trial_of(task, model)
    assert set(trial.units) == {"stem", "inner"}
    removed = trial.removed(["inner", "stem"], {"stem": 5, "inner": 3})
    found = trial.losses(removed)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    small = shorten(trial.structure.trace, trial.kept(removed)).model
    assert found == pytest.approx(task.measure_losses(small), rel=1e-9)
    assert small.stem.out_channels == small.back.out_channels == 7
    assert set(found) == {"label", "pixel"}


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_norms_are_those_of_the_network_that_is_left(norm):
    task = two_tasks()
    model = task.fresh_model(0).eval()
    trial = trial_of(task, model, norm)
    removed = trial.removed(["inner"], {"inner": 4})
    left = trial.kept(removed)[trial.units["inner"].axis]

    def mean(weight):
        own = weight.abs().flatten(1).mean(1) if norm == "l1" else None
        return own if own is not None else weight.square().flatten(1).mean(1).sqrt()

    score = mean(model.stem.weight) + mean(model.back.weight[:, left])
    assert trial.lowest("stem", removed).tolist() == score.argsort(stable=True).tolist()
    whole = mean(model.stem.weight) + mean(model.back.weight)
    assert trial.lowest("stem", {}).tolist() == whole.argsort(stable=True).tolist()


def test_a_residual_sum_loses_the_same_filters_everywhere():
    task = two_tasks()
    outcome = sc.prune(task.fresh_model(0), "pagcp", "params=0.6", task, rounds=1, recover=False)
    kept = outcome.surgery[0]["tensors"]
    assert kept["stem.weight"]["0"] == kept["back.weight"]["0"] == kept["label.weight"]["1"]
    assert outcome.promise.kept


def test_the_probe_and_the_savings_are_macs():
    task = two_tasks()
    trial = trial_of(task, task.fresh_model(0))
    pixels, taps = 64, 9
    probed = trial.probed(0.3)
    assert probed["inner"] == 3 * (12 + 12) * taps * pixels
    assert probed["stem"] == 3 * (taps * (1 + 10 + 10) + 1) * pixels + 3 * 4
    saved = trial.saved([visit("inner", 0.1, 5), visit("stem", 0.1, 0)])
    assert saved == {"inner": 5 * 24 * taps * pixels}


@pytest.mark.parametrize("solve", [True, False])
def test_no_loss_exceeds_what_the_allowances_multiply_to(solve):
    task = two_tasks()
    model = task.fresh_model(0)
    sc.fit(model, task, sc.TrainSettings(steps=30, lr=0.05))
    trial = trial_of(task, model)
    decay = solve_decay(0.1, 2, 1.15) if solve else 1.0
    order = visiting_order(trial.probed(0.3), decay)
    visits = visit_units(
        order, trial.sizes, trial.lowest, trial.losses, ratios=RATIOS, first=0.1, decay=decay
    )
    assert any(v.count for v in visits)
    base = trial.losses({})
    last = trial.losses(trial.removed(order, {v.unit: v.count for v in visits}))
    bound = np.prod([1 + v.allowance for v in visits if v.count])
    assert all(last[k] <= bound * base[k] + 1e-6 for k in base)
    if solve:
        assert all(last[k] <= 1.15 * base[k] + 1e-6 for k in base)


def test_it_leaves_the_model_as_it_was_until_the_removal():
    task = two_tasks()
    model = task.fresh_model(0).train()
    before = copy.deepcopy(model.state_dict())
    trial = trial_of(task, model)
    visit_units(
        ["inner", "stem"], trial.sizes, trial.lowest, trial.losses,
        ratios=RATIOS, first=0.5, decay=1.0,
    )  # fmt: skip
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert all(m.training for m in model.modules())


def test_the_budget_is_reached_within_one_filter_as_rounds_go_on():
    task = two_tasks()
    model = task.fresh_model(0)
    sc.fit(model, task, sc.TrainSettings(steps=30, lr=0.05))
    outcome = sc.prune(model, "pagcp", "macs=0.3", task, rounds=3, first_drop=0.02)
    assert outcome.promise.kept
    assert outcome.after.macs <= 0.3 * outcome.before.macs
    costs = [row["cost"] for row in outcome.history]
    assert costs == sorted(costs, reverse=True)
    assert len(costs) == len(outcome.surgery) <= 3
    assert costs[-1] == outcome.promise.reached
    # each round comes its part nearer
    now, target = outcome.before.macs, outcome.promise.asked
    for number, cost in enumerate(costs):
        assert cost <= now - (now - target) / (3 - number)
        now = cost
    axes = {row["axis"]: (row["kept"], row["total"]) for row in outcome.tables["axes"]}
    assert axes["stem"] == (outcome.model.stem.out_channels, 12)
    assert axes["inner"] == (outcome.model.inner.out_channels, 10)


def test_its_own_rule_ends_the_pruning_where_it_is_asked_to():
    task = two_tasks()
    model = task.fresh_model(0)
    sc.fit(model, task, sc.TrainSettings(steps=30, lr=0.05))
    options = {"stop": "allowance", "first_drop": 1e-6, "recover": False}
    still = sc.prune(model, "pagcp", "macs=0.1", task, **options)
    assert still.after.macs == still.before.macs
    assert not still.promise.kept
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, still.model.state_dict()[name])
    wide = sc.prune(model, "pagcp", "macs=0.1", task, **{**options, "first_drop": 1e9})
    assert wide.promise.kept


def test_what_one_round_cannot_reach_the_next_does():
    """0.95 of twelve is eleven, but a ratio of 0.3 takes three."""
    task = two_tasks()
    outcome = sc.prune(
        task.fresh_model(0), "pagcp", "params=0.1", task, rounds=1, max_ratio=0.3, recover=False
    )
    assert outcome.promise.kept
    assert len(outcome.surgery) > 3


def test_several_surgeries_survive_save_and_load(tmp_path):
    task = two_tasks()
    model = task.fresh_model(0)
    sc.fit(model, task, sc.TrainSettings(steps=30, lr=0.05))
    outcome = sc.prune(model, "pagcp", "macs=0.3", task, rounds=3, first_drop=0.02)
    assert len(outcome.surgery) > 1
    sc.save(outcome, tmp_path / "out")
    read = sc.load(tmp_path / "out", task.fresh_model(1))
    assert task.measure(read.model) == outcome.metrics_after


@pytest.mark.parametrize("calibrate", ["training", "evaluation", "digits?limit=64"])
def test_calibration_samples_come_from_where_they_are_said_to(calibrate):
    task = make_task("zoo:convnet?width=0.25", "digits?limit=100&with=rotation")
    if calibrate.startswith("digits"):
        calibrate += "&with=rotation"
    outcome = sc.prune(
        task.fresh_model(0), "pagcp", "macs=0.7", task, calibrate=calibrate, batches=2, rounds=1,
        recover=False,
    )  # fmt: skip
    assert {"class loss", "rotation loss"} <= set(outcome.history[0])
    assert outcome.promise.kept


def test_a_task_of_one_loss_has_one():
    task = make_task("zoo:convnet?width=0.25", "digits?limit=100")
    outcome = sc.prune(
        task.fresh_model(0), "pagcp", "macs=0.7", task, rounds=1, exclude=("features.0",),
        recover=False,
    )  # fmt: skip
    assert "loss loss" in outcome.history[0]
    assert outcome.model.features[0].conv.out_channels == 8


def test_it_prunes_a_residual_network():
    task = replace(
        make_task("zoo:resnet-8?width=0.5", "digits?limit=64"),
        finetuning=sc.TrainSettings(steps=1),
    )
    model = cifar_resnet((1, 8, 8), 10, 0.5, depth=8)
    outcome = sc.prune(model, "pagcp", "macs=0.5", task, rounds=2, batches=1, topk=0.8)
    assert outcome.promise.kept


def test_removable_never_takes_the_last():
    assert [removable(0.95, n) for n in (2, 3, 20, 100)] == [1, 2, 19, 95]
    assert removable(0.35, 20) == 7
    assert PerformanceAwareChannelPruning().ratios == RATIOS


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"first_drop": 0.0}, "first_drop"),
        ({"drop_slope": -1.0}, "drop_slope"),
        ({"total_factor": 1.0}, "total_factor"),
        ({"total_factor": 1.04, "solve": True}, "total_factor"),
        ({"solve": True, "drop_slope": 2.0}, "total_factor"),
        ({"factor_slope": -1.0}, "factor_slope"),
        ({"topk": 0.0}, "topk"),
        ({"topk": 1.5}, "topk"),
        ({"spacing": 0.0}, "spacing"),
        ({"max_ratio": 1.0}, "max_ratio"),
        ({"probe": 1.0}, "probe"),
        ({"rounds": 0}, "rounds"),
        ({"batches": 0}, "batches"),
        ({"floor": -1.0}, "floor"),
        ({"exclude": ("stem", "inner")}, "none of them to be shortened"),
        ({"exclude": ("(",)}, "regular expression"),
        ({"calibrate": "no such data"}, "data"),
    ],
)
def test_bad_options_are_refused(options, named):
    task = two_tasks()
    with pytest.raises(InputError, match=named):
        sc.prune(task.fresh_model(0), "pagcp", "macs=0.5", task, **options)


def test_a_budget_below_one_filter_a_layer_is_refused_before_anything_is_tried():
    task = two_tasks()
    with pytest.raises(InputError, match="what a filter a layer leaves"):
        sc.prune(task.fresh_model(0), "pagcp", "macs=0.001", task)
