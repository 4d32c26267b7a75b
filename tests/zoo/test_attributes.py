"""Some classes, few samples, a second task: against the whole data set."""

import pytest
import torch

from secateurs.errors import InputError
from secateurs.zoo.attributes import CLOTHING, EVEN_ODD, turned
from secateurs.zoo.catalog import make_task
from secateurs.zoo.datasets import load_data

WHOLE = load_data("digits")


def test_some_classes_are_numbered_in_the_order_given():
    some = load_data("digits?classes=7,2,9")
    assert some.classes == 3
    for part, whole in ((some.train, WHOLE.train), (some.test, WHOLE.test)):
        for number, label in enumerate((7, 2, 9)):
            own = part.inputs[part.targets == number]
            assert torch.equal(own, whole.inputs[whole.targets == label])
        assert int(part.targets.max()) == 2


def test_the_first_samples_of_every_class_stay_in_training():
    few = load_data("digits?per_class=4")
    assert few.train.targets.bincount().tolist() == [4] * 10
    assert torch.equal(few.test.inputs, WHOLE.test.inputs)
    for label in range(10):
        whole = WHOLE.train.inputs[WHOLE.train.targets == label][:4]
        assert torch.equal(few.train.inputs[few.train.targets == label], whole)


def test_the_coarse_category_belongs_to_the_class():
    data = load_data("digits?with=coarse")
    assert (data.classes, data.heads) == (12, {"class": 10, "coarse": 2})
    labels, coarse = data.train.targets.T
    assert torch.equal(coarse, labels % 2)
    assert torch.equal(data.train.inputs, WHOLE.train.inputs)
    assert len(EVEN_ODD) == len(CLOTHING) == 10
    some = load_data("digits?with=coarse&classes=3,4,5")
    assert some.train.targets.unique(dim=0).tolist() == [[0, 1], [1, 0], [2, 1]]


def test_images_are_turned_by_what_the_second_label_says():
    data = load_data("digits?with=rotation")
    assert (data.classes, data.heads) == (14, {"class": 10, "rotation": 4})
    labels, turns = data.test.targets.T
    assert torch.equal(labels, WHOLE.test.targets)
    for place in range(20):
        expected = torch.rot90(WHOLE.test.inputs[place], int(turns[place]), (1, 2))
        assert torch.equal(data.test.inputs[place], expected)
    shares = turns.bincount() / len(turns)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.05, rtol=0)
    again = load_data("digits?with=rotation")
    assert torch.equal(again.train.inputs, data.train.inputs)


def test_turning_four_times_is_not_turning():
    images = torch.randn(4, 1, 3, 3)
    turns = torch.tensor([0, 1, 2, 3])
    assert torch.equal(turned(turned(images, turns), (4 - turns) % 4), images)


def test_a_task_of_two_heads_is_measured_by_head():
    task = make_task("zoo:convnet?width=0.25", "digits?with=rotation&limit=64", batch_size=16)
    assert task.train.batch_size == 16
    model = task.fresh_model(0).eval()
    inputs, targets = task.evaluate.dataset[:]
    with torch.no_grad():
        logits = model(inputs)
    found = task.measure(model)
    own = (logits[:, :10].argmax(1) == targets[:, 0]).float().mean()
    turn = (logits[:, 10:].argmax(1) == targets[:, 1]).float().mean()
    assert found["class accuracy"] == pytest.approx(float(own))
    assert found["rotation accuracy"] == pytest.approx(float(turn))
    assert found["accuracy"] == pytest.approx(float(own + turn) / 2)
    losses = task.measure_losses(model)
    expected = torch.nn.functional.cross_entropy(logits[:, 10:], targets[:, 1])
    assert losses["rotation"] == pytest.approx(float(expected), rel=1e-5)
    assert found["loss"] == pytest.approx(sum(losses.values()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("classes=5", "two or more different numbers from 0 to 9"),
        ("classes=5,5", "two or more"),
        ("classes=5,11", "two or more"),
        ("classes=5,x", "two or more"),
        ("with=colour", "did you mean 'coarse'"),
        ("per_class=0", "per_class"),
        ("per_class=1000", "at most 134"),
        ("classes=0,2&with=coarse", "one coarse category"),
        ("limit=5&classes=8,9", "a sample of every class"),
    ],
)
def test_what_cannot_be_had_is_refused(options, named):
    with pytest.raises(InputError, match=named):
        load_data(f"digits?{options}")
