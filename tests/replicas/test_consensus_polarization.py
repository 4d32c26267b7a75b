"""Consensus gates on the digits: what it is worth that all samples agree.

MEASURED
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
    """By (units, λ_pol, what) the means over the seeds; ``budget`` is the method by its defaults."""
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
                gated, static, _ = outcome.history
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


def test_to_be_written(measured):
    pass
