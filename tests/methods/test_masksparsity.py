"""MaskSparsity: thresholds and votes in closed form, the pull at the doomed, the cut."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.analysis.recalibration import recalibrate
from secateurs.errors import InputError
from secateurs.methods.channels.masksparsity import (
    doomed_scales,
    majority,
    optimal_threshold,
    reach,
    spared,
)
from secateurs.parts.scales import add_l1_subgradient_, norm_scales
from secateurs.structure.surgery import shorten
from secateurs.training.keeping import BeforeStep
from secateurs.zoo.catalog import make_task
from secateurs.zoo.convolutional import convnet
from secateurs.zoo.resnets import cifar_resnet

from .conftest import KilledError, Killer

STILL = sc.TrainSettings(steps=0)


@pytest.fixture
def task(normalized_task):
    return replace(
        normalized_task,
        training=sc.TrainSettings(steps=20, lr=0.1),
        finetuning=sc.TrainSettings(steps=5),
    )


def images_task(make, **settings):
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(16) % 10), 16)
    fields = {"training": STILL, "finetuning": STILL, **settings}
    return sc.classification(make, loader, loader, **fields)


def make_conv():
    return convnet((1, 8, 8), 10, config=(12, "M", 16, 10))


def make_residual():
    return cifar_resnet((1, 8, 8), 10, 0.5, depth=8)


def scattered(make, seed=0):
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
    return model


# --- thresholds and votes ---------------------------------------------------------------------


def test_the_optimal_threshold_leaves_the_energy():
    scale = torch.tensor([0.5, -1e-4, 0.6, 1e-3], dtype=torch.float64)
    assert optimal_threshold(scale, 1e-4) == pytest.approx(0.2505)
    assert int((scale.abs() > optimal_threshold(scale, 1e-4)).sum()) == 2


def test_a_layer_that_is_dead_goes_but_for_the_least():
    dead = torch.tensor([1e-4, 9e-4, 0.0])
    assert optimal_threshold(dead, 1e-4) == 1.0
    assert spared(dead <= 1.0, dead, 1).tolist() == [True, False, True]


def test_nothing_goes_where_the_smallest_is_too_much():
    assert optimal_threshold(torch.tensor([0.5, 0.5, 0.6]), 1e-4) == 0.0


@settings(deadline=None)
@given(st.lists(st.floats(0.002, 10), min_size=2, max_size=20), st.floats(1e-6, 0.5))
def test_what_goes_has_no_more_than_its_share(values, delta):
    scale = torch.tensor(values, dtype=torch.float64)
    gone = scale <= optimal_threshold(scale, delta)
    squares = scale.square()
    # equal values fall on the threshold together
    strictly = scale < optimal_threshold(scale, delta)
    assert float(squares[strictly].sum()) <= delta * float(squares.sum()) * (1 + 1e-9)
    assert not bool(spared(gone, scale, 1).all())


def proposals(*sets, units=5):
    return torch.stack([torch.tensor([u in s for u in range(units)]) for s in sets])


def test_the_vote_of_a_group():
    gone = majority(proposals({0, 1, 2}, {1, 2}, {2, 3}))
    assert gone.nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("sets", "wanted"),
    [
        ([{0, 3}], [0, 3]),
        ([{0, 1}, {2, 3}], [0, 1, 2, 3]),
        ([{0, 1}, set()], []),
        ([{4}, {4}, {4}], [4]),
    ],
)
def test_other_votes(sets, wanted):
    assert majority(proposals(*sets)).nonzero().flatten().tolist() == wanted


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=5))
def test_a_vote_gives_at_least_the_most_modest_proposal(sets):
    gone = majority(proposals(*sets))
    assert int(gone.sum()) >= min(map(len, sets))
    assert {u for u in range(5) if gone[u]} <= set().union(*sets)


@pytest.mark.parametrize("least", [1, 2, 3])
def test_the_floor_spares_the_largest_and_of_equals_the_first(least):
    gone = torch.ones(4, dtype=torch.bool)
    kept = (~spared(gone, torch.zeros(4), least)).nonzero().flatten().tolist()
    assert kept == list(range(least))
    scale = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert (~spared(gone, scale, 2)).nonzero().flatten().tolist() == [1, 3]


def test_how_far_a_training_reaches():
    recipe = sc.TrainSettings(lr=0.1, momentum=0.9, schedule="step", milestones=(0.5,))
    assert reach(recipe, 10) == pytest.approx((5 * 0.1 + 5 * 0.01) / 0.1)


# --- the masked training ----------------------------------------------------------------------


def test_the_pull_moves_the_doomed_scales_and_nothing_else(task):
    """One step of SGD without momentum: γ of what goes differs by −lr · s · sign(γ)."""
    once = sc.TrainSettings(steps=1, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    seen = {}

    class Watching(type(task)):
        def measure(self, model, loader=None):
            seen[len(seen)] = {n: p.detach().clone() for n, p in model.named_parameters()}
            return super().measure(model, loader)

    own = Watching(**{**vars(task), "training": once, "finetuning": STILL})
    model = scattered_perceptron(task)
    found = {}
    for strength in (0.5, 0.0):
        seen.clear()
        outcome = sc.prune(
            model, "masksparsity", "params=0.6", own, trained=True, criterion="scales",
            strength=strength, recalibration=0,
        )  # fmt: skip
        found[strength] = seen[1]
    cut = outcome.surgery[0]["tensors"]
    moved = 0
    for name, value in found[0.0].items():
        expected = value.clone()
        if name in norm_scales(model):
            gone = torch.ones(len(value), dtype=torch.bool)
            if name in cut:
                gone[cut[name]["0"]] = False
                expected[gone] -= 0.1 * 0.5 * norm_scales(model)[name].detach().sign()[gone]
                moved += int(gone.sum())
        torch.testing.assert_close(found[0.5][name], expected, rtol=0, atol=1e-6)
    assert moved > 5


def scattered_perceptron(task):
    model = task.fresh_model(0)
    with torch.no_grad():
        for number, scale in enumerate(norm_scales(model).values()):
            scale.copy_(torch.linspace(-0.7, 1.3, len(scale)) + 0.01 * number)
    return model


def test_nothing_doomed_is_training_as_usual_to_the_bit(task):
    outcome = sc.prune(task.fresh_model(0), "masksparsity", "macs=1", task, criterion="l1")
    model = task.fresh_model(0)
    for _ in ("baseline", "masked"):
        sc.fit(model, task, task.training)
    assert outcome.history[1]["loss"] == task.measure(model)["loss"]


def test_the_sparse_run_is_network_slimming_to_the_bit(task):
    outcome = sc.prune(task.fresh_model(0), "masksparsity", "macs=0.6", task, strength=0.01)
    model = task.fresh_model(0)
    sc.fit(model, task, task.training)

    def attach(net, optimizer, _):
        scales = norm_scales(net)
        return [BeforeStep(optimizer, lambda: add_l1_subgradient_(scales, 0.01))]

    sc.fit(model, task, task.training, attach=attach)
    assert outcome.history[1] == {"stage": "sparse", **task.measure(model)}


def test_the_masked_run_starts_where_it_is_told_to(task):
    one, two = (
        sc.prune(task.fresh_model(0), "masksparsity", "macs=0.6", task, strength=0.05, start=s)
        for s in ("baseline", "current")
    )
    assert one.history[:2] == two.history[:2]
    assert one.history[2] != two.history[2]
    doomed = [r["largest"] for r in one.tables["scales"]]
    kept = [r["mean of the kept"] for r in two.tables["scales"]]
    assert len(doomed) == len(kept) == 2


def test_the_doomed_come_to_zero_and_the_kept_do_not(task):
    own = replace(task, training=sc.TrainSettings(steps=60, lr=0.1))
    outcome = sc.prune(
        task.fresh_model(0), "masksparsity", "params=0.5", own, strength=0.2, criterion="l1"
    )
    assert not outcome.notes
    for row in outcome.tables["scales"]:
        assert row["largest"] < 0.05
        assert row["mean of the kept"] > 0.7


def test_a_pull_that_is_too_short_is_noted(task):
    outcome = sc.prune(task.fresh_model(0), "masksparsity", "params=0.5", task)
    [note] = outcome.notes
    assert note.startswith("the pull can move a scale by 0.0")
    needed = float(note.rpartition(" ")[2])
    assert needed == pytest.approx(5e-4 * 3 * 1 / (5e-4 * reach(task.training, 20)), rel=0.2)


# --- the cut ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-0.2, 0.3])
def test_what_is_at_zero_goes_without_a_trace_once_the_norms_are_taken_anew(shift):
    """γ = 0 and β ≤ 0: exact. β > 0: a constant is lost, which the next norm's mean takes up."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5),
        nn.ReLU(), nn.Linear(5, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        dense[1].weight[:3], dense[1].bias[:3] = 0, shift
    data = DataLoader(TensorDataset(torch.randn(64, 6), torch.zeros(64)), 32)
    recalibrate(dense, data)
    small = copy.deepcopy(dense)
    structure = sc.axes(small, torch.randn(2, 6))
    kept = {structure["0"].axis: range(3, 8)}
    doomed = doomed_scales(structure, {structure["0"].axis: torch.arange(3, 8).numpy()},
                           norm_scales(small))  # fmt: skip
    assert {n: d.tolist() for n, d in doomed.items()} == {"1.weight": [True] * 3 + [False] * 5}
    small = shorten(structure.trace, kept).model
    x = torch.randn(9, 6)
    same = torch.allclose(small(x), dense(x), atol=1e-5)
    assert same == (shift < 0)
    recalibrate(small, data)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["budget", "fixed", "optimal"])
