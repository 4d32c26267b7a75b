"""PAGCP on two tasks: the one that suffers is watched.

Paper: arXiv 2303.11923, whose claim is that an allowance a task keeps all of them alive where
global and uniform magnitude sacrifice one. One trunk of 32, 48, 48 and 64 channels tells digits
and redraws them; 1000 images of training, 400 to calibrate on, 377 for the test. One round by the
paper's own rule (r = 0.5, T = 4, λ solved), nothing trained after it; rivals at the same MACs, of
which 0.89 are left. Loss on the test images over that of the dense network, means of 3 seeds:

                 class    image, which is the worst
    pagcp        1.03     2.15   (2.08 2.46 1.91)
    global L1    1.03     2.38   (2.49 2.19 2.46)
    uniform L1   1.03     2.78   (2.40 2.43 3.51)
    random       1.03     3.79   (2.23 3.64 5.51)

The worst task is the least bad on average and in two seeds of three.

What does not hold: far budgets in few rounds. On Fashion-MNIST at 14x14 with class and rotation,
at 0.3 of the MACs in three rounds of one epoch each, PAGCP came to a mean accuracy of 0.434 (3
seeds, allowances raised by doubling; 0.341 in one seed of half the width with the least that does)
where uniform L1 kept 0.808 (0.631) and the architecture that PAGCP left, with fresh weights, came
to 0.569. A loss cannot rise beyond that of chance, so once allowances come near it a whole layer
passes, here all but two of its filters. The card's author saw the same with T = 30. Allowances as
small as the paper's, with as many rounds as that takes, are what it is for.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.task import Metric, multitask
from secateurs.training.fresh import redraw
from secateurs.zoo.datasets import load_data

pytestmark = pytest.mark.slow

SEEDS = 3
ONE_ROUND = {"first_drop": 0.5, "total_factor": 4.0, "solve": True, "rounds": 1,
             "stop": "allowance", "batches": None}  # fmt: skip
RIVALS = {
    "uniform L1": {"criterion": "l1", "scope": "local"},
    "global L1": {"criterion": "l1"},
    "random": {"criterion": "random"},
}


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
        redraw(outcome.model, task, seed)
        sc.fit(outcome.model, task, task.training, seed=seed)
        note("from scratch", outcome.model)
    return table


def test_the_worst_task_suffers_least(allocated):
    worst = {arm: allocated.mean((arm, "worst")) for arm in ("pagcp", *RIVALS)}
    assert min(worst, key=worst.get) == "pagcp"
    assert worst["pagcp"] <= worst["uniform L1"] - 0.3
    assert worst["pagcp"] <= worst["random"] - 0.8
    seeds = range(SEEDS)
    lowest = [
        all(allocated["pagcp", "worst"][s] <= allocated[arm, "worst"][s] for arm in RIVALS)
        for s in seeds
    ]
    assert sum(lowest) >= 2


def test_a_task_that_is_easy_vetoes_nothing(allocated):
    assert allocated.mean(("pagcp", "class")) <= 1.1
    assert 0.8 <= allocated.mean("macs") <= 0.95


def test_trained_from_scratch_the_shape_it_left_is_nearly_as_good(allocated):
    """As many epochs as the dense network had: the Scratch-E of rethinking-value."""
    assert allocated.mean(("from scratch", "worst")) <= 1.25
