"""The checks of FedTiny's card, and what its options do; what all methods must do is elsewhere."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("flwr")

import secateurs as sc
from secateurs.errors import InputError, SecateursError
from secateurs.federated.messages import Layout
from secateurs.federated.partition import divide, labels_of, restricted
from secateurs.methods.clients import fedtiny
from secateurs.methods.clients.fedtiny import (
    FedTiny,
    draw_candidates,
    exchanged_count,
    select_candidate,
)
from secateurs.parts.masks import Masks
from secateurs.parts.schedules import CosineDecay
from secateurs.task import cross_entropy
from secateurs.training.keeping import MaskKeeper
from secateurs.training.loop import fit
from secateurs.training.order import mix

SIZES = {"a": 500, "b": 4000, "c": 20, "d": 9000}
QUICK = {"clients": 3, "rounds": 4, "adjust_every": 1, "stop_round": 3, "pretrain_steps": 20}


@pytest.fixture
def task(normalized_task):
    return replace(normalized_task, training=sc.TrainSettings(steps=8, lr=0.1))


@pytest.fixture
def stemmed_task():
    """A convolution before, on the digits as images."""
    from secateurs.zoo.catalog import make_task

    training = sc.TrainSettings(steps=8, lr=0.05)
    return make_task("zoo:convnet?config=4,6,8", "digits?limit=400", training=training)


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.8, 1.0])
def test_candidates_keep_the_budget_and_their_layers_vary_around_it(density):
    keep = round(density * sum(SIZES.values()))
    counts = draw_candidates(dict.fromkeys(SIZES, density), SIZES, keep, 12)
    assert counts.shape == (12, 4)
    assert counts.sum(1).eq(keep).all()
    assert counts.min() >= 1
    shares = counts / torch.tensor(list(SIZES.values()))
    assert shares.max() <= 1
    large = shares[:, [0, 1, 3]] / density
    spread = min(0.5, 1 / density - 1)
    # what is made up to the exact budget changes a share by 2 % and a weight
    assert large.min() >= (1 - spread) * 0.98 - 1 / (density * 500)
    assert large.max() <= (1 + spread) * 1.02 + 1 / (density * 500)
    assert density == 1 or len(counts.unique(dim=0)) >= 10


def test_a_draw_that_is_near_enough_is_only_made_up(monkeypatch):
    """Before it is made up, a candidate is within 2 %, as in the paper: the changes are small."""
    drawn, plain = [], fedtiny._made_up

    def listening(counts, sizes, keep):
        drawn.append(counts.clone())
        return plain(counts, sizes, keep)

    monkeypatch.setattr(fedtiny, "_made_up", listening)
    keep = round(0.05 * sum(SIZES.values()))
    densities = dict.fromkeys(SIZES, 0.05)
    missed = {}
    for tolerance in (0.3, 0.02):
        drawn.clear()
        made = draw_candidates(densities, SIZES, keep, 30, tolerance=tolerance, seed=1)
        assert made.sum(1).eq(keep).all()
        rough = torch.stack(drawn)
        missed[tolerance] = float((rough.sum(1) / keep - 1).abs().max())
        assert missed[tolerance] <= tolerance
        factor = keep / rough.sum(1, keepdim=True)
        assert ((made - rough * factor).abs() <= 1 + 1e-6).all(), "in proportion, to a weight"
    assert missed[0.3] > 0.1, "most draws miss by more than 2 %"


def test_draws_that_all_miss_are_refused_with_the_nearest():
    with pytest.raises(
        InputError, match="tolerance: got 1e-05; .*: of 10000 draws none missed .* by less than 39"
    ):
        draw_candidates({"a": 0.1, "b": 0.9}, {"a": 7919, "b": 7907}, 15000, 1, tolerance=1e-5)


def test_the_candidate_of_least_loss_over_all_samples_wins():
    losses = [torch.tensor([10.0, 8.0, 8.0, 1.0]), torch.tensor([10.0, 2.0, 2.0, torch.nan])]
    chosen, mean = select_candidate(losses, [4, 6])
    assert chosen == 1, "ties go to the first, and what is not finite is left out"
    assert torch.equal(mean[:3], torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))
    with pytest.raises(SecateursError, match="none has a finite loss"):
        select_candidate([torch.tensor([torch.inf, torch.nan])], [1])


def test_the_loss_of_the_chosen_one_is_that_on_all_development_samples(stemmed_task, monkeypatch):
    """Recomputed in one place, with the averaged statistics that the global model starts from."""
    seen = {}

    def watched(fleet, shared, *args, **fields):
        seen.update(shared=copy.deepcopy(shared))
        return fedtiny_rounds(fleet, shared, *args, **fields)

    fedtiny_rounds = fedtiny.train_rounds
    monkeypatch.setattr(fedtiny, "train_rounds", watched)
    net = stemmed_task.fresh_model(0)
    outcome = sc.prune(net, FedTiny(**QUICK), "density=0.2", stemmed_task)
    [row] = [row for row in outcome.tables["candidates"] if row["chosen"]]
    assert row["loss"] == min(r["loss"] for r in outcome.tables["candidates"])

    twin = copy.deepcopy(net)
    twin.load_state_dict(seen["shared"].state)
    shares = divide(labels_of(stemmed_task), 3, 0.5, 5, 0)
    inputs, targets = stemmed_task.train.dataset.inputs, stemmed_task.train.dataset.targets
    total, samples = 0.0, 0
    for rank, own in enumerate(shares.clients):
        generator = torch.Generator().manual_seed(mix(0, rank, 3))
        count = min(max(2, round(0.1 * len(own))), len(own))
        chosen = own[torch.randperm(len(own), generator=generator)[:count].sort().values]
        with torch.no_grad():
            loss = cross_entropy()(twin.eval()(inputs[chosen]), targets[chosen])
        total, samples = total + float(loss) * count, samples + count
    assert row["loss"] == pytest.approx(total / samples, rel=1e-5)


def test_without_batch_norm_plain_losses_decide_and_the_outcome_says_so(digits_task):
    task = replace(digits_task, training=sc.TrainSettings(steps=4, lr=0.1))
    outcome = sc.prune(task.fresh_model(0), FedTiny(**QUICK), "density=0.3", task)
    assert any("no batch norm" in note for note in outcome.notes)
    assert {row["stage"] for row in outcome.tables["messages"]} == {
        "hello", "abns_loss", "train", "adjust", "all",
    }  # fmt: skip


# ---------------------------------------------------------------- adjustments


def test_the_rate_falls_along_a_cosine_and_counts_are_rounded_up_once():
    mask = torch.arange(2000) < 1000
    rate = CosineDecay(0.3, 100)
    assert [exchanged_count(rate(r), mask) for r in (0, 50, 100)] == [300, 150, 0]
    assert exchanged_count(0.3, torch.ones(50, dtype=torch.bool)) == 0, "nothing could grow"
    assert exchanged_count(0.3, torch.arange(100) < 90) == 10
    assert exchanged_count(0.001, mask) == 1


def resnet_masks():
    names = [f"layer{i}.{j}.conv{k}.weight" for i in range(1, 5) for j in (0, 1) for k in (1, 2)]
    return Masks({n: torch.arange(100) < 20 for n in [*names, "fc.weight"]})


def test_all_blocks_take_turns_from_the_output_backward():
    """The authors index blocks by the round, and adjust two of four only."""
    method = FedTiny(rounds=400, adjust_every=10, stop_round=170)
    masks = resnet_masks()
    turns = {}
    for number in range(1, 400):
        if (growth := method.adjustment(number, masks)) is not None:
            turns[number] = {name.split(".")[0] for name in growth.counts} - {"fc"}
    # at the last of the 17 the rate is 0, and nothing is due
    assert list(turns) == [10 * i for i in range(1, 17)]
    order = [turn.pop() for turn in turns.values()]
    assert order == ["layer4", "layer3", "layer2", "layer1"] * 4


def test_order_and_granularity():
    names = list(resnet_masks())
    assert FedTiny(granularity="entire").turn(5, names) == names
    assert FedTiny(granularity="layer").turn(0, names) == ["fc.weight"]
    assert FedTiny(granularity="layer", order="forward").turn(1, names) == names[1:2]
    assert FedTiny(order="forward").turn(0, names) == names[:4]


def test_the_last_round_adjusts_nothing():
    method = FedTiny(rounds=4, adjust_every=2, stop_round=9)
    assert method.adjustment(2, resnet_masks()) is not None
    assert method.adjustment(4, resnet_masks()) is None


def test_the_number_of_kept_weights_of_a_layer_is_constant(stemmed_task):
    start = sc.prune(
        stemmed_task.fresh_model(0), FedTiny(**QUICK, adjust_rate=0.0), "density=0.1", stemmed_task
    )
    end = sc.prune(stemmed_task.fresh_model(0), FedTiny(**QUICK), "density=0.1", stemmed_task)
    assert start.masks.kept_by_tensor() == end.masks.kept_by_tensor()
    assert any(bool((start.masks[n] != end.masks[n]).any()) for n in end.masks)
    assert sum(record["exchanged"] for record in end.history) > 0
    assert "features.0.conv.weight" not in end.masks, "the first convolution stays dense"


@pytest.mark.parametrize(
    "options",
    [
        {"grow_data": "sample"},
        {"grow_data": "all", "grow_weighting": "samples"},
        {"bn_average": "plain", "pooled_variance": True},
        {"allocation": "erk", "granularity": "entire"},
        {"participation": 0.5, "local_epochs": 0.5},
    ],
    ids=str,
)
def test_every_way_ends_within_the_budget(stemmed_task, options):
    method = FedTiny(**QUICK, **options)
    outcome = sc.prune(stemmed_task.fresh_model(0), method, "density=0.1", stemmed_task)
    assert outcome.promise.kept
    assert sum(record["exchanged"] for record in outcome.history) > 0


# ---------------------------------------------------------------- against plainer training


def test_one_client_and_one_candidate_are_plain_masked_training(task):
    method = FedTiny(clients=1, candidates=1, rounds=1, shots=0, noise=0.0, local_epochs=1.0)
    net = task.fresh_model(0)
    outcome = sc.prune(net, method, "density=0.3", task)
    twin = copy.deepcopy(net)
    masks = outcome.masks.clone()
    own = restricted(task, torch.arange(1280))
    fit(
        twin,
        own,
        replace(task.training, steps=40),
        seed=mix(0, 0),
        attach=lambda m, optimizer, _: [MaskKeeper(m, optimizer, masks, optimizer_state="zeroed")],
    )
    assert all(
        torch.equal(tensor, outcome.model.state_dict()[name])
        for name, tensor in twin.state_dict().items()
    )


def test_a_dense_budget_is_federated_averaging(task):
    net = task.fresh_model(0)
    tiny = sc.prune(net, FedTiny(**QUICK, candidates=1), "density=1", task)
    shared = {k: QUICK[k] for k in ("clients", "rounds", "pretrain_steps")}
    average = sc.prune(net, "fedavg", "density=1", task, **shared)
    assert tiny.masks.density == 1
    assert not any(record["exchanged"] for record in tiny.history)
    assert tiny.metrics_after == average.metrics_after
    for name, tensor in average.model.state_dict().items():
        assert torch.equal(tensor, tiny.model.state_dict()[name])


def test_costs_stand_beside_those_of_federated_averaging(stemmed_task):
    method = FedTiny(**QUICK, baselines=True)
    outcome = sc.prune(stemmed_task.fresh_model(0), method, "density=0.05", stemmed_task)
    tiny, dense, random = outcome.tables["beside FedAvg"]
    assert [row["arm"] for row in (tiny, dense, random)] == [
        "fedtiny", "fedavg, dense", "fedavg, random",
    ]  # fmt: skip
    assert dense["kept"] == 1
    assert tiny["kept"] == random["kept"] == outcome.masks.density
    assert tiny["up"] < dense["up"]
    assert random["up"] < tiny["up"], "gradients and statistics are sent on top"
    assert all(row["peak client memory"] > 0 for row in (tiny, dense, random))
    assert outcome.tables["messages"][-1]["up"] == tiny["up"]


def test_values_of_a_message_are_what_the_masks_keep(stemmed_task):
    outcome = sc.prune(stemmed_task.fresh_model(0), FedTiny(**QUICK), "density=0.1", stemmed_task)
    layout = Layout.of(outcome.model.state_dict(), outcome.masks)
    dense = sum(shape.numel() for shape in layout.dense.values())
    payload = 4 * (outcome.masks.kept + dense) + 8 * len(layout.counters)
    [first] = [row for row in outcome.history if row["round"] == 2]
    # three clients; names, headers and numbers come on top, and gradients in the upload
    assert 3 * payload < first["down"] < 3 * (payload + 4 * 2 * outcome.masks.kept + 1000)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates: got 0"),
        ({"noise": 1.5}, "noise: got 1.5"),
        ({"clients": 0}, "clients: got 0"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"dev_fraction": 0.0}, "dev_fraction: got 0.0"),
        ({"adjust_rate": 1.0}, "adjust_rate: got 1.0"),
        ({"participation": 0.0}, "participation: got 0.0"),
        ({"local_epochs": 0.0}, "local_epochs: got 0.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        FedTiny(**options)


def test_a_budget_below_a_weight_a_layer_is_refused_before_anybody_trains(task):
    with pytest.raises(InputError, match="one weight for each of 3 layers"):
        sc.prune(task.fresh_model(0), FedTiny(**QUICK), "density=0.0007", task)


def test_more_clients_than_samples_are_refused(task):
    with pytest.raises(InputError, match="clients: got 2000"):
        sc.prune(task.fresh_model(0), FedTiny(clients=2000), "density=0.5", task)


def test_clients_whose_losses_diverge_are_named(task):
    wild = replace(task, training=sc.TrainSettings(steps=8, lr=1e18))
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10))
    with pytest.raises(SecateursError, match=r"loss: (NaN|Inf)|finite loss"):
        sc.prune(model, FedTiny(**{**QUICK, "pretrain_steps": 0}), "density=0.5", wild)


# ---------------------------------------------------------------- bytes


def nbytes(arrays):
    return sum(t.numel() * t.element_size() for t in arrays.values())


def test_messages_of_a_resnet_have_the_bytes_of_the_table():
    """Check 10 of the card: torchvision's ResNet-18, 10 classes, density 0.01, 10 candidates."""
    from secateurs.federated.candidates import pool_of
    from secateurs.federated.messages import content, size_of
    from secateurs.federated.statistics import statistics_of

    models = pytest.importorskip("torchvision.models")
    net = models.resnet18(num_classes=10)
    params = FedTiny().prunable(net)
    layout = Layout.of(net.state_dict(), params)
    size = {n: p.numel() for n, p in params.items()}
    assert layout.total == sum(size.values()) == 11_162_624
    keep = round(0.01 * layout.total)
    assert keep == 111_626
    counts = draw_candidates(dict.fromkeys(size, 0.01), size, keep, 10)
    dense = 4 * 28_618
    pool = pool_of(layout, net.state_dict(), counts)
    longest = int(counts.max(0).values.sum())
    counters = 8 * len(layout.counters)  # of batches, 20 integers that the table leaves out
    assert nbytes(pool) == 8 * longest + dense + 4 * 10 * len(size) + counters
    assert 8 * longest <= 1_340_000
    statistics = [statistics_of(net) for _ in range(10)]
    means, variances = (torch.stack(own) for own in zip(*statistics, strict=True))
    stats = {"means": means, "variances": variances}
    assert nbytes(stats) == 10 * 38_400
    masks = layout.shaped(torch.zeros(layout.total, dtype=torch.bool))
    for (name, own), count in zip(masks.items(), counts[0].tolist(), strict=True):
        own.view(-1)[:count] = True
        assert bool(masks[name].sum() == count)
    weights = layout.pack(net.state_dict(), masks)
    assert nbytes(weights) == 4 * keep + dense + counters
    for arrays, table in ((pool, 1_340_000 + dense + 800), (stats, 384_000), (weights, 561_000)):
        sent = size_of(content(arrays, config={"version": 0}))
        assert nbytes(arrays) <= sent <= 1.05 * table
    assert size_of(content(weights)) == pytest.approx(561_000, rel=0.05)


