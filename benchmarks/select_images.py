"""Which images to keep: Fashion-MNIST by its pixels, and by the features of a network.

    python benchmarks/select_images.py [--folder /tmp/select-images] [--keep 0.5 0.25 0.1]
        [--seeds 3]

PLACEHOLDER
"""

from __future__ import annotations

import time
from pathlib import Path

from select_text import embedded, parser, table

import secateurs as sc
from secateurs.state import write_tensors
from secateurs.training.loop import fit
from secateurs.zoo.catalog import make_task

DATA = "fashion-mnist?limit=6000&size=14"
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
    given = parser("/tmp/select-images", 3).parse_args()
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
