"""The protocol that compressed sets are compared under: losses, groups, CutMix, what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.training.compression_benchmark import (
    RECIPE,
    Protocol,
    cut_mix,
    image_bytes,
    label_bytes,
)
from secateurs.training.distillation import soft_label_loss


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 3)
    loader = torch.utils.data.DataLoader(data, 4)
    return sc.classification(net, loader, loader)


def test_soft_labels_have_no_factor():
    student, teacher = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0, 2.0, 0]])
    plain = soft_label_loss(student, teacher, 20.0, scaled=False)
    assert float(plain) == pytest.approx(0.003387, abs=1e-6)
    assert float(soft_label_loss(student, teacher, 20.0)) == pytest.approx(1.3548, abs=1e-4)


def test_vectors_do_not_decay():
    model = net()
    optimizer = RECIPE.make_optimizer(model.parameters())
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for p in model.parameters():
        assert decay[id(p)] == (0.0 if p.ndim == 1 else 0.01)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adamr"])
def test_decay_of_matrices_alone_leaves_vectors_without_gradient(optimizer):
    settings = sc.TrainSettings(optimizer=optimizer, lr=0.1, weight_decay=0.5, decayed="matrices")
    model = net()
    made = settings.make_optimizer(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():  # of AdamR the decay is towards where it began
            p += 1
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    for p, old in zip(model.parameters(), before, strict=True):
        if p.ndim == 1:
            assert torch.equal(p, old + 1)
        elif optimizer in ("sgd", "adamw"):
            assert not torch.equal(p, old + 1)


def test_cut_mix_pastes_one_box_of_another_image():
    images = torch.arange(5.0)[:, None, None, None].expand(5, 2, 16, 12).clone()
    torch.manual_seed(0)
    shares = []
    for _ in range(400):
        made = cut_mix(images)
        changed = made != images
        assert torch.equal(changed[:, 0], changed[:, 1])
        for n in range(5):
            mixed = made[n, 0][changed[n, 0]]
            assert len(mixed.unique()) <= 1
            if len(mixed):
                rows, columns = changed[n, 0].nonzero().unbind(1)
                box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                assert int(box) == len(mixed), "a box, whole"
        shares.append(float(changed[:, 0].any(0).float().mean()))
    # the mean of 1 - lambda is 1/2; a half of sides is cut off where the centre is near a border
    assert 0.2 < sum(shares) / len(shares) < 0.5
    assert torch.equal(images, torch.arange(5.0)[:, None, None, None].expand(5, 2, 16, 12))


def test_a_record_for_every_set_and_seed(task):
    small = TensorDataset(torch.rand(6, 1, 8, 8), torch.arange(6) % 3)
    recipe = replace(RECIPE, epochs=2)
    hard = Protocol(batch_size=4, recipe=recipe)
    records = hard.compare(task, {"a": small, "b": small}, seeds=(0, 1))
    assert [(r["set"], r["seed"]) for r in records] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert records[0]["accuracy"] == records[2]["accuracy"]
    assert records[0]["loss"] == records[2]["loss"]
    assert {r["updates"] for r in records} == {4}
    assert (records[0]["image_bytes"], records[0]["label_bytes"]) == (6 * 64 * 4, 48)
    soft = replace(hard, labels="soft")
    told = soft.compare(task, {"a": small}, task.fresh_model(9))[0]
    assert (told["labels"], told["label_bytes"]) == ("soft", label_bytes(6, 3, 3))
    assert image_bytes(small) == 6 * 64 * 4


def test_soft_labels_do_not_look_at_labels_and_hard_ones_do_not_mix(task):
    teacher = task.fresh_model(1)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    data = TensorDataset(images, labels)
    model = task.fresh_model(2)
    soft = Protocol(labels="soft").task(task, data, teacher)
    one, two = (soft.batch_loss(model, (images, y)) for y in (labels, labels.flip(0)))
    assert torch.equal(one, two)
    hard = Protocol().task(task, data)
    batch, target = next(iter(hard.train))
    rows = [next(n for n in range(4) if torch.equal(image, images[n])) for image in batch]
    assert labels[rows].tolist() == target.tolist()


def test_bad_protocols_are_refused(task):
    small = TensorDataset(torch.rand(6, 1, 8, 8), torch.arange(6) % 3)
    with pytest.raises(InputError, match="mixing: got 'cutmix'"):
        Protocol(labels="hard", mixing="cutmix")
    with pytest.raises(InputError, match="mixing"):
        Protocol(mixing="None")
    with pytest.raises(InputError, match="temperature"):
        Protocol(temperature=0.0)
    with pytest.raises(InputError, match="batch_size"):
        Protocol(batch_size=0)
    with pytest.raises(InputError, match="teacher: got none"):
        Protocol(labels="soft").task(task, small)
    with pytest.raises(InputError, match="teacher: got a network"):
        Protocol().task(task, small, task.fresh_model(0))
    other = TensorDataset(torch.rand(5, 1, 8, 8), torch.arange(5) % 3)
    with pytest.raises(InputError, match="sets: got"):
        Protocol().compare(task, {"a": small, "b": other})
