"""Gates on a model: hooks that come and go, what they see, how they vote."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.structure.switches import Switch, Target, channel_switches
from secateurs.training.gates import Gate, Gated, penalized, votes


def make():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def gated_net(**options):
    torch.manual_seed(0)
    model = make()
    return Gated(model, channel_switches(sc.axes(model, torch.randn(1, 4))), **options)


def open_all(gated, bias=20.0):
    for gate in gated.gates.children():
        nn.init.zeros_(gate.decide.weight)
        nn.init.constant_(gate.decide.bias, bias)


def split_task(samples=10, batch=4):
    """Inputs whose first feature is 1 for the first three samples and −1 for all others."""
    inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    inputs[:, 0] = torch.where(torch.arange(samples) < 3, 1.0, -1.0)
    loader = DataLoader(TensorDataset(inputs, torch.arange(samples) % 2), batch, shuffle=True)
    return sc.classification(make, loader, loader)


def test_open_gates_change_nothing_to_the_bit():
    gated = gated_net()
    open_all(gated)
    x = torch.randn(7, 4)
    with_gates = gated(x)
    assert torch.equal(with_gates, gated.ungated()(x))


def test_all_units_start_open_with_a_gradient():
    gated = gated_net(open_bias=1.5)
    gated(torch.randn(32, 4))
    means = gated.means()
    assert all(bool((m == 1).all()) for m in means.values())
    assert all(0.5 < q.min().item() < 1 for q in gated.probabilities().values())
    sum(m.sum() for m in means.values()).backward()
    assert all(bool(g.decide.bias.grad.any()) for g in gated.gates.children())


def test_a_sample_is_switched_by_its_own_input():
    gated = gated_net(hidden=2)
    gate = gated.gates[0]
    with torch.no_grad():
        gate.squeeze.weight.zero_()
        gate.squeeze.weight[0, 0] = gate.squeeze.weight[1, 0] = 1.0
        gate.squeeze.weight[1, 0] = -1.0
        gate.squeeze.bias.zero_()
        gate.decide.weight.copy_(torch.tensor([[9.0, -9.0]]).expand(6, 2))
        gate.decide.bias.zero_()
    x = torch.ones(3, 4) * torch.tensor([[1.0], [-1.0], [1.0]])
    gated(x)
    assert gate.gates[:, 0].tolist() == [1, 0, 1]
    torch.testing.assert_close(gated.means()["0"], torch.full((6,), 2 / 3))


def test_inputs_are_averaged_over_their_positions():
    for place, shape in ((1, (2, 3, 4, 5)), (2, (2, 7, 3)), (1, (2, 3))):
        switch = Switch("s", 2, "", place, 3, (Target("", "input", 1, (0, 1)),))
        gate, x = Gate(switch, 8, 1.5, 0.0), torch.randn(shape)
        others = [p for p in range(1, x.ndim) if p != place]
        pooled = x.mean(others) if others else x
        gate(x)
        wanted = torch.sigmoid(gate.decide(gate.squeeze(pooled).relu()))
        torch.testing.assert_close(gate.probabilities, wanted)


def test_noise_is_of_training_alone_and_drawn_from_the_seed():
    gated = gated_net(noise=3.0)
    x = torch.randn(64, 4)

    def means(seed):
        torch.manual_seed(seed)
        gated(x)
        return torch.cat(list(gated.means().values()))

    assert not torch.equal(means(0), means(1))
    assert torch.equal(means(0), means(0))
    gated.eval()
    assert torch.equal(means(0), means(1))


def test_decisions_do_not_depend_on_the_rest_of_the_batch():
    gated = gated_net().eval()
    x = torch.randn(8, 4)
    torch.testing.assert_close(gated(x)[2:5], gated(x[2:5]))


def test_the_same_seed_gives_the_same_gates_and_leaves_the_generator():
    before = torch.get_rng_state()
    one, two, other = (
        Gated(model, channel_switches(sc.axes(model, torch.randn(1, 4))), seed=seed)
        for model, seed in ((make(), 3), (make(), 3), (make(), 4))
    )
    assert not torch.equal(before, torch.get_rng_state())  # make() drew, so this can fail
    first, second, third = (g.gates.state_dict() for g in (one, two, other))
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert any(not torch.equal(t, third[n]) for n, t in first.items())
    state = torch.get_rng_state()
    model = one.ungated()
    gated = Gated(model, channel_switches(sc.axes(model, torch.ones(1, 4))))
    assert torch.equal(state, torch.get_rng_state())
    assert len(gated.names) == 2


def test_gates_come_off_without_a_trace():
    gated = gated_net()
    model = gated.ungated()
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert set(model.state_dict()) == set(make().state_dict())


def test_a_vote_counts_every_sample_once():
    task, gated = split_task(), gated_net(hidden=1)
    for gate, weight in zip(gated.gates.children(), (9.0, 0.0), strict=True):
        with torch.no_grad():
            gate.squeeze.weight.zero_()
            gate.squeeze.weight[0, 0] = weight
            gate.squeeze.bias.zero_()
            gate.decide.weight.fill_(1.0)
            gate.decide.bias.fill_(-1.0)
    gated.train()
    vote = votes(gated, task, 0)
    assert gated.training
    assert vote.samples == 10
    assert vote.open["0"].tolist() == pytest.approx([0.3] * 6)
    assert vote.open["2"].tolist() == [0.0] * 5
    assert vote.defect == pytest.approx(6 * 0.21 / 11)
    copied = copy.copy(vote)
    assert all(torch.equal(o, copied.order[n]) for n, o in vote.order.items())


def test_ties_in_a_vote_go_by_the_probability():
    gated = gated_net()
    open_all(gated)
    with torch.no_grad():
        gated.gates[0].decide.bias.copy_(torch.tensor([1.0, 3.0, 2.0, 6.0, 4.0, -1.0]))
    vote = votes(gated, split_task(), 0)
    assert vote.order["0"].argsort().tolist() == [5, 0, 2, 1, 4, 3]
    assert vote.open["0"].tolist() == [1, 1, 1, 1, 1, 0]


def test_means_before_a_forward_pass_are_refused():
    with pytest.raises(InputError, match="gates that have not seen a sample"):
        gated_net().means()


def test_a_block_that_is_called_otherwise_is_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x):
            return self.block(input=x)

    target = Target("block", "output", 0, (0,))
    gated = Gated(Named(), [Switch("block", 1, "block", 1, 4, (target,))])
    with pytest.raises(
        InputError, match=r"model: got block, called with 0 arguments and \['input'"
    ):
        gated(torch.randn(2, 4))


def test_a_penalized_task_trains_with_the_term_and_is_measured_without_it():
    task, model = split_task(), make()
    batch = next(iter(task.train))
    pressed = penalized(task, lambda: torch.tensor(3.0))
    more = pressed.batch_loss(model, batch) - task.batch_loss(model, batch)
    assert more.item() == pytest.approx(3.0)
    assert pressed.measure(model) == task.measure(model)
    with pytest.raises(InputError, match="penalty: got 3.0"):
        penalized(task, 3.0)
