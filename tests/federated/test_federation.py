"""A federation in one process, and the same on Flower's simulation engine."""

import copy
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

pytest.importorskip("flwr")

import secateurs as sc
from secateurs.errors import InputError, SecateursError
from secateurs.federated.client import client_app
from secateurs.federated.engine import identity, inline_grid
from secateurs.federated.messages import Layout, arrays_of, content, metrics_of
from secateurs.federated.partition import dirichlet_partition, labels_of, restricted
from secateurs.federated.server import RESTART, Fleet, Global, Growth, Rounds, train_rounds
from secateurs.parts.masks import Masks
from secateurs.registry import create
from secateurs.state import model_state
from secateurs.training.keeping import MaskKeeper
from secateurs.training.loop import fit
from secateurs.training.order import mix
from secateurs.zoo.catalog import make_task

MASKED = ("3.weight", "7.weight")
COMMON = {
    "seed": 3,
    "masked": list(MASKED),
    "dev-fraction": 0.2,
    "local-epochs": 1.0,
    "bn-passes": 2,
    "bn-momentum": 0.1,
    "grow-data": "batch",
}


@pytest.fixture(autouse=True)
def sender():
    with identity():
        yield


def half_masks(net, layout):
    flat = torch.cat([net.get_parameter(n).detach().abs().flatten() for n in MASKED])
    return layout.shaped(flat > flat.median())


def federation(task, net, clients=3, order=list, participation=1.0, own=None, **common):
    """(fleet, global model, rounds) of `clients` in this process."""
    parts = dirichlet_partition(labels_of(task), clients, 1.0, 0)
    tasks = own or [restricted(task.with_model(net), part) for part in parts]
    app = client_app(lambda context: tasks[context.node_config["partition-id"]])
    grid = inline_grid(app, clients, order=order)
    state = model_state(net)
    layout = Layout.of(state, dict.fromkeys(MASKED))
    masks = half_masks(net, layout)
    masks.apply_({n: state[n] for n in MASKED})
    shared = Global(layout, state, masks)
    return Fleet(grid, clients, {**COMMON, **common}), shared, Rounds(6, participation, 3)


