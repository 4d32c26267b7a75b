"""Blocks of a small vision transformer on the digits, without fine-tuning.

Paper: arXiv 2407.02068. Blocks of 8x8 in all matrices inside the blocks of a transformer of 16
tokens (dim 48, depth 4, 10 epochs), 128 calibration images, means of 3 seeds, about 70 s of CPU
time. Measured, the dense network being at 0.939 ± 0.025:

    arm                              density 0.6      density 0.5
    uniform |w|                      0.330 ± 0.110    0.167 ± 0.025
    uniform |w g|                    0.282 ± 0.058    0.165 ± 0.017
    global |w|                       0.724 ± 0.056    0.562 ± 0.074
    global |w g|                     0.876 ± 0.028    0.827 ± 0.042
    released curve, equal slopes     0.562 ± 0.141    0.151 ± 0.058
    released curve, lagrangian       0.721 ± 0.048    0.470 ± 0.139
    fisher, lagrangian               0.864 ± 0.045    0.776 ± 0.019
    fisher, lagrangian, power        0.772 ± 0.031    0.720 ± 0.063

What holds is the order of the curves: the card's fisher curve over the released one, the
Lagrangian over equal slopes, all over the same share of every layer. What does not: the card has
fisher 13 points above the global ranking of |w g|, here it is 1 and 5 points below; and uniform
|w g| 23 points above uniform |w|, here they are equal. The energy term costs 6 to 9 points of
accuracy at the same density, for products that take less energy. With gradients of 8 images at
once instead of one, the fisher curve lost 13 points at density 0.5 (another training, 20 epochs:
0.710 against 0.840).
"""

import pytest

import secateurs as sc
from secateurs.method import masked_outcome
from secateurs.methods.weights.lpvit import LPViT, gradients
from secateurs.parts.masks import Masks
from secateurs.parts.patterns import Block, best_units
from secateurs.training.batches import calibration_inputs
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

TILES = Block(8, 8)
EXCLUDE = ("^patches", "^classifier")
LOOKS = {"block": (8, 8), "samples": 128, "exclude": EXCLUDE, "recover": False}
ARMS = {
    "released curve, equal slopes": {"curve": "mean-grad", "solver": "slope", "power": False},
    "released curve, lagrangian": {"curve": "mean-grad", "power": False},
    "fisher, lagrangian": {"power": False},
    "fisher, lagrangian, power": {},
}


def baselines(task, model, density, seed):
    """Masked models by blocks of |w| or |w g|, the same share of each layer or all together."""
    params = LPViT(exclude=EXCLUDE).prunable(model)
    inputs = calibration_inputs(task.training_loader(), 128, seed, task.unpack)
    [slope] = gradients(model, params, task, [inputs])
    weights = {n: p.detach() for n, p in params.items()}
    sizes = {n: TILES.unit_sizes(w.shape) for n, w in weights.items()}
    count = {n: w.numel() for n, w in weights.items()}
    for name, values in (("|w|", weights), ("|w g|", {n: weights[n] * slope[n] for n in weights})):
        scores = {n: TILES.pool(v.abs()) for n, v in values.items()}
        alone = {
            n: best_units({n: scores[n]}, {n: sizes[n]}, round(density * count[n]))[n]
            for n in scores
        }
        together = best_units(scores, sizes, round(density * sum(count.values())))
        for scope, kept in (("uniform", alone), ("global", together)):
            masks = {n: TILES.expand(kept[n], weights[n].shape) for n in weights}
            twin = task.fresh_model(seed)
            twin.load_state_dict(model.state_dict())
            yield f"{scope} {name}", masked_outcome(twin, Masks(masks)).model


def test_where_blocks_go_matters_more_than_which(table):
    recipe = sc.TrainSettings(epochs=10, lr=3e-3, optimizer="adamw", weight_decay=0.05)
    task = make_task("zoo:vit-tiny?dim=48&hidden=96", "digits", training=recipe)
    for seed in range(3):
        model = task.fresh_model(seed)
        sc.fit(model, task, task.training, seed=seed)
        model.eval()
        table.add("dense", task, model)
        for density in (0.6, 0.5):
            for arm, other in baselines(task, model, density, seed):
                table.add((arm, density), task, other)
            for arm, options in ARMS.items():
                outcome = sc.prune(
                    model, "lpvit", f"density={density}", task, seed=seed, **LOOKS, **options
                )
                assert outcome.promise.kept
                table.note((arm, density), outcome.metrics_after["accuracy"])

    def gain(other, density, arm="fisher, lagrangian"):
        return table.mean((arm, density)) - table.mean((other, density))

    assert table.mean("dense") > 0.9
    for density in (0.6, 0.5):
        assert gain("uniform |w|", density) > 0.35
        assert gain("uniform |w g|", density) > 0.4
        assert gain("global |w|", density) > 0.05
        assert gain("global |w g|", density) > -0.12
    assert gain("released curve, lagrangian", 0.6) > 0.06
    assert gain("released curve, lagrangian", 0.5) > 0.15
    assert gain("released curve, equal slopes", 0.5, "released curve, lagrangian") > 0.1
    assert gain("released curve, equal slopes", 0.5) > 0.4
    assert gain("fisher, lagrangian, power", 0.6) > 0.02
