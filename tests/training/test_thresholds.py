"""Learned thresholds: the penalty's gradient, the hooks, the state, momenta after a cut."""

import pytest
import torch
from torch import nn

from secateurs.parts.posynomial import Posynomial
from secateurs.structure.surgery import slice_tensor
from secateurs.training.thresholds import (
    START,
    Gate,
    LearnedThresholds,
    Rule,
    shortened_state,
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


def rule(**fields):
    cost = Posynomial.of_terms({(0,): 10.0}, 1)
    return Rule(cost, 40.0, fields.pop("allowed", lambda step: 0.5), **fields)


def hung(model, gate=None, **fields):
    gate = gate or Gate("0", 4, (("0.weight", torch.arange(4)),), outputs=("0",))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return LearnedThresholds(optimizer, model, [gate], rule(**fields))


def test_the_penalty_of_the_card():
    """One layer, C_o = 4, a = 10, F_0 = 40, all d = 0, τ = 0.5, λ = 4, ρ = 0.5."""
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    hook = hung(model, rate=0.1)
    hook.thresholds[0].data.fill_(1.0)  # every s is 1
    penalty = hook.penalty()
    assert penalty.item() == pytest.approx(2.0)
    penalty.backward()
    assert hook.thresholds[0].grad.item() == pytest.approx(-2.0)
    hook.thresholds[0].grad = None
    hook.optimizer.step()
    assert hook.thresholds[0].item() == pytest.approx(1.2), "descent raises it"


def test_scores_do_not_see_the_scale_and_start_with_everything_on():
    model = network()
    hook = hung(model)
    [scores] = [g.scores(model, "l1") for g in hook.gates]
    rows = model[0].weight.detach().abs().sum(1)
    torch.testing.assert_close(scores, rows / rows.mean())
    assert hook.thresholds[0].item() == pytest.approx(START * scores.min().item())
    assert hook.mask(0).tolist() == [1, 1, 1, 1]
    with torch.no_grad():
        model[0].weight.mul_(10)
    torch.testing.assert_close(hook.gates[0].scores(model, "l1"), scores)
    squares = model[0].weight.detach().norm(dim=1)
    torch.testing.assert_close(hook.gates[0].scores(model, "l2"), squares / squares.mean())


def test_without_a_price_and_without_pressure_nothing_goes():
    model = network()
    x = torch.randn(5, 3, dtype=torch.float64)
    plain = model(x)
    hook = hung(model, strength=0.0)
    begun = hook.thresholds[0].item()
    torch.testing.assert_close(model(x), plain)
    for _ in range(3):
        hook.optimizer.step()
    assert hook.thresholds[0].item() == begun
    assert hook.mask(0).tolist() == [1, 1, 1, 1]


def test_a_unit_that_is_off_is_zero_with_its_bias_and_gets_no_gradient():
    model = network()
    hook = hung(model)
    scores = hook.gates[0].scores(model, "l1")
    hook.thresholds[0].data.copy_(scores.sort().values[1:3].mean())
    off = hook.mask(0) == 0
    assert off.sum() == 2
    seen = {}
    model[1].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    assert not seen["x"][:, off].any()
    assert not model[0].weight.grad[off].any()
    assert not model[0].bias.grad[off].any()
    assert hook.thresholds[0].grad != 0, "the task moves it, too"


def test_masks_at_what_reads_the_units_equal_those_at_what_makes_them():
    model, x = network(), torch.randn(5, 3, dtype=torch.float64)
    read = Gate("0", 4, (("0.weight", torch.arange(4)),), inputs=(("2", torch.arange(4)),))
    for gate in (None, read):
        hook = hung(model, gate)
        hook.thresholds[0].data.copy_(hook.gates[0].scores(model, "l1").median())
        result = model(x)
        hook.remove()
        if gate is None:
            first = result
    torch.testing.assert_close(result, first)  # relu(0) = 0
    assert not torch.allclose(model(x), first)


def test_units_are_reversible_until_they_are_frozen():
    model = network()
    hook = hung(model)
    hook.thresholds[0].data.fill_(5.0)
    assert hook.mask(0).sum() == 1
    hook.thresholds[0].data.fill_(0.1)
    assert hook.mask(0).sum() == 4


def test_thresholds_stay_above_zero_and_come_back_from_their_state():
    model = network()
    hook = hung(model, allowed=lambda step: 10.0, rate=100.0)
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    hook.optimizer.step()
    assert hook.thresholds[0].item() >= 0
    again = hung(network())
    again.load_state_dict(hook.state_dict())
    assert again.step == 1
    assert again.thresholds[0].item() == hook.thresholds[0].item()
    assert again.most == hook.most == 1.0


def test_the_allowed_share_counts_from_the_first_step():
    model = network()
    gate = Gate("0", 4, (("0.weight", torch.arange(4)),), outputs=("0",))
    asked = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = LearnedThresholds(
        optimizer, model, [gate], rule(allowed=lambda s: asked.append(s) or 1.0), first_step=7
    )
    optimizer.step()
    optimizer.step()
    assert asked == [7, 8]
    assert hook.step == 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_momenta_follow_the_units(kind):
    model = network()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **options)
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    cut = {"0.weight": {"0": [1, 3]}, "0.bias": {"0": [1, 3]}, "2.weight": {"1": [1, 3]}}
    for name, places in cut.items():
        slice_tensor(model.get_parameter(name), {int(p): i for p, i in places.items()})
    after = kind(model.parameters(), lr=0.01, **options)
    after.load_state_dict(shortened_state(state, model, cut))
    slot = "momentum_buffer" if kind is torch.optim.SGD else "exp_avg_sq"
    old = [state["state"][i][slot] for i in range(4)]
    new = [after.state[p][slot] for p in model.parameters()]
    assert torch.equal(new[0], old[0][[1, 3]])
    assert torch.equal(new[2], old[2][:, [1, 3]])
    assert torch.equal(new[3], old[3])
    assert old[0].shape == (4, 3), "the state that was given is left as it was"
