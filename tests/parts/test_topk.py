"""The selection against a sort of everything in float64, on the small path and the large one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateurs.errors import InputError
from secateurs.parts import topk
from secateurs.parts.topk import Cut, find_cut, identity, masks_above, select_largest

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def brute_force(
    tensors: Sequence[Tensor], keep: int, transform: Callable[[Tensor], Tensor] = identity
) -> tuple[Cut, list[Tensor]]:
    flat = torch.cat([transform(t).double().reshape(-1) for t in tensors])
    order = flat.sort(descending=True, stable=True).indices
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:keep]] = True
    masks = [
        part.view(t.shape)
        for part, t in zip(mask.split([t.numel() for t in tensors]), tensors, strict=True)
    ]
    if keep == 0:
        return Cut(math.inf, 0), masks
    value = flat[order[keep - 1]].item()
    return Cut(value, keep - int((flat > value).sum())), masks


def check(
    tensors: Sequence[Tensor], keep: int, transform: Callable[[Tensor], Tensor] = identity
) -> None:
    cut, masks = brute_force(tensors, keep, transform)
    assert find_cut(tensors, keep, transform) == cut
    for ours, theirs in zip(select_largest(tensors, keep, transform), masks, strict=True):
        assert ours.dtype is torch.bool
        assert torch.equal(ours, theirs)


@pytest.fixture(params=["side by side", "sampled"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "sampled":
        monkeypatch.setattr(topk, "SMALL", 12)
        monkeypatch.setattr(topk, "CHUNK", 37)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "SMALL", 100)
    monkeypatch.setattr(topk, "CHUNK", 1001)


@pytest.fixture
def sample_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For inputs that one sample has to be enough for."""

    def refuse(scores: topk._Scores, keep: int) -> Cut:
        raise AssertionError("fell back to halving")

    monkeypatch.setattr(topk, "SMALL", 15_000)
    monkeypatch.setattr(topk, "CHUNK", 1001)
    monkeypatch.setattr(topk, "_cut_by_halving", refuse)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=3).map(tuple)
EXTREME = st.sampled_from([0.0, -0.0, math.inf, -math.inf, 1e-40, 6e4, -6e4])
VALUES = {
    "any": st.floats(-6e4, 6e4, width=16),
    "tied": st.integers(-2, 2).map(float),
    "equal": st.just(0.1),
    "zeros": st.one_of(*[st.just(0.0)] * 9, st.floats(-1, 1, width=16)),
    "extreme": EXTREME,
}


@st.composite
def scores(draw: st.DrawFn) -> list[Tensor]:
    values = draw(st.sampled_from(sorted(VALUES)).map(VALUES.__getitem__))
    tensors = []
    for shape in draw(st.lists(SHAPES, min_size=1, max_size=8)):
        count = math.prod(shape)
        flat = draw(st.lists(values, min_size=count, max_size=count))
        tensor = torch.tensor(flat, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))
        tensors.append(tensor.view(shape))
    return tensors


@pytest.mark.usefixtures("path")
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(tensors=scores(), magnitude=st.booleans(), data=st.data())
def test_agrees_with_a_full_sort(tensors: list[Tensor], magnitude: bool, data: st.DataObject):
    total = sum(t.numel() for t in tensors)
    keep = data.draw(st.one_of(st.integers(0, total), st.sampled_from([0, total])))
    check(tensors, keep, torch.abs if magnitude else identity)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(0, 900), min_size=1, max_size=8),
    distinct=st.sampled_from([1, 2, 5, 50, 10**6]),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=8, max_size=8),
    share=st.floats(0, 1),
)
def test_agrees_with_a_full_sort_when_sampled(
    sampled: None,
    seed: int,
    sizes: list[int],
    distinct: int,
    zeros: float,
    dtypes: list[torch.dtype],
    share: float,
):
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for size, dtype in zip(sizes, dtypes, strict=False):
        values = torch.randint(-distinct, distinct + 1, (size,), generator=generator) / distinct
        alive = torch.rand(size, generator=generator) >= zeros
        tensors.append((values * alive).to(dtype))
    check(tensors, round(share * sum(sizes)), torch.abs)


@pytest.mark.usefixtures("sample_only")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0001, 0.1, 0.5, 0.9, 1.0])
def test_a_sample_is_enough_for_normal_weights(dtype: torch.dtype, share: float):
    tensors = [normal(100, 31, seed=1, dtype=dtype), normal(17, 1100, seed=2, dtype=dtype)]
    check(tensors, math.ceil(share * sum(t.numel() for t in tensors)), torch.abs)


