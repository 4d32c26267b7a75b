"""Numbers as people read them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.report import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (61_706, "61.7k"),
        (999_499, "999k"),
        (999_999, "1.00M"),
        (2_210_000, "2.21M"),
        (7e9, "7G"),
        (851.2, "851"),
        (-1500, "−1.50k"),
        (math.nan, "not a number"),
        (None, "–"),
    ],
)
def test_count(value, text):
    assert numbers.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(812, "812 B"), (246_100, "246 kB"), (2_214_000, "2.21 MB"), (None, "–")]
)
def test_size(value, text):
    assert numbers.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.95, "95.0 %"),
        (0.05, "5.0 %"),
        (0.01, "1.0 %"),
        (0.0051, "0.51 %"),
        (0.9995, "99.950 %"),
        (0.0004, "0.040 %"),
        (None, "–"),
    ],
)
def test_share(value, text):
    assert numbers.share(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1×"), (1.0234, "1.02×"), (20, "20×"), (133.3, "133×"), (4e4, "40k×")]
)
def test_factor(value, text):
    assert numbers.factor(value) == text


@pytest.mark.parametrize(
    ("median", "low", "high", "text"),
    [
        (4.1, 3.9, 4.3, "4.1 ms ± 0.2"),
        (0.0213, 0.0209, 0.0217, "0.0213 ms ± 0.0004"),
        (123.4, 100.0, 140.0, "123 ms ± 20"),
        (4.0, 3.0, 4.99, "4 ms ± 1"),
        (8.0, 8.0, 8.0, "8.00 ms"),
    ],
)
def test_latency(median, low, high, text):
    assert numbers.latency({"median": median, "low": low, "high": high, "repeats": 3}) == text


def test_a_spread_wider_than_the_median_does_not_round_it_away():
    wide = {"median": 0.29, "low": 0.24, "high": 4.04, "repeats": 30}
    assert numbers.latency(wide) == "0.3 ms ± 1.9"


def test_latency_that_was_not_measured():
    assert numbers.latency(None) == numbers.milliseconds(None) == "–"


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.978, "accuracy", "97.8 %"),
        (0.9, "early_stop_accuracy", "90.0 %"),
        (0.5, "top-5", "0.5"),
        (0.5, "top5", "50.0 %"),
        (12.345, "perplexity", "12.35"),
        (0.5, "loss", "0.5"),
        (None, "accuracy", "–"),
    ],
)
def test_quality(value, metric, text):
    assert numbers.quality(value, metric) == text


def test_differences_have_points_for_shares_and_a_real_minus():
    assert numbers.difference(0.978, 0.984, "accuracy") == "−0.6 points"
    assert numbers.difference(0.984, 0.9841, "accuracy") == "no change"
    assert numbers.difference(12.5, 11.0, "perplexity") == "+1.5"
    assert numbers.quality_interval(0.971, 0.004, "accuracy") == "97.1 % ± 0.4"
    assert numbers.quality_interval(12.0, 0.25, "perplexity") == "12 ± 0.25"
    assert numbers.quality_interval(0.971, None, "accuracy") == "97.1 %"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (41.4, "41 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (3900, "1 h 5 min"),
        (7200, "2 h"),
        (None, "–"),
    ],
)
def test_duration(seconds, text):
    assert numbers.duration(seconds) == text


def test_cells_follow_the_name_of_their_column():
    assert numbers.named("density", 0.0512) == "5.1 %"
    assert numbers.named("macs", 17_000) == "17k"
    assert numbers.named("accuracy", 0.5) == "50.0 %"
    assert numbers.named("round", 3) == "3"
    assert numbers.named("kept", True) == "yes"
    assert numbers.named("loss", math.inf) == "∞"
    assert numbers.named("names", ["a", "b"]) == "a, b"


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_no_float_is_refused(value):
    for show in (numbers.count, numbers.plain, numbers.factor):
        assert show(value)
    assert "e" not in numbers.count(value) or math.isnan(value) or abs(value) > 1e17


@given(st.floats(min_value=1, max_value=1e15))
def test_three_digits_are_right(value):
    text = numbers.count(value)
    power = "kMGTP".find(text[-1]) + 1
    number = float(text if power == 0 else text[:-1]) * 1000.0**power
    assert number == pytest.approx(value, rel=0.0051)
