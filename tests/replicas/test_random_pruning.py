"""Random pruning on Fashion-MNIST: width and the densities of the layers are what matters.

Paper: arXiv 2202.02643. Perceptrons with two hidden layers of one width on the first 6000 images
at 14x14, 1000 updates of SGD, means of 3 seeds, 75 s on one core. Measured:

    width   dense           ERK 90 %        uniform 90 %    ERK 95 %        uniform 95 %
     16     0.817 ± 0.006   0.718 ± 0.017   0.493 ± 0.072   0.424 ± 0.069   0.206 ± 0.120
     32     0.837 ± 0.001   0.783 ± 0.010   0.659 ± 0.012   0.648 ± 0.049   0.420 ± 0.068
     64     0.843 ± 0.001   0.803 ± 0.002   0.793 ± 0.008   0.748 ± 0.004   0.689 ± 0.028
    128     0.849 ± 0.002   0.815 ± 0.002   0.808 ± 0.001   0.782 ± 0.002   0.759 ± 0.005

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
