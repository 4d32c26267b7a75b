"""Nobody's sample is anybody else's, none is lost, and small α makes clients unlike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.federated.partition import (
    dirichlet_partition,
    divide,
    few_per_class,
    labels_of,
    restricted,
)


def class_shares(labels, parts):
    return torch.stack([labels[part].bincount(minlength=10) / len(part) for part in parts])


@given(
    st.integers(1, 8),
    st.sampled_from([0.1, 0.5, 5.0, 1000.0]),
    st.integers(0, 5),
    st.integers(0, 99),
)
def test_shares_are_a_partition_of_the_data(clients, alpha, shots, seed):
    labels = torch.arange(400) % 7
    shares = divide(labels, clients, alpha, shots, seed)
    together = torch.cat([shares.public, *shares.clients])
    assert torch.equal(together.sort().values, torch.arange(400))
    assert all(len(part) >= 2 for part in shares.clients)
    assert torch.equal(labels[shares.public].bincount(minlength=7), torch.full((7,), shots))


def test_the_same_seed_gives_the_same_parts_and_another_seed_others():
    labels = torch.arange(300) % 10
    one, two, other = (dirichlet_partition(labels, 4, 0.5, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_spread_over_clients_is_the_one_of_the_dirichlet_distribution():
    """Var p_k = (1/K)(1 − 1/K) / (K α + 1), from 300 classes of 100 samples."""
    labels = torch.arange(300).repeat_interleave(100)
    for alpha in (0.3, 1.0, 10.0):
        parts = dirichlet_partition(labels, 5, alpha, 0)
        shares = torch.stack([labels[p].bincount(minlength=300) for p in parts]) / 100
        expected = 0.2 * 0.8 / (5 * alpha + 1)
        assert float(shares.double().var(0, unbiased=False).mean()) == pytest.approx(
            expected, rel=0.15
        )
        assert torch.allclose(shares.mean(0), torch.tensor(0.2))


def test_few_per_class_takes_all_where_there_are_fewer():
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    chosen = few_per_class(labels, 2, 0)
    assert labels[chosen].tolist().count(0) == 2
    assert {4, 5, 6} <= set(chosen.tolist())


def test_a_client_trains_on_its_own_samples_only(task):
    own = torch.tensor([3, 10, 11, 40])
    theirs = restricted(task, own)
    inputs = task.train.dataset.tensors[0]
    [(batch, _)] = list(theirs.evaluate)
    assert torch.equal(batch, inputs[own])
    assert theirs.train.batch_size == 4


@pytest.mark.parametrize(("samples", "batches"), [(8, 1), (9, 1), (10, 2), (17, 2)])
def test_a_batch_of_one_sample_is_left_out(task, samples, batches):
    assert len(restricted(task, torch.arange(samples)).train) == batches


def test_labels_are_read_in_the_order_of_the_data(task):
    assert torch.equal(labels_of(task), torch.arange(90) % 3)


def test_bad_input_is_refused(task):
    labels = torch.arange(20) % 2
    with pytest.raises(InputError, match="clients: got 0"):
        dirichlet_partition(labels, 0, 1.0, 0)
    with pytest.raises(InputError, match="clients: got 11; accepted: up to 10, for 20 samples"):
        dirichlet_partition(labels, 11, 1.0, 0)
    with pytest.raises(InputError, match=r"alpha: got 0\.0; accepted: above 0"):
        dirichlet_partition(labels, 2, 0.0, 0)
    with pytest.raises(InputError, match="one at which each of 10 clients gets 2 samples"):
        dirichlet_partition(labels, 10, 0.01, 0)
    images = torch.zeros(4, 2)
    dense = DataLoader(TensorDataset(images, images), 2)
    regression = sc.classification(torch.nn.Linear(2, 2), dense, dense)
    with pytest.raises(InputError, match=r"task.train: got targets of shape \(2, 2\)"):
        labels_of(regression)
