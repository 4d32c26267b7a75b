"""SemDeDup against its definition, the rule about removed rows, pieces, and resumption."""

import numpy as np
import pytest
import torch

import secateurs as sc
from secateurs.errors import InputError
from secateurs.selection.deduplication import find_duplicates, like_an_earlier
from secateurs.selection.kmeans import KMeans
from secateurs.selection.sources import from_arrays


def at_angles(*degrees):
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def near_copies(seed=0):
    """100 rows and 100 that are like them, more or less."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(100, 8))
    like = rows[rng.integers(0, 100, 100)] + rng.normal(size=(100, 8)) * rng.random((100, 1)) * 0.3
    return np.concatenate([rows, like])


def by_definition(rows, cluster, distance, ids, epsilon, keep):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    gone = set()
    for one in np.unique(cluster):
        own = np.flatnonzero(cluster == one)
        sign = 1 if keep == "easy" else -1
        order = sorted(own, key=lambda r: (sign * distance[r], ids[r]))
        for place, row in enumerate(order):
            if any(rows[row] @ rows[earlier] > 1 - epsilon for earlier in order[:place]):
                gone.add(int(row))
    return gone


@pytest.mark.parametrize("keep", ["hard", "easy"])
@pytest.mark.parametrize("shard", [200, 33])
def test_it_is_the_definition(keep, shard):
    rows = near_copies()
    ids = np.random.default_rng(1).permutation(200)
    source = from_arrays(rows, ids, rows=shard)
    means = KMeans(6)
    assigned = means.assign(source, means.fit(source))
    cluster = np.concatenate([p["cluster"].numpy() for p in assigned])
    distance = np.concatenate([p["distance"].numpy() for p in assigned])
    for epsilon in (0.002, 0.02, 0.1):
        found = find_duplicates(source, assigned, 6, epsilon, keep=keep)
        wanted = by_definition(rows, cluster, distance, ids, epsilon, keep)
        assert set(np.flatnonzero(np.concatenate(found.found)).tolist()) == wanted
        assert found.count == len(wanted) > 0
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for row, like, cosine in found.pairs:
            assert row in wanted
            assert unit[row] @ unit[like] == pytest.approx(cosine, abs=1e-5)
            assert cosine > 1 - epsilon


def test_rows_are_compared_with_removed_ones_too():
    """a like b, b like c, but a not like c: b and c go."""
    rows = torch.from_numpy(at_angles(0, 10, 20)).float()
    best, twin = like_an_earlier(rows)
    epsilon = 1 - np.cos(np.radians(12))
    assert (best > 1 - epsilon).tolist() == [False, True, True]
    assert twin.tolist() == [-1, 0, 1]
    assert best[0] == -torch.inf


def test_tiles_change_nothing():
    rows = torch.from_numpy(near_copies()).float()
    rows /= rows.norm(dim=1, keepdim=True)
    whole, twin = like_an_earlier(rows)
    for tile in (1, 7, 64):
        best, other = like_an_earlier(rows, tile)
        assert torch.allclose(best, whole, atol=1e-6)
        assert (rows[other[1:]] * rows[1:]).sum(1).tolist() == pytest.approx(
            whole[1:].tolist(), abs=1e-6
        )
    assert int(twin.max()) < 200


def test_of_exact_copies_one_survives_and_the_clusters_are_wider_for_it():
    rng = np.random.default_rng(0)
    rows = np.concatenate([np.repeat(rng.normal(size=(1, 5)), 50, 0), rng.normal(size=(200, 5))])
    ids = rng.permutation(250)
    chosen = {"clusters": 4, "ids": ids}
    selection = sc.select(rows, "density", 1.0, epsilon=1e-5, **chosen)
    assert selection.count("duplicate") == 49
    survivors = np.flatnonzero(selection.reasons[0][:50] == 0)
    assert ids[survivors].tolist() == [ids[:50].min()], "of equal rows the smaller id is first"
    assert selection.kept == 201
    assert "250 rows were asked for, and only 201 are left" in selection.notes[0]
    without = sc.select(rows, "density", 1.0, epsilon=None, **chosen)
    assert without.kept == 250

    def width(made):
        table = made.by_cluster()
        return table[int(made.clusters[0][0])]["d_intra"]

    assert width(without) < width(selection)


@pytest.mark.parametrize("window", [1, 2, 7, 60, 199, 500])
@pytest.mark.parametrize("tile", [1, 16, 1024])
def test_a_row_is_compared_with_those_just_before_it(window, tile):
    rows = torch.from_numpy(near_copies()).float()
    rows /= rows.norm(dim=1, keepdim=True)
    likeness = (rows @ rows.T).double()
    place = torch.arange(200)
    before = (place[:, None] > place) & (place[:, None] - place <= window)
    wanted = likeness.masked_fill(~before, -torch.inf)
    for start in (0, 1, 63, 199):
        best, twin = like_an_earlier(rows, tile, window=window, start=start)
        assert best.tolist() == pytest.approx(wanted.amax(1)[start:].tolist(), abs=1e-6)
        assert all(int(t) < 0 or before[r + start, t] for r, t in enumerate(twin))


def test_large_clusters_are_compared_within_a_piece_and_the_answer_says_so(monkeypatch):
    """Two rows alike with others between them, in an order that is theirs alone."""
    degrees = [0, 20, 40, 0, 60, 20, 80]
    source = from_arrays(at_angles(*degrees))
    far = torch.arange(7, 0, -1).float()
    assigned = [{"cluster": torch.zeros(7, dtype=torch.int32), "distance": far}]
    for piece, alike, large in ((7, [3, 5], 0), (4, [3, 5], 1), (3, [3], 1), (2, [], 1)):
        for size in (1 << 27, 4):
            monkeypatch.setattr("secateurs.selection.deduplication.READ_BYTES", size)
            found = find_duplicates(source, assigned, 1, 0.01, piece=piece)
            assert np.flatnonzero(found.found[0]).tolist() == alike
            assert found.large == large
    rows = np.random.default_rng(0).normal(size=(300, 8))
    note = "of more than 50 rows"
    assert any(note in n for n in sc.select(rows, "density", 0.5, clusters=2, piece=50).notes)
    assert not any("of more than" in n for n in sc.select(rows, "density", 0.5, clusters=2).notes)


def test_of_pairs_in_a_cluster_of_many_pieces_nearly_all_are_found():
    """What the module says of its recall, with clusters and pieces an eighth as large."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1250, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for cosine, least in ((0.9999, 1.0), (0.997, 1.0), (0.992, 0.995)):
        noise = rng.normal(size=rows.shape)
        noise -= (noise * rows).sum(1, keepdims=True) * rows
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        like = cosine * rows + np.sqrt(1 - cosine**2) * noise
        source = from_arrays(np.concatenate([rows, like]), rng.permutation(2500))
        assigned = KMeans(1).assign(source, KMeans(1).fit(source))
        assert find_duplicates(source, assigned, 1, 0.01, piece=512).count >= least * 1250


