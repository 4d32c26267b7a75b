"""Metrics in closed form, floors against plain loops, both ends, runs of a task, bad input."""

import math
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.samples.neural_scaling import TRAINED, NeuralScaling
from secateurs.selection import dynamics
from secateurs.selection.sources import from_arrays
from secateurs.training.order import mix

from .conftest import digits

NAME = "neural-scaling-data-pruning"
RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(300, 5)).astype(np.float32)
LABELS = RNG.choice(4, size=300, p=[0.6, 0.25, 0.1, 0.05])
HARD = RNG.random(300)


def chosen(keep=0.2, source=POINTS, **options):
    return sc.select(source, NAME, keep, **options)


def column(keep=0.2, hardness=HARD, labels=LABELS, **options):
    source = {"embeddings": POINTS, "hardness": hardness, "labels": labels}
    if labels is None:
        del source["labels"]
    return chosen(keep, source, metric="column", column="hardness", **options)


# ------------------------------------------------------------ prototypes


def test_a_centre_has_score_0_and_its_antipode_2():
    """One cluster of many equal rows and one opposite: the centre is the former."""
    rows = np.tile(np.array([[0.6, 0.8]], np.float32), (50, 1))
    rows[7] = -rows[7]
    scores = chosen(1.0, rows, clusters=1).scores[0]
    assert scores[7] == pytest.approx(2, abs=1e-6)
    assert np.delete(scores, 7) == pytest.approx(np.zeros(49), abs=1e-6)


def test_lengths_and_rotations_change_no_prototype_score():
    turn, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    plain = chosen(clusters=6, seed=1).scores[0]
    moved = (POINTS * RNG.uniform(0.1, 9, size=(300, 1)) @ turn).astype(np.float32)
    assert chosen(source=moved, clusters=6, seed=1).scores[0] == pytest.approx(plain, abs=2e-5)


def test_plain_prototypes_are_distances_to_the_nearest_mean():
    selection = chosen(clusters=3, spherical=False)
    cluster = selection.clusters[0]
    means = np.stack([POINTS[cluster == c].mean(0) for c in range(3)])
    distance = np.linalg.norm(POINTS[:, None] - means, axis=2)
    assert np.array_equal(distance.argmin(1), cluster)
    assert selection.scores[0] == pytest.approx(distance.min(1), rel=1e-4)


def test_supervised_prototypes_are_the_class_means_of_directions():
    found = chosen(1.0, labels=LABELS, metric="supervised-prototypes").scores[0]
    unit = POINTS / np.linalg.norm(POINTS, axis=1, keepdims=True)
    for one in range(4):
        mean = unit[one == LABELS].mean(0)
        expected = 1 - unit[one == LABELS] @ mean / np.linalg.norm(mean)
        assert found[one == LABELS] == pytest.approx(expected, abs=1e-5)
    opposite = np.array([[1.0, 0], [-1, 0]], np.float32)
    with pytest.raises(InputError, match="class 7 that cancel out"):
        chosen(1.0, opposite, labels=np.array([7, 7]), metric="supervised-prototypes")


# ------------------------------------------------------------ what stays


@given(
    st.integers(0, 10**6), st.floats(0.02, 1), st.floats(0, 1), st.sampled_from(["hard", "easy"])
)
@settings(max_examples=40, deadline=None)
def test_floors_are_those_of_a_plain_loop(seed, keep, floor, order):
    draw = np.random.default_rng(seed)
    hardness = draw.integers(0, 30, 300).astype(float)
    labels = draw.choice(4, size=300, p=[0.6, 0.25, 0.1, 0.05])
    count = round(keep * 300)
    selection = column(keep, hardness, labels, class_floor=floor, order=order)
    by_score = np.lexsort((np.arange(300), -hardness if order == "hard" else hardness))
    if floor < 1:
        least = int(Decimal(repr(floor)) * count / len(set(labels)))
        taken = set()
        for one in set(labels):
            taken |= set([r for r in by_score if labels[r] == one][:least])
        for row in by_score:
            if len(taken) < count:
                taken.add(row)
        assert set(selection.indices) == taken
    assert selection.kept == count