def adjust(number, masks):
    names = [MASKED[number // 2 % 2]]
    return Growth({n: max(1, int(masks[n].sum()) // 5) for n in names}) if number % 2 == 0 else None


def run(task, net, work=None, growth=adjust, **how):
    fleet, shared, rounds = federation(task, net, **how)
    history = train_rounds(fleet, shared, rounds, work=work or sc.Workspace(), growth=growth)
    return shared, history, fleet


def same(one, two):
    masks = torch.equal(one.layout.flat(one.masks), two.layout.flat(two.masks))
    return masks and all(torch.equal(t, two.state[n]) for n, t in one.state.items())


def test_the_order_of_answers_does_not_matter(task, net):
    forward, history, _ = run(task, net)
    backward, again, _ = run(task, net, order=lambda answers: answers[::-1])
    assert same(forward, backward)
    assert history == again


def test_adjustments_keep_the_number_and_leave_other_layers_alone(task, net):
    before = None
    seen = []

    def watched(number, masks):
        nonlocal before
        if before is not None:
            seen.append({n: bool((masks[n] != before[n]).any()) for n in masks})
            assert masks.kept_by_tensor() == before.kept_by_tensor()
        before = masks.clone()
        return adjust(number, masks)

    shared, history, _ = run(task, net, growth=watched)
    assert [record["exchanged"] > 0 for record in history] == [False, True] * 3
    # a call sees what the round before did: rounds 2 and 4 changed one layer each
    assert seen == [
        {"3.weight": False, "7.weight": False},
        {"3.weight": False, "7.weight": True},
        {"3.weight": False, "7.weight": False},
        {"3.weight": True, "7.weight": False},
        {"3.weight": False, "7.weight": False},
    ]
    for name, mask in shared.masks.items():
        assert not bool(shared.state[name][~mask].any())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_client_and_one_round_are_plain_masked_training(task, net, optimizer):

    task = replace(task, training=sc.TrainSettings(optimizer=optimizer, lr=0.01))
    fleet, shared, _ = federation(task, net, clients=1)
    train_rounds(fleet, shared, Rounds(1, 1.0, 3), work=sc.Workspace())
    twin, masks = copy.deepcopy(net), shared.masks.clone()
    own = restricted(task, torch.arange(90))
    fit(
        twin,
        own,
        replace(task.training, steps=12),
        seed=mix(3, 0),
        attach=lambda m, optimizer, _: [MaskKeeper(m, optimizer, masks, optimizer_state="zeroed")],
    )
    assert all(torch.equal(t, shared.state[n]) for n, t in twin.state_dict().items())


def test_a_client_that_missed_a_change_gets_the_whole_mask(task, net):
    """With a third of the clients a round, some have old masks; they say so and are told."""
    shared, _, fleet = run(task, net, participation=0.34)
    resent = [row for row in fleet.rows if row["stage"] == "resent"]
    assert resent
    assert all(row["down"] > 0 for row in resent)
    assert shared.version == 3


def test_a_federation_that_was_killed_goes_on_to_the_same_model(task, net, tmp_path):
    """Its new clients have no masks, which costs messages and nothing else."""

    class KilledError(Exception):
        pass

    def killer(number, masks):
        if number == 4:
            raise KilledError
        return adjust(number, masks)

    whole, history, first = run(task, net)
    work = sc.Workspace(tmp_path)
    with pytest.raises(KilledError):
        run(task, net, work, growth=killer)
    rest, again, fleet = run(task, net, work)
    assert same(whole, rest)
    assert history == again, "bytes, too"
    apart = [row for row in fleet.rows if row["stage"] == RESTART]
    assert [row["messages"] for row in apart] == [3, 3], "greetings, and masks"
    others = [row for row in fleet.rows if row["stage"] != RESTART]
    assert others == first.rows
    done, _, idle = run(task, net, work)
    assert same(whole, done)
    assert not idle.grid.sent, "everything was finished, and clients were asked"


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_clients_that_lacked_masks_anyway_are_not_counted_as_a_restart(task, net, tmp_path, stop):
    class KilledError(Exception):
        pass

    def killer(number, masks):
        if number == stop:
            raise KilledError
        return adjust(number, masks)

    _, history, whole = run(task, net, participation=0.34)
    work = sc.Workspace(tmp_path)
    with pytest.raises(KilledError):
        run(task, net, work, growth=killer, participation=0.34)
    _, again, fleet = run(task, net, work, participation=0.34)
    assert history == again
    assert [row for row in fleet.rows if row["stage"] != RESTART] == whole.rows


def test_who_did_not_answer_is_told_after_a_restart(task, net, tmp_path):
    class KilledError(Exception):
        pass

    def killer(number, masks):
        if number == 3:
            raise KilledError
        return

    parts = dirichlet_partition(labels_of(task), 3, 1.0, 0)
    tasks = [restricted(task.with_model(net), part) for part in parts]

    def broken(output, target):
        raise OSError("lost power")

    tasks[1] = replace(tasks[1], loss=broken)
    notes, work = [], sc.Workspace(tmp_path)
    for growth, where in ((None, sc.Workspace()), (killer, work), (None, work)):
        fleet, shared, rounds = federation(task, net, own=tasks)
        fleet.answering = 0.5
        with suppress(KilledError):
            train_rounds(fleet, shared, rounds, work=where, growth=growth or (lambda *_: None))
        notes.append(fleet.notes)
    whole, first, rest = notes
    assert len(first) == 2
    assert "train, round 1: without client 1: OSError: lost power" in first[0]
    assert rest == whole
    assert len(whole) == 6


def test_bytes_are_those_of_the_messages_that_were_sent(task, net):
    from secateurs.federated.messages import size_of

    fleet, shared, rounds = federation(task, net)
    sent = []
    plain = fleet.grid.send_and_receive

    def listening(messages, **fields):
        sent.extend(messages)
        answers = list(plain(messages, **fields))
        sent.extend(answers)
        return answers

    fleet.grid.send_and_receive = listening
    train_rounds(fleet, shared, rounds, work=sc.Workspace(), growth=adjust)
    counted = sum(row["down"] + row["up"] for row in fleet.rows)
    assert counted == sum(size_of(message.content) for message in sent)
    assert sum(row["messages"] for row in fleet.rows) * 2 == len(sent)


def test_uploads_have_nothing_where_the_masks_have_nothing(task, net):
    """Not even after Adam's moments: a message has room for kept values only."""
    from flwr.app import Message

    from secateurs.federated.client import TRAIN

    fleet, shared, _ = federation(task, net, clients=1)
    arrays, config = shared.whole()
    told = {**COMMON, **config, "round": 1, "rounds": 2, "measure": True}
    [reply] = fleet.grid.send_and_receive([Message(content(arrays, config=told), 1, TRAIN)])
    values = arrays_of(reply.content)["values"]
    assert values.numel() == shared.masks.kept
    numbers = metrics_of(reply.content)
    assert numbers["samples"] == 90
    assert numbers["peak-memory"] > 3 * 4 * sum(p.numel() for p in net.parameters())


def test_a_client_that_fails_is_named_or_left_out(task, net):
    parts = dirichlet_partition(labels_of(task), 3, 1.0, 0)
    tasks = [restricted(task.with_model(net), part) for part in parts]
    tasks[1] = restricted(task, torch.tensor([5]))
    fleet, shared, rounds = federation(task, net, own=tasks)
    with pytest.raises(SecateursError, match="2 of 3 clients answered; .*at least 2"):
        train_rounds(fleet, shared, rounds, work=sc.Workspace())
    fleet, shared, rounds = federation(task, net, own=tasks)
    fleet.answering = 0.5
    fleet.clients = 2
    history = train_rounds(fleet, shared, rounds, work=sc.Workspace())
    assert [record["clients"] for record in history] == [2] * 6
    assert any("without client" in note for note in fleet.notes)


def test_memory_is_measured_in_the_first_round_of_each_kind(task, net):
    _, history, _ = run(task, net)
    assert [record["peak memory"] is None for record in history] == [False, False] + [True] * 4


def in_flowers_engine(monkeypatch, task, net):
    """`run` on Flower's simulation engine, whose Ray workers are this very process."""
    from flwr.server.superlink.fleet.vce.backend import raybackend
    from flwr.server.superlink.fleet.vce.backend.backend import Backend

    from secateurs.federated.engine import simulate

    class Here(Backend):
        num_workers = 1

        def __init__(self, backend_config):
            self.load = None

        def build(self, app_fn):
            self.load = app_fn

        def is_worker_idle(self):
            return True

        def terminate(self):
            pass

        def process_message(self, message, context):
            reply = self.load()(message, context)
            return reply, context

    monkeypatch.setattr(raybackend, "RayBackend", Here)
    parts = dirichlet_partition(labels_of(task), 3, 1.0, 0)
    tasks = [restricted(task.with_model(net), part) for part in parts]
    found = []

    def main(grid):
        _, shared, rounds = federation(task, net)
        fleet = Fleet(grid, 3, COMMON)
        history = train_rounds(fleet, shared, rounds, work=sc.Workspace(), growth=adjust)
        found.append((shared, history, fleet.rows))

    simulate(main, client_app(lambda context: tasks[context.node_config["partition-id"]]), 3)
    return found[0]


def test_flowers_engine_gives_the_bits_of_one_process(monkeypatch, task, net):
    """Its message store, its threads, its contexts: the same model, the same bytes."""
    here, history, fleet = run(task, net)
    there, again, rows = in_flowers_engine(monkeypatch, task, net)
    assert same(here, there)
    assert history == again
    assert rows == fleet.rows


def test_what_grew_and_never_moved_is_replaced_by_the_largest_that_was_dropped():
    state = {"w": torch.tensor([1.0, -0.5, 0.0, 0.0, -2.0])}
    masks = Masks({"w": torch.tensor([True, True, False, False, True])})
    model = Global(Layout.of(state, masks), state, masks)
    grown = torch.tensor([False, False, True, True, True])
    assert model.exchange({"w": grown}) == 2
    assert torch.equal(model.state["w"], torch.tensor([0.0, 0.0, 0.0, 0.0, -2.0]))
    model.state["w"][3] = 0.25  # one of the two learned something
    assert model.replace_idle() == 1
    assert model.masks["w"].tolist() == [True, False, False, True, True]
    assert torch.equal(model.state["w"], torch.tensor([1.0, 0.0, 0.0, 0.25, -2.0]))
    assert model.replace_idle() == 0


@pytest.mark.slow
def test_ray_workers_give_the_bits_of_one_process():
    """FedTiny whole, on Flower's simulation engine with its Ray workers. Ray takes a while."""
    pytest.importorskip("ray")
    training = sc.TrainSettings(epochs=2, lr=0.05)
    task = make_task("zoo:convnet?config=8,16", "digits?limit=300", training=training)
    net = task.fresh_model(0)
    options = {"clients": 3, "rounds": 3, "adjust_every": 1}
    here, there = (
        sc.prune(net, create("fedtiny", {**options, "engine": engine}), "density=0.2", task)
        for engine in ("inline", "flower")
    )
    assert here.history == there.history
    assert here.tables == there.tables
    assert here.metrics_after == there.metrics_after
    for name, tensor in here.model.state_dict().items():
        assert torch.equal(tensor, there.model.state_dict()[name]), name
    assert any(record["exchanged"] for record in here.history)


def test_flower_is_not_started_where_ray_runs_already(monkeypatch, task, net):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(InputError, match="engine: got flower in a process that uses Ray already"):
        sc.prune(net, "fedtiny", "density=0.5", task, engine="flower", clients=2)
