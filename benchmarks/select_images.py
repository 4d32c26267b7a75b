"""Which images to keep: Fashion-MNIST by its pixels, and by the features of a network.

    python benchmarks/select_images.py [--folder /tmp/select-images] [--keep 0.5 0.25 0.1]
        [--seeds 5]

The same table as `select_text.py`, of 10,000 training images of 14x14 pixels and all 10,000
held-out ones: once the embedding is the pixels, once what goes into the last layer of zoo:convnet
after three epochs on those 10,000 images, with their labels. So the features know more than what
is kept, and tell which examples a classifier on top of a network needs, not a new network.

Measured with one thread, 118 s of processor time; means of 5 seeds of the selection with 95 %
intervals. Pixels, 159 duplicates:

          kept by            classes   nearest mean       logistic
        1 everything              10    67.8           82.6
      0.5 random                10.0    67.9 ±  0.1    81.8 ±  0.2
      0.5 random, no copies     10.0    67.9 ±  0.1    81.8 ±  0.3
      0.5 density               10.0    68.6 ±  0.7    81.3 ±  0.2
      0.5 prototypes, hard      10.0    69.3 ±  0.3    81.4 ±  0.1
      0.5 prototypes, easy      10.0    65.0 ±  0.3    78.5 ±  0.5
     0.25 random                10.0    67.9 ±  0.2    80.8 ±  0.5
     0.25 random, no copies     10.0    67.9 ±  0.2    80.6 ±  0.5
     0.25 density               10.0    68.4 ±  0.7    79.5 ±  0.3
     0.25 prototypes, hard      10.0    66.0 ±  1.4    78.8 ±  0.2
     0.25 prototypes, easy      10.0    64.6 ±  0.7    75.9 ±  1.1
      0.1 random                10.0    67.6 ±  0.4    79.1 ±  0.4
      0.1 random, no copies     10.0    67.7 ±  0.4    79.0 ±  0.4
      0.1 density               10.0    66.6 ±  1.6    76.1 ±  0.9
      0.1 prototypes, hard      10.0    59.1 ±  1.6    70.2 ±  1.4
      0.1 prototypes, easy      10.0    63.7 ±  1.4    72.2 ±  1.1

Features, 64 numbers (the network itself has 84.1 % right), 3034 duplicates:

          kept by            classes   nearest mean       logistic
        1 everything              10    81.9           84.7
      0.5 random                10.0    82.0 ±  0.1    84.4 ±  0.2
      0.5 random, no copies     10.0    81.7 ±  0.1    84.6 ±  0.1
      0.5 density               10.0    81.7 ±  0.2    84.5 ±  0.1
      0.5 prototypes, hard      10.0    81.5 ±  0.1    84.5 ±  0.1
      0.5 prototypes, easy      10.0    82.2 ±  0.1    83.7 ±  0.0
     0.25 random                10.0    81.9 ±  0.2    84.1 ±  0.2
     0.25 random, no copies     10.0    81.6 ±  0.1    84.3 ±  0.2
     0.25 density               10.0    81.5 ±  0.2    84.5 ±  0.1
     0.25 prototypes, hard      10.0    80.6 ±  0.2    84.1 ±  0.1
     0.25 prototypes, easy      10.0    82.0 ±  0.1    82.7 ±  0.4
      0.1 random                10.0    81.7 ±  0.2    83.9 ±  0.2
      0.1 random, no copies     10.0    81.6 ±  0.2    83.9 ±  0.1
      0.1 density               10.0    81.5 ±  0.3    83.8 ±  0.3
      0.1 prototypes, hard      10.0    79.9 ±  0.6    83.2 ±  0.5
      0.1 prototypes, easy      10.0    81.7 ±  0.1    82.1 ±  0.6

By pixels chance wins: no method beats it under logistic regression, and the less is kept the more
they lose. The nearest mean alone likes half of the images better without the most typical ones
(hard prototypes: 1.4 points more than chance, and more than everything). By features all is close:
a quarter of the images by density is within 0.2 of everything and 0.4 above chance, and with a
tenth nothing beats chance.
Easy prototypes are the worst for a regression with every share but one.
Cosines of such features are close to 1, so the usual ε of 0.01 calls a third of them duplicates;
leaving these out costs nothing.
"""

from __future__ import annotations

import time
from pathlib import Path

from select_text import embedded, parser, table

import secateurs as sc
from secateurs.state import write_tensors
from secateurs.training.loop import fit
from secateurs.zoo.catalog import make_task

DATA = "fashion-mnist?limit=10000&size=14"
EPOCHS = 3


def trained(path: Path) -> str:
    """zoo:convnet after three epochs on the images that are selected from, as a name."""
    if not path.exists():
        training = sc.TrainSettings(epochs=EPOCHS, lr=0.05)
        task = make_task("zoo:convnet", DATA, training=training)
        model = task.fresh_model(0)
        fit(model, task, training, seed=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, model.state_dict(), {})
        print(
            f"zoo:convnet: {task.measure(model)['accuracy']:.3f} of the held-out images are right"
        )
    return f"zoo:convnet@{path}"


def main() -> None:
    given = parser("/tmp/select-images", 5).parse_args()
    encoders = {"pixels": "pixels", "features": trained(given.folder / "convnet.safetensors")}
    for name, encoder in encoders.items():
        begin = time.process_time()
        paths = embedded(given.folder / name, DATA, encoder)
        print(f"\n{name}, embedded in {time.process_time() - begin:.0f} s of processor time")
        made = sc.select(paths[0], "density", 0.25)
        print(f"{made.count('duplicate')} duplicates")
        table(paths, given.keep, given.seeds)


if __name__ == "__main__":
    main()
