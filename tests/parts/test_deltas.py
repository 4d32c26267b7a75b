"""Differences of state dicts, and what is dropped from them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateurs.errors import InputError
from secateurs.parts.deltas import (
    difference,
    largest_masks,
    low_rank_delta,
    random_masks,
    same_bits,
    tied_names,
    unit_shape,
    units_of,
)


def drawn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_differences_are_taken_in_float32_and_float64():
    base = {"a": drawn(0, 3, 2, dtype=torch.bfloat16), "b": drawn(1, 3, dtype=torch.float64)}
    tuned = {"a": drawn(2, 3, 2, dtype=torch.bfloat16), "b": drawn(3, 3, dtype=torch.float64)}
    found = difference(base, tuned, {"a", "b"})
    assert found.values["a"].dtype == torch.float32
    assert torch.equal(found.values["a"], tuned["a"].float() - base["a"].float())
    assert torch.equal(found.values["b"], tuned["b"] - base["b"])
    assert (found.whole, found.rows, found.tied) == ({}, {}, {})


def test_what_is_not_named_comes_whole_and_what_is_equal_not_at_all():
    base = {"a": drawn(0, 3), "same": drawn(1, 3), "head": drawn(2, 2, 3), "count": torch.tensor(1)}
    tuned = {
        "a": drawn(5, 3), "same": drawn(1, 3), "head": drawn(2, 4, 3),
        "count": torch.tensor(2), "new": drawn(6, 2),
    }  # fmt: skip
    found = difference(base, tuned, {"a", "same"})
    assert set(found.values) == {"a"}
    assert set(found.whole) == {"head", "count", "new"}
    assert same_bits(found.whole["head"], tuned["head"])


def test_added_rows_are_apart_and_the_common_ones_subtracted():
    base, tuned = {"emb": drawn(0, 4, 3)}, {"emb": drawn(1, 6, 3)}
    found = difference(base, tuned, {"emb"})
    assert torch.equal(found.values["emb"], tuned["emb"][:4] - base["emb"])
    assert torch.equal(found.rows["emb"], tuned["emb"][4:])


def test_tied_tensors_are_told_by_their_memory():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert tied_names(net.state_dict()) == {"1.weight": "0.weight"}
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict()
    found = difference(base, net.state_dict(), {"0.weight", "1.weight"})
    assert set(found.values) == {"0.weight"}


@pytest.mark.parametrize(
    ("base", "tuned", "message"),
    [
        ({"a": (3, 2), "b": (1,)}, {"a": (3, 2)}, "model: got no tensor 'b'"),
        ({"b": (1,)}, {"a": (3, 2), "b": (1,)}, "base: got no tensor 'a'"),
        ({"a": (3, 2)}, {"a": (3, 3)}, r"weights a: got shape \(3, 3\); .*shape \(3, 2\)"),
        ({"a": (3, 2)}, {"a": (2, 2)}, "or more rows"),
        ({"a": (3,)}, {"a": (3, 1)}, "or more rows"),
    ],
)
def test_what_does_not_fit_is_named(base, tuned, message):
    states = ({n: torch.zeros(s) for n, s in state.items()} for state in (base, tuned))
    with pytest.raises(InputError, match=message):
        difference(*states, {"a"})


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 0.99])
def test_the_kept_share_is_within_four_deviations(p):
    values = {"a": drawn(0, 300, 200), "b": drawn(1, 500)}
    masks = random_masks(values, p, generator())
    for name, mask in masks.items():
        share = float(mask.double().mean())
        assert abs(share - (1 - p)) <= 4 * math.sqrt(p * (1 - p) / values[name].numel())


def test_a_seed_gives_the_same_masks_on_any_device():
    devices = ["cpu", "meta"] + (["cuda"] if torch.cuda.is_available() else [])
    first = random_masks({"a": torch.zeros(50, 4)}, 0.5, generator(3))["a"]
    for device in devices:
        found = random_masks({"a": torch.zeros(50, 4, device=device)}, 0.5, generator(3))["a"]
        assert found.device.type == device
        if device != "meta":
            assert torch.equal(found.cpu(), first)
    half = random_masks({"a": torch.zeros(50, 4, dtype=torch.bfloat16)}, 0.5, generator(3))["a"]
    assert torch.equal(half, first)
    assert not torch.equal(random_masks({"a": first}, 0.5, generator(4))["a"], first)


@pytest.mark.parametrize(("structure", "axis"), [("row", 0), ("column", 1)])
def test_units_go_as_one(structure, axis):
    values = {"a": drawn(0, 40, 30, 3, 3), "bias": drawn(1, 40)}
    masks = random_masks(values, 0.5, generator(), structure)
    moved = masks["a"].movedim(axis, 0).flatten(1)
    assert bool((moved == moved[:, :1]).all())
    assert 0 < int(moved[:, 0].sum()) < len(moved)
    assert 0 < int(masks["bias"].sum()) < 40
    assert unit_shape(values["bias"].shape, structure) == (40,)
    assert units_of(values["a"].shape, structure) == (40, 30)[axis]


@given(st.integers(0, 1000), st.sampled_from(["none", "row", "column"]), st.integers(0, 12))
def test_the_largest_units_stay(seed, structure, count):
    score = drawn(seed, 4, 3).abs()
    units = {"none": score.flatten(), "row": score.sum(1), "column": score.sum(0)}[structure]
    count = min(count, units.numel())
    mask = largest_masks({"a": score}, {"a": count}, structure)["a"]
    kept = units >= units.sort(descending=True).values[count - 1] if count else units < 0
    shape = unit_shape(score.shape, structure)
    assert torch.equal(mask, kept.reshape(shape).expand(4, 3))


def test_an_adapters_delta_and_its_ranks():
    down, up = drawn(0, 3, 5, dtype=torch.float64), drawn(1, 4, 3, dtype=torch.float64)
    assert torch.allclose(low_rank_delta(down, up, 2.0), 2 * up @ down)
    kept = torch.tensor([True, False, True])
    expected = 2 / 0.5 * sum(torch.outer(up[:, r], down[r]) for r in (0, 2))
    assert torch.allclose(low_rank_delta(down, up, 2.0, kept, 0.5), expected)
    masks = random_masks({"ranks": torch.zeros(20_000, 3)}, 0.5, generator())["ranks"]
    counts = {tuple(m.tolist()): 0 for m in masks[:0]}
    for mask in masks:
        counts[tuple(mask.tolist())] = counts.get(tuple(mask.tolist()), 0) + 1
    mean = sum(
        n * low_rank_delta(down, up, 1.0, torch.tensor(m), 0.5) for m, n in counts.items()
    ) / len(masks)
    assert torch.allclose(mean, up @ down, atol=0.1)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="p: got 1.0"):
        random_masks({"a": torch.zeros(2)}, 1.0, generator())
    with pytest.raises(InputError, match="adapter"):
        low_rank_delta(torch.zeros(3, 5), torch.zeros(4, 2))
    with pytest.raises(InputError, match="q: got 0"):
        low_rank_delta(torch.zeros(3, 5), torch.zeros(4, 3), q=0)
