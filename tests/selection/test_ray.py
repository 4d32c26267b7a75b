"""On a local two-worker Ray cluster a selection is that of one process."""

import numpy as np
import pytest
import torch

import secateurs as sc
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
