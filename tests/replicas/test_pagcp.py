"""PAGCP on two tasks."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.networks.rethinking_value import reinitialize
from secateurs.task import Metric, multitask
from secateurs.training.order import mix
from secateurs.zoo.catalog import make_task
from secateurs.zoo.datasets import load_data

pytestmark = pytest.mark.slow

SEEDS = 3
ONE_ROUND = {"first_drop": 0.5, "total_factor": 4.0, "solve": True, "rounds": 1,
             "stop": "allowance", "batches": None}  # fmt: skip
DATA = "fashion-mnist?limit=3000&size=14&with=rotation"
MACS, ROUNDS = 0.3, 3
RIVALS = {
    "uniform L1": {"criterion": "l1", "scope": "local"},
    "global L1": {"criterion": "l1"},
    "random": {"criterion": "random"},
}


def missing(data):
    """Why a data set cannot be loaded; empty where it can."""
    try:
        load_data(data)
    except InputError as error:
        return str(error)
    return ""


class TwoHeads(nn.Module):
    """A trunk that serves a classifier and a decoder."""

    def __init__(self):
        super().__init__()
        layers, inputs = [], 1
        for place, size in enumerate((32, 48, 48, 64)):
            convolution = nn.Conv2d(inputs, size, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(size), nn.ReLU()]
            if place == 1:
                layers.append(nn.MaxPool2d(2))
            inputs = size
        self.trunk = nn.Sequential(*layers)
        self.classifier, self.decoder = nn.Linear(64, 10), nn.Conv2d(64, 4, 1)

    def forward(self, x):
        y = self.trunk(x)
        return self.classifier(y.mean((2, 3))), F.pixel_shuffle(self.decoder(y), 2)


def with_itself(batch):
    images, labels = batch
    return images, (labels, images)


def two_heads(train, test):
    losses = {
        "class": lambda out, target: F.cross_entropy(out[0], target[0]),
        "image": lambda out, target: 20 * F.mse_loss(out[1], target[1]),
    }
    right = Metric(lambda out, target: (out[0].argmax(1) == target[0]).float())
    return multitask(
        TwoHeads, DataLoader(train, 64, shuffle=True), DataLoader(test, 400), losses,
        {"accuracy": right}, example_inputs=test[:1][0], split=with_itself,
        training=sc.TrainSettings(epochs=6, optimizer="adam", lr=2e-3, weight_decay=0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def allocated(tables):
    """Test losses over those of the dense network, by (arm, task), after one round alone."""
    data, table = load_data("digits?test=0.01"), tables()
    images, labels = data.train.inputs, data.train.targets
    images = (images - images.min()) / (images.max() - images.min())
    for seed in range(SEEDS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        parts = [TensorDataset(images[i], labels[i]) for i in order.split([1000, 400, 377])]
        task = two_heads(parts[0], parts[2])
        dense = task.fresh_model(seed)
        sc.fit(dense, task, task.training, seed=seed)
        own = two_heads(parts[1], parts[2])  # the calibration part takes the place of training
        before = task.measure_losses(dense)

        def note(arm, model, before=before, task=task):
            ratios = {k: v / before[k] for k, v in task.measure_losses(model).items()}
            for name, ratio in {**ratios, "worst": max(ratios.values())}.items():
                table.note((arm, name), ratio)

        outcome = sc.prune(dense, "pagcp", "macs=0.05", own, seed=seed, recover=False, **ONE_ROUND)
        note("pagcp", outcome.model)
        table.note("macs", outcome.after.macs / outcome.before.macs)
        for arm, options in RIVALS.items():
            budget = f"macs={outcome.after.macs + 1}"
            rival = sc.prune(dense, "spa", budget, own, seed=seed, recover=False, **options)
            note(arm, rival.model)
    return table


@pytest.fixture(scope="module")
def pruned(tables):
    """Mean accuracies over the two tasks, by arm: clothing, and by how much it was turned."""
    if why := missing(DATA):
        pytest.skip(f"needs Fashion-MNIST: {why}")
    table = tables()
    task = make_task(
        "zoo:convnet", DATA, training=sc.TrainSettings(epochs=5, lr=0.05),
        finetuning=sc.TrainSettings(epochs=1, lr=0.02),
    )  # fmt: skip
    longer = replace(task, finetuning=sc.TrainSettings(epochs=ROUNDS, lr=0.02))
    for seed in range(SEEDS):
        dense = task.fresh_model(seed)
        sc.fit(dense, task, task.training, seed=seed)
        table.add("dense", task, dense)
        outcome = sc.prune(dense, "pagcp", f"macs={MACS}", task, seed=seed, rounds=ROUNDS)
        table.add("pagcp", task, outcome.model)
        table.note("macs", outcome.after.macs / outcome.before.macs)
        for arm, options in RIVALS.items():
            rival = sc.prune(dense, "spa", f"macs={MACS}", longer, seed=seed, **options)
            table.add(arm, task, rival.model)
        scratch = outcome.model
        reinitialize(scratch, seed=mix(seed, 1))
        sc.fit(scratch, task, replace(task.training, epochs=5 + ROUNDS), seed=mix(seed, 2))
        table.add("scratch", task, scratch)
    return table


def test_print(allocated, pruned):
    pass
