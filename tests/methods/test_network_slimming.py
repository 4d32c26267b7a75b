"""Network slimming: the pull, the threshold against brute force, the cut against zeros."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.parts.costs import measure_cost
from secateurs.parts.scales import add_l1_subgradient_, norm_scales
from secateurs.structure.scores import scale_scores
from secateurs.training.keeping import BeforeStep
from secateurs.zoo.catalog import make_task
from secateurs.zoo.convolutional import convnet
from secateurs.zoo.resnets import cifar_resnet

from .conftest import KilledError, Killer

STILL = sc.TrainSettings(steps=0)
CONFIG = (12, "M", 16, "M", 10)


@pytest.fixture
def task(normalized_task):
    return replace(
        normalized_task,
        training=sc.TrainSettings(steps=40, lr=0.2),
        finetuning=sc.TrainSettings(steps=10),
    )


def still(make, dtype=torch.float32):
    """A task of 8x8 images in which nothing is trained: the scales stay as they were set."""
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    loader = DataLoader(TensorDataset(images, torch.arange(16) % 10), 16)
    return sc.classification(make, loader, loader, training=STILL, finetuning=STILL)


def make_conv():
    return convnet((1, 8, 8), 10, config=CONFIG)


def make_residual():
    return cifar_resnet((1, 8, 8), 10, 0.5, depth=8)


def scattered(make, seed=0, dtype=torch.float32):
    """A network in eval mode with scales, shifts and statistics of all sizes."""
    torch.manual_seed(seed)
    model = make().to(dtype).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def kept_units(outcome):
    return outcome.surgery[0]["axes"]


def test_one_step_moves_the_scales_by_the_pull_and_nothing_else(task):
    """SGD without momentum: γ differs by −lr · λ · sign(γ) from what it is without the pull."""
    once = sc.TrainSettings(steps=1, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    own = replace(task, training=once, finetuning=STILL)
    start = task.fresh_model(0)
    with torch.no_grad():
        start[1][0].weight[:3] = torch.tensor([-0.5, 0.0, 2.0])
    pulled, plain = (
        sc.prune(start, "network-slimming", "params=1", own, strength=s).model for s in (0.01, 0.0)
    )
    expected = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for name, scale in norm_scales(start).items():
        expected[name] -= 0.1 * 0.01 * scale.detach().sign()
    for name, parameter in pulled.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-6)
    assert not torch.equal(pulled[1][0].weight, plain[1][0].weight)


def test_without_a_pull_it_trains_like_the_task(task):
    model = task.fresh_model(0)
    sc.fit(model, task, task.training)
    outcome = sc.prune(task.fresh_model(0), "network-slimming", "params=1", task, strength=0.0)
    assert outcome.metrics_before == task.measure(model)


def test_frameworks_that_hand_a_closure_are_pulled_after_it():
    norm = nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(norm.parameters(), lr=1.0)
    hook = BeforeStep(optimizer, lambda: add_l1_subgradient_(norm_scales(norm), 0.25))

    def closure():
        optimizer.zero_grad()
        loss = norm.weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert norm.weight.tolist() == [-0.25, -0.25]
    assert hook.state_dict() == {"step": 1}
    hook.remove()
    optimizer.step(closure)
    assert norm.weight.tolist() == [-1.25, -1.25]


@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_one_threshold_over_all_layers_against_brute_force(share):
    """Channels go one by one in the order of |γ|, each network built and counted anew."""
    model, task = scattered(make_conv), still(make_conv)
    outcome = sc.prune(model, "network-slimming", f"macs={share}", task)
    scales = {n.replace("norm.weight", "conv"): s for n, s in norm_scales(model).items()}
    order = sorted((abs(g), n, i) for n, s in scales.items() for i, g in enumerate(s.tolist()))
    left = {n: set(range(len(s))) for n, s in scales.items()}
    whole = measure_cost(model, task.example_inputs).macs
    for threshold, name, unit in order:
        left[name].remove(unit)
        widths = iter(len(units) for units in left.values())
        config = tuple(e if e == "M" else next(widths) for e in CONFIG)
        small = convnet((1, 8, 8), 10, config=config)
        if measure_cost(small, task.example_inputs).macs <= share * whole:
            assert outcome.history[1]["threshold"] == threshold
            break
    found = {n: list(range(len(s))) for n, s in scales.items()} | kept_units(outcome)
    assert found == {n: sorted(units) for n, units in left.items()}
    assert outcome.after.macs == measure_cost(small, task.example_inputs).macs
    assert outcome.promise.kept


@pytest.mark.parametrize("make", [make_conv, make_residual])
def test_the_shortened_network_is_the_one_with_zeros(make):
    """γ = β = 0 of all that went, in float64."""
    dense = scattered(make, 1, torch.float64)
    outcome = sc.prune(
        dense, "network-slimming", "params=0.6", still(make, torch.float64), empty="floor"
    )
    masked = copy.deepcopy(dense)
    tensors = outcome.surgery[0]["tensors"]
    cut = [n for n in norm_scales(masked) if n in tensors]
    assert len(cut) >= 3
    with torch.no_grad():
        for name in cut:
            norm = masked.get_submodule(name.removesuffix(".weight"))
            gone = torch.ones(len(norm.weight), dtype=torch.bool)
            gone[tensors[name]["0"]] = False
            norm.weight[gone] = norm.bias[gone] = 0
    inputs = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(outcome.model(inputs), masked(inputs), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(masked(inputs), dense(inputs), rtol=1e-3)
    parameters = sum(p.numel() for p in outcome.model.parameters())
    assert parameters <= 0.6 * sum(p.numel() for p in dense.parameters())


def with_a_faint_layer():
    model = scattered(make_conv)
    with torch.no_grad():
        model.features[2].norm.weight.mul_(1e-3)
    return model


def test_a_threshold_that_would_empty_a_layer_names_it():
    with pytest.raises(InputError, match=r"budget: got 'macs=0.2'.* features\.2\.conv, whose"):
        sc.prune(with_a_faint_layer(), "network-slimming", "macs=0.2", still(make_conv))
    wide = sc.prune(with_a_faint_layer(), "network-slimming", "macs=0.9", still(make_conv))
    assert len(kept_units(wide)["features.2.conv"]) < 16


def test_channels_that_no_threshold_tells_apart_are_refused():
    """All γ are 1: what goes and what stays would be a matter of names."""
    with pytest.raises(
        InputError, match=r"features\.0\.conv, features\.2\.conv, features\.4\.conv"
    ):
        sc.prune(make_conv(), "network-slimming", "macs=0.5", still(make_conv))


@pytest.mark.parametrize("least", [1, 3])
def test_the_floor_spares_the_least_units(least):
    model = with_a_faint_layer()
    scores = model.features[2].norm.weight.detach().abs()
    outcome = sc.prune(
        model, "network-slimming", "macs=0.2", still(make_conv), empty="floor", least=least
    )
    spared = kept_units(outcome)["features.2.conv"]
    assert spared == sorted(scores.argsort(descending=True)[:least].tolist())
    assert outcome.promise.kept


@pytest.mark.parametrize(("aggregate", "of"), [("mean", torch.mean), ("max", torch.amax)])
def test_scales_tied_to_one_axis_are_aggregated(aggregate, of):
    model = scattered(make_residual)
    structure = sc.axes(model, torch.randn(1, 1, 8, 8))
    scores = scale_scores(structure, norm_scales(model), aggregate)
    first = model.stages[0][0]
    tied = torch.stack([model.norm.weight, first.norm2.weight]).abs().double()
    torch.testing.assert_close(scores["conv"], of(tied, 0))
    torch.testing.assert_close(scores["stages.0.0.conv1"], first.norm1.weight.abs().double())


def test_positions_of_a_flattened_channel_count_once():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Flatten(), nn.BatchNorm1d(3 * 4), nn.ReLU(), nn.Linear(12, 2)
    )
    with torch.no_grad():
        model[2].weight.normal_()
    structure = sc.axes(model, torch.randn(1, 1, 4, 4))
    [score] = scale_scores(structure, norm_scales(model)).values()
    expected = model[2].weight.detach().abs().double().view(3, 4).mean(1)
    torch.testing.assert_close(score, expected)


def test_scales_may_start_where_the_paper_has_them(task):
    own = replace(task, training=STILL, finetuning=STILL)
    outcome = sc.prune(task.fresh_model(0), "network-slimming", "params=1", own, initial=0.5)
    for scale in norm_scales(outcome.model).values():
        assert bool((scale == 0.5).all())


@pytest.mark.parametrize("stage", ["sparse", "finetune"])
def test_a_killed_run_goes_on_with_the_same_bits(task, tmp_path, stage):
    def run(*listeners, folder=None):
        work = sc.Workspace(folder, listeners, snapshot_seconds=0.0)
        return sc.prune(
            task.fresh_model(0), "network-slimming", "params=0.6", task, work=work, strength=1e-3
        )

    whole = run()
    with pytest.raises(KilledError):
        run(Killer(stage, 7), folder=tmp_path)
    rest = Killer(None, None)
    outcome = run(rest, folder=tmp_path)
    assert rest.seen[0] == (stage, 7)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, outcome.model.state_dict()[name])
    assert outcome.history == whole.history


def test_the_audit_trains_the_slimmed_network_from_fresh_weights(task):
    outcome = sc.prune(
        task.fresh_model(0), "rethinking-value", "params=0.5", task, audited="network-slimming",
        audited_options={"strength": 1e-3},
    )  # fmt: skip
    rows = {row["arm"]: row for row in outcome.history}
    assert set(rows) == {"finetune", "scratch-e", "scratch-b"}
    assert rows["scratch-b"]["steps"] > rows["scratch-e"]["steps"] == 40
    assert rows["scratch-e"]["parameters"] <= 0.5 * outcome.before.parameters
    assert rows["scratch-e"]["loss"] != rows["finetune"]["loss"]
    assert outcome.model[0].out_features < 32


def test_it_prunes_a_residual_network_by_name():
    task = make_task(
        "zoo:resnet-8?width=0.5", "digits?limit=200", training=sc.TrainSettings(steps=6),
        finetuning=sc.TrainSettings(steps=2),
    )  # fmt: skip
    outcome = sc.prune(
        task.fresh_model(0), "network-slimming", "macs=0.7", task, strength=1e-5, empty="floor"
    )
    assert outcome.promise.kept
    assert outcome.after.macs <= 0.7 * outcome.before.macs


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"strength": -1.0}, "strength"),
        ({"initial": 0.0}, "initial"),
        ({"least": 0}, "least"),
        ({"empty": "keep"}, "empty"),
        ({"aggregate": "median"}, "aggregate"),
    ],
)
def test_bad_options_are_refused(task, options, named):
    with pytest.raises(InputError, match=named):
        sc.prune(task.fresh_model(0), "network-slimming", "params=0.5", task, **options)


def test_what_no_training_can_help_is_refused_before_it(task):
    ear = Killer("sparse", 0)
    work = sc.Workspace(None, (ear,))

    def pruned(model, budget="params=0.5"):
        sc.prune(model, "network-slimming", budget, task, work=work)

    with pytest.raises(InputError, match="at least .*, what the floors leave"):
        pruned(task.fresh_model(0), "params=0.001")
    only_inputs = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10))
    with pytest.raises(InputError, match="no scale along one that can be shortened"):
        pruned(only_inputs)
    broken = task.fresh_model(0)
    with torch.no_grad():
        broken[1][0].weight[4] = torch.nan
    with pytest.raises(InputError, match=r"1\.0\.weight: got NaN"):
        pruned(broken)
    assert not ear.seen
