"""Density-based pruning: the numbers of its card, brute force, ends and invariances."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.samples.density_based_pruning import (
    DensityBasedPruning,
    complexities,
    inter_distance,
    softmax_shares,
)
from secateurs.registry import create
from secateurs.selection.sources import from_arrays

PLAIN = {"epsilon": None, "clusters": 12}


def rows(count=600, width=10, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, width)) * 2
    return centres[rng.integers(0, 12, count)] + rng.normal(size=(count, width))


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def clusters_of(selection):
    return np.concatenate(selection.clusters), np.concatenate(selection.distances)


def test_a_selection_is_what_the_equations_say():
    """From the clusters on, everything once more in plain numpy."""
    vectors = rows()
    made = sc.select(vectors, "density", 0.3, neighbours=5, temperature=0.05, **PLAIN)
    cluster, distance = clusters_of(made)
    table = made.by_cluster()
    centres = np.stack([unit(unit(vectors)[cluster == j].mean(0)) for j in range(12)])
    assert distance == pytest.approx(1 - (unit(vectors) * centres[cluster]).sum(1), abs=1e-5)
    likeness = centres @ centres.T
    intra = [distance[cluster == j].mean() for j in range(12)]
    inter = [np.sort(1 - np.delete(likeness[j], j))[:5].mean() for j in range(12)]
    assert [t["d_intra"] for t in table] == pytest.approx(intra, abs=1e-5)
    assert [t["d_inter"] for t in table] == pytest.approx(inter, abs=1e-5)
    weight = np.exp(np.array(intra) * np.array(inter) / 0.05)
    assert [t["share"] for t in table] == pytest.approx(weight / weight.sum(), abs=1e-4)
    assert sum(t["quota"] for t in table) == made.kept == 180
    for j, row in enumerate(table):
        assert row["quota"] == row["kept"]
        own = np.flatnonzero(cluster == j)
        farthest = sorted(own, key=lambda r: (-distance[r], r))[: row["quota"]]
        assert set(farthest) == set(np.flatnonzero(made.mask & (cluster == j)).tolist())


def test_which_rows_of_a_cluster_stay():
    vectors = rows()
    kept = {}
    for within in ("hard", "easy", "random"):
        made = sc.select(vectors, "density", 0.3, within=within, **PLAIN)
        kept[within] = made
        cluster, distance = clusters_of(made)
        for j in range(12):
            own, stays = cluster == j, made.mask & (cluster == j)
            if within == "hard" and (own & ~stays).any():
                assert distance[stays].min() >= distance[own & ~stays].max()
            if within == "easy" and (own & ~stays).any():
                assert distance[stays].max() <= distance[own & ~stays].min()
    quotas = [[row["quota"] for row in made.by_cluster()] for made in kept.values()]
    assert quotas[0] == quotas[1] == quotas[2]
    other = sc.select(vectors, "density", 0.3, within="random", seed=1, **PLAIN)
    assert not np.array_equal(other.mask, kept["random"].mask)


def test_the_ends_of_the_temperature():
    vectors = rows()
    even = sc.select(vectors, "density", 0.2, temperature=1e6, **PLAIN).by_cluster()
    equal = max(row["quota"] for row in even)
    for row in even:  # water-filling: the same, or all there is
        assert row["quota"] in (equal, equal - 1, row["rows"])
    sharp = sc.select(vectors, "density", 0.2, temperature=1e-4, **PLAIN).by_cluster()
    first, *others = sorted(sharp, key=lambda row: -row["d_intra"] * row["d_inter"])
    assert first["quota"] == first["rows"], "the most complex cluster fills first"
    rest = 120 - first["rows"]  # of which the others get as much each
    assert {row["quota"] for row in others} <= {rest // 11, rest // 11 + 1}


def test_all_rows_and_one_a_cluster():
    vectors = rows()
    assert sc.select(vectors, "density", 1.0, **PLAIN).kept == 600
    made = sc.select(vectors, "density", 12 / 600, **PLAIN)
    assert [row["quota"] for row in made.by_cluster()] == [1] * 12
    with pytest.raises(InputError, match="clusters: got 12, of which 12 rows must stay; accepted"):
        sc.select(vectors, "density", 10 / 600, **PLAIN)
    free = sc.select(vectors, "density", 12 / 600, floor=0.0, temperature=1e-4, **PLAIN)
    assert free.kept == 12


def test_floors():
    method = DensityBasedPruning(clusters=4)
    sizes = np.array([50, 1, 0, 9])
    assert method._low(sizes, 30).tolist() == [1, 1, 0, 1]
    share = DensityBasedPruning(clusters=4, floor=0.5)
    assert share._low(sizes, 80).tolist() == [10, 0, 0, 8]
    none = DensityBasedPruning(clusters=4, floor=0.0)
    assert none._low(sizes, 30).tolist() == [1, 0, 0, 1]


def test_a_centre_is_no_neighbour_of_itself_even_if_another_equals_it():
    centres = torch.nn.functional.normalize(
        torch.randn(30, 5, generator=torch.manual_seed(0)), dim=1
    )
    centres[7] = centres[3]
    for neighbours in (1, 4, 20, 99):
        for j, value in enumerate(inter_distance(centres, neighbours).tolist()):
            others = [
                1 - float(centres[j].double() @ centres[m].double()) for m in range(30) if m != j
            ]
            assert value == pytest.approx(np.mean(sorted(others)[:neighbours]), abs=1e-6)
    assert inter_distance(centres, 1)[3] == pytest.approx(0, abs=1e-6)
    assert inter_distance(centres[:1], 20).tolist() == [0]


def test_an_empty_cluster_has_the_mean_complexity_and_no_quota():
    found = complexities([0.1, float("nan"), 0.3], torch.tensor([1.0, 1.0, 1.0]).double())
    assert found.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert softmax_shares(np.array([0.0, np.log(3.0)]), 1.0).tolist() == pytest.approx([0.25, 0.75])
    # no overflow
    assert softmax_shares(np.array([0.0, 1e6]), 1e-3).tolist() == [0, 1]
    alike = np.repeat(unit(rows(3)), [60, 60, 60], axis=0)
    made = sc.select(alike, "density", 0.5, clusters=9, epsilon=None)
    assert made.kept == 90
    assert all(r["quota"] == 0 for r in made.by_cluster() if not r["rows"])


def test_rotation_and_scale_change_no_selection():
    vectors = rows()
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(10, 10)))[0]
    plain = sc.select(vectors, "density", 0.3, **PLAIN)
    turned = sc.select(vectors @ turn, "density", 0.3, **PLAIN)
    longer = vectors * np.random.default_rng(6).uniform(0.1, 9, size=(600, 1))
    assert np.array_equal(plain.mask, turned.mask)
    assert np.array_equal(plain.mask, sc.select(longer, "density", 0.3, **PLAIN).mask)


def test_shards_and_their_order_change_no_selection():
    vectors, ids = rows(), np.arange(600)
    wanted = set(sc.select(vectors, "density", 0.3).ids.tolist())
    for parts in (1, 3, 17):
        size = -(-600 // parts)
        order = np.random.default_rng(parts).permutation(parts)
        mixed = np.concatenate([ids[p * size : (p + 1) * size] for p in order])
        source = from_arrays(vectors[mixed], mixed, rows=size)
        assert set(sc.select(source, "density", 0.3).ids.tolist()) == wanted


def test_duplicates_go_before_the_filter_and_the_filter_before_the_quotas():
    vectors = np.concatenate([rows(300), rows(300)])  # every row twice
    clip = np.arange(600) / 600
    made = sc.select(vectors, "density", 0.1, scores={"clip": clip}, filter="clip",
                     filter_keep=0.5, clusters=6)  # fmt: skip
    assert made.count("duplicate") == 300
    assert made.count("filtered") == 150
    assert made.kept == 60
    left = np.concatenate(made.reasons)
    assert clip[left == 3].max() < clip[(left == 0) | (left == 1)].min()
    assert sum(row["quota"] for row in made.by_cluster()) == 60
    above = sc.select(vectors, "density", 0.1, scores={"clip": clip}, filter="clip",
                      filter_above=0.4, clusters=6)  # fmt: skip
    assert clip[above.mask].min() > 0.4
    more = sc.select(vectors, "density", 0.9, scores={"clip": clip}, clusters=6)
    assert more.kept == 300
    assert "540 rows were asked for, and only 300 are left" in more.notes[0]
    with pytest.raises(InputError, match="column: got 'clip'; accepted: one of none"):
        sc.select(vectors, "density", 0.1, filter="clip", filter_keep=0.5)
    with pytest.raises(InputError, match="clip: got NaN in row 3 of"):
        sc.select(vectors, "density", 0.1, scores={"clip": np.where(clip == clip[3], np.nan, clip)},
                  filter="clip", filter_keep=0.5)  # fmt: skip
    with pytest.raises(InputError, match="filter: got no row with clip above 2"):
        sc.select(vectors, "density", 0.1, scores={"clip": clip}, filter="clip", filter_above=2.0)


def test_classes_that_are_left_empty_are_named_or_forbidden():
    images, labels = load_digits(return_X_y=True)
    made = sc.select(images, "density", 0.003, labels=labels, clusters=2)
    empty = [row["class"] for row in made.by_class() if not row["kept"]]
    assert empty
    note = next(n for n in made.notes if n.startswith("nothing is left of class"))
    assert all(f"{one} (" in note for one in empty)
    with pytest.raises(InputError, match="keep: got keep=0.003, which leaves nothing of class"):
        sc.select(images, "density", 0.003, labels=labels, clusters=2, forbid_empty_classes=True)


def test_more_clusters_where_there_is_a_pass_over_all_rows():
    vectors = rows()
    one = sc.select(vectors, "density", 0.3, points=10, **PLAIN)
    two = sc.select(vectors, "density", 0.3, points=10, passes=8, **PLAIN)
    assert np.concatenate(two.distances).mean() < np.concatenate(one.distances).mean()


class DeathError(Exception):
    pass


class Dies:
    """A listener that gives up at the third step that is finished."""

    left = 3

    def event(self, kind, values):
        self.left -= kind == "done"
        if not self.left:
            raise DeathError

    def begin(self, label, total): ...

    def advance(self, label, done): ...

    def end(self, label): ...


def test_it_goes_on_at_any_shard(tmp_path):
    source = from_arrays(rows(), rows=100)
    whole = sc.select(source, "density", 0.3, passes=1)
    done, deaths = 0, 0
    while True:
        try:
            work = sc.Workspace(tmp_path, [Dies()])
            made = sc.select(source, "density", 0.3, passes=1, work=work)
            break
        except DeathError:
            deaths += 1
        finished = len(list(tmp_path.rglob("*.safetensors")))
        assert finished == done + 3, "what was done was done again, or something was lost"
        done = finished
    assert deaths > 10
    assert np.array_equal(made.mask, whole.mask)
    assert made.by_cluster() == whole.by_cluster()


def test_bad_options_and_rows():
    for option, value in (
        ("clusters", 0), ("neighbours", 0), ("temperature", 0.0), ("floor", -0.1), ("floor", 1.5),
        ("epsilon", 0.0), ("piece", 1), ("iterations", -1), ("points", 0), ("filter_keep", 0.5),
    ):  # fmt: skip
        with pytest.raises(InputError, match=option.split("_")[0]):
            create("density", {option: value})
    with pytest.raises(InputError, match="filter"):
        create("density", {"filter": "clip"})
    with pytest.raises(InputError, match="filter"):
        create("density", {"filter": "clip", "filter_keep": 0.5, "filter_above": 0.1})
    with pytest.raises(InputError, match="clusters: got 9; accepted: at most 8, the rows"):
        sc.select(rows(8), "density", 1.0, clusters=9)
    few = np.repeat(rows(20), 10, 0)
    left = (
        "clusters: got 50; accepted: at most 20, the rows that are left of 200 after removing dup"
    )
    with pytest.raises(InputError, match=left):
        sc.select(few, "density", 0.5, clusters=50)
    with pytest.raises(InputError, match="keep: got 0.001; accepted: a fraction that leaves one"):
        sc.select(rows(8), "density", 0.001)
    with pytest.raises(InputError, match="target: got 8 rows; accepted: none"):
        sc.select(rows(8), "density", 0.5, target=rows(8))
