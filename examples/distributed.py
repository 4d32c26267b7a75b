"""Pruning under data parallelism: the same script on one process or on several.

    python examples/distributed.py
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/distributed.py

(On CPUs Accelerate's launcher starts several processes only when told ``--multi_gpu``; the
variable then makes them talk over gloo.)

Every process sees its share of the same global batches, so the masks of all ranks are
identical and the result is that of one process, up to the order of floating-point sums.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def make_task() -> sc.Task:
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32)
    y = torch.tensor(labels)
    train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(x[1400:], y[1400:]), batch_size=512)
    settings = sc.TrainSettings(epochs=5, lr=0.05)
    return sc.classification(make_model, train, test, training=settings)


def main(method: str = "gmp", out: str | None = None) -> sc.Outcome:
    state = PartialState(cpu=True)
    task = make_task()
    outcome = sc.prune(task.fresh_model(0), method, "sparsity=0.9", task)
    print(
        f"rank {state.process_index} of {state.num_processes}: "
        f"{outcome.masks.sparsity:.1%} sparse, accuracy {outcome.metrics_after['accuracy']:.3f}"
    )
    if out is not None:
        sc.save(outcome, Path(out) / f"rank-{state.process_index}")
    state.destroy_process_group()
    return outcome


if __name__ == "__main__":
    main(*sys.argv[1:])
