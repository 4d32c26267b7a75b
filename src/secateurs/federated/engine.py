"""Where a federation runs: in this process, or in Flower's simulation engine on Ray.

Both run the same `ClientApp` and the same server function through the same messages, so both
give the same bits. The first starts at once; the second trains several clients at a time, and is
what ``flwr run`` uses.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from secateurs.errors import InputError, SecateursError, described, library
from secateurs.federated.client import client_app
from secateurs.task import Task

Engine = Literal["inline", "flower"]
Main = Callable[[Any], None]
"""What the server does with Flower's grid."""


def run_clients(main: Main, tasks: list[Task], engine: Engine) -> None:
    """Let `main` talk to one client for each of `tasks`.

    Raises:
        InputError: Flower is not installed; it is to start Ray where Ray already runs.
        SecateursError: whatever `main` raises.
    """
    if engine == "inline":
        _quietly_import()
        with identity():
            main(inline_grid(client_app(lambda context: tasks[_rank(context)]), len(tasks)))
    else:
        _simulate(main, tasks)


def _rank(context: Any) -> int:
    return int(context.node_config["partition-id"])


def _quietly_import() -> Any:
    """Flower, without its reports to its makers unless the user wants them."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    return library("flwr", "federated")


# ---------------------------------------------------------------- in this process


def inline_grid(
    app: Any,
    clients: int,
    *,
    order: Callable[[list[Any]], list[Any]] = list,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """A Flower `Grid` whose nodes are in this process; messages are answered when sent.

    Args:
        app: of the clients.
        clients: number of nodes; node i has the partition i.
        order: of the answers, as it would be on a network.
        config: Flower's run configuration, for apps that read it.
    """
    _quietly_import()
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.app.user_config import UserConfig
    from flwr.serverapp import Grid

    class InlineGrid(Grid):
        """Nodes with their contexts, numbered from 1."""

        def __init__(self) -> None:
            self.contexts = {
                number + 1: Context(
                    run_id=0,
                    node_id=number + 1,
                    node_config=UserConfig(**{"partition-id": number, "num-partitions": clients}),
                    state=RecordDict(),
                    run_config=UserConfig(config or {}),
                )
                for number in range(clients)
            }
            self.answers: dict[str, Any] = {}
            self.sent = 0
            self._run: Any = None  # until Flower says which

        def set_run(self, run: Any) -> None:
            self._run = run

        @property
        def run(self) -> Any:
            return self._run

        def create_message(
            self,
            content: Any,
            message_type: str,
            dst_node_id: int,
            group_id: str,
            ttl: float | None = None,
        ) -> Any:
            return Message(
                content=content, message_type=message_type, dst_node_id=dst_node_id,
                group_id=group_id, ttl=ttl,
            )  # fmt: skip

        def get_node_ids(self) -> Iterable[int]:
            return list(self.contexts)

        def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
            pushed = []
            for message in messages:
                self.sent += 1
                name = str(self.sent)
                message.metadata.__dict__["_message_id"] = name
                self.answers[name] = self._answer(message)
                pushed.append(name)
            return pushed

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
            return order([self.answers.pop(name) for name in message_ids])

        def send_and_receive(
            self, messages: Iterable[Any], *, timeout: float | None = None
        ) -> Iterable[Any]:
            return self.pull_messages(self.push_messages(messages))

        def _answer(self, message: Any) -> Any:
            try:
                return app(message, self.contexts[message.metadata.dst_node_id])
            except Exception as failure:
                return Message(Error(0, f"{type(failure).__name__}: {failure}"), reply_to=message)

    return InlineGrid()


@contextmanager
def identity() -> Iterator[None]:
    """Who sends the server's messages; Flower's engines set it, here we do."""
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.supercore.task_identity import TaskIdentity

    fields = ("_task_id", "_run_id", "_node_id")
    before = {field: getattr(TaskIdentity, field) for field in fields}
    TaskIdentity.task_id, TaskIdentity.run_id = 1, 0
    TaskIdentity.node_id = SUPERLINK_NODE_ID
    try:
        yield
    finally:
        for field, value in before.items():
            setattr(TaskIdentity, field, value)


# ---------------------------------------------------------------- Flower's simulation


def _simulate(main: Main, tasks: list[Task]) -> None:
    """Flower's simulation engine, a Ray worker a CPU."""
    _quietly_import()
    ray = library("ray", "federated")
    if ray.is_initialized():
        running = described("flower in a process that uses Ray already")
        raise InputError("engine", running, "inline: Flower shuts Ray down when it ends")
    # workers import what this process can import
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ray.init(
        num_cpus=os.cpu_count() or 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": environment},
    )
    try:
        simulate(main, client_app(_Shipped(ray.put(tasks))), len(tasks))
    finally:
        ray.shutdown()


def simulate(main: Main, app: Any, clients: int) -> None:
    """Run a server function against a `ClientApp` on Flower's simulation engine.

    Raises:
        SecateursError: the engine broke down; or whatever `main` raises.
    """
    _quietly_import()
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    failures: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def serve(grid: Any, context: Any) -> None:
        try:
            main(grid)
        except BaseException as failure:
            failures.append(failure)

    gpus, processes = torch.cuda.device_count(), os.cpu_count() or 1
    resources = {"num_cpus": 1, "num_gpus": gpus / processes}
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        run_simulation(server, app, clients, backend_config={"client_resources": resources})
    except RuntimeError as failure:
        raise SecateursError(f"Flower's simulation engine: {failure}") from failure
    finally:
        logger.setLevel(level)
    if failures:
        raise failures[0]


class _Shipped:
    """Tasks that travel to a Ray worker once, not with every message."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def __call__(self, context: Any) -> Task:
        name = self.reference.hex()
        if name not in _ARRIVED:
            import ray

            _ARRIVED.clear()
            _ARRIVED[name] = ray.get(self.reference)
        return _ARRIVED[name][_rank(context)]


_ARRIVED: dict[str, list[Task]] = {}
"""In a worker: the tasks of the federation that it serves."""