def test_members_of_a_stream_lose_the_same_units_and_the_network_trains(rule):
    task = images_task(make_residual, finetuning=sc.TrainSettings(steps=2))
    outcome = sc.prune(
        scattered(make_residual), "masksparsity", "macs=0.6", task, trained=True, rule=rule,
        criterion="scales", theta=0.4, delta=0.05, cut="again",
    )  # fmt: skip
    net = outcome.model
    first, later = net.stages[0][0], net.stages[2][0]
    assert net.norm.num_features == first.norm2.num_features < 8
    assert later.norm2.num_features == later.shortcut[1].num_features
    assert outcome.after.parameters < outcome.before.parameters
    assert outcome.promise.kept == (rule == "budget")
    if rule != "budget":
        assert any("MISSED" in note for note in outcome.notes)


def test_the_vote_decides_on_a_stream():
    """Two members; θ takes what both propose, as the more modest proposes no more."""
    model = scattered(make_residual)
    with torch.no_grad():
        for scale in norm_scales(model).values():
            scale.fill_(1.0)
        model.norm.weight[:3] = 0.0
        model.stages[0][0].norm2.weight[2:4] = 0.0
    outcome = sc.prune(
        model, "masksparsity", "macs=0.9", images_task(make_residual), trained=True,
        rule="fixed", criterion="scales",
    )  # fmt: skip
    # votes 1 1 2 1, modest 2: one unit has two votes, so all four with one go
    assert outcome.surgery[0]["axes"] == {"conv": [4, 5, 6, 7]}


