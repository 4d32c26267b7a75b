"""Running statistics taken anew: plain averages over batches, and nothing else is touched."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateurs.analysis.recalibration import recalibrate
from secateurs.errors import InputError
from secateurs.training.order import batches_from

LABELS = torch.zeros(20, dtype=torch.long)


def points(seed=0):
    return 3 + 2 * torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))


def loader(size=5, shuffle=False):
    return DataLoader(TensorDataset(points(), LABELS), size, shuffle=shuffle)


def test_statistics_are_the_averages_of_those_of_the_batches():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.01))
    model[0].running_mean.fill_(100.0)
    recalibrate(model, loader(), 3)
    parts = points()[:15].reshape(3, 5, 4)
    torch.testing.assert_close(model[0].running_mean, parts.mean(1).mean(0))
    torch.testing.assert_close(model[0].running_var, parts.var(1).mean(0))
    assert int(model[0].num_batches_tracked) == 3


def test_all_batches_by_default_in_the_seeds_order():
    model = nn.Sequential(nn.BatchNorm1d(4))
    before = torch.get_rng_state()
    recalibrate(model, loader(8, shuffle=True), seed=2)
    assert torch.equal(before, torch.get_rng_state())
    seen = batches_from(loader(8, shuffle=True), 2, 0)
    means = torch.stack([next(seen)[0][0].mean(0) for _ in range(3)])
    torch.testing.assert_close(model[0].running_mean, means.mean(0))


def test_a_second_layer_sees_what_the_first_normalises():
    """Behind a normalised layer the mean is the bias, whatever it was trained to be."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    nn.init.constant_(model[0].bias, 7.0)
    recalibrate(model, loader(20))
    torch.testing.assert_close(model[1].running_mean, torch.full((4,), 7.0))


def test_modes_momenta_and_weights_are_left_as_they_were():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.2), nn.Dropout(0.9), nn.BatchNorm1d(4))
    model[0].eval()
    weights = copy.deepcopy(dict(model.named_parameters()))
    recalibrate(model, loader())
    assert [m.training for m in model.modules()] == [True, False, True, True]
    assert [model[0].momentum, model[2].momentum] == [0.2, 0.1]
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())
    assert bool((model[2].running_mean.abs() < 1e-3).all()), "dropout was on"


def test_the_model_is_given_back_when_a_batch_fails():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.2), nn.Linear(3, 3)).eval()
    with pytest.raises(RuntimeError):
        recalibrate(model, loader())
    assert not model[0].training
    assert model[0].momentum == 0.2


def test_dictionaries_and_layers_without_statistics():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.plain = nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x):
            return self.plain(self.norm(x))

    model = Net()
    data = [{"x": p, "labels": 0} for p in points()]
    recalibrate(model, DataLoader(data, 20))
    torch.testing.assert_close(model.norm.running_mean, points().mean(0))


def test_a_model_without_statistics_is_not_run():
    recalibrate(nn.Linear(999, 1), loader())
    with pytest.raises(InputError, match="batches: got 0"):
        recalibrate(nn.BatchNorm1d(4), loader(), 0)
