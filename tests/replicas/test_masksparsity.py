"""MaskSparsity on the digits: what it is worth to pull at the doomed channels alone.

Paper: arXiv 2201.06776, whose claim is that a pull on all scales (network slimming) under-fits
what is kept, and one on the doomed alone does not, so that their removal costs next to nothing.
Convolutions of 16, 24 and 24 channels, 600 digits to train on and the other half of the data to
test; a baseline of 8 epochs, then 30 more, with s = 0.02 because they are so few; 35 % of the
multiply-accumulates stay. Means of 3 seeds, 2 minutes on one core:

                            trained         cut             fine-tuned      doomed γ   kept γ
    baseline                0.957 ± 0.007
    no pull                 0.976 ± 0.007   0.455 ± 0.092   0.937 ± 0.006   1.93       1.31
    mask of L1 norms        0.965 ± 0.003   0.948 ± 0.028   0.965 ± 0.004   0.04       1.28
    mask by chance          0.964 ± 0.003   0.864 ± 0.082   0.953 ± 0.010   0.20       1.18
    mask of a sparse run    0.977 ± 0.007   0.975 ± 0.009   0.975 ± 0.007   0.005      1.29
    network slimming        0.864 ± 0.111   0.221 ± 0.028   0.961 ± 0.011     (all: 0.15)
    scratch, as small                                       0.970 ± 0.004

"No pull" cuts the mask of L1 norms, "doomed γ" is the largest. Masked channels go without a loss
where the steps suffice to bring them to zero (not in one seed of the L1 mask, nor in two of a
mask by chance), and what stays is as large as without a pull. The pull on all scales costs the
network a tenth of its accuracy before anything is cut. The paper's own way, a sparse run and then
a masked one, is better than all others cut or fine-tuned; above a network of the same size
trained from scratch it is by half a point, no more than the seeds differ.
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


def test_the_doomed_are_not_missed_and_without_the_pull_they_are(measured):
    for arm in ("mask of L1 norms", "mask of a sparse run"):
        cut = measured.mean((arm, "removal"))
        assert cut >= measured.mean((arm, "masked")) - 0.035
        assert cut >= measured.mean(("none", "removal")) + 0.3
        assert cut >= measured.mean(("network slimming", "removal")) + 0.5
    assert measured.mean(("mask by chance", "removal")) >= measured.mean(("none", "removal")) + 0.2


def test_a_pull_on_some_does_not_underfit_and_a_pull_on_all_does(measured):
    free = measured.mean(("none", "masked"))
    for arm in list(ARMS)[1:]:
        assert measured.mean((arm, "masked")) >= free - 0.025
    assert measured.mean(("network slimming", "sparse training")) <= free - 0.04


def test_what_is_kept_keeps_its_scales(measured):
    free = measured.mean(("none", "mean kept γ"))
    for arm in ("mask of L1 norms", "mask of a sparse run"):
        assert measured.mean((arm, "mean kept γ")) == pytest.approx(free, rel=0.1)
        assert measured.mean((arm, "largest doomed γ")) <= 0.1
    assert measured.mean(("none", "largest doomed γ")) >= 1.0
    assert measured.mean(("network slimming", "mean γ")) <= 0.4 * free


def test_the_papers_way_is_as_good_as_the_baseline_and_as_training_from_scratch(measured):
    final = measured.mean(("mask of a sparse run", "fine-tuning"))
    assert final >= measured.mean(("mask of a sparse run", "baseline"))
    assert final >= measured.mean(("scratch", "trained")) - 0.01
    for arm in ("none", "mask by chance"):
        assert final >= measured.mean((arm, "fine-tuning")) + 0.01
    assert final >= measured.mean(("network slimming", "fine-tuning"))
