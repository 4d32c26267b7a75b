"""A benchmark on a local two-worker Ray cluster gives the rows of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateurs.runs.matrix import Bench, Matrix
from secateurs.runs.workers import do

MATRIX = """
model: zoo:mlp
data: digits
methods: [global-mp, gmp]
budgets: [sparsity=0.9]
seeds: 2
baselines: false
latency: false
training: {epochs: 1}
finetuning: {epochs: 1}
"""


def rows(bench: Bench) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in bench.results()]


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    yield made.address
    ray.shutdown()
    made.shutdown()


def test_ray_gives_the_rows_of_one_process(cluster: str, tmp_path: Path) -> None:
    import torch

    from secateurs.runs.ray_cluster import run_on_ray

    there = Bench.create(Matrix.parse(MATRIX), tmp_path / "ray")
    run_on_ray(there, cluster)
    assert there.failures() == []

    here = Bench.create(Matrix.parse(MATRIX), tmp_path / "here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    while (job := here.claim("test")) is not None:
        do(here, job)
    torch.set_num_threads(threads)
    assert len(rows(here)) == 4
    assert rows(there) == rows(here)
