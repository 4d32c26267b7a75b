"""Parameters without weight decay, in groups of their own."""

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.training.decay import spare_from_decay


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_what_is_spared_does_not_decay_and_all_else_is_trained_as_before(kind):
    torch.manual_seed(0)
    start = nn.Linear(3, 2)
    settings = sc.TrainSettings(optimizer=kind, lr=0.1, weight_decay=0.3)

    def trained(spare, decay):
        model = nn.Linear(3, 2)
        model.load_state_dict(start.state_dict())
        own = sc.TrainSettings(optimizer=kind, lr=0.1, weight_decay=decay)
        optimizer = own.make_optimizer(model.parameters())
        if spare:
            spare_from_decay(optimizer, [model.bias])
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward(inputs=[model.bias])
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        return model

    spared, plain = trained(True, 0.3), trained(False, 0.3)
    assert torch.equal(spared.weight, plain.weight)
    assert not torch.equal(spared.bias, plain.bias)
    assert settings.weight_decay == 0.3


def test_nothing_moves_where_nothing_decays():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spare_from_decay(optimizer, [model.bias])
    assert len(optimizer.param_groups) == 1


def test_the_loop_moves_the_rate_of_new_groups_too(tiny_task):
    """A cosine ends near 0 in every group."""
    task, seen = tiny_task(steps=4, weight_decay=0.1), []

    def attach(model, optimizer, _):
        spare_from_decay(optimizer, [model[0].bias])
        optimizer.register_step_pre_hook(
            lambda o, *_: seen.append([group["lr"] for group in o.param_groups])
        )
        return []

    sc.fit(task.fresh_model(0), task, task.training, attach=attach)
    assert [len(rates) for rates in seen] == [2] * 4
    assert all(one == two for one, two in seen)
    assert seen[0][0] == 0.1
    assert seen[-1][0] < 0.02
