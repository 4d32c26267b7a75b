"""Curves against brute force, stencils against polynomials."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.curves import (
    Curve,
    envelope,
    equal_slopes,
    lagrangian,
    lower_hull,
    moving_average,
    slopes,
)


def curve(saved, loss, last=None, units=None):
    points = len(saved)
    return Curve(
        torch.linspace(0, 1, points, dtype=torch.float64),
        torch.arange(points) if units is None else torch.tensor(units),
        torch.tensor(saved, dtype=torch.float64),
        torch.tensor(loss, dtype=torch.float64),
        points - 1 if last is None else last,
    )


def test_the_envelope_never_falls_and_lies_above():
    y = torch.tensor([0.0, 2, 1, 3, 2.5])
    assert envelope(y).tolist() == [0, 2, 2, 3, 3]


def test_the_moving_average_by_hand():
    y = torch.tensor([4.0, 0, 2], dtype=torch.float64)
    # averages 2, 1, 1.5 over weights that so far sum to 0.5, 0.75, 0.875
    expected = torch.tensor([2 / 0.5, 1 / 0.75, 1.5 / 0.875], dtype=torch.float64)
    assert torch.allclose(moving_average(y, 0.5), expected, atol=1e-15)
    assert torch.equal(moving_average(y, 0.0), y)
    with pytest.raises(InputError, match="smooth"):
        moving_average(y, 1.0)


@given(
    st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    st.sampled_from([2, 4, 8]),
    st.integers(9, 40),
)
def test_the_stencil_is_exact_on_cubics(coefficients, half, points):
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    a, b, c, d = coefficients
    y = a + b * x + c * x**2 + d * x**3
    error = (slopes(x, y, half) - (b + 2 * c * x + 3 * d * x**2)).abs()
    assert float(error[2:-2].max()) < 1e-9


def test_slopes_at_the_ends_are_those_of_two_points():
    x = torch.linspace(0, 1, 11, dtype=torch.float64)
    y = x**2
    assert float(slopes(x, y)[0]) == pytest.approx(0.1)
    assert float(slopes(x, y)[-1]) == pytest.approx(1.9)
    with pytest.raises(InputError, match="half"):
        slopes(x, y, 3)
    with pytest.raises(InputError, match="points"):
        slopes(x[:1], y[:1])


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=9))
def test_the_hull_holds_what_some_straight_line_touches(values):
    """A point is on the lower hull if for some price it is the cheapest."""
    x = list(range(len(values)))
    corners = lower_hull(x, values)
    assert corners[0] == 0
    assert corners[-1] == len(values) - 1
    for a, b in itertools.pairwise(corners):
        for i in x:
            # no point lies below an edge that is continued
            assert (values[i] - values[a]) * (b - a) >= (values[b] - values[a]) * (i - a)


def test_of_points_at_one_place_the_lowest_counts():
    assert lower_hull([0, 1, 1, 2], [0, 5, 0.5, 2]) == [0, 2, 3]


convex = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(
    lambda steps: list(itertools.accumulate(sorted(steps), initial=0))
)


@settings(deadline=None)
@given(st.lists(convex, min_size=1, max_size=3), st.data())
def test_lagrangian_is_optimal_on_convex_curves_of_equal_units(losses, data):
    """Against all ways to remove so many units."""
    curves = {str(i): curve(range(len(y)), y) for i, y in enumerate(losses)}
    most = sum(len(y) - 1 for y in losses)
    saving = data.draw(st.integers(0, most))
    given_up = lagrangian(curves, saving)
    assert sum(given_up.values()) == saving
    best = min(
        sum(y[k] for y, k in zip(losses, counts, strict=True))
        for counts in itertools.product(*(range(len(y)) for y in losses))
        if sum(counts) == saving
    )
    assert sum(losses[int(n)][k] for n, k in given_up.items()) == best


def test_lagrangian_is_where_a_bisection_on_the_multiplier_ends():
    generator = torch.Generator().manual_seed(0)
    curves = {}
    for i in range(5):
        loss = torch.rand(21, generator=generator, dtype=torch.float64).cumsum(0)
        loss = loss - loss[0]
        curves[str(i)] = curve([k * (i + 1.0) for k in range(21)], loss.tolist())
    saving = 137.0

    def best(price):
        # raising the price of cost by a hair above an edge takes its far corner
        return {n: int((c.loss - price * c.saved).argmin()) for n, c in curves.items()}

    low, high = -40.0, 40.0
    for _ in range(200):
        middle = (low + high) / 2
        saved = sum(float(curves[n].saved[k]) for n, k in best(2.0**middle).items())
        low, high = (middle, high) if saved < saving else (low, middle)
    below, above = best(2.0**low), best(2.0**high)
    found = lagrangian(curves, saving)
    differing = [n for n in curves if found[n] != below[n]]
    assert len(differing) <= 1
    for n in differing:
        assert below[n] <= found[n] <= above[n]
    saved = sum(float(curves[n].saved[k]) for n, k in found.items())
    assert abs(saved - saving) <= 5 / 2


def test_lagrangian_passes_over_what_is_not_convex():
    # the first step is dear, both together are cheap
    curves = {"hill": curve([0, 1, 2], [0, 5, 5.5]), "slope": curve([0, 1, 2], [0, 3, 6])}
    assert lagrangian(curves, 2) == {"hill": 2, "slope": 0}
    assert lagrangian(curves, 3) == {"hill": 2, "slope": 1}


def test_of_two_equal_layers_the_costlier_gives_up_at_least_as_much():
    loss = [k**2 for k in range(11)]
    curves = {"cheap": curve(range(11), loss), "dear": curve([2 * k for k in range(11)], loss)}
    for saving in range(1, 30):
        found = lagrangian(curves, saving)
        assert found["dear"] >= found["cheap"], saving


def test_no_curve_goes_beyond_its_last_point():
    curves = {"a": curve(range(6), [0] * 6, last=2), "b": curve(range(6), range(6), last=4)}
    assert lagrangian(curves, 6) == {"a": 2, "b": 4}
    for solver in (lagrangian, lambda c, s: equal_slopes(c, s, tolerance=0.1)):
        with pytest.raises(InputError, match="saving: got 7; accepted: at most 6"):
            solver(curves, 7)


def test_nothing_is_given_up_for_nothing_even_where_it_would_pay():
    curves = {"a": curve(range(3), [0, -1, -2])}
    assert lagrangian(curves, 0) == {"a": 0}
    assert equal_slopes(curves, 0, tolerance=0.5) == {"a": 0}


def test_equal_slopes_ends_where_the_curves_are_equally_steep():
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    # slopes 2a and 8a: at one price the first gives up four times as much
    curves = {
        "flat": curve(range(101), (x**2).tolist()),
        "steep": curve(range(101), (4 * x**2).tolist()),
    }
    found = equal_slopes(curves, 100, tolerance=1)
    assert abs(sum(found.values()) - 100) <= 1
    assert found["flat"] == pytest.approx(4 * found["steep"], abs=4)


def test_equal_slopes_does_not_look_at_costs():
    """The pitfall that the Lagrangian avoids: a dear layer gives up as much as a cheap one."""
    x = torch.linspace(0, 1, 101, dtype=torch.float64)
    loss = (x**2).tolist()
    curves = {"cheap": curve(range(101), loss), "dear": curve([3 * k for k in range(101)], loss)}
    found = equal_slopes(curves, 200, tolerance=2)
    assert found["cheap"] == found["dear"] == 50
    weighed = lagrangian(curves, 200)
    assert weighed["dear"] == pytest.approx(3 * weighed["cheap"], abs=4)