def test_a_floor_of_1_gives_every_class_the_same_and_what_is_left_goes_round():
    kept = column(30 / 300, class_floor=1.0)
    assert sorted(r["kept"] for r in kept.by_class()) == [7, 7, 8, 8]
    sizes = np.bincount(LABELS)
    kept = {r["class"]: r["kept"] for r in column(0.9, class_floor=1.0).by_class()}
    assert sum(kept.values()) == 270
    assert [kept[c] for c in (1, 2, 3)] == sizes[1:].tolist()


def test_without_a_floor_kept_sets_are_nested_and_the_ends_are_opposite():
    before = set()
    for keep in (0.05, 0.2, 0.5, 1.0):
        now = set(column(keep, class_floor=0.0).indices)
        assert before <= now
        before = now
    assert before == set(range(300))
    hard, easy = (set(column(0.3, class_floor=0.0, order=o).indices) for o in ("hard", "easy"))
    assert not hard & easy
    assert hard == set(column(0.3, -HARD, class_floor=0.0, order="easy").indices)


def test_a_floor_of_a_half_is_the_default_where_there_are_labels():
    assert np.array_equal(column().indices, column(class_floor=0.5).indices)
    alone = column(labels=None)
    assert np.array_equal(alone.indices, column(class_floor=0.0).indices)
    with pytest.raises(InputError, match="labels: got None"):
        column(labels=None, class_floor=0.5)


def test_random_depends_on_ids_and_the_seed_and_needs_nothing_else():
    one = chosen(metric="random", seed=1, source={"ids": np.arange(300), "quality": HARD})
    again = chosen(metric="random", seed=1)
    assert np.array_equal(one.indices, again.indices)
    assert not np.array_equal(again.indices, chosen(metric="random", seed=2).indices)


# ------------------------------------------------------------ with a task


def small_task(rows=120, **fields):
    images, labels = digits()
    train = DataLoader(TensorDataset(images[:rows], labels[:rows]), 32, shuffle=True)
    held_out = DataLoader(TensorDataset(images[1500:1600], labels[1500:1600]), 100)
    task = sc.classification(
        lambda: torch.nn.Linear(64, 10), train, held_out,
        training=sc.TrainSettings(epochs=3, lr=0.3),
    )  # fmt: skip
    return replace(task, **fields)


def trained(metric, keep=0.3, task=None, **options):
    source = from_arrays(None, labels=digits()[1][:120].numpy(), rows=50)
    return sc.select(source, NAME, keep, task or small_task(), metric=metric, **options)


OPTIONS = {
    "el2n": {"runs": 2},
    "grand": {"runs": 1, "epoch": 1.0},
    "margin": {"runs": 1},
    "el2n-online": {"presentations": 2},
    "memorization": {"runs": 3},
    "influence-max": {"runs": 3},
    "influence-sum-abs": {"runs": 3},
}


@pytest.mark.parametrize("metric", sorted(TRAINED))
def test_metrics_of_trainings_score_the_rows_in_their_order(metric, tmp_path):
    options = OPTIONS.get(metric, {})
    selection = trained(metric, seed=3, work=sc.Workspace(tmp_path), **options)
    assert selection.kept == 36
    assert [len(part) for part in selection.scores] == [50, 50, 20]
    poisoned = replace(small_task(), loss=lambda *_: 1 / 0)
    again = trained(metric, task=poisoned, seed=3, work=sc.Workspace(tmp_path), **options)
    assert np.array_equal(again.indices, selection.indices)
    if metric == "el2n":
        own = dynamics.early_scores(small_task(), dynamics.read_el2n, runs=2, seed=3)
        assert np.concatenate(selection.scores) == pytest.approx(own, abs=1e-6)


def test_grand_of_a_linear_model_is_the_same_either_way():
    last = trained("grand", runs=1).scores
    whole = trained("grand", runs=1, last_layer=False).scores
    assert np.concatenate(whole) == pytest.approx(np.concatenate(last), rel=1e-4)


