"""AdamR: Adam without decay, and with it a pull towards the weights it began with."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.training.adamr import AdamR


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def run(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 5, generator=generator)).square().sum().backward()
        optimizer.step()


def written_out(start, reference, gradients, rate, decay, l1=False):
    """The card's lines for a list of parameters, in float64."""
    theta = [t.double() for t in start]
    m, v = [torch.zeros_like(t) for t in theta], [torch.zeros_like(t) for t in theta]
    for t, grads in enumerate(gradients, start=1):
        m = [0.9 * a + 0.1 * g for a, g in zip(m, grads, strict=True)]
        v = [0.999 * a + 0.001 * g * g for a, g in zip(v, grads, strict=True)]
        hats = [a / (1 - 0.999**t) for a in v]
        bar = torch.cat([h.flatten() for h in hats]).mean().sqrt().item() or 1.0
        for i, before in enumerate(reference):
            away = theta[i] - before
            theta[i] = theta[i] - rate * decay / bar * (away.sign() if l1 else away)
            theta[i] = theta[i] - rate / (1 - 0.9**t) * m[i] / (hats[i].sqrt() + 1e-8)
    return theta


def test_without_decay_it_is_adam():
    one, two = network(), network()
    run(one, AdamR(one.parameters(), lr=0.01, weight_decay=0.0), 20)
    run(two, torch.optim.Adam(two.parameters(), lr=0.01), 20)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_the_first_step_of_the_card():
    theta = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = AdamR([theta], {theta: torch.tensor([1.0])}, lr=0.1, weight_decay=0.5)
    theta.grad = torch.ones_like(theta)
    optimizer.step()
    assert theta.item() == pytest.approx(3 - 0.1 * 0.5 * 2 - 0.1, abs=1e-8)


def test_without_gradients_the_difference_shrinks_by_a_constant_factor():
    theta = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    before = torch.tensor([1.0, 5.0], dtype=torch.float64)
    optimizer = AdamR([theta], {theta: before}, lr=0.1, weight_decay=0.3)
    away = theta.detach() - before
    for _ in range(5):
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        away = away * (1 - 0.1 * 0.3)
        assert torch.allclose(theta.detach() - before, away, rtol=1e-12)


@pytest.mark.parametrize("l1", [False, True])
def test_the_scale_is_of_all_groups_and_each_has_its_own_reference(l1):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start, reference = [draw(3, 2), draw(4)], [draw(3, 2), draw(4)]
    gradients = [[draw(3, 2), draw(4) * 10] for _ in range(6)]
    params = [nn.Parameter(t.clone()) for t in start]
    groups = [{"params": [params[1]]}, {"params": [params[0]]}]  # not in the list's order
    pairs = dict(zip(params, reference, strict=True))
    optimizer = AdamR(groups, pairs, lr=0.05, weight_decay=0.2, l1=l1)
    for grads in gradients:
        for parameter, gradient in zip(params, grads, strict=True):
            parameter.grad = gradient
        optimizer.step()
    expected = written_out(start, reference, gradients, 0.05, 0.2, l1)
    for parameter, value in zip(params, expected, strict=True):
        assert torch.allclose(parameter.detach(), value, rtol=1e-12, atol=1e-12)


def test_a_parameter_without_gradient_stays_and_does_not_count():
    still, moved = nn.Parameter(torch.ones(50)), nn.Parameter(torch.tensor([3.0]))
    reference = {still: torch.zeros(50), moved: torch.ones(1)}
    optimizer = AdamR([still, moved], reference, lr=0.1, weight_decay=0.5)
    moved.grad = torch.ones(1)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(50))
    assert moved.item() == pytest.approx(2.8, abs=1e-6)


def test_the_reference_is_a_copy_and_part_of_the_state():
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = AdamR(model.parameters(), lr=0.01, weight_decay=0.5)
    run(model, optimizer, 5)
    saved, halfway = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    run(model, optimizer, 5, first=5)
    other = AdamR(halfway.parameters(), lr=0.01, weight_decay=0.5)
    other.load_state_dict(saved)
    for parameter, before in zip(halfway.parameters(), start, strict=True):
        assert torch.equal(other.state[parameter]["reference"], before)
    run(halfway, other, 5, first=5)
    for a, b in zip(model.parameters(), halfway.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_loop_pulls_towards_the_weights_it_was_given(adamr_task):
    task = adamr_task
    start = task.fresh_model(0)
    moved = {}
    for decay in (0.0, 5.0):
        model = copy.deepcopy(start)
        settings = replace(task.training, optimizer="adamr", lr=0.01, weight_decay=decay)
        sc.fit(model, task, settings)
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        moved[decay] = sum(float((a - b).detach().square().sum()) for a, b in pairs)
    assert 0 < moved[5.0] < moved[0.0] / 2


@pytest.fixture
def adamr_task():
    from secateurs.zoo.catalog import make_task

    return make_task("zoo:mlp?hidden=16", "digits", training=sc.TrainSettings(steps=40))


def test_bad_input_is_refused():
    one, two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    with pytest.raises(InputError, match="reference: got none for a parameter of shape .3,."):
        AdamR([one, two], {one: torch.zeros(2)})
    with pytest.raises(InputError, match=r"reference: got shape \(4,\); accepted: shape \(2,\)"):
        AdamR([one], {one: torch.zeros(4)})
    with pytest.raises(InputError, match="reference: got 1 tensors that are not optimized"):
        AdamR([one], {one: torch.zeros(2), two: torch.zeros(3)})
    for name, value in (("lr", 0.0), ("weight_decay", -1.0), ("eps", -1.0), ("betas", (1.0, 0.9))):
        with pytest.raises(InputError, match=name):
            AdamR([one], **{name: value})
    one.grad = torch.zeros(2).to_sparse()
    with pytest.raises(InputError, match="gradient: got a sparse tensor"):
        AdamR([one]).step()
