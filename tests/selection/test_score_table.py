"""The best rows, streaming, against a sort; ties by id; parts and their order change nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.errors import InputError
from secateurs.selection import score_table
from secateurs.selection.score_table import ScoreTable, hashed, ordered, random_scores, towards


def cut(values, parts):
    return [part.copy() for part in np.array_split(values, parts)]


def table(scores, ids, groups, parts=1):
    own = cut(ids, parts)
    return ScoreTable(cut(scores, parts), lambda part: own[part], cut(groups, parts))


def by_sorting(scores, ids, groups, counts):
    keep = np.zeros(len(scores), bool)
    for group, count in enumerate(counts):
        rows = [r for r in np.flatnonzero(groups == group) if not np.isnan(scores[r])]
        rows.sort(key=lambda r: (-scores[r], ids[r]))
        keep[rows[:count]] = True
    return keep


SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 1e-300]),
    st.floats(-1e6, 1e6),
    st.integers(-3, 3).map(float),
)


@given(st.data(), st.integers(1, 60), st.integers(1, 4), st.sampled_from([1, 3, 17]))
@settings(max_examples=80, deadline=None)
def test_the_best_of_every_group_are_those_of_a_sort(data, rows, groups, parts):
    scores = np.array(data.draw(st.lists(SCORES, min_size=rows, max_size=rows)))
    of = np.array(data.draw(st.lists(st.integers(0, groups - 1), min_size=rows, max_size=rows)))
    ids = np.array(data.draw(st.permutations(range(rows))))
    made = table(scores, ids, of, parts)
    sizes = made.sizes(groups)
    counts = [data.draw(st.integers(0, int(size))) for size in sizes]
    found = np.concatenate(made.largest_per_group(counts))
    assert np.array_equal(found, by_sorting(scores, ids, of, counts))
    total = data.draw(st.integers(0, int(sizes.sum())))
    whole = np.concatenate(made.largest(total))
    assert np.array_equal(whole, by_sorting(scores, ids, np.zeros(rows, int), [total]))


def test_many_rows_in_few_bins(monkeypatch):
    monkeypatch.setattr(score_table, "GROUP_BINS", 16)
    rng = np.random.default_rng(0)
    scores = rng.normal(size=5000).astype(np.float32).round(2)
    ids, groups = rng.permutation(5000), rng.integers(0, 7, 5000)
    counts = [100, 0, 1, 700, 650, 3, 20]
    expected = by_sorting(scores, ids, groups, counts)
    for parts in (1, 3, 17):
        found = np.concatenate(table(scores, ids, groups, parts).largest_per_group(counts))
        assert np.array_equal(found, expected)


def test_equal_scores_go_by_the_smaller_id_of_numbers_and_of_texts():
    ids = np.arange(100)[::-1]
    found = table(np.zeros(100), ids, np.zeros(100, int), 5).largest(7)
    assert set(ids[np.concatenate(found)]) == set(range(7))
    texts = np.array(["b", "a", "d", "c"])
    found = ScoreTable.of(np.ones(4), texts).largest(2)[0]
    assert set(texts[found]) == {"a", "b"}


def test_kept_sets_are_nested():
    scores = np.random.default_rng(1).integers(0, 9, 300).astype(float)
    made = ScoreTable.of(scores)
    before = made.largest(0)[0]
    for count in range(1, 301, 13):
        after = made.largest(count)[0]
        assert after[before].all()
        before = after


def test_a_floor_reserves_the_best_of_every_group_and_fills_up_with_the_best_of_all():
    scores = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0.0])
    groups = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
    made = ScoreTable.of(scores, groups=groups)
    assert np.flatnonzero(made.largest_with_floor(6, 2, 3)[0]).tolist() == [0, 1, 2, 6, 7, 9]
    assert np.flatnonzero(made.largest_with_floor(6, 0, 3)[0]).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.flatnonzero(made.largest_with_floor(5, [1, 3, 0], 3)[0]).tolist() == [0, 1, 6, 7, 8]
    with pytest.raises(InputError, match="floor: got 7; accepted: at most 6"):
        made.largest_with_floor(6, 3, 3)


def test_more_than_there_are_is_refused():
    made = ScoreTable.of(np.array([1.0, np.nan, 2.0]), groups=np.array([0, 0, 1]))
    with pytest.raises(InputError, match="counts: got 2; accepted: 0 to 1 in group 0"):
        made.largest_per_group([2, 0])
    with pytest.raises(InputError, match="counts: got 3"):
        made.largest(3)


@given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=40))
def test_the_integers_order_as_the_scores(values):
    scores = np.array(values)
    keys = ordered(scores)
    for a, b in zip(range(len(values)), range(1, len(values)), strict=False):
        assert (keys[a] < keys[b]) == (scores[a] < scores[b])
        assert (keys[a] == keys[b]) == (scores[a] == scores[b])


def test_hashes_follow_the_id_and_the_seed_only():
    ids = np.arange(20_000)
    one = random_scores(ids, 3)
    order = np.random.default_rng(0).permutation(20_000)
    assert np.array_equal(random_scores(ids[order], 3), one[order])
    assert not np.array_equal(random_scores(ids, 4), one)
    assert len(np.unique(hashed(ids, 3))) == 20_000
    # uniform: each tenth has a tenth, within five standard deviations
    counts = np.histogram(one, 10, (0, 1))[0]
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(20_000 * 0.1 * 0.9)
    texts = np.array([f"row-{n}" for n in range(1000)])
    assert len(np.unique(hashed(texts, 3))) == 1000
    with pytest.raises(InputError, match="ids: got float64"):
        hashed(np.zeros(3))


def test_the_end_that_is_kept():
    scores, ids = np.array([1.0, np.nan, 3.0]), np.arange(3)
    assert towards(scores, lambda: ids, "hard", 0)[2] == 3
    assert towards(scores, lambda: ids, "easy", 0)[2] == -3
    drawn = towards(scores, lambda: ids, "random", 0)
    assert np.isnan(drawn[1])
    assert drawn[2] == random_scores(ids, 0)[2]
