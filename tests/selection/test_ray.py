"""On a local two-worker Ray cluster a selection is that of one process."""

import pickle
import time

import numpy as np
import pytest
import torch

import secateurs as sc
from secateurs.errors import InputError, described, unknown
from secateurs.selection.ray_stages import packed, unpacked
from secateurs.selection.sources import from_arrays


def test_trees_as_bytes():
    tree = {"a": torch.arange(6).view(2, 3).T, "b": [(1, 2.5, "x"), None], "c": torch.empty(0)}
    back = unpacked(packed(tree))
    assert torch.equal(back["a"], tree["a"])
    assert back["b"] == tree["b"]
    assert back["c"].shape == (0,)


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made.address
    ray.shutdown()
    made.shutdown()


def test_ray_gives_the_selection_of_one_process(cluster, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 16))[rng.integers(0, 30, 4000)] + rng.normal(size=(4000, 16)) * 0.3
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    made = [
        sc.select(source, "density", 0.2, passes=1, clusters=25, epsilon=0.02, ray=ray)
        for source in (tmp_path / "rows.npy", from_arrays(rows.astype(np.float16), rows=500))
        for ray in (None, cluster)
    ]
    for other in made[1:]:
        assert np.array_equal(other.mask, made[0].mask)
        assert np.array_equal(np.concatenate(other.scores), np.concatenate(made[0].scores))
        assert other.by_cluster() == made[0].by_cluster()
        assert other.count("duplicate") == made[0].count("duplicate") > 0


def test_what_a_shard_refuses_on_the_cluster_is_refused_as_here(cluster, tmp_path):
    rows = np.random.default_rng(0).normal(size=(900, 8)).astype(np.float32)
    rows[777] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    told = []
    for ray in (None, cluster):
        with pytest.raises(InputError, match="NaN or Inf in row 777 of rows.npy") as caught:
            sc.select(tmp_path / "rows.npy", "density", 0.2, ray=ray)
        assert type(caught.value) is InputError
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_refusals_come_back_from_other_processes():
    for error in (
        InputError("keep", 1.5, "a fraction"),
        InputError("rows", described("none"), "some"),
        unknown("method", "densty", ["density"]),
    ):
        back = pickle.loads(pickle.dumps(error))
        assert (str(back), back.argument, back.value) == (str(error), error.argument, error.value)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "nowhere:99999"]
)
def test_an_address_at_which_nobody_listens_is_refused_at_once(address):
    pytest.importorskip("ray")
    rows, before = np.ones((4, 2)), time.monotonic()
    with pytest.raises(InputError, match="ray: got .*accepted: the address of a cluster"):
        sc.select(rows, "density", 0.5, ray=address)
    assert time.monotonic() - before < 60
