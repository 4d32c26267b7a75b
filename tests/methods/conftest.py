"""A task small enough to train in a moment: the digits of scikit-learn and a small MLP."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.state import load_tree, save_tree
from secateurs.training.order import batches_from

TRAINING = 1280
"""Samples to train on; the other 517 are held out."""


class KilledError(Exception):
    """Stands for a kill."""


class Killer:
    """A listener in whose presence a stage dies at a step."""

    def __init__(self, stage=None, step=None):
        self.stage, self.step, self.seen = stage, step, []

    def event(self, kind, values):
        if kind == "train":
            self.seen.append((values["stage"], values["step"]))
            if self.seen[-1] == (self.stage, self.step):
                raise KilledError

    def begin(self, label, total): ...

    def advance(self, label, done): ...

    def end(self, label): ...


def make(width=1.0):
    first, second = (max(1, round(size * width)) for size in (32, 16))
    return nn.Sequential(
        nn.Linear(64, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, 10),
    )


def make_normalized(width=1.0):
    """The same with batch norm, its linear layers under the same names."""
    net = make(width)
    for place in (1, 3):
        net[place] = nn.Sequential(nn.BatchNorm1d(net[place - 1].out_features), nn.ReLU())
    return net


@cache
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def make_task():
    images, labels = digits()
    train = TensorDataset(images[:TRAINING], labels[:TRAINING])
    held_out = TensorDataset(images[TRAINING:], labels[TRAINING:])
    return sc.classification(
        make,
        DataLoader(train, 32, shuffle=True),
        DataLoader(held_out, 512),
        training=sc.TrainSettings(epochs=3, lr=0.2),
        finetuning=sc.TrainSettings(epochs=1, lr=0.05),
        resize=make,
        name="digits",
    )


@cache
def trained_once():
    task = make_task()
    model = task.fresh_model(0)
    sc.fit(model, task, task.training)
    return model.eval()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On networks this small more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def digits_task():
    return make_task()


@pytest.fixture
def normalized_task(digits_task):
    return replace(digits_task, model=make_normalized, resize=make_normalized)


@pytest.fixture
def trained():
    return copy.deepcopy(trained_once())


@pytest.fixture
def run_steps(digits_task):
    """A bare loop over updates [first, last): (model, optimizer, first, last, after each)."""

    def run(model, optimizer, first, last, after=lambda: None):
        batches = batches_from(digits_task.train, 0, first)
        for _ in range(first, last):
            optimizer.zero_grad()
            digits_task.batch_loss(model, next(batches)[0]).backward()
            optimizer.step()
            after()

    return run


@pytest.fixture
def train_attached(digits_task, run_steps, tmp_path):
    """Train under a training pruner: (method, budget, steps, ...) -> the attachment.

    With `interrupt` the state is written to a file after so many steps and everything is made
    anew from it. `after` is called with the attachment after the attaching and every step.
    """

    def begin(method, budget, steps, **fields):
        model = digits_task.fresh_model(0)
        optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **fields})
        return method.attach(model, optimizer, budget, steps)

    def train(method, budget="sparsity=0.9", steps=60, interrupt=0, after=None, **fields):
        at = begin(method, budget, steps, **fields)
        tell = (lambda: None) if after is None else lambda: after(at)
        tell()
        if interrupt:
            run_steps(at.model, at.optimizer, 0, interrupt, tell)
            tree = {
                "model": at.model.state_dict(),
                "optimizer": at.optimizer.state_dict(),
                "attachment": at.state_dict(),
            }
            save_tree(tmp_path / "state", tree)
            at, tree = begin(method, budget, steps, **fields), load_tree(tmp_path / "state")
            at.model.load_state_dict(tree["model"])
            at.optimizer.load_state_dict(tree["optimizer"])
            at.load_state_dict(tree["attachment"])
        run_steps(at.model, at.optimizer, interrupt, steps, tell)
        at.finish()
        return at

    return train
