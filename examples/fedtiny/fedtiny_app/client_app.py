"""A client. Here it takes its part of a public data set; a real node returns its own data."""

from __future__ import annotations

from typing import Any

from fedtiny_app.settings import configured
from secateurs.federated.client import client_app
from secateurs.federated.partition import restricted
from secateurs.task import Task


def own_task(context: Any) -> Task:
    """The model, the loss, and this node's samples."""
    task, _, shares = configured(context.run_config)
    return restricted(task, shares.clients[int(context.node_config["partition-id"])])


app = client_app(own_task)
