"""What `import secateurs` adds to `import torch`, in seconds.

    python benchmarks/import_time.py [--repeats 7]

Fresh interpreters take turns, with and without. Bar: at most 0.3 s more.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(statement: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    seconds("import torch, secateurs")
    pairs = [(seconds("import torch"), seconds("import torch, secateurs")) for _ in range(repeats)]
    base = statistics.median(a for a, _ in pairs)
    more = statistics.median(b - a for a, b in pairs)
    print(f"import torch              {base:.2f} s")
    print(f"import secateurs adds     {more:.2f} s (ratio {1 + more / base:.2f})")


if __name__ == "__main__":
    main()
