"""Sparsity-informed adaptive pruning: counts a group, the brake, the budget."""

from dataclasses import replace

import pytest
import torch

import secateurs as sc
from secateurs.analysis.pq_index import pq_index, pq_prune_count
from secateurs.errors import InputError
from secateurs.methods.weights.pq_index_sap import SparsityInformedPruning
from secateurs.parts.masks import Masks


@pytest.fixture
def task(digits_task):
    return replace(digits_task, training=sc.TrainSettings(steps=40, lr=0.2))


def example(seed=0):
    """Weights of two tensors, some of them gone, one row with none left."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "conv": torch.randn(6, 3, 2, 2, generator=generator),
        "fc": torch.randn(5, 20, generator=generator),
    }
    masks = {n: torch.rand(w.shape, generator=generator) > 0.3 for n, w in weights.items()}
    masks["fc"][3] = False
    return weights, Masks(masks)


def one_round(weights, masks, **options):
    """The masks after a round, and how many each tensor lost."""
    method = SparsityInformedPruning(**options)
    new = method._cut(weights, masks, method._counts(weights, masks))
    return new, {n: int((masks[n] & ~new[n]).sum()) for n in masks}


def count_of(weight, mask, p=0.5, q=1.0, **options):
    return pq_prune_count(float(pq_index(weight, p, q, mask)), int(mask.sum()), p, q, **options)


def smallest_removed(weight, mask, count):
    """By sorting: the mask without its `count` survivors of least magnitude."""
    size = weight.abs().masked_fill(~mask, torch.inf)
    return mask.flatten().index_fill(0, size.flatten().argsort()[:count], False).view(mask.shape)


def test_layer_scope_cuts_every_layer_by_its_own_index():
    weights, masks = example()
    new, removed = one_round(weights, masks, scope="layer")
    for name, weight in weights.items():
        count = count_of(weight, masks[name])
        assert removed[name] == count > 0
        assert torch.equal(new[name], smallest_removed(weight, masks[name], count))


def test_neuron_scope_is_the_layer_rule_on_every_row():
    weights, masks = example()
    new, _ = one_round(weights, masks, scope="neuron", p=1.0, q=2.0)
    for name, weight in weights.items():
        for row in range(len(weight)):
            count = count_of(weight[row], masks[name][row], 1.0, 2.0)
            expected = smallest_removed(weight[row], masks[name][row], count)
            assert torch.equal(new[name][row], expected)
    assert not bool(new["fc"][3].any()), "a row that is gone stays gone"


def test_global_scope_puts_all_weights_into_one_vector():
    weights, masks = example()
    new, removed = one_round(weights, masks, scope="global")
    flat = torch.cat([w.flatten() for w in weights.values()])
    alive = torch.cat([m.flatten() for m in masks.values()])
    count = count_of(flat, alive)
    assert sum(removed.values()) == count
    expected = smallest_removed(flat, alive, count)
    assert torch.equal(torch.cat([m.flatten() for m in new.values()]), expected)


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_equal_magnitudes_are_all_kept(scope):
    weights = {"a": 0.5 * torch.ones(4, 6), "b": -0.5 * torch.ones(2, 6)}
    _, removed = one_round(weights, Masks.ones_like(weights), scope=scope)
    assert removed == {"a": 0, "b": 0}


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_a_huge_gamma_removes_beta_of_every_group_and_ties_no_more(scope):
    """Half of the weights are equal; floor(0.9 d) go all the same, not one more."""
    weights = {"a": torch.tensor([[1.0] * 10 + list(range(2, 12))] * 2)}
    _, removed = one_round(weights, Masks.ones_like(weights), scope=scope, gamma=1e9)
    assert removed == {"a": 36}


@pytest.mark.parametrize("policy", ["lt", "os"])
def test_the_baselines_remove_a_fixed_rate_of_the_survivors(policy):
    weights, masks = example()
    _, removed = one_round(weights, masks, policy=policy, rate=0.25)
    assert removed == {n: int(0.25 * int(m.sum())) for n, m in masks.items()}


def test_rounds_follow_the_index_until_the_budget(task):
    outcome = sc.prune(task.fresh_model(0), "pq-index-sap", "sparsity=0.5", task)
    densities = [row["density"] for row in outcome.history]
    assert densities == sorted(densities, reverse=True)
    assert outcome.masks.density == densities[-1] == 0.5
    assert outcome.notes == []
    assert len(outcome.tables["pq index by layer"]) == len(outcome.history)
    assert outcome.history[0]["pq_index"] > 0.05
    assert outcome.metrics_before["loss"] == outcome.history[0]["loss"]


def test_the_first_round_cuts_what_the_trained_weights_say(task):
    """Layer counts by hand from the dense network of round 0, clipped to norm 1."""
    from secateurs.training.loop import fit

    model = task.fresh_model(0)
    outcome = sc.prune(model, "pq-index-sap", "sparsity=0.9", task, rounds=1, shortfall="keep")
    fit(model, task, replace(task.training, clip_norm=1.0))
    for name, mask in outcome.masks.items():
        weight = model.get_parameter(name).detach()
        full = torch.ones_like(mask)
        assert torch.equal(mask, smallest_removed(weight, full, count_of(weight, full)))


def test_one_shot_ranks_every_round_by_the_first_training(task):
    """Cumulative: what goes later was next in line after round 0."""
    model = task.fresh_model(0)
    options = {"policy": "os", "scope": "global", "rate": 0.5, "shortfall": "keep"}
    early = sc.prune(model, "pq-index-sap", "sparsity=0.99", task, rounds=1, **options)
    late = sc.prune(model, "pq-index-sap", "sparsity=0.99", task, rounds=3, **options)
    from secateurs.training.loop import fit

    fit(model, task, replace(task.training, clip_norm=1.0))
    dense = {n: model.get_parameter(n).detach().abs() for n in late.masks}
    assert late.masks.kept < early.masks.kept
    lowest = min(float(dense[n][m].min()) for n, m in late.masks.items())
    assert all(float(dense[n][~m].max()) <= lowest for n, m in late.masks.items())


def test_a_shortfall_is_cut_by_magnitude_and_said(task):
    model = task.fresh_model(0)
    cut = sc.prune(model, "pq-index-sap", "sparsity=0.8", task, rounds=2)
    assert cut.promise.kept
    assert len(cut.notes) == 1
    assert cut.notes[0].startswith("sap alone came to density 0.")
    kept = sc.prune(model, "pq-index-sap", "sparsity=0.8", task, rounds=2, shortfall="keep")
    assert not kept.promise.kept
    assert kept.masks.kept > cut.masks.kept
    assert kept.history[:2] == cut.history[:2]


def test_the_last_step_to_the_budget_takes_the_smallest_of_what_would_go(task):
    """The budget lies within the first round: of the survivors that SAP would cut, the least."""
    model = task.fresh_model(0)
    whole = sc.prune(model, "pq-index-sap", "sparsity=0.9", task, rounds=1, shortfall="keep")
    part = sc.prune(model, "pq-index-sap", "sparsity=0.05", task)
    assert part.promise.kept
    assert whole.masks.sparsity > 0.05
    for name, mask in part.masks.items():
        assert not bool((~mask & whole.masks[name]).any())


def test_it_stops_by_itself_when_a_round_would_remove_little(task):
    model = task.fresh_model(0)
    kept = sc.prune(model, "pq-index-sap", "sparsity=0.9", task, stop_below=0.5, shortfall="keep")
    assert len(kept.history) == 1
    assert kept.masks.sparsity == 0
    cut = sc.prune(model, "pq-index-sap", "sparsity=0.9", task, stop_below=0.5)
    assert cut.promise.kept, "the shortfall is to be cut by magnitude"
    assert len(cut.history) == 2
    assert len(cut.notes) == 1


def test_the_global_gradient_norm_is_clipped_by_default(task):
    model = task.fresh_model(0)
    loose = sc.prune(model, "pq-index-sap", "sparsity=0", task, clip_norm=None)
    tight = sc.prune(model, "pq-index-sap", "sparsity=0", task)
    plain = sc.prune(model, "lottery-ticket", "sparsity=0", task)
    assert loose.metrics_after == plain.metrics_after
    assert tight.metrics_after != plain.metrics_after


@pytest.mark.parametrize(
    "options",
    [
        *({"p": 0.0}, {"p": 1.0, "q": 1.0}, {"eta": -0.1}, {"gamma": 0.0}, {"beta": 1.0}),
        *({"rate": 1.0}, {"rounds": -1}, {"stop_below": 1.0}),
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=list(options)[-1]):
        SparsityInformedPruning(**options)