@pytest.mark.parametrize("least", [1, 3])
def test_a_layer_of_zeros_keeps_the_least(least):
    model = scattered(make_conv)
    with torch.no_grad():
        model.features[2].norm.weight.zero_()
    outcome = sc.prune(
        model, "masksparsity", "macs=0.5", images_task(make_conv), trained=True,
        rule="fixed", criterion="scales", least=least,
    )  # fmt: skip
    assert outcome.surgery[0]["axes"]["features.2.conv"] == list(range(least))


def test_a_uniform_mask_takes_the_same_share_of_every_layer():
    outcome = sc.prune(
        scattered(make_conv), "masksparsity", "macs=0.5", images_task(make_conv), trained=True,
        criterion="l1", scope="local",
    )  # fmt: skip
    shares = [row["kept"] / row["total"] for row in outcome.tables["axes"]]
    assert max(shares) - min(shares) < 0.1


@pytest.mark.parametrize("criterion", ["sparse", "scales", "l1", "random"])
def test_budgets_are_reached_within_a_percent(criterion):
    make = lambda: convnet((1, 8, 8), 10, config=(24, "M", 32, 32))  # noqa: E731
    for kind in ("macs", "params", "density"):
        outcome = sc.prune(
            scattered(make), "masksparsity", f"{kind}=0.5", images_task(make), trained=True,
            criterion=criterion,
        )  # fmt: skip
        cost = {"macs": "macs"}.get(kind, "parameters")
        reached = getattr(outcome.after, cost) / getattr(outcome.before, cost)
        assert outcome.promise.kept
        assert 0.5 - 0.03 < reached <= 0.5
        assert abs(outcome.promise.asked - outcome.promise.reached) <= outcome.promise.tolerance


