"""The soft-label loss in closed form, and a task that a teacher takes part in."""

import copy
import math

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.training.distillation import distilled, soft_label_loss

TEACHER = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64)
STUDENT = torch.zeros(2, 2, dtype=torch.float64)
FIRST = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
"""KL((3/4, 1/4) ‖ (1/2, 1/2)); of the second sample it is 0."""


@pytest.mark.parametrize(("reduction", "count"), [("sum", 1), ("samples", 2), ("elements", 4)])
def test_closed_form_and_its_reductions(reduction, count):
    loss = soft_label_loss(STUDENT, TEACHER, 1.0, reduction)
    assert float(loss) == pytest.approx(FIRST / count, abs=1e-14)


def test_the_temperature_divides_logits_and_its_square_multiplies():
    loss = soft_label_loss(STUDENT, 2 * TEACHER, 2.0, "sum")
    assert float(loss) == pytest.approx(4 * FIRST, abs=1e-13)


def test_its_gradient_is_the_difference_of_the_probabilities_times_the_temperature():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 7, generator=generator, dtype=torch.float64).requires_grad_(True)
    teacher = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    soft_label_loss(student, teacher, 3.0, "samples").backward()
    expected = 3 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 5
    assert torch.allclose(student.grad, expected.detach(), atol=1e-14)


def test_tokens_count_as_samples():
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    flat = soft_label_loss(student.flatten(0, 2), teacher.flatten(0, 2))
    assert torch.allclose(soft_label_loss(student, teacher), flat)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="temperature"):
        soft_label_loss(STUDENT, TEACHER, 0.0)
    with pytest.raises(InputError, match="logits"):
        soft_label_loss(STUDENT, TEACHER[:1])


@pytest.fixture
def task():
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, 16)
    return sc.classification(
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)), loader, loader
    )


def test_the_task_mixes_both_losses_and_measures_as_before(task):
    teacher, student = task.fresh_model(0), task.fresh_model(1).eval()
    taught = distilled(task, teacher, alpha=0.25, temperature=2.0, reduction="samples")
    batch = next(iter(task.train))
    soft = soft_label_loss(student(batch[0]), teacher.eval()(batch[0]), 2.0, "samples")
    expected = 0.75 * task.batch_loss(student, batch) + 0.25 * soft
    assert torch.allclose(taught.batch_loss(student, batch), expected)
    assert taught.measure(student) == task.measure(student)


def test_the_teacher_is_a_copy_that_does_not_learn(task):
    teacher = task.fresh_model(0)
    before = copy.deepcopy(teacher.state_dict())
    taught = distilled(task, teacher, alpha=1.0)
    assert teacher.training
    student = task.fresh_model(1)
    sc.fit(student, taught, sc.TrainSettings(steps=30, lr=1.0))
    for name, value in taught.teacher.state_dict().items():
        assert torch.equal(value, before[name])
    batch = next(iter(task.train))
    fresh, learned = task.fresh_model(1).eval(), student.eval()
    assert taught.batch_loss(learned, batch) < taught.batch_loss(fresh, batch)


def test_shares_outside_of_0_to_1_are_refused(task):
    with pytest.raises(InputError, match="alpha"):
        distilled(task, task.fresh_model(0), alpha=1.5)
