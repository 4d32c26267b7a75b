"""Trained rank pruning on the digits: what training at low rank is worth.
"""

import pytest
import torch

import secateurs as sc
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

SEEDS, TIGHT, HALF = 3, "macs=0.2", "macs=0.5"
NAME = "trained-rank-pruning"
FIXED = {"projection": "energy:0.9", "final": "energy:0.99"}


@pytest.fixture(scope="module")
def task():
    return make_task(
        "zoo:convnet?config=24,32,M,32", "digits",
        training=sc.TrainSettings(epochs=10, lr=0.05, weight_decay=1e-4),
        finetuning=sc.TrainSettings(epochs=4, lr=0.02),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(task, tables):
    """Accuracies by arm over the seeds; ranks of the last two convolutions, shares of the MACs."""
    table = tables()
    for seed in range(SEEDS):

        def pruned(arm, budget, method=NAME, start=None, seed=seed, **options):
            model = task.fresh_model(seed) if start is None else start
            outcome = sc.prune(model, method, budget, task, seed=seed, **options)
            table.note(arm, outcome.metrics_after["accuracy"])
            return outcome

        for budget in (HALF, TIGHT):
            outcome = pruned(("trained", budget), budget)
            pruned(("trained", budget, "period 5"), budget, period=5)
            afterwards = pruned(("cut after training", budget), budget, project=False)
        table.note("dense", afterwards.metrics_before["accuracy"])
        table.note("loss by factorisation",
                   outcome.history[0]["accuracy"] - outcome.history[1]["accuracy"])  # fmt: skip
        parameters = outcome.after.parameters
        scratch = reset(outcome.model, seed)
        sc.fit(scratch, task, task.training, seed=seed)
        table.add(("thin layers from scratch", TIGHT), task, scratch)
        for mode, budget in (("VH", TIGHT), ("ND", "macs=0.4")):
            pruned(("trained", budget, mode), budget, mode=mode)
        for arm, options in (
            ("energy 0.9", {"period": 1}),
            ("energy 0.9, nuclear", {"period": 1, "nuclear": 3e-4}),
            ("energy 0.9, period 20", {}),
        ):
            outcome = pruned(arm, "macs=1", **FIXED, **options)
            table.note((arm, "macs"), outcome.after.macs / outcome.before.macs)
            ranks = [row["rank"] / row["full rank"] for row in outcome.tables["ranks"]]
            table.note((arm, "rank"), sum(ranks) / len(ranks))
        dense = task.fresh_model(seed)
        sc.fit(dense, task, task.training, seed=seed)
        for criterion in ("random", "l1"):
            for recover in (False, True):
                arm = (f"{criterion} channels", TIGHT, "fine-tuned" if recover else "cut")
                pruned(arm, TIGHT, "spa", dense, criterion=criterion, recover=recover)
        pruned(("small dense", "as many parameters"), f"params={parameters}", "small-dense")
    return table


def reset(model, seed):
    """The same layers with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def test_print(measured):
    print(measured)
