"""What is compared: the input of the layer that runs last, or the teacher's top logits."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateurs.calibration.output_change import OutputChange, last_layer
from secateurs.errors import InputError


def call(model, inputs):
    return model(inputs)


class Backwards(nn.Module):
    """Layers that run in another order than they are registered in, and by keyword."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(4, 2), nn.Linear(3, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return SimpleNamespace(logits=self.head(input=self.drop(self.body(x).tanh())))


@pytest.fixture
def nets():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backwards(), Backwards()


@pytest.fixture
def inputs():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def test_the_last_layer_is_the_one_that_runs_last(nets, inputs):
    assert last_layer(nets[0], lambda net: net(inputs)) == "head"
    with pytest.raises(InputError, match="kind: got 'hidden'; accepted: topk_logits"):
        last_layer(nn.ReLU(), lambda net: net(inputs))


def test_hidden_states_are_compared_in_eval_mode(nets, inputs):
    teacher, other = nets
    change = OutputChange(teacher, inputs, call)
    hidden = [net.body(inputs).tanh() for net in nets]
    expected = (hidden[1] - hidden[0]).abs().mean().item()
    assert change(other) == pytest.approx(expected, rel=1e-6)
    assert teacher.training
    assert other.training
    assert not teacher.head._forward_pre_hooks
    assert not other.head._forward_pre_hooks


def test_logits_are_those_of_the_teachers_choice(nets, inputs):
    change = OutputChange(nets[0], inputs, call, "topk_logits", 1)
    logits = [net.eval()(inputs).logits for net in nets]
    top = logits[0].argmax(1, keepdim=True)
    expected = (logits[1].gather(1, top) - logits[0].gather(1, top)).square().mean().item()
    assert change(nets[1]) == pytest.approx(expected, rel=1e-6)
    everything = OutputChange(nets[0], inputs, call, "topk_logits", 50)
    assert everything(nets[1]) == pytest.approx(
        (logits[1] - logits[0]).square().mean().item(), rel=1e-6
    )
    with pytest.raises(InputError, match="k: got 0"):
        OutputChange(nets[0], inputs, call, "topk_logits", 0)
