"""Patterns: groups, tiles and rows against loops over plain indices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.patterns import NM, Block, Row, Unstructured, parse_pattern

matrices = st.tuples(st.integers(1, 9), st.integers(1, 9))
kernels = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
shapes = st.one_of(matrices, kernels)
patterns = st.one_of(
    st.just(Unstructured()),
    st.just(Row()),
    st.builds(Block, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["avg", "max"])),
)


def drawn(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


@given(shapes, patterns)
def test_units_cover_every_weight_once(shape, pattern):
    sizes = pattern.unit_sizes(torch.Size(shape))
    scores = drawn(shape)
    assert sizes.dtype == torch.int64
    assert len(sizes) == len(pattern.pool(scores))
    assert int(sizes.sum()) == scores.numel()
    for unit in range(len(sizes)):
        one = torch.zeros(len(sizes), dtype=torch.bool)
        one[unit] = True
        mask = pattern.expand(one, torch.Size(shape))
        assert mask.shape == shape
        assert int(mask.sum()) == sizes[unit]


@given(shapes, patterns)
def test_a_units_score_is_that_of_the_weights_it_expands_to(shape, pattern):
    scores = drawn(shape)
    pooled = pattern.pool(scores)
    for unit in range(len(pooled)):
        one = torch.zeros(len(pooled), dtype=torch.bool)
        one[unit] = True
        inside = scores[pattern.expand(one, torch.Size(shape))]
        expected = {"row": inside.sum(), "unstructured": inside.sum()}.get(str(pattern))
        if isinstance(pattern, Block):
            expected = inside.max() if pattern.pooling == "max" else inside.mean()
        assert pooled[unit] == pytest.approx(expected.item())


def test_rows_of_magnitudes_are_l1_norms_of_filters():
    weight = torch.randn(4, 3, 2, 2)
    assert torch.allclose(Row().pool(weight.abs()), weight.flatten(1).norm(1, dim=1))


def test_block_oracle_of_the_gmp_card():
    tiles = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    scores = tiles.repeat_interleave(2, 0).repeat_interleave(2, 1) + torch.eye(4) / 10
    pattern = Block(2, 2)
    pooled = pattern.pool(scores)
    assert pooled.tolist() == pytest.approx([1.05, 4.0, 3.0, 2.05])
    kept = pooled >= pooled.sort().values[2]
    mask = pattern.expand(kept, scores.shape)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, 2:] = expected[2:, :2] = True
    assert torch.equal(mask, expected)


def test_blocks_at_the_edge_are_averaged_over_what_they_hold():
    assert Block(2, 2).pool(torch.ones(5, 5)).tolist() == [1.0] * 9
    assert Block(2, 2).unit_sizes(torch.Size((5, 5))).tolist() == [4, 4, 2, 4, 4, 2, 2, 2, 1]


def test_blocks_of_negative_scores_do_not_see_the_padding():
    assert Block(2, 2, "max").pool(-torch.ones(3, 3)).tolist() == [-1.0] * 4


def test_blocks_of_a_convolution_lie_in_the_matrix_of_filters():
    scores = drawn((2, 3, 2, 2))
    assert torch.equal(Block(1, 4).pool(scores), Block(1, 4).pool(scores.reshape(2, 12)))


@pytest.mark.parametrize("build", [lambda: Block(0, 2), lambda: Block(2, 2, "mean")])
def test_impossible_blocks_are_refused(build):
    with pytest.raises(InputError):
        build()


def test_blocks_of_a_vector_are_refused():
    with pytest.raises(InputError, match=r"a tensor of shape \(4,\); accepted: 2-D or more"):
        Block(2, 2).pool(torch.ones(4))


nm_cases = st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(
    lambda case: st.tuples(
        st.integers(1, case[1]).map(lambda n: NM(n, case[1])),
        st.integers(1, 3).map(lambda groups: groups * case[1]),
        st.sampled_from([(), (3,), (2, 3)]),
        st.integers(1, 4),
    )
)


@given(nm_cases, st.integers(0, 99), st.booleans())
def test_nm_keeps_exactly_n_of_every_group_and_the_largest(case, seed, ties):
    pattern, inputs, kernel, outputs = case
    scores = drawn((outputs, inputs, *kernel), seed)
    if ties:
        scores = (scores * 3).floor()
    mask = pattern.mask(scores)
    assert mask.shape == scores.shape
    for out in range(outputs):
        for position in range(max(1, torch.Size(kernel).numel())):
            row = scores[out].reshape(inputs, -1)[:, position]
            kept = mask[out].reshape(inputs, -1)[:, position]
            for start in range(0, inputs, pattern.m):
                group = slice(start, start + pattern.m)
                assert int(kept[group].sum()) == pattern.n
                best = row[group].sort(descending=True).values[: pattern.n].sum()
                assert row[group][kept[group]].sum() == pytest.approx(best.item())


def test_nm_keeps_the_earlier_of_equal_scores():
    assert NM(2, 4).mask(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]


def test_nm_groups_of_a_convolution_run_along_its_inputs():
    scores = torch.zeros(1, 4, 1, 2)
    scores[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    scores[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask = NM(2, 4).mask(scores)
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]


def test_nm_refuses_inputs_that_do_not_divide():
    assert NM(2, 4).fits(torch.Size((3, 8)))
    assert not NM(2, 4).fits(torch.Size((8, 3)))
    assert not NM(2, 4).fits(torch.Size((8,)))
    with pytest.raises(InputError, match="an input dimension that 4 divides"):
        NM(2, 4).mask(torch.ones(8, 6))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 2)])
def test_impossible_groups_are_refused(n, m):
    with pytest.raises(InputError, match="0 < N <= M"):
        NM(n, m)


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(), Row(), Block(4, 2), Block(1, 8, "max"), NM(2, 4)],
)
def test_a_pattern_is_written_so_that_it_reads_back_the_same(pattern):
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text", ["", "rows", "block", "block:4", "block:0x4", "block:2x2:sum", "4:2", "2:4:8"]
)
def test_malformed_patterns_are_refused(text):
    with pytest.raises(InputError):
        parse_pattern(text)
