"""The OBS solver against least squares, explicit inverses and a plain column loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateurs.calibration import obs
from secateurs.calibration.moments import Moments, unfolded, weight_matrices
from secateurs.calibration.obs import (
    DampedHessian,
    bundle_costs,
    damp,
    remove_columns,
    sweep_columns,
    weight_costs,
)
from secateurs.errors import InputError
from secateurs.parts.patterns import NM


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs (N, d) that depend on each other and differ in scale."""
    scales = torch.logspace(-1, 1, width, dtype=torch.float64)
    return drawn(rows, width, seed=seed) @ (drawn(width, width, seed=seed + 1) * scales)


def second_moment(inputs: Tensor) -> Tensor:
    return 2 * inputs.t() @ inputs / len(inputs)


def loss(change: Tensor, hessian: Tensor) -> float:
    return float((change @ hessian * change).sum() / 2)


def column_loop(
    weight: Tensor, hessian: Tensor, removal: float | NM | Tensor, block: int = 10**9
) -> tuple[Tensor, Tensor, float]:
    """Column after column with an explicit inverse, from which each column is eliminated."""
    rest, inverse = weight.clone(), torch.linalg.inv(hessian)
    out, width = weight.shape
    mask = torch.ones(out, width, dtype=torch.bool)
    diagonal = torch.empty(width, dtype=torch.float64)
    ahead = inverse.clone()
    for j in range(width):  # [H⁻¹]_jj once the inputs before j are gone
        diagonal[j] = ahead[j, j]
        ahead = ahead - torch.outer(ahead[:, j], ahead[j]) / ahead[j, j]
    total = 0.0
    for j in range(width):
        if isinstance(removal, Tensor):
            mask = removal
        elif isinstance(removal, NM) and j % removal.m == 0:
            group = rest[:, j : j + removal.m] ** 2 / diagonal[j : j + removal.m]
            for row in range(out):
                order = sorted(range(removal.m), key=lambda i: (-float(group[row, i]), i))
                for i in order[removal.n :]:
                    mask[row, j + i] = False
        elif isinstance(removal, float) and j % block == 0:
            stop = min(j + block, width)
            costs = (rest[:, j:stop] ** 2 / diagonal[j:stop]).reshape(-1)
            goes = round(removal * out * stop) - round(removal * out * j)
            lowest = costs.argsort(stable=True)[:goes]
            part = torch.ones(len(costs), dtype=torch.bool)
            part[lowest] = False
            mask[:, j:stop] = part.view(out, -1)
        error = torch.where(mask[:, j], 0.0, rest[:, j]) / inverse[j, j]
        total += float((error**2 * inverse[j, j]).sum() / 2)
        rest -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return rest * mask, mask, total


def test_the_example_of_the_card():
    weight = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    hessian = damp(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 0)
    assert hessian.damping == 0
    assert hessian.note == ""
    removed = remove_columns(weight, hessian, [0])
    assert removed.weight[0].tolist() == pytest.approx([0, 1.5])
    assert removed.mask.tolist() == [[False, True]]
    assert removed.cost == pytest.approx(0.75)
    assert bundle_costs(weight, hessian, [[0], [1]]).tolist() == pytest.approx([0.75, 0.75])
    assert weight_costs(weight, hessian)[0].tolist() == pytest.approx([0.75, 0.75])
    swept = sweep_columns(weight, hessian, torch.tensor([[False, True]]))
    assert swept.weight[0].tolist() == pytest.approx([0, 1.5])
    assert swept.cost == pytest.approx(0.75)


def test_the_factor_and_its_inverse():
    hessian = damp(second_moment(correlated(40, 9)))
    assert torch.equal(hessian.factor, hessian.factor.triu())
    assert torch.allclose(hessian.factor @ hessian.factor.t(), hessian.matrix)
    root = hessian.inverse_root
    assert torch.equal(root, root.triu())
    assert torch.allclose(root.t() @ root, torch.linalg.inv(hessian.matrix))


