"""CFSP: the card's checks; what is found in models of others; removal against silence."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.calibration.block_change import token_change
from secateurs.calibration.feed_forward import columns, feed_forward, silence
from secateurs.calibration.walk import walk
from secateurs.errors import InputError
from secateurs.methods.channels.cfsp import (
    activations,
    block_importance,
    nearest_multiple,
    neuron_scores,
    relative_scores,
)
from secateurs.parts.allocation import importance_ranks, sigmoid_allocation, sigmoid_weights
from secateurs.training import adapters
from secateurs.zoo.transformers import CharTransformer, TransformerBlock, VisionTransformer

VOCABULARY = 24


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def language(model, samples=32, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (samples, 9), generator=generator)
    data = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 16)
    return sc.language_modelling(model, data, data)


def transformer(seed=0, **changes):
    """Blocks that turn the stream by different angles, in float64."""
    sizes = {"inputs": (1, 8, 8), "patch": 2, "dim": 16, "heads": 2, "depth": 4, "hidden": 24}
    torch.manual_seed(seed)
    model = VisionTransformer(**{**sizes, "classes": 5, "gated": True, **changes}).double().eval()
    with torch.no_grad():
        for place, block in enumerate(model.blocks):
            block.feed_forward.down.weight.mul_(4 / (1 + place))
    return model


def images(samples=64):
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()


def vision(model, samples=64):
    inputs = images(samples)
    data = DataLoader(TensorDataset(inputs, torch.arange(samples) % 5), 16)
    return sc.classification(model, data, data)


def pruned(model, budget, task=None, **options):
    task = vision(model) if task is None else task
    samples = options.pop("samples", len(task.train.dataset))
    return sc.prune(model, "cfsp", budget, task, samples=samples, **options)


# --- the allocation ---------------------------------------------------------------------------


def test_the_worked_allocations_of_the_card():
    angles = double([0.10, 0.05, 0.04, 0.06])
    weights = double([0.6205, 0.4591, 0.4268, 0.4918])
    assert torch.allclose(sigmoid_weights(angles), weights, atol=5e-5)
    half = double([0.6210, 0.4595, 0.4272, 0.4923])
    assert torch.allclose(sigmoid_allocation(angles, 0.5), half, atol=6e-5)
    fifth = double([0.9936, 0.7353, 0.6835, 0.7876])
    assert torch.allclose(sigmoid_allocation(angles, 0.2), fifth, atol=6e-5)
    capped = double([0.9905, 0.7363, 0.7251, 0.7481])
    found = sigmoid_allocation(double([0.30, 0.05, 0.04, 0.06]), 0.2)
    assert torch.allclose(found, capped, atol=6e-5)


@given(
    angles=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    ratio=st.floats(0, 0.95),
    alpha=st.sampled_from([0.0, 1.0, 5.0]),
)
@settings(max_examples=200, deadline=None)
def test_the_mean_share_is_what_is_asked_and_none_is_above_one(angles, ratio, alpha):
    shares = sigmoid_allocation(double(angles), ratio, alpha)
    assert float(shares.mean()) == pytest.approx(1 - ratio, abs=1e-9)
    assert float(shares.max()) <= 1 + 1e-9
    assert float(shares.min()) > 0
    if alpha == 0:
        assert torch.allclose(shares, torch.full_like(shares, 1 - ratio), atol=1e-12)


def test_with_widths_the_mean_is_over_neurons():
    angles, sizes = double([0.3, 0.1, 0.05]), double([10, 20, 400])
    shares = sigmoid_allocation(angles, 0.6, sizes=sizes)
    assert float((shares * sizes).sum()) == pytest.approx(0.4 * 430)


def test_the_order_of_angles_is_the_order_of_shares_and_nothing_goes_at_ratio_0():
    shares = sigmoid_allocation(double([0.3, 0.1, 0.2]), 0.3)
    assert shares.argsort().tolist() == [1, 2, 0]
    for angles in ([0.3, 0.1], [0.2, 0.2]):
        assert sigmoid_allocation(double(angles), 0.0).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_bad_allocations_are_refused():
    for ratio in (-0.1, 1.0):
        with pytest.raises(InputError, match="prune_ratio"):
            sigmoid_allocation(double([0.1]), ratio)
    with pytest.raises(InputError, match="scores"):
        sigmoid_allocation(double([0.1, float("nan")]), 0.5)


def test_ranks_follow_the_weights_and_their_total_is_constant():
    weights = sigmoid_weights(double([0.10, 0.05, 0.04, 0.06]))
    assert importance_ranks(weights, 8) == [10, 7, 7, 8]
    wanted = [max(1, round(8 * float(w / weights.mean()))) for w in weights]
    assert importance_ranks(weights, 8) == wanted
    assert importance_ranks(double([1, 1, 1]), 4) == [4, 4, 4]
    assert importance_ranks(double([1, 100, 1, 1]), 2) == [1, 5, 1, 1]
    with pytest.raises(InputError, match="mean_rank"):
        importance_ranks(weights, 0.5)
    with pytest.raises(InputError, match="weights"):
        importance_ranks(double([1, 0]))


def test_multiples_are_the_nearest_and_never_none():
    assert nearest_multiple(512, 0.45, 128) == 256
    assert nearest_multiple(512, 0.37, 128) == 128
    assert nearest_multiple(512, 0.01, 128) == 128
    assert nearest_multiple(500, 0.99, 128) == 500


# --- coarse -----------------------------------------------------------------------------------


class Turned(nn.Module):
    """Does something simple to its input; the matrix and norm make it a block."""

    def __init__(self, turn):
        super().__init__()
        self.turn, self.norm, self.linear = turn, nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.turn(x)


def quarter(x):
    return torch.stack([-x[..., 1], x[..., 0], -x[..., 3], x[..., 2]], -1)


def test_identity_turns_by_0_negation_by_1_and_a_right_angle_by_half():
    turns = [lambda x: x * 1.0, lambda x: -x, quarter, lambda x: 3 * x]
    model = nn.Sequential(*map(Turned, turns)).double()
    batches = [torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(2)]
    found = list(block_importance(model, batches).values())
    assert found == pytest.approx([0, 1, 0.5, 0], abs=1e-7)
    cosine = list(block_importance(model, batches, "cosine").values())
    assert cosine == pytest.approx([0, 2, 1, 0], abs=1e-12)
    ones = torch.ones(2, 4)
    assert token_change(ones, 3 * ones, "mse").tolist() == [4, 4]
    assert token_change(ones, -ones, "mae").tolist() == [2, 2]
    assert token_change(0 * ones, ones).tolist() == pytest.approx([1 / 3, 1 / 3])


def test_importance_is_that_of_a_plain_forward_and_repeated_data_change_nothing():
    model, inputs = transformer(), images()
    streams = []
    handles = [model.blocks[0].register_forward_pre_hook(lambda _, args: streams.append(args[0]))]
    handles += [
        b.register_forward_hook(lambda _, __, out: streams.append(out)) for b in model.blocks
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    wanted = [
        float((torch.cosine_similarity(a, b, -1).arccos() / torch.pi).mean())
        for a, b in itertools.pairwise(streams)
    ]
    once = list(block_importance(model, [inputs[:16], inputs[16:]]).values())
    assert once == pytest.approx(wanted, rel=1e-9)
    assert list(block_importance(model, [inputs, inputs]).values()) == pytest.approx(
        once, rel=1e-12
    )
    table = pruned(model, "keep=0.5").tables["blocks"]
    assert [r["angle"] for r in table] == pytest.approx(wanted, rel=1e-9)
    assert once[0] > once[-1]
    assert table[0]["neurons"] > table[-1]["neurons"]


# --- fine -------------------------------------------------------------------------------------


def test_the_published_score_is_the_activation_alone():
    torch.manual_seed(0)
    matrices = [torch.randn(7, 12, dtype=torch.float64) for _ in range(3)]
    activation = torch.rand(12, dtype=torch.float64)
    for b, c in ((1.0, 1.0), (2.0, 0.5)):
        score = relative_scores(matrices, activation, b, c)
        assert torch.allclose(score * 7 / 3, activation**c, atol=1e-12)
        assert torch.allclose(neuron_scores("act", activation, matrices, b=b, c=c), activation**c)


def test_the_other_scores_are_their_formulas():
    torch.manual_seed(0)
    down, up = torch.randn(2, 7, 12, dtype=torch.float64)
    n = torch.rand(12, dtype=torch.float64)
    norm = torch.stack([down[:, j].norm() for j in range(12)])
    mean = torch.stack([down[:, j].abs().mean() for j in range(12)])
    assert torch.allclose(neuron_scores("magnitude", n, [down], [up]), norm)
    assert torch.allclose(neuron_scores("act-weight", n, [down], [up]), n * norm)
    assert torch.allclose(neuron_scores("wanda", n, [down], [up]), n * mean)
    wanted = torch.zeros(12, dtype=torch.float64)
    for weight in (down, up):
        for j in range(12):
            for i in range(7):
                row = sum(abs(weight[i, k]) * n[k] ** 2 for k in range(12))
                wanted[j] += abs(weight[i, j]) * n[j] ** 2 / row / 7
    found = neuron_scores("relative-out", n, [down], [up], b=2.0, c=0.5)
    assert torch.allclose(found, wanted * n**0.5)


def test_activations_are_the_root_mean_square_of_what_the_layer_behind_is_fed():
    model, inputs = transformer(), images(32)
    structure = sc.axes(model, inputs[:1])
    layers = feed_forward(structure, model)
    assert [x.block for x in layers] == [f"blocks.{i}" for i in range(4)]
    moments = {}
    for visit in walk(model, [inputs[:8], inputs[8:]]):
        moments.update(visit.moments([f"{visit.name}.feed_forward.down"], products=False))
    fed = []
    handle = model.blocks[2].feed_forward.down.register_forward_pre_hook(
        lambda _, args: fed.append(args[0])
    )
    with torch.no_grad():
        model(inputs)
    handle.remove()
    wanted = fed[0].flatten(0, 1).square().mean(0).sqrt()
    assert torch.allclose(activations(structure, layers[2], moments), wanted, rtol=1e-10)


def test_a_silent_neuron_goes_first_and_is_not_missed():
    model = transformer()
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.up.weight[5] = 0
            block.feed_forward.up.bias[5] = 0
    outcome = pruned(model, f"keep={23 / 24}", metric="constant")
    assert [r["neurons"] for r in outcome.tables["blocks"]] == [23] * 4
    assert torch.allclose(outcome.model(images()), model(images()), atol=1e-12)


# --- removal ----------------------------------------------------------------------------------


def kept_indices(outcome):
    [plan] = outcome.surgery
    return {n: {int(p): k for p, k in places.items()} for n, places in plan["tensors"].items()}


def test_removal_is_silence_and_the_three_matrices_keep_the_same_sorted_neurons():
    model, inputs = transformer(), images()
    outcome = pruned(model, "keep=0.4")
    kept = kept_indices(outcome)
    silent = copy.deepcopy(model)
    for place, block in enumerate(silent.blocks):
        name = f"blocks.{place}.feed_forward"
        own = kept[f"{name}.down.weight"][1]
        assert own == kept[f"{name}.up.weight"][0] == kept[f"{name}.gate.weight"][0]
        assert own == sorted(own)
        gone = [j for j in range(24) if j not in own]
        with torch.no_grad():
            block.feed_forward.down.weight[:, gone] = 0
    assert torch.allclose(outcome.model(inputs), silent(inputs), atol=1e-10)


def test_the_loudest_neurons_stay():
    model, inputs = transformer(), images()
    outcome = pruned(model, "keep=0.5")
    fed = []
    model.blocks[1].feed_forward.down.register_forward_pre_hook(lambda _, a: fed.append(a[0]))
    with torch.no_grad():
        model(inputs)
    loud = fed[0].flatten(0, 1).square().mean(0)
    own = kept_indices(outcome)["blocks.1.feed_forward.down.weight"][1]
    assert set(own) == set(loud.topk(len(own)).indices.tolist())


@pytest.mark.parametrize("budget", ["params=1.0", "macs=1.0", "sparsity=0.0", "keep=1.0"])
def test_a_budget_of_everything_changes_no_bit(budget):
    model = transformer()
    outcome = pruned(model, budget)
    assert torch.equal(outcome.model(images()), model(images()))


@pytest.mark.parametrize(
    "budget", ["keep=0.3", "keep=0.71", "params=0.7", "macs=0.8", "sparsity=0.3", "density=0.75"]
)
@pytest.mark.parametrize("score", ["act", "relative-out", "random"])
def test_budgets_are_met_exactly(budget, score):
    model = transformer()
    outcome = pruned(model, budget, score=score)
    assert outcome.promise.kept
    asked = sc.Budget.parse(budget)
    neurons = sum(r["neurons"] for r in outcome.tables["blocks"])
    if asked.kind == "keep":
        assert neurons == round(asked.value * 96)
    else:
        share = 1 - asked.value if asked.kind == "sparsity" else asked.value
        after, before = (
            c.macs if asked.kind == "macs" else c.parameters
            for c in (outcome.after, outcome.before)
        )
        unit = (3 * 16 + 2) / before if asked.kind != "macs" else 3 * 16 * 16 / before
        assert share - unit < after / before <= share
    assert f"{neurons} of 96 feed-forward neurons stay" in outcome.notes
    assert outcome.promise.tolerance > 0


def test_a_budget_that_neurons_cannot_meet_is_refused():
    with pytest.raises(InputError, match="only feed-forward neurons go"):
        pruned(transformer(), "params=0.1")
    with pytest.raises(InputError, match=r"sparsity.*at most 0\.\d+"):
        pruned(transformer(), "sparsity=0.9")
    with pytest.raises(InputError, match="budget"):
        pruned(transformer(), "keep=0.01")


def test_counts_are_multiples_where_they_are_asked_for():
    outcome = pruned(transformer(), "keep=0.5", round_to=8)
    assert outcome.promise.kept
    assert {r["neurons"] % 8 for r in outcome.tables["blocks"]} == {0}
    outcome = pruned(transformer(), "params=0.75", round_to=8)
    assert outcome.promise.kept
    assert outcome.after.parameters <= 0.75 * outcome.before.parameters
    assert {r["neurons"] % 8 for r in outcome.tables["blocks"]} == {0}
    with pytest.raises(InputError, match="round_to: got 32; accepted: at most 24"):
        pruned(transformer(), "keep=0.5", round_to=32)


def test_in_order_a_block_is_measured_behind_the_pruned_ones_before_it():
    model, inputs = transformer(), images()
    plain, ordered = pruned(model, "keep=0.3"), pruned(model, "keep=0.3", sequential=True)
    first = "blocks.0.feed_forward.down.weight"
    assert kept_indices(plain)[first] == kept_indices(ordered)[first]
    assert kept_indices(plain) != kept_indices(ordered)
    assert [r["angle"] for r in plain.tables["blocks"]] == [
        r["angle"] for r in ordered.tables["blocks"]
    ]
    # the neurons of the last block are the loudest of the model as it now stands before it
    half = copy.deepcopy(model)
    for place in range(3):
        half.blocks[place] = ordered.model.blocks[place]
    fed = []
    half.blocks[3].feed_forward.down.register_forward_pre_hook(lambda _, a: fed.append(a[0]))
    with torch.no_grad():
        half(inputs)
    loud = fed[0].flatten(0, 1).square().mean(0)
    own = kept_indices(ordered)["blocks.3.feed_forward.down.weight"][1]
    assert set(own) == set(loud.topk(len(own)).indices.tolist())


def test_the_user_s_model_is_as_it_was():
    model = transformer().train()
    before = copy.deepcopy(model.state_dict())
    pruned(model, "keep=0.5", sequential=True)
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_ranks_of_the_recovery_follow_the_angles(monkeypatch):
    seen = {}

    def wrap(model, names, kind, rank, *args, **options):
        seen.update(rank)
        return wrapped(model, names, kind, rank, *args, **options)

    wrapped = adapters.wrap
    monkeypatch.setattr(adapters, "wrap", wrap)
    lora = {"lora": {"rank": 4, "steps": 3, "lr": 1e-2}}
    outcome = pruned(transformer(), "keep=0.5", recover=lora)
    table = outcome.tables["blocks"]
    assert [set(r) for r in table] == [{"block", "angle", "keep", "neurons", "of"}] * 4
    angles = double([r["angle"] for r in table])
    wanted = importance_ranks(sigmoid_weights(angles), 4)
    assert sum(wanted) == 16
    assert len(set(wanted)) > 1
    for row, rank in zip(table, wanted, strict=True):
        assert {r for n, r in seen.items() if n.startswith(row["block"] + ".")} == {rank}
    [adapted, total] = outcome.tables["trained parameters"]
    assert (adapted["part"], total["part"]) == ("adapters", "all")
    assert not adapters.adapters(outcome.model)
    raw = pruned(transformer(), "keep=0.5")
    assert outcome.metrics_after["loss"] < raw.metrics_after["loss"]


# --- models of others -------------------------------------------------------------------------

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 3}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **heads, intermediate_size=40))


def phi3():
    """Its gate and up projection are one matrix."""
    from transformers import Phi3Config, Phi3ForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return Phi3ForCausalLM(Phi3Config(**SMALL, **heads, intermediate_size=40))


def gpt2():
    """Its linear layers store their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=4, n_inner=40)
    )


