"""Scales of norms: which there are, and the pull on them against autograd."""

import pytest
import torch
from torch import nn

from secateurs.errors import InputError
from secateurs.parts.scales import add_l1_subgradient_, add_pull_, norm_scales


def test_the_scales_of_all_norms_are_found_once():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4),
        nn.Sequential(nn.LayerNorm(5), shared), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    scales = norm_scales(model)
    assert list(scales) == ["1.weight", "3.weight", "4.0.weight"]
    assert scales["1.weight"] is shared.weight
    assert list(norm_scales(nn.BatchNorm1d(3))) == ["weight"]


@pytest.mark.parametrize("norms", [[], [nn.BatchNorm1d(3, affine=False), nn.InstanceNorm1d(3)]])
def test_a_model_without_scales_is_refused(norms):
    with pytest.raises(InputError, match="model: got Sequential without scales; accepted: a model"):
        norm_scales(nn.Sequential(nn.Linear(3, 3), *norms))


def test_the_pull_is_the_subgradient_of_the_sum_of_magnitudes():
    """Against autograd on loss + λ Σ|γ|, and 0 at γ = 0."""
    torch.manual_seed(0)
    strength = 0.3
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.LayerNorm(5)).double()
    with torch.no_grad():
        for norm in model[1:]:
            norm.weight.copy_(torch.tensor([1.5, -0.2, 0.0, -3.0, 1e-9]))
    scales, inputs = norm_scales(model), torch.randn(8, 6, dtype=torch.float64)
    loss = model(inputs).square().mean()
    whole = loss + strength * sum(scale.abs().sum() for scale in scales.values())
    wanted = torch.autograd.grad(whole, list(model.parameters()), retain_graph=True)
    plain = torch.autograd.grad(loss, list(scales.values()), retain_graph=True)
    loss.backward()
    add_l1_subgradient_(scales, strength)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-15)
    for scale, gradient in zip(scales.values(), plain, strict=True):
        assert scale.grad[2] == gradient[2]


def test_scales_without_a_gradient_are_pulled_unless_they_are_fixed():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).requires_grad_(False))
    add_l1_subgradient_(norm_scales(model), 0.25)
    assert model[0].weight.grad.tolist() == [0.25, 0.25]
    assert model[1].weight.grad is None


def pulled(values, doomed, kind, strength=0.1, rate=1.0):
    scale = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    masks = {"weight": torch.tensor(doomed, dtype=torch.bool)}
    add_pull_({"weight": scale}, strength, doomed=masks, kind=kind, rate=rate)
    return scale.grad.tolist()


@pytest.mark.parametrize(
    ("kind", "doomed", "wanted"),
    [
        ("l1", [1, 1, 1], [0.1, -0.1, 0]),
        ("l1", [1, 0, 1], [0.1, 0, 0]),
        ("l2", [1, 1, 1], [0.05, -0.02, 0]),
        ("l2", [0, 1, 0], [0, -0.02, 0]),
        ("smooth_l1", [1, 1, 1], [0.1, -0.1, 0]),
        ("smooth_l1", [0, 1, 1], [0, -0.1, 0]),
    ],
)
def test_the_pull_is_at_the_doomed_alone(kind, doomed, wanted):
    assert pulled([0.5, -0.2, 0.0], doomed, kind) == pytest.approx(wanted, abs=1e-15)


def test_a_smooth_pull_fades_near_zero():
    assert pulled([0.05, -0.05, 0.2], [1, 1, 1], "smooth_l1") == pytest.approx([0.005, -0.005, 0.1])
    assert pulled([0.05], [1], "smooth_l1", rate=0.1) == pytest.approx([0.1])


def test_scales_that_are_not_listed_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3))
    add_pull_(norm_scales(model), 0.5, doomed={"1.weight": torch.tensor([True, False, True])})
    assert model[0].weight.grad is None
    assert model[1].weight.grad.tolist() == [0.5, 0.0, 0.5]


def test_a_pull_of_everything_is_that_of_network_slimming():
    one, two = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    add_l1_subgradient_(norm_scales(one), 0.3)
    add_pull_(norm_scales(two), 0.3, doomed={"weight": torch.ones(4, dtype=torch.bool)})
    assert torch.equal(one.weight.grad, two.weight.grad)


def test_it_takes_two_thousand_steps_from_one_to_zero():
    """Rate 0.1, strength 5e-4, momentum 0.9: 5e-4 a step once the momentum is there."""
    norm = nn.BatchNorm1d(1).double()
    optimizer = torch.optim.SGD([norm.weight], lr=0.1, momentum=0.9)
    steps = 0
    while float(norm.weight) > 0:
        norm.weight.grad = torch.zeros_like(norm.weight)
        add_pull_(norm_scales(norm), 5e-4)
        optimizer.step()
        steps += 1
    assert 1990 <= steps <= 2020


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"doomed": {"weight": torch.ones(2, dtype=torch.bool)}}, "doomed weight: got shape"),
        ({"doomed": {"0.weight": torch.ones(3, dtype=torch.bool)}}, "doomed: got '0.weight'"),
        ({"kind": "l0"}, "kind: got 'l0'"),
        ({"kind": "smooth_l1"}, "rate: got None"),
    ],
)
def test_a_pull_that_cannot_be_is_refused(fields, named):
    norm = nn.BatchNorm1d(3)
    with pytest.raises(InputError, match=named):
        add_pull_(norm_scales(norm), 0.1, **fields)
    assert norm.weight.grad is None