def test_damping_is_a_share_of_the_mean_of_the_live_diagonal():
    moment = second_moment(correlated(40, 5))
    moment[3], moment[:, 3] = 0, 0
    before = moment.clone()
    hessian = damp(moment, 0.1)
    assert torch.equal(moment, before)
    expected = moment + 0.1 * moment.diagonal().sum() / 4 * torch.eye(5)
    expected[3, 3] = 1
    assert torch.allclose(hessian.matrix, expected)
    assert hessian.dead.tolist() == [False, False, False, True, False]
    assert "1 of 5 inputs were always zero" in hessian.note


@pytest.mark.parametrize("removed", [[2], [0, 5, 7], [1, 2, 3, 4, 5, 6, 7], list(range(8)), []])
def test_removed_columns_are_made_up_for_as_by_least_squares(removed: list[int]):
    inputs, weight = correlated(60, 8), drawn(5, 8, seed=3)
    result = remove_columns(weight, damp(second_moment(inputs), 0), removed)
    kept = [i for i in range(8) if i not in removed]
    fitted = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.t()).solution.t()
    assert torch.allclose(result.weight[:, kept], fitted, rtol=1e-8, atol=1e-8)
    assert (result.weight[:, removed] == 0).all()
    assert result.cost == pytest.approx(
        float((inputs @ (result.weight - weight).t()).square().sum(1).mean()), abs=1e-9
    )


def test_no_removal_changes_no_bit():
    hessian = damp(second_moment(correlated(30, 8)))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight = drawn(5, 8).to(dtype)
        everything = torch.ones(5, 8, dtype=torch.bool)
        for result in (
            remove_columns(weight, hessian, []),
            sweep_columns(weight, hessian, 0.0),
            sweep_columns(weight, hessian, everything),
            sweep_columns(weight, hessian, NM(4, 4)),
        ):
            assert torch.equal(result.weight, weight)
            assert result.weight.dtype == dtype
            assert result.mask.all()
            assert result.cost == 0


quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 10**6)
widths = st.integers(1, 10)


@quick
@given(seeds, widths, st.integers(1, 30), st.sampled_from([1e-4, 0.01, 1.0]), st.data())
def test_the_loss_never_rises_above_the_uncompensated_one(seed, width, rows, damping, data):
    moment = second_moment(correlated(rows, width, seed))
    weight, hessian = drawn(3, width, seed=seed), damp(moment, damping)
    removed = data.draw(st.sets(st.integers(0, width - 1)).map(sorted))
    result = remove_columns(weight, hessian, removed)
    plain = weight.clone()
    plain[:, removed] = 0
    for curvature in (moment, hessian.matrix):
        most = loss(plain - weight, curvature)
        assert loss(result.weight - weight, curvature) <= most * (1 + 1e-9) + 1e-12
    scale = loss(weight, hessian.matrix)
    assert result.cost == pytest.approx(
        loss(result.weight - weight, hessian.matrix), abs=1e-9 * scale
    )
    alone = bundle_costs(weight, hessian, [removed])
    assert result.cost == pytest.approx(float(alone), rel=1e-6, abs=1e-9 * scale)


@quick
@given(seeds, widths, st.integers(1, 6), st.floats(0, 1), st.integers(1, 12))
def test_a_sweep_keeps_its_promises(seed, width, out, sparsity, block):
    hessian = damp(second_moment(correlated(7, width, seed)))
    weight = drawn(out, width, seed=seed)
    result = sweep_columns(weight, hessian, sparsity, block_size=block)
    assert int((~result.mask).sum()) == round(sparsity * out * width)
    assert (result.weight[~result.mask] == 0).all()
    assert result.cost == pytest.approx(loss(result.weight - weight, hessian.matrix), rel=1e-6)


@quick
@given(seeds, st.sampled_from([NM(1, 2), NM(2, 4), NM(3, 4), NM(1, 3)]), st.integers(1, 30))
def test_n_of_m_stay_in_every_group(seed, pattern, block):
    width = 24
    hessian = damp(second_moment(correlated(40, width, seed)))
    result = sweep_columns(drawn(5, width, seed=seed), hessian, pattern, block_size=block)
    assert (result.mask.reshape(-1, pattern.m).sum(1) == pattern.n).all()
    assert (result.weight[~result.mask] == 0).all()


