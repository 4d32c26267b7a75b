"""Gradients of removed weights: bounded buffers, their mean, the exchange."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateurs.errors import InputError
from secateurs.federated.growth import (
    blocks_of,
    drop_and_grow,
    inactive_gradients,
    largest_inactive,
    merge_growth,
)
from secateurs.federated.memory import PeakMemory, held_by
from secateurs.parts.masks import Masks


def indexed(pairs):
    places = torch.tensor(list(pairs), dtype=torch.int64)
    return places, torch.tensor(list(pairs.values()), dtype=torch.float64)


def test_the_exchange_of_the_hand_example():
    """A sends −4 at 2, B sends 3 at 3; of two clients the means are −2 and 1.5."""
    weight = torch.tensor([5.0, 1.0, 0.0, 0.0, 3.0])
    mask = weight != 0
    merged = merge_growth([indexed({2: -4.0}), indexed({3: 3.0})], [1, 1])
    assert torch.equal(merged[0], torch.tensor([2, 3]))
    assert torch.equal(merged[1], torch.tensor([-2.0, 1.5], dtype=torch.float64))
    new = drop_and_grow(weight, mask, 1, merged)
    assert new.tolist() == [True, False, True, False, True]
    assert torch.equal(weight * new, torch.tensor([5.0, 0.0, 0.0, 0.0, 3.0]))


def test_gradients_may_be_weighted_by_samples():
    _, values = merge_growth([indexed({2: -4.0}), indexed({2: 1.0, 7: 8.0})], [1, 3])
    assert values.tolist() == [-0.25, 6.0]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 99))
def test_an_exchange_keeps_the_number_and_never_brings_back_what_it_drops(count, sent, seed):
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 8, generator=draws)
    mask = torch.rand(5, 8, generator=draws) < 0.5
    weight *= mask
    free = (~mask).flatten().nonzero().flatten()
    chosen = free[torch.randperm(len(free), generator=draws)[:sent]].sort().values
    values = torch.randn(len(chosen), generator=draws)
    new = drop_and_grow(weight, mask, count, (chosen, values))
    exchanged = min(count, int(mask.sum()), len(chosen))
    assert new.sum() == mask.sum()
    assert int((new & ~mask).sum()) == exchanged
    active = weight.abs()[mask].sort().values
    assert torch.equal(weight.abs()[mask & ~new].sort().values, active[:exchanged])
    grown = (new & ~mask).flatten()[chosen]
    best = values.abs().sort(descending=True).values[:exchanged]
    assert torch.equal(values.abs()[grown].sort(descending=True).values, best)


def test_only_removed_weights_can_grow():
    with pytest.raises(InputError, match="gradients: got an index of a kept weight"):
        drop_and_grow(torch.ones(2), torch.tensor([True, False]), 1, indexed({0: 1.0}))


def test_ties_go_to_the_lower_index_and_zeros_are_left_out():
    gradient = torch.tensor([3.0, -2.0, 2.0, 2.0, 0.0])
    mask = torch.tensor([True, False, False, False, False])
    indices, values = largest_inactive(gradient, mask, 2)
    assert indices.tolist() == [1, 2]
    assert values.tolist() == [-2.0, 2.0]
    assert largest_inactive(gradient, mask, 9)[0].tolist() == [1, 2, 3]


def setting(layers=6):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(30, 30) for _ in range(layers))).double()
    names = [f"{i}.weight" for i in range(layers)]
    masks = Masks({n: net.get_parameter(n) > 0.1 for n in names})
    masks.apply_(dict(net.named_parameters()))
    batches = [torch.randn(4, 30, dtype=torch.float64) for _ in range(3)]
    return net, names, masks, batches


def loss(net, batch):
    return net(batch).square().mean()


@pytest.mark.parametrize("number", [1, 3])
def test_gradients_are_the_largest_of_the_dense_ones(number):
    with torch.random.fork_rng():
        net, names, masks, batches = setting()
    twin = copy.deepcopy(net)
    for batch in batches[:number]:
        loss(twin, batch).backward()
    counts = {names[1]: 7, names[4]: 3}
    found = inactive_gradients(net, loss, batches[:number], masks, counts)
    assert list(found) == list(counts)
    for name, (indices, values) in found.items():
        dense = twin.get_parameter(name).grad
        outside = dense.abs().masked_fill(masks[name], -1).flatten()
        expected = outside.argsort(descending=True, stable=True)[: counts[name]].sort().values
        assert torch.equal(indices, expected)
        assert torch.equal(values, dense.flatten()[expected])
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_client_holds_one_dense_gradient_at_a_time():
    """Of 24 layers: beyond the weights, a quarter of what their dense gradients take together."""
    with torch.random.fork_rng():
        net, names, masks, batches = setting(24)
    twin = copy.deepcopy(net)
    with PeakMemory(held_by(twin)) as dense:
        begin = dense.now
        loss(twin, batches[0]).backward()
    with PeakMemory(held_by(net)) as streamed:
        found = inactive_gradients(net, loss, batches[:1], masks, dict.fromkeys(names, 5))
    assert dense.now - begin == 24 * 30 * 31 * 8
    assert streamed.peak - begin < 0.35 * (dense.peak - begin)
    assert sum(v.numel() for _, v in found.values()) == 24 * 5


def test_a_layer_that_the_loss_does_not_reach_sends_nothing():
    with torch.random.fork_rng():
        net, names, masks, batches = setting()
    found = inactive_gradients(
        net, lambda n, b: n[:2](b).square().mean(), batches[:1], masks, {names[1]: 2, names[5]: 2}
    )
    assert len(found[names[1]][0]) == 2
    assert len(found[names[5]][0]) == 0


def test_blocks_follow_the_module_tree():
    resnet = [f"layer{i}.{j}.conv{k}.weight" for i in range(1, 5) for j in (0, 1) for k in (1, 2)]
    blocks = blocks_of([*resnet, "fc.weight"])
    assert [len(b) for b in blocks] == [4, 4, 4, 5]
    assert blocks[3][-1] == "fc.weight"
    features = [f"features.{i}.conv.weight" for i in (2, 4)]
    assert blocks_of([*features, "classifier.weight"]) == [
        ["features.2.conv.weight"],
        ["features.4.conv.weight", "classifier.weight"],
    ]
    assert blocks_of(["0.weight", "2.weight", "4.weight"]) == [
        ["0.weight"],
        ["2.weight", "4.weight"],
    ]
    assert blocks_of(["weight"]) == [["weight"]]
    assert blocks_of(["a.weight", "b.weight"]) == [["a.weight"], ["b.weight"]]
