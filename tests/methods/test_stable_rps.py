"""STABLE-RPS: what is stored, how it starts, which options give the public code's scheme."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import DivergedError, InputError
from secateurs.parts.costs import dense_bytes
from secateurs.parts.hashing import loads
from secateurs.structure.shared import (
    memory_report,
    shared_arrays,
    shared_layers,
    unshare,
)
from secateurs.zoo.perceptrons import mlp

NAME = "stable-rps"
STILL = sc.TrainSettings(steps=0)


def make():
    return mlp((1, 8, 8), 10, hidden=(128, 128))


def shared(budget="density=0.1", model=None, **options):
    torch.manual_seed(0)
    return sc.prune(make() if model is None else model, NAME, budget, **options)


def slots(outcome):
    return [layer.addresses()[0] for layer in shared_layers(outcome.model).values()]


@pytest.mark.parametrize(
    ("budget", "stored"),
    [("density=0.1", 2586), ("sparsity=0.9", 2586), ("density=1", 25_856), ("params=2852", 2586),
     ("params=0.1", 2346), ("bytes=0.1", 2346), ("bytes=11408", 2586)],
)  # fmt: skip
def test_stored_numbers(budget, stored):
    """25,856 weights may be shared; the 266 biases stay."""
    outcome = shared(budget)
    assert outcome.promise.kept
    assert sum(p.numel() for p in outcome.model.parameters()) == stored + 266
    assert dense_bytes(outcome.model) == 4 * (stored + 266)
    assert outcome.tables["memory"] == [memory_report(outcome.model)]
    assert memory_report(outcome.model)["stored"] == stored + 266


def test_no_multiplication_is_said_to_be_saved(digits_task):
    task = replace(digits_task, training=STILL)
    outcome = sc.prune(task.fresh_model(0), NAME, "density=0.1", task)
    assert outcome.after.macs == outcome.after.effective_macs == outcome.before.macs
    assert outcome.after.parameters < outcome.before.parameters / 5
    assert any("no multiplication is saved" in note for note in outcome.notes)


def test_norms_and_their_statistics_stay():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10))
    outcome = shared("bytes=0.5", model)
    assert outcome.promise.kept
    assert dense_bytes(outcome.model) <= dense_bytes(model) / 2
    assert isinstance(outcome.model[1], nn.BatchNorm2d)


def test_one_hash_over_all_layers_is_one_to_one_and_a_hash_a_layer_is_not():
    """The public code seeds the hash anew for every module: 10 to 32 % of the slots are unused."""
    whole = loads(slots(shared("density=1")), 25_856)
    assert whole.unique().tolist() == [1]
    public = loads(slots(shared("density=1", per_module=True)), 25_856)
    assert int((public == 0).sum()) > 0.05 * 25_856
    assert int(public.max()) <= 3
    few = loads(slots(shared("density=0.1")), 2586)
    assert int(few.max() - few.min()) <= 1


def test_hashes_of_their_own():
    used = torch.cat([s.flatten() for s in slots(shared("density=1", map="hash"))]).unique()
    assert len(used) / 25_856 == pytest.approx(1 - 1 / math.e, abs=0.01)


@pytest.mark.parametrize("exact", [False, True])
def test_weights_start_with_the_deviation_of_the_given_ones(exact):
    torch.manual_seed(0)
    model = make()
    for initial in (0.04, 3.0):
        outcome = shared("density=0.1", model, exact_std=exact, initial=initial)
        [array] = shared_arrays(outcome.model)
        assert 0.9 * initial < float(array.values.detach().abs().max()) <= initial
        dense = dict(unshare(outcome.model).named_parameters())
        for name, given in model.named_parameters():
            if name.endswith("weight"):
                ratio = float((dense[name].std() / given.std()).detach())
                assert ratio == pytest.approx(1.0 if exact else 1 / math.sqrt(3), rel=0.05)
            else:
                assert not dense[name].any()


def test_local_arrays():
    outcome = shared(scope="local", grad_scale="none")
    assert outcome.promise.kept
    arrays = shared_arrays(outcome.model)
    assert [len(a) for a in arrays] == [819, 1639, 128]
    for layer in shared_layers(outcome.model).values():
        assert layer.place.scale == pytest.approx(1 / math.sqrt(layer.place.shape[1]) / 0.04)
    narrow = make()
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.zero_()
    [first, *_] = shared_layers(shared(model=narrow).model).values()
    assert first.place.scale == pytest.approx(1 / 8 / 0.04)


def test_seeds():
    one, same, other = (slots(shared(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", [{"map": "tile", "block": (8, 8)}, {"map": "hash"}, {}])
def test_cached_or_not_it_trains_the_same(options, digits_task):
    task = replace(digits_task, training=sc.TrainSettings(steps=12, lr=0.2))
    made = [
        sc.prune(task.fresh_model(0), NAME, "density=0.1", task, cache=cache, **options)
        for cache in (False, True)
    ]
    states = [outcome.model.state_dict() for outcome in made]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert made[0].after.dense_bytes < made[1].after.dense_bytes


def test_the_scale_of_the_array_is_of_no_matter(digits_task):
    """As every other training that follows, recovery by name included."""
    task = replace(
        digits_task, training=sc.TrainSettings(steps=30, lr=0.5, weight_decay=0.0),
        finetuning=sc.TrainSettings(steps=5, lr=0.5, weight_decay=0.0),
    )  # fmt: skip

    def loss(initial, recover=True, **options):
        try:
            outcome = sc.prune(
                task.fresh_model(0), NAME, "density=0.2", task, initial=initial, recover=recover,
                **options,
            )  # fmt: skip
        except DivergedError:
            return math.inf
        return outcome.metrics_after["loss"]

    assert loss(0.01) == pytest.approx(loss(1.0), abs=1e-2)
    assert loss(0.01, "finetune") == pytest.approx(loss(1.0, "finetune"), abs=1e-2)
    plain = [loss(initial, grad_scale="none") for initial in (0.01, 1.0)]
    assert plain[0] == math.inf or abs(plain[0] - plain[1]) > 0.1


def test_an_error_in_training_gives_the_model_back(digits_task):
    task = replace(digits_task, training=sc.TrainSettings(steps=10, lr=1e6))
    model = task.fresh_model(0)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(DivergedError):
        sc.prune(model, NAME, "density=0.2", task, inplace=True, grad_scale="none")
    assert isinstance(model[0], nn.Linear)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_bad_input():
    for options, argument in (
        ({"initial": 0.0}, "initial"), ({"min_size": -1}, "min_size"), ({"block": (0, 4)}, "block"),
        ({"scope": "local"}, "grad_scale"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=argument):
            shared(**options)
    with pytest.raises(InputError, match="budget: got 'params=266'.*the 266 other parameters stay"):
        shared("params=266")
    with pytest.raises(InputError, match="budget"):
        shared("bytes=1000")
    with pytest.raises(InputError, match="block: got .* a tile smaller than the 517 slots"):
        shared("density=0.02", map="tile")
    with pytest.raises(InputError, match="exclude"):
        shared(exclude=("nothing",))
