"""What server and clients agree on: the run's configuration, read in one place."""

from __future__ import annotations

from functools import cache
from typing import Any

import secateurs as sc
from secateurs.federated.partition import Shares, divide, labels_of
from secateurs.methods.clients.fedtiny import FedTiny
from secateurs.task import Task
from secateurs.zoo.catalog import make_task


@cache
def task(model: str, data: str, epochs: float, lr: float) -> Task:
    return make_task(model, data, training=sc.TrainSettings(epochs=epochs, lr=lr))


def configured(config: Any) -> tuple[Task, FedTiny, Shares]:
    """The task, the method and who holds which samples."""
    made = task(config["model"], config["data"], config["epochs"], config["lr"])
    method = FedTiny(
        clients=config["clients"],
        alpha=config["alpha"],
        rounds=config["rounds"],
        shots=config["shots"],
        allocation=config["allocation"],
    )
    shares = divide(labels_of(made), method.clients, method.alpha, method.shots, config["seed"])
    return made, method, shares
