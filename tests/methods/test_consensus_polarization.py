"""Consensus gates: costs against removal, extraction against gates held fixed, both variants."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.channels.consensus_polarization import Blocks, Channels
from secateurs.outcome import Outcome
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import measure_cost
from secateurs.registry import create
from secateurs.structure.cost import structure_cost
from secateurs.training.gates import Gated, Votes, votes
from secateurs.zoo.catalog import make_task
from secateurs.zoo.resnets import ResNet

from .conftest import KilledError, Killer

SHORT = sc.TrainSettings(steps=12, lr=0.05)


def make_residual():
    """Two blocks a stage, the first of the second stage with a projection."""
    return ResNet(1, (6, 8), (2, 2), 10)


def make_plain():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 10),
    )  # fmt: skip


def make_task_of(make, samples=24, **settings):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 1, 8, 8, generator=generator)
    images += 2 * torch.randn(samples, 1, 1, 1, generator=generator)  # what gates can tell apart
    loader = DataLoader(TensorDataset(images, torch.arange(samples) % 10), 8, shuffle=True)
    return sc.classification(make, loader, loader, **{"training": SHORT, **settings})


def gateable(kind, model, task, budget):
    structure = sc.axes(model, task.example_inputs)
    parsed = Budget.parse(budget)
    cost = structure_cost(structure, parsed, task.example_inputs)
    return Blocks(structure, cost, parsed) if kind == "blocks" else Channels(structure, cost)


def fixed_votes(switches, seed=0):
    """Every other unit, drawn anew for every switch, is open for all samples."""
    generator = torch.Generator().manual_seed(seed)
    opened = {}
    for switch in switches:
        units = torch.zeros(switch.units, dtype=torch.float64)
        order = torch.randperm(switch.units, generator=generator)
        units[order[: max(1, switch.units // 2)]] = 1.0
        opened[switch.name] = units
    if all(len(o) == 1 for o in opened.values()):  # blocks: every other one
        opened = {n: torch.full((1,), float(i % 2)) for i, n in enumerate(opened)}
    return Votes(opened, {n: o.clone() for n, o in opened.items()}, 24)


def hold(gated, vote):
    """Make the gates constants."""
    for name, gate in zip(gated.names, gated.gates.children(), strict=True):
        nn.init.zeros_(gate.decide.weight)
        gate.decide.bias.data = (40 * vote.open[name] - 20).to(gate.decide.bias.dtype)


CASES = [("blocks", make_residual), ("channels", make_residual), ("channels", make_plain)]


@pytest.mark.parametrize(("kind", "make"), CASES)
@pytest.mark.parametrize("budget", ["macs=0.5", "params=0.5"])
def test_the_extracted_model_is_the_gated_one_with_its_gates_held(kind, make, budget):
    """Outputs, what all samples agree on, and the share that the penalty sees, against removal."""
    torch.manual_seed(0)
    model, task = make().double().eval(), make_task_of(make)
    task = replace(task, example_inputs=task.example_inputs.double())
    dense = measure_cost(model, task.example_inputs)
    found = gateable(kind, model, task, budget)
    gated = Gated(model, found.switches)
    vote = fixed_votes(found.switches)
    hold(gated, vote)
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    wanted, means = gated.eval()(x), gated.means()
    share = float(found.share(means).detach())
    gated.ungated()
    outcome = Outcome(model)
    choice, _ = found.extract(outcome, vote, 0.5)
    torch.testing.assert_close(outcome.model(x), wanted, rtol=1e-10, atol=1e-10)
    after = measure_cost(outcome.model, task.example_inputs)
    left, whole = (
        (after.macs, dense.macs) if budget.startswith("macs") else
        (after.parameters, dense.parameters)
    )  # fmt: skip
    assert choice.cost == left < whole
    everything = {n: torch.ones_like(m) for n, m in means.items()}
    nothing = {n: torch.zeros_like(m) for n, m in means.items()}
    assert float(found.share(everything)) == pytest.approx(1.0)
    assert float(found.share(nothing)) == pytest.approx(0.0, abs=1e-12)
    assert found.budget == pytest.approx((whole / 2 - (left - share * (whole - left) / (1 - share)))
                                         / ((whole - left) / (1 - share)))  # fmt: skip


@pytest.mark.parametrize(("kind", "make"), CASES)
def test_the_share_is_differentiable_and_grows_with_every_unit(kind, make):
    model, task = make(), make_task_of(make)
    found = gateable(kind, model, task, "macs=0.5")
    means = {s.name: torch.full((s.units,), 0.6, requires_grad=True) for s in found.switches}
    found.share(means).backward()
    for mean in means.values():
        assert bool((mean.grad > 0).all())


def test_the_share_of_blocks_is_their_costs():
    task = make_task_of(make_residual)
    found = gateable("blocks", make_residual(), task, "macs=0.8")
    means = dict.fromkeys(found.blocks, torch.zeros(1))
    for path, block in found.blocks.items():
        share = float(found.share({**means, path: torch.ones(1)}))
        assert share == pytest.approx(block.macs / sum(b.macs for b in found.blocks.values()))


@pytest.mark.parametrize("kind", ["blocks", "channels"])
def test_by_the_vote_half_is_open_and_a_layer_keeps_a_channel(kind):
    model, task = make_residual(), make_task_of(make_residual)
    found = gateable(kind, model, task, "macs=0.5")
    shares = {s.name: torch.full((s.units,), 0.4999) for s in found.switches}
    first = found.switches[0].name
    shares[first][:3] = 0.5
    vote = Votes(shares, {n: s.clone() for n, s in shares.items()}, 24)
    outcome = Outcome(model)
    found.extract(outcome, vote, 0.5)
    if kind == "blocks":
        assert list(outcome.surgery[0]["layers"]) == [s.name for s in found.switches[1:]]
    else:
        kept = outcome.surgery[0]["axes"]
        assert kept == {first: [0, 1, 2], **{s.name: [0] for s in found.switches[1:]}}


@pytest.mark.parametrize("kind", ["blocks", "channels"])
def test_by_the_budget_the_least_voted_for_go_and_no_more_than_need_be(kind):
    model, task = make_residual(), make_task_of(make_residual)
    whole = measure_cost(model, task.example_inputs).macs
    found = gateable(kind, model, task, "macs=0.6")
    generator = torch.Generator().manual_seed(3)
    shares = {s.name: torch.rand(s.units, generator=generator) for s in found.switches}
    vote = Votes(shares, shares, 24)
    outcome = Outcome(model)
    choice, kept = found.extract(outcome, vote, None)
    assert sum(kept.values()) < sum(s.units for s in found.switches)
    assert choice.cost == measure_cost(outcome.model, task.example_inputs).macs <= 0.6 * whole
    assert choice.cost_before_last > 0.6 * whole
    if kind == "blocks":
        gone = [vote.open[n].item() for n in outcome.surgery[0]["layers"]]
        stay = [s.item() for n, s in shares.items() if n not in outcome.surgery[0]["layers"]]
        assert max(gone) < min(stay)


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["blocks", "channels"])
def test_wide_open_gates_without_weights_train_like_the_task(kind):
    """λ = 0 and q = 1: not a bit differs, and nothing is removed."""
    task = make_task_of(make_residual)
    outcome = sc.prune(
        task.fresh_model(0), "consensus-polarization", "macs=1", task, units=kind,
        act_weight=0.0, polar_weight=0.0, open_bias=40.0,
    )  # fmt: skip
    model = task.fresh_model(0)
    sc.fit(model, task, task.training)
    for name, tensor in model.state_dict().items():
        assert torch.equal(outcome.model.state_dict()[name], tensor), name
    assert outcome.history[0]["defect"] == 0
    assert outcome.after.macs == outcome.before.macs


def trained(task, **options):
    outcome = sc.prune(task.fresh_model(0), "consensus-polarization", "macs=0.6", task, **options)
    return outcome.model.state_dict(), outcome


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())


def test_the_penalty_closes_down_to_the_budget():
    task = make_task_of(make_plain, training=sc.TrainSettings(steps=40, lr=0.05))
    _, free = trained(task, act_weight=0.0, polar_weight=0.0, extract="vote")
    _, bound = trained(task, act_weight=4.0, polar_weight=4.0, extract="vote")
    assert sum(r["voted open"] for r in free.tables["gates"]) == 19
    assert bound.after.macs <= 0.62 * bound.before.macs


def test_the_polarisation_makes_samples_agree():
    task = make_task_of(make_plain, training=sc.TrainSettings(steps=30, lr=0.05))
    start = {"open_bias": 0.0, "act_weight": 0.0, "extract": "vote"}
    split, agreed = (
        trained(task, polar_weight=weight, **start)[1].history[0]["defect"]
        for weight in (0.0, 20.0)
    )
    assert split >= 0.05
    assert agreed <= split / 3


def test_what_is_within_the_budget_costs_nothing_under_the_hinge_alone():
    once = make_task_of(make_plain, training=sc.TrainSettings(steps=2, lr=0.05))

    def after(**options):
        outcome = sc.prune(
            once.fresh_model(0), "consensus-polarization", "macs=1", once, polar_weight=0.0,
            **options,
        )  # fmt: skip
        return outcome.tables["gates"], outcome.metrics_after

    still = after(act_weight=0.0)
    assert after(act_weight=50.0) == still
    assert after(act_weight=50.0, penalty="mean") != still


def test_the_polarisation_may_rise_from_zero():
    """On the first step of a ramp it has no weight yet."""
    once = make_task_of(make_plain, training=sc.TrainSettings(steps=1, lr=0.05))
    start = {"open_bias": 0.0, "act_weight": 0.0, "extract": "vote"}
    ramped, _ = trained(once, polar_weight=100.0, polar_ramp=1.0, **start)
    without, _ = trained(once, polar_weight=0.0, **start)
    at_once, _ = trained(once, polar_weight=100.0, **start)
    assert same(ramped, without)
    assert not same(at_once, without)


@pytest.mark.parametrize("option", [{"cost": "count"}, {"noise": 2.0}])
def test_other_options_train_otherwise(option):
    task = make_task_of(make_plain)
    plain, _ = trained(task, act_weight=20.0)
    other, outcome = trained(task, act_weight=20.0, **option)
    assert not same(plain, other)
    assert outcome.promise.kept


def test_the_vote_may_be_held_before_the_end():
    ear = Killer()
    task = make_task_of(make_plain)
    work = sc.Workspace(None, (ear,))
    _, outcome = trained(task, settle=0.25, work=work)
    assert ear.seen == [("gated", s) for s in range(9)] + [("settled", s) for s in range(9, 12)]
    assert outcome.history[1]["loss"] != outcome.history[2]["loss"]
    assert outcome.promise.kept


def test_gates_that_do_not_agree_are_noted():
    task = make_task_of(make_plain, training=sc.TrainSettings(steps=3, lr=0.01))
    _, outcome = trained(task, open_bias=0.0)
    assert outcome.history[0]["defect"] > 0.01
    assert any(n.startswith("the gates do not agree: consensus defect 0.") for n in outcome.notes)


def test_a_budget_that_is_met_against_the_vote_is_noted():
    """Gates that are all open, and a training too short to close any."""
    task = make_task_of(make_plain, training=sc.TrainSettings(steps=1, lr=0.01))
    _, outcome = trained(task)
    rows = outcome.tables["gates"]
    assert sum(row["voted open"] for row in rows) == 19
    against = 19 - sum(row["kept"] for row in rows)
    assert any(n.startswith(f"{against} of 19 units were closed against") for n in outcome.notes)


def test_units_that_are_opened_against_the_vote_are_noted():
    """Gates that are all closed: what the budget leaves is opened all the same."""
    task = make_task_of(make_plain, training=sc.TrainSettings(steps=1, lr=0.01))
    _, outcome = trained(task, open_bias=-3.0)
    rows = outcome.tables["gates"]
    assert sum(row["voted open"] for row in rows) == 0
    against = sum(row["kept"] for row in rows)
    assert any(n.startswith(f"{against} of 19 units were opened against") for n in outcome.notes)


# --- as a method ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "stage"), [("blocks", ("gated", 5)), ("channels", ("settled", 10))]
)
def test_a_killed_run_goes_on_with_the_same_bits(units, stage, tmp_path):
    task = make_task_of(make_residual)

    def run(*listeners, folder=None):
        work = sc.Workspace(folder, listeners, snapshot_seconds=0.0)
        return trained(task, units=units, settle=0.25, polar_ramp=0.5, work=work)

    whole, first = run()
    with pytest.raises(KilledError):
        run(Killer(*stage), folder=tmp_path)
    rest = Killer()
    again, second = run(rest, folder=tmp_path)
    assert rest.seen[0] == stage
    assert same(whole, again)
    assert first.history == second.history


@pytest.mark.parametrize("units", ["blocks", "channels"])
def test_by_name_on_a_residual_network_and_back_from_disk(units, tmp_path):
    task = make_task("zoo:resnet-8?width=0.5", "digits?limit=200", training=SHORT)
    outcome = sc.prune(task.fresh_model(0), "consensus-polarization", "macs=0.7", task, units=units)
    assert outcome.promise.kept
    assert outcome.after.macs <= 0.7 * outcome.before.macs
    assert outcome.after.parameters < outcome.before.parameters
    assert not any("decide" in name for name, _ in outcome.model.named_parameters())
    sc.save(outcome, tmp_path / "out")
    read = sc.load(tmp_path / "out", task.fresh_model(1))
    assert task.measure(read.model) == outcome.metrics_after


def test_a_run_that_fails_in_place_gives_the_model_back_without_gates():
    task = make_task_of(make_residual)
    model = task.fresh_model(0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KilledError):
        sc.prune(
            model, "consensus-polarization", "macs=0.6", task, inplace=True,
            work=sc.Workspace(None, (Killer("gated", 3),)),
        )  # fmt: skip
    assert same(before, model.state_dict())
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_extraction_is_deterministic():
    task = make_task_of(make_residual)
    model = task.fresh_model(0)
    found = gateable("channels", model, task, "macs=0.5")
    gated = Gated(model, found.switches, open_bias=0.0)
    one, two = votes(gated, task, 0), votes(gated, task, 0)
    assert all(torch.equal(o, two.order[n]) for n, o in one.order.items())
    assert 0 < one.defect == two.defect


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"units": "layers"}, "units"),
        ({"hidden": 0}, "hidden"),
        ({"polar_weight": -1.0}, "polar_weight"),
        ({"polar_ramp": 1.5}, "polar_ramp"),
        ({"act_weight": -1.0}, "act_weight"),
        ({"noise": -1.0}, "noise"),
        ({"threshold": 0.0}, "threshold"),
        ({"settle": 1.0}, "settle"),
    ],
)
def test_bad_options_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        create("consensus-polarization", options)


def test_what_no_gate_can_do_is_refused_before_the_training():
    ear = Killer()
    work = sc.Workspace(None, (ear,))

    def pruned(make, budget, **options):
        task = make_task_of(make)
        sc.prune(task.fresh_model(0), "consensus-polarization", budget, task, work=work, **options)

    with pytest.raises(InputError, match="Sequential without residual blocks"):
        pruned(make_plain, "macs=0.5", units="blocks")
    with pytest.raises(InputError, match=r"at least \d+, what no block is part of"):
        pruned(make_residual, "macs=0.01", units="blocks")
    with pytest.raises(InputError, match="at least .*, what the floors leave"):
        pruned(make_plain, "macs=0.0001")
    with pytest.raises(InputError, match="none of them to be gated"):
        pruned(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "macs=0.5")
    assert not ear.seen
