"""The client, an ordinary Flower `ClientApp`: it answers five kinds of message.

| message | what it does | what it sends back |
| --- | --- | --- |
| ``query.hello`` | counts its samples | rank, samples, development samples |
| ``query.abns_stats`` | runs every candidate on its development samples | means, variances |
| ``evaluate.abns_loss`` | scores every candidate with averaged statistics | summed losses |
| ``train.sparse`` | trains the weights that are kept | active values, dense remainder |
| ``train.sparse_grow`` | the same | the same, and its largest gradients |

A client keeps its mask, with a version, in Flower's ``context.state``. Where a message assumes a
version that it does not have, it says so and gets the whole mask. What it draws depends on the
seed, the round and its rank (Flower's ``partition-id``), not on the order of answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.analysis.recalibration import recalibrate
from secateurs.devices import device_of, to_device
from secateurs.errors import described, library, require
from secateurs.federated.candidates import POOLED, candidate_of
from secateurs.federated.growth import inactive_gradients
from secateurs.federated.memory import PeakMemory, held_by
from secateurs.federated.messages import (
    Arrays,
    Layout,
    State,
    arrays_of,
    config_of,
    content,
    load_state,
)
from secateurs.federated.partition import indexed, restricted
from secateurs.federated.statistics import set_statistics, statistics_of, tracked_norms
from secateurs.parts.masks import Masks
from secateurs.state import model_state
from secateurs.task import Task, batch_size, head
from secateurs.training.keeping import MaskKeeper
from secateurs.training.loop import fit, own_randomness
from secateurs.training.order import batches_from, mix, sample_count, steps_per_epoch

OwnTask = Callable[[Any], Task]
"""Flower's context -> the model, the loss, and the client's own samples as training loader."""

HELLO, STATS, LOSS = "query.hello", "query.abns_stats", "evaluate.abns_loss"
TRAIN, GROW = "train.sparse", "train.sparse_grow"
POOL, MASK, ABOUT = "pool", "mask", "about"
NEEDS_MASK = "needs-mask"
LEAST = 2
"""Development samples of a client at least: batch norm has no variance of one."""


def client_app(own_task: OwnTask) -> Any:
    """The `ClientApp` of clients whose data `own_task` brings."""
    flwr = library("flwr.clientapp", "federated")
    app = flwr.ClientApp()

    @app.query("hello")
    def hello(message: Any, context: Any) -> Any:
        client = _Client.of(own_task, message, context)
        return _reply(message, {}, {"rank": client.rank, **client.counts()})

    @app.query("abns_stats")
    def abns_stats(message: Any, context: Any) -> Any:
        client = _Client.of(own_task, message, context)
        context.state[POOL] = _array_record(client.arrays)
        return _reply(message, client.candidate_statistics(client.arrays), client.counts())

    @app.evaluate("abns_loss")
    def abns_loss(message: Any, context: Any) -> Any:
        client = _Client.of(own_task, message, context)
        if POOLED in client.arrays:
            context.state[POOL] = _array_record(client.arrays)
        elif POOL not in context.state:
            return _reply(message, {}, {NEEDS_MASK: 1})
        pool = dict(context.state[POOL].to_torch_state_dict())
        losses = client.candidate_losses(pool, client.arrays)
        return _reply(message, {"losses": losses}, client.counts())

    def train(message: Any, context: Any) -> Any:
        client = _Client.of(own_task, message, context)
        masks = client.masks(context.state)
        if masks is None:
            return _reply(message, {}, {NEEDS_MASK: 1})
        arrays, metrics = client.train(masks)
        return _reply(message, arrays, metrics)

    app.train("sparse")(train)
    app.train("sparse_grow")(train)
    return app


def _reply(message: Any, arrays: Arrays, metrics: Mapping[str, int | float]) -> Any:
    from flwr.app import Message

    return Message(content(arrays, metrics=metrics), reply_to=message)


def _array_record(arrays: Arrays) -> Any:
    from flwr.app import ArrayRecord

    return ArrayRecord(arrays)


@dataclass(frozen=True)
class _Client:
    """One message at one client.

    Attributes:
        task: its data and its loss.
        rank: its number, from which its randomness is drawn.
        config, arrays: what the server sent.
        model: fresh, to be filled.
    """

    task: Task
    rank: int
    config: Mapping[str, Any]
    arrays: Arrays
    model: nn.Module

    @staticmethod
    def of(own_task: OwnTask, message: Any, context: Any) -> _Client:
        task = own_task(context)
        rank = int(context.node_config.get("partition-id", context.node_id))
        model = copy.deepcopy(task.starting_model(0))
        config = config_of(message.content)
        return _Client(task, rank, config, arrays_of(message.content), model)

    @property
    def layout(self) -> Layout:
        """Of the client's own model; the server's must be the same."""
        state = self.model.state_dict()
        for name in self.config["masked"]:
            require(name in state, "message", name, "tensors that the client's model has")
        return Layout.of(state, dict.fromkeys(self.config["masked"]))

    def counts(self) -> dict[str, int]:
        """Training and development samples."""
        total = sample_count(indexed(self.task).dataset)
        return {"samples": total, "development": self._development_count(total)}

    def _development_count(self, total: int) -> int:
        require(total >= LEAST, "client", described(f"{total} samples"), f"at least {LEAST}")
        return min(max(LEAST, round(self.config["dev-fraction"] * total)), total)

    def development(self) -> Task:
        """A fixed subset of the training samples."""
        total = sample_count(indexed(self.task).dataset)
        generator = torch.Generator().manual_seed(mix(self.config["seed"], self.rank, 3))
        order = torch.randperm(total, generator=generator)
        return restricted(self.task, order[: self._development_count(total)].sort().values)

    # ------------------------------------------------------------ candidates

    def candidate(self, pool: Arrays, number: int) -> tuple[State, Masks]:
        """State and masks of a candidate: the first so many of each layer's ranked weights."""
        return candidate_of(self.layout, pool, number)

    def candidate_statistics(self, pool: Arrays) -> Arrays:
        """(candidates, channels) running means and variances on the development samples."""
        dev = self.development()
        loader = dev.training_loader()
        passes = self.config["bn-passes"] * steps_per_epoch(loader)
        momentum = self.config["bn-momentum"] or None
        seed = mix(self.config["seed"], self.rank, 4)
        found = []
        with own_randomness():
            for number in range(len(pool["counts"])):
                load_state(self.model, self.candidate(pool, number)[0])
                recalibrate(
                    self.model, loader, passes, split=dev.unpack, seed=seed, momentum=momentum
                )
                found.append(statistics_of(self.model))
        means, variances = zip(*found, strict=True)
        return {"means": torch.stack(means), "variances": torch.stack(variances)}

    def candidate_losses(self, pool: Arrays, statistics: Arrays) -> Tensor:
        """(candidates,) summed losses over the development samples, in eval mode."""
        dev, losses = self.development(), []
        samples = self.counts()["development"]
        for number in range(len(pool["counts"])):
            load_state(self.model, self.candidate(pool, number)[0])
            if tracked_norms(self.model):
                means, variances = statistics["means"], statistics["variances"]
                set_statistics(self.model, means[number], variances[number])
            losses.append(dev.measure(self.model)["loss"] * samples)
        return torch.tensor(losses, dtype=torch.float64)

    # ------------------------------------------------------------ training

    def masks(self, state: Any) -> Masks | None:
        """The masks of the version that the message is about; None where they are not known."""
        layout, version = self.layout, self.config["version"]
        held = int(state[ABOUT]["version"]) if ABOUT in state else -1
        own = dict(state[MASK].to_torch_state_dict()) if MASK in state else {}
        if self.config["form"] == "mask":
            masks = layout.unpack_mask(self.arrays)
        elif held == version:
            masks = layout.unpack_mask(own)
        elif self.config["form"] == "candidate" and POOL in state:
            pool = dict(state[POOL].to_torch_state_dict())
            masks = self.candidate(pool, self.config["candidate"])[1]
        elif self.config["form"] == "change" and held == version - 1:
            masks = layout.changed(layout.unpack_mask(own), self.arrays)
        else:
            return None
        self._remember(state, masks, version)
        return masks

    def _remember(self, state: Any, masks: Masks, version: int) -> None:
        from flwr.app import ConfigRecord

        state[MASK] = _array_record(self.layout.pack_mask(masks))
        state[ABOUT] = ConfigRecord({"version": version})
        if POOL in state:
            del state[POOL]

    def train(self, masks: Masks) -> tuple[Arrays, dict[str, int | float]]:
        """The local passes of a round, from the server's weights under the client's masks."""
        config, layout = self.config, self.layout
        model, task = self.model, self.task
        load_state(model, layout.unpack(self.arrays, masks))
        steps = self._steps()
        settings = replace(task.training, steps=steps * config["rounds"])
        first = steps * (config["round"] - 1)
        seed = mix(config["seed"], self.rank)
        peak = PeakMemory(held_by(model)) if config["measure"] else None
        with peak or nullcontext(), own_randomness():
            history = fit(
                model,
                task,
                settings,
                seed=seed,
                start_step=first,
                stop_step=first + steps,
                attach=lambda net, optimizer, _: [
                    MaskKeeper(net, optimizer, masks, optimizer_state="zeroed")
                ],
            )
            arrays = layout.pack(model_state(model), masks)
            if counts := self._growth_counts():
                model.zero_grad(set_to_none=True)
                arrays |= self._growth(masks, counts, seed, first + steps)
        losses = [loss for _, loss in history.losses]
        metrics: dict[str, int | float] = {
            **self.counts(),
            "loss": sum(losses) / len(losses),
            "steps": steps,
        }
        if peak is not None:
            metrics["peak-memory"] = peak.peak
        return arrays, metrics

    def _steps(self) -> int:
        """Updates of a round: `local-epochs`, or a share of the client's whole training."""
        epoch = steps_per_epoch(self.task.training_loader())
        if epochs := self.config["local-epochs"]:
            return max(1, round(epochs * epoch))
        return max(1, round(self.task.training.total_steps(epoch) / self.config["rounds"]))

    def _growth_counts(self) -> dict[str, int]:
        names = self.config.get("grow", [])
        return dict(zip(names, self.config.get("grow-counts", []), strict=True))

    def _growth(self, masks: Masks, counts: Mapping[str, int], seed: int, step: int) -> Arrays:
        """The largest gradients of removed weights, as positions and values."""
        device = device_of(self.model)
        self.model.train()
        loader, source = self.task.training_loader(), self.config["grow-data"]
        if source == "all":
            # an epoch, each sample once
            chosen = [b for b, _ in islice(batches_from(loader, seed, 0), steps_per_epoch(loader))]
        else:
            chosen = [next(batches_from(loader, seed, step - 1))[0]]
        if source == "sample":
            chosen = [head(batch, 1) for batch in chosen]
        if any(batch_size(self.task.unpack(batch)[1]) == 1 for batch in chosen):
            self.model.eval()  # batch norm has no variance of one sample
        found = inactive_gradients(
            self.model,
            self.task.batch_loss,
            [to_device(batch, device) for batch in chosen],
            masks.to(device),
            counts,
        )
        layout = self.layout
        pairs = [(layout.positions(n, i.cpu()), v.cpu()) for n, (i, v) in found.items()]
        return {
            "grow-positions": torch.cat([i for i, _ in pairs]),
            "grow-values": torch.cat([v for _, v in pairs]).to(layout.dtype),
            "grow-sizes": torch.tensor([len(i) for i, _ in pairs], dtype=torch.int32),
        }
