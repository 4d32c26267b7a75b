"""Scores of units and the choice of those that stay."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.parts.budgets import Budget
from secateurs.structure.choice import Limits, choose, chosen
from secateurs.structure.cost import structure_cost
from secateurs.structure.removal import promise_of, since
from secateurs.structure.scores import (
    aggregated,
    normalized,
    producers,
    slice_scores,
    unit_scores,
)


def perceptron():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.fixture
def structure():
    return sc.axes(perceptron(), torch.randn(1, 5))


def test_aggregates_and_norms_of_the_card():
    slices = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
    assert aggregated(slices, "sum").tolist() == [4, 7]
    assert aggregated(slices, "mean").tolist() == [2, 3.5]
    assert aggregated(slices, "max").tolist() == [3, 5]
    assert aggregated(slices, "prod").tolist() == [3, 10]
    scores = torch.tensor([4.0, 7.0])
    assert normalized(scores, "mean").tolist() == pytest.approx([0.7273, 1.2727], abs=1e-4)
    assert normalized(scores, "sum").sum() == pytest.approx(1)
    assert normalized(scores, "max").max() == 1
    assert normalized(scores, "gaussian").tolist() == pytest.approx([-1, 1], abs=1e-6)
    assert normalized(scores, "l2").square().sum() == pytest.approx(1)
    assert normalized(scores, "none") is scores


def test_signed_scores_keep_their_order():
    scores = torch.tensor([-3.0, -1.0, 0.5])
    for rule in ("sum", "mean", "max", "l2", "gaussian"):
        assert normalized(scores, rule).argsort().tolist() == [0, 1, 2]


@pytest.mark.parametrize("call", [aggregated, normalized])
def test_unknown_rules_are_refused(call):
    argument = [torch.ones(2)] if call is aggregated else torch.ones(2)
    with pytest.raises(InputError, match="did you mean 'mean'"):
        call(argument, "meen")


def test_a_unit_is_scored_by_its_row_its_bias_and_its_column(structure):
    model = structure.trace.model
    group = structure["0"]
    elements = {n: p.detach().abs() for n, p in model.named_parameters()}
    rows, bias, columns = slice_scores(structure, group, elements)
    assert torch.allclose(rows, model[0].weight.abs().sum(1).double())
    assert torch.allclose(bias, model[0].bias.abs().double())
    assert torch.allclose(columns, model[2].weight.abs().sum(0).double())
    total = unit_scores(structure, elements, "sum", "none")["0"]
    assert torch.allclose(total, rows + bias + columns)


def test_channels_that_are_flattened_own_several_columns():
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.Flatten(), nn.Linear(12, 2))
    structure = sc.axes(model, torch.randn(1, 1, 2, 2))
    elements = {n: p.detach() for n, p in model.named_parameters()}
    _, columns = slice_scores(structure, structure["0"], elements)
    expected = model[2].weight.detach().double().reshape(2, 3, 4).sum((0, 2))
    assert torch.allclose(columns, expected)


def wide(widths=(8, 6, 3)):
    sizes = [5, *widths, 2]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_the_choice_is_the_smallest_that_meets_the_target(scope, share):
    structure = sc.axes(wide(), torch.randn(1, 5))
    generator = torch.Generator().manual_seed(3)
    scores = {g.name: torch.rand(g.size, generator=generator) for g in structure.free}
    target = share * structure.parameters()
    choice = choose(structure, scores, structure.parameters, target, scope=scope)
    assert choice.cost <= target < choice.cost_before_last
    for group in structure.free:
        kept = choice.kept.get(group.axis, np.arange(group.size))
        gone = np.setdiff1d(np.arange(group.size), kept)
        if len(gone):
            assert scores[group.name][gone].max() <= scores[group.name][kept].min()


def test_no_removal_when_the_target_is_met_already(structure):
    scores = {"0": torch.rand(4)}
    choice = choose(structure, scores, structure.parameters, structure.parameters())
    assert choice.kept == {}


def test_what_something_else_chose_costs_up_to_one_unit_more():
    structure = sc.axes(wide((6, 9)), torch.randn(1, 5))
    counts = {group.axis: 3 for group in structure.free}
    kept = {axis: np.arange(3) for axis in counts}
    choice = chosen(kept, structure.parameters)
    assert choice.cost == structure.parameters(lambda a: counts.get(a, a.size))
    more = [
        structure.parameters(lambda a, own=own: counts.get(a, a.size) + (a is own))
        for own in counts
    ]
    assert choice.cost_before_last == max(more) > choice.cost
    assert chosen({}, structure.parameters).cost == structure.parameters()


def test_limits_hold():
    structure = sc.axes(wide((16, 12)), torch.randn(1, 5))
    scores = {g.name: torch.rand(g.size) for g in structure.free}
    limits = Limits(max_ratio=0.5, round_to=4)
    assert [limits.floor(n) for n in (16, 12, 3)] == [8, 8, 3]
    for share in (0.8, 0.6):
        target = share * structure.parameters()
        choice = choose(structure, scores, structure.parameters, target, limits=limits)
        for group in structure.free:
            kept = len(choice.kept.get(group.axis, range(group.size)))
            assert kept % 4 == 0
            assert kept >= limits.floor(group.size)


def test_a_target_below_the_floors_is_refused(structure):
    with pytest.raises(InputError, match="budget: got 0; accepted: at least 12"):
        choose(structure, {"0": torch.rand(4)}, structure.parameters, 0)


@pytest.mark.parametrize("bad", [{"max_ratio": 0.0}, {"least": 0}, {"round_to": 0}])
def test_bad_limits_are_refused(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        Limits(**bad)


def test_the_layers_that_make_units_are_told_from_those_that_use_them():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 6, 2), nn.Flatten(), nn.Linear(6 * 25, 3),
    )  # fmt: skip
    found = sc.axes(model.eval(), torch.randn(1, 1, 8, 8))
    assert producers(found, found["0"]) == [("0.weight", 0), ("2.weight", 0)]
    assert producers(found, found["3"]) == [("3.weight", 1)]


def test_a_budget_may_count_units():
    structure = sc.axes(perceptron(), torch.randn(1, 5))
    cost = structure_cost(structure, Budget.parse("keep=0.5"), torch.randn(1, 5))
    assert (cost.whole, cost.target, cost.asked) == (4, 2, 0.5)
    scores = {"0": torch.tensor([3.0, 1.0, 4.0, 2.0])}
    choice = choose(structure, scores, cost.of, cost.target)
    assert choice.kept[structure["0"].axis].tolist() == [0, 2]
    promise = promise_of(Budget.parse("keep=0.5"), cost, choice)
    assert promise.kept
    assert promise.reached == 0.5


def test_a_table_of_axes_tells_of_all_removals():
    before = [{"axis": "a", "kept": 5, "total": 9}, {"axis": "b", "kept": 1, "total": 4}]
    now = [{"axis": "a", "kept": 2, "total": 5}]
    assert since(before, now) == [
        {"axis": "a", "kept": 2, "total": 9}, {"axis": "b", "kept": 1, "total": 4},
    ]  # fmt: skip
    assert since([], now) == now
