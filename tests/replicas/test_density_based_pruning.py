"""Density-based pruning under imbalance: clothes of which half the classes are copies of a few.

Paper: arXiv 2401.04578. Classes 0 to 4 of Fashion-MNIST are 8 images, 100 noisy copies of each;
classes 5 to 9 are 200 images each. Embeddings are centred pixels, k = 40, no search for
duplicates unless said; logistic regression on what is kept, balanced accuracy on 3000 held-out
images, means of 6 seeds, about 90 s of one core. Measured:

                                  150 kept      400 kept
    random                          68.4 ± 2.6    70.8 ± 1.6
    density, random inside          66.9 ± 2.8    69.6 ± 3.5
    density, easy inside            62.1 ± 4.9    63.7 ± 4.4
    density, hard inside            41.2 ± 3.4    52.3 ± 3.3
    equal quotas, hard inside       42.9 ± 3.8    51.4 ± 4.8
    hardest of all (prototypes)     27.2 ± 2.9    36.8 ± 3.7
    no copies, random               57.6 ± 1.6    61.0 ± 1.4
    no copies, density, hard        50.4 ± 2.8    60.3 ± 1.7
    all 5000 rows                   67.6 ± 2.5

Against plain prototypes, which take the farthest rows of all, the paper's claim holds by 14 points
and more: every cluster has a quota. That complex clusters get more shows nothing here: equal
quotas do as well within their spread, while the card measured them 2.5 and 6 points below. The
card's random rows inside the quotas beat random rows by 3 points; here they do not. With so few
rows the typical ones win, as arXiv 2206.14486 predicts: random rows, inside quotas or anywhere, are
far ahead of hard ones, which are the paper's default and meant for much data. The bounds below
were set after a first run on the same seeds, in which the arms without copies had another
threshold. Without the copies
random rows lose and hard ones gain: each of the first five classes then has 8 rows of about 1040.
"""

import statistics

import numpy as np
import pytest
import torch

import secateurs as sc
from secateurs.selection.score_table import ScoreTable, random_scores
from secateurs.zoo.datasets import load_data

from .conftest import missing

pytestmark = pytest.mark.slow

DATA = "fashion-mnist"
SEEDS = 6
SCALE = 2.8327
"""Of a pixel from black to white, in the units of the data set."""
OPTIONS = {"clusters": 40, "neighbours": 10, "epsilon": None}


@pytest.fixture(scope="module")
def clothes():
    if why := missing(DATA):
        pytest.skip(f"needs Fashion-MNIST (apt install dataset-fashion-mnist): {why}")
    data = load_data(DATA)
    parts = []
    for part, rows in ((data.train, 20_000), (data.test, 3_000)):
        images, labels = part[torch.arange(rows)]
        parts.append((images.reshape(rows, -1).numpy().astype(np.float64), labels.numpy()))
    return parts


def imbalanced(images, labels, seed):
    """4000 copies of 40 images and 1000 different ones, mixed, with their numbers."""
    rng = np.random.default_rng(seed)
    chosen, where = [], []
    for one in range(10):
        rows = rng.permutation(np.flatnonzero(labels == one))
        if one < 5:
            rows = np.repeat(rows[:8], 100)
            chosen.append(images[rows] + rng.normal(size=(800, images.shape[1])) * 0.02 * SCALE)
        else:
            rows = rows[:200]
            chosen.append(images[rows])
        where.append(labels[rows])
    order = rng.permutation(5000)
    return np.concatenate(chosen)[order], np.concatenate(where)[order]


def accuracy(images, labels, held_out):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    model = LogisticRegression(max_iter=300).fit(images, labels)
    return 100 * balanced_accuracy_score(held_out[1], model.predict(held_out[0]))


def arms(images, labels, keep, seed):
    """Rows kept, by name."""
    centred = images - images.mean(0)
    fraction = keep / len(images)

    def density(**options):
        return sc.select(centred, "density", fraction, seed=seed, **{**OPTIONS, **options})

    hard = density()
    distance = np.concatenate(hard.distances)
    return {
        "random": ScoreTable.of(random_scores(np.arange(5000), seed)).largest(keep)[0],
        "density, random inside": density(within="random").mask,
        "density, easy inside": density(within="easy").mask,
        "density, hard inside": hard.mask,
        "equal quotas, hard inside": density(temperature=1e6).mask,
        "hardest of all (prototypes)": ScoreTable.of(distance).largest(keep)[0],
        "no copies, random": density(epsilon=0.01, within="random").mask,
        "no copies, density, hard": density(epsilon=0.01).mask,
    }


def test_density_beats_plain_prototypes_under_imbalance(clothes):
    (images, labels), held_out = clothes
    found = {}
    for seed in range(SEEDS):
        own, targets = imbalanced(images, labels, seed)
        for keep in (150, 400):
            for name, mask in arms(own, targets, keep, seed).items():
                assert mask.sum() == keep
                score = accuracy(own[mask], targets[mask], held_out)
                found.setdefault((name, keep), []).append(score)
        found.setdefault(("all rows", 5000), []).append(accuracy(own, targets, held_out))
    means = {key: statistics.fmean(values) for key, values in found.items()}
    for (name, keep), values in found.items():
        spread = statistics.stdev(values)
        print(f"    {keep:<6}{name:<30}{means[name, keep]:5.1f} ± {spread:.1f}")
    for keep in (150, 400):
        hard = means["density, hard inside", keep]
        equal = means["equal quotas, hard inside", keep]
        prototypes = means["hardest of all (prototypes)", keep]
        assert hard >= prototypes + 8
        assert equal >= prototypes + 8
        assert abs(hard - equal) <= 6, "the docstring says that complexity decides nothing here"
        assert means["no copies, density, hard", keep] >= hard + 3
        # with so few rows the typical ones win, as arXiv 2206.14486 predicts
        assert means["random", keep] >= hard + 8
        assert means["density, random inside", keep] >= means["random", keep] - 5
