"""Two CPU processes under `accelerate launch`: identical masks, the result of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
]


def run(processes: int, method: str, out: Path) -> None:
    launcher = LAUNCH if processes == 2 else [sys.executable]
    subprocess.run(
        [*launcher, str(EXAMPLE), method, str(out)],
        check=True,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize("method", ["gmp", pytest.param("granet", marks=pytest.mark.slow)])
def test_two_processes_equal_one(method: str, tmp_path: Path) -> None:
    run(1, method, tmp_path / "one")
    run(2, method, tmp_path / "two")
    alone = load_file(tmp_path / "one" / "rank-0" / "model.safetensors")
    ranks = [load_file(tmp_path / "two" / f"rank-{r}" / "model.safetensors") for r in (0, 1)]
    masks = [load_file(tmp_path / "two" / f"rank-{r}" / "masks.safetensors") for r in (0, 1)]
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])
    for name, weight in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], weight, rtol=1e-3, atol=1e-5)
