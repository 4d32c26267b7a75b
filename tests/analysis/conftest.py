"""A training of a moment: labelled points, and a network with running statistics and dropout."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc


def make_net():
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


def make_task(**settings):
    generator = torch.Generator().manual_seed(5)
    points = torch.randn(160, 8, generator=generator)
    labels = (points[:, 0] > 0).long() + (points[:, 1] > 0).long()
    return sc.classification(
        make_net,
        DataLoader(TensorDataset(points[:80], labels[:80]), 8, shuffle=True),
        DataLoader(TensorDataset(points[80:], labels[80:]), 80),
        training=sc.TrainSettings(**{"steps": 40, "lr": 0.1, **settings}),
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On networks this small more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_task():
    """The factory, so that a test can ask for its own settings."""
    return make_task
