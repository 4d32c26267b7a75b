"""A task on part of its training set; every row once and in order; batches with row numbers."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import secateurs as sc
from secateurs.errors import InputError
from secateurs.training.subset import BATCH, ROWS, in_order, numbered, task_on, training_rows
from secateurs.zoo.datasets import tensor_data

X, Y = torch.arange(22.0).view(11, 2), torch.arange(11) % 3


def task(**loader):
    data = TensorDataset(X, Y)
    options = {"batch_size": 4, "shuffle": True, **loader}
    return sc.classification(
        lambda: torch.nn.Linear(2, 3), DataLoader(data, **options), DataLoader(data, 4)
    )


def inputs(loader):
    return torch.cat([x for x, _ in loader])


def test_a_task_on_some_rows_has_those_and_no_others():
    some = task_on(task(), [7, 2, 9])
    assert sorted(inputs(some.train)[:, 0].tolist()) == [4.0, 14.0, 18.0]
    mask = torch.zeros(11, dtype=torch.bool)
    mask[[2, 7, 9]] = True
    assert torch.equal(inputs(in_order(task_on(task(), mask).train)), X[mask])
    assert training_rows(some) == 3
    assert type(some.train.sampler) is type(task().train.sampler)


def test_data_sets_that_fetch_whole_batches_stay_so():
    data = tensor_data("rows", (X, Y), (X, Y))
    train, test = data.loaders(4)
    own = replace(task(), train=train, evaluate=test)
    assert torch.equal(inputs(in_order(task_on(own, [1, 5]).train)), X[[1, 5]])
    for batch in numbered(own):
        assert torch.equal(batch[BATCH][0], X[batch[ROWS]])


def test_a_small_part_is_not_dropped_as_an_incomplete_batch():
    assert len(task_on(task(drop_last=True), [3]).train) == 1
    assert len(task_on(task(drop_last=True), range(6)).train) == 1


def test_numbers_name_the_rows_of_a_batch_and_every_row_comes_once():
    batches = list(numbered(task()))
    for batch in batches:
        assert torch.equal(batch[BATCH][0], X[batch[ROWS]])
        assert torch.equal(batch[BATCH][1], Y[batch[ROWS]])
    assert sorted(torch.cat([b[ROWS] for b in batches]).tolist()) == list(range(11))


def test_in_order_is_in_order_and_whole():
    assert torch.equal(inputs(in_order(task(drop_last=True).train)), X)


@pytest.mark.parametrize(("rows", "told"), [
    ([], "rows: got none"),
    ([0, 11], "rows: got 11; accepted: 0 to 10"),
    ([-1], "rows: got -1"),
    (torch.ones(5, dtype=torch.bool), "a mask of shape"),
])  # fmt: skip
def test_it_refuses_rows_that_are_not_there(rows, told):
    with pytest.raises(InputError, match=told):
        task_on(task(), rows)


def test_it_refuses_loaders_whose_rows_have_no_number():
    drawn = WeightedRandomSampler(torch.ones(11), 11)
    with pytest.raises(InputError, match=r"task\.train: got a loader with a sampler of its own"):
        training_rows(task(shuffle=False, sampler=drawn))
