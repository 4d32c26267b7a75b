"""LoRAPrune: the estimate of a gradient, the ranking, the ramp and the removal."""

import copy
import math
import os
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.calibration.blocks import find_blocks
from secateurs.errors import InputError
from secateurs.methods.channels.loraprune import (
    LoRAPrune,
    Member,
    Pruning,
    Units,
    adapted_layers,
    lora_gradient,
    sensitivity,
    unit_sums,
)
from secateurs.parts.schedules import Cubic
from secateurs.registry import create
from secateurs.structure.axes import Structure
from secateurs.structure.trace import trace
from secateurs.training.adapters import AdaptedLayer, adapters, frozen, merge, wrap
from secateurs.zoo.catalog import make_task
from secateurs.zoo.transformers import vit

os.environ["HF_HUB_OFFLINE"] = "1"
SPEC = "zoo:vit-tiny?depth=4&hidden=12&dim=16&gated=true"


@pytest.fixture(scope="module")
def small():
    """A gated transformer of four blocks on few digits, a little trained."""
    task = make_task(
        SPEC, "digits?limit=300", training=sc.TrainSettings(steps=30, lr=3e-3, optimizer="adamw"),
        finetuning=sc.TrainSettings(steps=20),
    )  # fmt: skip
    model = task.fresh_model(0)
    sc.fit(model, task, task.training)
    return task, model.eval()


# the estimate


def adapted(rank, outputs=5, inputs=6, alpha=8.0):
    torch.manual_seed(0)
    layer = AdaptedLayer(nn.Linear(inputs, outputs).double(), "lora", rank, alpha)
    with torch.no_grad():
        layer.up.normal_()
        layer.down.normal_()
    return layer


def backward(layer):
    """Gradients of a loss; returns that of the effective weight."""
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    torch.sin(layer(x)).sum().backward()
    weight = layer.effective_weight().detach().requires_grad_(True)
    torch.sin(x @ weight.T + layer.base.bias).sum().backward()
    return weight.grad


def test_of_a_whole_adapter_the_estimate_is_the_gradient():
    """r = in, A = I, B = 0: the estimate is s ∂L/∂W."""
    layer = adapted(6)
    with torch.no_grad():
        layer.down.copy_(torch.eye(6))
        layer.up.zero_()
    grad = backward(layer)
    found = lora_gradient(layer.down, layer.up, layer.down.grad, layer.up.grad)
    torch.testing.assert_close(found.detach(), layer.scale * grad, rtol=1e-13, atol=1e-13)


def test_the_estimate_in_terms_of_the_gradient():
    """s (G AᵀA + B Bᵀ G) − s² G Aᵀ Bᵀ G."""
    layer = adapted(3)
    grad, s = backward(layer), layer.scale
    down, up = layer.down.detach(), layer.up.detach()
    found = lora_gradient(down, up, layer.down.grad, layer.up.grad)
    expected = s * (grad @ down.T @ down + up @ up.T @ grad)
    expected -= s**2 * grad @ down.T @ up.T @ grad
    torch.testing.assert_close(found, expected)


