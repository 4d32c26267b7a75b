"""SAP on Fashion-MNIST: the index says how much to prune, and brakes by itself.

Paper: arXiv 2302.05601. A perceptron 128-64 on the first 6000 images at 14x14, 500 updates of
SGD a round, means of 2 seeds, 40 s on one core. Measured at rounds 0, 1, 5 and 10:

    policy           weights left %            index                         accuracy
    global (0.5, 1)  100   84.1  58.2  45.1    0.159  0.119  0.058  0.041    0.841  0.848
    layer (0.5, 1)   100   84.5  59.3  47.1    0.159  0.121  0.060  0.044    0.841  0.849
    global (1, 2)    100   61.2  27.8  15.0    0.218  0.129  0.066  0.053    0.841  0.845
    lt, 20 %         100   80.0  32.8  10.7    0.159  0.110  0.034  0.024    0.841  0.842
"""

from itertools import pairwise

import pytest

import secateurs as sc
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

MODEL, DATA = "zoo:mlp?hidden=128,64", "fashion-mnist?limit=6000&size=14"
ROUNDS, SEEDS = 10, 2
KEYS = ("density", "pq_index", "accuracy")
POLICIES = {
    "global": {"scope": "global"},
    "layer": {"scope": "layer"},
    "global (1, 2)": {"scope": "global", "p": 1.0, "q": 2.0},
    "lt": {"scope": "global", "policy": "lt", "rate": 0.2},
}


@pytest.fixture(scope="module")
def curves(fashion, tables):
    """By policy: density, index and accuracy of every round, means over the seeds."""
    recipe = sc.TrainSettings(steps=500, lr=0.1, weight_decay=5e-4)
    task, table = make_task(MODEL, DATA, batch_size=64, training=recipe), tables()
    for policy, options in POLICIES.items():
        for seed in range(SEEDS):
            outcome = sc.prune(
                task.fresh_model(seed),
                "pq-index-sap",
                "sparsity=0.999",
                task,
                seed=seed,
                rounds=ROUNDS,
                shortfall="keep",
                **options,
            )
            for number, row in enumerate(outcome.history):
                for key in KEYS:
                    table.note((policy, key, number), row[key])
    return {
        policy: {key: [table.mean((policy, key, n)) for n in range(ROUNDS + 1)] for key in KEYS}
        for policy in POLICIES
    }


def rates(curve):
    """Share of the survivors that went in each round."""
    return [1 - after / before for before, after in pairwise(curve["density"])]


def test_the_first_round_removes_what_normal_weights_would(curves):
    """Closed forms: 15.3 % for (0.5, 1) and 36.3 % for (1, 2)."""
    assert 0.14 <= rates(curves["global"])[0] <= 0.18
    assert 0.14 <= rates(curves["layer"])[0] <= 0.18
    assert 0.35 <= rates(curves["global (1, 2)"])[0] <= 0.42


@pytest.mark.parametrize("policy", ["global", "layer", "global (1, 2)"])
def test_it_removes_less_every_round_as_the_index_falls(curves, policy):
    index, removed = curves[policy]["pq_index"], rates(curves[policy])
    assert index == sorted(index, reverse=True)
    assert removed == sorted(removed, reverse=True)
    assert removed[-1] < 0.5 * removed[0]


def test_a_fixed_rate_does_not_brake(curves):
    assert rates(curves["lt"])[-1] == pytest.approx(0.2, abs=0.001)
    assert curves["lt"]["density"][-1] < 0.5 * curves["global"]["density"][-1]


@pytest.mark.parametrize("policy", ["global", "layer", "global (1, 2)"])
def test_accuracy_does_not_fall_meanwhile(curves, policy):
    accuracy = curves[policy]["accuracy"]
    assert min(accuracy[1:]) >= accuracy[0]


def test_higher_norms_see_more_inequality_in_the_same_weights(curves):
    """Round 0 is the same dense network under every policy."""
    first = {policy: curve["accuracy"][0] for policy, curve in curves.items()}
    assert len(set(first.values())) == 1
    assert curves["global (1, 2)"]["pq_index"][0] > curves["global"]["pq_index"][0]
