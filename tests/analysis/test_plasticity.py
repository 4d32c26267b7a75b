"""Pruning plasticity against its definition, arm by arm."""

import pytest
import torch

from secateurs.analysis.plasticity import cut, plasticity, regenerated
from secateurs.errors import InputError
from secateurs.parts.masks import Masks, named_parameters
from secateurs.parts.prunable import prunable_parameters
from secateurs.training.loop import fit
from secateurs.workspace import Workspace


def measured(task, fraction=0.6, at=(10, 30), steps=5, **options):
    rows = plasticity(task.fresh_model(3), task, fraction, at, steps, **options)
    return {(row["step"], row["arm"]): row for row in rows}


def ones(model):
    return Masks.ones_like(prunable_parameters(model))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_dense_arm_is_the_ordinary_training(tiny_task, optimizer):
    """Momentum, moments, learning rate and data order are carried over every cut."""
    task = tiny_task(optimizer=optimizer, lr=0.05)
    rows = measured(task)
    model = task.fresh_model(3)
    history = fit(model, task, task.training, evaluate_every=5)
    quality = {step: metrics["accuracy"] for step, metrics in history.evaluations}
    for step in (10, 30):
        for arm in ("dense", "pruned", "regrown"):
            assert rows[step, arm]["before"] == quality[step]
        assert rows[step, "dense"]["after"] == quality[step + 5]


def test_plasticity_is_the_quality_after_minus_the_quality_before(tiny_task):
    for row in measured(tiny_task()).values():
        assert row["plasticity"] == row["after"] - row["before"]


def test_without_further_steps_it_is_the_bare_damage(tiny_task):
    task = tiny_task()
    rows = measured(task, fraction=0.8, at=[20], steps=0)
    model = task.fresh_model(3)
    fit(model, task, task.training, stop_step=20)
    masks = cut(model, ones(model), 0.8, "global")
    masks.apply_(named_parameters(model, masks))
    assert rows[20, "pruned"]["after"] == task.measure(model)["accuracy"]
    assert rows[20, "dense"]["plasticity"] == 0
    assert rows[20, "pruned"]["plasticity"] < 0


def test_cutting_nothing_is_the_dense_arm_and_exchanging_nothing_the_pruned(tiny_task):
    nothing = measured(tiny_task(), fraction=0.0, regrow_rate=0.0)
    for step in (10, 30):
        assert nothing[step, "pruned"]["after"] == nothing[step, "dense"]["after"]
    same = measured(tiny_task(), regrow_rate=0.0)
    exchanged = measured(tiny_task(), regrow_rate=0.5)
    for step in (10, 30):
        assert same[step, "regrown"]["after"] == same[step, "pruned"]["after"]
    assert any(same[s, "regrown"] != exchanged[s, "regrown"] for s in (10, 30))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_cut_removes_the_fraction_of_least_magnitude(tiny_task, scope):
    model = tiny_task().fresh_model(3)
    masks = cut(model, ones(model), 0.25, scope)
    assert masks.total - masks.kept == round(0.25 * masks.total)
    weights = {n: p.detach().abs() for n, p in named_parameters(model, masks).items()}
    groups = [list(masks)] if scope == "global" else [[name] for name in masks]
    for names in groups:
        gone = torch.cat([weights[n][~masks[n]] for n in names])
        kept = torch.cat([weights[n][masks[n]] for n in names])
        assert float(gone.max()) <= float(kept.min())


def test_regeneration_keeps_the_count_of_every_layer_and_grows_by_the_gradient(tiny_task):
    """Rate 1/4 of 16 survivors: the 4 smallest go, the 4 largest dense gradients come."""
    task = tiny_task()
    model = task.fresh_model(3)
    masks = cut(model, ones(model), 7 / 8, "layer")
    before = {n: t.clone() for n, t in model.state_dict().items() if "running" in n}
    generator = torch.get_rng_state()
    new = regenerated(model, masks, task, 0.25, seed=0, step=12)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert new.kept_by_tensor() == masks.kept_by_tensor() == {"0.weight": 16, "4.weight": 6}
    weight = model.get_parameter("0.weight").detach()
    assert not bool(weight[~masks["0.weight"]].any()), "the gradient is that of the pruned network"
    smallest = weight.abs().masked_fill(~masks["0.weight"], torch.inf).flatten().argsort()[:4]
    survivors = masks["0.weight"].flatten().index_fill(0, smallest, False)
    gradient = gradient_of(model, task, step=12).masked_fill(survivors, -1.0)
    grown = survivors.index_fill(0, gradient.argsort(descending=True)[:4], True)
    assert torch.equal(new["0.weight"].flatten(), grown)


def gradient_of(model, task, step):
    """|dense gradient| that the loop would see at `step`, caught before the update."""
    caught = []

    def attach(net, optimizer, total):
        optimizer.register_step_pre_hook(
            lambda *_: caught.append(net.get_parameter("0.weight").grad.abs().flatten())
        )
        return []

    fit(model, task, task.training, start_step=step, stop_step=step + 1, attach=attach)
    return caught[0]


def test_the_same_seed_gives_the_same_rows_and_finished_steps_are_read(tiny_task, tmp_path):
    first = measured(tiny_task(), work=Workspace(tmp_path))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert measured(tiny_task(), work=Workspace(tmp_path)) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    assert measured(tiny_task()) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at": [36]}, "at: got 36; accepted: steps from 0 to 35"),
        ({"fraction": 1.0}, "fraction: got 1.0"),
        ({"regrow_rate": 1.0}, "regrow_rate: got 1.0"),
        ({"steps": -1}, "steps: got -1"),
        ({"scope": "row"}, "scope: got 'row'"),
    ],
)
def test_refusals(tiny_task, change, message):
    with pytest.raises(InputError, match=message):
        measured(tiny_task(), **change)
