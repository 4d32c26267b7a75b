"""Which sentences to keep: Python's manual, embedded by MiniLM, selected in several ways.

    python benchmarks/select_text.py [--folder /tmp/select-text] [--keep 0.5 0.25 0.1] [--seeds 10]

PLACEHOLDER
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import secateurs as sc
from secateurs.report.leaderboard import t_quantile
from secateurs.runs.embedding import embed
from secateurs.selection.files import open_files

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("neural-scaling", {"metric": "random", "class_floor": 0.0}),
    "random, no copies": ("density", {"clusters": 1, "within": "random"}),
    "density": ("density", {}),
    "prototypes, hard": ("neural-scaling", {"order": "hard"}),
    "prototypes, easy": ("neural-scaling", {"order": "easy"}),
}
"""A method with options. Density with one cluster is duplicates and then chance."""
C = 10.0
"""Of the logistic regression, on embeddings of length 1; not tuned."""


def embedded(folder: Path, data: str, encoder: str) -> tuple[Path, Path]:
    """Files of the training and the held-out samples, made where they are not there yet."""
    paths = folder / "train.parquet", folder / "test.parquet"
    for path, part in zip(paths, ("train", "test"), strict=True):
        if not path.exists():
            embed(data=data, encoder=encoder, out=path, part=part, take=None, batch_size=64,
                  threads=None, as_json=True, watch=lambda _: nullcontext([]))  # fmt: skip
    return paths


def rows_of(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of length 1, (rows, width), and labels."""
    source = open_files(path)
    shards = range(len(source.shards))
    vectors = [block.numpy() for number in shards for block in source.vectors(number)]
    return np.concatenate(vectors), np.concatenate([source.narrow(n).labels for n in shards])


def judged(train: tuple[Any, Any], test: tuple[Any, Any]) -> tuple[float, float]:
    """Held-out accuracy of the nearest class mean and of logistic regression, in per cent."""
    from sklearn.linear_model import LogisticRegression

    vectors, labels = train
    names = np.unique(labels)
    means = np.stack([vectors[labels == name].mean(0) for name in names])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    nearest = names[(test[0] @ means.T).argmax(1)]
    fitted = LogisticRegression(C=C, max_iter=300).fit(vectors, labels)
    return tuple(100 * float((p == test[1]).mean()) for p in (nearest, fitted.predict(test[0])))


def shown(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval."""
    half = 0.0
    if len(values) > 1:
        half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{np.mean(values):5.1f} ± {half:4.1f}"


def table(paths: tuple[Path, Path], keeps: Sequence[float], seeds: int) -> None:
    """Select by every arm, judge what is kept, and print."""
    train, test = (rows_of(path) for path in paths)
    count, width, classes = *train[0].shape, len(np.unique(train[1]))
    print(f"{count} rows of {width} numbers, {classes} classes; {len(test[0])} held out\n")
    print(f"{'':>5} {'kept by':<18} {'classes':>7} {'nearest mean':>14} {'logistic':>14}")
    everything = " ".join(f"{value:>7.1f}{'':<7}" for value in judged(train, test)).rstrip()
    print(f"{'1':>5} {'everything':<18} {classes:>7} {everything}")
    for keep in keeps:
        for name, (method, options) in ARMS.items():
            found, left = [], []
            for seed in range(seeds):
                kept = sc.select(paths[0], method, keep, seed=seed, **options).mask
                left.append(len(np.unique(train[1][kept])))
                found.append(judged((train[0][kept], train[1][kept]), test))
            told = " ".join(f"{shown(one):>14}" for one in zip(*found, strict=True))
            print(f"{keep:>5} {name:<18} {np.mean(left):>7.1f} {told}", flush=True)


def parser(folder: str, seeds: int) -> argparse.ArgumentParser:
    """The options of both benchmarks."""
    made = argparse.ArgumentParser()
    made.add_argument("--folder", type=Path, default=Path(folder), help="where embeddings are kept")
    made.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    made.add_argument("--seeds", type=int, default=seeds)
    return made


def main() -> None:
    given = parser("/tmp/select-text", 10).parse_args()
    begin = time.process_time()
    paths = embedded(given.folder, "topics?as=sentences", "pretrained:all-minilm-l6-v2")
    print(f"embedded in {time.process_time() - begin:.0f} s of processor time")
    made = sc.select(paths[0], "density", 0.25)
    print(f"{made.count('duplicate')} duplicates, such as")
    text = open_files(paths[0]).narrow(0).columns["text"]
    looser = sc.select(paths[0], "density", 0.25, epsilon=0.1)
    near = [(r, like) for r, like, _ in looser.pairs if text[r] != text[like]]
    for row, like in [made.pairs[0][:2], *near[:2]]:
        print(f"  {made.id_of(row)}: {text[row]}\n  {made.id_of(like)}: {text[like]}\n")
    table(paths, given.keep, given.seeds)


if __name__ == "__main__":
    main()