@pytest.mark.parametrize("block", [1, 3, 8, 24, 100])
@pytest.mark.parametrize("removal", [0.0, 0.3, 0.5, 0.9, 1.0, NM(2, 4), NM(1, 8), "mask"], ids=str)
def test_a_sweep_equals_the_plain_column_loop(removal: float | NM | str, block: int):
    weight, hessian = drawn(7, 24, seed=2), damp(second_moment(correlated(60, 24)))
    rule = drawn(7, 24, seed=5) > 0 if removal == "mask" else removal
    span = -(-block // rule.m) * rule.m if isinstance(rule, NM) else block
    expected, mask, cost = column_loop(weight, hessian.matrix, rule, span)
    result = sweep_columns(weight, hessian, rule, block_size=block)
    assert torch.equal(result.mask, mask)
    assert torch.allclose(result.weight, expected, rtol=0, atol=1e-8)
    assert result.cost == pytest.approx(cost, rel=1e-8, abs=1e-12)


def test_precision_of_a_sweep():
    weight, hessian = drawn(6, 32), damp(second_moment(correlated(80, 32)))
    mask = drawn(6, 32, seed=4) > 0
    exact = sweep_columns(weight, hessian, mask).weight
    single = sweep_columns(weight.float(), hessian, mask)
    double = sweep_columns(weight.float(), hessian, mask, dtype=torch.float64)
    assert single.weight.dtype == double.weight.dtype == torch.float32
    assert torch.allclose(single.weight.double(), exact, atol=1e-3)
    assert (double.weight - exact).abs().max() < (single.weight - exact).abs().max()


def test_costs_are_those_of_removing_each_alone():
    inputs, weight = correlated(50, 12), drawn(4, 12, seed=1)
    hessian = damp(second_moment(inputs), 0)
    inverse = torch.linalg.inv(hessian.matrix)
    costs = weight_costs(weight, hessian)
    for i, j in ((0, 0), (3, 11), (2, 5)):
        assert float(costs[i, j]) == pytest.approx(float(weight[i, j] ** 2 / (2 * inverse[j, j])))
    ragged = [[0, 1, 2], [5], [3, 9], [11, 4, 0], []]
    expected = []
    for bundle in ragged:
        part, block = weight[:, bundle], inverse[bundle][:, bundle]
        expected.append(float((part @ torch.linalg.inv(block) @ part.t()).trace() / 2))
    assert bundle_costs(weight, hessian, ragged).tolist() == pytest.approx(expected)
    assert torch.allclose(bundle_costs(weight, hessian, torch.arange(12)[:, None]), costs.sum(0))
    kernels = torch.arange(12).view(4, 3)
    alone = [remove_columns(weight, hessian, kernel).cost for kernel in kernels]
    assert bundle_costs(weight, hessian, kernels).tolist() == pytest.approx(alone)


def test_the_survivor_of_two_equal_inputs_doubles():
    inputs = drawn(50, 5)
    inputs = torch.cat([inputs, inputs[:, :1]], 1)
    weight = drawn(3, 6)
    weight[:, 5] = weight[:, 0]
    hessian = damp(second_moment(inputs), 1e-9)
    result = remove_columns(weight, hessian, [5])
    assert torch.allclose(result.weight[:, 0], 2 * weight[:, 0], rtol=1e-5)
    assert torch.allclose(result.weight[:, 1:5], weight[:, 1:5], atol=1e-5)
    assert result.cost < 1e-6 * loss(weight, hessian.matrix)
    assert float(bundle_costs(weight, hessian, [[5]])) == pytest.approx(result.cost, rel=1e-2)


def test_fewer_samples_than_inputs():
    moment = second_moment(correlated(5, 20))
    hessian = damp(moment)
    assert hessian.damping == 0.01
    assert hessian.note == ""
    weight = drawn(4, 20)
    result = remove_columns(weight, hessian, list(range(0, 20, 2)))
    plain = weight * result.mask
    assert loss(result.weight - weight, moment) < 0.2 * loss(plain - weight, moment)


def test_a_singular_second_moment_raises_the_damping_and_reports_it():
    hessian = damp(second_moment(correlated(5, 20)), 0)
    assert 0 < hessian.damping <= 1e-6
    assert f"damping raised from 0 to {hessian.damping:g}" in hessian.note
    assert torch.isfinite(hessian.inverse_root).all()


def test_damping_rises_tenfold_until_the_factorisation_holds():
    indefinite = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # eigenvalues 2.5 and -0.5
    hessian = damp(indefinite, 0.02)
    assert hessian.damping == pytest.approx(2)
    assert torch.allclose(hessian.matrix.diagonal(), torch.full((2,), 3.0).double())
    assert hessian.note == "damping raised from 0.02 to 2: H was not positive definite"


def test_a_matrix_that_no_damping_helps_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="hessian.*not positive definite even with"):
        damp(torch.tensor([[1.0, 1e9], [1e9, 1.0]]))
    monkeypatch.setattr(obs, "RAISES", 1)
    with pytest.raises(InputError, match="damping of 0.2"):
        damp(torch.tensor([[1.0, 1.5], [1.5, 1.0]]), 0.02)


