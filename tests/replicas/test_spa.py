"""SPA on the digits: all three times, and what OBSPA's inputs are worth.

Paper: arXiv 2403.18955; its tables could not be reached, so the card's replica is the claim: a
small convolutional network with batch norm, no training after pruning, means of 3 seeds; 4
minutes on one core. Measured, the dense network being at 0.990 ± 0.005, by parameters removed:

                            30 %             50 %
    random                  0.822 ± 0.187    0.621 ± 0.225
    l1                      0.958 ± 0.039    0.935 ± 0.020
    l1, compensated         0.992 ± 0.003    0.987 ± 0.002
    obs                     0.991 ± 0.006    0.988 ± 0.003
    obs, recalibrated       0.993 ± 0.005    0.987 ± 0.001
    obs, uniform noise      0.986 ± 0.003    0.959 ± 0.025
    obs, natural noise      0.986 ± 0.008    0.975 ± 0.003
    l1, fine-tuned          0.989 ± 0.008    0.988 ± 0.003
    before training, snip   0.991 ± 0.004    0.989 ± 0.002

The card removes 30 and 50 % of the channels and loses more without compensation; before training
random channels do as well as scored ones.
"""

import statistics

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.training.batches import calibration_inputs
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

SEEDS, REMOVED = 3, (0.3, 0.5)
ARMS = {
    "random": {"criterion": "random", "compensation": False, "recalibration": False},
    "l1": {"criterion": "l1", "compensation": False, "recalibration": False},
    "l1, compensated": {"criterion": "l1", "recalibration": False},
    "obs": {"recalibration": False},
    "obs, recalibrated": {},
    "obs, noise": {"inputs": "noise", "noise": "uniform"},
    "obs, natural noise": {"inputs": "noise"},
}


def network():
    layers = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


@pytest.fixture(scope="module")
def task():
    return make_task(
        "zoo:convnet", "digits", training=sc.TrainSettings(epochs=12, lr=0.05),
        finetuning=sc.TrainSettings(epochs=4, lr=0.02),
    ).with_model(network)  # fmt: skip


@pytest.fixture(scope="module")
def accuracy(task):
    """Accuracy by (share of the parameters that goes, arm), means over the seeds."""
    found = {}
    for seed in range(SEEDS):
        dense = task.fresh_model(seed)
        sc.fit(dense, task, task.training, seed=seed)
        found.setdefault((0.0, "dense"), []).append(task.measure(dense)["accuracy"])
        for removed in REMOVED:
            budget = f"sparsity={removed}"
            runs = {n: {"when": "no-training", **o} for n, o in ARMS.items()}
            runs["l1, fine-tuned"] = {}
            for name, options in runs.items():
                outcome = sc.prune(dense, "spa", budget, task, seed=seed, **options)
                place = (removed, name)
                found.setdefault(place, []).append(outcome.metrics_after["accuracy"])
            for criterion in ("snip", "grasp", "crop", "random"):
                outcome = sc.prune(
                    task.fresh_model(seed), "spa", budget, task, seed=seed, when="before",
                    criterion=criterion,
                )  # fmt: skip
                place = (removed, f"before, {criterion}")
                found.setdefault(place, []).append(outcome.metrics_after["accuracy"])
    for place, values in found.items():
        print(*place, f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}")
    return {place: statistics.fmean(values) for place, values in found.items()}


@pytest.mark.parametrize("removed", REMOVED)
def test_compensation_is_worth_most_of_the_accuracy(accuracy, removed):
    dense, plain = accuracy[0.0, "dense"], accuracy[removed, "l1"]
    for arm in ("obs", "l1, compensated"):
        assert dense - accuracy[removed, arm] <= 0.3 * (dense - plain)
        assert accuracy[removed, arm] >= accuracy[removed, "random"] + 0.1


@pytest.mark.parametrize("removed", REMOVED)
def test_the_better_the_inputs_the_better_the_network(accuracy, removed):
    assert accuracy[removed, "obs, recalibrated"] >= accuracy[removed, "obs"] - 0.01
    assert accuracy[removed, "obs"] > accuracy[removed, "obs, noise"]
    assert accuracy[removed, "obs, noise"] > accuracy[removed, "l1"]


@pytest.mark.parametrize("removed", REMOVED)
def test_with_training_all_of_it_comes_back(accuracy, removed):
    dense = accuracy[0.0, "dense"]
    assert accuracy[removed, "l1, fine-tuned"] >= dense - 0.015
    for criterion in ("snip", "grasp", "crop"):
        assert accuracy[removed, f"before, {criterion}"] >= dense - 0.02


def test_calibration_inputs_are_the_training_set(task):
    inputs = calibration_inputs(task.training_loader(), 128, 0, task.unpack)
    assert inputs.shape == (128, 1, 8, 8)
    assert not torch.equal(inputs[0], inputs[1])
