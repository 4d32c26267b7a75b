"""SPA and OBSPA: the card's checks, on small networks."""

import json

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.calibration.compensation import compensate, removal_costs
from secateurs.errors import InputError
from secateurs.structure.surgery import shorten
from secateurs.zoo.catalog import make_task


@pytest.fixture(scope="module")
def task():
    return make_task(
        "zoo:convnet", "digits", training=sc.TrainSettings(steps=150, lr=0.05),
        finetuning=sc.TrainSettings(steps=20, lr=0.01),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(task):
    model = task.fresh_model(0)
    sc.fit(model, task, task.training)
    return model.eval()


def test_a_budget_of_everything_changes_no_bit(task, trained):
    outcome = sc.prune(trained, "spa", "macs=1.0", task, recover=False)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, outcome.model.state_dict()[name])


@pytest.mark.parametrize("budget", ["macs=0.5", "params=0.4", "sparsity=0.7", "macs=200K"])
def test_budgets_are_met_by_real_removal(task, trained, budget):
    outcome = sc.prune(trained, "spa", budget, task, recover=False)
    assert outcome.promise.kept
    asked = sc.Budget.parse(budget)
    reached = {
        "macs": outcome.after.macs,
        "params": outcome.after.parameters,
        "sparsity": outcome.after.parameters,
    }[asked.kind]
    whole = outcome.before.macs if asked.kind == "macs" else outcome.before.parameters
    share = 1 - asked.value if asked.kind == "sparsity" else asked.value
    assert reached <= (share * whole if asked.relative else asked.value)
    assert not outcome.masks


def test_obspa_needs_no_training_and_beats_plain_magnitude(task, trained):
    """Card: compensated at least 50 points above uncompensated; recalibration does not hurt."""
    made = {
        name: sc.prune(trained, "spa", "macs=0.4", task, when="no-training", **options)
        for name, options in {
            "obspa": {},
            "obspa, no recalibration": {"recalibration": False},
            "l1": {"criterion": "l1", "compensation": False, "recalibration": False},
            "noise": {"inputs": "noise"},
        }.items()
    }
    accuracy = {name: o.metrics_after["accuracy"] for name, o in made.items()}
    assert accuracy["obspa"] >= accuracy["l1"] + 0.3
    assert accuracy["obspa"] >= accuracy["obspa, no recalibration"] - 0.02
    assert accuracy["obspa"] > accuracy["noise"] > accuracy["l1"]


def test_of_two_equal_channels_one_costs_nothing_and_the_other_doubles():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]
        model[0].bias[1] = model[0].bias[0]
        model[2].weight[:, 1] = model[2].weight[:, 0]
    inputs = torch.randn(64, 4, dtype=torch.float64)
    structure = sc.axes(model, inputs)
    [costs] = removal_costs(structure, 1e-9)[0]["0"]
    assert float(costs[0]) < 1e-6 * float(costs[2])
    before = model(inputs)
    column = model[2].weight[:, 0].detach().clone()
    kept = {structure["0"].axis: torch.tensor([0, 2]).numpy()}
    compensate(structure, kept, 1e-9)
    made = shorten(structure.trace, kept)
    assert torch.allclose(made.model[2].weight[:, 0], 2 * column, rtol=1e-5)
    assert torch.allclose(made.model(inputs), before, rtol=1e-5, atol=1e-7)


def test_compensation_is_least_squares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    inputs = torch.randn(200, 6, dtype=torch.float64)
    hidden, wanted = model[:2](inputs).detach(), model(inputs).detach()
    structure = sc.axes(model, inputs)
    kept = {structure["0"].axis: torch.tensor([0, 1, 3]).numpy()}
    compensate(structure, kept, 0.0)
    shorten(structure.trace, kept)
    solution = torch.linalg.lstsq(hidden[:, [0, 1, 3]], wanted).solution.T
    assert torch.allclose(model[2].weight, solution, atol=1e-8)


@pytest.mark.parametrize("criterion", ["l2", "taylor", "snip", "grasp", "crop", "random"])
def test_every_criterion_meets_the_budget(task, trained, criterion):
    outcome = sc.prune(trained, "spa", "macs=0.6", task, criterion=criterion, recover=False)
    assert outcome.promise.kept
    assert outcome.after.macs <= 0.6 * outcome.before.macs


def test_before_training_it_trains_afterwards(task):
    fresh = task.fresh_model(1)
    outcome = sc.prune(fresh, "spa", "macs=0.5", task, when="before")
    assert outcome.metrics_after["accuracy"] > outcome.metrics_before["accuracy"] + 0.5


def test_rounds_end_at_the_budget_and_load_again(task, trained, tmp_path):
    outcome = sc.prune(trained, "spa", "macs=0.5", task, rounds=3, recover=False)
    assert len(outcome.surgery) == 3
    assert outcome.promise.kept
    json.dumps(outcome.surgery)
    sc.save(outcome, tmp_path / "out")
    read = sc.load(tmp_path / "out", lambda: task.fresh_model(5))
    inputs = torch.randn(3, 1, 8, 8)
    assert torch.equal(read.model(inputs), outcome.model(inputs))


class HardCoded(nn.Module):
    """States its width in its code."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 24), nn.Linear(24, 10)

    def forward(self, x):
        y = self.first(x.flatten(1)).reshape(-1, 2, 12).relu()
        return self.second(y.reshape(len(x), 24))


def test_a_graph_is_saved_and_loaded_too(task, tmp_path):
    own = make_task("zoo:convnet", "digits").with_model(HardCoded)
    outcome = sc.prune(HardCoded(), "spa", "params=0.5", own, recover=False)
    assert outcome.surgery[0]["form"] == "graph"
    assert any("graph" in note for note in outcome.notes)
    sc.save(outcome, tmp_path / "out")
    read = sc.load(tmp_path / "out", HardCoded)
    inputs = torch.randn(1, 1, 8, 8)
    assert torch.equal(read.model(inputs), outcome.model(inputs))


def test_roles_and_patterns_leave_axes_whole(task, trained):
    outcome = sc.prune(trained, "spa", "macs=0.7", task, recover=False, exclude=["features.0"])
    whole = [r for r in outcome.tables["axes"] if r["axis"].startswith("features.0")]
    assert whole
    assert all(r["kept"] == r["total"] for r in whole)
    with pytest.raises(InputError, match="none of them to be shortened"):
        sc.prune(trained, "spa", "macs=0.7", task, roles=["head"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_ratio": 1.5}, "max_ratio"),
        ({"rounds": 0}, "rounds"),
        ({"criterion": "obs"}, "criterion"),
        ({"samples": 0}, "samples"),
        ({"damping": -1.0}, "damping"),
        ({"when": "sometime"}, "when"),
        ({"when": "no-training", "inputs": "no-such-data"}, "data"),
    ],
)
def test_bad_options_are_refused(task, trained, options, named):
    with pytest.raises(InputError, match=named):
        sc.prune(trained, "spa", "macs=0.5", task, **options)


def test_a_budget_below_the_floors_is_refused(task, trained):
    with pytest.raises(InputError, match="at least"):
        sc.prune(trained, "spa", "macs=0.01", task, max_ratio=0.5)
