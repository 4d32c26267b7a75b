"""CFSP on the digits: loud neurons, and more of them in blocks that turn the stream.

Paper: arXiv 2409.13199, whose tables could not be reached; the card's replica is the claim: a
vision transformer of 5 blocks with gated feed-forward layers, no training afterwards. Measured
with seeds 0 and 1 (the third has still to be run), the dense network being at 0.970 ± 0.002, by
the share of feed-forward neurons that goes:

                                     0.5              0.7              0.85
    random neurons                   0.942 ± 0.006    0.909 ± 0.028    0.881 ± 0.020
    magnitude                        0.957 ± 0.005    0.934 ± 0.011    0.888 ± 0.011
    wanda                            0.966 ± 0.002    0.957 ± 0.011    0.918 ± 0.000
    activation                       0.968 ± 0.014    0.954 ± 0.014    0.918 ± 0.009
    cfsp (activation, by angle)      0.969 ± 0.003    0.966 ± 0.005    0.938 ± 0.009
    cfsp, relative-out               0.969 ± 0.003    0.966 ± 0.005    0.943 ± 0.002
    cfsp, sequential                 0.969 ± 0.003    0.964 ± 0.000    0.946 ± 0.008

The angles are 0.44, 0.23, 0.19, 0.17 and 0.16. At 0.85 angles are worth 2 points, as on the card
(3.0); random neurons cost this better network less (0.881 where the card has 0.796), so that
activation is 4 points above them, not the card's 5 and more.
"""

import copy

import pytest

import secateurs as sc
from secateurs.recovery import recovery

pytestmark = pytest.mark.slow

SEEDS, GONE = 3, (0.5, 0.7, 0.85)
ARMS = {
    "random": {"score": "random", "metric": "constant"},
    "magnitude": {"score": "magnitude", "metric": "constant"},
    "wanda": {"score": "wanda", "metric": "constant"},
    "act": {"metric": "constant"},
    "cfsp": {},
    "cfsp, relative-out": {"score": "relative-out"},
    "cfsp, sequential": {"sequential": True},
}
RECOVERY = recovery({"lora": {"rank": 4, "alpha": 8.0, "steps": 90, "lr": 3e-3}})


@pytest.fixture(scope="module")
def measured(digits_transformer, tables):
    """Mean accuracies by (arm, share of the neurons that goes), and mean angles."""
    table, angles = tables(), tables()
    for seed in range(SEEDS):
        task, model = digits_transformer(seed)
        table.add("dense", task, model)
        for gone in GONE:
            for arm, options in ARMS.items():
                outcome = sc.prune(
                    model, "cfsp", f"keep={1 - gone:.2f}", task, seed=seed, **options
                )
                table.note((arm, gone), outcome.metrics_after["accuracy"])
                if arm != "cfsp":
                    continue
                if gone == GONE[0]:
                    for row in outcome.tables["blocks"]:
                        angles.note(row["block"], row["angle"])
                for ranks in ("by angle", "even"):
                    twin = copy.deepcopy(outcome)
                    if ranks == "even":
                        twin.rank_weights = {}
                    RECOVERY.recover(twin, task, seed=seed)
                    table.add((f"lora, {ranks}", gone), task, twin.model)
    return table.means(), angles.means()


@pytest.mark.parametrize("gone", [0.7, 0.85])
def test_loud_neurons_are_better_than_random_ones_and_angles_help(measured, gone):
    accuracy, _ = measured
    assert accuracy["cfsp", gone] >= accuracy["random", gone] + 0.015
    assert accuracy["cfsp", gone] >= accuracy["magnitude", gone] + 0.01
    assert accuracy["cfsp", gone] >= accuracy["act", gone] - 0.005


def test_half_of_the_neurons_are_hardly_missed(measured):
    accuracy, _ = measured
    assert accuracy["cfsp", 0.5] >= accuracy["dense"] - 0.02


def test_adapters_bring_back_what_neurons_cost(measured):
    """The ranks are the paper's idea; what they are worth it does not say."""
    accuracy, _ = measured
    for gone in (0.7, 0.85):
        assert accuracy["lora, by angle", gone] >= accuracy["cfsp", gone]
        assert abs(accuracy["lora, by angle", gone] - accuracy["lora, even", gone]) <= 0.02


def test_the_first_block_turns_the_stream_most(measured):
    _, angles = measured
    assert max(angles, key=angles.get) == "blocks.0"
    assert max(angles.values()) >= 1.5 * min(angles.values())