def test_dead_inputs_have_no_weights_afterwards():
    inputs = correlated(50, 6)
    inputs[:, [1, 4]] = 0
    hessian, weight = damp(second_moment(inputs)), drawn(3, 6)
    assert (weight_costs(weight, hessian)[:, [1, 4]] == 0).all()
    assert bundle_costs(weight, hessian, [[1, 4]]).item() == 0
    for result in (remove_columns(weight, hessian, [0]), sweep_columns(weight, hessian, 0.5)):
        assert (result.weight[:, [1, 4]] == 0).all()
    assert (~sweep_columns(weight, hessian, 0.5).mask[:, [1, 4]]).all()
    nothing = remove_columns(weight, hessian, [1])
    assert nothing.cost == 0
    live = [0, 2, 3, 5]
    assert torch.equal(nothing.weight[:, live], weight[:, live])


def test_a_layer_whose_inputs_are_all_dead():
    hessian = damp(torch.zeros(3, 3))
    assert torch.equal(hessian.matrix, torch.eye(3).double())
    assert (sweep_columns(drawn(2, 3), hessian, 0.5).weight == 0).all()


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_unit_of_the_inputs_does_not_matter(unit: float):
    moment = second_moment(correlated(30, 8))
    moment[2], moment[:, 2] = 0, 0
    weight = drawn(4, 8)
    for solve in (
        lambda h: remove_columns(weight, h, [1, 5]),
        lambda h: sweep_columns(weight, h, 0.5),
    ):
        one, other = solve(damp(moment)), solve(damp(moment * unit))
        assert torch.allclose(one.weight, other.weight)
        assert other.cost == pytest.approx(one.cost * unit)


def test_a_channel_of_a_grouped_convolution():
    layer = nn.Conv2d(6, 4, 3, groups=2).double()
    inputs = drawn(8, 6, 6, 6)
    inputs[:, 1] += inputs[:, 0]  # within the first group
    moment = Moments(layer)
    moment.update(inputs)
    group, channel = 0, range(9)  # the kernel positions of channel 0
    weight = weight_matrices(layer)[group].detach()
    result = remove_columns(weight, damp(moment.hessian[group], 0), list(channel))
    vectors = unfolded(layer, inputs)[group].t()
    fitted = torch.linalg.lstsq(vectors[:, 9:], vectors @ weight.t()).solution.t()
    assert torch.allclose(result.weight[:, 9:], fitted, rtol=1e-8, atol=1e-8)
    error = (vectors @ (result.weight - weight).t()).square().sum(1).mean()
    assert result.cost == pytest.approx(float(error))


def test_layers_that_read_the_same_inputs_are_stacked():
    hessian = damp(second_moment(correlated(30, 8)))
    first, second = drawn(3, 8, seed=1), drawn(2, 8, seed=2)
    both = remove_columns(torch.cat([first, second]), hessian, [0, 3])
    apart = [remove_columns(w, hessian, [0, 3]) for w in (first, second)]
    assert torch.allclose(both.weight, torch.cat([a.weight for a in apart]))
    assert both.cost == pytest.approx(sum(a.cost for a in apart))


