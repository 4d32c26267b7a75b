"""Replica of "To prune, or not to prune" (arXiv 1710.01878): ramps, and large-sparse networks.

On so easy a task there is no advantage over a small dense network at 90 % sparsity yet, so the
claim is tested where there is one.
"""

import pytest

import secateurs as sc

pytestmark = pytest.mark.slow

TRAINING = {"steps": 1000, "weight_decay": 1e-4}
RAMP = {"begin": 100, "end": 700, "frequency": 20}
ARMS = {
    "cubic": RAMP,
    "linear": {**RAMP, "power": 1.0},
    "at once at 100": {"begin": 100, "end": 100},
    "at once at 700": {"begin": 700, "end": 700},
}
SMALL = {0.95: (21, 14), 0.975: (11, 7)}
"""Hidden sizes of dense networks with as many weights: 4550 and 2303."""


def test_large_sparse_beats_small_dense_and_the_cubic_ramp_all_others(fashion, table):
    large = fashion(300, 100, **TRAINING)
    for seed in range(3):
        dense = large.fresh_model(seed)
        sc.fit(dense, large, large.training, seed=seed)
        table.add("dense", large, dense)
        for sparsity, hidden in SMALL.items():
            for arm, options in ARMS.items():
                start = large.fresh_model(seed)
                outcome = sc.prune(
                    start, "gmp", f"sparsity={sparsity}", large, seed=seed, inplace=True, **options
                )
                assert outcome.promise.kept
                table.add((arm, sparsity), large, outcome.model)
            small = fashion(*hidden, **TRAINING)
            model = small.fresh_model(seed)
            sc.fit(model, small, small.training, seed=seed)
            table.add(("small-dense", sparsity), small, model)
            # the library's own baseline: one width for all layers, biases within the budget
            outcome = sc.prune(dense, "small-dense", f"sparsity={sparsity}", large, seed=seed)
            table.add(("small-dense by width", sparsity), large, outcome.model)

    def gain(other, sparsity):
        return table.mean(("cubic", sparsity)) - table.mean((other, sparsity))

    assert gain("small-dense", 0.975) >= 0.03
    assert gain("small-dense by width", 0.975) >= 0.03
    assert gain("linear", 0.975) >= 0.05
    assert gain("at once at 100", 0.975) >= 0.03
    assert gain("at once at 700", 0.975) >= 0.2
    for arm in ("small-dense", "linear", "at once at 100", "at once at 700"):
        assert gain(arm, 0.95) < gain(arm, 0.975)
    for arm in ("linear", "at once at 100", "at once at 700"):
        assert gain(arm, 0.95) > 0
    # measured +0.001, the card has +0.009: at 95 % the two are about equal
    assert gain("small-dense", 0.95) > -0.01