def own():
    return CharTransformer(8, 16, 4, 3, 40, VOCABULARY)


def narrowed(model, outcome):
    """Tensors of another shape than before, all of them of feed-forward layers."""
    dense = model.state_dict()
    found = [n for n, t in outcome.model.state_dict().items() if t.shape != dense[n].shape]
    assert all("mlp" in name or "feed_forward" in name for name in found)
    return found


@pytest.mark.parametrize("make", [llama, phi3, gpt2, own])
@pytest.mark.parametrize("score", ["act", "relative-out"])
def test_of_language_models_only_neurons_go_wherever_they_are_stored(make, score):
    torch.manual_seed(0)
    model = make().double().eval()
    task = language(model)
    outcome = pruned(model, "keep=0.5", task, score=score, sequential=True)
    assert [r["of"] for r in outcome.tables["blocks"]] == [40] * 3
    assert sum(r["neurons"] for r in outcome.tables["blocks"]) == 60
    assert narrowed(model, outcome)
    structure = sc.axes(copy.deepcopy(model), task.example_inputs)
    silent = structure.trace.model
    kept = kept_indices(outcome)
    for layer in feed_forward(structure, silent):
        [name] = layer.behind
        [indices] = kept[name].values()
        silence(structure, layer, torch.tensor(indices))
    tokens = next(iter(task.train))[0]
    with torch.no_grad():
        wanted, found = silent(tokens), outcome.model(tokens)
    wanted, found = (getattr(x, "logits", x) for x in (wanted, found))
    assert torch.allclose(wanted, found, atol=1e-9)