def test_influence_and_rows_without_an_estimate_are_told():
    told = trained("influence-max", runs=2).notes
    assert any("judge by other samples" in note for note in told)
    assert any("in all trainings or in none" in note for note in told)


def test_auto_keeps_the_end_whose_half_trains_better():
    """Hardness is whether the label was replaced: hard ones teach nothing, easy ones all."""
    images, labels = digits()
    wrong = np.zeros(400, bool)
    wrong[RNG.permutation(400)[:160]] = True
    noisy = torch.where(torch.from_numpy(wrong), (labels[:400] + 3) % 10, labels[:400])
    train = DataLoader(TensorDataset(images[:400], noisy), 32, shuffle=True)
    task = small_task(train=train, training=sc.TrainSettings(epochs=8, lr=0.3))
    for hardness, end in ((wrong, "easy"), (~wrong, "hard")):
        source = from_arrays(None, columns={"wrong": hardness.astype(float)})
        found = sc.select(source, NAME, 0.35, task, metric="column", column="wrong", order="auto")
        tried = {r["order"]: r["accuracy"] for r in found.tables["ends"]}
        assert max(tried, key=tried.get) == end
        assert not wrong[found.indices].any()
        assert any(f"the {end} ones were kept" in note for note in found.notes)


def test_auto_judges_by_rows_that_it_did_not_train_on():
    seen = []

    class Told(torch.nn.Linear):
        def forward(self, x):
            seen.append((self.training, x[:, 0]))
            return super().forward(x)

    inputs = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
    train = DataLoader(TensorDataset(inputs, torch.arange(120) % 2), 32, shuffle=True)
    task = small_task(train=train, model=lambda: Told(4, 2))
    source = from_arrays(None, columns={"x": np.arange(120.0)})
    sc.select(source, NAME, 0.5, task, metric="column", column="x", order="auto")
    shown = {
        mode: set(torch.cat([x for m, x in seen if m is mode]).tolist()) for mode in (True, False)
    }
    assert not shown[True] & shown[False]
    assert len(shown[False]) == 120 - int(
        (sc.selection.score_table.hashed(np.arange(120), mix(0, 0x5EED)) < np.uint64(1 << 63)).sum()
    )


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(("call", "told"), [
    (lambda: chosen(clusters=301), "clusters: got 301; accepted: at most 300"),
    (lambda: chosen(metric="el2n"), "task: got None"),
    (lambda: chosen(order="auto"), "task: got None"),
    (lambda: chosen(metric="supervised-prototypes"), "labels: got None"),
    (lambda: chosen(metric="random", source={"embeddings": POINTS}, keep=0.0), "keep"),
    (lambda: column(hardness=np.where(HARD > 0.5, np.nan, HARD)), "NaN in row"),
    (lambda: chosen(metric="column"), "column: got None"),
    (lambda: chosen(metric="column", column="h"), "scores: got None"),
    (lambda: NeuralScaling(metric="memorization", runs=1), "at least 2, for memorization"),
    (lambda: NeuralScaling(class_floor=1.5), "class_floor"),
    (lambda: NeuralScaling(ratio=1.0), "ratio"),
    (lambda: trained("el2n", epoch=4.0), "at most 3, the epochs"),
    (lambda: trained("el2n", task=small_task(rows=100)), "source: got 120 rows; accepted: the 100"),
    (lambda: trained("el2n", task=small_task(model=torch.nn.Linear(64, 10))), "a fresh model"),
])  # fmt: skip
def test_it_refuses(call, told):
    with pytest.raises(InputError, match=told):
        call()


def test_infinite_hardness_is_an_end_like_others():
    hardness = HARD.copy()
    hardness[[4, 9]] = math.inf
    assert {4, 9} <= set(column(0.01, hardness, class_floor=0.0).indices)
    assert not {4, 9} & set(column(0.9, hardness, class_floor=0.0, order="easy").indices)
