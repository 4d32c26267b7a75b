"""The engineer: a trained network must become small, and stay good.

    python examples/compress_a_model.py

Trains a ResNet-20 on the digits (yours would come from a checkpoint), cuts 95 % of its weights
by global magnitude with a floor under every layer, lets it recover, and writes the result as
safetensors with its masks at one bit a weight.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import secateurs as sc
from secateurs.zoo.catalog import make_task


def main(epochs: float = 6, out: str | None = None) -> sc.Outcome:
    settings = sc.TrainSettings(epochs=epochs, lr=0.05)
    task = make_task("zoo:resnet-20?width=0.5", "digits", training=settings)
    model = task.fresh_model(0)
    sc.fit(model, task, task.training)

    outcome = sc.prune(model, "global-mp", "sparsity=0.95", task, min_percent=0.05)

    assert outcome.before is not None
    assert outcome.after is not None
    before, after = outcome.metrics_before["accuracy"], outcome.metrics_after["accuracy"]
    print(f"accuracy  {before:.3f} -> {after:.3f}")
    print(f"non-zeros {outcome.before.nonzero:,} -> {outcome.after.nonzero:,}")
    print(f"bytes     {outcome.before.dense_bytes:,} -> {outcome.after.sparse_bytes:,}")
    print(outcome.promise)

    folder = Path(out or tempfile.mkdtemp()) / "pruned"
    sc.save(outcome, folder)
    again = sc.load(folder, task.fresh_model(1))
    assert task.measure(again.model) == task.measure(outcome.model)
    print(f"saved and read back from {folder}")
    return outcome


if __name__ == "__main__":
    main()