def test_a_fused_gate_is_read_as_two_matrices():
    torch.manual_seed(0)
    model = phi3().eval()
    structure = sc.axes(model, torch.zeros(1, 8, dtype=torch.long))
    layer = feed_forward(structure, model)[0]
    [name] = layer.before
    fused = model.get_parameter(name).detach().double()
    gate, up = columns(structure, layer.group, name)
    assert torch.equal(torch.cat([gate, up], 1), fused.T)


def test_stages_of_different_width_share_one_budget():
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 2, "num_labels": 5}
    config = SwinConfig(**sizes, num_channels=1, depths=[2, 2], num_heads=[2, 2])
    model = SwinForImageClassification(config).eval()
    data = DataLoader(TensorDataset(torch.randn(16, 1, 32, 32), torch.arange(16) % 5), 8)
    outcome = pruned(model, "keep=0.5", sc.classification(model, data, data))
    table = outcome.tables["blocks"]
    assert [r["of"] for r in table] == [64, 64, 128, 128]
    assert sum(r["neurons"] for r in table) == 192
    assert len(narrowed(model, outcome)) == 4 * 3


def test_encoder_and_decoder_are_both_narrowed():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=2)).eval()
    tokens = torch.randint(VOCABULARY, (16, 8))
    rows = [
        {"input_ids": t, "decoder_input_ids": t, "labels": t.roll(-1)} for t in tokens
    ]  # fmt: skip
    data = DataLoader(rows, 8)
    outcome = pruned(model, "keep=0.5", sc.language_modelling(model, data, data))
    table = outcome.tables["blocks"]
    assert [r["block"] for r in table] == [
        f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)
    ]
    assert sum(r["neurons"] for r in table) == 64
    assert all(0 < r["angle"] < 1 for r in table)


