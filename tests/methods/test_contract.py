"""What every method must do. A new method is tested here without a line being added.

Every method is run on the small task of `conftest.py`, so it must be content with a perceptron
and 40 updates a training under its default options. Where it needs the scales of norms, the
perceptron has batch norm.
"""

import copy
import dataclasses
import math
import typing
from dataclasses import replace

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.devices import device_of
from secateurs.errors import InputError
from secateurs.parts.budgets import FRACTIONS, QUANTITIES
from secateurs.registry import NEEDS, VOCABULARY, Paper, create, options_as_dict, options_of
from secateurs.settings import TrainSettings

METHODS = {n: m for n, m in sc.list_methods().items() if not issubclass(m, sc.Selector)}
"""Those that prune models; `test_contract_samples.py` has those that choose samples."""
BUDGETS = {
    "sparsity": "sparsity=0.5",
    "density": "density=0.4",
    "keep": "keep=0.5",
    "params": "params=0.5",
    "macs": "macs=0.5",
    "bytes": "bytes=0.5",
    "latency": "latency=0.5",
    "n:m": "2:4",
}
"""A budget of every kind there is."""

pytestmark = pytest.mark.parametrize("name", METHODS)


def first_budget(name):
    """The first budget that the method accepts under its default options."""
    return accepted(name)[0]


def accepted(name):
    """A budget of every kind that the method accepts; methods that audit others choose."""
    method, found = create(name), []
    for kind in method.budgets:
        try:
            method.accept(BUDGETS[kind])
        except InputError:
            continue
        found.append(BUDGETS[kind])
    return found


def pruned(task, name, budget=None, model=None, method=None, **options):
    model = start(name, task) if model is None else model
    if issubclass(METHODS[name], sc.Codec):
        options["base"] = base_of(model, task).to(device_of(model))
    return sc.prune(model, method or name, budget or first_budget(name), task, **options)


def start(name, task):
    """Fresh weights, or for a codec the base trained a little."""
    model = task.fresh_model(0)
    if issubclass(METHODS[name], sc.Codec):
        sc.fit(model, task, task.training)
    return model


def base_of(model, task):
    """What a codec takes the difference to: the weights that `start` trained from."""
    fresh = task.fresh_model(0)
    same = fresh.state_dict().keys() == model.state_dict().keys()
    return fresh if same else copy.deepcopy(model)


@pytest.fixture
def task(name, digits_task, normalized_task):
    return replace(
        normalized_task if "norm-scales" in METHODS[name].needs else digits_task,
        training=TrainSettings(steps=40, lr=0.2),
        finetuning=TrainSettings(steps=10),
    )


@pytest.fixture
def outcome(name, task):
    """The method under its first budget with seed 0: made once, not to be changed."""
    if name not in OUTCOMES:
        OUTCOMES[name] = pruned(task, name)
    return OUTCOMES[name]


OUTCOMES = {}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_every_kind_of_budget_has_an_example_here(name):
    assert set(BUDGETS) == FRACTIONS | QUANTITIES | {"n:m"}
    assert set(METHODS[name].budgets) <= set(BUDGETS)
    assert accepted(name), "it accepts none of the budgets that it lists"


def test_it_reaches_its_budget_and_the_zeros_are_where_the_masks_say(name, task):
    for budget in accepted(name):
        if budget.startswith("latency"):
            continue  # a perceptron's forward pass is nothing but overhead
        outcome = pruned(task, name, budget)
        assert outcome.promise.kept, f"{budget}: {outcome.promise}"
        for weight, mask in outcome.masks.items():
            values = outcome.model.get_parameter(weight)
            assert not bool(values[~mask].any()), f"{weight} has weights where the mask has none"
        kept = sum(int((outcome.model.get_parameter(n) != 0).sum()) for n in outcome.masks)
        assert kept == outcome.masks.kept, "weights are zero that the masks count as kept"
        if budget.startswith("sparsity") and outcome.masks.total:
            share = 1 - kept / outcome.masks.total
            assert share == pytest.approx(0.5, abs=outcome.unit / outcome.masks.total)
        if budget.startswith("params"):
            dense = sum(p.numel() for p in task.fresh_model(0).parameters())
            left = sum(int((p != 0).sum()) for p in outcome.model.parameters())
            assert left <= dense / 2 + outcome.promise.tolerance
        assert math.isfinite(outcome.metrics_after["loss"])


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(name, task, outcome):
    torch.manual_seed(17)
    again = pruned(task, name)
    assert_same(outcome.model.state_dict(), again.model.state_dict())
    assert_same(dict(outcome.masks), dict(again.masks))
    assert outcome.metrics_after == again.metrics_after
    assert outcome.history == again.history
    if METHODS[name].needs == ("nothing",) and create(name).time == "PTP":
        return  # it has nothing that is random: no data, no training
    other = pruned(task, name, seed=1).model.state_dict()
    assert any(not torch.equal(t, other[n]) for n, t in outcome.model.state_dict().items())


