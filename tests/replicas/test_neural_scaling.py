"""Which samples to keep, and which end: clothes, digits, and perceptrons that are drawn.

Paper: arXiv 2206.14486. Test accuracies, means of SEEDS seeds. Every arm of a table makes the same
number of updates (Adam, batches of 128), so what is kept is seen more often where it is less. EL2N
is of 3 runs at their first epoch.

Clothes, 8000 images, an MLP, 300 updates; no floor under the classes but where it says so, and
one image of each class in the first column:

                        1 a class     2 %           10 %          50 %
    random              46.3 ± 3.3    72.8 ± 1.7    79.5 ± 0.5    83.7 ± 0.2
    hard                16.6 ± 1.6    14.3 ± 2.1    20.4 ± 2.7    83.4 ± 1.0
    easy                55.6 ± 1.8    15.6 ± 4.9    40.4 ± 3.9    76.0 ± 0.4
    hard, floor 0.5     18.4 ± 4.3    14.4 ± 2.2    23.0 ± 1.6    84.2 ± 0.1

Easy ones lose at 2 % and 10 % because without a floor whole classes are missing. The same with
1500 updates and the default floor (0.5): with much kept, hard ones win by a little.

                        50 %          80 %          all
    random              84.2 ± 0.2    85.1 ± 0.1    85.5 ± 0.2
    hard                84.1 ± 0.3    85.5 ± 0.1
    easy                78.2 ± 0.3    82.6 ± 0.1

Digits, 1348 images, 220 updates, all 97.3 ± 0.2:

                        80 %          50 %          20 %
    random              97.1 ± 0.2    97.1 ± 1.0    93.2 ± 0.5
    prototypes          97.6 ± 0.6    97.8 ± 0.4    91.1 ± 2.0
    prototypes, easy    94.2 ± 1.4    91.7 ± 2.1    87.2 ± 1.7
    class prototypes    97.4 ± 0.8    97.5 ± 0.3    91.0 ± 1.6
    el2n                97.6 ± 0.6    98.3 ± 0.7    92.4 ± 1.7
    el2n, easy          93.5 ± 1.3    88.7 ± 1.1    83.2 ± 0.7
    grand               97.9 ± 0.5    98.0 ± 0.6    93.4 ± 1.4
    margin              98.1 ± 0.5    97.9 ± 0.5    94.2 ± 0.8
    forgetting          96.9 ± 0.6    97.1 ± 1.0    92.4 ± 1.6
    memorization        97.0 ± 0.1    97.6 ± 0.6    93.4 ± 0.6

No metric is clearly better than random here but where half is kept; they differ less than seeds do.

Perceptrons, N = 120, 12 seeds, error by theory and as measured:

    α_tot  f     kept  theory   measured
    3      1     all   0.1428   0.1476 ± 0.0032
    10     1     all   0.0492   0.0475 ± 0.0015
    2      0.5   hard  0.3210   0.3143 ± 0.0076
    2      0.5   easy  0.1818   0.1768 ± 0.0038
    10     0.3   hard  0.0511   0.0504 ± 0.0020
    10     0.3   easy  0.0695   0.0682 ± 0.0021
"""

import statistics

import numpy as np
import pytest

import secateurs as sc
from secateurs.analysis.teacher_student import perceptron_theory, simulate
from secateurs.selection import dynamics
from secateurs.training.subset import task_on
from secateurs.workspace import Workspace
from secateurs.zoo.catalog import make_task

from .conftest import missing

pytestmark = pytest.mark.slow

CLOTHES = "fashion-mnist?limit=8000"
SEEDS = 3
METHOD = "neural-scaling-data-pruning"
SHORT = sc.TrainSettings(steps=300, optimizer="adam", lr=2e-3, weight_decay=0.0)
LONG = sc.TrainSettings(steps=1500, optimizer="adam", lr=1e-3, weight_decay=1e-4)


@pytest.fixture(scope="module")
def clothes():
    if why := missing(CLOTHES):
        pytest.skip(f"needs Fashion-MNIST (apt install dataset-fashion-mnist): {why}")
    return make_task("zoo:mlp?hidden=128,128", CLOTHES, training=SHORT, batch_size=128)


def labels_of(task):
    return task.train.dataset.targets.numpy()


def accuracy(task, rows, seed, settings):
    own = task_on(task, rows)
    model = own.fresh_model(seed)
    sc.fit(model, own, settings, seed=seed)
    return 100 * task.measure(model)["accuracy"]


def tell(table, columns):
    print()
    for arm in dict.fromkeys(arm for arm, _ in table):
        cells = [
            f"{statistics.fmean(table[arm, c]):5.1f} ± {statistics.stdev(table[arm, c]):3.1f}"
            for c in columns
        ]
        print(f"    {arm:<22}" + "   ".join(cells))


def means(table):
    return {key: statistics.fmean(values) for key, values in table.items()}