def test_scores_by_metric():
    layer = adapted(3)
    layer.base.weight.requires_grad_(True)
    grad = backward(layer)
    weight = layer.effective_weight().detach()
    estimate = lora_gradient(layer.down, layer.up, layer.down.grad, layer.up.grad).detach()
    torch.testing.assert_close(sensitivity(layer, "lora"), (estimate * weight).abs())
    torch.testing.assert_close(sensitivity(layer, "grad"), (grad * weight).abs())
    torch.testing.assert_close(sensitivity(layer, "magnitude"), weight.abs())
    one, same, other = (sensitivity(layer, "random", "a", seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("metric", ["lora", "grad"])
def test_a_missing_gradient_is_refused(metric):
    with pytest.raises(InputError, match="gradient of q: got None"):
        sensitivity(adapted(2), metric, "q")


def test_a_matrix_times_a_thousand_counts_the_same():
    """Rows and columns: both are brought to the length 1 over the units."""
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    rows = Member("q", 0, torch.tensor([0, 0, 1, 1, 2, 2]))
    columns = Member("o", 1, torch.tensor([1, -1, 0, 1]))
    by_hand = torch.stack([scores[2 * i : 2 * i + 2].sum() for i in range(3)])
    torch.testing.assert_close(unit_sums(scores, rows, 3, normalize=False), by_hand)
    torch.testing.assert_close(unit_sums(scores, rows, 3), by_hand / by_hand.norm())
    taken = torch.stack([scores[:, 2].sum(), scores[:, 0].sum() + scores[:, 3].sum()])
    torch.testing.assert_close(unit_sums(scores, columns, 2), taken / taken.norm())
    torch.testing.assert_close(unit_sums(1000 * scores, rows, 3), unit_sums(scores, rows, 3))


# the updates


def attached(ratio=0.5, metric="lora", every=1, total=10, size=8):
    """Two layers with `size` neurons between them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 3))
    layers = wrap(model, ["0", "2"], "lora", 2, outputs=True)
    owner = torch.arange(size)
    units = [Units("0", "neuron", size, (Member("0", 0, owner), Member("2", 1, owner)), False)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ramp = Cubic(ratio, total // 10, total - total // 10, 0.0, every)
    return model, optimizer, Pruning(optimizer, layers, units, ramp, metric)


def step(model, optimizer, seed=0):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_ramp_is_the_cards():
    ramp = LoRAPrune().ramp(0.5, 400)
    assert [ramp(t) for t in (40, 120, 200, 361)] == [0.0, 0.2890625, 0.4375, 0.5]
    assert ramp.updates(360)
    assert not any(ramp.updates(t) for t in (35, 361, 370))


def test_masks_only_ever_close_and_hold_the_integer_part():
    model, optimizer, pruning = attached(ratio=0.8, total=20)
    before = pruning.kept["0"].clone()
    for number in range(20):
        step(model, optimizer, number)
        kept = pruning.kept["0"].clone()
        assert not bool((kept & ~before).any())
        assert int((~kept).sum()) == int(8 * pruning.ramp(number + 1) + 1e-9)
        assert torch.equal(model[0].outputs.bool(), kept)
        assert bool(model[2].outputs.all())
        before = kept
    assert int(before.sum()) == 2


def test_the_lowest_average_goes():
    model, optimizer, pruning = attached(ratio=0.5, every=100)
    for number in range(9):
        step(model, optimizer, number)
    scores, kept = pruning.scores["0"], pruning.kept["0"]
    assert scores[kept].min() > scores[~kept].max()


@pytest.mark.parametrize("steps", [1, 10])
def test_the_average_of_a_constant(steps):
    """1 − 0.9^k of it: .6513 after ten."""
    model, optimizer, pruning = attached(metric="magnitude", every=100)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    single = sum(
        unit_sums(sensitivity(model[int(m.layer)], "magnitude"), m, 8)
        for m in pruning.units[0].members
    )
    for number in range(steps):
        step(model, optimizer, number)
    torch.testing.assert_close(pruning.scores["0"], (1 - 0.9**steps) * single)
    if steps == 10:
        assert math.isclose(1 - 0.9**10, 0.6513, abs_tol=1e-4)


def test_gradients_with_nan_leave_the_average_alone():
    model, optimizer, pruning = attached()
    step(model, optimizer)
    before = pruning.scores["0"].clone()
    x = torch.randn(16, 4)
    model(x).sum().backward()
    model[2].up.grad[0, 0] = torch.nan
    pruning.take_scores()
    assert torch.equal(pruning.scores["0"], before)
    assert bool(before.any())


def test_its_state_comes_back():
    model, optimizer, pruning = attached(ratio=0.6)
    for number in range(5):
        step(model, optimizer, number)
    state = copy.deepcopy(pruning.state_dict())
    other, _, fresh = attached(ratio=0.6)
    fresh.load_state_dict(state)
    assert torch.equal(other[0].outputs, model[0].outputs)
    assert torch.equal(fresh.scores["0"], pruning.scores["0"])
    assert fresh.step == 5


# groups


def names_of(model, inputs, method=None):
    structure = Structure(trace(model, inputs))
    return (method or LoRAPrune()).units(structure, model, adapted_layers(model))


def llama(layers=3, **fields):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3} | fields
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=20, num_hidden_layers=layers, **sizes
    )
    return LlamaForCausalLM(config).eval()


TOKENS = {"input_ids": torch.arange(8).view(1, 8)}


def test_query_heads_are_bundled_with_their_key_value_heads():
    """Two query heads of 4 share a key-value head: 8 rows of q, 4 of k and v, 8 columns of o."""
    units, _ = names_of(llama(), TOKENS)
    heads = [u for u in units if u.role == "head"]
    assert [u.size for u in heads] == [3, 3, 3]
    for number, group in enumerate(heads):
        found = {m.layer.rpartition(".")[2]: m for m in group.members}
        assert {n: m.place for n, m in found.items()} == {
            "q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1,
        }  # fmt: skip
        for name, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)):
            assert found[name].owner.tolist() == [i // rows for i in range(3 * rows)]
            assert f".layers.{number}." in found[name].layer
    neurons = [u for u in units if u.role == "neuron"]
    assert [u.size for u in neurons] == [20, 20, 20]
    for group in neurons:
        places = {m.layer.rpartition(".")[2]: m.place for m in group.members}
        assert places == {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def test_of_one_key_value_head_the_query_heads_go_by_themselves():
    units, _ = names_of(llama(num_key_value_heads=1), TOKENS)
    heads = [u for u in units if u.role == "head"]
    assert [u.size for u in heads] == [6, 6, 6]
    assert {m.layer.rpartition(".")[2] for m in heads[0].members} == {"q_proj", "o_proj"}


def test_the_first_tenth_and_the_last_block_stay_whole():
    model = vit((1, 4, 4), 3, dim=4, heads=2, depth=32, hidden=4, patch=2)
    units, _ = names_of(model, torch.randn(1, 1, 4, 4))
    whole = {int(u.name.split(".")[1]) for u in units if u.protected}
    assert whole == {0, 1, 2, 31}
    assert {int(u.name.split(".")[1]) for u in units if not u.protected} == set(range(3, 31))
    assert all(u.removed(0.9) == 0 for u in units if u.protected)


def test_what_masks_cannot_stand_for_is_left_whole_and_noted():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip
    units, notes = names_of(model, torch.randn(2, 4))
    assert [u.name for u in units] == ["5"]
    assert len(notes) == 2
    assert any("is taken over it" in n for n in notes)
    assert any("belongs to it and has no adapter" in n for n in notes)


def test_a_model_of_protected_blocks_is_refused(small):
    task, model = small
    with pytest.raises(InputError, match="model: got 8 groups of heads or neurons, all protected"):
        sc.prune(model, "loraprune", "params=0.9", task, protect_first=1.0)


# the whole


def run(small, budget="params=0.75", **options):
    task, model = small
    return sc.prune(model, "loraprune", budget, task, **{"rank": 4, "lr": 3e-3} | options)


@pytest.mark.parametrize("metric", ["lora", "grad", "magnitude", "random"])
def test_what_is_removed_is_what_was_masked(small, metric):
    """The masked model is scored before its units go, the smaller one after."""
    outcome = run(small, metric=metric)
    assert outcome.history[0]["loss"] == pytest.approx(outcome.metrics_after["loss"], rel=1e-5)
    assert outcome.history[0]["accuracy"] == outcome.metrics_after["accuracy"]
    assert outcome.promise.kept
    assert not outcome.notes
    assert outcome.after.parameters < outcome.before.parameters
    assert not adapters(outcome.model)
    ratio, model = outcome.history[0]["ratio"], outcome.model
    for number, block in enumerate(model.blocks):
        gone = ratio if 0 < number < 3 or number == 0 else 0.0
        assert block.attention.num_heads == 4 - int(4 * gone + 1e-9)
        assert block.feed_forward.up.out_features == 12 - int(12 * gone + 1e-9)


def test_the_masked_model_and_the_shortened_one_agree_on_a_grouped_query_model():
    torch.manual_seed(0)
    tokens = torch.randint(40, (32, 9))
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 8)
    task = sc.language_modelling(llama, loader, loader, finetuning=sc.TrainSettings(steps=12))
    outcome = sc.prune(llama(4), "loraprune", "params=0.75", task, lr=1e-2, protect_first=0.0)
    assert outcome.history[0]["loss"] == pytest.approx(outcome.metrics_after["loss"], rel=1e-5)
    assert outcome.promise.kept
    assert not outcome.notes
    layer, last = outcome.model.model.layers[1], outcome.model.model.layers[3]
    kept = layer.self_attn.k_proj.out_features // 4
    assert kept < 3
    assert layer.self_attn.q_proj.out_features == 8 * kept
    assert last.self_attn.k_proj.out_features == 12
    assert last.mlp.up_proj.out_features == 20


def test_a_ratio_of_zero_is_plain_lora(small):
    task, model = small
    outcome = run(small, "params=1", dropout=0.1)
    plain = copy.deepcopy(model)
    settings = LoRAPrune(lr=3e-3).settings(task)
    with frozen(plain):
        wrap(plain, adapted_layers(plain), "lora", 4, 16.0, dropout=0.1)
        sc.fit(plain, task, settings)
        merge(plain)
    for name, tensor in outcome.model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    assert outcome.history[0]["ratio"] == 0


def test_only_adapted_weights_change(small):
    _, model = small
    outcome = run(small, "params=1")
    own = dict(model.named_parameters())
    moved = {n for n, p in outcome.model.named_parameters() if not torch.equal(p, own[n])}
    assert moved == {f"{n}.weight" for n in adapted_layers(model)}
    assert all(p.requires_grad for p in outcome.model.parameters())


def test_the_gradient_of_the_weights_moves_no_weight(small):
    """metric=grad unfreezes W for its gradient alone; at ratio 0 and unclipped all are one."""
    one, other = (run(small, "params=1", metric=m, clip_norm=None) for m in ("grad", "lora"))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


class KilledError(Exception):
    """Stands for a kill."""


class Killer:
    """A listener in whose presence training dies at a step."""

    def __init__(self, place):
        self.place, self.seen = place, []

    def event(self, kind, values):
        if kind == "train":
            self.seen.append(values["step"])
            if values["step"] == self.place:
                raise KilledError

    def begin(self, label, total): ...

    def advance(self, label, done): ...

    def end(self, label): ...


def test_a_killed_run_goes_on_with_the_same_bits(small, tmp_path):
    def made(listener, folder=None):
        work = sc.Workspace(folder, [listener], snapshot_seconds=0.0)
        return run(small, work=work, every=2)

    whole = made(Killer(None))
    with pytest.raises(KilledError):
        made(Killer(11), tmp_path)
    rest = Killer(None)
    outcome = made(rest, tmp_path)
    assert rest.seen[0] == 11
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, outcome.model.state_dict()[name])


def test_what_follows_a_mask_and_is_not_zero_at_zero_is_noted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(32, 4), torch.arange(32) % 3)
    loader = DataLoader(data, 8)
    task = sc.classification(model, loader, loader, finetuning=sc.TrainSettings(steps=5))
    outcome = sc.prune(model, "loraprune", "params=0.6", task)
    assert any("does not leave zeros alone" in note for note in outcome.notes)


def test_what_no_training_can_reach_is_refused_before_it(small):
    ear = Killer(0)
    with pytest.raises(InputError, match="budget: got .*; accepted: at least"):
        run(small, "params=0.1", work=sc.Workspace(None, [ear]))
    with pytest.raises(InputError, match="initial: got 0.9; accepted: at most"):
        run(small, initial=0.9, work=sc.Workspace(None, [ear]))
    assert not ear.seen


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": -1.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"initial": 1.0}, "initial"),
        ({"warmup": 0.6, "cooldown": 0.4}, "cooldown"),
        ({"every": 0}, "every"),
        ({"decay": 1.0}, "decay"),
        ({"protect_last": -1}, "protect_last"),
        ({"metric": "taylor"}, "metric"),
    ],
)
def test_bad_options_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        create("loraprune", options)


def test_a_fresh_model_is_trained_first(small):
    from secateurs.runs.recipe import stages_for

    stages = stages_for("loraprune", "params=0.5", {}, fresh=True)
    assert [s.kind for s in stages] == ["train", "prune"]
    assert replace(stages[1], recover=False).build_method() == LoRAPrune()


def test_of_an_encoder_and_a_decoder_both_ends_stay_whole():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=40, d_model=8, d_kv=4, d_ff=12, num_heads=2, num_layers=3, num_decoder_layers=2
    )
    t5 = transformers.T5ForConditionalGeneration(config)
    whole = LoRAPrune(protect_first=0.34).protected(t5, find_blocks(t5))
    kinds = {"encoder.block.0", "encoder.block.2", "decoder.block.1"}
    assert whole == kinds
    assert LoRAPrune(protect_first=0, protect_last=0).protected(t5, find_blocks(t5)) == set()


def test_in_bfloat16_roundings_are_no_note():
    torch.manual_seed(0)
    tokens = torch.randint(40, (32, 9))
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 8)
    task = sc.language_modelling(llama, loader, loader, finetuning=sc.TrainSettings(steps=12))
    model = llama(4).bfloat16()
    outcome = sc.prune(model, "loraprune", "params=0.75", task, lr=1e-2, protect_first=0.0)
    assert not outcome.notes
