"""The expected student of ridge regression: in numbers, by simulation, and as a theorem."""

import pytest
import torch

from secateurs.analysis.ridge_distillation import expected_student, ridge, ridge_student
from secateurs.errors import InputError


def test_in_numbers():
    truth, one = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    for seen, alpha, share in ((100, 1.0, 0.45455), (10, 1.0, 0.25), (100, 0.0, 0.5)):
        found = expected_student(10 * one, seen * one, truth, 10.0, alpha)
        assert torch.allclose(found, share * truth, atol=1e-5)


def test_it_is_the_mean_over_the_noise():
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    kept, truth = seen[:, :12], torch.randn(4, generator=generator, dtype=torch.float64)
    noise = torch.randn(30, 20_000, generator=generator, dtype=torch.float64)
    targets = (seen.T @ truth)[:, None] + 0.5 * torch.cat([noise, -noise], 1)
    for alpha in (0.0, 0.4, 1.0):
        teacher = ridge(seen, targets, 3.0)
        students = ridge_student(kept, targets[:12], teacher, 3.0, alpha)
        expected = expected_student(kept @ kept.T, seen @ seen.T, truth, 3.0, alpha)
        assert torch.allclose(students.mean(1), expected, atol=1e-10), "noise of both signs"


def test_bias_shrinks_with_what_the_teacher_saw_and_variance_with_its_share():
    generator = torch.Generator().manual_seed(1)
    every = torch.randn(5, 80, generator=generator, dtype=torch.float64)
    truth = torch.randn(5, generator=generator, dtype=torch.float64)
    kept = every[:, :10]
    biases = []
    for count in (10, 20, 40, 80):
        seen = every[:, :count]
        found = expected_student(kept @ kept.T, seen @ seen.T, truth, 4.0, 1.0)
        biases.append(float((found - truth).square().sum()))
    assert biases == sorted(biases, reverse=True)
    noise = torch.randn(80, 5_000, generator=generator, dtype=torch.float64)
    targets = (every.T @ truth)[:, None] + 2.0 * noise
    teacher = ridge(every, targets, 4.0)
    spread = [
        float(ridge_student(kept, targets[:10], teacher, 4.0, a).var(1).sum()) for a in (0.0, 1.0)
    ]
    assert spread[1] < spread[0]


def test_bad_input_is_refused():
    one = torch.eye(2)
    with pytest.raises(InputError, match="penalty"):
        ridge(one, torch.ones(2), 0.0)
    with pytest.raises(InputError, match="alpha"):
        expected_student(one, one, torch.ones(2), 1.0, 1.5)
    with pytest.raises(InputError, match="alpha"):
        ridge_student(one, torch.ones(2), torch.ones(2), 1.0, -0.5)
    with pytest.raises(InputError, match="moment"):
        expected_student(torch.ones(2, 3), one, torch.ones(2), 1.0, 0.5)
