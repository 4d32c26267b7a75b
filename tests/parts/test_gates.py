"""Gates: straight through, votes of a batch, and the terms that shape them, in closed form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from secateurs.errors import InputError
from secateurs.parts.gates import batch_means, binary_gate, over_budget, polarization

D = torch.float64


def test_a_gate_is_hard_forward_and_straight_through_backward():
    """q = 0.3 and an upstream gradient of 2: g = 0, ∂L/∂q = 2, ∂L/∂z = 2 q (1 − q)."""
    z = torch.logit(tensor([0.3, 0.5, 0.9], dtype=D)).requires_grad_()
    q = torch.sigmoid(z)
    q.retain_grad()
    gates = binary_gate(q)
    assert gates.tolist() == [0.0, 1.0, 1.0]
    (2 * gates).sum().backward()
    assert q.grad.tolist() == [2.0, 2.0, 2.0]
    torch.testing.assert_close(z.grad, tensor([0.42, 0.5, 0.18], dtype=D))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30))
def test_a_gate_is_zero_or_one_to_the_bit(values):
    assert set(binary_gate(tensor(values)).tolist()) <= {0.0, 1.0}


def test_polarization_is_zero_where_all_agree_and_largest_at_a_split_vote():
    gates = tensor([[1, 1, 1], [1, 1, 1], [0, 1, 1], [0, 0, 1]], dtype=D)
    means = batch_means(gates)
    assert [float(polarization(means[u : u + 1])) for u in range(3)] == [0.25, 0.1875, 0.0]
    assert float(polarization(means)) == pytest.approx(0.1458333)


def test_polarization_makes_majorities_grow():
    means = tensor([0.2, 0.5, 0.9, 1.0], dtype=D, requires_grad=True)
    polarization(means).backward()
    torch.testing.assert_close(means.grad, (1 - 2 * means.detach()) / 4)
    assert means.grad[1] == 0


def test_what_is_over_the_budget_costs_and_nothing_else():
    shares = tensor([0.5, 0.3, 0.2], dtype=D)
    means = tensor([1.0, 0.5, 0.0], dtype=D, requires_grad=True)
    over = over_budget((shares * means).sum(), 0.5)
    over.backward()
    assert over.item() == pytest.approx(0.15)
    assert means.grad.tolist() == shares.tolist()
    means.grad = None
    under = over_budget((shares * means).sum(), 0.7)
    under.backward()
    assert float(under) == 0
    assert means.grad.tolist() == [0, 0, 0]


def test_halves_that_disagree_are_a_split_vote():
    gates = torch.cat([torch.ones(3, 2), torch.zeros(3, 2)])
    assert float(polarization(batch_means(gates))) == 0.25
    assert float(polarization(batch_means(gates[:3]))) == 0


def test_processes_vote_together(monkeypatch):
    """Here all gates are open, in the other process all closed."""
    import torch.distributed.nn.functional as functional

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(functional, "all_reduce", lambda means: means + 0.0)
    assert batch_means(torch.ones(4, 3)).tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 3, 4)])
def test_gates_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match="gates: got shape"):
        batch_means(torch.ones(shape))


def vote_of_rank(rank, folder):
    """One half of a batch in a process of its own: the loss and its averaged gradient."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    logits = torch.tensor([[-0.5], [0.3], [0.8], [1.2]])[2 * rank : 2 * rank + 2].requires_grad_()
    weight = torch.ones((), requires_grad=True)
    loss = polarization(batch_means(binary_gate(torch.sigmoid(weight * logits))))
    loss.backward()
    torch.distributed.all_reduce(weight.grad)  # as data parallelism does, then / 2
    torch.save({"loss": loss.detach(), "grad": weight.grad / 2}, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_vote_as_one(tmp_path):
    torch.multiprocessing.spawn(vote_of_rank, (str(tmp_path),), nprocs=2)
    logits, weight = torch.tensor([[-0.5], [0.3], [0.8], [1.2]]), torch.ones(()).requires_grad_()
    loss = polarization(batch_means(binary_gate(torch.sigmoid(weight * logits))))
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / str(rank))
        torch.testing.assert_close(found["loss"], loss.detach())
        torch.testing.assert_close(found["grad"], weight.grad)