def test_chance_is_of_the_seed(task):
    def kept(seed):
        outcome = sc.prune(
            task.fresh_model(0), "masksparsity", "macs=0.5", task, seed=seed, criterion="random"
        )
        return outcome.surgery[0]["axes"]

    assert kept(1) == kept(1) != kept(2)


# --- as a method ------------------------------------------------------------------------------


def test_a_killed_run_goes_on_with_the_same_bits(task, tmp_path):
    def run(*listeners, folder=None):
        work = sc.Workspace(folder, listeners, snapshot_seconds=0.0)
        return sc.prune(task.fresh_model(0), "masksparsity", "macs=0.6", task, work=work)

    whole = run()
    with pytest.raises(KilledError):
        run(Killer("masked", 7), folder=tmp_path)
    rest = Killer()
    outcome = run(rest, folder=tmp_path)
    assert rest.seen[0] == ("masked", 7)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, outcome.model.state_dict()[name])
    assert outcome.history == whole.history


def test_by_name_on_a_residual_network_and_back_from_disk(tmp_path):
    task = make_task(
        "zoo:resnet-8?width=0.5", "digits?limit=200", training=sc.TrainSettings(steps=3),
        finetuning=sc.TrainSettings(steps=2),
    )  # fmt: skip
    outcome = sc.prune(task.fresh_model(0), "masksparsity", "macs=0.7", task)
    assert [row["stage"] for row in outcome.history] == [
        "baseline", "sparse", "masked", "removal", "fine-tuning",
    ]  # fmt: skip
    assert outcome.metrics_before == {k: v for k, v in outcome.history[0].items() if k != "stage"}
    sc.save(outcome, tmp_path / "out")
    read = sc.load(tmp_path / "out", task.fresh_model(1))
    assert task.measure(read.model) == outcome.metrics_after


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strength": -1.0}, "strength"),
        ({"theta": -0.1}, "theta"),
        ({"delta": 1.0}, "delta"),
        ({"least": 0}, "least"),
        ({"recalibration": -1}, "recalibration"),
        ({"kind": "l0"}, "kind"),
        ({"criterion": "l1", "rule": "fixed"}, "rule: got 'fixed'"),
    ],
)
def test_bad_options_are_refused(task, options, named):
    with pytest.raises(InputError, match=named):
        sc.prune(task.fresh_model(0), "masksparsity", "macs=0.5", task, **options)


def test_what_no_training_can_help_is_refused_before_it(task):
    ear = Killer()
    work = sc.Workspace(None, (ear,))
    with pytest.raises(InputError, match="at least .*, what the floors leave"):
        sc.prune(task.fresh_model(0), "masksparsity", "params=0.001", task, work=work)
    bare = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10))
    with pytest.raises(InputError, match="no scale along one that can be shortened"):
        sc.prune(bare, "masksparsity", "params=0.5", task, work=work)
    assert not ear.seen
