"""A few images a class of Fashion-MNIST: pruned, combined, augmented, beside what is distilled.

Paper: arXiv 2502.06434. 6000 images to choose from, 1500 to test on; EL2N of two short runs; a
ConvNet of 16, 32 and 32 channels, 150 updates of AdamW at rate 0.003 on stored images, by
`Protocol`. Images are 28x28, canvases 56x56 of four whole ones: a tile loses nothing, as one of
a photograph loses little. Test accuracy in per cent, means of SEEDS seeds. Measured:

MEASURED
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateurs as sc
from secateurs.methods.samples.pca_dataset_compression import PruneCombineAugment
from secateurs.selection.canvases import Canvases
from secateurs.selection.dynamics import early_scores, read_el2n
from secateurs.selection.tiles import TileCrop
from secateurs.training.compression_benchmark import RECIPE, Protocol
from secateurs.zoo.catalog import make_task
from secateurs.zoo.datasets import TensorData, as_fetched

from .conftest import missing

pytestmark = pytest.mark.slow

DATA = "fashion-mnist?limit=6000"
SEEDS = 3
POOL, CLASSES = 6000, 10
SCORING = sc.TrainSettings(steps=100, optimizer="adam", lr=2e-3, weight_decay=0.0)
TEACHING = sc.TrainSettings(steps=400, optimizer="adam", lr=2e-3, weight_decay=0.0)
HARD = Protocol(recipe=replace(RECIPE, steps=150, lr=3e-3))
SOFT = replace(HARD, labels="soft")
SCALE = (0.5, 1.0)
"""Of crops: of 28 pixels the usual 0.08 leaves eight."""
PLAIN, TILES = (TileCrop(grid, size=28, scale=SCALE) for grid in (1, 2))


@pytest.fixture(scope="module")
def clothes():
    if why := missing(DATA):
        pytest.skip(f"needs Fashion-MNIST (apt install dataset-fashion-mnist): {why}")
    task = make_task("zoo:convnet", DATA, training=SCORING, batch_size=128)
    images, labels = task.evaluate.dataset[torch.arange(1500)]
    test = torch.utils.data.DataLoader(TensorData(images, labels), 1500, collate_fn=as_fetched)
    return replace(task, evaluate=test, model=network)


def network():
    """It knows where things are: no average over places before its linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def compressed(task, el2n, ipc, seed, *, grid, order):
    """Canvases of a grid, or for a grid of 1 as many plain images."""
    method = PruneCombineAugment(grid=grid, canvas=28 * grid, order=order)
    data = task.train.dataset
    keep = ipc * grid**2 * CLASSES / POOL
    source = {"ids": torch.arange(POOL), "labels": data.targets, "el2n": el2n}
    made = method.combine(sc.select(source, method, keep, seed=seed, samples=data))
    assert len(made) == ipc * CLASSES
    return made


def synthetic(teacher, ipc, seed, steps=200):
    """Images that a network classifies as wanted and whose statistics are those that its batch
    norms remember: the optimisation of SRe2L (arXiv 2306.13092), whose weight of the statistics
    is 0.01 for a ResNet-18; 1 here, for a network of two norms."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(ipc)
    images = torch.randn(len(labels), 1, 28, 28, generator=generator).requires_grad_(True)
    gaps = []

    def note(norm, args, output):
        x = args[0]
        gaps.append((x.mean((0, 2, 3)) - norm.running_mean).norm()
                    + (x.var((0, 2, 3)) - norm.running_var).norm())  # fmt: skip

    hooks = [m.register_forward_hook(note) for m in teacher.modules()
             if isinstance(m, nn.BatchNorm2d)]  # fmt: skip
    optimizer = torch.optim.Adam([images], lr=0.1, betas=(0.5, 0.9))
    for _ in range(steps):
        gaps.clear()
        optimizer.zero_grad()
        (F.cross_entropy(teacher(images), labels) + sum(gaps)).backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()
    return Canvases(images.detach(), labels, 1, tuple(() for _ in labels))


def test_prune_combine_augment_with_hard_labels(clothes, table):
    sizes = {}
    for seed in range(SEEDS):
        el2n = early_scores(clothes, read_el2n, runs=2, epoch=1.0, seed=1000 + seed)
        teacher = clothes.fresh_model(2000 + seed)
        sc.fit(teacher, clothes, TEACHING, seed=seed)
        teacher.eval().requires_grad_(False)
        table.note("teacher, all", 100 * clothes.measure(teacher)["accuracy"])
        for ipc in (1, 5, 20):
            sets = {}
            for order in ("random", "easy", "hard")[: 2 if ipc == 20 else 3]:
                plain = compressed(clothes, el2n, ipc, seed, grid=1, order=order)
                sets[order] = plain.with_transform(PLAIN)
                if order != "hard":
                    canvases = compressed(clothes, el2n, ipc, seed, grid=2, order=order)
                    sets[f"{order}, tiles"] = canvases.with_transform(TILES)
                    if ipc < 20:
                        sets[f"{order}, across"] = canvases.with_transform(PLAIN)
            if ipc < 20:
                sets["distilled"] = synthetic(teacher, ipc, seed).with_transform(PLAIN)
            records = HARD.compare(clothes, sets, seeds=[seed])
            if ipc < 20:
                told = {n: sets[n] for n in ("random", "easy", "distilled")}
                records += SOFT.compare(clothes, told, teacher, seeds=[seed])
            for record in records:
                arm = (ipc, record["labels"], record["set"])
                table.note(arm, 100 * record["accuracy"])
                sizes[arm] = record["image_bytes"], record["label_bytes"]
    print(sizes)
