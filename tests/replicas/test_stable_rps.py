"""STABLE-RPS on the digits: shared weights beside pruned ones at initialisation.

Paper: arXiv 2310.11611, whose claims are that training does not depend on the scale of the array,
that nothing is lost at compression 1, and that shared parameters beat small networks and pruning at
initialisation, more so the higher the compression. A perceptron of 64, 128, 128 and 10, 25,856
weights, 10 epochs of SGD with momentum 0.9, means of 3 seeds, three minutes of one core. The dense
network and the pruned ones are trained at a rate of 0.05, arrays at 0.5 (0.05 at compression 1).
The 0.5 is that of the card's trial, on the same held-out digits; the dense network diverges at it
(0.119). Measured:

    compression            1                10               50               200
    dense                  0.987 ± 0.006
    fold                   0.984 ± 0.001    0.987 ± 0.003    0.967 ± 0.004    0.899 ± 0.003
    a hash a module        0.983 ± 0.003
    hash / tiles of 8x8    0.982 ± 0.005                     0.953 / 0.968
    small dense                             0.980 ± 0.000    0.931 ± 0.023    0.316 ± 0.105
    SynFlow                                 0.970 ± 0.011    0.869 ± 0.019    0.444 ± 0.070
    SNIP                                    0.962 ± 0.002    0.656 ± 0.089    0.207 ± 0.071
    random                                  0.926 ± 0.009    0.180 ± 0.014    0.101 ± 0.003
    magnitude                               0.916 ± 0.017    0.114 ± 0.017    0.101 ± 0.003

At 50 the pruned networks were also trained at 0.5: random 0.533, magnitude 0.134, SNIP 0.616 and
SynFlow 0.479. At 10, a rate of 0.05 and σ₀ = 0.001, 0.04 and 1 the array gives one accuracy, 0.928
± 0.020; undivided gradients diverge, diverge, and reach 0.761.

The claims hold. What the fold does for compression 1 is not seen here: maps that leave 10 to 37 %
of the slots unused train as well. Tiles, with fewer collisions inside a layer, do as well at
50. The card's gap of 0.3 to the best pruning at 50 is 0.10 to SynFlow, which this library's version
(100 iterations) trains to 0.869 where the card's trial had 0.27; at 200 it is 0.45.
"""

import math

import pytest

import secateurs as sc
from secateurs.errors import DivergedError
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

SEEDS, NAME = 3, "stable-rps"
LOW, HIGH = 0.05, 0.5
"""Learning rates: of the dense network, and of arrays whose updates are means of many."""

INITIAL = (0.001, 0.04, 1.0)
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
        for initial in INITIAL:
            note(("fold", 10, initial, LOW), LOW, "density=0.1", initial=initial)
            note(("fold, no rescaling", 10, initial, LOW), LOW, "density=0.1", initial=initial,
                 grad_scale="none")  # fmt: skip
    return table


BEST = 0.05
"""The margin that is asked for at 50; 0.10 was measured."""


def test_nothing_is_lost_at_compression_one(measured):
    for arm in ("fold", "fold, a hash a module", "hash"):
        assert measured.mean((arm, 1)) >= measured.mean(("dense", LOW)) - 0.02


def test_the_scale_of_the_array_is_of_no_matter(measured):
    arms = [measured[("fold", 10, initial, LOW)] for initial in INITIAL]
    for arm in arms[1:]:
        assert arm == pytest.approx(arms[0], abs=5e-3)
    for initial in INITIAL:
        plain = measured.mean(("fold, no rescaling", 10, initial, LOW))
        assert plain <= measured.mean(("fold", 10, initial, LOW)) - 0.08


def test_shared_parameters_beat_pruning_at_initialisation_and_small_networks(measured):
    assert measured.mean(("fold", 10)) >= max(measured.mean((n, 10, LOW)) for n in PRUNING)
    best = max(measured.mean((n, 50, rate)) for n in PRUNING for rate in (LOW, HIGH))
    assert measured.mean(("fold", 50)) >= best + BEST
    assert measured.mean(("fold", 50)) >= measured.mean(("small dense", 50, LOW)) + 0.01
    for name in (*PRUNING, "small dense"):
        assert measured.mean(("fold", 200)) >= measured.mean((name, 200, LOW)) + 0.3
    for name in ("random", "magnitude", "SNIP"):
        assert measured.mean(("fold", 50)) >= measured.mean((name, 50, LOW)) + 0.2


def test_the_gap_grows_with_the_compression(measured):
    gaps = [
        measured.mean(("fold", times)) - max(measured.mean((n, times, LOW)) for n in PRUNING)
        for times in (10, 50, 200)
    ]
    assert gaps == sorted(gaps)


def test_the_map_matters_little(measured):
    fold = measured.mean(("fold", 50))
    assert fold >= measured.mean(("hash", 50)) - 0.01
    assert abs(measured.mean(("tile", 50)) - fold) <= 0.03
