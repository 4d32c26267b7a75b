"""LAPP: the ramp, the accounting against counted networks, masks against removal, resumption."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.channels.lapp import LAPP, inserted
from secateurs.parts.budgets import Budget
from secateurs.parts.costs import measure_cost
from secateurs.structure.bypassed import Bypassed
from secateurs.structure.cost import structure_cost
from secateurs.structure.persistence import rebuild
from secateurs.training.thresholds import LearnedThresholds
from secateurs.zoo.convolutional import convnet
from secateurs.zoo.resnets import cifar_resnet


def make_conv():
    return convnet((1, 8, 8), 10, config=(8, 12, "M", 16))


def make_residual():
    return cifar_resnet((1, 8, 8), 10, 0.5, depth=8)


class Strided(nn.Module):
    """Biases, a stride, a flattened map; the head reads four places a channel."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.third = nn.Conv2d(8, 5, 3, stride=2, padding=1)
        self.hidden = nn.Linear(5 * 4, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.norm(self.second(self.first(x).relu())).relu()
        return self.head(self.hidden(self.third(x).relu().flatten(1)).relu())


MAKERS = [make_conv, make_residual, Strided]


def task_of(make, dtype=torch.float32, **training):
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    loader = DataLoader(TensorDataset(images, torch.arange(32) % 10), 8, shuffle=True)
    settings = sc.TrainSettings(**{"steps": 12, "lr": 0.05, **training})
    return sc.classification(make, loader, loader, training=settings)


def structured(model, budget="macs=0.5", dtype=torch.float32, **options):
    """The structure of a model, the method, its gates and the cost of them."""
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)
    structure = sc.axes(model, x)
    method = LAPP(**options)
    gates, spent = method.gates(structure, Budget.parse(budget))
    return structure, method, gates, spent


def test_the_ramp_falls_from_everything_to_the_budget():
    structure, method, _, spent = structured(make_conv())
    cost = structure_cost(structure, Budget.parse("macs=0.3"), structure.trace.args)
    allowed = method.rule(spent, cost, 100).allowed
    values = [allowed(t) for t in range(101)]
    assert values[0] == 1
    assert values[75] == values[100] == pytest.approx(0.3)
    assert values == sorted(values, reverse=True)
    assert LAPP(ramp=0).rule(spent, cost, 100).allowed(0) == pytest.approx(0.3)


def test_the_stem_projections_and_the_output_are_left_whole():
    _, _, gates, _ = structured(make_residual())
    assert [g.name for g in gates] == [f"stages.{s}.0.conv{c}" for s in range(3) for c in (1, 2)]
    _, _, all_gates, _ = structured(make_residual(), skip=())
    assert {g.name for g in all_gates} - {g.name for g in gates} == {
        "conv", "stages.1.0.shortcut.0", "stages.2.0.shortcut.0",
    }  # fmt: skip
    _, _, named, _ = structured(make_residual(), skip=("stem", "projection", r"stages\.[01]"))
    assert [g.name for g in named] == ["stages.2.0.conv1", "stages.2.0.conv2"]


