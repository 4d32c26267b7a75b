"""Block-sparse layers against the dense masked product."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateurs as sc
from secateurs.deploy.block_sparse import BlockSparseLinear, to_block_sparse
from secateurs.errors import InputError
from secateurs.parts.patterns import Block

sizes = st.integers(1, 40)


def blocky_mask(shape, block, share, seed=0):
    tiles = Block(*block)
    generator = torch.Generator().manual_seed(seed)
    units = len(tiles.unit_sizes(torch.Size(shape)))
    return tiles.expand(torch.rand(units, generator=generator) < share, torch.Size(shape))


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.booleans())
def test_it_computes_the_masked_product(out, width, rows, cols, share, biased):
    layer = nn.Linear(width, out, bias=biased).double()
    mask = blocky_mask((out, width), (rows, cols), share)
    made = BlockSparseLinear.of(layer, mask, (rows, cols))
    x = torch.randn(2, 3, width, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight * mask, layer.bias)
    assert torch.allclose(made(x), expected, atol=1e-12)
    assert torch.equal(made.dense_weight(), layer.weight.detach() * mask)


@pytest.mark.parametrize("engine", ["rows", "torch"])
def test_in_float32_it_agrees_with_the_dense_masked_product_to_1e_4(engine):
    layer = nn.Linear(768, 512)
    mask = blocky_mask((512, 768), (16, 16), 0.3)
    made = BlockSparseLinear.of(layer, mask, (16, 16), engine)
    x = torch.randn(64, 768)
    with torch.no_grad():
        difference = made(x) - nn.functional.linear(x, layer.weight * mask, layer.bias)
    assert float(difference.abs().max()) < 1e-4


def test_gradients_pass_through_it_to_dense_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    masks = {"1.weight": blocky_mask((8, 8), (4, 4), 0.5)}
    sparse = to_block_sparse(model, masks, (4, 4))
    with torch.no_grad():
        model[1].weight.mul_(masks["1.weight"])
    x = torch.randn(3, 8, dtype=torch.float64)
    for net in (model, sparse):
        net(x).square().sum().backward()
    assert torch.allclose(model[0].weight.grad, sparse[0].weight.grad, atol=1e-12)


def test_bytes_are_those_of_the_kept_blocks_and_their_places():
    layer = nn.Linear(64, 32)
    mask = torch.zeros(32, 64, dtype=torch.bool)
    mask[:16, 16:32] = mask[16:, 48:] = mask[16:, :16] = True
    made = BlockSparseLinear.of(layer, mask, (16, 16))
    assert made.columns.tolist() == [1, 0, 3]
    assert made.starts.tolist() == [0, 1, 3]
    assert made.density == 3 / 8
    # 3 blocks of 256 floats, 32 biases; 3 columns and 3 starts at 4 bytes
    assert made.stored_bytes == 4 * (3 * 256 + 32) + 4 * (3 + 3)
    assert "density=0.375" in repr(made)


def test_a_block_with_one_kept_weight_is_stored_and_the_rest_of_it_is_zero():
    layer = nn.Linear(8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[5, 2] = True
    made = BlockSparseLinear.of(layer, mask, (4, 4))
    assert len(made.values) == 1
    assert int((made.dense_weight() != 0).sum()) == 1


def test_without_a_mask_zeros_decide():
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[:4] = 0
    assert BlockSparseLinear.of(layer, None, (4, 4)).density == 0.5


def test_empty_layers_give_their_bias():
    layer = nn.Linear(8, 8)
    made = BlockSparseLinear.of(layer, torch.zeros(8, 8, dtype=torch.bool), (4, 4))
    assert torch.allclose(made(torch.randn(3, 8)), layer.bias.expand(3, 8))


def test_a_pruned_model_is_carried_over_and_survives_its_state():
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 10)).eval()
    outcome = sc.prune(model, "one-shot", "sparsity=0.5", pattern="block:8x8")
    sparse = to_block_sparse(outcome.model, outcome.masks, (8, 8))
    assert type(outcome.model[0]) is nn.Linear
    assert {type(sparse[0]), type(sparse[2])} == {BlockSparseLinear}
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = outcome.model(x)
        assert torch.allclose(sparse(x), expected, atol=1e-5)
        again = copy.deepcopy(sparse)
        again.load_state_dict(sparse.state_dict())
        assert torch.equal(again(x), sparse(x))
        torch_engine = to_block_sparse(outcome.model, outcome.masks, (8, 8), engine="torch")
        assert torch.allclose(torch_engine(x), expected, atol=1e-5)


def test_a_model_that_is_one_layer_and_masks_of_other_layers():
    layer = nn.Linear(8, 8)
    mask = torch.ones(8, 8, dtype=torch.bool)
    assert isinstance(to_block_sparse(layer, {"weight": mask}, (4, 4)), BlockSparseLinear)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(InputError, match="masks"):
        to_block_sparse(conv, {"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool)}, (2, 2))
    with pytest.raises(InputError, match=r"mask: got \(4, 4\) for \(8, 8\)"):
        BlockSparseLinear.of(layer, torch.ones(4, 4, dtype=torch.bool), (4, 4))
    with pytest.raises(InputError, match="engine"):
        BlockSparseLinear.of(layer, mask, (4, 4), "magic")
