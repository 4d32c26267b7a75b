"""Features of training samples, from the inputs of a network's last linear layer."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.selection.features import read_rows, training_embeddings


class Tokens(nn.Module):
    """Its last layer sees several tokens of every sample."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(x).mean(1)


def task_of(inputs):
    data = TensorDataset(inputs, torch.arange(len(inputs)) % 2)
    loader = DataLoader(data, 4, shuffle=True, drop_last=True)
    return sc.classification(Tokens, loader, loader)


def test_rows_stand_in_their_order_and_tokens_are_averaged():
    inputs = torch.randn(10, 5, 3, generator=torch.Generator().manual_seed(0))
    model = Tokens().train()
    source = training_embeddings(task_of(inputs), model)
    assert model.training
    assert source.rows == 10, "the last batch too"
    assert source.narrow(0).labels.tolist() == [n % 2 for n in range(10)]
    made = torch.from_numpy(next(source.shards[0].blocks(10)))
    assert torch.allclose(made, inputs.mean(1), atol=1e-6)
    assert torch.equal(source.samples[3][0], inputs[3])


def test_labels_alone_ask_nobody():
    source = training_embeddings(task_of(torch.zeros(6, 5, 3)), None)
    assert (source.rows, source.width) == (6, 0)
    assert source.narrow(0).ids.tolist() == list(range(6))


def test_bad_input_is_refused():
    task = task_of(torch.zeros(6, 5, 3))
    with pytest.raises(InputError, match="model: got one without linear layers"):
        training_embeddings(task, nn.Conv1d(5, 2, 3))
    dense = DataLoader(TensorDataset(torch.zeros(4, 5, 3), torch.zeros(4, 2)), 2)
    with pytest.raises(InputError, match="labels: got targets of another kind"):
        training_embeddings(replace(task, train=dense), None)


def test_outputs_are_taken_as_they_come():
    inputs = torch.randn(10, 5, 3, generator=torch.Generator().manual_seed(0))
    task = task_of(inputs)
    found = read_rows(task, nn.Flatten(), "outputs")
    assert torch.equal(found["vectors"], inputs.flatten(1))
    assert found["labels"].tolist() == [n % 2 for n in range(10)]
    with pytest.raises(InputError, match=r"outputs of shape \(4, 5, 3\) of 4 samples"):
        read_rows(task, nn.Identity(), "outputs")
    with pytest.raises(InputError, match="outputs of shape tuple of 4 samples"):
        read_rows(task, Twice(), "outputs")


class Twice(nn.Module):
    """Gives a pair, and has a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 2)

    def forward(self, x):
        return x, x


def test_a_last_layer_that_is_not_called_has_no_inputs():
    with pytest.raises(InputError, match="does not call its last linear layer"):
        read_rows(task_of(torch.zeros(6, 5, 3)), Twice())


def test_targets_that_are_no_classes_give_no_labels():
    task = task_of(torch.zeros(6, 5, 3))
    dense = DataLoader(TensorDataset(torch.zeros(4, 5, 3), torch.zeros(4, 2)), 2)
    found = read_rows(replace(task, train=dense), Tokens())
    assert set(found) == {"vectors"}
    assert found["vectors"].shape == (4, 3)
