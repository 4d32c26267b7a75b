"""The sceptic: is the pruned network worth more than the same one trained from scratch?

    python examples/audit_a_method.py

Runs the protocol of "Rethinking the Value of Network Pruning" behind any method: the pruned
network as the method delivers it, the same architecture or mask from fresh weights with equally
many epochs (Scratch-E), and with equal computation (Scratch-B).
"""

from __future__ import annotations

import secateurs as sc
from secateurs.zoo.catalog import make_task


def main(method: str = "global-mp", epochs: float = 10, seeds: int = 3) -> list[dict]:
    settings = sc.TrainSettings(epochs=epochs, lr=0.05)
    task = make_task("zoo:convnet", "digits", training=settings)
    outcome = sc.prune(
        task.fresh_model(0),
        "rethinking-value",
        "sparsity=0.95",
        task,
        audited=method,
        seeds=seeds,
        cap=2,
    )
    for row in outcome.tables["arms"]:
        spread = f"± {row['std']:.3f}" if row["runs"] > 1 else ""
        print(f"{row['arm']:10s} accuracy {row['mean']:.3f} {spread}")
    return outcome.tables["arms"]


if __name__ == "__main__":
    main()
