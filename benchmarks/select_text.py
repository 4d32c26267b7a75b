"""Which sentences to keep: Python's manual, embedded by MiniLM, selected in several ways.

    python benchmarks/select_text.py [--folder /tmp/select-text] [--keep 0.5 0.25 0.1] [--seeds 10]

Sentences of `pydoc_data.topics` with the topic that each belongs to (`secateurs.zoo.sentences`): a
fifth of the different sentences is held out before anything is selected, the rest is there with
its repetitions. Every arm keeps a share of the rows; what is kept is judged as a base of examples,
by the held-out accuracy of the nearest class mean and of logistic regression on it. Prototypes and
chance are of `neural-scaling-data-pruning`, prototypes with its floor of half an equal quota under
every class; density sees no labels. `random, no copies` is chance among what density's search for
duplicates leaves.

Measured with Python 3.11, one thread, 97 s of processor time, of which 68 s embed 2225 sentences;
means of 10 seeds of the selection with 95 % intervals. These do not cover the choice of the
held-out sentences: 374 of them have a standard error of 2.5.

    1851 rows of 384 numbers, 26 classes; 374 held out; 362 duplicates

          kept by            classes   nearest mean       logistic
        1 everything              26    58.0           68.2
      0.5 random                26.0    55.5 ±  0.9    62.0 ±  0.8
      0.5 random, no copies     26.0    56.6 ±  0.8    63.8 ±  0.9
      0.5 density               26.0    56.1 ±  0.7    63.6 ±  0.9
      0.5 prototypes, hard      26.0    55.5 ±  1.0    62.4 ±  1.1
      0.5 prototypes, easy      26.0    51.1 ±  1.0    57.3 ±  1.2
     0.25 random                25.9    51.0 ±  1.0    56.5 ±  1.2
     0.25 random, no copies     26.0    52.6 ±  1.4    57.3 ±  1.0
     0.25 density               25.8    53.8 ±  1.3    55.2 ±  1.7
     0.25 prototypes, hard      26.0    50.1 ±  1.2    52.7 ±  1.4
     0.25 prototypes, easy      26.0    45.9 ±  1.3    50.7 ±  1.0
      0.1 random                25.6    46.8 ±  1.2    47.4 ±  1.8
      0.1 random, no copies     25.8    47.2 ±  1.2    46.9 ±  1.5
      0.1 density               24.5    43.2 ±  1.8    41.1 ±  1.7
      0.1 prototypes, hard      26.0    39.6 ±  1.2    40.7 ±  0.9
      0.1 prototypes, easy      26.0    42.1 ±  1.3    40.9 ±  2.0

So what pays is that copies go: with half of the rows it is worth 1 to 2 points. Density is as good
as chance among the rest with a half, not to be told from it with a quarter (more by the nearest
mean, less by the regression), and worse with a tenth. Prototypes never win: the hard ones are like
chance with a half and lose below, the easy ones lose everywhere.
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
