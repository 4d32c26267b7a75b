"""Embeddings like those of a web crawl, written shard by shard: concepts of very unequal size.

    python benchmarks/make_embeddings.py 10000000 --out /data/rows [--width 512] [--format npy]

A row is a concept plus noise: of 2,000 concepts the n-th has a share of 1/n (Zipf), each has a
spread of its own, and one row in twenty is a near copy of another row of its shard. Float16. A
shard is a function of the seed and its number alone, so a small set is the beginning of a large
one; a shard that is there is not written again. It takes the memory of one shard.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch

CONCEPTS, COPIES, SHARD = 2000, 0.05, 250_000


def shard(number: int, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """(rows, width) float16."""
    shared = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(CONCEPTS, width, generator=shared), dim=1)
    spread = 0.4 + 0.8 * torch.rand(CONCEPTS, generator=shared)
    own = torch.Generator().manual_seed(1_000_003 * (seed + 1) + number)
    share = 1 / torch.arange(1, CONCEPTS + 1, dtype=torch.float64)
    concept = torch.multinomial(share, rows, replacement=True, generator=own)
    made = np.empty((rows, width), np.float16)
    for first in range(0, rows, 16384):
        which = concept[first : first + 16384]
        noise = torch.randn(len(which), width, generator=own) / width**0.5
        made[first : first + len(which)] = (centres[which] + spread[which, None] * noise).numpy()
    copies = torch.randperm(rows, generator=own)[: int(COPIES * rows)].numpy()
    whence = torch.randint(rows, (len(copies),), generator=own).numpy()
    made[copies] = made[whence]
    made[copies] += (torch.randn(len(copies), width, generator=own) * 1e-3).numpy()
    return made


def write(folder: Path, rows: int, width: int, kind: str = "npy", size: int = SHARD) -> list[Path]:
    """Write the shards that are not there, and give all of them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, first in enumerate(range(0, rows, size)):
        path = folder / f"{number:05}.{kind}"
        paths.append(path)
        if path.exists():
            continue
        made, partial = shard(number, min(size, rows - first), width), path.with_suffix(".partial")
        if kind == "npy":
            with open(partial, "wb") as file:
                np.save(file, made)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            lists = pa.FixedSizeListArray.from_arrays(pa.array(made.reshape(-1)), width)
            ids = np.arange(first, first + len(made))
            pq.write_table(
                pa.table({"id": ids, "embedding": lists}), partial, row_group_size=65_536
            )
        os.replace(partial, path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--format", choices=("npy", "parquet"), default="npy")
    given = parser.parse_args()
    print(*write(given.out, given.rows, given.width, given.format), sep="\n")
