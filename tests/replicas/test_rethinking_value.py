"""Rethinking the value on Fashion-MNIST: the small network from scratch is as good."""

import math
import statistics

import pytest
import torch

import secateurs as sc
from secateurs.methods.networks.rethinking_value import reinitialize, scratch_epochs
from secateurs.parts.costs import measure_cost
from secateurs.training.order import mix
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

DATA = "fashion-mnist?limit=6000&size=14"
HIDDEN, STEPS, SEEDS = (200, 100), 1000, 3
RECIPE = sc.TrainSettings(steps=STEPS, lr=0.05)
SMALL = sc.TrainSettings(steps=250, lr=0.005, schedule="constant")
TUNED = sc.TrainSettings(steps=250, lr=0.02)
KEEP = (0.7, 0.5, 0.3, 0.1)


def task_of(*hidden, **settings):
    spec = "zoo:mlp?hidden=" + ",".join(map(str, hidden))
    return make_task(spec, DATA, batch_size=64, **{"training": RECIPE, **settings})


@torch.no_grad()
def shrunk(large, keep):
    """The smaller network of the neurons with the largest L1 norms, weights inherited."""
    sizes = [round(keep * size) for size in HIDDEN]
    small = task_of(*sizes).fresh_model(0)
    rows = [
        weight.abs().sum(1).argsort(descending=True, stable=True)[:size].sort().values
        for weight, size in zip(
            (large.features.fc1.weight, large.features.fc2.weight), sizes, strict=True
        )
    ]
    first, second = rows
    for name in ("weight", "bias"):
        getattr(small.features.fc1, name).copy_(getattr(large.features.fc1, name)[first])
    small.features.fc2.weight.copy_(large.features.fc2.weight[second][:, first])
    small.features.fc2.bias.copy_(large.features.fc2.bias[second])
    small.classifier.weight.copy_(large.classifier.weight[:, second])
    small.classifier.bias.copy_(large.classifier.bias)
    return small


def score(task, model, settings=None, seed=0):
    if settings is not None:
        sc.fit(model, task, settings, seed=seed)
    return task.measure(model)["accuracy"]


@pytest.fixture(scope="module")
def structured(fashion):
    """Accuracy by (keep, arm), means over the seeds."""
    found, ratios = {}, {}
    for seed in range(SEEDS):
        task = task_of(*HIDDEN)
        large = task.fresh_model(seed)
        found.setdefault((1.0, "dense"), []).append(score(task, large, RECIPE, seed))
        for keep in KEEP:
            small = shrunk(large, keep)
            costs = [measure_cost(m, task.example_inputs).macs for m in (large, small)]
            ratios[keep] = costs[0] / costs[1]
            arms = {"none": (small, None), "small rate": (small, SMALL), "tuned": (small, TUNED)}
            for arm, cap in (("scratch-e", 1), ("scratch-b", None), ("capped", 2)):
                fresh = shrunk(large, keep)
                reinitialize(fresh, seed=mix(seed, 1))
                steps = scratch_epochs(STEPS, *costs, cap=cap)
                arms[arm] = (fresh, sc.TrainSettings(steps=steps, lr=0.05))
            for arm, (model, settings) in arms.items():
                model = shrunk(large, keep) if model is small else model
                found.setdefault((keep, arm), []).append(score(task, model, settings, seed))
    for place, values in found.items():
        print(*place, f"{ratios.get(place[0], 1):.2f} {statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}")
    return {place: statistics.fmean(values) for place, values in found.items()}


@pytest.fixture(scope="module")
def unstructured(fashion):
    found = {}
    for seed in range(SEEDS):
        task = task_of(300, 100, finetuning=sc.TrainSettings(steps=400, lr=0.02))
        for sparsity in (0.9, 0.95, 0.98):
            for aware in (True, False):
                outcome = sc.prune(
                    task.fresh_model(seed),
                    "rethinking-value",
                    f"sparsity={sparsity}",
                    task,
                    seed=seed,
                    arms=["finetune", "scratch-e"],
                    sparse_aware=aware,
                )
                for row in outcome.history:
                    found.setdefault((sparsity, row["arm"], aware), []).append(row["accuracy"])
    for place, values in found.items():
        print(*place, f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}")
    return {place: statistics.fmean(values) for place, values in found.items()}


def test_x(structured, unstructured):
    pass
