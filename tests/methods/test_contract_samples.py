"""What every method that chooses samples must do, under its default options.

The rows are the digits of scikit-learn: pixels as embeddings, with labels and a column of
scores; a method that trains gets the task of `conftest.py`, whose training set they are.
"""

import dataclasses
import math
import typing
from dataclasses import replace

import numpy as np
import pytest
import torch

import secateurs as sc
from secateurs.errors import InputError
from secateurs.registry import NEEDS, VOCABULARY, create, options_as_dict, options_of
from secateurs.selection.score_table import random_scores
from secateurs.selection.sources import from_arrays
from secateurs.settings import TrainSettings

from .conftest import TRAINING, digits

METHODS = sc.list_methods(unit="sample")
METHODS = {name: cls for name, cls in METHODS.items() if issubclass(cls, sc.Selector)}

pytestmark = pytest.mark.parametrize("name", METHODS)


def rows(order=None, shard=1 << 18, **fields):
    images, labels = (t.numpy()[:TRAINING] for t in digits())
    order = np.arange(TRAINING) if order is None else order
    column = random_scores(np.arange(TRAINING), 5)
    made = {"vectors": images + 1 / 64, "ids": np.arange(TRAINING), "labels": labels, **fields}
    vectors, ids, labels = (v if v is None else v[order] for v in made.values())
    return from_arrays(vectors, ids, labels, {"quality": column[order]}, rows=shard)


@pytest.fixture
def select(name, digits_task):
    """The method on the digits: (source, keep, ...) -> Selection."""
    task = replace(digits_task, training=TrainSettings(steps=40, lr=0.2))
    needs = set(METHODS[name].needs)

    def run(source=None, keep=0.25, method=name, **fields):
        if needs & {"batches", "training", "fresh-model"}:
            fields.setdefault("task", task)
        if "target" in needs:
            images = digits()[0][TRAINING:].numpy()
            fields.setdefault("target", from_arrays(images + 1 / 64))
        return sc.select(rows() if source is None else source, method, keep, **fields)

    return run


def whole_groups(name):
    """Whether rows go only in groups, so that a count can be missed by one."""
    return "group" in METHODS[name].tags.values("unit")


def test_it_keeps_exactly_what_was_asked(name, select):
    for keep in (0.1, 0.5, 1.0):
        selection = select(keep=keep)
        assert selection.promise.kept or selection.notes
        wanted = round(keep * TRAINING)
        gone = selection.count("duplicate") + selection.count("filtered")
        if not whole_groups(name):
            assert selection.kept == min(wanted, TRAINING - gone)
        assert len(selection.ids) == selection.kept == len(selection.indices)
        assert selection.kept + selection.count("pruned") + gone == TRAINING
        assert len(set(selection.ids.tolist())) == selection.kept


def test_the_same_seed_gives_the_same_rows(name, select):
    torch.manual_seed(17)
    before = torch.get_rng_state()
    one, two = select(seed=3), select(seed=3)
    assert torch.equal(before, torch.get_rng_state()), "it drew from torch's global generator"
    assert np.array_equal(one.indices, two.indices)
    assert all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(one.scores, two.scores, strict=True)
    )


def test_neither_the_order_of_the_rows_nor_the_shards_matter(name, select):
    if set(METHODS[name].needs) & {"batches", "training", "fresh-model"}:
        pytest.skip("its rows are those of a training set, in their order")
    whole = set(select().ids.tolist())
    assert set(select(rows(shard=-(-TRAINING // 3))).ids.tolist()) == whole
    order = np.random.default_rng(0).permutation(TRAINING)
    assert set(select(rows(order, shard=-(-TRAINING // 17))).ids.tolist()) == whole


def test_it_goes_on_from_a_workspace(name, select, tmp_path):
    first = select(work=sc.Workspace(tmp_path))
    ear = Ear()
    again = select(work=sc.Workspace(tmp_path, [ear]))
    assert ear.kinds & {"done", "train"} == set(), "something was done twice"
    assert np.array_equal(first.indices, again.indices)


class Ear:
    def __init__(self):
        self.kinds = set()

    def event(self, kind, values):
        self.kinds.add(kind)

    def begin(self, label, total): ...

    def advance(self, label, done): ...

    def end(self, label): ...


def test_it_refuses_bad_rows(name, select):
    bad = digits()[0][:TRAINING].numpy() + 1 / 64
    if "embeddings" in METHODS[name].needs:
        for value, told in ((np.nan, "NaN or Inf in row 77"), (np.inf, "NaN or Inf in row 77")):
            broken = bad.copy()
            broken[77, 3] = value
            with pytest.raises(InputError, match=f"{told} .*id 77"):
                select(rows(vectors=broken))
        with pytest.raises(InputError, match=r"embeddings: got none; accepted: .*encoder"):
            select(rows(vectors=None))
    if "labels" in METHODS[name].needs:
        with pytest.raises(InputError, match="labels: got None"):
            select(rows(labels=None))
    twice = np.arange(TRAINING)
    twice[9] = 4
    with pytest.raises(InputError, match="ids: got 4; accepted: every id once"):
        select(rows(ids=twice))


def test_it_refuses_bad_fractions_and_options(name, select):
    for keep in (0, -0.5, 1.5, math.nan):
        with pytest.raises(InputError, match="budget|keep"):
            select(keep=keep)
    with pytest.raises(InputError, match="accepted: for"):
        select(keep="sparsity=0.5")
    with pytest.raises(InputError, match="option: got 'no_such_option'"):
        select(no_such_option=1)
    for field, hint in typing.get_type_hints(METHODS[name]).items():
        if field in {f.name for f in dataclasses.fields(METHODS[name])}:
            with pytest.raises(InputError, match=field):
                create(name, {field: object()})
            if typing.get_origin(hint) is typing.Literal:
                with pytest.raises(InputError, match=field):
                    create(name, {field: "no such choice"})
    for option in options_of(METHODS[name]):
        if "float" in option.type.split(" or "):
            for number in (math.nan, math.inf):
                with pytest.raises(InputError, match=option.name.split("_")[0]):
                    create(name, {option.name: number})


def test_prune_and_select_refuse_each_others_methods(name, digits_task):
    with pytest.raises(InputError, match=r"secateurs\.select runs this one"):
        sc.prune(digits_task.fresh_model(0), name, "keep=0.5", digits_task)
    with pytest.raises(InputError, match=r"secateurs\.prune runs this one"):
        sc.select(rows(), "magnitude", 0.5)


def test_its_class_says_what_it_is(name):
    cls = METHODS[name]
    assert cls.name == name
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert cls.__module__.startswith("secateurs.methods.samples.")
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "the dataclass wrote it, nobody else"
    assert cls.budgets == ("keep",)
    assert set(cls.needs) <= set(NEEDS)
    for option in options_of(cls):
        assert option.help, f"{option.name} has no help text"
    for axis, allowed in VOCABULARY.items():
        assert set(cls.tags.values(axis)) <= set(allowed)
    for alias in cls.aliases:
        assert create(alias) == create(name)
    options = options_as_dict(create(name))
    assert create(name, options) == create(name)
