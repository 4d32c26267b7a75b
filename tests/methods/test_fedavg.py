"""FedAvg on a server's mask; what all methods must do is elsewhere."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("flwr")

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.clients.fedavg import FedAvg

QUICK = {"clients": 3, "rounds": 2, "pretrain_steps": 10}


@pytest.fixture
def task(normalized_task):
    return replace(normalized_task, training=sc.TrainSettings(steps=8, lr=0.1))


@pytest.mark.parametrize("saliency", ["magnitude", "snip", "synflow"])
def test_any_one_shot_method_finds_the_servers_mask(task, saliency):
    method = FedAvg(**QUICK, pruner="one-shot", pruner_options={"saliency": saliency})
    outcome = sc.prune(task.fresh_model(0), method, "density=0.2", task)
    assert outcome.promise.kept
    assert [row["stage"] for row in outcome.tables["messages"]] == ["hello", "train", "all"]


def test_a_random_mask_differs_from_that_of_magnitude(task):
    random = sc.prune(task.fresh_model(0), FedAvg(**QUICK), "density=0.2", task)
    largest = FedAvg(**QUICK, pruner="one-shot")
    chosen = sc.prune(task.fresh_model(0), largest, "density=0.2", task)
    assert any(not torch.equal(m, chosen.masks[n]) for n, m in random.masks.items())


def test_what_is_no_one_shot_method_is_refused(task):
    with pytest.raises(InputError, match="pruner: got 'gmp'; accepted: a one-shot method"):
        sc.prune(task.fresh_model(0), FedAvg(pruner="gmp"), "density=0.2", task)
    odd = FedAvg(pruner_options={"saliency": "snip"})
    with pytest.raises(InputError, match="option: got 'saliency'"):
        sc.prune(task.fresh_model(0), odd, "density=0.2", task)
