"""Calibration inputs: from a loader, and noise."""

import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from secateurs.errors import InputError
from secateurs.training.batches import (
    calibration_inputs,
    joined,
    labelled_batches,
    natural_noise,
    noise_like,
)
from secateurs.zoo.catalog import make_task


def test_inputs_of_the_first_samples_of_a_seed():
    loader = make_task("zoo:convnet", "digits").training_loader()
    some, again = (calibration_inputs(loader, 70, 3) for _ in range(2))
    assert some.shape == (70, 1, 8, 8)
    assert torch.equal(some, again)
    assert not torch.equal(some, calibration_inputs(loader, 70, 4))
    assert len(calibration_inputs(loader, 10**6, 0)) == len(loader.dataset)


def test_labelled_batches_are_the_same_samples():
    loader = make_task("zoo:convnet", "digits").training_loader()
    whole = calibration_inputs(loader, 20, 3, lambda batch: (batch, None))
    batches = labelled_batches(loader, 20, 8, 3)
    assert [len(x) for x, _ in batches] == [8, 8, 4]
    for part, read in zip(whole, zip(*batches, strict=True), strict=True):
        assert torch.equal(part, torch.cat(read))


def test_labelled_batches_of_a_loader_with_an_order_of_its_own():
    rows = [(torch.full((2,), float(i)), i) for i in range(12)]
    drawn = WeightedRandomSampler(torch.ones(12), 12, replacement=True)
    batches = labelled_batches(DataLoader(rows, 5, sampler=drawn), 7, 3, 0)
    assert [len(x) for x, _ in batches] == [3, 3, 1]
    for x, y in batches:
        assert torch.equal(x[:, 0], y.float())

    def collate(pairs):
        return torch.stack([*(x for x, _ in pairs)] * 2), torch.tensor([y for _, y in pairs])

    with pytest.raises(InputError, match="task.train: got a loader of its own order"):
        labelled_batches(DataLoader(rows, 5, sampler=drawn, collate_fn=collate), 7, 3, 0)


@pytest.mark.parametrize("law", ["natural", "uniform"])
def test_noise_stays_in_the_range_of_the_example(law):
    example = torch.tensor([-1.0, 2.0]).repeat(1, 3, 32, 16)
    noise = noise_like(example, 5, 0, law)
    assert noise.shape == (5, 3, 32, 32)
    assert noise.min() >= -1
    assert noise.max() <= 2
    assert torch.equal(noise, noise_like(example, 5, 0, law))
    assert not torch.equal(noise, noise_like(example, 5, 1, law))


def test_natural_noise_has_the_spectrum_of_photographs():
    noise = natural_noise((64, 3, 64, 64), torch.Generator().manual_seed(0)).double()
    power = torch.fft.fft2(noise).abs().square().mean((0, 1))[0]
    assert 2.5 < float(power[2] / power[4]) < 6  # power falls as 1/f²: 4 an octave
    flat = noise.permute(1, 0, 2, 3).reshape(3, -1)
    assert float(torch.corrcoef(flat)[0, 1]) == pytest.approx(0.9, abs=0.03)
    assert torch.allclose(noise.std((1, 2, 3)), torch.ones(64).double(), atol=1e-3)


def test_noise_of_tokens_and_nested_inputs():
    example = {"ids": torch.tensor([[0, 7, 3]]), "images": torch.rand(1, 4), "flag": True}
    noise = noise_like(example, 50, 0)
    assert noise["ids"].shape == (50, 3)
    assert 0 <= int(noise["ids"].min()) <= int(noise["ids"].max()) <= 7
    assert noise["images"].shape == (50, 4)
    assert noise["flag"] is True
    del noise["flag"]
    assert joined([noise, noise])["ids"].shape == (100, 3)


def test_a_constant_example_has_no_range():
    with pytest.raises(InputError, match="constant values"):
        noise_like(torch.zeros(1, 3, 4, 4), 2, 0)
