"""Replica of the naive baseline (arXiv 2202.02643): width and layer densities are what matters.

The bars hold on the digits of scikit-learn, too.
"""

import pytest

import secateurs as sc

pytestmark = pytest.mark.slow

WIDTHS = (16, 32, 64, 128)


def test_width_closes_the_gap_and_erk_beats_uniform(fashion_or_digits, table):
    for seed in range(3):
        for width in WIDTHS:
            task = fashion_or_digits(width, width, steps=1000, weight_decay=1e-4)
            dense = task.fresh_model(seed)
            sc.fit(dense, task, task.training, seed=seed)
            table.add((width, "dense"), task, dense)
            for sparsity in (0.9, 0.95):
                for allocation in ("erk", "uniform"):
                    outcome = sc.prune(
                        task.fresh_model(seed),
                        "random-pruning",
                        f"sparsity={sparsity}",
                        task,
                        seed=seed,
                        allocation=allocation,
                    )
                    table.add((width, allocation, sparsity), task, outcome.model)

    def loss(width, sparsity):
        return table.mean((width, "dense")) - table.mean((width, "erk", sparsity))

    assert loss(16, 0.9) >= 0.05
    # measured 0.054 and 0.034: room for other machines around the card's 0.05 and 0.035
    assert loss(32, 0.9) >= 0.045
    assert loss(128, 0.9) <= 0.04
    assert loss(16, 0.9) > loss(64, 0.9) > loss(128, 0.9)
    for width in WIDTHS:
        for sparsity in (0.9, 0.95):
            erk, uniform = (
                table.mean((width, allocation, sparsity)) for allocation in ("erk", "uniform")
            )
            assert erk >= uniform, (width, sparsity)
    assert table.mean((64, "erk", 0.95)) >= table.mean((64, "uniform", 0.95)) + 0.05
