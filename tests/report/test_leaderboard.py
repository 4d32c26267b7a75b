"""Means, intervals, ranks and ties against closed forms and scipy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from secateurs.errors import InputError
from secateurs.report.leaderboard import leaderboard, row_of, t_quantile, tied


def rows(qualities, budget="sparsity=0.9", task="net on data", metric="accuracy", higher=True):
    return [
        {
            "method": label, "label": label, "task": task, "budget": budget, "seed": seed,
            "quality": quality, "metric": metric, "higher_is_better": higher, "sparsity": 0.9,
            "parameters": 1000, "nonzero": 100, "macs": 500, "effective_macs": 50 + seed,
            "bytes": 400, "latency_ms": None, "seconds": 2.0,
        }
        for label, values in qualities.items()
        for seed, quality in enumerate(values)
    ]  # fmt: skip


def test_t_quantiles_of_the_tables():
    assert t_quantile(1) == pytest.approx(12.7062, abs=1e-4)
    assert t_quantile(2) == pytest.approx(4.3027, abs=1e-4)
    assert t_quantile(4) == pytest.approx(2.7764, abs=1e-4)
    assert t_quantile(1e9) == pytest.approx(1.959964, abs=1e-5)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_interval_is_that_of_scipy(values):
    (entry,) = leaderboard(rows({"a": values}))
    assert entry["seeds"] == len(values)
    assert entry["mean"] == pytest.approx(np.mean(values))
    assert entry["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    if np.std(values) > 1e-6:
        error = stats.sem(values)
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        assert (entry["low"], entry["high"]) == pytest.approx((low, high))


values = st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=2, max_size=6)


@pytest.mark.filterwarnings("ignore:Precision loss")
@given(values, values)
def test_tied_is_welchs_test_at_five_percent(first, second):
    board = leaderboard(rows({"a": first, "b": second}))
    if np.ptp(first) + np.ptp(second) == 0:
        assert board[1]["tied"] == (first[0] == second[0])
        return
    p = stats.ttest_ind(first, second, equal_var=False).pvalue
    if abs(p - 0.05) > 1e-6:
        assert board[1]["tied"] == (p > 0.05)


def test_best_first_and_equal_means_share_a_rank():
    board = leaderboard(rows({"c": [0.5], "a": [0.9], "b": [0.9], "d": [0.1]}))
    assert [(e["label"], e["rank"]) for e in board] == [("a", 1), ("b", 1), ("c", 3), ("d", 4)]
    board = leaderboard(rows({"a": [9.0], "b": [3.0]}, metric="perplexity", higher=False))
    assert [e["label"] for e in board] == ["b", "a"]


def test_one_seed_has_no_interval_and_no_verdict():
    best, other = leaderboard(rows({"a": [0.9], "b": [0.5, 0.6]}))
    assert best["std"] is best["low"] is best["high"] is None
    assert best["tied"] is True
    assert other["tied"] is None


def test_groups_are_ranked_each_by_itself():
    both = rows({"a": [0.9], "b": [0.8]}) + rows({"a": [0.3], "b": [0.4]}, budget="sparsity=0.99")
    board = leaderboard(both)
    assert [(e["budget"], e["label"], e["rank"]) for e in board] == [
        ("sparsity=0.9", "a", 1), ("sparsity=0.9", "b", 2),
        ("sparsity=0.99", "b", 1), ("sparsity=0.99", "a", 2),
    ]  # fmt: skip


def test_costs_are_means_and_what_was_not_measured_stays_none():
    (entry,) = leaderboard(rows({"a": [0.9, 0.8, 0.7]}))
    assert entry["effective_macs"] == 51
    assert entry["latency_ms"] is None
    assert entry["promise_kept"] is None
    assert entry["dense_quality"] is None
    given = [
        {**row, "promise_kept": seed < 2, "dense_quality": 0.95, "latency_ms": seed or None}
        for seed, row in enumerate(rows({"a": [0.9, 0.8, 0.7]}))
    ]
    (entry,) = leaderboard(given)
    assert entry["promise_kept"] is False
    assert entry["dense_quality"] == pytest.approx(0.95)
    assert entry["latency_ms"] == 1.5


def test_a_diverged_method_comes_last():
    board = leaderboard(rows({"a": [math.nan, 0.9], "b": [0.2, 0.3]}))
    assert [e["label"] for e in board] == ["b", "a"]
    assert board[1]["tied"] is False


def test_no_rows_no_board():
    assert leaderboard([]) == []


def test_refusals():
    with pytest.raises(InputError, match=r"rows\[0\].*'seed'"):
        leaderboard([{k: v for k, v in rows({"a": [1.0]})[0].items() if k != "seed"}])
    with pytest.raises(InputError, match="one metric a task"):
        leaderboard(rows({"a": [1.0]}) + rows({"b": [1.0]}, metric="f1"))


def test_equal_seeds_of_different_number_are_equal():
    board = leaderboard(rows({"a": [0.003] * 2, "b": [0.003] * 3}))
    assert [(e["rank"], e["tied"]) for e in board] == [(1, True), (1, True)]


def test_tied_by_hand():
    # s²/n = 0.01 each: error 0.1414, 4 degrees of freedom, t = 2.776: ties up to 0.3926
    best = {"label": "a", "mean": 1.0, "std": math.sqrt(0.03), "seeds": 3}
    assert tied(best, {**best, "label": "b", "mean": 0.61}) is True
    assert tied(best, {**best, "label": "b", "mean": 0.60}) is False


def test_row_of_an_outcome(outcome, bare):
    row = row_of(outcome)
    assert row["task"] == "zoo:mlp on digits"
    assert row["sparsity"] == pytest.approx(1 - 200 / 1100)
    assert (row["bytes"], row["latency_ms"], row["dense_quality"]) == (1025, 0.21, 0.984)
    assert row["promise_kept"] is True
    assert leaderboard([row])[0]["mean"] == 0.978
    assert row_of(bare) is None
