"""Bytes of tensors that are alive together, against sums by hand."""

import torch
from torch import nn

from secateurs.federated.memory import PeakMemory, held_by


def test_storages_count_while_somebody_holds_them():
    held = torch.zeros(10)
    with PeakMemory([held]) as memory:
        assert memory.now == 40
        first = torch.zeros(1000)
        view = first.view(10, 100)[2:]
        assert memory.now == 4040
        del first
        assert memory.now == 4040, "a view keeps its storage"
        del view
        assert memory.now == 40
        second = torch.zeros(500)
        assert memory.now == 2040
    assert memory.peak == 4040
    assert second.numel() == 500


def test_a_step_of_training_holds_weights_gradients_momenta_and_activations():
    net = nn.Sequential(nn.Linear(100, 50, bias=False), nn.ReLU(), nn.Linear(50, 10, bias=False))
    weights = 4 * (5000 + 500)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    with PeakMemory(held_by(net)) as memory:
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.zeros(7, 100)).sum().backward()
            optimizer.step()
    assert memory.now == 3 * weights
    activations = 4 * 7 * (100 + 50 + 10)
    assert 3 * weights <= memory.peak <= 4 * weights + 3 * activations


def test_counting_changes_no_bit():
    def trained(memory=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(3):
            net(torch.randn(5, 1, 6, 6)).square().sum().backward()
            optimizer.step()
        return net.state_dict()

    with torch.random.fork_rng():
        plain = trained()
        with PeakMemory() as memory:
            counted = trained()
    assert memory.peak > 0
    assert all(torch.equal(t, counted[n]) for n, t in plain.items())
