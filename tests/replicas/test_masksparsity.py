"""MaskSparsity on the digits: what it is worth to pull at the doomed channels alone.

MEASURED
"""

import copy

import pytest

import secateurs as sc
from secateurs.parts.scales import add_l1_subgradient_, norm_scales
from secateurs.structure.scores import scale_scores
from secateurs.training.keeping import BeforeStep
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

SEEDS, STRENGTH, MACS = 3, 0.02, "macs=0.35"
ARMS = {
    "none": {"criterion": "l1", "scope": "local", "strength": 0.0},
    "mask of L1 norms": {"criterion": "l1", "scope": "local", "strength": STRENGTH},
    "mask by chance": {"criterion": "random", "scope": "local", "strength": STRENGTH},
    "mask of a sparse run": {"criterion": "sparse", "strength": STRENGTH},
}


@pytest.fixture(scope="module")
def task():
    training = sc.TrainSettings(
        epochs=30, lr=0.05, nesterov=True, weight_decay=0.0, schedule="step", milestones=(0.7,)
    )
    return make_task(
        "zoo:convnet?config=16,24,M,24", "digits?limit=600&test=0.5", batch_size=32,
        training=training, finetuning=sc.TrainSettings(epochs=3, lr=0.01),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(task, tables):
    """By (arm, stage) the accuracies over the seeds; all arms begin with the same baseline."""
    table = tables()

    def note(arm, outcome):
        for row in outcome.history:
            table.note((arm, row["stage"]), row["accuracy"])

    for seed in range(SEEDS):
        base = task.fresh_model(seed)
        sc.fit(base, task, sc.TrainSettings(epochs=8, lr=0.05, nesterov=True), seed=seed)
        for arm, options in ARMS.items():
            outcome = sc.prune(base, "masksparsity", MACS, task, seed=seed, trained=True, **options)
            note(arm, outcome)
            scales = outcome.tables["scales"]
            table.note((arm, "largest doomed γ"), max(row["largest"] for row in scales))
            table.note((arm, "mean kept γ"), sum(r["mean of the kept"] for r in scales) / 3)
        slimmed = sc.prune(
            base, "network-slimming", MACS, task, seed=seed, strength=STRENGTH, empty="floor"
        )
        note("network slimming", slimmed)
        table.note(("network slimming", "mean γ"), pulled_everywhere(base, task, seed))
        scratch = make_task("zoo:convnet?config=9,14,M,14", "digits?limit=600&test=0.5",
                            batch_size=32)  # fmt: skip
        model = scratch.fresh_model(seed)
        sc.fit(model, task, task.training, seed=seed)
        table.add(("scratch", "trained"), task, model)
    return table


def pulled_everywhere(base, task, seed):
    """The mean |γ| after the pull on all scales."""
    model = copy.deepcopy(base)

    def attach(net, optimizer, _):
        scales = norm_scales(net)
        return [BeforeStep(optimizer, lambda: add_l1_subgradient_(scales, STRENGTH))]

    sc.fit(model, task, task.training, seed=seed, attach=attach)
    scores = scale_scores(sc.axes(model, task.example_inputs), norm_scales(model))
    return sum(float(s.mean()) for s in scores.values()) / len(scores)


def test_to_be_written(measured):
    pass