@pytest.mark.parametrize(
    ("make", "kind", "bypass"),
    [
        (make_conv, "macs", "dw+gpw"),
        (make_residual, "params", "dw+gpw"),
        (Strided, "macs", "dw+gpw"),
        (Strided, "params", "dw+gpw"),
        (make_conv, "params", "none"),
        (make_residual, "macs", "none"),
        (Strided, "macs", "none"),
    ],
)
def test_the_cost_is_what_the_shortened_network_is_counted_at(make, kind, bypass):
    torch.manual_seed(0)
    budget = {"macs": "macs=0.6", "params": "params=0.7"}[kind]
    own = task_of(make, steps=2)
    outcome = sc.prune(make(), "lapp", budget, own, bypass=bypass)
    assert outcome.promise.kept
    counted = outcome.after.macs if kind == "macs" else outcome.after.parameters
    before = outcome.before.macs if kind == "macs" else outcome.before.parameters
    assert counted == outcome.promise.reached <= float(budget.split("=")[1]) * before
    assert all(row["kept"] >= 1 for row in outcome.tables["thresholds"])
    assert any(row["kept"] < row["total"] for row in outcome.tables["thresholds"])
    again = rebuild(make(), outcome.surgery)
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in outcome.model.named_parameters()
    }


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bypass", ["dw+gpw", "none"])
def test_the_shortened_network_computes_what_the_masked_one_does(make, bypass):
    """In float64, with thresholds set by hand so that about half of everything is off."""
    torch.manual_seed(0)
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    structure, method, gates, spent = structured(model, dtype=torch.float64, bypass=bypass)
    layers = inserted(model, gates, 3) if bypass != "none" else {}
    cost = structure_cost(structure, Budget.parse("macs=0.5"), structure.trace.args)
    hook = LearnedThresholds(
        torch.optim.SGD(model.parameters(), lr=0.1), model, gates, method.rule(spent, cost, 10)
    )
    for gate, threshold in zip(gates, hook.thresholds, strict=True):
        threshold.data.copy_(gate.scores(model, "l1").median())
    kept = [hook.mask(i).detach().bool() for i in range(len(gates))]
    assert all(0 < int(k.sum()) < len(k) for k in kept)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    masked, dense_share = model.eval()(x), float(hook.share().detach())
    hook.remove()
    assert not torch.allclose(model(x), masked, rtol=1e-3)
    outcome = sc.Outcome(model)
    task = task_of(make, torch.float64)
    method._shrink(outcome, task, gates, kept, layers)
    torch.testing.assert_close(outcome.model(x), masked, rtol=1e-9, atol=1e-9)
    counted = measure_cost(outcome.model, x[:1]).macs
    assert counted == pytest.approx(dense_share * structure.macs())


def test_a_bypass_of_zeros_is_no_bypass():
    torch.manual_seed(0)
    model = make_conv().eval()
    x = torch.randn(2, 1, 8, 8)
    plain = model(x)
    _, _, gates, _ = structured(model)
    for layer in inserted(model, gates, 0).values():
        for parameter in layer.bypass.parameters():
            nn.init.zeros_(parameter)
    assert sum(isinstance(m, Bypassed) for m in model.modules()) == 2
    torch.testing.assert_close(model(x), plain)


def test_without_a_price_nothing_is_pruned_and_a_missed_budget_is_refused():
    still = {"penalty": 0.0, "threshold_lr": 0.0, "bypass": "none"}
    task = task_of(make_conv, steps=4)
    outcome = sc.prune(make_conv(), "lapp", "macs=1.0", task, project="none", **still)
    assert all(row["kept"] == row["total"] for row in outcome.tables["thresholds"])
    with pytest.raises(
        InputError, match=r"project: got 'none'; accepted: down or both: \d+ is above"
    ):
        sc.prune(make_conv(), "lapp", "macs=0.5", task, project="none", **still)


@pytest.mark.parametrize("importance", ["l2", "bn_gamma"])
def test_other_importances(importance):
    torch.manual_seed(0)
    model = make_conv()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.1, 2)
    norm = model.features[1].norm.weight.detach().clone()
    outcome = sc.prune(
        model, "lapp", "macs=0.6", task_of(make_conv, steps=1), importance=importance,
        threshold_lr=0.0, prune_share=0.01,
    )  # fmt: skip
    assert outcome.promise.kept
    if importance == "bn_gamma":
        kept = outcome.model.features[1].conv.kept
        assert norm[kept].min() >= norm.sort(descending=True).values[len(kept) - 1] * 0.99


def test_a_layer_without_a_norm_has_no_gamma():
    with pytest.raises(InputError, match="no norm reads third alone"):
        structured(Strided(), importance="bn_gamma")


def test_thresholds_learn_towards_the_budget():
    """With nothing to project, the learned masks alone are what comes out."""
    outcome = sc.prune(
        make_conv(), "lapp", "macs=0.6", task_of(make_conv, steps=120), threshold_lr=0.1,
        project="none",
    )  # fmt: skip
    assert outcome.promise.reached <= outcome.promise.asked
    spent = [row["most spent"] for row in outcome.history]
    assert spent[0] > 0.95
    assert spent[-1] < 0.75
    rows = outcome.tables["thresholds"]
    assert any(0 < row["kept"] < row["total"] for row in rows)


def test_it_stops_when_an_epoch_stays_within_the_budget():
    task = task_of(make_conv, steps=120)
    outcome = sc.prune(make_conv(), "lapp", "macs=0.8", task, threshold_lr=0.1, ramp=0.1)
    assert outcome.history[-1]["step"] < 60
    assert outcome.history[-1]["most spent"] <= 0.8


