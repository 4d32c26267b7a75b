"""Gradients of shared arrays: the array's scale must not matter, and once is enough."""

import copy

import pytest
import torch
from torch import nn

from secateurs.errors import InputError
from secateurs.parts.hashing import UniversalHash
from secateurs.structure.shared import SharedArray, place_of, share, shareable, shared_arrays
from secateurs.training.shared_gradients import GradientRescaler, rescale_gradients

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def shared(scale=1.0, grad_scale="v1", size=20):
    """ψ times `scale`, λ over `scale`: the same weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    values = torch.randn(size, dtype=torch.float64) * scale
    places, offset = [], 0
    for number, own in enumerate(shareable(net)):
        place = place_of(
            own, array=0, size=size, offset=offset, tiles=0, scale=(0.3 + number) / scale,
            u=UniversalHash.drawn(1), g=UniversalHash.drawn(number),
        )  # fmt: skip
        places.append((own, place))
        offset += place.count
    share(net, places, {0: SharedArray(values, grad_scale)})
    return net


def trained(net, steps=10, **fields):
    optimizer = torch.optim.SGD(net.parameters(), **{"lr": 0.05, "momentum": 0.9, **fields})
    rescale_gradients(net, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    return net


def weights(net):
    return torch.cat([net[0].weight.flatten(), net[2].weight.flatten()]).detach()


@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_training_does_not_depend_on_the_scale_of_the_array(scale, monkeypatch):
    monkeypatch.setattr("secateurs.training.shared_gradients.GUARD", 0.0)
    start = shared()
    torch.testing.assert_close(weights(shared(scale)), weights(start))
    torch.testing.assert_close(
        weights(trained(shared(scale))), weights(trained(start)), rtol=1e-9, atol=1e-9
    )
    assert not torch.allclose(weights(trained(shared())), weights(shared()), rtol=1e-2)
    plain = [weights(trained(shared(s, "none"))) for s in (1.0, scale)]
    assert not torch.allclose(*plain, rtol=1e-3, atol=1e-3)


def test_a_step_moves_weights_by_the_mean_of_their_gradients():
    """One layer, so one λ: −lr times the signed mean over each slot, apart from the 1e-3."""
    net = shared()
    net[2] = nn.Identity()
    before = net[0].weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rescale_gradients(net, optimizer)
    probe = net[0].weight.detach().requires_grad_()
    torch.tanh(X @ probe.T + net[0].bias).square().mean().backward()
    net(X).square().mean().backward()
    optimizer.step()
    slots, signs = net[0].addresses()
    for slot in slots.unique():
        ours = slots == slot
        mean = (probe.grad * signs)[ours].mean()
        moved = (net[0].weight.detach() - before)[ours] * signs[ours]
        torch.testing.assert_close(moved, -0.1 * mean.expand_as(moved), rtol=1e-3, atol=1e-12)


def test_twice_in_a_step_is_refused():
    net = shared()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    [first] = rescale_gradients(net, optimizer)
    net(X).square().mean().backward()
    optimizer.step()
    with pytest.raises(InputError, match="gradient: got rescaled twice; accepted: once"):
        first.act()
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        net(X).square().mean().backward()
        optimizer.step()
    rescale_gradients(net, optimizer)
    optimizer.zero_grad()
    net(X).square().mean().backward()
    with pytest.raises(InputError, match="rescaled twice"):
        optimizer.step()


def test_gradients_may_be_summed_over_several_passes():
    ones, twos = shared(), shared()
    for net, parts in ((ones, (X,)), (twos, (X[:6], X[6:]))):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rescale_gradients(net, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            for part in parts:
                (net(part).square().mean() / len(parts)).backward()
            optimizer.step()
    torch.testing.assert_close(weights(ones), weights(twos))


def test_where_there_is_nothing_to_rescale():
    plain = nn.Linear(3, 3)
    assert rescale_gradients(plain, torch.optim.SGD(plain.parameters(), lr=0.1)) == []
    net = shared(grad_scale="none")
    assert rescale_gradients(net, torch.optim.SGD(net.parameters(), lr=0.1)) == []
    net = shared()
    [array] = shared_arrays(net)
    GradientRescaler(array, [net[0], net[2]])()  # no gradient yet
    assert array.values.grad is None
    assert copy.deepcopy(net)[0].array_read.grad_scale == "v1"
