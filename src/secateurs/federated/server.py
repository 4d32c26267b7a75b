"""The server's side: clients behind a Flower grid, the global model, rounds of sparse FedAvg.

Replies are put in the order of the clients' ranks before anything is computed from them, so the
order in which they arrive does not matter. Every finished round is a state in the workspace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateurs.errors import SecateursError, require
from secateurs.federated.client import GROW, HELLO, NEEDS_MASK, TRAIN
from secateurs.federated.growth import Gradients, drop_and_grow, merge_growth
from secateurs.federated.messages import (
    Arrays,
    Layout,
    State,
    arrays_of,
    content,
    metrics_of,
    size_of,
    weighted_mean,
)
from secateurs.parts.masks import Masks
from secateurs.parts.topk import select_largest
from secateurs.state import Tree
from secateurs.training.order import mix
from secateurs.workspace import Workspace

WAIT = 600.0
"""Seconds to wait for clients to show up."""
RESTART = "restart"
"""Stage of what is sent again because the server was killed: greetings, and masks to clients that
held them. It is counted apart, so that the rounds have the bytes of a run that was not."""


@dataclass(frozen=True)
class Reply:
    """What one client answered."""

    rank: int
    arrays: Arrays
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class _Answer:
    """What came back from a node, and its bytes."""

    arrays: Arrays
    metrics: Mapping[str, Any]
    size: int


@dataclass
class Fleet:
    """The clients behind a grid, by rank, and a record of what was exchanged with them.

    Attributes:
        grid: Flower's.
        clients: how many to wait for.
        common: plain values that every message carries.
        answering: share of the asked clients that must answer; others are left out.
        rows: a record for every exchange: stage, round, messages, bytes down and up.
        notes: who did not answer.
        held: the version of the masks that each client has, by rank.
        resumed: whether some of that was before this server was started.
    """

    grid: Any
    clients: int
    common: Mapping[str, Any]
    answering: float = 1.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)
    resumed: bool = False
    _nodes: dict[int, int] = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        """Of all clients, ascending; asks them when they are wanted for the first time."""
        if not self._nodes:
            self._greet()
        return sorted(self._nodes)

    def _greet(self) -> None:
        begin = time.monotonic()
        while len(found := list(self.grid.get_node_ids())) < self.clients:
            waited = time.monotonic() - begin
            require(waited < WAIT, "clients", len(found), f"{self.clients} within {WAIT:.0f} s")
            time.sleep(0.1)
        stage = RESTART if any(row["stage"] == "hello" for row in self.rows) else "hello"
        greetings: dict[int, tuple[str, Arrays, Mapping[str, Any]]]
        greetings = {n: (HELLO, {}, {}) for n in found}
        answers = self._exchange(stage, 0, greetings, named="hello")
        ranked = {int(answer.metrics["rank"]): n for n, answer in answers.items()}
        require(len(ranked) == len(answers), "partition-id", sorted(ranked), "one a client")
        self._nodes = ranked

    def ask(
        self,
        stage: str,
        number: int,
        kind: str,
        arrays: Arrays,
        config: Mapping[str, Any],
        *,
        ranks: Sequence[int] | None = None,
        whole: Callable[[], tuple[Arrays, Mapping[str, Any]]] | None = None,
        holding: Collection[int] | None = None,
    ) -> list[Reply]:
        """Send one message to many clients; their replies by ascending rank.

        Args:
            stage, number: of the record, such as ``train`` and the round.
            kind: Flower's message type.
            ranks: of the clients asked; all by default.
            whole: makes the message for clients that lack what this one builds on.
            holding: ranks of those that had it before the server was killed, if it was.

        Raises:
            SecateursError: too few clients answered; the reason of the first is given.
        """
        asked = self.ranks if ranks is None else sorted(ranks)
        nodes = {self._nodes[rank]: rank for rank in asked}
        answers = self._exchange(stage, number, dict.fromkeys(nodes, (kind, arrays, config)))
        row = self.rows[-1]
        lacking = {n for n, answer in answers.items() if NEEDS_MASK in answer.metrics}
        forgotten = {n for n in lacking if self.resumed and nodes[n] in (holding or ())}
        for again, own in ((RESTART, forgotten), ("resent", lacking - forgotten)):
            if not own:
                continue
            assert whole is not None
            refused = sum(answers.pop(n).size for n in own)
            beside = len(answers)  # those who lack it as well did answer
            full = dict.fromkeys(own, (kind, *whole()))
            answers |= self._exchange(again, number, full, named=stage, beside=beside)
            if again == RESTART:  # the answers belong to the round, the refusals do not
                row["up"] += self.rows[-1]["up"] - refused
                self.rows[-1]["up"] = refused
        replies = [Reply(nodes[n], a.arrays, a.metrics) for n, a in answers.items()]
        return sorted(replies, key=lambda reply: reply.rank)

    def take(self, tree: Tree) -> None:
        """Go on after what `since` told."""
        self.rows += tree["rows"]
        self.notes += tree["absent"]
        self.held |= {int(rank): version for rank, version in tree["held"].items()}
        self.resumed = True

    def since(self, rows: int = 0, notes: int = 0) -> Tree:
        """The records after so many, for `Workspace.once`."""
        held = {str(rank): version for rank, version in self.held.items()}
        return {"rows": self.rows[rows:], "absent": self.notes[notes:], "held": held}

    def _exchange(
        self,
        stage: str,
        number: int,
        sent: Mapping[int, tuple[str, Arrays, Mapping[str, Any]]],
        *,
        named: str | None = None,
        beside: int = 0,
    ) -> dict[int, _Answer]:
        """Messages by node to replies by node, with their bytes recorded.

        Args:
            named: the stage as notes name it, where that is another.
            beside: how many clients have answered the same question already.
        """
        from flwr.app import Message

        made: dict[int, Any] = {}  # equal contents are made and measured once
        messages, down = [], 0
        for node, (kind, arrays, config) in sent.items():
            known = made.get(id(config))
            if known is None:
                record = content(arrays, config={**self.common, **config})
                known = made[id(config)] = (record, size_of(record), config)
            messages.append(Message(known[0], node, kind, group_id=str(number)))
            down += known[1]
        answers: dict[int, _Answer] = {}
        failures = []
        for reply in self.grid.send_and_receive(messages):
            node = reply.metadata.src_node_id
            if reply.has_error():
                failures.append((node, reply.error.reason))
                continue
            record, size = reply.content, size_of(reply.content)
            answers[node] = _Answer(arrays_of(record), metrics_of(record), size)
        self._check(named or stage, number, beside + len(sent), beside + len(answers), failures)
        up = sum(answer.size for answer in answers.values())
        self.rows.append(
            {"stage": stage, "round": number, "messages": len(sent), "down": down, "up": up}
        )
        return answers

    def _check(
        self, stage: str, number: int, asked: int, got: int, failures: list[tuple[int, str]]
    ) -> None:
        by_node = {node: rank for rank, node in self._nodes.items()}
        told = sorted((by_node.get(node, node), reason) for node, reason in failures)
        if got == 0 or got < self.answering * asked:
            rank, reason = told[0] if told else ("any", "no answer")
            raise SecateursError(
                f"{stage}, round {number}: {got} of {asked} clients answered; client {rank}: "
                f"{reason}"
            )
        missed = [f"{stage}, round {number}: without client {r}: {why}" for r, why in told]
        self.notes += [note for note in missed if note not in self.notes]


@dataclass
class Global:
    """The global model.

    Attributes:
        layout: of its state in messages.
        state: parameters and buffers, on the CPU.
        masks: True = keep.
        version: of the masks, 0 for the first.
        form: how the masks are told in the next round: ``mask``, ``candidate``, ``change`` or
            ``same``.
        told: the arrays that tell them.
        candidate: the one of a pool that the masks are, for the form ``candidate``.
        dropped: the last values of weights that were exchanged away, by layer.
    """

    layout: Layout
    state: State
    masks: Masks
    version: int = 0
    form: str = "mask"
    told: Arrays = field(default_factory=dict)
    candidate: int = 0
    dropped: State = field(default_factory=dict)

    def message(self) -> tuple[Arrays, dict[str, Any]]:
        """Weights and what changed in the masks, for clients that have the version before."""
        if self.form == "mask":
            return self.whole()
        config = {"version": self.version, "form": self.form, "candidate": self.candidate}
        return {**self.layout.pack(self.state, self.masks), **self.told}, config

    def holding(self, held: Mapping[int, int]) -> set[int]:
        """Ranks of the clients that `message` is enough for, by the version that each has."""
        if self.form == "candidate":  # of a pool that everybody was sent
            return set(held)
        enough = {self.version, self.version - 1 if self.form == "change" else self.version}
        return {rank for rank, version in held.items() if version in enough}

    def whole(self) -> tuple[Arrays, dict[str, Any]]:
        """Weights and masks, for clients that have none."""
        arrays = self.layout.pack(self.state, self.masks) | self.layout.pack_mask(self.masks)
        return arrays, {"version": self.version, "form": "mask"}

    def exchange(self, new: Mapping[str, Tensor]) -> int:
        """Take new masks for some layers, weights that grow starting at 0; how many grew."""
        before, weights = self.masks.clone(), {name: self.state[name].clone() for name in new}
        self.masks.update(new)
        self.masks.apply_(self.state)
        for name, old in weights.items():
            known = self.dropped.get(name, torch.zeros_like(old))
            leaving = before[name] & ~self.masks[name]
            self.dropped[name] = torch.where(leaving, old, known)
        for name in new:
            # what was gone is zero already; said here because masks promise nothing about it
            self.state[name][self.masks[name] & ~before[name]] = 0
        self.told = self.layout.pack_change(before, self.masks)
        self.version += 1
        self.form = "change"
        return int(self.told["grown"].numel())

    def replace_idle(self) -> int:
        """Put the largest weights that were dropped in the place of those that never moved.

        A weight grows where a client's own model had a gradient; in the averaged model its unit
        may be dead, and the weight stays at 0. In its layer the largest weight that was dropped
        takes its place, with its last value. Returns how many were replaced.
        """
        replaced = 0
        for name, last in self.dropped.items():
            mask, weight = self.masks[name], self.state[name]
            idle = mask & (weight == 0)
            scores = last.abs().masked_fill(mask, 0.0)
            count = min(int(idle.sum()), int((scores > 0).sum()))
            if not count:
                continue
            [back] = select_largest([scores], count)
            [going] = select_largest([idle.float()], count)
            self.masks.update({name: mask & ~going | back})
            weight[back] = last[back]
            replaced += count
        return replaced

    def as_tree(self) -> Tree:
        """For `Workspace.once`."""
        fields = {k: v for k, v in vars(self).items() if k not in ("layout", "masks")}
        return {**fields, "masks": self.layout.pack_mask(self.masks)}

    def take(self, tree: Tree) -> None:
        """The inverse of `as_tree`, in place."""
        vars(self).update({**tree, "masks": self.layout.unpack_mask(tree["masks"])})


@dataclass(frozen=True)
class Growth:
    """What a round is to exchange: so many weights of each of these layers.

    Attributes:
        counts: by layer.
        weighting: of the clients' gradients: equal, or by their samples.
    """

    counts: Mapping[str, int]
    weighting: str = "uniform"


@dataclass(frozen=True)
class Rounds:
    """How many rounds there are, and who takes part."""

    rounds: int
    participation: float
    seed: int

    def participants(self, ranks: Sequence[int], number: int) -> list[int]:
        """Ranks of a random share of the clients, at least one."""
        count = max(1, round(self.participation * len(ranks)))
        generator = torch.Generator().manual_seed(mix(self.seed, number, 5))
        order = torch.randperm(len(ranks), generator=generator)[:count]
        return sorted(ranks[i] for i in order.tolist())


def train_rounds(
    fleet: Fleet,
    model: Global,
    rounds: Rounds,
    *,
    work: Workspace,
    growth: Callable[[int, Masks], Growth | None] = lambda number, masks: None,
) -> list[dict[str, Any]]:
    """Sparse FedAvg on `model`, in place; a record a round.

    Args:
        growth: round and masks -> what is exchanged after it; None for nothing.
    """
    history = []
    measured: set[str] = set()
    with work.progress("rounds", rounds.rounds) as advance:
        for number in range(1, rounds.rounds + 1):
            wanted = growth(number, model.masks)
            stage = TRAIN if wanted is None else GROW
            fresh = stage not in measured
            measured.add(stage)

            def compute(
                number: int = number, wanted: Growth | None = wanted, fresh: bool = fresh
            ) -> Tree:
                rows, notes = len(fleet.rows), len(fleet.notes)
                record = _round(fleet, model, rounds, number, wanted, measure=fresh)
                return {"model": model.as_tree(), "record": record, **fleet.since(rows, notes)}

            done = work.has(f"round-{number}")
            tree = work.once(f"round-{number}", compute)
            if done:
                model.take(tree["model"])
                fleet.take(tree)
            history.append(tree["record"])
            work.event("round", **tree["record"])
            advance(number)
    return history


def _round(
    fleet: Fleet,
    model: Global,
    rounds: Rounds,
    number: int,
    growth: Growth | None,
    *,
    measure: bool,
) -> dict[str, Any]:
    """One round: weights out, weights in, their mean; and, where wanted, an exchange."""
    schedule = {"round": number, "rounds": rounds.rounds, "measure": measure}
    asked: dict[str, Any] = {}
    if growth is not None:
        asked = {"grow": list(growth.counts), "grow-counts": list(growth.counts.values())}
    arrays, config = model.message()

    def whole() -> tuple[Arrays, Mapping[str, Any]]:
        arrays, config = model.whole()
        return arrays, {**schedule, **asked, **config}

    asked_ranks = rounds.participants(fleet.ranks, number)
    replies = fleet.ask(
        "train" if growth is None else "adjust",
        number,
        TRAIN if growth is None else GROW,
        arrays,
        {**schedule, **asked, **config},
        ranks=asked_ranks,
        whole=whole,
        holding=model.holding(fleet.held),
    )
    fleet.held |= dict.fromkeys(asked_ranks, model.version)
    sent = [row for row in fleet.rows if row["round"] == number and row["stage"] != RESTART]
    samples = [float(reply.metrics["samples"]) for reply in replies]
    states = [model.layout.unpack(reply.arrays, model.masks) for reply in replies]
    model.state = weighted_mean(states, samples)
    model.form, model.told = "same", {}
    record: dict[str, Any] = {
        "round": number,
        "clients": len(replies),
        "loss": sum(
            r.metrics["loss"] * n / sum(samples) for r, n in zip(replies, samples, strict=True)
        ),
        "down": sum(row["down"] for row in sent),
        "up": sum(row["up"] for row in sent),
        "exchanged": 0,
        "peak memory": max((r.metrics["peak-memory"] for r in replies), default=0)
        if measure
        else None,
    }
    if growth is not None:
        new = grown_masks(model, replies, growth, samples)
        record["exchanged"] = model.exchange(new)
    return record


def grown_masks(
    model: Global, replies: Sequence[Reply], growth: Growth, samples: Sequence[float]
) -> dict[str, Tensor]:
    """New masks of the layers that are adjusted."""
    weights = list(samples) if growth.weighting == "samples" else [1.0] * len(replies)
    sent = [growth_of(model.layout, reply.arrays, list(growth.counts)) for reply in replies]
    return {
        name: drop_and_grow(
            model.state[name],
            model.masks[name],
            count,
            merge_growth([own[name] for own in sent], weights),
        )
        for name, count in growth.counts.items()
    }


def growth_of(layout: Layout, arrays: Arrays, names: Sequence[str]) -> dict[str, Gradients]:
    """What a client sent about each layer: indices into it, and gradients."""
    sizes = arrays["grow-sizes"].tolist()
    positions = arrays["grow-positions"].long().split(sizes)
    values = arrays["grow-values"].split(sizes)
    return {
        name: (place - layout.offsets[name], value)
        for name, place, value in zip(names, positions, values, strict=True)
    }
