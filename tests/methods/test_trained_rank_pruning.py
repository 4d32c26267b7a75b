"""Trained rank pruning: when it cuts, what it adds, what it leaves alone, what it ends with."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import DivergedError, InputError
from secateurs.methods.ranks.trained_rank_pruning import LowRankTraining, TrainedRankPruning
from secateurs.parts.costs import count_macs
from secateurs.parts.low_rank import EnergyRule, spectrum
from secateurs.structure.factorised import Factorised
from secateurs.zoo.catalog import make_task
from secateurs.zoo.convolutional import convnet

NAME = "trained-rank-pruning"


@pytest.fixture(scope="module")
def task():
    """Three convolutions on the digits, 30 updates."""
    return make_task(
        "zoo:convnet?config=8,12,M,12", "digits", training=sc.TrainSettings(steps=30, lr=0.05)
    )


def pruned(task, budget="macs=0.6", **options):
    return sc.prune(task.fresh_model(0), NAME, budget, task, **{"period": 3, **options})


def cuts(period=1, steps=8, ranks=2, seed=0, **options):
    """Ranks of one linear weight after every step of SGD, and the hook."""
    torch.manual_seed(seed)
    layer = nn.Linear(6, 5, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    hook = LowRankTraining(
        optimizer, {"layer": layer.weight}, {"layer": "NC"},
        lambda found: {n: torch.tensor([ranks]) for n in found}, period=period, **options,
    )  # fmt: skip
    seen = [int(torch.linalg.matrix_rank(layer.weight))]
    x, y = torch.randn(20, 6).double(), torch.randn(20, 5).double()
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
        seen.append(int(torch.linalg.matrix_rank(layer.weight)))
    return seen, hook, layer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"period": 1}, [2] * 9),
        ({"period": 3}, [2, 4, 5, 2, 4, 5, 2, 4, 5]),
        ({"period": 3, "cycle": 4}, [2, 4, 5, 2, 2, 4, 5, 2, 2]),
        ({"period": 4, "total": 8}, [2, 4, 5, 5, 2, 4, 5, 5, 5]),
        ({"period": 2, "project": False}, [5] * 9),
    ],
)
def test_every_forward_pass_due_sees_low_rank_and_the_steps_lift_it(options, expected):
    """The momenta are not cut: a step may add their rank to the weight's."""
    seen, _, _ = cuts(**options)
    low = [n for n, rank in enumerate(expected) if rank == 2]
    assert [n for n, rank in enumerate(seen) if rank == 2] == low
    assert all(rank > 2 for n, rank in enumerate(seen) if n not in low)


def test_the_nuclear_term_acts_on_iterations_that_began_with_a_cut():
    """One plain step: the weight differs by −lr · λ · U Vᵀ from what it is without the term."""
    torch.manual_seed(0)
    start, x = torch.randn(4, 4).double(), torch.randn(9, 4).double()
    found = spectrum(start, "NC")

    def after(nuclear, steps):
        weight = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([weight], lr=0.5)
        LowRankTraining(
            optimizer, {"w": weight}, {"w": "NC"}, lambda _: {"w": torch.tensor([2])},
            nuclear=nuclear, period=3,
        )  # fmt: skip
        moved = [weight.detach().clone()]
        for _ in range(steps):
            optimizer.zero_grad()
            (x @ weight).sum().backward()  # the same gradient everywhere
            optimizer.step()
            moved.append(weight.detach().clone())
        return moved

    with_term, without = after(0.25, 3), after(0.0, 3)
    torch.testing.assert_close(with_term[0], found.truncated(2))
    change = without[1] - with_term[1]
    torch.testing.assert_close(change, 0.5 * 0.25 * found.nuclear_subgradient(2))
    torch.testing.assert_close(without[2] - with_term[2], change)  # no term in iteration 1


def test_a_step_without_a_gradient_is_refused():
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    LowRankTraining(
        optimizer, {"w": weight}, {"w": "NC"}, lambda _: {"w": torch.tensor([2])}, nuclear=0.1
    )
    with pytest.raises(InputError, match="w: got no gradient"):
        optimizer.step()


def test_a_weight_that_cannot_be_decomposed_is_named():
    weight = nn.Parameter(torch.full((3, 3), torch.nan))
    with pytest.raises(DivergedError, match="middle: no singular value"):
        LowRankTraining(
            torch.optim.SGD([weight], lr=0.5), {"middle": weight}, {"middle": "NC"}, lambda _: {}
        )


