"""Training on a part of Fashion-MNIST, with and without a teacher that was trained on all of it.

Paper: arXiv 2403.07854. 8000 training and 4000 test images, MLP 784-128-128-10; the teacher makes
1500 updates of Adam, students 300 at equal updates (rate 0.002, batches of 128), τ = 4 with τ².
Test accuracy in per cent, means of SEEDS seeds. Measured:

    (teacher 85.0)             α = 0      0.5      0.9      1        auto
    2 % kept     random         72.4     75.8     76.1     76.3      76.3
                 hard (EL2N)    13.1     41.4     47.3     49.1
    10 % kept    random         79.7     82.1     82.4     82.5      82.4
                 hard (EL2N)    21.6     47.2     55.2     56.4
                 forgetting     26.3              63.0
                 density        74.6              79.8
                 easy (EL2N)    41.6              43.8
    50 % kept    random         83.9     84.0     84.2     84.2      84.0
                 hard (EL2N)    82.8     84.3     84.4     84.4

    20 % of the labels wrong (teacher 82.3)     random α = 0, 1      hard α = 0, 1
    2 % kept                                    65.2     71.8         2.8     49.1
    10 % kept                                   72.6     79.9         1.7     69.3

Deviations of single arms are 0.04 to 1.8 for random rows, 0.6 to 3.7 for hard ones, 8 for easy
ones at 10 %; 6.8 for hard ones with noise at 2 %.

So: the teacher lifts every selection at every fraction; at 2 and 10 % random rows with a teacher
beat all others with one. The paper's other claims hold in part. Not random but hard rows gain
most, though they stay behind up to 10 %; at 50 % they draw level. The best α does not fall with
the fraction here: the teacher is better than any student, and at 50 % all α above 0 are within
0.3 of each other. What falls is how much it matters, from 3.9 to 0.3. With wrong labels the gain
of random rows at 10 % is 7.3 instead of 2.8.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import secateurs as sc
from secateurs.methods.samples.kd_data_pruning import KDDataPruning
from secateurs.parts.budgets import Budget
from secateurs.selection import dynamics
from secateurs.selection.score_table import ScoreTable
from secateurs.training.distillation import distilled
from secateurs.zoo.catalog import make_task
from secateurs.zoo.datasets import TensorData, as_fetched

from .conftest import missing

pytestmark = pytest.mark.slow

DATA = "fashion-mnist?limit=8000"
SEEDS = 3
ADAM = {"optimizer": "adam", "lr": 2e-3, "weight_decay": 0.0}
STUDENT = sc.TrainSettings(steps=300, **ADAM)
METHOD = KDDataPruning(length="iterations")


@pytest.fixture(scope="module")
def clothes():
    if why := missing(DATA):
        pytest.skip(f"needs Fashion-MNIST (apt install dataset-fashion-mnist): {why}")
    task = make_task("zoo:mlp?hidden=128,128", DATA, training=STUDENT, batch_size=128)
    images, labels = task.evaluate.dataset[torch.arange(4000)]
    test = torch.utils.data.DataLoader(TensorData(images, labels), 4000, collate_fn=as_fetched)
    return replace(task, evaluate=test)


def noisy(task, share, seed):
    """The task, with a share of its training labels drawn at random from the other classes."""
    data, generator = task.train.dataset, torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(data), generator=generator) < share
    other = (data.targets + torch.randint(1, 10, (len(data),), generator=generator)) % 10
    labels = torch.where(wrong, other, data.targets)
    loader = torch.utils.data.DataLoader(
        TensorData(data.inputs, labels), 128, shuffle=True, collate_fn=as_fetched
    )
    return replace(task, train=loader)


def taught(task, seed):
    """A teacher, trained on everything."""
    model = task.fresh_model(100 + seed)
    sc.fit(model, task, sc.TrainSettings(steps=1500, **ADAM), seed=100 + seed)
    return model.eval()


def students(task, rows, teacher, alphas, seed):
    """Accuracy in per cent for every α."""
    found = {}
    for alpha in alphas:
        model = task.fresh_model(seed)
        METHOD.train(model, task, rows, teacher, alpha, seed=seed)
        found[alpha] = 100 * task.measure(model)["accuracy"]
    return found


def hardest(scores, fraction):
    return np.flatnonzero(ScoreTable.of(scores).largest(round(fraction * len(scores)))[0])


def random_rows(task, fraction, seed):
    budget = Budget.parse(f"keep={fraction}")
    return METHOD.choose(task, budget, None, seed, sc.Workspace()).indices


def early(task, seed):
    return dynamics.early_scores(task, dynamics.read_el2n, runs=3, epoch=1.0, seed=1000 + seed)


def test_a_teacher_lifts_every_selection_and_random_is_hard_to_beat(clothes, table):
    alphas = (0.0, 0.5, 0.9, 1.0)
    for seed in range(SEEDS):
        teacher = taught(clothes, seed)
        table.note("teacher, all", 100 * clothes.measure(teacher)["accuracy"])
        el2n = early(clothes, seed)
        for fraction in (0.02, 0.1, 0.5):
            chosen = {
                "random": random_rows(clothes, fraction, seed),
                "hard": hardest(el2n, fraction),
            }
            if fraction == 0.1:
                chosen |= others(clothes, fraction, teacher, el2n, seed)
            for name, rows in chosen.items():
                few = alphas if name in ("random", "hard") else (0.0, 0.9)
                for alpha, score in students(clothes, rows, teacher, few, seed).items():
                    table.note((name, fraction, alpha), score)
            outcome = sc.prune(
                clothes.fresh_model(seed), METHOD, f"keep={fraction}",
                distilled(clothes, teacher), seed=seed,
            )  # fmt: skip
            table.note(("auto", fraction), 100 * outcome.metrics_after["accuracy"])
    mean = table.means()
    for name, fraction in {arm[:2] for arm in mean if isinstance(arm, tuple) and len(arm) == 3}:
        assert mean[name, fraction, 0.9] > mean[name, fraction, 0.0], (name, fraction)
    gains = [
        max(mean["random", f, a] for a in alphas) - mean["random", f, 0.0] for f in (0.02, 0.1, 0.5)
    ]
    assert gains[0] > 3
    assert gains[0] > gains[1] > gains[2] + 1, "the less is kept, the more it matters"
    for fraction in (0.02, 0.1):
        for alpha in alphas:
            assert mean["random", fraction, alpha] > mean["hard", fraction, alpha] + 15
    gap = {a: mean["random", 0.1, a] - mean["hard", 0.1, a] for a in alphas}
    assert gap[1.0] < gap[0.0] - 20
    for name in ("hard", "easy", "forgetting", "density"):
        assert mean["random", 0.1, 0.9] > mean[name, 0.1, 0.9] + 1.5
    for fraction in (0.02, 0.1, 0.5):
        best = max(mean["random", fraction, a] for a in alphas)
        assert mean["auto", fraction] > best - 1


def others(task, fraction, teacher, el2n, seed):
    """Rows that further metrics choose."""
    forgetting = dynamics.forgetting_scores(task, seed=1000 + seed)
    density = KDDataPruning(
        selector="density", selector_options={"epsilon": None}, length="iterations"
    )
    budget = Budget.parse(f"keep={fraction}")
    made = density.choose(task, budget, teacher, seed, sc.Workspace())
    return {
        "easy": hardest(-el2n, fraction),
        "forgetting": hardest(forgetting, fraction),
        "density": made.indices,
    }


def test_with_wrong_labels_it_lifts_more(clothes, table):
    for seed in range(SEEDS):
        task = noisy(clothes, 0.2, seed)
        teacher = taught(task, seed)
        table.note("teacher, all", 100 * task.measure(teacher)["accuracy"])
        el2n = early(task, seed)
        for fraction in (0.02, 0.1):
            for name, rows in (
                ("random", random_rows(task, fraction, seed)),
                ("hard", hardest(el2n, fraction)),
            ):
                for alpha, score in students(task, rows, teacher, (0.0, 1.0), seed).items():
                    table.note((name, fraction, alpha), score)
    mean = table.means()
    assert mean["random", 0.02, 1.0] > mean["random", 0.02, 0.0] + 4
    assert mean["random", 0.1, 1.0] > mean["random", 0.1, 0.0] + 5
    for fraction in (0.02, 0.1):
        assert mean["hard", fraction, 1.0] > mean["hard", fraction, 0.0] + 30
        assert mean["random", fraction, 1.0] > mean["hard", fraction, 1.0] + 7