def test_an_adjustment_sends_its_gradients_up_and_its_change_down():
    """Check 10 of the card, as exchanged: 8 bytes for each of the K weights, both ways."""
    from secateurs.federated.client import client_app
    from secateurs.federated.engine import identity, inline_grid
    from secateurs.federated.server import Fleet, Global, Growth, Rounds, train_rounds

    models = pytest.importorskip("torchvision.models")
    net = models.resnet18(num_classes=10)
    params = FedTiny().prunable(net)
    state = {n: t.clone() for n, t in net.state_dict().items()}
    layout = Layout.of(state, params)
    masks = Masks({n: torch.rand(p.shape) < 0.01 for n, p in params.items()})
    masks.apply_(state)
    names = [n for n in masks if n.startswith("layer4")]
    counts = {n: exchanged_count(0.3, masks[n]) for n in names}
    wanted = sum(counts.values())
    assert wanted == pytest.approx(25_166, rel=0.03)
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    loader = DataLoader(data, 4, shuffle=True)
    task = sc.classification(net, loader, loader, training=sc.TrainSettings(lr=0.01))
    common = {"seed": 0, "masked": list(masks), "dev-fraction": 0.5, "local-epochs": 1.0,
              "bn-passes": 1, "bn-momentum": 0.1, "grow-data": "batch"}  # fmt: skip
    with identity():
        fleet = Fleet(inline_grid(client_app(lambda context: task), 1), 1, common)
        shared = Global(layout, state, masks)
        growth = {2: Growth(counts)}
        history = train_rounds(
            fleet, shared, Rounds(3, 1.0, 0), work=sc.Workspace(),
            growth=lambda number, masks: growth.get(number),
        )  # fmt: skip
    plain, adjusting, after = history
    assert adjusting["exchanged"] == pytest.approx(wanted, rel=0.02)
    assert adjusting["up"] - plain["up"] == pytest.approx(8 * wanted, rel=0.02)
    assert after["down"] - adjusting["down"] == pytest.approx(8 * adjusting["exchanged"], rel=0.02)
    assert plain["up"] == pytest.approx(4 * masks.kept + 4 * 28_618, rel=0.02)
