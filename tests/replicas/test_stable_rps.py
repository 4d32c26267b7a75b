"""STABLE-RPS on the digits."""

import math

import pytest

import secateurs as sc
from secateurs.errors import DivergedError
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

SEEDS, NAME = 3, "stable-rps"
LOW, HIGH = 0.05, 0.5
"""Learning rates: of the dense network, and of arrays whose updates are means of many."""

PRUNING = {
    "random": ("random-pruning", {}),
    "magnitude": ("one-shot", {}),
    "SNIP": ("one-shot", {"saliency": "snip"}),
    "SynFlow": ("one-shot", {"saliency": "synflow", "iterations": 100}),
}


def task_at(rate):
    return make_task(
        "zoo:mlp?hidden=128,128", "digits",
        training=sc.TrainSettings(epochs=10, lr=rate, weight_decay=0.0),
    )  # fmt: skip


TASKS = {rate: task_at(rate) for rate in (LOW, HIGH)}


@pytest.fixture(scope="module")
def measured(tables):
    table = tables()
    for seed in range(SEEDS):

        def note(arm, rate, budget, method=NAME, seed=seed, **options):
            task = TASKS[rate]
            try:
                made = sc.prune(task.fresh_model(seed), method, budget, task, seed=seed, **options)
                accuracy, loss = (made.metrics_after[k] for k in ("accuracy", "loss"))
            except DivergedError:
                accuracy, loss = 0.0, math.inf
            table.note(arm, accuracy)
            return loss

        for rate in (LOW, HIGH):
            dense = TASKS[rate].fresh_model(seed)
            sc.fit(dense, TASKS[rate], TASKS[rate].training, seed=seed)
            table.add(("dense", rate), TASKS[rate], dense)
        note(("fold", 1), LOW, "density=1")
        note(("fold, a hash a module", 1), LOW, "density=1", per_module=True)
        note(("hash", 1), LOW, "density=1", map="hash")
        for times in (10, 50, 200):
            budget = f"density={1 / times}"
            note(("fold", times), HIGH, budget)
            for name, (method, options) in PRUNING.items():
                note((name, times, LOW), LOW, budget, method, **options)
            note(("small dense", times, LOW), LOW, f"params={round(25856 / times) + 266}",
                 "small-dense")  # fmt: skip
        for name, (method, options) in PRUNING.items():
            note((name, 50, HIGH), HIGH, "density=0.02", method, **options)
        note(("hash", 50), HIGH, "density=0.02", map="hash")
        note(("tile", 50), HIGH, "density=0.02", map="tile", block=(8, 8))
        for initial in (0.001, 0.04, 1.0):
            note(("fold", 10, initial, LOW), LOW, "density=0.1", initial=initial)
            note(("fold, no rescaling", 10, initial, LOW), LOW, "density=0.1", initial=initial,
                 grad_scale="none")  # fmt: skip
    return table


def test_print(measured):
    print(measured)
