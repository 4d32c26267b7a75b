"""Network slimming on the digits: what the pull on the scales is worth.

Paper: arXiv 1708.06519, whose claim is that training with λ Σ|γ| costs no accuracy and lets
channels go that the network then does not miss. The convolutional network of the demo, 240
updates and 80 of fine-tuning, means of 3 seeds, 2 minutes on one core. So few updates need a λ
far above the paper's 1e-4. Measured, by the share of the multiply-accumulates that stays:

                     dense           cut                               fine-tuned
                                     0.7       0.5       0.2           0.7     0.5     0.2
    random channels  0.992           0.697     0.581     0.149         0.989   0.988   0.976
    λ = 0            0.992 ± 0.001   0.847     0.454     0.164         0.993   0.991   0.987
    λ = 0.01         0.991 ± 0.002   0.925     0.501     0.199         0.992   0.990   0.989
    λ = 0.03         0.992 ± 0.003   0.991     0.983     0.236         0.990   0.991   0.989

Half of the cost goes and is not missed. Without the pull the scales are at 0.95 and more, all of
them, and a cut by them is no better than a random one at 0.5. Four epochs of fine-tuning make up
for every cut; only random channels stay behind, at 0.2, by 0.01. With λ = 0.1 all scales vanish
and the network with them (accuracy 0.098).
"""

import pytest

import secateurs as sc
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

SEEDS, MACS = 3, (0.7, 0.5, 0.2)
STRENGTHS = (0.0, 0.01, 0.03)


@pytest.fixture(scope="module")
def task():
    return make_task(
        "zoo:convnet", "digits", training=sc.TrainSettings(epochs=12, lr=0.05),
        finetuning=sc.TrainSettings(epochs=4, lr=0.02),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(task, tables, tmp_path_factory):
    """Accuracies by (arm, share of the MACs, stage) over the seeds, and those of the dense."""
    table = tables()
    for seed in range(SEEDS):
        dense = task.fresh_model(seed)
        sc.fit(dense, task, task.training, seed=seed)
        for macs in MACS:
            budget = f"macs={macs}"
            for recover, stage in ((False, "cut"), (True, "fine-tuned")):
                outcome = sc.prune(
                    dense, "spa", budget, task, seed=seed, criterion="random", recover=recover
                )
                table.note(("random", macs, stage), outcome.metrics_after["accuracy"])
        for strength in STRENGTHS:
            folder = tmp_path_factory.mktemp("sparse")
            for macs in MACS:
                # every budget cuts the same trained network
                (folder / "finetune.safetensors").unlink(missing_ok=True)
                outcome = sc.prune(
                    task.fresh_model(seed), "network-slimming", f"macs={macs}", task, seed=seed,
                    strength=strength, work=sc.Workspace(folder),
                )  # fmt: skip
                _, cut, final = (row["accuracy"] for row in outcome.history)
                table.note((strength, macs, "cut"), cut)
                table.note((strength, macs, "fine-tuned"), final)
            table.note((strength, "dense"), outcome.metrics_before["accuracy"])
    return table


def test_the_pull_costs_the_network_nothing(measured):
    for strength in STRENGTHS[1:]:
        assert measured.mean((strength, "dense")) >= measured.mean((0.0, "dense")) - 0.01


@pytest.mark.parametrize(("macs", "plain", "random"), [(0.7, 0.08, 0.15), (0.5, 0.3, 0.25)])
def test_what_the_pull_drove_to_zero_is_not_missed(measured, macs, plain, random):
    slimmed = measured.mean((0.03, macs, "cut"))
    assert slimmed >= measured.mean((0.03, "dense")) - 0.03
    assert slimmed >= measured.mean((0.0, macs, "cut")) + plain
    assert slimmed >= measured.mean(("random", macs, "cut")) + random


def test_the_stronger_the_pull_the_less_is_missed(measured):
    first, second, third = (measured.mean((s, 0.7, "cut")) for s in STRENGTHS)
    assert first + 0.03 <= second
    assert second + 0.03 <= third


def test_fine_tuning_brings_it_all_back(measured):
    for strength in STRENGTHS:
        dense = measured.mean((strength, "dense"))
        for macs in MACS:
            assert measured.mean((strength, macs, "fine-tuned")) >= dense - 0.015
    random = measured.mean(("random", 0.2, "fine-tuned"))
    assert measured.mean((0.03, 0.2, "fine-tuned")) >= random + 0.005
