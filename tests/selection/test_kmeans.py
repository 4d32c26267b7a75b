"""k-means: against a plain loop and faiss's own, the same bits whatever the cuts and the engine."""

import numpy as np
import pytest
import torch

import secateurs as sc
from secateurs.errors import InputError
from secateurs.selection.kmeans import (
    KMeans,
    add_by_cluster,
    fixed_point_scale,
    product_error,
    sample_rows,
)
from secateurs.selection.sources import as_embeddings, from_arrays

ENGINES = ("torch", "faiss")


def blobs(rows=3000, width=16, centres=12, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(centres, width, generator=generator) * 2
    own = torch.randint(centres, (rows,), generator=generator)
    return (middles[own] + spread * torch.randn(rows, width, generator=generator)).numpy()


def lloyd(rows, centres, iterations, spherical):
    """The definition, float64."""
    rows, centres = rows.astype(np.float64), centres.astype(np.float64)
    if spherical:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    for _ in range(iterations):
        if spherical:
            own = (rows @ centres.T).argmax(1)
        else:
            own = ((rows[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        for j in range(len(centres)):
            if (own == j).any():
                centres[j] = rows[own == j].mean(0)
                if spherical:
                    centres[j] /= np.linalg.norm(centres[j])
    return centres


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_lloyds_algorithm(spherical, engine):
    if engine == "faiss":
        pytest.importorskip("faiss")
    rows = blobs()
    start = rows[:12]
    means = KMeans(12, iterations=6, spherical=spherical, engine=engine)
    found = means.fit(as_embeddings(rows), initial=torch.from_numpy(start))
    assert found.numpy() == pytest.approx(lloyd(rows, start, 6, spherical), abs=2e-5)
    # passes over all rows are the same steps
    passes = KMeans(12, iterations=0, passes=6, spherical=spherical, engine=engine)
    shards = from_arrays(rows, rows=701)
    again = passes.fit(shards, initial=torch.from_numpy(start))
    assert again.numpy() == pytest.approx(found.numpy(), abs=1e-6)


@pytest.mark.parametrize("spherical", [True, False])
def test_faiss_gives_the_same_bits_from_the_same_seed_and_from_the_same_centres(spherical):
    pytest.importorskip("faiss")
    source = as_embeddings(blobs(spread=3.0))
    start = torch.from_numpy(blobs(seed=9)[:12])
    for initial in (None, start):
        answers = []
        for engine in ENGINES:
            means = KMeans(12, iterations=20, passes=1, spherical=spherical, engine=engine)
            centres = means.fit(source, seed=4, initial=initial)
            answers.append((centres, means.assign(source, centres)[0]))
        (one, its), (other, others) = answers
        assert torch.equal(one, other)
        assert torch.equal(its["cluster"], others["cluster"])
        assert torch.equal(its["distance"], others["distance"])


def near_ties(spherical, width=96, seed=0):
    """Rows half-way between two of 40 centres, up to 1e-9 of their distance, and other rows."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, width)) + (0 if spherical else 30)
    centres[7] = centres[3]  # equal ones
    centres[11] = centres[5] * (1 + 1e-7)
    if spherical:
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    centres = centres.astype(np.float32)
    one, other = rng.integers(0, 40, (2, 3000))
    lean = rng.normal(size=(3000, 1)) * 10.0 ** rng.integers(-9, -4, (3000, 1))
    rows = (0.5 + lean) * centres[one] + (0.5 - lean) * centres[other]
    rows = np.concatenate([rows, rng.normal(size=(500, width)) + centres.mean(0), centres])
    if spherical:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return torch.from_numpy(rows.astype(np.float32)), torch.from_numpy(centres)


@pytest.mark.parametrize("spherical", [True, False])
def test_near_ties_are_decided_by_float64_whatever_multiplies(spherical):
    rows, centres = near_ties(spherical)
    exact = np.stack([
        [float((r * c).sum()) if spherical else -float(((r - c) ** 2).sum())
         for c in centres.double().numpy()] for r in rows.double().numpy()
    ])  # fmt: skip
    wanted = exact.argmax(1)
    plain = rows @ centres.T if spherical else -torch.cdist(rows, centres)
    assert (plain.argmax(1).numpy() != wanted).sum() > 20, "float32 alone gets many wrong"
    for engine in ENGINES:
        if engine == "faiss":
            pytest.importorskip("faiss")
        means = KMeans(40, spherical=spherical, engine=engine)
        found = means.nearest(rows, centres)
        assert np.array_equal(found.numpy(), wanted)
        assert not (found == 7).any(), "of equal centres the smaller number"
        for size in (1, 19, 333):
            parts = [means.nearest(part, centres) for part in rows.split(size)[:200]]
            assert np.array_equal(torch.cat(parts).numpy(), wanted[: size * 200])


@pytest.mark.parametrize("engine", ENGINES)
def test_sizes_at_the_end_of_float32_and_equal_centres(engine):
    if engine == "faiss":
        pytest.importorskip("faiss")
    rows, centres = near_ties(False)
    means = KMeans(40, spherical=False, engine=engine)
    wanted = means.nearest(rows, centres)
    for power in (-70, 70):  # squares are below and above what float32 holds
        scale = 2.0**power
        assert torch.equal(means.nearest(rows * scale, centres * scale), wanted)
    same = torch.ones(5, 8)
    assert not KMeans(5, engine=engine).nearest(torch.ones(30, 8), same).any()
    assert not KMeans(1, engine=engine).nearest(rows, centres[:1]).any()


@pytest.mark.parametrize("spherical", [True, False])
def test_float32_is_never_wrong_by_more_than_is_allowed_for(spherical):
    rows, centres = near_ties(spherical, width=300)
    scale = torch.logspace(-3, 3, len(rows))[:, None]
    rows = rows * (1 if spherical else scale)
    inner = rows.double() @ centres.double().T
    exact = inner if spherical else inner - centres.double().square().sum(1) / 2
    bias = 0 if spherical else centres.square().sum(1) / 2
    error = ((rows @ centres.T - bias).double() - exact).abs().amax(1)
    longest = float(centres.norm(dim=1).max())
    allowed = product_error(rows, longest, spherical)
    assert (error <= allowed).all()
    assert (allowed <= 300 * error.max() if spherical else allowed > 0).all()


@pytest.mark.slow
def test_a_hundred_thousand_wide_rows_are_clustered_alike():
    """Before near ties were decided again, 1,371 rows of these were in other clusters."""
    pytest.importorskip("faiss")
    rows = np.random.default_rng(0).normal(size=(100_000, 512)).astype(np.float16)
    found = {}
    for engine in ENGINES:
        means = KMeans(500, iterations=10, engine=engine)
        source = from_arrays(rows, rows=1 << (18 if engine == "faiss" else 15))
        centres = means.fit(source, seed=0)
        parts = means.assign(source, centres)
        found[engine] = centres, torch.cat([part["cluster"] for part in parts])
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


@pytest.mark.parametrize("spherical", [True, False])
def test_faiss_own_kmeans_agrees(spherical):
    faiss = pytest.importorskip("faiss")
    rows = blobs(rows=2000)
    if spherical:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    start = rows[:8].copy()
    theirs = faiss.Kmeans(16, 8, niter=15, spherical=spherical, seed=1, verbose=False,
                          min_points_per_centroid=1, max_points_per_centroid=10_000)  # fmt: skip
    theirs.train(rows, init_centroids=start)
    means = KMeans(8, iterations=15, points=250, spherical=spherical)
    ours = means.fit(as_embeddings(rows), initial=torch.from_numpy(start))
    assert ours.numpy() == pytest.approx(theirs.centroids, abs=1e-4)


@pytest.mark.parametrize("spherical", [True, False])
def test_cuts_and_the_order_of_the_rows_change_no_bit(spherical):
    rows = blobs(spread=3.0)
    means = KMeans(20, iterations=8, points=40, passes=2, spherical=spherical)
    whole = means.fit(from_arrays(rows), seed=2)
    order = np.random.default_rng(0).permutation(len(rows))
    for shard in (1000, 177):
        assert torch.equal(means.fit(from_arrays(rows, rows=shard), seed=2), whole)
        mixed = from_arrays(rows[order], order, rows=shard)
        assert torch.equal(means.fit(mixed, seed=2), whole)
    assert not torch.equal(means.fit(from_arrays(rows), seed=3), whole)


def test_sums_are_exact_in_any_order_and_can_be_taken_back():
    rows = torch.from_numpy(blobs()).float()
    own = torch.randint(5, (len(rows),), generator=torch.Generator().manual_seed(0))
    scale = fixed_point_scale(rows)
    sums = [torch.zeros(5, 16, dtype=torch.float64) for _ in range(2)]
    counts = [torch.zeros(5, dtype=torch.float64) for _ in range(2)]
    add_by_cluster(sums[0], counts[0], rows, own, scale)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    for part in order.split(97):
        add_by_cluster(sums[1], counts[1], rows[part], own[part], scale)
    assert torch.equal(sums[0], sums[1])
    plain = torch.zeros(5, 16, dtype=torch.float64).index_add_(0, own, rows.double())
    assert torch.allclose(sums[0], plain, atol=len(rows) / scale)
    add_by_cluster(sums[0], counts[0], rows, own, scale, sign=-1)
    assert not sums[0].any()
    assert not counts[0].any()


def test_an_empty_cluster_gets_the_farthest_row():
    rows = torch.tensor([[0.0, 1.0], [0.0, 1.1], [0.1, 1.0], [9.0, 0.0]])
    start = torch.tensor([[0.0, 1.0], [50.0, 50.0]])
    # after one step the far row has drawn both; the empty one takes it
    found = KMeans(2, iterations=10, spherical=False).fit_sample(rows, start, 2.0**20)
    assert sorted(found[:, 0].tolist()) == pytest.approx([0.1 / 3, 9.0], abs=1e-5)
    same = torch.ones(6, 4)
    alike = KMeans(3, iterations=5).fit(as_embeddings(same))
    assert torch.isfinite(alike).all()


def test_the_sample_is_of_hashed_ids_and_of_the_rows_that_take_part():
    rows = blobs(rows=500)
    source = from_arrays(rows, rows=123)
    some = sample_rows(source, 50, 1, "euclidean")
    every = sample_rows(source, 9999, 1, "euclidean")
    assert torch.equal(some, every[:50])
    assert sorted(map(tuple, every.tolist())) == sorted(
        map(tuple, rows.astype(np.float32).tolist())
    )
    masks = [np.arange(shard.rows) % 2 == 0 for shard in source.shards]
    own = sample_rows(source, 9999, 1, "euclidean", masks)
    wanted = torch.cat(list(source.take(masks, "euclidean")))
    assert sorted(map(tuple, own.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_it_goes_on_where_it_was_killed(tmp_path):
    source = from_arrays(blobs(), rows=500)
    means = KMeans(12, iterations=12, points=100, passes=2)
    whole = means.fit(source, seed=1)

    class KilledError(Exception):
        pass

    class Kill:
        """Gives up at the fourth step that is written down."""

        def __init__(self):
            self.left = 4

        def event(self, kind, values):
            if kind == "done":
                self.left -= 1
                if not self.left:
                    raise KilledError

        def begin(self, label, total): ...

        def advance(self, label, done): ...

        def end(self, label): ...

    deaths = 0
    for _ in range(20):
        try:
            found = means.fit(source, seed=1, work=sc.Workspace(tmp_path, [Kill()]))
        except KilledError:
            deaths += 1
        else:
            break
    assert deaths >= 3
    assert torch.equal(found, whole)


def test_bad_input():
    with pytest.raises(InputError, match="clusters: got 9; accepted: at most 5, the rows"):
        KMeans(9).fit(as_embeddings(np.ones((5, 2))))
    with pytest.raises(InputError, match="zero vector in row 1 .*id 1"):
        KMeans(1).fit(as_embeddings(np.array([[1.0, 0], [0, 0]])))
    KMeans(1, spherical=False).fit(as_embeddings(np.array([[1.0, 0], [0, 0]])))
    with pytest.raises(InputError, match="initial"):
        KMeans(2).fit(as_embeddings(np.ones((5, 2))), initial=torch.ones(3, 2))
    for field in ("clusters", "points"):
        with pytest.raises(InputError, match=field):
            KMeans(**{"clusters": 3, field: 0})
