"""Small networks and tasks of few samples, in float64 where numbers are compared."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On networks this small more threads only wait for each other."""
    torch.set_num_threads(1)


def network():
    """A convolution that stays dense, a second one, a linear layer; batch norm between."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def images(samples, seed=0):
    """Three classes that differ in their mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    noise = torch.randn(samples, 1, 4, 4, generator=generator)
    return noise + labels[:, None, None, None], labels


def small_task(samples=90, **training):
    train, test = TensorDataset(*images(samples)), TensorDataset(*images(30, 1))
    return sc.classification(
        network,
        DataLoader(train, 8, shuffle=True),
        DataLoader(test, 30),
        training=sc.TrainSettings(**{"epochs": 3, "lr": 0.05, **training}),
    )


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network()


@pytest.fixture
def task():
    return small_task()