def test_hard_clothes_need_much_data_and_easy_ones_win_with_one_a_class(clothes):
    keeps = {"1 a class": 10 / 8000, "2 %": 0.02, "10 %": 0.1, "50 %": 0.5}
    table = {}
    for seed in range(SEEDS):
        scores = dynamics.early_scores(clothes, dynamics.read_el2n, runs=3, epoch=1.0, seed=seed)
        source = {"el2n": scores, "labels": labels_of(clothes)}
        for name, keep in keeps.items():
            one = name == "1 a class"
            arms = {
                "random": {"metric": "random", "class_floor": float(one)},
                "hard": {"class_floor": float(one)},
                "easy": {"class_floor": float(one), "order": "easy"},
                "hard, floor 0.5": {"class_floor": 0.5},
            }
            for arm, options in arms.items():
                options = {"metric": "column", **options}
                options |= {"column": "el2n"} if options["metric"] == "column" else {}
                rows = sc.select(source, METHOD, keep, seed=seed, **options).indices
                found = accuracy(clothes, rows, seed, SHORT)
                table.setdefault((arm, name), []).append(found)
    tell(table, keeps)
    mean = means(table)
    assert mean["easy", "1 a class"] > mean["random", "1 a class"] + 3
    assert mean["random", "50 %"] < mean["hard", "50 %"] + 4
    for name in ("2 %", "10 %"):
        assert mean["random", name] > mean["hard", name] + 20


def test_with_most_of_the_clothes_kept_hard_ones_win(clothes):
    table, keeps = {}, {"50 %": 0.5, "80 %": 0.8}
    for seed in range(SEEDS):
        source = {"labels": labels_of(clothes)}
        source["el2n"] = dynamics.early_scores(
            clothes, dynamics.read_el2n, runs=3, epoch=1.0, seed=seed
        )
        for name, keep in keeps.items():
            for arm, order in (("random", None), ("hard", "hard"), ("easy", "easy")):
                options = {"metric": "column", "column": "el2n", "order": order}
                if arm == "random":
                    options = {"metric": "random"}
                rows = sc.select(source, METHOD, keep, seed=seed, **options).indices
                table.setdefault((arm, name), []).append(accuracy(clothes, rows, seed, LONG))
        table.setdefault(("all", "100 %"), []).append(
            accuracy(clothes, np.arange(8000), seed, LONG)
        )
    print("\n    all", table["all", "100 %"])
    tell({key: values for key, values in table.items() if key[0] != "all"}, keeps)
    mean = means(table)
    assert mean["hard", "80 %"] > mean["random", "80 %"]
    assert mean["hard", "80 %"] > mean["all", "100 %"] - 0.5
    assert mean["hard", "50 %"] > mean["random", "50 %"] - 1
    for name in ("50 %", "80 %"):
        assert mean["hard", name] > mean["easy", name] + 1.5


def test_metrics_on_the_digits(tmp_path):
    """Ten ways to keep 80 %, 50 % and 20 % of the digits."""
    training = sc.TrainSettings(epochs=10, optimizer="adam", lr=3e-3, weight_decay=0.0)
    task = make_task("zoo:mlp?hidden=64,32", "digits", training=training, batch_size=64)
    images, labels = task.train.dataset.inputs.flatten(1), labels_of(task)
    fixed = sc.TrainSettings(steps=220, optimizer="adam", lr=3e-3, weight_decay=0.0)
    arms = {
        "all": {"metric": "random"},
        "random": {"metric": "random"},
        "prototypes": {"metric": "prototypes"},
        "prototypes, easy": {"metric": "prototypes", "order": "easy"},
        "class prototypes": {"metric": "supervised-prototypes"},
        "el2n": {"metric": "el2n", "runs": 3, "epoch": 2.0},
        "el2n, easy": {"metric": "el2n", "runs": 3, "epoch": 2.0, "order": "easy"},
        "grand": {"metric": "grand", "runs": 3, "epoch": 2.0},
        "margin": {"metric": "margin", "runs": 3, "epoch": 2.0},
        "forgetting": {"metric": "forgetting"},
        "memorization": {"metric": "memorization", "runs": 12},
    }
    table, keeps = {}, {"80 %": 0.8, "50 %": 0.5, "20 %": 0.2}
    for seed in range(SEEDS):
        work = Workspace(tmp_path / str(seed))
        for arm, options in arms.items():
            for name, keep in keeps.items():
                found = sc.select(
                    images, METHOD, 1.0 if arm == "all" else keep, task, labels=labels,
                    seed=seed, work=work.child(arm.replace(", ", "-").replace(" ", "-")),
                    **options,
                )  # fmt: skip
                table.setdefault((arm, name), []).append(accuracy(task, found.indices, seed, fixed))
    tell(table, keeps)
    mean = means(table)
    for metric in ("prototypes", "class prototypes", "el2n", "grand", "margin", "forgetting"):
        assert mean[metric, "80 %"] > mean["all", "80 %"] - 1
    for metric in ("prototypes", "el2n"):
        hard_easy = [mean[metric, k] - mean[f"{metric}, easy", k] for k in keeps]
        assert min(hard_easy) > 1.5
        gain = {k: mean[metric, k] - mean["random", k] for k in keeps}
        assert gain["50 %"] > gain["20 %"], "the less is left, the less are hard ones worth"


@pytest.mark.parametrize(("load", "keep", "order"), [
    (3, 1, "hard"), (2, 0.5, "hard"), (2, 0.5, "easy"), (10, 0.3, "hard"), (10, 0.3, "easy"),
    (10, 1, "hard"),
])  # fmt: skip
def test_the_theory_is_what_perceptrons_do(load, keep, order):
    errors = [simulate(load, keep, order, dimension=120, seed=s).error for s in range(12)]
    mean, spread = np.mean(errors), np.std(errors, ddof=1) / len(errors) ** 0.5
    theory = perceptron_theory(load, keep, order).error
    print(f"\n    {load:<4}{keep:<5}{order:<6}{theory:.4f}   {mean:.4f} ± {spread:.4f}")
    assert abs(mean - theory) < 2.5 * spread + 0.005
