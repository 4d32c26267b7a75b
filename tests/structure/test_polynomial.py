"""Costs of traced models as polynomials, against the structure's own count."""

import numpy as np
import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.structure.dimensions import Axis, concatenate
from secateurs.structure.polynomial import cost_polynomial, log_share, size_terms
from secateurs.zoo.convolutional import convnet
from secateurs.zoo.resnets import cifar_resnet


class Dense(nn.Module):
    """A concatenation, a depthwise convolution, groups."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.deep = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.three = nn.Conv2d(10, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.one(x).relu()
        x = torch.cat([x, self.two(x).relu()], 1)
        x = self.grouped(self.three(self.deep(x)).relu())
        return self.head(x.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


MAKERS = [
    lambda: convnet((1, 8, 8), 10, config=(6, "M", 8)),
    lambda: cifar_resnet((1, 8, 8), 10, 0.5, depth=8),
    Dense,
    mlp,
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_it_counts_what_the_structure_counts(make, kind):
    structure = sc.axes(make(), torch.randn(2, 1, 8, 8))
    groups = structure.free
    assert groups
    cost = cost_polynomial(structure, kind, [g.axis for g in groups])
    count = structure.parameters if kind == "params" else structure.macs
    rng = np.random.default_rng(0)
    for _ in range(5):
        widths = np.array([rng.integers(1, 2 * g.size) for g in groups])
        by_axis = {g.axis: int(n) for g, n in zip(groups, widths, strict=True)}
        assert cost.at(widths) == count(lambda a, w=by_axis: w.get(a, a.size))
    x = torch.tensor([float(g.size) for g in groups], dtype=torch.float64, requires_grad=True)
    cost(x).backward()
    for group, slope in zip(groups, x.grad.tolist(), strict=True):
        saved = group.parameters if kind == "params" else group.macs
        if cost.exponents[:, groups.index(group)].max() <= 1:
            assert slope == saved


def test_terms_of_sums_and_products():
    a, b, fixed = Axis(6), Axis(4), Axis(3)
    place = {a: 0, b: 1}
    assert size_terms((a, fixed, a), place) == {(0, 0): 3}
    assert size_terms((*concatenate([(a,), (b,), (fixed,)]), b), place) == {
        (0, 1): 1, (1, 1): 1, (1,): 3,
    }  # fmt: skip


def test_a_concatenation_counts_as_the_mean_of_its_logarithms():
    a, b = Axis(6), Axis(4)
    place = {a: 0, b: 1}
    both = concatenate([(a,), (b,)])
    assert log_share((*both, a), place) == pytest.approx({0: 1.6, 1: 0.4})
    for r, s in ((0.5, 0.5), (0.2, 0.9)):
        share = (6 * r + 4 * s) / 10
        assert 0.6 * np.log(r) + 0.4 * np.log(s) <= np.log(share) + 1e-12
    assert log_share((Axis(5),), place) == {}