def test_what_is_pending_comes_back_from_the_state():
    _, hook, layer = cuts(period=2, steps=4, nuclear=0.5)
    state = hook.state_dict()
    assert state["step"] == 4
    again = LowRankTraining(
        torch.optim.SGD(layer.parameters(), lr=0.1), {"layer": layer.weight}, {"layer": "NC"},
        lambda found: {n: torch.tensor([5]) for n in found}, period=2, nuclear=0.5,
    )  # fmt: skip
    again.load_state_dict(state)
    assert again.step == 4
    torch.testing.assert_close(again.pulls["layer"], hook.pulls["layer"])


@pytest.mark.parametrize("mode", ["NC", "VH", "ND"])
@pytest.mark.parametrize("budget", ["macs=0.6", "params=0.6", "sparsity=0.4"])
def test_the_budget_is_met_by_real_layers(task, mode, budget):
    outcome = pruned(task, budget, mode=mode)
    dense, inputs = task.fresh_model(0), task.example_inputs
    macs = sum(count_macs(outcome.model, inputs).values())
    params = sum(p.numel() for p in outcome.model.parameters())
    assert (outcome.after.macs, outcome.after.parameters) == (macs, params)
    if budget == "macs=0.6":
        share = macs / sum(count_macs(dense, inputs).values())
    else:
        share = params / sum(p.numel() for p in dense.parameters())
    assert outcome.promise.kept
    assert share <= 0.6
    # a rank of ND is a ninth of a layer; of the others up to 0.035 of this network
    assert share >= 0.6 - (0.12 if mode == "ND" else 0.035)
    thin = [n for n, m in outcome.model.named_modules() if isinstance(m, Factorised)]
    assert thin
    assert "features.0.conv" not in thin
    # every row of the table is what the model is
    for row in outcome.tables["ranks"]:
        layer = outcome.model.get_submodule(row["layer"])
        assert isinstance(layer, Factorised) == (row["rank"] < row["full rank"])
        assert row["cost"] <= 1
        if isinstance(layer, Factorised):
            assert (layer.rank, layer.mode) == (row["rank"], mode)


@pytest.mark.parametrize("mode", ["NC", "VH", "ND"])
def test_factorising_what_was_trained_at_low_rank_changes_nothing(task, mode):
    """The last cut falls on the last iteration but one; what its step adds is little."""
    outcome = pruned(task, mode=mode, period=1)
    before, after = outcome.metrics_before["loss"], outcome.metrics_after["loss"]
    assert after == pytest.approx(before, abs=1e-3)
    assert min(row["energy"] for row in outcome.tables["ranks"]) > 0.9999
    afterwards = pruned(task, mode=mode, project=False)  # the same ranks cut in one go
    assert afterwards.metrics_after["loss"] > afterwards.metrics_before["loss"] + 0.05
    assert min(row["energy"] for row in afterwards.tables["ranks"]) < 0.99


def test_a_rule_decides_and_the_budget_is_an_upper_bound(task):
    outcome = pruned(task, "macs=1", projection="energy:0.7", final="energy:0.99", period=1)
    assert outcome.promise.kept
    assert outcome.promise.reached < outcome.promise.asked
    few = pruned(task, "macs=0.9", projection="linear:0.25", final="linear:0.25")
    assert [row["rank"] for row in few.tables["ranks"]] == [3, 3]
    over = pruned(task, "macs=0.2", projection="linear:0.5", final="linear:0.5")
    assert not over.promise.kept
    assert any("MISSED" in note for note in over.notes)


def test_a_rule_does_not_cut_below_what_the_budget_pays(task):
    """Energy 0.3 alone would leave a rank or two; the budget of 0.8 ends as when it decides."""
    outcome = pruned(task, "macs=0.8", projection="energy:0.3")
    assert min(row["energy"] for row in outcome.tables["ranks"]) > 0.99
    assert outcome.promise.kept
    assert outcome.after.macs >= 0.78 * outcome.before.macs


def test_a_budget_that_pays_everything_changes_nothing(task):
    outcome = pruned(task, "macs=1")
    plain = task.fresh_model(0)
    sc.fit(plain, task, task.training)
    assert all(torch.equal(p, dict(plain.named_parameters())[n])
               for n, p in outcome.model.named_parameters())  # fmt: skip
    assert any("dense, as two layers cost no less" in note for note in outcome.notes)


