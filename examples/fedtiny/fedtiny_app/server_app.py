"""The server: it holds a few public samples and the test set, and never sees a client's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.serverapp import ServerApp

import secateurs as sc
from fedtiny_app.settings import configured
from secateurs.federated.partition import restricted

app = ServerApp()


@app.main()
def main(grid: Any, context: Any) -> None:
    config = context.run_config
    task, method, shares = configured(config)
    seed, out = config["seed"], Path(config["out"])
    outcome = method.serve(
        grid,
        task.fresh_model(seed),
        restricted(task, shares.public),
        method.accept(config["budget"]),
        seed=seed,
        work=sc.Workspace(out / "work"),
    )
    outcome.metrics_after = task.measure(outcome.model)
    sc.save(outcome, out / "outcome")
    total = outcome.tables["messages"][-1]
    print(f"accuracy {outcome.metrics_after['accuracy']:.4f}, {outcome.masks}")
    print(f"bytes to clients {total['down']:,}, from clients {total['up']:,}")
