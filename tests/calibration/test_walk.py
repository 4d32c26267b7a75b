"""Every block gets what it would get in the whole model, by position and by keyword."""

import threading

import pytest
import torch
from torch import nn

from secateurs.calibration.blocks import find_blocks
from secateurs.calibration.walk import walk
from secateurs.errors import InputError

torch.manual_seed(0)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x, *, scale):
        return x + self.linear(self.norm(x)) * scale


class Model(nn.Module):
    """Two stacks with something between them, keywords, and a head."""

    def __init__(self, width=6):
        super().__init__()
        self.first = nn.ModuleList(Residual(width) for _ in range(2))
        self.between = nn.Linear(width, width)
        self.second = nn.ModuleList(Residual(width) for _ in range(3))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        for layer in self.first:
            x = layer(x, scale=torch.tensor(0.5))
        x = torch.tanh(self.between(x))
        for layer in self.second:
            x = layer(x, scale=torch.tensor(2.0))
        return self.head(x)


def recorded(model, batches):
    """What every block gets in an ordinary forward."""
    found = {}
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: found.setdefault(name, []).append(args[0].clone()),
            with_kwargs=True,
        )
        for name, block in find_blocks(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return found


def test_blocks_get_what_a_plain_forward_gives_them():
    model, batches = Model().double().eval(), [torch.randn(3, 6).double() for _ in range(4)]
    wanted = recorded(model, batches)
    seen = {}
    for visit in walk(model, batches):
        seen[visit.name] = [call.args[0] for call in visit.calls]
        assert [set(c.kwargs) for c in visit.calls] == [{"scale"}] * 4
    assert list(seen) == list(find_blocks(model))
    for name, inputs in seen.items():
        for one, two in zip(inputs, wanted[name], strict=True):
            assert torch.equal(one, two)


def test_later_blocks_see_what_a_pruned_prefix_gives():
    model, batches = Model().double().eval(), [torch.randn(3, 6).double() for _ in range(2)]
    seen = {}
    for visit in walk(model, batches):
        seen[visit.name] = [call.args[0].clone() for call in visit.calls]
        with torch.no_grad():
            visit.block.linear.weight.mul_(torch.rand(6, 6) < 0.5)
    again = recorded(model, batches)
    for name, inputs in seen.items():
        for one, two in zip(inputs, again[name], strict=True):
            assert torch.equal(one, two)


def test_the_model_is_as_it_was_and_no_thread_is_left():
    model = Model().train()
    threads = threading.active_count()
    visits = walk(model, [torch.randn(3, 6)])
    next(visits)
    assert not model.training
    visits.close()
    assert model.training
    assert threading.active_count() == threads
    assert all("forward" not in vars(m) for m in model.modules())
    assert model(torch.randn(3, 6)).requires_grad


def test_an_error_of_the_model_comes_out_and_nothing_hangs():
    model = Model()
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="shape"):
        for _ in walk(model, [torch.randn(3, 6), torch.randn(3, 5)]):
            pass
    assert threading.active_count() == threads
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_block_that_runs_several_times_is_visited_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.ModuleList([Residual(6)])

        def forward(self, x):
            for _ in range(3):
                x = self.stack[0](x, scale=1.0)
            return x

    assert [v.name for v in walk(Twice(), [torch.randn(2, 6)])] == ["stack.0"]


def test_batches_that_miss_a_block_are_refused():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.ModuleList(Residual(6) for _ in range(2))

        def forward(self, x):
            return self.stack[0](x, scale=1.0)

    with pytest.raises(InputError, match=r"stack\.1"):
        list(walk(Skips(), [torch.randn(2, 6)]))
    with pytest.raises(InputError, match="batches"):
        list(walk(Model(), []))


def test_moments_of_a_block_are_those_of_all_batches():
    model, batches = Model().double().eval(), [torch.randn(3, 6).double() for _ in range(4)]
    for visit in walk(model, batches):
        found = visit.moments(visit.layers)[f"{visit.name}.linear"]
        fed = torch.cat([visit.block.norm(c.args[0]) for c in visit.calls])
        assert torch.allclose(found.hessian[0], 2 * fed.T @ fed / len(fed), atol=1e-12)
        squares = visit.moments(visit.layers, products=False)[f"{visit.name}.linear"]
        assert torch.allclose(squares.squares[0], fed.square().mean(0), atol=1e-12)
        with pytest.raises(InputError, match="products"):
            _ = squares.hessian
