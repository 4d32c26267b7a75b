"""LoRAPrune on the digits: what adapters know of a gradient, and what it is worth.

Paper: arXiv 2305.18403; the card's replica is the claim. A gated vision transformer of five
blocks. Rank correlation of the neurons' averages after 20 updates with those that the gradient of
W gives in the same training, the mean over the blocks; 3 seeds, 25 s on one core:

    rank          2                  8                  32
    lora          0.801 ± 0.007      0.908 ± 0.007      0.934 ± 0.007
    magnitude     0.660 ± 0.013      0.650 ± 0.007      0.635 ± 0.017

The card has 0.84, 0.92, 0.94 and 0.69.

Half of all heads and neurons of all blocks removed in 105 updates, lr 3e-3, the dense network
being at 0.973: at random 0.560 ± 0.004, by lora 0.841 ± 0.067. On a model this small the card
found magnitude (0.817) no worse than lora (0.782), so they are not compared.
"""

import pytest
import torch

import secateurs as sc
from secateurs.methods.channels.loraprune import LoRAPrune, Pruning, adapted_layers
from secateurs.parts.schedules import Cubic
from secateurs.structure.axes import Structure
from secateurs.structure.trace import trace
from secateurs.training.adapters import frozen, unwrap, wrap

pytestmark = pytest.mark.slow

SEEDS, RANKS = 3, (2, 8, 32)
METRICS = ("random", "lora")
HEAD, NEURON = 4 * 12 * 48 + 3 * 12, 3 * 48 + 2
HALF = 5 * (2 * HEAD + 48 * NEURON)
"""Parameters of two heads and 48 neurons in each of five blocks."""


def spearman(one, other):
    """Correlation of the ranks."""
    ranks = [x.argsort().argsort().double() for x in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def agreement(task, model, rank, seed):
    """Of the neurons' averages after 20 updates with those by the gradient of W: the mean over
    the blocks, by metric. All are taken in the same training."""
    method = LoRAPrune(rank=rank, alpha=2.0 * rank, lr=3e-3, steps=20, protect_last=0)
    names = adapted_layers(model)
    units, _ = method.units(Structure(trace(model, task.example_inputs)), model, names)
    ramp, hooks = Cubic(0.0, 0, 20), {}

    def attach(net, optimizer, total):
        # the gradient's comes last: it takes the gradients of W away
        for metric in ("lora", "magnitude", "grad"):
            hooks[metric] = Pruning(optimizer, layers, units, ramp, metric)
        return list(hooks.values())

    with frozen(model):
        layers = wrap(model, names, "lora", rank, 2.0 * rank, outputs=True, seed=seed)
        sc.fit(model, task, method.settings(task), seed=seed, attach=attach)
        unwrap(model)
    neurons = [u.name for u in units if u.role == "neuron"]
    truth = hooks.pop("grad").scores
    return {
        metric: sum(spearman(hook.scores[n], truth[n]) for n in neurons) / len(neurons)
        for metric, hook in hooks.items()
    }


def measure_agreement(digits_transformer, table):
    for seed in range(SEEDS):
        for rank in RANKS:
            task, model = digits_transformer(seed)
            for metric, value in agreement(task, model, rank, seed).items():
                table.note((rank, metric), value)
    return table


def measure_accuracy(digits_transformer, table):
    for seed in range(SEEDS):
        task, dense = digits_transformer(seed)
        table.add("dense", task, dense)
        total = sum(p.numel() for p in dense.parameters())
        for metric in METRICS:
            outcome = sc.prune(
                dense, "loraprune", f"params={total - HALF}", task, seed=seed, metric=metric,
                steps=105, lr=3e-3, dropout=0.0, protect_last=0,
            )  # fmt: skip
            assert outcome.history[0]["ratio"] == 0.5
            table.note(metric, outcome.metrics_after["accuracy"])
    return table


@pytest.fixture(scope="module")
def agreements(digits_transformer, tables):
    return measure_agreement(digits_transformer, tables())


@pytest.fixture(scope="module")
def accuracies(digits_transformer, tables):
    return measure_accuracy(digits_transformer, tables())


def test_adapters_tell_what_the_gradient_would_and_larger_ones_tell_more(agreements):
    two, eight, most = (agreements.mean((rank, "lora")) for rank in RANKS)
    assert two + 0.05 <= eight
    assert eight + 0.01 <= most
    for rank in RANKS:
        assert agreements.mean((rank, "lora")) >= agreements.mean((rank, "magnitude")) + 0.1


def test_what_adapters_say_is_better_than_chance(accuracies):
    assert accuracies.mean("lora") >= accuracies.mean("random") + 0.15
