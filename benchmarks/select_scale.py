"""Density-based pruning of embeddings that are larger than memory: time and resident memory.

    python benchmarks/select_scale.py [--rows 1000000 2000000 4000000 8000000 10000000]
        [--folder /tmp/select-scale] [--width 512] [--clusters 500] [--iterations 25]
        [--no-duplicates] [--keep-files]

Writes the rows (`make_embeddings.py`, 1 GB a million at 512 × float16; looking for duplicates
takes as much again while it lasts), then selects a quarter of each size in a process of its own:
duplicates (k-means, rows grouped by cluster, comparison), k-means anew, quotas, the streaming
selection, the Parquet file. Told are the seconds of the clock and of the processors, by stage,
the largest resident set as the kernel tells it, and seconds a million rows; k-means is fitted on
a sample of 256 rows a cluster in 25 iterations (faiss's number), which is the constant part. Exit
code 1 above the limit.

Printed with one thread, on a machine that others kept busy (processor time is what to compare):

    rows        kept   duplicates   clock s    cpu s   cpu s/million   resident GB
    1,000,000   250,000    47,016        107      103       103.4          1.51
    2,000,000   500,000    93,213        265      169        84.4          1.50
    4,000,000 1,000,000   184,091        955      292        73.0          1.73
    8,000,000 2,000,000   358,222       2313      567        70.8          1.85
    10,000,000 2,500,000   442,602       1877      772        77.2          2.03

So 40 s of fitting and 65 to 73 s for a million rows. Since then a row is compared with the 4,096
rows of its cluster before it, not with those of its piece of 4,096 only, which finds what lay
astride a cut and is up to twice the work where clusters are larger than that; files are read by
smaller ranges, and near ties of k-means are decided in float64:

    10,000,000 2,500,000   470,448       1745     1879       187.9          1.49

with two threads, most of the time beside a run of the tests, which raises processor time too; 785
of these seconds of the clock are the comparison. The 28,000 duplicates more are those astride cuts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIMIT = 2 << 30
"""Bytes that the process may hold."""


class Clock:
    """A listener that adds up the seconds of every stage."""

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def event(self, kind: str, values: dict[str, Any]) -> None: ...

    def begin(self, label: str, total: int) -> None:
        self.begun[label] = time.perf_counter()

    def advance(self, label: str, done: int) -> None: ...

    def end(self, label: str) -> None:
        spent = time.perf_counter() - self.begun[label]
        self.seconds[label] = self.seconds.get(label, 0) + spent


def child(folder: str, options: dict[str, Any]) -> None:
    import torch

    import secateurs as sc

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    clock, work = Clock(), Path(folder).with_suffix(".work")
    made = sc.select(folder, "density", 0.25, work=sc.Workspace(work, [clock]), **options)
    begin = time.perf_counter()
    made.write(f"{folder}.kept.parquet")
    clock.seconds["write"] = time.perf_counter() - begin
    shutil.rmtree(work)
    told = {"kept": made.kept, "duplicates": made.count("duplicate"), "stages": clock.seconds}
    print(json.dumps(told))


def measured(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run the child, and ask the kernel about it."""
    command = [sys.executable, __file__, "--child", str(folder), json.dumps(options)]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the selection ended with {os.waitstatus_to_exitcode(status)}")
    return {**json.loads(told.splitlines()[-1]), "wall": time.perf_counter() - begin,
            "cpu": usage.ru_utime + usage.ru_stime, "resident": usage.ru_maxrss * 1024}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    millions = [1, 2, 4, 8, 10]
    parser.add_argument("--rows", type=int, nargs="+", default=[m * 10**6 for m in millions])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/select-scale"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--iterations", type=int, default=25, help="of k-means on its sample")
    parser.add_argument("--format", choices=("npy", "parquet"), default="npy")
    parser.add_argument("--no-duplicates", action="store_true")
    parser.add_argument("--keep-files", action="store_true")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    from make_embeddings import SHARD, write

    options: dict[str, Any] = {"clusters": given.clusters, "iterations": given.iterations}
    if given.no_duplicates:
        options["epsilon"] = None
    largest, stages = 0, dict[int, dict[str, float]]()
    print("rows        kept   duplicates   clock s    cpu s   cpu s/million   resident GB")
    for rows in given.rows:
        # the last shard of a set may be cut short, so only whole ones are shared between sets
        rest = rows % SHARD
        store = given.folder / "rows" if not rest else given.folder / f"rows-{rows}"
        shards = write(store, rows, given.width, given.format)
        view = given.folder / f"{rows}"
        view.mkdir(exist_ok=True)
        for path in shards:
            (view / path.name).unlink(missing_ok=True)
            (view / path.name).symlink_to(path.absolute())
        told = measured(view, options)
        largest, stages[rows] = max(largest, told["resident"]), told["stages"]
        print(f"{rows:<9,} {told['kept']:>9,} {told['duplicates']:>9,} {told['wall']:>10.0f} "
              f"{told['cpu']:>8.0f} {told['cpu'] / rows * 1e6:>11.1f} "
              f"{told['resident'] / 2**30:>13.2f}", flush=True)  # fmt: skip
        shutil.rmtree(view)
        Path(f"{view}.kept.parquet").unlink()
    names = list(dict.fromkeys(name for one in stages.values() for name in one))
    print("\nseconds of the clock by stage")
    for name in names:
        shown = "".join(f"{one.get(name, 0):>9.1f}" for one in stages.values())
        print(f"  {name:<24}{shown}")
    if not given.keep_files:
        shutil.rmtree(given.folder)
    print(f"\nlargest resident set {largest / 2**30:.2f} GB, limit {LIMIT / 2**30:.0f}")
    return int(largest > LIMIT)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], json.loads(sys.argv[3]))
    else:
        sys.exit(main())
