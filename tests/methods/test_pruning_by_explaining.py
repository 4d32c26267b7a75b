"""Pruning by explaining: scores against their formulas, steps against real removals, the budget."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.analysis.relevance import Rules, relevance
from secateurs.errors import InputError
from secateurs.methods.channels import pruning_by_explaining
from secateurs.methods.channels.pruning_by_explaining import PruningByExplaining
from secateurs.structure.axes import Structure
from secateurs.structure.trace import trace
from secateurs.zoo.catalog import make_task
from secateurs.zoo.convolutional import convnet
from secateurs.zoo.resnets import cifar_resnet

NAME = "pruning-by-explaining"
SIZES = (12, "M", 16, "M", 10)


def make_conv():
    return convnet((1, 8, 8), 4, config=SIZES)


def make_residual():
    return cifar_resnet((1, 8, 8), 4, 0.5, depth=8)


def few(make, count=24, classes=4, finetuning=None):
    """A task of images in float64, six of every class."""
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    loader = DataLoader(TensorDataset(images, torch.arange(count) % classes), 8)
    return sc.classification(
        lambda: make().double(), loader, loader,
        finetuning=finetuning or sc.TrainSettings(steps=2, lr=0.01),
    )  # fmt: skip


def scattered(make, seed=0):
    torch.manual_seed(seed)
    model = make().double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def pruned(model, budget, task, **options):
    return sc.prune(model, NAME, budget, task, recover=False, **{"samples": 4, **options})


def kept_units(outcome):
    """Kept units by axis, composed over all removals."""
    found = {}
    for plan in outcome.surgery:
        for axis, units in plan["axes"].items():
            found[axis] = [found[axis][u] for u in units] if axis in found else units
    return found


def scores(method, model, task, seed=0):
    """The scores of the first step."""
    references = method._references(task, seed, torch.device("cpu"))
    structure = Structure(trace(model, references[0][0]))
    return method._scores(structure, task, references, seed), references


def test_scores_of_the_net_worked_by_hand():
    net = nn.Sequential(
        nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)
    ).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1, 0.5], [0.5, 1]]))
        net[2].weight.copy_(torch.tensor([[2.0, -1], [1, 3]]))
    data = TensorDataset(torch.tensor([[1.0, 2.0], [1.0, 2.0]]).double(), torch.tensor([0, 1]))
    task = sc.classification(net, DataLoader(data, 2), DataLoader(data, 2))

    def found(**options):
        return scores(PruningByExplaining(samples=1, **options), net, task)[0]["0"].tolist()

    assert found() == pytest.approx([0.6053, 0.3947], abs=1e-4)
    assert found(normalize="none") == pytest.approx([1 + 2 / 9.5, 7.5 / 9.5], abs=1e-6)
    signed = [8 / 3 + 2 / 9.5, -5 / 3 + 7.5 / 9.5]
    options = {"linear_rule": "epsilon", "normalize": "none"}
    assert found(**options) == pytest.approx(signed, abs=1e-4)
    absolute = [8 / 3 + 2 / 9.5, 5 / 3 + 7.5 / 9.5]
    assert found(**options, reduce="abs") == pytest.approx(absolute, abs=1e-4)
    # logits are 1.5 and 9.5
    logit = [1.5 * 1 + 2, 7.5]
    assert found(normalize="none", seeds="logit") == pytest.approx(logit, abs=1e-6)


@pytest.mark.parametrize("make", [make_conv, make_residual])
def test_passes_of_any_size_score_the_same(make):
    model, task = scattered(make), few(make)
    for criterion in ("relevance", "taylor", "gradient", "weight"):
        once, _ = scores(PruningByExplaining(criterion=criterion, samples=5), model, task)
        parts, references = scores(
            PruningByExplaining(criterion=criterion, samples=5, at_once=7), model, task
        )
        assert [len(y) for _, y in references] == [7, 7, 6]
        assert {len(x) for x, _ in references} == {7}
        assert once.keys() == parts.keys()
        for name, score in once.items():
            torch.testing.assert_close(parts[name], score, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("criterion", ["taylor", "gradient", "weight"])
def test_the_other_criteria_are_their_formulas(criterion):
    model, task = scattered(make_conv), few(make_conv)
    found, [(inputs, labels)] = scores(
        PruningByExplaining(criterion=criterion, samples=4), model, task
    )
    layer = model.features[2].conv
    seen = []
    handle = layer.register_forward_hook(lambda m, i, o: seen.append(o))
    loss = F.cross_entropy(model(inputs), labels, reduction="sum")
    handle.remove()
    [gradient] = torch.autograd.grad(loss, seen)
    if criterion == "weight":
        expected = layer.weight.detach().abs().sum((1, 2, 3))
        expected = expected / expected.sum()
    else:
        value = gradient * seen[0].detach() if criterion == "taylor" else gradient
        expected = value.mean((0, 2, 3)).abs()
        expected = expected / torch.linalg.vector_norm(expected)
    torch.testing.assert_close(found["features.2.conv"], expected, rtol=1e-7, atol=1e-12)


def test_coupled_layers_are_averaged():
    model, task = scattered(make_residual), few(make_residual)
    found, [(inputs, labels)] = scores(PruningByExplaining(samples=4), model, task)
    layers = relevance(trace(model, inputs), inputs, labels, Rules()).by_name()

    def share(name):
        own = layers[name].sum((0, 2, 3))
        return own / own.sum().abs()

    expected = (share("conv") + share("stages.0.0.conv2")) / 2
    torch.testing.assert_close(found["conv"], expected)
    torch.testing.assert_close(found["stages.0.0.conv1"], share("stages.0.0.conv1"))


def test_a_filter_that_is_never_active_goes_first():
    model, task = scattered(make_conv), few(make_conv)
    with torch.no_grad():
        model.features[2].norm.weight[5] = model.features[0].norm.weight[3] = 0
        model.features[2].norm.bias[5] = model.features[0].norm.bias[3] = -1
    found, _ = scores(PruningByExplaining(samples=4), model, task)
    assert found["features.2.conv"][5] == found["features.0.conv"][3] == 0
    # other filters may be silent, too; with these two among them
    silent = sum(int((s == 0).sum()) for s in found.values())
    outcome = pruned(model, f"keep={1 - silent / 38}", task, step=1.0)
    assert 5 not in kept_units(outcome)["features.2.conv"]
    assert 3 not in kept_units(outcome)["features.0.conv"]
    inputs = task.example_inputs
    torch.testing.assert_close(outcome.model(inputs), model(inputs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [make_conv, make_residual])
@pytest.mark.parametrize("criterion", ["relevance", "taylor", "weight"])
def test_steps_under_masks_remove_what_steps_of_removals_do(make, criterion, monkeypatch):
    model, task = scattered(make), few(make)
    options = {"criterion": criterion, "step": 0.15}
    masked = pruned(model, "macs=0.3", task, **options)
    monkeypatch.setattr(pruning_by_explaining, "exact", lambda kept: False)
    removed = pruned(model, "macs=0.3", task, **options)
    assert len(masked.surgery) == 1 < len(removed.surgery)
    assert kept_units(masked) == kept_units(removed)
    assert masked.history == removed.history
    torch.testing.assert_close(masked.metrics_after, removed.metrics_after)
    totals = [
        [(r["axis"], r["kept"], r["total"]) for r in o.tables["axes"]] for o in (masked, removed)
    ]
    assert sorted(totals[0]) == sorted(totals[1])


def test_a_step_takes_a_share_of_the_original_filters():
    model, task = scattered(make_conv), few(make_conv)
    outcome = pruned(model, "keep=0.5", task, step=0.1)  # 3 of 38, down to 19
    assert [row["cost"] for row in outcome.history] == [35, 32, 29, 26, 23, 20, 19]
    assert outcome.promise.reached == 0.5
    assert outcome.promise.kept
    tiny = pruned(model, "keep=0.9", task, step=0.001)  # at least one
    assert len(tiny.history) == 4
    once = pruned(model, "keep=0.5", task, step=1.0)
    assert [row["cost"] for row in once.history] == [19]


@pytest.mark.parametrize("criterion", ["relevance", "taylor", "gradient", "weight", "random"])
def test_every_criterion_reaches_its_budget_and_no_layer_is_emptied(criterion):
    model, task = scattered(make_conv), few(make_conv)
    outcome = pruned(model, "macs=0.05", task, criterion=criterion, least=2)
    assert outcome.promise.kept
    assert outcome.after.macs <= 0.05 * outcome.before.macs
    assert all(row["kept"] >= 2 for row in outcome.tables["axes"])
    assert len(outcome.tables["axes"]) == 3
    with pytest.raises(InputError, match="what the floors leave"):
        pruned(model, "macs=0.001", task, criterion=criterion)


def test_axes_of_one_unit_still_count():
    model, task = scattered(make_conv), few(make_conv)
    outcome = pruned(model, "keep=0.11", task, step=0.3, epochs_between=0.1)
    sizes = [b.conv.out_channels for b in outcome.model.features if isinstance(b, nn.Sequential)]
    assert sum(sizes) == int(0.11 * 38)
    assert 1 in sizes
    assert {row["total"] for row in outcome.tables["axes"]} == {10, 12, 16}
    assert sorted(row["kept"] for row in outcome.tables["axes"]) == sorted(sizes)


def test_a_budget_that_asks_for_nothing_changes_nothing():
    model, task = scattered(make_conv), few(make_conv)
    outcome = pruned(model, "keep=1", task)
    assert all(torch.equal(t, outcome.model.state_dict()[n]) for n, t in model.state_dict().items())


def test_training_between_steps_removes_several_times_and_is_resumed(tmp_path):
    task = few(make_conv)
    model = scattered(make_conv)

    def run(work=None):
        return sc.prune(
            model, NAME, "keep=0.5", task, samples=4, step=0.2, epochs_between=0.7, work=work
        )

    outcome = run(sc.Workspace(tmp_path))
    assert len(outcome.surgery) == len(outcome.history) == 3
    units = kept_units(outcome)
    assert all(len(set(u)) == len(u) for u in units.values())
    assert sum(38 * [0]) + sum(map(len, units.values())) == 19
    again = run(sc.Workspace(tmp_path))
    for name, tensor in outcome.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    sc.save(outcome, tmp_path / "out")
    read = sc.load(tmp_path / "out", scattered(make_conv, 1))
    assert task.measure(read.model) == outcome.metrics_after


def test_the_composite_of_residual_networks():
    method = PruningByExplaining(composite="resnet", low=-1.0, high=3.0)
    assert method.rules() == Rules("beta0", "epsilon", "zB", low=-1.0, high=3.0)
    own = PruningByExplaining(
        composite="resnet", first_rule="epsilon", linear_rule="z+", rule="alpha-beta", alpha=2.0
    )
    assert own.rules() == Rules("alpha-beta", "z+", "epsilon", 2.0)
    outcome = pruned(
        scattered(make_residual), "macs=0.5", few(make_residual), composite="resnet", low=0.0,
        high=1.0, reduce="abs", normalize="none",
    )  # fmt: skip
    assert outcome.promise.kept


def test_it_works_from_few_samples_of_other_classes():
    """As a whole: a network that learned some digits is pruned by five of each of the others."""
    source = make_task("zoo:convnet?width=0.25", "digits?classes=0,1,2,3,4&limit=300")
    model = source.fresh_model(0)
    sc.fit(model, source, sc.TrainSettings(steps=10, lr=0.05))
    task = make_task("zoo:convnet?width=0.25", "digits?classes=5,6,7,8,9&per_class=5")
    outcome = sc.prune(
        model, NAME, "macs=0.5", replace(task, finetuning=sc.TrainSettings(steps=2)), samples=5
    )
    assert outcome.promise.kept
    with pytest.raises(InputError, match="samples_per_class"):
        sc.prune(model, NAME, "macs=0.5", task, samples=6)


def test_a_model_that_cannot_be_explained_is_refused_and_left_as_it_was():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)
    ).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="layer_norm in 2"):
        sc.prune(model, NAME, "macs=0.5", few(make_conv), samples=2, inplace=True)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    plain = pruned(model, "macs=0.5", few(make_conv), criterion="weight", step=0.3)
    assert plain.promise.kept
    assert len(plain.surgery) > 1  # zeros are not a removal under a statistic


def test_labels_that_the_model_does_not_know_are_refused():
    with pytest.raises(InputError, match="labels: got 5"):
        pruned(scattered(make_conv), "macs=0.5", few(make_conv, classes=6), samples=2)


def test_two_labels_a_sample_are_refused():
    task = make_task("zoo:convnet?width=0.25", "digits?limit=64&with=rotation")
    with pytest.raises(InputError, match=r"batches that are not \(tensor, class\)"):
        sc.prune(task.fresh_model(0), NAME, "macs=0.5", task)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"samples": 0}, "samples"),
        ({"step": 0.0}, "step"),
        ({"step": 1.5}, "step"),
        ({"epochs_between": -1.0}, "epochs_between"),
        ({"at_once": 0}, "at_once"),
        ({"least": 0}, "least"),
        ({"alpha": 0.5}, "alpha"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"first_rule": "zB"}, "zB"),
        ({"composite": "resnet"}, "zB"),
        ({"rule": "gamma"}, "rule"),
    ],
)
def test_bad_options_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        pruned(make_conv().double(), "macs=0.5", few(make_conv), **options)