def momenta(task, model, monkeypatch, **options):
    """Optimizer states at the freeze and as the rest of the training is given them."""
    import secateurs.methods.channels.lapp as module

    seen = []
    real = module.fit_once

    def spy(net, *args, **kwargs):
        seen.append((kwargs["name"], copy.deepcopy(kwargs.get("optimizer_state"))))
        trained = real(net, *args, **kwargs)
        seen.append(("after " + kwargs["name"], copy.deepcopy(trained.optimizer)))
        return trained

    monkeypatch.setattr(module, "fit_once", spy)
    outcome = sc.prune(model, "lapp", "macs=0.6", task, **options)
    return outcome, seen


@pytest.mark.parametrize("bypass", ["dw+gpw", "none"])
def test_momenta_of_what_is_left_are_kept(bypass, monkeypatch):
    outcome, seen = momenta(task_of(make_conv), make_conv(), monkeypatch, bypass=bypass)
    (name, given), (_, before) = seen[-2], seen[-3]
    assert name == "rest"
    names = [n for n, p in outcome.model.named_parameters()]
    for number, own in enumerate(names):
        old = before["state"][number]["momentum_buffer"]
        new = given["state"][number]["momentum_buffer"]
        assert new.shape == outcome.model.get_parameter(own).shape
        if new.shape == old.shape:
            assert torch.equal(new, old)
    if bypass != "none":
        number = names.index("features.1.conv.main.weight")
        kept = outcome.model.features[1].conv.kept
        old = before["state"][number]["momentum_buffer"]
        assert torch.equal(given["state"][number]["momentum_buffer"], old[kept])


class KilledError(Exception):
    """Stands for a kill."""


class Killer:
    def __init__(self, stage, step):
        self.stage, self.step, self.seen = stage, step, []

    def event(self, kind, values):
        if kind == "train":
            self.seen.append(values["stage"])
            if (values["stage"], values["step"]) == (self.stage, self.step):
                raise KilledError

    def begin(self, label, total): ...

    def advance(self, label, done): ...

    def end(self, label): ...


@pytest.mark.parametrize(("stage", "step"), [("prune-4", 5), ("rest", 9)])
def test_a_killed_run_goes_on_with_the_same_bits(stage, step, tmp_path):
    task = task_of(make_conv)

    def run(*listeners, folder=None):
        work = sc.Workspace(folder, listeners, snapshot_seconds=0.0)
        return sc.prune(task.fresh_model(0), "lapp", "macs=0.6", task, work=work)

    whole = run()
    with pytest.raises(KilledError):
        run(Killer(stage, step), folder=tmp_path)
    rest = Killer(None, None)
    outcome = run(rest, folder=tmp_path)
    assert rest.seen[0] == stage
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, outcome.model.state_dict()[name])
    assert outcome.history == whole.history


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prune_share": 0.0}, "prune_share"),
        ({"ramp": 1.5}, "ramp"),
        ({"penalty": -1.0}, "penalty"),
        ({"tau": 0.0}, "tau"),
        ({"threshold_lr": -0.1}, "threshold_lr"),
        ({"bypass": "conv"}, "bypass"),
        ({"importance": "grad"}, "importance"),
    ],
)
def test_bad_options_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        sc.prune(make_conv(), "lapp", "macs=0.5", task_of(make_conv), **options)


def test_what_no_training_can_help_is_refused_before_it():
    task = task_of(make_conv)
    with pytest.raises(InputError, match="at least .*, a filter a layer"):
        sc.prune(make_conv(), "lapp", "macs=0.05", task)
    with pytest.raises(InputError, match="without a layer to prune"):
        sc.prune(make_conv(), "lapp", "macs=0.5", task, skip=("features",))
    half = replace(task, training=sc.TrainSettings(precision="fp16"))
    with pytest.raises(InputError, match="precision"):
        sc.prune(make_conv(), "lapp", "macs=0.5", half)


def test_kept_shares_are_noted_by_layer():
    outcome = sc.prune(make_conv(), "lapp", "macs=0.5", task_of(make_conv))
    rows = outcome.tables["thresholds"]
    assert [r["layer"] for r in rows] == ["features.1.conv", "features.3.conv"]
    for row in rows:
        assert row["kept"] == len(outcome.model.get_submodule(row["layer"]).kept)
    assert np.all([r["threshold"] >= 0 for r in rows])
