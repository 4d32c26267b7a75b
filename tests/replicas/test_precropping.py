"""PreCrop and PreConfig on the digits."""

import math

import pytest
import torch

import secateurs as sc
from secateurs.parts.allocation import fill_log_densities
from secateurs.parts.masks import Masks
from secateurs.parts.prunable import prunable_parameters
from secateurs.training.rounds import train_masked
from secateurs.zoo.catalog import make_task

pytestmark = pytest.mark.slow

SEEDS, SHARES = 3, (0.1, 0.02, 0.005)
NETWORK = "zoo:convnet?config=32,32,M,64,64,M,128,128"


@pytest.fixture(scope="module")
def task():
    settings = sc.TrainSettings(epochs=12, optimizer="adam", lr=3e-3, weight_decay=0.0)
    return make_task(NETWORK, "digits?test=0.5", batch_size=32, training=settings)


def uniform(task, parameters):
    """The widest network of the family with no more parameters."""
    width = 1.0
    while sum(p.numel() for p in task.resize(width).parameters()) > parameters:
        width -= 1 / 256
    return task.with_model(lambda: task.resize(width))


def random_masks(model, share, granularity, seed):
    """Masks at water-filled densities whose units are weights, kernels or whole inputs."""
    weights = prunable_parameters(model)
    size = {n: p.numel() for n, p in weights.items()}
    filled, _ = fill_log_densities([[*size.values()]], [share * sum(size.values())])
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for (name, weight), p in zip(weights.items(), filled, strict=True):
        spread = weight.shape if granularity == "weight" else (*weight.shape[:2],)
        spread = (1, weight.shape[1]) if granularity == "input" else spread
        units = torch.rand(spread, generator=generator)
        keep = max(1, round(p * units.numel()))
        chosen = units >= units.flatten().topk(keep).values[-1]
        shape = (*chosen.shape, *[1] * (weight.ndim - chosen.ndim))
        masks[name] = chosen.view(shape).expand_as(weight).clone()
    return Masks(masks)


@pytest.fixture(scope="module")
def measured(task, tables):
    """Accuracies by (arm, share) over the seeds."""
    table = tables()
    for seed in range(SEEDS):
        dense = task.fresh_model(seed)
        total = sum(p.numel() for p in dense.parameters())
        sc.fit(dense, task, task.training, seed=seed)
        table.add(("dense", 1.0), task, dense)

        def crop(arm, share, method="precropping", seed=seed, total=total, **options):
            outcome = sc.prune(
                task.fresh_model(seed), method, f"params={share}", task, seed=seed, **options
            )
            assert outcome.promise.kept
            assert outcome.after.parameters <= share * total
            table.note((arm, share), outcome.metrics_after["accuracy"])
            table.note((arm, share, "macs"), outcome.after.macs / outcome.before.macs)

        for share in SHARES:
            crop("crop", share)
            family = uniform(task, share * total)
            small = family.fresh_model(seed)
            sc.fit(small, task, task.training, seed=seed)
            table.add(("uniform", share), task, small)
        crop("crop, sqrt", 0.02, coupling="sqrt")
        crop("crop, synflow", 0.02, density_source="synflow")
        for criterion in ("random", "l1"):
            crop(criterion, 0.02, "spa", when="before", criterion=criterion)
        crop("config", 0.8, allow_expand=True, second_limit="macs=1.0")
        for granularity in ("weight", "kernel", "input"):
            model = task.fresh_model(seed)
            masks = random_masks(model, 0.3, granularity, seed)
            masks.apply_(prunable_parameters(model))
            found = train_masked(model, masks, task, seed=seed)
            assert math.isclose(masks.density, 0.3, abs_tol=0.01)
            table.note((granularity, 0.3), found.metrics["accuracy"])
    return table


def test_measured(measured):
    assert measured
