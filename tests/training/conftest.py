"""Tiny trainings whose every random number can be watched."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import secateurs as sc

SAMPLES = 44
"""Eleven batches of four an epoch; with batches of 8 the last one is short."""


class Points(Dataset):
    """Labelled points in 8 dimensions; with `noise` every look at one is another (augmentation)."""

    def __init__(self, noise=0.0):
        generator = torch.Generator().manual_seed(5)
        self.points = torch.randn(SAMPLES, 8, generator=generator)
        self.labels = (self.points[:, 0] > 0).long() + (self.points[:, 1] > 0).long()
        self.noise = noise

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return self.points[index] + self.noise * torch.randn(8), self.labels[index]


def make_net():
    """Weights, running statistics and dropout: everything a snapshot must hold."""
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


def make_task(noise=0.0, workers=0, **settings):
    data = Points(noise)
    return sc.classification(
        make_net,
        DataLoader(data, 4, shuffle=True, num_workers=workers),
        DataLoader(Points(), 16),
        training=sc.TrainSettings(**{"steps": 30, "lr": 0.1, **settings}),
    )


class Recorder:
    """Hears everything; at step `stop_at` of a training it raises, as a kill would."""

    def __init__(self, stop_at=None):
        self.stop_at, self.events = stop_at, []

    def event(self, kind, values):
        self.events.append({"event": kind, **values})
        if kind == "train" and values["step"] == self.stop_at:
            raise KeyboardInterrupt

    def begin(self, label, total):
        self.events.append({"event": "begin", "at": label, "total": total})

    def advance(self, label, done):
        pass

    def end(self, label):
        pass

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On networks this small more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny_task():
    """The factory, so that a test can ask for augmentation, workers or its own settings."""
    return make_task


@pytest.fixture
def recorder():
    return Recorder