def test_a_model_without_blocks_is_one_and_of_it_no_angle_is_taken(digits_task):
    outcome = pruned(digits_task.fresh_model(0), "keep=0.5", digits_task, samples=64)
    [row] = outcome.tables["blocks"]
    assert row == {"block": "model", "keep": 0.5, "neurons": 24, "of": 48}
    assert outcome.model[0].out_features == 16


class Pooling(TransformerBlock):
    def forward(self, x):
        return super().forward(x)[:, ::2]


def test_what_cannot_be_measured_is_refused():
    convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 6), nn.Flatten())
    with pytest.raises(InputError, match="without feed-forward neurons"):
        pruned(convolutions.double(), "keep=0.5")
    with pytest.raises(InputError, match="without feed-forward neurons"):
        pruned(transformer(), "keep=0.5", exclude=["blocks"])
    shorter = transformer()
    shorter.blocks = nn.ModuleList(Pooling(16, 2, 24) for _ in range(2)).double()
    with pytest.raises(InputError, match=r"blocks\.0: got .* a block that keeps the shape"):
        pruned(shorter, "keep=0.5")
    assert pruned(shorter, "keep=0.5", metric="constant").promise.kept
    with pytest.raises(InputError, match="samples"):
        pruned(transformer(), "keep=0.5", samples=1000)