def test_it_goes_on_and_leaves_no_scratch(tmp_path, monkeypatch):
    monkeypatch.setattr("secateurs.selection.deduplication.GROUP_ROWS", 40)
    monkeypatch.setattr("secateurs.selection.deduplication.READ_BYTES", 8 * 4 * 15)
    source = from_arrays(near_copies(), rows=60)
    means = KMeans(6)
    assigned = means.assign(source, means.fit(source))
    plain = find_duplicates(source, assigned, 6, 0.02)
    work = sc.Workspace(tmp_path)
    found = find_duplicates(source, assigned, 6, 0.02, work=work)
    steps = sorted(p.name for p in tmp_path.iterdir())
    assert len(steps) > 2, "several groups of clusters"
    assert not (tmp_path / "grouped").exists()
    (tmp_path / steps[1]).unlink()
    again = find_duplicates(source, assigned, 6, 0.02, work=work)
    for one in (found, again):
        assert all(np.array_equal(a, b) for a, b in zip(one.found, plain.found, strict=True))
        assert one.pairs == plain.pairs


def test_bad_options():
    source = from_arrays(near_copies())
    for epsilon in (0, -1, 3):
        with pytest.raises(InputError, match="epsilon"):
            find_duplicates(source, [], 1, epsilon)
    with pytest.raises(InputError, match="piece"):
        find_duplicates(source, [], 1, 0.1, piece=1)
