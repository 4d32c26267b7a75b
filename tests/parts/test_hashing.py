"""Hashes against big integers, maps against their definition, gradient divisors by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.hashing import (
    PRIME,
    UniversalHash,
    fold,
    gradient_divisors,
    independent,
    loads,
    tiled,
)


@given(
    st.integers(0, 2**31), st.lists(st.integers(0, 10**9), min_size=1), st.integers(1, PRIME - 1)
)
@settings(max_examples=60, deadline=None)
def test_hashes_are_exact_for_large_locations(seed, xs, size):
    """The quadratic term alone would be 2e27, beyond int64."""
    u = UniversalHash.drawn(seed)
    found = u(torch.tensor(xs), size).tolist()
    assert found == [((u.a * x + u.b * x * x + u.c) % PRIME) % size for x in xs]
    pairs = u.of_pair(torch.tensor(xs), torch.tensor(xs[::-1]), size).tolist()
    assert pairs == [
        ((u.a * x + u.b * y + u.c) % PRIME) % size for x, y in zip(xs, xs[::-1], strict=True)
    ]
    signs = u.signs(torch.tensor(xs)).tolist()
    assert signs == [2 * ((u.a * x + u.b * x * x + u.c) % PRIME % 2) - 1 for x in xs]


def test_a_seed_is_a_function():
    drawn = {UniversalHash.drawn(seed) for seed in range(50)}
    assert len(drawn) == 50
    assert UniversalHash.drawn(3) == UniversalHash.drawn(3)
    for u in drawn:
        assert all(1 < v < PRIME and v % 2 for v in (u.a, u.b, u.c))


def test_signs_are_balanced():
    signs = UniversalHash.drawn(0).signs(torch.arange(100_000)).double()
    assert abs(float(signs.mean())) < 5 / math.sqrt(100_000)


class Given(UniversalHash):
    """u(0), u(1), u(2) as in the worked map of the card."""

    def __call__(self, x, size):
        return torch.tensor([1, 3, 0])[x]


def test_the_worked_map():
    slots = fold(torch.arange(10), 4, Given(3, 3, 3))
    assert slots.tolist() == [1, 2, 3, 0, 3, 0, 1, 2, 0, 1]
    assert loads([slots[:6], slots[6:]], 4).tolist() == [3, 3, 2, 2]


@given(st.integers(0, 2**31), st.integers(1, 3000), st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_a_fold_loads_all_slots_alike(seed, n, size):
    found = loads([fold(torch.arange(n), size, UniversalHash.drawn(seed))], size)
    assert int(found.sum()) == n
    assert int(found.max() - found.min()) <= 1


def test_loads_of_the_card():
    u = UniversalHash.drawn(0)
    assert set(loads([fold(torch.arange(25_856), 2585, u)], 2585).tolist()) == {10, 11}


def test_as_many_slots_as_weights():
    """A fold is one to one; hashes by themselves leave 1/e of the slots unused."""
    n, u = 25_856, UniversalHash.drawn(1)
    assert torch.equal(fold(torch.arange(n), n, u).sort().values, torch.arange(n))
    used = independent(torch.arange(n), n, u).unique().numel() / n
    assert used == pytest.approx(1 - 1 / math.e, abs=0.01)


def test_tiles_lie_together_and_reach_every_slot():
    u, block, size = UniversalHash.drawn(5), (2, 3), 11
    rows, columns = torch.meshgrid(torch.arange(400), torch.arange(6), indexing="ij")
    slots = tiled(rows, columns, size, u, block)
    for top in range(0, 400, 2):
        for left in (0, 3):
            tile = slots[top : top + 2, left : left + 3]
            start = int(u.of_pair(torch.tensor(top // 2), torch.tensor(left // 3), size - 5))
            assert tile.flatten().tolist() == list(range(start, start + 6))
    assert slots.unique().tolist() == list(range(size))


def test_divisors_of_the_card():
    """λ = 1 and 3 in one slot: γ = 16/2.001; three times λ = 2: 36/3.001."""
    one = torch.tensor([0])
    mixed = gradient_divisors([(one, 1.0), (one, 3.0)], 2)
    assert mixed.tolist() == [16 / 2.001, 0.0]
    assert -0.1 / (float(mixed[0]) + 1e-6) == pytest.approx(-0.012506, abs=1e-6)
    equal = gradient_divisors([(torch.tensor([0, 0, 0]), 2.0)], 1)
    assert equal.tolist() == [36 / 3.001]
    # the weights move by λ · η · 1.8/γ, which is η times the mean of 0.3, 0.6 and 0
    assert 2 * 1.8 / float(equal[0]) == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("v2", 4.0), ("v3", 2.0), ("v4", math.sqrt(10)), ("v5", 10.0), ("none", 1.0)],
)
def test_the_other_divisors(mode, expected):
    one = torch.tensor([0])
    found = gradient_divisors([(one, 1.0), (one, 3.0)], 2, mode)
    assert found[0] == pytest.approx(expected)
    assert torch.isfinite(found).all()


def test_one_to_one_divisors():
    n = 100
    slots = fold(torch.arange(n), n, UniversalHash.drawn(2))
    torch.testing.assert_close(
        gradient_divisors([(slots, 0.5)], n), torch.full((n,), 0.25 / 1.001).double()
    )


def test_even_or_large_coefficients_are_refused():
    for values in ((2, 3, 5), (3, PRIME, 5), (3, 3, 1)):
        with pytest.raises(InputError, match="hash"):
            UniversalHash(*values)
