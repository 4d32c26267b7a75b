"""The language of promises: what it accepts, what it refuses, and how many weights it means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.parts.budgets import Budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("sparsity=0.9", Budget("sparsity", 0.9)),
        ("sparsity=0", Budget("sparsity", 0.0)),
        ("  Sparsity = 9e-1 ", Budget("sparsity", 0.9)),
        ("density=1", Budget("density", 1.0)),
        ("keep=.25", Budget("keep", 0.25)),
        ("params=0.3", Budget("params", 0.3)),
        ("params=2M", Budget("params", 2e6, relative=False)),
        ("params=2e6", Budget("params", 2e6, relative=False)),
        ("params=0.5k", Budget("params", 500.0, relative=False)),
        ("macs=1", Budget("macs", 1.0)),
        ("macs=3G", Budget("macs", 3e9, relative=False)),
        ("bytes=10MB", Budget("bytes", 1e7, relative=False)),
        ("bytes=2KiB", Budget("bytes", 2048.0, relative=False)),
        ("latency=0.6", Budget("latency", 0.6)),
        ("latency=8ms", Budget("latency", 8e-3, relative=False)),
        ("2:4", Budget("n:m", 0.5, True, 2, 4)),
        (" 1 : 8 ", Budget("n:m", 0.125, True, 1, 8)),
        ("4:4", Budget("n:m", 1.0, True, 4, 4)),
    ],
)
def test_parses(text, budget):
    assert Budget.parse(text) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.9",
        "90%",
        "sparsity",
        "sparsity=",
        "=0.9",
        "sparsity:0.9",
        "sparsity=0.9 density=0.1",
        "sparsity=0.9.1",
        "sparsity=--1",
        "sparsity=e",
        "sparsity=nan",
        "sparsity=1",
        "sparsity=-0.1",
        "sparsity=0.9M",
        "density=0",
        "density=1.1",
        "keep=0",
        "keep=2",
        "params=0",
        "params=-2M",
        "params=2X",
        "params=inf",
        "params=1e999",
        "macs=2MB",
        "bytes=2q",
        "latency=8",
        "latency=8min",
        "0:4",
        "4:2",
        "2:4:8",
        "2:",
        "-2:4",
        "2:0",
    ],
)
def test_malformed_text_is_refused_by_name(text):
    with pytest.raises(InputError, match=r"^budget: got ") as caught:
        Budget.parse(text)
    assert caught.value.argument == "budget"
    assert caught.value.value == text


@pytest.mark.parametrize("value", [None, 0.9, 2, ["sparsity=0.9"]])
def test_what_is_not_text_is_refused(value):
    with pytest.raises(InputError, match="sparsity=0.9, density=0.1"):
        Budget.parse(value)


def test_an_unknown_kind_suggests_the_closest():
    with pytest.raises(InputError, match="did you mean 'sparsity'") as caught:
        Budget.parse("sparcity=0.9")
    assert caught.value.argument == "budget"


fractions = st.floats(1e-6, 1 - 1e-6)
texts = st.one_of(
    st.builds("{}={!r}".format, st.sampled_from(["sparsity", "density", "keep"]), fractions),
    st.builds("{}={!r}".format, st.sampled_from(["params", "macs", "bytes", "latency"]), fractions),
    st.builds("params={}{}".format, st.integers(2, 10**9), st.sampled_from(["", "k", "M"])),
    st.builds("bytes={}{}".format, st.integers(2, 10**6), st.sampled_from(["kB", "MiB"])),
    st.builds("params={!r}k".format, st.floats(0.1, 999)),
    st.integers(1, 32).flatmap(lambda m: st.builds("{}:{}".format, st.integers(1, m), st.just(m))),
)


@given(texts)
def test_a_budget_is_written_so_that_it_reads_back_the_same(text):
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget


def test_a_latency_reads_back_the_same():
    for text in ("latency=8ms", "latency=0.05ms", "latency=12us", "latency=2s"):
        budget = Budget.parse(text)
        assert Budget.parse(str(budget)).value == pytest.approx(budget.value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "prunable", "fixed", "kept"),
    [
        ("sparsity=0.9", 266200, 0, 26620),
        ("sparsity=0.5", 10, 0, 5),
        ("sparsity=0", 7, 3, 7),
        ("density=0.1", 1000, 50, 100),
        ("density=1", 7, 3, 7),
        ("2:4", 1024, 10, 512),
        ("params=0.5", 900, 100, 400),
        ("params=1", 900, 100, 900),
        ("params=300", 900, 100, 200),
        ("params=100", 900, 100, 0),
        ("params=5k", 900, 100, 900),
    ],
)
def test_kept_weights(text, prunable, fixed, kept):
    assert Budget.parse(text).kept(prunable, fixed) == kept


@given(fractions, st.integers(1, 10**7))
def test_kept_weights_are_right_to_half_a_weight(fraction, prunable):
    removed = prunable - Budget("sparsity", fraction).kept(prunable)
    assert abs(removed - fraction * prunable) <= 0.5
    assert abs(Budget("density", fraction).kept(prunable) - fraction * prunable) <= 0.5


@given(fractions, st.integers(1, 10**6), st.integers(0, 10**4))
def test_sparsity_is_what_kept_leaves(fraction, prunable, fixed):
    budget = Budget("sparsity", fraction)
    removed = prunable - budget.kept(prunable, fixed)
    assert budget.sparsity(prunable, fixed) == pytest.approx(removed / prunable, abs=1e-12)


def test_fewer_parameters_than_are_fixed_is_refused_with_the_least():
    with pytest.raises(InputError, match="params of at least 101: 100 of the model's 1000"):
        Budget.parse("params=50").kept(900, 100)


@pytest.mark.parametrize("text", ["keep=0.5", "macs=0.5", "bytes=1MB", "latency=3ms"])
def test_kinds_that_say_nothing_about_weights_are_refused(text):
    with pytest.raises(InputError, match="sparsity=, density= or params="):
        Budget.parse(text).kept(100)