def test_one_cut_touches_only_the_layers_of_low_rank():
    """The first convolution, 1x1 ones, norms and linear layers are as they were, to the bit."""
    task = make_task("zoo:resnet-8?width=0.5", "digits", training=sc.TrainSettings(steps=0))
    model = task.fresh_model(0)
    method = TrainedRankPruning(mode="VH")
    plan = method.plan(model, task.example_inputs, sc.Budget.parse("macs=0.5"))
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    pointwise = [n for n in convolutions if "shortcut" in n]
    assert len(pointwise) == 2
    assert set(plan.sites) == set(convolutions) - {"conv", *pointwise}
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LowRankTraining(
        optimizer, {n: s.layer.weight for n, s in plan.sites.items()}, plan.modes,
        lambda found: {n: EnergyRule(0.5).ranks(s.values) for n, s in found.items()},
    )  # fmt: skip
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {f"{n}.weight" for n in plan.sites}


@pytest.mark.parametrize("mode", ["NC", "VH", "ND"])
@pytest.mark.parametrize("budget", ["macs=0.5", "params=0.3"])
def test_within_one_percent_where_layers_are_many(mode, budget):
    task = make_task("zoo:resnet-20?width=0.5", "digits", training=sc.TrainSettings(steps=0))
    promise = pruned(task, budget, mode=mode).promise
    assert promise.kept
    assert 0.99 * promise.asked <= promise.reached <= promise.asked


def test_which_layers(task):
    def layers(model, inputs=task.example_inputs, **options):
        method = TrainedRankPruning(**options)
        return list(method.plan(model, inputs, sc.Budget.parse("params=0.99")).sites)

    features = [f"features.{n}.conv" for n in (0, 1, 3)]
    assert layers(task.fresh_model(0)) == features[1:]
    assert layers(task.fresh_model(0), skip_first=False) == features
    assert layers(task.fresh_model(0), exclude=(r"features\.3",)) == features[1:2]
    mixed = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.Flatten(),
        nn.Linear(64, 8), nn.Linear(8, 2),
    )  # fmt: skip
    image = torch.randn(1, 1, 8, 8)
    assert layers(mixed, image) == ["2"]
    assert layers(mixed, image, layers="all") == ["2", "4"]
    assert layers(mixed, image, layers="linear") == ["4"]
    assert layers(mixed, image, skip_pointwise=False) == ["1", "2"]
    assert layers(mixed[4:], torch.randn(1, 64)) == ["4"]
    assert layers(mixed[4:], torch.randn(1, 64), mode="ND") == ["4"]


def test_a_snapshot_in_the_middle_ends_the_same(task, tmp_path):
    class Stop:
        def event(self, kind, values):
            if kind == "train" and values["step"] == 17:
                raise KeyboardInterrupt

        def begin(self, label, total): ...

        def advance(self, label, done): ...

        def end(self, label): ...

    options = {"nuclear": 0.01, "period": 4}
    with pytest.raises(KeyboardInterrupt):
        pruned(task, work=sc.Workspace(tmp_path, [Stop()], snapshot_seconds=0), **options)
    resumed = pruned(task, work=sc.Workspace(tmp_path), **options).model.state_dict()
    whole = pruned(task, **options).model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_counting_by_the_epoch(task):
    """A period longer than an epoch cuts once in each."""
    short = replace(task, training=replace(task.training, steps=50))
    epoch = pruned(short, period=40, count="epoch").model.state_dict()
    whole = pruned(short, period=40).model.state_dict()
    assert any(not torch.equal(tensor, whole[name]) for name, tensor in epoch.items())


def test_bad_input(task):
    for options in (
        {"period": 0}, {"nuclear": -1.0}, {"projection": "energy:1"}, {"final": "most"},
    ):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(options)).split("_")[0] + "|energy|rule"):
            sc.create(NAME, options)
    with pytest.raises(InputError, match=r"budget: got 'macs=0.05'; accepted: at least 0\.\d+ of"):
        pruned(task, "macs=0.05")
    with pytest.raises(InputError, match="model: got .* without a layer that may be of low rank"):
        sc.prune(convnet((1, 8, 8), 10, config=(8,)), NAME, "macs=0.5", task)
    with pytest.raises(InputError, match="exclude"):
        pruned(task, exclude=("nothing",))
