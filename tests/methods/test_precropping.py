"""PreCrop and PreConfig: the plan, the limits, the network that comes out."""

import copy
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.channels.precropping import PreCropping
from secateurs.parts.budgets import Budget
from secateurs.structure.axes import Structure
from secateurs.structure.trace import trace
from secateurs.zoo.convolutional import convnet
from secateurs.zoo.resnets import cifar_resnet

STILL = sc.TrainSettings(steps=0)


def make_conv():
    return convnet((1, 8, 8), 10, config=(8, "M", 16, 12))


def make_residual():
    return cifar_resnet((1, 8, 8), 10, 0.5, depth=8)


class Separable(nn.Module):
    """Depthwise-separable blocks with a shortcut, as in MobileNetV2."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.up = nn.Conv2d(8, 24, 1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.down = nn.Conv2d(24, 8, 1, bias=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.down(self.deep(self.norm(self.up(x)).relu()))
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 10, 3, padding=1)
        self.three, self.head = nn.Conv2d(16, 12, 1), nn.Linear(12, 10)

    def forward(self, x):
        x = self.one(x).relu()
        x = torch.cat([x, self.two(x).relu()], 1)
        return self.head(self.three(x).relu().mean((2, 3)))


MAKERS = [make_conv, make_residual, Separable, Concatenated]


def task_of(make, **training):
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(32) % 10), 16, shuffle=True)
    settings = sc.TrainSettings(**{"steps": 0, **training})
    return sc.classification(make, loader, loader, training=settings)


@cache
def structure_of(make, seed=0):
    """Planning leaves it as it is."""
    torch.manual_seed(seed)
    return sc.axes(make(), torch.randn(1, 1, 8, 8))


def planned(make, budget, seed=0, task=None, **options):
    structure = structure_of(make, seed)
    method = PreCropping(**options)
    return structure, method.plan(structure, method.accept(budget), task, seed=seed)


def value(structure, plan):
    """Σ log p over the layers."""
    return sum(math.log(p) for p in plan.densities.values())


@pytest.mark.parametrize(
    ("make", "budget"),
    [
        (make_conv, "params=0.6"),
        (make_residual, "macs=0.3"),
        (Separable, "params=0.2"),
        (Concatenated, "macs=0.3"),
    ],
)
def test_the_network_costs_what_the_plan_says_and_never_more_than_asked(make, budget):
    task = task_of(make)
    structure, plan = planned(make, budget)
    outcome = sc.prune(make(), "precropping", budget, task)
    kind, share = budget.split("=")
    before, after = (
        (c.macs if kind == "macs" else c.parameters) for c in (outcome.before, outcome.after)
    )
    assert after == plan.cost == outcome.promise.reached <= float(share) * before
    assert float(share) * before - after < plan.step
    assert outcome.promise.kept
    axes = {r["axis"]: r["kept"] for r in outcome.tables["axes"]}
    widths = {g.name: n for g, n in zip(plan.groups, plan.widths.tolist(), strict=True)}
    assert {n: axes[n] for n in widths} == widths
    for module in outcome.model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            assert module.groups == module.in_channels == module.out_channels
    rows = {r["weight"]: r["density"] for r in outcome.tables["densities"]}
    for name, weight in outcome.model.named_parameters():
        if name in rows:
            whole = structure.trace.model.get_parameter(name).numel()
            assert rows[name] == pytest.approx(weight.numel() / whole)


@pytest.mark.parametrize("make", MAKERS)
def test_a_limit_of_everything_changes_no_width(make):
    _, plan = planned(make, "params=1.0", second_limit="macs=1.0")
    assert plan.widths.tolist() == [g.size for g in plan.groups]
    assert plan.step is None


@settings(max_examples=8, deadline=None)
@given(st.floats(0.03, 0.9), st.floats(1.0, 1.5))
def test_a_larger_budget_never_has_less(share, factor):
    """Before rounding; every axis lies on two layers."""
    small, large = (
        PreCropping().plan(structure_of(make_conv), Budget("params", s))
        for s in (share, min(1, share * factor))
    )
    assert np.log(large.factors).sum() >= np.log(small.factors).sum() - 1e-6


def test_the_plan_needs_no_weights_no_data_and_no_seed():
    # moved there: to draw on the meta device, torch would import its compiler
    model, x = make_residual().to("meta"), torch.zeros(1, 1, 8, 8, device="meta")
    structure = Structure(trace(model, x))
    meta = PreCropping().plan(structure, Budget.parse("macs=0.4"))
    for seed in range(2):
        _, plan = planned(make_residual, "macs=0.4", seed)
        assert plan.widths.tolist() == meta.widths.tolist()
        assert plan.factors.tolist() == meta.factors.tolist()


def test_every_width_is_the_best_to_a_unit_against_brute_force():
    """A chain of two widths between an image and classes: all pairs are tried."""

    def make():
        return convnet((1, 8, 8), 10, config=(12, 16))

    structure, plan = planned(make, "params=0.3")
    allowed = 0.3 * structure.parameters()
    axes = [g.axis for g in plan.groups]
    assert len(axes) == 2

    def gain(a, b):
        return 2 * math.log(a / 12) + 2 * math.log(b / 16)

    best = max(
        gain(a, b)
        for a in range(1, 13)
        for b in range(1, 17)
        if structure.parameters(lambda x, n=(a, b): dict(zip(axes, n, strict=True)).get(x, x.size))
        <= allowed
    )
    found = plan.widths.tolist()
    step = 2 * max(math.log1p(1 / n) for n in found)
    assert best - step <= gain(*found) <= best + 1e-9


def test_two_limits_hold_at_once():
    structure, plan = planned(make_residual, "params=0.3", second_limit="macs=0.3")
    counts = {g.axis: n for g, n in zip(plan.groups, plan.widths.tolist(), strict=True)}

    def count(axis):
        return counts.get(axis, axis.size)

    assert structure.parameters(count) <= 0.3 * structure.parameters()
    assert structure.macs(count) <= 0.3 * structure.macs()
    assert min(plan.multipliers) > 0
    outcome = sc.prune(
        make_residual(), "precropping", "params=0.9", task_of(make_residual),
        second_limit="macs=0.2",
    )  # fmt: skip
    assert outcome.promise.kept
    assert any("params=0.9 is not used up: macs=0.2 holds" in n for n in outcome.notes)


@pytest.mark.parametrize("make", MAKERS[1:3])
def test_preconfig_widens_at_equal_cost_and_is_loaded_again(make, tmp_path):
    task = task_of(make, steps=4)
    outcome = sc.prune(
        make(), "precropping", "params=0.8", task, allow_expand=True, second_limit="macs=1.0"
    )
    assert outcome.after.parameters <= 0.8 * outcome.before.parameters
    assert outcome.after.macs <= outcome.before.macs
    rows = outcome.tables["widths"]
    assert any(r["width"] > r["units"] for r in rows)
    assert all(r["width"] <= 4 * r["units"] for r in rows)
    sc.save(outcome, tmp_path / "out")
    again = sc.load(tmp_path / "out", make)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(again.model(x), outcome.model(x), rtol=0, atol=0)
    assert task.measure(again.model) == outcome.metrics_after


def test_preconfig_has_more_than_precrop_at_the_same_cost():
    structure, crop = planned(make_conv, "params=0.5")
    _, config = planned(make_conv, "params=0.5", allow_expand=True)
    assert value(structure, config) > value(structure, crop)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("budget", ["macs=0.3", "params=0.3"])
def test_roots_of_densities_meet_the_budget_too(make, budget):
    structure, plan = planned(make, budget, coupling="sqrt")
    kind, share = budget.split("=")
    whole = structure.macs() if kind == "macs" else structure.parameters()
    assert plan.cost <= float(share) * whole
    assert float(share) * whole - plan.cost < plan.step
    assert set(plan.aims) == set(plan.densities)
    for name, aim in plan.aims.items():
        assert 0 < aim <= 1, name


def test_roots_respect_every_layers_density_before_what_is_left_is_spent():
    _, plan = planned(make_conv, "params=0.3", coupling="sqrt")
    r = dict(zip([g.name for g in plan.groups], plan.factors, strict=True))
    first, second, third = r.values()
    made = (first, first * second, second * third, third)
    for aim, density in zip(plan.aims.values(), made, strict=True):
        assert density <= aim + 1e-9


@pytest.mark.parametrize("source", ["synflow", "snip", "grasp"])
def test_densities_of_masks_become_widths(source):
    task = task_of(make_conv)
    structure, plan = planned(
        make_conv, "params=0.4", task=task, density_source=source, iterations=5
    )
    twin = make_conv_of(0)
    masks = sc.prune(
        twin, "one-shot", "density=0.4", task, saliency=source, recover=False,
        iterations=5 if source == "synflow" else 1,
    ).masks  # fmt: skip
    for name, aim in plan.aims.items():
        assert aim == pytest.approx(max(float(masks[name].double().mean()), 1e-9), abs=1e-6)
    allowed = 0.4 * structure.parameters()
    assert allowed - plan.step < plan.cost <= allowed


def make_conv_of(seed):
    torch.manual_seed(seed)
    return make_conv()


def test_synflow_must_be_iterated():
    """At 1 % one round empties layers, a hundred do not (check 11)."""
    torch.manual_seed(0)
    model = convnet((1, 8, 8), 10, config=(16, 16, "M", 32, 32))
    task = task_of(lambda: model)

    def empty(rounds):
        masks = sc.prune(
            model, "one-shot", "density=0.01", task, saliency="synflow", iterations=rounds,
            recover=False,
        ).masks  # fmt: skip
        return masks.empty_tensors(), {n: float(m.double().mean()) for n, m in masks.items()}

    (once, one_shot), (often, iterated) = empty(1), empty(100)
    assert once
    assert not often
    assert one_shot != iterated


def test_multiples_and_least_widths_and_axes_left_alone():
    _, plan = planned(make_residual, "params=0.5", round_to=4, min_width=4)
    for group, width in zip(plan.groups, plan.widths.tolist(), strict=True):
        assert width % 4 == 0 or width == group.size
        assert width >= 4
    _, spared = planned(make_residual, "params=0.7", exclude=(r"stages\.0",))
    assert not any(g.name.startswith("stages.0") for g in spared.groups)
    _, grown = planned(make_conv, "params=0.9", allow_expand=True, round_to=8)
    assert all(
        n % 8 == 0 or n == g.size for g, n in zip(grown.groups, grown.widths.tolist(), strict=True)
    )


@pytest.mark.parametrize("scale", [1, 3])
def test_fresh_weights_have_the_spread_of_the_task_and_slices_are_the_first_units(scale):
    def make():
        model = make_conv()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(scale)
        return model

    torch.manual_seed(0)
    dense = make()
    fresh = sc.prune(dense, "precropping", "params=0.2", task_of(make), seed=3).model
    weight, whole = fresh.features[3].conv.weight, dense.features[3].conv.weight
    inputs = whole.shape[1] / weight.shape[1]
    assert inputs > 1.5
    spread = whole.std().item() * math.sqrt(inputs)
    assert weight.std().item() == pytest.approx(spread, rel=0.15)
    sliced = sc.prune(dense, "precropping", "params=0.2", task_of(make), init="slice").model
    own = sliced.features[3].conv.weight
    assert torch.equal(own, whole[: own.shape[0], : own.shape[1]])
    assert not torch.equal(weight, own)


def test_the_expected_synflow_of_masked_chains():
    """Check 7: the mean of R over draws is Π N · Π c p, whatever the masks look like inside."""
    sizes, p = (4, 6, 5, 3), (0.5, 0.8, 0.3)
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    paths = torch.ones(draws, sizes[0], dtype=torch.float64)
    for (left, right), density in zip(pairwise(sizes), p, strict=True):
        shape = (draws, left, right)
        weights = torch.randn(shape, generator=generator, dtype=torch.float64).abs()
        kept = torch.rand(shape, generator=generator, dtype=torch.float64) < density
        paths = torch.einsum("ni,nij->nj", paths, weights * kept)
    expected = math.prod(sizes) * math.prod(p) * math.sqrt(2 / math.pi) ** 3
    assert expected == pytest.approx(21.94, abs=0.01)
    assert paths.sum(1).mean().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_expand": 0.5}, "max_expand"),
        ({"iterations": 0}, "iterations"),
        ({"batches": 0}, "batches"),
        ({"round_to": 0}, "round_to"),
        ({"min_width": 0}, "least"),
        ({"coupling": "cube"}, "coupling"),
        ({"density_source": "magnitude"}, "density_source"),
        ({"init": "slice", "allow_expand": True}, "init"),
        ({"second_limit": "latency=3ms"}, "second_limit"),
        ({"second_limit": "params=0.3"}, "second_limit"),
        ({"second_limit": "much"}, "budget"),
    ],
)
def test_bad_options_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        sc.prune(make_conv(), "precropping", "params=0.5", task_of(make_conv), **options)


def test_limits_that_no_widths_meet_are_refused_and_nothing_is_changed():
    model, task = make_conv_of(0), task_of(make_conv)
    before = copy.deepcopy(model.state_dict())
    cases = (
        ("params=10", {}, "at least .*, the narrowest widths"),
        ("params=0.1", {"min_width": 8}, "at least .*, the narrowest widths"),
        ("params=1M", {}, "params up to .*, or allow_expand"),
        ("params=0.5", {"exclude": (".",)}, "none to give another size"),
    )
    for budget, options, message in cases:
        with pytest.raises(InputError, match=message):
            sc.prune(model, "precropping", budget, task, inplace=True, **options)
    with pytest.raises(InputError, match="traces the model"):
        PreCropping().prune(model, Budget.parse("params=0.5"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
