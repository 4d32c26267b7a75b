"""Packed models: what they give, what they are refused for, and what the tables say of them."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.deploy import packing
from secateurs.deploy.block_sparse import BlockSparseLinear
from secateurs.deploy.packing import block_of, packed
from secateurs.deploy.timing import TABLE, compare_latency, measure_engines
from secateurs.errors import InputError
from secateurs.parts.patterns import NM
from secateurs.report.headline import headline
from secateurs.report.html import engines_table

FALLBACK = "dense fallback of 2 layers (no sparse kernels on cpu)"
INPUTS = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12)).eval()


def masked(mask):
    """A network under masks of its own making, and the masks."""
    model, masks = net(), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                masks[name] = mask(parameter)
                parameter.mul_(masks[name])
    return model, masks


def halves(weight):
    return NM(2, 4).mask(weight.detach().abs())


def blocks(weight):
    generator = torch.Generator().manual_seed(len(weight))
    grid = torch.rand(len(weight) // 4, weight.shape[1] // 8, generator=generator) > 0.5
    grid[0, 0], grid[-1, -1] = True, False
    return grid.repeat_interleave(4, 0).repeat_interleave(8, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), st.integers(2, 5), st.integers(0, 9)
)
def test_the_block_is_the_largest_that_no_mask_cuts(high, wide, down, across, seed):
    grid = torch.rand(down, across, generator=torch.Generator().manual_seed(seed)) > 0.5
    mask = grid.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    rows, cols = block_of({"a": mask, "b": torch.ones(7, 11, dtype=torch.bool)})

    def cut(rows, cols):
        tiles = [t for line in mask.split(rows, 0) for t in line.split(cols, 1)]
        return any(bool(t.any()) and not bool(t.all()) for t in tiles)

    assert rows % high == 0 or rows >= len(mask)
    assert cols % wide == 0 or cols >= mask.shape[1]
    assert not cut(rows, cols)
    if rows < len(mask):  # no larger multiple does
        assert all(cut(k * rows, cols) for k in range(2, len(mask) // rows + 1))


def test_without_kernels_2_of_4_is_the_dense_fallback_and_says_so():
    model, masks = masked(halves)
    made, note = packed(model, "2:4", INPUTS, masks)
    assert note == FALLBACK
    assert torch.equal(made(INPUTS), model(INPUTS))
    assert made is not model


def test_blocks_are_those_of_the_masks():
    model, masks = masked(blocks)
    for given_masks in (masks, None):
        made, note = packed(model, "block", INPUTS, given_masks)
        assert note == "2 layers in blocks of 4x8"
        assert isinstance(made[0], BlockSparseLinear)
        torch.testing.assert_close(made(INPUTS), model(INPUTS))


def test_models_without_the_pattern_are_refused():
    plain, masks = masked(lambda w: torch.rand(w.shape) > 0.5)
    with pytest.raises(InputError, match="without a 2:4 linear layer"):
        packed(plain, "2:4", INPUTS, masks)
    with pytest.raises(InputError, match="without blocks of zeros"):
        packed(plain, "block", INPUTS, masks)
    with pytest.raises(InputError, match="without blocks of zeros"):
        packed(net(), "block", INPUTS)
    with pytest.raises(InputError, match="kind: got 'rows'"):
        packed(plain, "rows", INPUTS)


@pytest.mark.parametrize("kind", packing.PACKED)
def test_kernels_that_give_something_else_are_refused(kind, monkeypatch):
    model, masks = masked(halves if kind == "2:4" else blocks)

    def wrong(net, *_, **__):
        made = net if kind == "2:4" else copy.deepcopy(net)
        with torch.no_grad():
            made[2].bias[3] += 0.01
        return Told() if kind == "2:4" else made

    name = "pack_semi_structured" if kind == "2:4" else "to_block_sparse"
    monkeypatch.setattr(packing, name, wrong)
    with pytest.raises(InputError, match=f"packed as {kind}: got outputs that differ by 0.0"):
        packed(model, kind, INPUTS, masks)
    [timed] = measure_engines(model, INPUTS, engines=[kind], masks=masks, repeats=2).values()
    assert timed.latency is None
    assert "outputs that differ" in timed.failure


class Told:
    packed, dense = ("0",), {}


def test_it_is_timed_beside_the_dense_model():
    model, masks = masked(blocks)
    modes = model.training
    names = ["eager", "block", "2:4"]
    found = compare_latency(net(), model, INPUTS, engines=names, masks=masks, repeats=3)
    assert found["block"].note == "2 layers in blocks of 4x8"
    assert found["block"].ratio > 0
    assert found["2:4"].ratio is None
    assert "without a 2:4 linear layer" in found["2:4"].failure
    assert model.training is modes
    assert type(model[0]) is nn.Linear


def test_prune_times_the_packed_model_and_the_report_says_what_it_is():
    loader = DataLoader(TensorDataset(INPUTS, torch.arange(5)), 5)
    task = sc.classification(net, loader, loader)
    options = {"with_latency": True, "engines": ["eager", "2:4", "block"]}
    outcome = sc.prune(net(), "magnitude", "2:4", task, recover=False, **options)
    eager, half, block = outcome.tables[TABLE]
    assert half["note"].startswith("dense fallback of ")
    assert half["ratio"] > 0
    assert not eager["note"]
    assert block["ratio"] is None
    assert any(note.startswith("not timed in block: model: got") for note in outcome.notes)
    assert half["note"] in engines_table(outcome.tables[TABLE]).caption
    assert f"In 2:4 ({half['note']}) it runs" in headline(outcome.as_dict())[1]


def test_they_are_public():
    model, masks = masked(halves)
    assert sc.pack_semi_structured(copy.deepcopy(model)).dense
    assert isinstance(sc.to_block_sparse(model, masks, (4, 4))[0], BlockSparseLinear)
