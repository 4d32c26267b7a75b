"""Modules against layers and whole models on a small Swin, without fine-tuning.

Paper: arXiv 2404.13648. The card's toy: pixels of the digits as tokens, 14 epochs, means of 3
seeds, 65 s of CPU time. Measured, the dense network being at 0.952 ± 0.006:

    arm                   80 %             85 %             90 %
    dimap                 0.844 ± 0.034    0.807 ± 0.036    0.773 ± 0.029
    whole model (LAMP)    0.857 ± 0.030    0.813 ± 0.030    0.774 ± 0.037
    uniform magnitude     0.856 ± 0.049    0.819 ± 0.064    0.756 ± 0.064
    global magnitude      0.906 ± 0.027    0.868 ± 0.049    0.813 ± 0.061

The card's claim, 3 points and more over uniform magnitude at 85 %, does not show on this
network, which is less well trained than the card's (0.973): the two are equal within a deviation
(-0.011), DIMAP gaining on uniform as the sparsity rises (+0.017 at 90 %). As in the card DIMAP
is not better than LAMP or than global magnitude at this size.
"""

import pytest

import secateurs as sc
from secateurs.zoo.datasets import load_data

pytestmark = pytest.mark.slow

AUX = ("patch_embed", "downsample", "head")
ARMS = {
    "dimap": ("dimap", {}),
    "whole model (LAMP)": ("dimap", {"scope": "model"}),
    "uniform magnitude": ("dimap", {"scope": "layer"}),
    "global magnitude": ("global-mp", {"exclude": AUX}),
}


@pytest.fixture
def swin():
    """Pixels of the digits as tokens, windows of 4x4, three stages of two blocks, 16 to 64 wide."""
    models = pytest.importorskip("timm.models.swin_transformer")
    sizes = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 4), "window_size": 4}
    images = {"img_size": 8, "patch_size": 1, "in_chans": 1, "num_classes": 10}
    train, evaluate = load_data("digits").loaders(seed=0)
    return sc.classification(
        lambda: models.SwinTransformer(drop_path_rate=0.0, **sizes, **images),
        train,
        evaluate,
        training=sc.TrainSettings(epochs=14, lr=2e-3, optimizer="adamw", weight_decay=0.05),
    )


def test_modules_gain_on_the_same_share_of_every_layer_as_sparsity_rises(swin, table):
    for seed in range(3):
        model = swin.fresh_model(seed)
        sc.fit(model, swin, swin.training, seed=seed)
        model.eval()
        table.add("dense", swin, model)
        for sparsity in (0.8, 0.85, 0.9):
            for arm, (method, options) in ARMS.items():
                outcome = sc.prune(
                    model, method, f"sparsity={sparsity}", swin, recover=False, **options
                )
                assert outcome.promise.kept
                table.note((arm, sparsity), outcome.metrics_after["accuracy"])

    def gain(other, sparsity):
        return table.mean(("dimap", sparsity)) - table.mean((other, sparsity))

    assert table.mean("dense") > 0.9
    assert table.mean(("dimap", 0.9)) > 0.65
    # rises from -0.011 to +0.017
    assert gain("uniform magnitude", 0.9) > gain("uniform magnitude", 0.8)
    for sparsity in (0.8, 0.85, 0.9):
        assert abs(gain("whole model (LAMP)", sparsity)) < 0.05
        assert gain("global magnitude", sparsity) < 0.02