def test_nothing_is_changed():
    moment, weight = second_moment(correlated(30, 8)).float(), nn.Parameter(drawn(3, 8).float())
    before = moment.clone(), weight.detach().clone()
    hessian = damp(moment)
    kept = hessian.matrix.clone()
    for result in (
        remove_columns(weight, hessian, torch.tensor([2, 0])),
        sweep_columns(weight, hessian, NM(2, 4)),
    ):
        assert not result.weight.requires_grad
    assert not bundle_costs(weight, hessian, [[0, 1]]).requires_grad
    assert torch.equal(moment, before[0])
    assert torch.equal(weight, before[1])
    assert torch.equal(hessian.matrix, kept)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        (torch.eye(3)[:2], "shape (2, 3)"),
        (torch.eye(3)[None], "shape (1, 3, 3)"),
        (torch.eye(3).long(), "int64"),
        (torch.eye(3) * math.nan, "NaN or Inf"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "asymmetric"),
        (-torch.eye(2), "diagonal entry of -1"),
    ],
)
def test_a_bad_hessian_is_refused(moment: Tensor, message: str):
    with pytest.raises(InputError) as error:
        damp(moment)
    assert error.value.argument == "hessian"
    assert message in str(error.value)


def test_a_negative_damping_is_refused():
    for damping in (-0.1, math.nan):
        with pytest.raises(InputError, match="damping"):
            damp(torch.eye(2), damping)


@pytest.mark.parametrize(
    "weight",
    [torch.ones(2, 4), torch.ones(2, 3, 1), torch.ones(2, 3).long(), torch.full((2, 3), math.nan)],
    ids=["width", "3-D", "integers", "NaN"],
)
def test_a_bad_weight_is_refused(weight: Tensor):
    hessian = damp(torch.eye(3))
    for call in (
        lambda: weight_costs(weight, hessian),
        lambda: bundle_costs(weight, hessian, [[0]]),
        lambda: remove_columns(weight, hessian, [0]),
        lambda: sweep_columns(weight, hessian, 0.5),
    ):
        with pytest.raises(InputError, match="weight"):
            call()


@pytest.mark.parametrize(
    "columns",
    [[0, 0], [3], [-1], torch.tensor([0.5]), torch.tensor([True, False, True]), [[0], [1]]],
    ids=str,
)
def test_bad_columns_are_refused(columns: object):
    hessian = damp(torch.eye(3))
    with pytest.raises(InputError, match="columns: got .*distinct column indices, 0 to 2"):
        remove_columns(torch.ones(2, 3), hessian, columns)
    with pytest.raises(InputError, match="bundles: got"):
        bundle_costs(torch.ones(2, 3), hessian, [columns])


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        (1.5, "a sparsity, 0 to 1"),
        (math.nan, "a sparsity, 0 to 1"),
        (NM(2, 4), "divides the width 6"),
        (torch.ones(2, 5, dtype=torch.bool), "a bool mask (2, 6)"),
        (torch.ones(2, 6), "a bool mask (2, 6)"),
    ],
    ids=str,
)
def test_a_bad_removal_is_refused(removal: object, message: str):
    with pytest.raises(InputError) as error:
        sweep_columns(torch.ones(2, 6), damp(torch.eye(6)), removal)
    assert message in str(error.value)


def test_a_bad_block_size_is_refused():
    with pytest.raises(InputError, match="block_size"):
        sweep_columns(torch.ones(2, 6), damp(torch.eye(6)), 0.5, block_size=0)


def test_a_hessian_made_by_hand_that_is_singular_is_refused():
    matrix = torch.ones(3, 3, dtype=torch.float64)
    hessian = DampedHessian(matrix, torch.eye(3).double(), 0.0, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(InputError, match="singular.*more damping"):
        remove_columns(torch.ones(2, 3), hessian, [0])
