"""Consensus gates on the digits: what it is worth that all samples agree.

Paper: arXiv 2302.10798, whose claim is that gates trained with the polarisation become constants,
so that half of a network goes in one training and for next to nothing. Six residual blocks of 16
channels behind a stem, 1200 digits to train on and 597 to test, 10 epochs of Adam; 52 % of the
multiply-accumulates stay, which are three blocks or half of the inner channels. Means of 3 seeds,
2 minutes on one core; "cut" is what the gates of all training samples vote for, without any
training after it:

                                   gated           cut             defect   MACs
    dense                                          0.963 ± 0.021            1
    blocks,    λ_pol = 0           0.971 ± 0.012   0.962 ± 0.023   0.054    0.503
    blocks,    λ_pol = 1           0.979 ± 0.004   0.979 ± 0.004   0.000    0.503
    channels,  λ_pol = 0           0.961 ± 0.005   0.916 ± 0.024   0.089    0.492
    channels,  λ_pol = 1           0.975 ± 0.004   0.974 ± 0.005   0.003    0.510

    by the budget, λ_pol = 1       no settling     settle = 0.2    scratch          random   L1
    blocks                         0.979 ± 0.004   0.974 ± 0.005   0.954 ± 0.030
    channels                       0.974 ± 0.005   0.959 ± 0.014   0.967 ± 0.014    0.961    0.956

"scratch" is a fresh network of three blocks, or of eight inner channels, trained as long (any
three blocks make the same network, so it stands for random ones, too); "random" and "L1" cut the
dense network and fine-tune it for two epochs more. With the polarisation the cut changes nothing,
without it channels lose 4.5 points. Holding the vote early does not pay here: the gates agree
long before, and the settling starts with a fresh Adam at a constant rate. All differences between
networks that are not in doubt about their gates are within what the seeds of the dense one differ.
"""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc

pytestmark = pytest.mark.slow

SEEDS, BUDGET = 3, "macs=0.52"


class Block(nn.Module):
    """y = relu(x + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, width, inner):
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x):
        inner = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(inner))).relu()


def make(blocks=6, inner=16):
    stem = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    stack = (Block(16, inner) for _ in range(blocks))
    return nn.Sequential(*stem, *stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def make_task():
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    labels = torch.tensor(labels)[order]
    train, held_out = (
        TensorDataset(images[s], labels[s]) for s in (slice(1200), slice(1200, None))
    )
    recipe = {"optimizer": "adam", "lr": 2e-3, "weight_decay": 0.0, "schedule": "constant"}
    return sc.classification(
        make, DataLoader(train, 64, shuffle=True), DataLoader(held_out, 600),
        training=sc.TrainSettings(epochs=10, **recipe),
        finetuning=sc.TrainSettings(epochs=2, **recipe),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(tables):
    """By (units, λ_pol, what) over the seeds; ``budget`` is the method by its defaults."""
    table, task = tables(), make_task()
    for seed in range(SEEDS):
        dense = task.fresh_model(seed)
        sc.fit(dense, task, task.training, seed=seed)
        table.add("dense", task, dense)
        for units, smaller in (("blocks", {"blocks": 3}), ("channels", {"inner": 8})):
            scratch = task.with_model(lambda smaller=smaller: make(**smaller))
            model = scratch.fresh_model(seed)
            sc.fit(model, scratch, task.training, seed=seed)
            table.add((units, "scratch"), task, model)
            for weight in (0.0, 1.0):
                outcome = sc.prune(
                    task.fresh_model(seed), "consensus-polarization", BUDGET, task, seed=seed,
                    units=units, polar_weight=weight, settle=0.0, extract="vote",
                )  # fmt: skip
                gated, static = outcome.history
                table.note((units, weight, "gated"), gated["accuracy"])
                table.note((units, weight, "static"), static["accuracy"])
                table.note((units, weight, "defect"), gated["defect"])
                table.note((units, weight, "open"), outcome.promise.reached / outcome.before.macs)
            for settle in (0.0, 0.2):
                outcome = sc.prune(
                    task.fresh_model(seed), "consensus-polarization", BUDGET, task, seed=seed,
                    units=units, settle=settle,
                )  # fmt: skip
                table.note((units, "budget", settle), outcome.metrics_after["accuracy"])
                assert outcome.promise.kept
        for criterion in ("random", "l1"):
            outcome = sc.prune(
                dense, "spa", BUDGET, task, seed=seed, criterion=criterion, roles=("channel",)
            )
            table.note(("channels", criterion), outcome.metrics_after["accuracy"])
    return table


UNITS = pytest.mark.parametrize("units", ["blocks", "channels"])


@UNITS
def test_with_the_polarisation_the_cut_changes_nothing(measured, units):
    for gated, static in zip(
        measured[units, 1.0, "gated"], measured[units, 1.0, "static"], strict=True
    ):
        assert abs(gated - static) <= 0.01
    assert max(measured[units, 1.0, "defect"]) <= 0.01
    assert max(measured[units, 1.0, "open"]) <= 0.54


@UNITS
def test_without_it_samples_disagree_and_the_cut_costs(measured, units):
    assert measured.mean((units, 0.0, "defect")) >= 0.03
    lost = measured.mean((units, 0.0, "gated")) - measured.mean((units, 0.0, "static"))
    assert lost >= {"blocks": 0.003, "channels": 0.03}[units]
    gain = measured.mean((units, 1.0, "static")) - measured.mean((units, 0.0, "static"))
    assert gain >= {"blocks": 0.005, "channels": 0.03}[units]


@UNITS
def test_half_of_the_network_is_as_good_as_all_of_it_and_as_one_from_scratch(measured, units):
    cut = measured.mean((units, "budget", 0.0))
    assert cut >= measured.mean("dense") - 0.01
    assert cut >= measured.mean((units, "scratch")) - 0.01
    assert measured.mean((units, "budget", 0.2)) >= measured.mean("dense") - 0.02
    if units == "channels":
        for criterion in ("random", "l1"):
            assert cut >= measured.mean((units, criterion)) - 0.005