def test_its_outcome_survives_save_and_load(name, task, outcome, tmp_path):
    sc.save(outcome, tmp_path / "out")
    width = outcome.source.get("width", 1.0)
    read = sc.load(tmp_path / "out", lambda: task.resize(width))
    assert task.measure(read.model) == outcome.metrics_after == read.metrics_after
    assert_same(dict(outcome.masks), dict(read.masks))
    assert read.promise == outcome.promise
    assert read.method == name
    assert create(name, read.options) == create(name), "its options do not come back from JSON"


def test_it_leaves_no_trace_in_itself_in_the_model_or_in_the_generator(name, task):
    method, model = create(name), start(name, task)
    options, weights = options_as_dict(method), {n: p.clone() for n, p in model.named_parameters()}
    before = torch.get_rng_state()
    pruned(task, name, model=model, method=method)
    assert torch.equal(before, torch.get_rng_state()), "it drew from torch's global generator"
    assert options_as_dict(method) == options
    assert set(vars(method)) <= {f.name for f in dataclasses.fields(method)}
    assert_same(dict(model.named_parameters()), weights)


def test_it_goes_on_from_a_workspace(name, task, outcome, tmp_path):
    """Everything that was trained is read; a second run trains nothing and ends the same."""
    first = pruned(task, name, work=sc.Workspace(tmp_path))
    ear = Ear()
    again = pruned(task, name, work=sc.Workspace(tmp_path, [ear]))
    assert ear.updates == 0
    for made in (first, again):
        assert_same(outcome.model.state_dict(), made.model.state_dict())
        assert outcome.metrics_after == made.metrics_after


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_is_pruned_there(name, task, tmp_path):
    outcome = pruned(task, name, model=start(name, task).cuda(), with_latency=True)
    assert device_of(outcome.model).type == "cuda"
    assert outcome.promise.kept
    assert math.isfinite(outcome.metrics_after["loss"])
    assert outcome.after.latency.median > 0
    sc.save(outcome, tmp_path / "out")
    width = outcome.source.get("width", 1.0)
    read = sc.load(tmp_path / "out", lambda: task.resize(width))
    assert_same(outcome.model.cpu().state_dict(), read.model.state_dict())


class Ear:
    updates = 0

    def event(self, kind, values):
        self.updates += kind == "train"

    def begin(self, label, total): ...

    def advance(self, label, done): ...

    def end(self, label): ...


def test_it_refuses_bad_budgets(name, task):
    with pytest.raises(InputError, match="budget"):
        pruned(task, name, "sparsity=1.5")
    for kind in set(BUDGETS) - set(METHODS[name].budgets):
        with pytest.raises(InputError, match="budget: got .*; accepted: for "):
            create(name).accept(BUDGETS[kind])


def test_it_refuses_unknown_options_and_wrong_types(name, task):
    with pytest.raises(InputError, match="option: got 'no_such_option'"):
        pruned(task, name, no_such_option=1)
    for field, hint in typing.get_type_hints(METHODS[name]).items():
        if field in {f.name for f in dataclasses.fields(METHODS[name])}:
            with pytest.raises(InputError, match=field):
                create(name, {field: object()})
            if typing.get_origin(hint) is typing.Literal:
                with pytest.raises(InputError, match=field):
                    create(name, {field: "no such choice"})


def test_it_refuses_numbers_that_are_none(name):
    for option in options_of(METHODS[name]):
        if "float" in option.type.split(" or "):
            for number in (math.nan, math.inf):
                with pytest.raises(InputError, match=option.name.split("_")[0]):
                    create(name, {option.name: number})


def test_it_refuses_a_model_with_nothing_to_prune(name, task):
    with pytest.raises(InputError, match="nothing to prune"):
        pruned(task, name, model=nn.Sequential(nn.BatchNorm1d(64), nn.ReLU()))


def test_it_refuses_weights_that_are_not_finite_and_names_the_layer(name, task):
    model = task.fresh_model(0)
    with torch.no_grad():
        model.get_parameter("2.weight")[1, 1] = torch.nan
    with pytest.raises(InputError, match="2.weight: got NaN"):
        pruned(task, name, model=model)


def test_it_refuses_a_model_without_the_scales_that_it_needs(name, digits_task):
    if "norm-scales" in METHODS[name].needs:
        with pytest.raises(InputError, match="model: got .* a model with normalisation layers"):
            pruned(digits_task, name)


def test_its_class_says_what_it_is(name):
    cls = METHODS[name]
    assert cls.name == name
    assert issubclass(cls, sc.Pruner | sc.TrainingPruner | sc.Procedure | sc.Codec)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.__module__.startswith("secateurs.methods.")
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "the dataclass wrote it, nobody else"
    assert set(cls.needs) <= set(NEEDS)
    for option in options_of(cls):
        assert option.help, f"{option.name} has no help text"
    for axis, allowed in VOCABULARY.items():
        assert set(cls.tags.values(axis)) <= set(allowed)


def test_it_names_its_paper_or_is_a_plain_baseline(name):
    cls = METHODS[name]
    assert "paper" in vars(cls)
    if cls.paper is not None:
        assert isinstance(cls.paper, Paper)
        assert cls.paper.title
        assert cls.paper.id
        assert 1985 <= cls.paper.year <= 2100
