"""Kernels as matrices, ranks by rule and by budget, the nuclear norm: against plain loops."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.low_rank import (
    MODES,
    EnergyRule,
    LinearRule,
    RankPrice,
    ValueRule,
    dematricise,
    energy_before,
    full_rank,
    matricise,
    parse_rule,
    ranks_within,
    spectrum,
    weights_a_rank,
)

SHAPE = (5, 4, 3, 2)


def kernel(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_matrices_hold_the_kernel_where_the_modes_say():
    w = kernel()
    nc, vh, nd = (matricise(w, mode) for mode in MODES)
    for n, c, i, j in itertools.product(*map(range, SHAPE)):
        assert nc[0, n, (c * 3 + i) * 2 + j] == w[n, c, i, j]
        assert vh[0, c * 3 + i, n * 2 + j] == w[n, c, i, j]
        assert nd[n, c, i * 2 + j] == w[n, c, i, j]
    for mode, matrices in zip(MODES, (nc, vh, nd), strict=True):
        assert torch.equal(dematricise(matrices, mode, SHAPE), w)
        assert min(matrices.shape[1:]) == full_rank(SHAPE, mode)


def test_a_linear_weight_is_its_own_matrix():
    w = kernel(shape=(5, 4))
    assert torch.equal(matricise(w, "NC")[0], w)
    assert torch.equal(dematricise(matricise(w, "NC"), "NC", (5, 4)), w)


@pytest.mark.parametrize(("share", "rank"), [(0.6, 1), (0.9, 2), (0.95, 3)])
def test_the_energy_rule_squares(share, rank):
    """13/14 of the energy is in the first two; on values themselves 0.9 would ask for three."""
    assert EnergyRule(share).ranks(torch.tensor([3.0, 2.0, 1.0])) == rank


def test_the_value_rule_stops_at_the_first_small_value():
    values = torch.tensor([[1.0, 0.2, 0.04, 0.06], [0.01, 0.01, 0.01, 0.01]])
    assert ValueRule(0.05).ranks(values).tolist() == [2, 1]
    assert LinearRule(0.6).ranks(values).tolist() == [2, 2]
    assert LinearRule(0.1).ranks(values).tolist() == [1, 1]


def test_a_matrix_of_zeros_has_rank_one():
    zeros = torch.zeros(3)
    assert EnergyRule(0.9).ranks(zeros) == 1
    assert energy_before(zeros).tolist() == [0, 1, 1]


def test_rules_are_written_as_text():
    assert parse_rule("energy:0.9") == EnergyRule(0.9)
    assert parse_rule("value:0.05") == ValueRule(0.05)
    assert parse_rule("linear:1") == LinearRule(1.0)
    for text in ("energy:1", "energy:0", "energy:nan", "linear:0", "value:-1", "energy", "rank:3"):
        with pytest.raises(InputError):
            parse_rule(text)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_lost_is_the_energy_of_what_is_dropped(mode):
    """Eckart and Young; for ND every filter by itself."""
    w, found = kernel(), spectrum(kernel(), mode)
    for rank in range(1, full_rank(SHAPE, mode) + 1):
        lost = (w - found.truncated(rank)).square().sum()
        torch.testing.assert_close(
            lost, found.values[:, rank:].square().sum(), rtol=1e-9, atol=1e-9
        )
    if mode == "ND":
        ranks = torch.tensor([1, 2, 3, 4, 1])
        own = (w - found.truncated(ranks)).square().sum((1, 2, 3))
        for n, rank in enumerate(ranks):
            torch.testing.assert_close(own[n], found.values[n, rank:].square().sum())


@pytest.mark.parametrize("mode", MODES)
def test_cutting_twice_to_one_rank_is_cutting_once(mode):
    once = spectrum(kernel(), mode).truncated(2)
    torch.testing.assert_close(spectrum(once, mode).truncated(2), once, rtol=1e-9, atol=1e-9)
    whole = spectrum(kernel(), mode)
    everything = EnergyRule(0.999999).ranks(whole.values)
    torch.testing.assert_close(whole.truncated(everything), kernel(), rtol=0, atol=1e-5)


def test_one_energy_share_applied_again_cuts_again():
    """Of 100 equal values 0.9 leaves 90, and of those 81: the rule is no projection."""
    values = torch.ones(100)
    assert EnergyRule(0.9).ranks(values) == 90
    assert EnergyRule(0.9).ranks(values[:90]) == 81


@pytest.mark.parametrize("mode", MODES)
def test_the_pull_is_a_subgradient_of_the_nuclear_norm_where_it_was_cut(mode):
    found, ranks = spectrum(kernel(), mode), 2
    pull, cut = found.nuclear_subgradient(ranks), found.truncated(ranks)
    norm = found.values[:, :ranks].sum()
    torch.testing.assert_close((pull * cut).sum(), norm)
    own = torch.linalg.svdvals(matricise(pull, mode))
    torch.testing.assert_close(own[:, :ranks], torch.ones_like(own[:, :ranks]))
    assert float(own[:, ranks:].abs().max()) < 1e-9
    # of a convex function: ‖X‖ ≥ ‖P(W)‖ + <G, X − P(W)> for every X
    for seed in range(1, 6):
        other = kernel(seed)
        bound = norm + (pull * (other - cut)).sum()
        assert torch.linalg.svdvals(matricise(other, mode)).sum() >= bound - 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_at_full_rank_the_pull_is_the_gradient(mode):
    w, step = kernel(), 1e-6
    pull = spectrum(w, mode).nuclear_subgradient(full_rank(SHAPE, mode))
    for place in ((0, 0, 0, 0), (4, 3, 2, 1), (2, 1, 1, 0)):
        ends = []
        for sign in (1, -1):
            moved = w.clone()
            moved[place] += sign * step
            ends.append(torch.linalg.svdvals(matricise(moved, mode)).sum())
        assert float((ends[0] - ends[1]) / (2 * step) - pull[place]) == pytest.approx(0, abs=1e-3)


def test_decompositions_are_made_in_float32_and_given_back_as_they_came():
    found = spectrum(kernel().bfloat16(), "NC")
    assert found.values.dtype == torch.float32
    assert found.truncated(2).dtype == torch.bfloat16
    assert spectrum(kernel(), "NC").values.dtype == torch.float64


def test_ranks_that_are_none_are_refused():
    found = spectrum(kernel(), "NC")
    for rank in (0, 6):
        with pytest.raises(InputError, match="rank: got .*; accepted: 1 to 5"):
            found.truncated(rank)
        with pytest.raises(InputError, match="rank"):
            found.factors(rank)
    with pytest.raises(InputError, match="mode"):
        matricise(kernel(), "XY")
    with pytest.raises(InputError, match="weight"):
        matricise(torch.zeros(3), "NC")


def test_weights_of_the_thin_layers():
    """64 -> 64, 3x3: dense 36,864 a position."""
    shape = (64, 64, 3, 3)
    assert 10 * sum(weights_a_rank(shape, "NC")) == 6400
    assert 10 * sum(weights_a_rank(shape, "VH")) == 3840
    assert 2 * sum(weights_a_rank(shape, "ND")) == 9344
    price = RankPrice(36864, sum(weights_a_rank(shape, "NC")), 64)
    assert price.is_cheaper(57)
    assert not price.is_cheaper(58)
    assert price.at(58) == 36864


def brute_force(values, prices, target):
    """The largest energy share of which all layers' ranks can be paid, by trying them all."""
    shares = sorted({float(e) for own in values.values() for e in energy_before(own).flatten()})
    best = None
    for share in (*shares, 1.5):
        ranks = {
            n: max(1, int((energy_before(own) < share).sum(-1).max())) for n, own in values.items()
        }
        if sum(prices[n].at(r) for n, r in ranks.items()) <= target:
            best = ranks
    return best


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_budget_pays_one_energy_share_and_what_still_fits(seed, share):
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.rand(stack, 5, generator=generator).sort(-1, descending=True).values
        for name, stack in (("a", 1), ("b", 1), ("c", 3))
    }
    prices = {"a": RankPrice(30, 7, 5), "b": RankPrice(100, 31, 5), "c": RankPrice(55, 12, 5)}
    least = sum(p.at(1) for p in prices.values())
    target = least + share * (sum(p.dense for p in prices.values()) - least)
    found = ranks_within(values, prices, target)
    cost = sum(prices[n].at(r) for n, r in found.by_name.items())
    assert found.cost == cost <= target
    assert all(found.by_name[n] >= r for n, r in brute_force(values, prices, target).items())
    nexts = [
        prices[n].at(r + 1) - prices[n].at(r)
        for n, r in found.by_name.items()
        if r < prices[n].most
    ]
    assert found.step == min(nexts, default=0)
    assert not nexts or target - cost < found.step
    if not nexts:
        assert cost == sum(p.dense for p in prices.values())


def test_a_budget_below_rank_one_is_refused():
    with pytest.raises(InputError, match="budget: got '6 for .*; accepted: at least 7"):
        ranks_within({"a": torch.ones(1, 3)}, {"a": RankPrice(30, 7, 3)}, 6)
