"""GraNet on Fashion-MNIST: pruning with regeneration beats static and dynamic sparse training.

Paper: arXiv 2106.10404. A perceptron 300-100 on the first 6000 images at 14x14, 1200 updates of
SGD with a mask update every 20, ramps until 600, means of 3 seeds, 80 s on one core. Measured:

    arm                        95 %            98 %
    static, ERK densities      0.810 ± 0.002   0.760 ± 0.003
    RigL, ERK densities        0.821 ± 0.006   0.803 ± 0.001
    gradual, one threshold     0.837 ± 0.002   0.824 ± 0.002
    GraNet from dense          0.836 ± 0.003   0.827 ± 0.001
    GraNet from 50 %           0.837 ± 0.001   0.827 ± 0.003
"""

import pytest

import secateurs as sc

pytestmark = pytest.mark.slow

RAMP = {"end": 600, "frequency": 20}


def arms(sparsity):
    return {
        "static ERK": ("granet", {**RAMP, "initial": sparsity, "regrow_rate": 0.0}),
        "RigL-ERK": ("granet", {**RAMP, "initial": sparsity}),
        "GMP global": ("gmp", {**RAMP, "scope": "global", "revive": "never"}),
        "GraNet 0": ("granet", RAMP),
        "GraNet 0.5": ("granet", {**RAMP, "initial": 0.5}),
    }


def test_regeneration_beats_static_and_dynamic_sparse_training(fashion, table):
    task = fashion(300, 100, steps=1200)
    for seed in range(3):
        for sparsity in (0.95, 0.98):
            for arm, (method, options) in arms(sparsity).items():
                start = task.fresh_model(seed)
                outcome = sc.prune(
                    start, method, f"sparsity={sparsity}", task, seed=seed, inplace=True, **options
                )
                assert outcome.promise.kept
                table.add((arm, sparsity), task, outcome.model)

    def gain(one, other, sparsity):
        return table.mean((one, sparsity)) - table.mean((other, sparsity))

    for granet in ("GraNet 0", "GraNet 0.5"):
        assert gain(granet, "RigL-ERK", 0.98) >= 0.008
        assert gain(granet, "static ERK", 0.98) >= 0.05
        assert gain(granet, "static ERK", 0.95) >= 0.015
    assert gain("GraNet 0.5", "GMP global", 0.98) >= -0.01
    assert gain("GraNet 0", "GMP global", 0.98) >= -0.003
