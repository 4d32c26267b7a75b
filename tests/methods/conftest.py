"""A task small enough to train in a moment: the digits of scikit-learn and a small MLP."""

import copy
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc

TRAINING = 1280
"""Samples to train on; the other 517 are held out."""


def make(width=1.0):
    first, second = (max(1, round(size * width)) for size in (32, 16))
    return nn.Sequential(
        nn.Linear(64, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, 10),
    )


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
def trained():
    return copy.deepcopy(trained_once())