@pytest.mark.usefixtures("sample_only")
@pytest.mark.parametrize("extra", [-700, -1, 0, 1, 700])
def test_a_sample_is_enough_around_heavy_ties(extra: int):
    weights = normal(20_000)
    weights[torch.randperm(20_000, generator=torch.Generator().manual_seed(3))[2_000:]] = 0
    check([weights[:5_000], weights[5_000:]], 2_000 + extra, torch.abs)


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [1, 2, 500, 1_999, 2_000])
def test_a_misleading_sample_costs_time_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, keep: int
):
    def misled(scores: topk._Scores, size: int) -> Tensor:
        return torch.linspace(-0.01, 0.01, size, dtype=scores.dtype)

    monkeypatch.setattr(topk._Scores, "sample", misled)
    check([normal(50, 40, dtype=dtype)], keep)


@pytest.mark.usefixtures("sampled")
def test_a_crowded_bracket_is_not_gathered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topk, "GATHERED", 0)
    check([normal(3_000)], 300)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
@pytest.mark.parametrize("keep", [1, 199, 200, 201, 399, 400])
def test_infinite_scores_have_ranks(infinity: float, keep: int):
    scores = normal(400)
    scores[100:300] = infinity
    check([scores], keep)


@pytest.mark.usefixtures("path")
def test_ties_go_to_the_earlier_tensor_and_the_lower_index():
    tensors = [torch.tensor([[1.0, 2.0], [1.0, 1.0]]), torch.ones(30), torch.full((2,), 3.0)]
    masks = select_largest(tensors, 6)
    assert masks[0].tolist() == [[True, True], [True, True]]
    assert masks[1].nonzero().tolist() == []
    assert masks[2].tolist() == [True, True]
    assert select_largest(tensors, 8)[1].nonzero().view(-1).tolist() == [0, 1]


@pytest.mark.usefixtures("path")
def test_ties_are_counted_in_reading_order_whatever_the_layout():
    tensor = torch.zeros(24, 40).t()
    assert not tensor.is_contiguous()
    mask = select_largest([tensor], 30)[0]
    assert mask.is_contiguous()
    assert mask.view(-1)[:30].all()
    assert int(mask.sum()) == 30


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.transpose(0, 2),
        lambda t: t[::2, 1:, ::3],
        lambda t: t[:1, :1].expand(5, 7, -1),
        lambda t: t.permute(1, 2, 0)[..., :3],
        lambda t: t[3, 4, 5],
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.7])
def test_any_layout(layout: Callable[[Tensor], Tensor], share: float):
    tensors = [layout(normal(12, 13, 14)), normal(20, 3)]
    check(tensors, math.ceil(share * sum(t.numel() for t in tensors)))


@pytest.mark.usefixtures("path")
def test_a_cut_between_two_low_precision_values_is_not_rounded_to_them():
    tenth = torch.tensor([0.1], dtype=torch.float64)
    rounded = [tenth.to(dtype).expand(10) for dtype in DTYPES]
    for keep in range(41):
        check(rounded, keep)


def test_masks_of_some_tensors_by_the_cut_of_all():
    half = torch.tensor([0.1, 0.2], dtype=torch.float16)
    cut = find_cut([half, torch.tensor([0.1], dtype=torch.float64)], 2)
    assert cut == Cut(0.1, 1)
    assert masks_above([half], cut)[0].tolist() == [False, True]


@pytest.mark.usefixtures("path")
def test_trained_parameters_and_any_transform():
    parameters = [torch.nn.Parameter(normal(40, seed=s)) for s in range(3)]
    masks = select_largest(parameters, 50, lambda w: -(w.double() ** 2))
    expected = brute_force([p.data for p in parameters], 50, lambda w: -(w.double() ** 2))[1]
    assert all(map(torch.equal, masks, expected))
    assert all(p.grad is None and p.requires_grad for p in parameters)


@pytest.mark.usefixtures("path")
def test_nothing_is_changed():
    tensors = [normal(500), normal(30, 3)]
    before = [t.clone() for t in tensors]
    state = torch.get_rng_state()
    select_largest(tensors, 100, torch.abs)
    assert all(map(torch.equal, tensors, before))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_tensors_and_empty_tensors():
    assert select_largest([], 0) == []
    masks = select_largest([torch.empty(0, 3), torch.empty(0)], 0)
    assert [m.shape for m in masks] == [(0, 3), (0,)]


@pytest.mark.parametrize("keep", [-1, 6])
def test_keep_out_of_range(keep: int):
    with pytest.raises(InputError, match="keep.*0 to 5"):
        find_cut([torch.ones(5)], keep)
