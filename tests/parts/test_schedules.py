"""Sparsity ramps: the values of the papers, exact ends, and that they only rise."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.schedules import (
    SCHEDULES,
    Constant,
    CosineDecay,
    Cubic,
    Exponential,
    Linear,
    rate_for,
    schedule,
)


@pytest.mark.parametrize(
    ("step", "sparsity"),
    [(0, 0.0), (10, 0.2439), (25, 0.5203), (50, 0.7875), (75, 0.8859), (90, 0.8991), (100, 0.9)],
)
def test_cubic_values_of_the_gmp_card(step, sparsity):
    assert Cubic(0.9, 0, 100)(step) == pytest.approx(sparsity, abs=5e-5)


def test_cubic_from_half_of_the_gmp_card():
    assert Cubic(0.9, 0, 100, initial=0.5)(50) == pytest.approx(0.85, abs=1e-12)


@pytest.mark.parametrize(("step", "sparsity"), [(0, 0.5), (5, 0.85), (9, 0.8996)])
def test_ramp_values_of_the_granet_card(step, sparsity):
    assert Cubic(0.9, 0, 10, initial=0.5)(step) == pytest.approx(sparsity, abs=1e-12)


@pytest.mark.parametrize(("share", "rate"), [(0.0, 0.5), (0.5, 0.2525), (1.0, 0.005)])
def test_exchange_rate_values_of_the_granet_card(share, rate):
    decay = CosineDecay(0.5, 1000, floor=0.005)
    assert decay(int(share * 1000)) == pytest.approx(rate, abs=1e-12)


def test_the_exchange_rate_stays_at_its_floor_afterwards():
    assert CosineDecay(0.5, 10, floor=0.1)(11) == pytest.approx(0.1)
    assert CosineDecay(0.5, 0, floor=0.1)(0) == pytest.approx(0.1)


@pytest.mark.parametrize("step", [0, 1, 17, 50, 99, 100, 200])
def test_power_one_is_linear(step):
    assert Cubic(0.9, 0, 100, power=1)(step) == pytest.approx(Linear(0.9, 0, 100)(step))
    assert Linear(0.9, 0, 100)(step) == pytest.approx(0.9 * min(step, 100) / 100)


def test_cosine_is_half_way_in_the_middle():
    ramp = schedule("cosine", final=0.8, begin=10, end=30, initial=0.2)
    assert ramp(20) == pytest.approx(0.5)
    assert ramp(15) == pytest.approx(0.2 + 0.6 * (1 - math.cos(math.pi / 4)) / 2)


def test_exponential_removes_the_same_share_of_survivors_at_each_step():
    ramp = Exponential(0.9, 0, 5, initial=0.2)
    shares = [(1 - ramp(t + 1)) / (1 - ramp(t)) for t in range(5)]
    assert shares == pytest.approx([(0.1 / 0.8) ** 0.2] * 5)


def test_constant_jumps_at_begin_and_updates_once():
    ramp = Constant(0.9, begin=3, end=3, initial=0.1)
    assert [ramp(t) for t in range(5)] == [0.1, 0.1, 0.1, 0.9, 0.9]
    assert [t for t in range(9) if ramp.updates(t)] == [3]


ramps = st.builds(
    lambda name, ends, begin, length, frequency: schedule(
        name,
        initial=min(ends),
        final=max(ends),
        begin=begin,
        end=begin + length,
        frequency=frequency,
    ),
    st.sampled_from(sorted(SCHEDULES)),
    st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    st.integers(0, 50),
    st.integers(0, 100),
    st.integers(1, 40),
)


@given(ramps)
def test_ramps_only_rise_and_stay_between_their_ends(ramp):
    values = [ramp(t) for t in range(ramp.end + 10)]
    assert all(late >= early - 1e-15 for early, late in pairwise(values))
    assert min(values) >= ramp.initial - 1e-15
    assert max(values) == ramp.final


@given(ramps)
def test_ramps_hold_their_ends_exactly_outside_the_window(ramp):
    assert all(ramp(t) == ramp.final for t in (ramp.end, ramp.end + 1, ramp.end + 1000))
    assert all(ramp(t) == pytest.approx(ramp.initial) for t in range(ramp.begin))


@given(ramps, st.floats(0, 0.99))
def test_equal_ends_are_constant(ramp, sparsity):
    flat = type(ramp)(sparsity, ramp.begin, ramp.end, initial=sparsity)
    assert [flat(t) for t in range(ramp.end + 2)] == pytest.approx([sparsity] * (ramp.end + 2))


@given(ramps)
def test_the_last_update_lands_on_the_target_whatever_the_frequency(ramp):
    updates = [t for t in range(ramp.end + 50) if ramp.updates(t)]
    assert updates[0] == ramp.begin
    assert ramp(updates[-1]) == ramp.final
    if not isinstance(ramp, Constant):
        assert updates[-1] == ramp.end


def test_updates_of_the_gmp_card_end_at_the_target():
    ramp = Cubic(0.9, 0, 100, frequency=30)
    updates = [t for t in range(200) if ramp.updates(t)]
    assert updates == [0, 30, 60, 90, 100]
    assert ramp(90) == pytest.approx(0.8991)
    assert ramp(updates[-1]) == 0.9


@pytest.mark.parametrize(
    ("fields", "argument"),
    [
        ({"final": 1.0}, "final"),
        ({"final": -0.1}, "final"),
        ({"final": 0.5, "initial": 1.0}, "initial"),
        ({"final": 0.5, "initial": -1.0}, "initial"),
        ({"final": 0.5, "begin": -1}, "begin"),
        ({"final": 0.5, "begin": 3, "end": 2}, "end"),
        ({"final": 0.5, "frequency": 0}, "frequency"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, argument):
    with pytest.raises(InputError) as caught:
        schedule("cubic", **fields)
    assert caught.value.argument == argument


@pytest.mark.parametrize("power", [0.0, -1.0])
def test_a_power_that_does_not_rise_is_refused(power):
    with pytest.raises(InputError, match="power"):
        Cubic(0.9, 0, 10, power=power)


def test_an_unknown_schedule_suggests_the_closest():
    with pytest.raises(InputError, match="did you mean 'cubic'"):
        schedule("cubik", final=0.9)


@given(st.floats(0.001, 1), st.integers(1, 40))
def test_rounds_at_the_rate_leave_the_density(density, rounds):
    assert (1 - rate_for(density, rounds)) ** rounds == pytest.approx(density)


@pytest.mark.parametrize(("density", "rounds"), [(0.0, 3), (1.1, 3), (0.5, 0)])
def test_impossible_rates_are_refused(density, rounds):
    with pytest.raises(InputError):
        rate_for(density, rounds)
