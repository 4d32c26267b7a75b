"""LAPP on the digits: what learned thresholds and a bypass are worth.

Paper: arXiv 2309.14157, whose abstract claims ResNet-20 at 40 % of its cost without a loss. A
stem of 16 and three layers of 16, 32 and 32 filters, 14 epochs, pruned in the first 8, means of 3
seeds, 2 minutes 15 of one core. All costs are real multiply-accumulates, bypasses and stem
included, and every arm meets its share:

    share of the MACs                   0.3               0.12
    dense (1.0)                         0.993 ± 0.003
    LAPP, bypass                        0.983 ± 0.003     0.938 ± 0.011
    its filters without the bypass      0.884 ± 0.001     0.468 ± 0.106
    LAPP, no bypass                     0.985 ± 0.003     0.974 ± 0.010
    random filters at the start         0.987 ± 0.002     0.973 ± 0.006
    L1 filters at the start             0.987 ± 0.005     0.973 ± 0.006
    a uniformly narrower network        0.979 ± 0.005     0.954 ± 0.008
    spent at the freeze: bypass         0.365 ± 0.082     0.296 ± 0.110
    spent at the freeze: no bypass      0.313 ± 0.009     0.147 ± 0.029

What holds: layers keep very different shares (of 16, 32 and 32 filters 5, 1 and 18 at 0.3), and a
bypass carries a layer of a single filter. What does not: at equal cost the bypass is no gain. With
it the cost falls in proportion to the filters, without it with their square, so that it has to
give up far more of them. (The card's trial counted both with full inputs, where the network
without a bypass collapses; that is the third row.) Nor do learned thresholds beat random filters
here: the digits are too easy. Against the pull of the task the thresholds of the bypass do not
come down to the smallest budgets by themselves; the projection at the freeze does the rest.
"""

import pytest

import secateurs as sc
from secateurs.parts.costs import measure_cost
from secateurs.zoo.catalog import make_task
from secateurs.zoo.convolutional import convnet

pytestmark = pytest.mark.slow

SEEDS, SHARES = 3, (0.3, 0.12)


@pytest.fixture(scope="module")
def task():
    return make_task(
        "zoo:convnet?config=16,16,32,M,32", "digits",
        training=sc.TrainSettings(epochs=14, lr=0.05, weight_decay=1e-4),
    )  # fmt: skip


def narrowed(task, share):
    """The widest network of the family within a share of the MACs."""
    whole = measure_cost(task.resize(1.0), task.example_inputs).macs
    width = 1.0
    while measure_cost(task.resize(width), task.example_inputs).macs > share * whole:
        width -= 1 / 128
    return width


@pytest.fixture(scope="module")
def measured(task, tables):
    """Accuracies by (arm, share of the MACs) over the seeds, and the units kept by LAPP."""
    table, kept = tables(), {}
    for seed in range(SEEDS):
        dense = task.fresh_model(seed)
        sc.fit(dense, task, task.training, seed=seed)
        table.add(("dense", 1.0), task, dense)
        for share in SHARES:
            small = task.with_model(
                lambda share=share: task.resize(narrowed(task, share))
            ).fresh_model(seed)
            sc.fit(small, task, task.training, seed=seed)
            table.add(("narrow", share), task, small)
            for arm, method, options in (
                ("bypass", "lapp", {"prune_share": 8 / 14}),
                ("no bypass", "lapp", {"prune_share": 8 / 14, "bypass": "none"}),
                ("random", "spa", {"when": "before", "criterion": "random"}),
                ("l1", "spa", {"when": "before", "criterion": "l1"}),
            ):
                outcome = sc.prune(
                    task.fresh_model(seed), method, f"macs={share}", task, seed=seed, **options
                )
                assert outcome.promise.kept
                assert outcome.after.macs <= share * outcome.before.macs
                table.note((arm, share), outcome.metrics_after["accuracy"])
                if method == "lapp":
                    rows = outcome.tables["thresholds"]
                    kept[arm, share, seed] = [(r["kept"], r["total"]) for r in rows]
                    table.note(
                        (arm, share, "spent at the freeze"), outcome.history[-1]["most spent"]
                    )
            first, second, third = (k for k, _ in kept["bypass", share, seed])
            bare = task.with_model(
                lambda widths=(16, first, second, "M", third): convnet((1, 8, 8), 10, config=widths)
            ).fresh_model(seed)
            sc.fit(bare, task, task.training, seed=seed)
            table.add(("the same filters, no bypass", share), task, bare)
    return table, kept


def test_with_a_bypass_it_stays_near_the_dense_network(measured):
    table, _ = measured
    assert table.mean(("bypass", 0.3)) >= table.mean(("dense", 1.0)) - 0.03
    assert table.mean(("bypass", 0.12)) >= table.mean(("dense", 1.0)) - 0.09


def test_layers_keep_very_different_shares(measured):
    for seed in range(SEEDS):
        shares = [k / n for k, n in measured[1]["bypass", 0.3, seed]]
        assert max(shares) >= 3 * min(shares)


def test_a_bypass_carries_a_layer_of_hardly_any_filters(measured):
    table, _ = measured
    bare = table.mean(("the same filters, no bypass", 0.12))
    assert table.mean(("bypass", 0.12)) >= bare + 0.1


def test_at_equal_cost_it_is_no_better_than_narrower_layers(measured):
    """Against the card, which counted both with full inputs."""
    table, _ = measured
    for share, margin in ((0.3, 0.015), (0.12, 0.06)):
        bypass, plain = table.mean(("bypass", share)), table.mean(("no bypass", share))
        assert plain - margin <= bypass <= plain + 0.01
        for arm in ("random", "l1"):
            assert abs(plain - table.mean((arm, share))) <= 0.02
        assert plain >= table.mean(("narrow", share))


def test_the_thresholds_follow_the_ramp(measured):
    table, _ = measured
    for share in SHARES:
        assert table.mean(("no bypass", share, "spent at the freeze")) <= share + 0.1
        assert table.mean(("bypass", share, "spent at the freeze")) <= share + 0.3
