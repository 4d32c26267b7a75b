"""CFSP on the digits: loud neurons, and more of them in blocks that turn the stream.

Paper: arXiv 2409.13199, whose tables could not be reached; the card's replica is the claim: a
vision transformer of 5 blocks with gated feed-forward layers, no training afterwards but in the
last two rows. Means of 3 seeds, 3 minutes on one core, the dense network being at 0.973 ± 0.005,
by the share of feed-forward neurons that goes:

                                     0.5              0.7              0.85
    random neurons                   0.936 ± 0.011    0.894 ± 0.033    0.852 ± 0.053
    magnitude                        0.948 ± 0.015    0.925 ± 0.018    0.873 ± 0.027
    wanda                            0.962 ± 0.006    0.948 ± 0.017    0.912 ± 0.010
    activation                       0.965 ± 0.011    0.945 ± 0.019    0.913 ± 0.010
    cfsp (activation, by angle)      0.970 ± 0.003    0.965 ± 0.003    0.936 ± 0.007
    cfsp, relative-out               0.970 ± 0.003    0.964 ± 0.004    0.940 ± 0.006
    cfsp, sequential                 0.970 ± 0.003    0.963 ± 0.003    0.937 ± 0.016
    cfsp, then LoRA, ranks by angle  0.976 ± 0.003    0.973 ± 0.007    0.968 ± 0.006
    cfsp, then LoRA, equal ranks     0.973 ± 0.003    0.972 ± 0.009    0.963 ± 0.003

The angles are 0.44, 0.23, 0.19, 0.17 and 0.15. At 0.85 angles are worth 2 points (the card: 3.0),
and activation is 6 points above random neurons (the card: 8.6). LoRA, 90 updates of rank 4, brings
most back; ranks that follow the angles lead by less than the spread, with every share.
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