@pytest.mark.parametrize(
    ("option", "value"),
    [("alpha", -1.0), ("margin", 0.5), ("round_to", 0), ("samples", 0), ("batch", 0),
     ("b", -1.0), ("c", -1.0), ("metric", "sine"), ("score", "loud")],
)  # fmt: skip
def test_bad_options_are_refused(option, value):
    with pytest.raises(InputError, match=option):
        pruned(transformer(), "keep=0.5", **{option: value})


class Inside(nn.Module):
    """A block whose second projection is multiplied by its own code, never called (Mamba)."""

    def __init__(self, called):
        super().__init__()
        self.norm, self.called = nn.LayerNorm(8), called
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.narrow, self.wide = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        x = self.norm(x)
        own = F.linear(torch.relu(self.narrow(x)), self.wide.weight, self.wide.bias)
        return x + own + (self.down(torch.relu(self.up(x))) if self.called else 0)


def stacked(called):
    torch.manual_seed(0)
    blocks = [nn.Sequential(Inside(called)) for _ in range(2)]
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(nn.Unflatten(1, (8, 8)), *blocks, head).eval()


def test_neurons_whose_activation_nobody_saw_stay(digits_task):
    outcome = pruned(stacked(True), "keep=0.5", digits_task)
    for block in (outcome.model[1][0], outcome.model[2][0]):
        assert block.narrow.out_features == 6
    assert outcome.model[1][0].up.out_features + outcome.model[2][0].up.out_features == 12
    assert "12 of 24 feed-forward neurons stay" in outcome.notes
    why = "left whole, no calibration input was seen to reach what they are fed to: "
    assert why + "1.0.narrow, 2.0.narrow" in outcome.notes
    with pytest.raises(InputError, match="no activation of which was seen: 1.0.narrow"):
        pruned(stacked(False), "keep=0.5", digits_task)
    blind = pruned(stacked(False), "keep=0.5", digits_task, score="magnitude")
    assert blind.model[1][0].narrow.out_features + blind.model[2][0].narrow.out_features == 6
