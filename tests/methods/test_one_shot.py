"""One-shot pruning: every combination of parts reaches its budget and refuses what it cannot."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.weights.one_shot import OneShot
from secateurs.parts.allocation import lamp_scores, largest_by_name
from secateurs.parts.patterns import NM, Block, Row, best_units
from secateurs.parts.prunable import prunable_parameters

SALIENCIES = ("magnitude", "random", "weight-gradient", "snip", "grasp", "synflow")
ALLOCATIONS = ("global", "uniform", "uniform+", "er", "erk", "lamp")


def prune(model, budget, task=None, **options):
    return sc.prune(model, "one-shot", budget, task, recover=False, **options)


def magnitudes(model):
    return {n: p.detach().abs() for n, p in prunable_parameters(model).items()}


def same(one, other):
    return all(torch.equal(one[n], other[n]) for n in one)


# budgets


@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("iterations", [1, 4])
def test_every_combination_keeps_exactly_what_it_should(
    digits_task, trained, saliency, allocation, iterations
):
    options = {"saliency": saliency, "allocation": allocation, "iterations": iterations}
    if (saliency, allocation) == ("grasp", "lamp"):
        with pytest.raises(InputError, match="allocation"):
            prune(trained, "sparsity=0.5", digits_task, **options)
        return
    # uniform+ leaves the first layer dense, here three quarters of all weights
    sparsity = 0.2 if allocation == "uniform+" else 0.5
    outcome = prune(trained, f"sparsity={sparsity}", digits_task, **options)
    assert outcome.masks.kept == outcome.masks.total - round(sparsity * outcome.masks.total)
    assert outcome.promise.kept


@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("budget", ["sparsity=0", "density=1"])
def test_no_sparsity_changes_no_bit(digits_task, trained, saliency, budget):
    outcome = prune(trained, budget, digits_task, saliency=saliency, iterations=3)
    for name, value in outcome.model.state_dict().items():
        assert torch.equal(value.view(torch.int32), trained.state_dict()[name].view(torch.int32))


def test_parameters_count_the_biases(trained):
    total = sum(p.numel() for p in trained.parameters())
    outcome = prune(trained, "params=1000")
    nonzero = sum(int((p != 0).sum()) for p in outcome.model.parameters())
    assert total - 1000 == outcome.masks.total - outcome.masks.kept
    assert nonzero == 1000


# what each part does


def test_magnitude_and_global_are_the_largest_weights(trained):
    outcome = prune(trained, "density=0.2")
    assert same(outcome.masks, largest_by_name(magnitudes(trained), outcome.masks.kept))


def test_lamp_allocation_is_the_largest_lamp_scores(trained):
    outcome = prune(trained, "density=0.2", allocation="lamp")
    expected = largest_by_name(lamp_scores(magnitudes(trained)), outcome.masks.kept)
    assert same(outcome.masks, expected)


def test_scaling_a_layer_changes_global_masks_and_not_lamp_masks(trained):
    def masks(allocation):
        return prune(trained, "density=0.2", allocation=allocation).masks

    plain = {a: masks(a) for a in ("global", "lamp")}
    with torch.no_grad():
        trained[2].weight.mul_(4)
    assert same(masks("lamp"), plain["lamp"])
    assert masks("global").kept_by_tensor()["2.weight"] > plain["global"]["2.weight"].sum()


def test_uniform_allocation_gives_every_layer_the_same_density(trained):
    outcome = prune(trained, "density=0.25", allocation="uniform")
    assert outcome.masks.kept_by_tensor() == {"0.weight": 512, "2.weight": 128, "4.weight": 40}


def test_a_floor_holds(trained):
    with torch.no_grad():
        trained[2].weight.mul_(1e-3)
    assert prune(trained, "sparsity=0.9").masks.kept_by_tensor()["2.weight"] == 0
    held = prune(trained, "sparsity=0.9", floor=20).masks
    assert min(held.kept_by_tensor().values()) >= 20
    assert held.kept == held.total - round(0.9 * held.total)


def test_iterations_of_a_fixed_score_end_where_one_cut_does(trained):
    one, many = (prune(trained, "sparsity=0.8", iterations=i).masks for i in (1, 7))
    assert same(one, many)


@pytest.mark.parametrize("allocation", ["lamp", "erk"])
def test_iterations_keep_the_largest_of_each_layer(trained, allocation):
    masks = prune(trained, "sparsity=0.8", allocation=allocation, iterations=5).masks
    for name, weight in magnitudes(trained).items():
        assert weight[masks[name]].min() >= weight[~masks[name]].max()


def chain():
    torch.manual_seed(0)
    widths = (64, 100, 100, 100, 10)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    with torch.no_grad():
        layers[2].weight.mul_(1e-3)
    return nn.Sequential(*layers)


def test_iterated_synflow_avoids_the_collapse_of_magnitude(digits_task):
    """Figure 1 of arXiv 2006.05467: the flow that every layer must carry keeps it alive."""
    magnitude = prune(chain(), "sparsity=0.95", digits_task)
    synflow = prune(chain(), "sparsity=0.95", digits_task, saliency="synflow", iterations=20)
    assert magnitude.masks.empty_tensors() == ["2.weight"]
    assert synflow.masks.empty_tensors() == []
    assert magnitude.masks.kept == synflow.masks.kept


def test_scores_by_data_are_functions_of_the_seed(digits_task, trained):
    def masks(seed):
        outcome = prune(trained, "sparsity=0.5", digits_task, saliency="snip", seed=seed)
        return outcome.masks

    assert same(masks(0), masks(0))
    assert not same(masks(0), masks(1))


def test_more_batches_are_looked_at_when_asked(digits_task, trained):
    one, four = (
        prune(trained, "sparsity=0.5", digits_task, saliency="weight-gradient", batches=b).masks
        for b in (1, 4)
    )
    assert not same(one, four)


@pytest.mark.parametrize(("saliency", "when"), [("snip", "training"), ("magnitude", "finetuning")])
def test_recovery_keeps_the_masks(digits_task, trained, saliency, when):
    start = digits_task.fresh_model(0) if when == "training" else trained
    outcome = sc.prune(start, "one-shot", "sparsity=0.8", digits_task, saliency=saliency)
    for name, mask in outcome.masks.items():
        assert not outcome.model.get_parameter(name)[~mask].any()
    assert outcome.metrics_after["accuracy"] > 0.6


# patterns


@pytest.mark.parametrize("budget", ["2:4", "1:4", "4:8", "4:4"])
def test_nm_holds_in_every_group_of_linear_layers_and_convolutions(budget):
    n, m = map(int, budget.split(":"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 16))
    outcome = prune(model, budget)
    conv = outcome.masks["0.weight"].permute(0, 2, 3, 1).reshape(-1, m)
    linear = outcome.masks["2.weight"].reshape(-1, m)
    for groups in (conv, linear):
        assert groups.sum(1).unique().tolist() == [n]
    assert outcome.promise.kept
    assert same(outcome.masks, {k: NM(n, m).mask(s) for k, s in magnitudes(model).items()})


def test_layers_that_do_not_divide_stay_dense_and_are_noted():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    outcome = prune(model, "2:4")
    assert list(outcome.masks) == ["1.weight"]
    assert outcome.notes == ["left dense, 4 does not divide the input dimension: 0.weight"]
    assert outcome.model[0].weight.all()
    with pytest.raises(InputError, match="a model with inputs that 5 divides"):
        prune(model, "2:5")


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize(
    ("text", "pattern"),
    [("row", Row()), ("block:4x2", Block(4, 2)), ("block:3x5:max", Block(3, 5, "max"))],
)
def test_units_go_whole_and_the_budget_is_met_to_one_of_them(trained, allocation, text, pattern):
    outcome = prune(trained, "sparsity=0.5", pattern=text, allocation=allocation)
    for mask in outcome.masks.values():
        kept = pattern.pool(mask.double()) > 0
        assert torch.equal(pattern.expand(kept, mask.shape), mask)
    if allocation == "global":
        assert abs(outcome.masks.kept - 0.5 * outcome.masks.total) <= outcome.unit
        assert outcome.promise.kept
    else:
        for name, mask in outcome.masks.items():
            largest = int(pattern.unit_sizes(mask.shape).max())
            assert abs(int(mask.sum()) - 0.5 * mask.numel()) <= largest, name


def test_rows_are_ranked_by_their_l1_norm(trained):
    outcome = prune(trained, "sparsity=0.5", pattern="row", allocation="uniform")
    norms = trained[0].weight.detach().abs().sum(1)
    kept = outcome.masks["0.weight"].any(1)
    assert norms[kept].min() > norms[~kept].max()


def test_the_best_units_come_closest_to_what_is_kept():
    units = {"b": torch.tensor([5.0, 1.0]), "a": torch.tensor([3.0, 4.0])}
    sizes = {"b": torch.tensor([10, 10]), "a": torch.tensor([3, 3])}
    for keep, chosen in [(0, 0), (4, 0), (6, 1), (11, 1), (12, 2), (15, 3), (20, 3), (26, 4)]:
        masks = best_units(units, sizes, keep)
        order = [masks["b"][0], masks["a"][1], masks["a"][0], masks["b"][1]]
        assert [bool(m) for m in order] == [i < chosen for i in range(4)]
        assert list(masks) == ["b", "a"]


# what is refused


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"iterations": 0}, "iterations"),
        ({"batches": 0}, "batches"),
        ({"floor": -1}, "floor"),
        ({"pattern": "blocks"}, "pattern"),
        ({"pattern": "row", "floor": 5}, "floor"),
    ],
)
def test_bad_options_are_refused_by_name(options, argument):
    with pytest.raises(InputError) as caught:
        OneShot(**options)
    assert caught.value.argument == argument


@pytest.mark.parametrize("saliency", SALIENCIES[2:])
def test_scores_that_run_the_model_need_a_task(trained, saliency):
    with pytest.raises(InputError, match=f"a Task: {saliency} runs the model"):
        prune(trained, "sparsity=0.5", saliency=saliency)


@pytest.mark.parametrize(
    ("budget", "pattern", "argument"),
    [
        ("sparsity=0.5", "2:4", "budget"),
        ("2:4", "1:4", "pattern"),
        ("2:4", "row", "pattern"),
        ("macs=0.5", "unstructured", "budget"),
    ],
)
def test_budgets_that_contradict_the_pattern_are_refused(trained, budget, pattern, argument):
    with pytest.raises(InputError) as caught:
        prune(trained, budget, pattern=pattern)
    assert caught.value.argument == argument


def test_a_pattern_that_says_the_same_as_the_budget_is_accepted(trained):
    one, other = prune(trained, "2:4", pattern="2:4"), prune(trained, "2:4")
    assert same(one.masks, other.masks)
