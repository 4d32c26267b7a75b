"""Statistics as vectors, and their averages against closed forms."""

import pytest
import torch
from torch import nn

from secateurs.errors import InputError
from secateurs.federated.statistics import (
    aggregate_statistics,
    set_statistics,
    statistics_of,
    tracked_norms,
)


def reply(mean, variance):
    return {
        "means": torch.tensor([[mean]], dtype=torch.float64),
        "variances": torch.tensor([[variance]], dtype=torch.float64),
    }


def test_statistics_come_back(net):
    assert list(tracked_norms(net)) == ["1", "4"]
    means, variances = torch.arange(7.0), torch.arange(7.0) + 1
    set_statistics(net, means, variances)
    assert torch.equal(net[1].running_mean, means[:3])
    assert torch.equal(net[4].running_var, variances[3:])
    again = statistics_of(net)
    assert torch.equal(again[0], means)
    assert torch.equal(again[1], variances)


def test_the_mean_of_the_variances_leaves_the_spread_of_the_means_out():
    replies = [reply(0.0, 1.0), reply(2.0, 1.0)]
    mean, variance = aggregate_statistics(replies, [5, 5])
    assert (mean.item(), variance.item()) == (1.0, 1.0)
    mean, variance = aggregate_statistics(replies, [5, 5], pooled=True)
    assert (mean.item(), variance.item()) == (1.0, 2.0)


def test_pooled_statistics_are_those_of_all_samples_together():
    draws = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=draws, dtype=torch.float64) * n for n in (3, 8, 21)]
    replies = [reply(p.mean().item(), p.var(unbiased=False).item()) for p in parts]
    mean, variance = aggregate_statistics(replies, [len(p) for p in parts], pooled=True)
    whole = torch.cat(parts)
    assert mean.item() == pytest.approx(whole.mean().item(), rel=1e-12)
    assert variance.item() == pytest.approx(whole.var(unbiased=False).item(), rel=1e-12)


def test_clients_with_other_norms_are_refused(net):
    odd = {"means": torch.zeros(1, 3), "variances": torch.zeros(1, 3)}
    with pytest.raises(InputError, match="statistics: got shapes .* the same norms"):
        aggregate_statistics([reply(0.0, 1.0), odd], [1, 1])
    with pytest.raises(InputError, match="model: got no running statistics"):
        statistics_of(nn.Linear(2, 2))
    with pytest.raises(InputError, match="statistics: got 9 channels; accepted: 7"):
        set_statistics(net, torch.zeros(9), torch.zeros(9))
