"""Pruning by explaining."""

import copy

import pytest
import torch
from sklearn.datasets import make_moons
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.methods.networks.rethinking_value import reinitialize
from secateurs.training.order import mix
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

SEEDS, DRAWS = 3, 2
FROM_DATA, DATA_FREE = ("relevance", "taylor", "gradient"), ("weight", "random")


def toy():
    """The public toy network: its third hidden layer has no ReLU."""
    return nn.Sequential(
        nn.Linear(2, 1000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1000, 1000), nn.ReLU(),
        nn.Linear(1000, 1000), nn.Linear(1000, 2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def moons(tables):
    """Training accuracies by (references a class, criterion), a third of the neurons gone."""
    table = tables()
    points, labels = make_moons(2000, noise=0.1, random_state=0)
    samples = TensorDataset(torch.tensor(points, dtype=torch.float32), torch.tensor(labels))
    task = sc.classification(
        toy, DataLoader(samples, 256, shuffle=True), DataLoader(samples, 2000),
        training=sc.TrainSettings(
            steps=300, optimizer="adam", lr=1e-3, weight_decay=0, schedule="constant"
        ),
    )  # fmt: skip
    for seed in range(SEEDS):
        dense = task.fresh_model(seed)
        sc.fit(dense, task, task.training, seed=seed)
        table.add("dense", task, dense)
        for draw in range(DRAWS):

            def note(references, criterion, seed=seed, draw=draw, dense=dense):
                outcome = sc.prune(
                    dense, "pruning-by-explaining", "keep=0.66667", task, seed=mix(seed, draw),
                    recover=False, criterion=criterion, step=1.0, samples=references,
                )  # fmt: skip
                table.note((references, criterion), outcome.metrics_after["accuracy"])

            for criterion in DATA_FREE:
                note(1, criterion)
            for references in (1, 5, 20):
                for criterion in FROM_DATA:
                    note(references, criterion)
    return table


SOURCE = "fashion-mnist?limit=10000&size=14&classes=0,1,2,3,4"
TARGET = "fashion-mnist?limit=10000&size=14&classes=5,6,7,8,9"
KEEP = 0.6
NETWORK = "zoo:conv-4?width=0.25"
FEW = sc.TrainSettings(steps=60, lr=0.02)


@pytest.fixture(scope="module")
def transferred(tables):
    """Test accuracies by (samples a class, kept filters, criterion) on classes that the network
    was not trained on, from so few samples; nothing is trained after the removal."""
    table = tables()
    source = make_task(NETWORK, SOURCE, training=sc.TrainSettings(epochs=4, lr=0.05))
    for seed in range(SEEDS):
        learned = source.fresh_model(seed)
        sc.fit(learned, source, source.training, seed=seed)
        for samples in (1, 5, 10):
            data = f"{TARGET}&per_class={samples}"
            task = make_task(NETWORK, data, batch_size=50, training=FEW)
            dense = copy.deepcopy(learned)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                dense.classifier = nn.Linear(dense.classifier.in_features, 5)
            sc.fit(dense, task, FEW, seed=seed)
            table.add((samples, "dense"), task, dense)
            for criterion in (*FROM_DATA, *DATA_FREE):
                outcome = sc.prune(
                    dense, "pruning-by-explaining", f"keep={KEEP}", task, seed=seed,
                    recover=False, criterion=criterion, samples=samples,
                )  # fmt: skip
                table.note((samples, criterion), outcome.metrics_after["accuracy"])
                if criterion == "relevance":
                    fresh = outcome.model
                    reinitialize(fresh, seed=seed)
                    sc.fit(fresh, task, FEW, seed=seed)
                    table.add((samples, "scratch"), task, fresh)
    return table


def test_a(moons):
    pass


def test_b(transferred):
    pass
