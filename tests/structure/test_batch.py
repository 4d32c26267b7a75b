"""A traced graph takes other batches where it computes the same on them, and only there."""

import pytest
import torch
from torch import nn

from secateurs.structure.batch import free_batch
from secateurs.structure.rewrite import current_tensors, rewritten
from secateurs.structure.trace import trace


class Counting(nn.Module):
    """Uses the number of its samples in a way of its own."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(6, 8), use

    def forward(self, x):
        return self.use(self.layer(x))


def opened(use, samples=2):
    """The graph of a model traced on some samples, and whether it was opened to others."""
    torch.manual_seed(0)
    model = Counting(use).eval()
    found = trace(model, torch.randn(samples, 6))
    graph = rewritten(found, lambda axis: axis.size, current_tensors(found))
    return model, graph, free_batch(found, graph)


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y.relu(),
        lambda y: y.reshape(len(y), 2, 4),
        lambda y: y.reshape(2 * len(y), 4),
    ],
)
def test_sizes_that_are_multiples_of_the_batch_follow_it(use):
    model, graph, free = opened(use)
    assert free
    x = torch.randn(5, 6)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y * (1 / len(y)),  # a number that is no integer
        lambda y: y * torch.tensor(float(len(y))),  # a constant of the same shape
        lambda y: y.flatten()[len(y) + 1 :],  # more than a multiple
    ],
)
def test_numbers_that_follow_the_batch_in_another_way_fix_it(use):
    model, graph, free = opened(use)
    assert not free
    x = torch.randn(2, 6)
    torch.testing.assert_close(graph(x), model(x))
