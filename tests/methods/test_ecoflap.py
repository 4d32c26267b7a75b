"""ECoFLaP: the card's checks; scores against their formulas; budgets, towers, precision."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.calibration.blocks import find_blocks, sub_networks
from secateurs.errors import InputError
from secateurs.methods.weights.ecoflap import (
    first_order_scores,
    zeroth_order_scores,
)
from secateurs.parts.allocation import default_cap, water_fill
from secateurs.registry import create

VOCABULARY = 24


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


def network(width=10, depth=3):
    """The first block counts more than the last."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Residual(width) for _ in range(depth))
    model = nn.Sequential(nn.Linear(6, width), nn.Sequential(*blocks), nn.Linear(width, 3)).double()
    with torch.no_grad():
        for place, block in enumerate(blocks):
            block.down.weight.mul_(3 / (1 + place) ** 2)
    return model


def task_of(model, samples=64, inputs=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, inputs, generator=generator).to(next(model.parameters()).dtype)
    data = DataLoader(TensorDataset(x, x.argmax(1) % 3), 16)
    return sc.classification(model, data, data)


def pruned(model, budget, task=None, **options):
    return sc.prune(model, "ecoflap", budget, task or task_of(model), **{"samples": 32, **options})


def counts(found, sizes):
    return [round((1 - s) * n) for s, n in zip(found.values(), sizes, strict=True)]


def filled(scores, sizes, *how):
    names = [f"g{i}" for i in range(len(sizes))]
    scores, size = dict(zip(names, scores, strict=True)), dict(zip(names, sizes, strict=True))
    return counts(water_fill(scores, size, *how), sizes)


# --- water-filling ----------------------------------------------------------------------------


def test_the_worked_allocations_of_the_card():
    thousands = [1000] * 4
    assert filled([1, 1, 1, 1], thousands, 0.5) == [500] * 4
    assert filled([8, 1, 1, 2], thousands, 0.5, 0.6) == [665, 434, 434, 467]
    assert filled([100, 1, 1, 1], thousands, 0.5, 0.9) == [998, 334, 334, 334]


@given(
    groups=st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 5000)), min_size=1, max_size=12),
    sparsity=st.floats(0, 0.9),
    more=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_the_total_is_exact_and_no_group_goes_beyond_the_cap(groups, sparsity, more):
    cap = sparsity + more * (0.999 - sparsity)
    scores, sizes = zip(*groups, strict=True)
    kept = filled(scores, sizes, sparsity, cap)
    assert sum(kept) == int((1 - sparsity) * sum(sizes) + 1e-6)
    for count, size in zip(kept, sizes, strict=True):
        assert 0 <= count <= size
        # whole weights may not allow the cap itself
        assert count > (1 - cap) * size - 1


@pytest.mark.parametrize("scores", [[3, 1, 0, 9], [0, 0, 0, 0]])
def test_a_cap_at_the_sparsity_and_scores_of_zero_give_uniform(scores):
    cap = 0.5 if any(scores) else 0.9
    assert filled(scores, [1000, 400, 200, 600], 0.5, cap) == [500, 200, 100, 300]


def test_the_higher_the_score_the_more_stays():
    found = water_fill({"a": 1.0, "b": 2.0, "c": 4.0}, {"a": 500, "b": 500, "c": 500}, 0.6)
    assert found["a"] > found["b"] > found["c"]
    assert max(found.values()) <= 0.7 + 1e-12
    # what full groups cannot take goes to the others, those without a score last
    assert filled([1, 0], [10, 10], 0.25, 0.9) == [10, 5]


def test_bad_allocations_are_refused():
    for cap in (0.4, 1.0):
        with pytest.raises(InputError, match="max_sparsity"):
            filled([1], [10], 0.5, cap)
    for score in (math.nan, -1.0, math.inf):
        with pytest.raises(InputError, match="scores g0"):
            filled([score], [10], 0.5)


def test_the_cap_is_a_tenth_above_and_never_reaches_1():
    assert [default_cap(p) for p in (0.0, 0.5, 0.8)] == pytest.approx([0.1, 0.6, 0.9])
    assert default_cap(0.95) == pytest.approx(0.975)


# --- scores -----------------------------------------------------------------------------------


class Linear(nn.Module):
    """loss = a · W, whose gradient is a everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))


def test_of_a_linear_loss_the_score_is_the_gradient_along_the_direction():
    """E |a · z| = ‖a‖ sqrt(2/π)."""
    model, slope = Linear(), torch.randn(3, 4, dtype=torch.float64)
    params = {"weight": model.weight}
    batches = [torch.zeros(1)] * 5000

    def loss(model, _):
        return (slope * model.weight).sum()

    found = zeroth_order_scores(model, params, loss, batches)["weight"] / 5000
    expected = float(slope.norm()) * math.sqrt(2 / math.pi)
    assert found == pytest.approx(expected, rel=0.03)
    few = [zeroth_order_scores(model, params, loss, batches[:1], epsilon=e) for e in (1e-3, 1e-1)]
    assert few[0]["weight"] == pytest.approx(few[1]["weight"], rel=1e-9)


def test_the_mean_score_is_the_norm_of_the_gradient():
    model = network(4, 1)
    task, params = task_of(model), {"1.0.up.weight": model[1][0].up.weight}
    batch = next(iter(task.train))
    found = zeroth_order_scores(model, params, task.batch_loss, [batch], draws=3000, epsilon=1e-5)
    model.eval()
    [gradient] = torch.autograd.grad(task.batch_loss(model, batch), list(params.values()))
    wanted = float(gradient.norm()) * math.sqrt(2 / math.pi)
    assert found["1.0.up.weight"] / 3000 == pytest.approx(wanted, rel=0.04)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scoring_leaves_weights_modes_and_generators_as_they_were(dtype):
    model = network().to(dtype).train()
    model[0].weight.requires_grad_(False)
    task = task_of(model)
    params = create("ecoflap").prunable(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    memory = {n: p.data_ptr() for n, p in model.named_parameters()}
    batches = list(task.train)
    state = torch.get_rng_state()
    scores = zeroth_order_scores(model, params, task.batch_loss, batches)
    others = first_order_scores(model, params, task.batch_loss, batches)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "0.weight")
        if dtype != torch.bfloat16:
            assert parameter.data_ptr() == memory[name]
    assert model.training
    assert model[1][0].dropout.training
    assert torch.equal(state, torch.get_rng_state())
    assert zeroth_order_scores(model, params, task.batch_loss, batches) == scores
    assert zeroth_order_scores(model, params, task.batch_loss, batches, seed=1) != scores
    assert min(scores.values()) > 0
    assert min(others.values()) > 0


def test_in_half_precision_the_loss_is_taken_in_float32():
    """In bfloat16 itself a step of 1e-3 mostly changes nothing."""
    half = network().bfloat16().eval()
    wide = copy.deepcopy(half).float()
    scores = []
    for model in (half, wide):
        task = task_of(model)
        params = create("ecoflap").prunable(model)
        batches = [(x.to(torch.bfloat16).to(x.dtype), y) for x, y in task_of(half).train]
        batches = [(x.to(next(model.parameters()).dtype), y) for x, y in batches]
        scores.append(zeroth_order_scores(model, params, task.batch_loss, batches))
    for name, score in scores[1].items():
        assert scores[0][name] == pytest.approx(score, rel=0.25)


def test_first_order_scores_are_their_formulas():
    model = network(4, 1).eval()
    task, params = task_of(model), create("ecoflap").prunable(model)
    batches = list(task.train)
    gradients = {n: [] for n in params}
    for batch in batches:
        found = torch.autograd.grad(task.batch_loss(model, batch), list(params.values()))
        for name, gradient in zip(params, found, strict=True):
            gradients[name].append(gradient)
    for name, parameter in params.items():
        g, w = torch.stack(gradients[name]), parameter.detach()
        wanted = {
            "abs": (w.abs() * g.abs().mean(0)).sum(),
            "square": (w.square() * g.square().mean(0)).sum(),
            "gradient": g.abs().mean(0).sum(),
        }
        for kind, value in wanted.items():
            scores = first_order_scores(model, params, task.batch_loss, batches, kind)
            assert scores[name] == pytest.approx(float(value), rel=1e-9)


def test_samples_count_once_a_draw(monkeypatch):
    model = network(4, 1)
    task, params = task_of(model), create("ecoflap").prunable(model)
    seen, whole = [], sc.Task.batch_loss

    def counted(task, model, batch):
        seen.append(len(batch[0]))
        return whole(task, model, batch)

    monkeypatch.setattr(sc.Task, "batch_loss", counted)
    for samples, draws, sizes in ((32, 1, [8] * 4), (32, 2, [8] * 2), (20, 1, [8, 8, 4])):
        seen.clear()
        method = create("ecoflap", {"score_samples": samples, "draws": draws})
        method.scores(model, params, task)
        assert sorted(seen) == sorted(sizes * (2 * draws * len(params)))


def test_pairs_whose_batches_cannot_be_cut_are_collated_anew():
    """Two rows of inputs and one label a sample, all first rows before all second ones."""
    model = network(4, 2)
    rows = [(x, y) for x, y in torch.randn(40, 2, 6).double()]

    def collate(pairs):
        return torch.stack([*(x for x, _ in pairs), *(y for _, y in pairs)]), torch.arange(
            len(pairs)
        )

    def apart(output, target):
        one, other = output.chunk(2)
        assert len(one) == len(target)
        return (one - other).square().mean(1)

    data = DataLoader(rows, 10, shuffle=True, collate_fn=collate)
    task = sc.Task(
        model, data, data, lambda *pair: apart(*pair).mean(), {"accuracy": sc.task.Metric(apart)},
        torch.zeros(1, 6).double(),
    )  # fmt: skip
    outcome = pruned(model, "sparsity=0.5", task, score_samples=12, score_batch=4)
    assert outcome.promise.kept
    scores = [row["score"] for row in outcome.tables["allocation"]]
    assert min(scores) > 0
    with pytest.raises(InputError, match="samples: got 41; accepted: at most 40"):
        pruned(model, "sparsity=0.5", task, score_samples=41)


def test_losses_that_are_no_number_are_refused():
    model = network(4, 1)
    params = create("ecoflap").prunable(model)
    for value, message in ((torch.ones(3), "shape"), (torch.tensor(math.nan), "finite")):
        for scores in (zeroth_order_scores, first_order_scores):
            with pytest.raises(InputError, match=f"task.loss.*{message}"):
                scores(model, params, lambda *_, v=value: v, [torch.zeros(1)])


# --- pruning ----------------------------------------------------------------------------------


def shares(outcome):
    return {r["group"]: r["sparsity"] for r in outcome.tables["allocation"]}


@pytest.mark.parametrize("inner", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("budget", ["sparsity=0.5", "sparsity=0.613", "density=0.3"])
def test_the_budget_is_met_to_one_weight_and_important_blocks_keep_more(inner, budget):
    model = network()
    outcome = pruned(model, budget, inner=inner)
    assert outcome.promise.kept
    asked = sc.Budget.parse(budget)
    total = 3 * 2 * 200
    assert outcome.masks.kept == asked.kept(total)
    rows = {r["group"]: r for r in outcome.tables["allocation"]}
    assert list(rows) == ["1.0", "1.1", "1.2"]
    most, least = (f(rows, key=lambda g: rows[g]["score"]) for f in (max, min))
    assert rows[most]["sparsity"] < rows[least]["sparsity"]
    assert max(r["sparsity"] for r in rows.values()) <= asked.sparsity(total) + 0.1 + 1e-9
    for name, mask in outcome.masks.items():
        group = name.rsplit(".", 2)[0]
        wanted = (1 - rows[group]["sparsity"]) * mask.numel()
        assert abs(int(mask.sum()) - wanted) <= 1
        if inner == "wanda":
            rows_kept = mask.sum(1)
            assert rows_kept.max() - rows_kept.min() <= 1


def test_at_the_cap_it_is_the_inner_method_bit_for_bit():
    model, task = network(), task_of(network())
    for inner in ("wanda", "sparsegpt", "magnitude"):
        own = pruned(model, "sparsity=0.5", task, inner=inner, max_sparsity=0.5)
        plain = sc.prune(model, inner, "sparsity=0.5", task, samples=32)
        for name, tensor in plain.model.state_dict().items():
            assert torch.equal(tensor, own.model.state_dict()[name])


def test_a_sparsity_of_0_changes_nothing():
    model = network().eval()
    inputs = torch.randn(5, 6, dtype=torch.float64)
    outcome = pruned(model, "sparsity=0.0")
    assert torch.equal(outcome.model(inputs), model(inputs))


def test_scores_are_of_the_dense_model_and_summed_or_averaged_over_groups():
    model, task = network(), task_of(network())
    method = create("ecoflap", {"score_samples": 16})
    params = method.prunable(model)
    scores = method.scores(model, params, task, 3)
    for group, names in (("block", lambda n: n.rsplit(".", 2)[0]), ("layer", str)):
        for aggregate in ("sum", "avg"):
            outcome = pruned(
                model, "sparsity=0.5", task, group=group, aggregate=aggregate, score_samples=16,
                seed=3,
            )  # fmt: skip
            for row in outcome.tables["allocation"]:
                wanted = sum(s for n, s in scores.items() if names(n) == row["group"])
                divisor = row["weights"] if aggregate == "avg" else 1
                assert row["score"] == pytest.approx(wanted / divisor, rel=1e-12)
    [row] = pruned(model, "sparsity=0.5", task, group="model").tables["allocation"]
    assert (row["group"], row["sparsity"]) == ("model", 0.5)


@pytest.mark.parametrize("score", ["first-abs", "first-square", "first-gradient"])
def test_gradients_may_score_too(score):
    outcome = pruned(network(), "sparsity=0.5", score=score, score_samples=64)
    assert outcome.promise.kept
    assert len(set(shares(outcome).values())) == 3


def test_a_loss_that_nothing_changes_gives_uniform_with_a_note():
    model = network()
    task = task_of(model)
    flat = sc.Task(
        model, task.train, task.evaluate, lambda output, target: output.sum() * 0, task.metrics,
        task.example_inputs,
    )  # fmt: skip
    outcome = pruned(model, "sparsity=0.5", flat)
    assert set(shares(outcome).values()) == {0.5}
    assert any("all scores are zero" in note for note in outcome.notes)


def test_a_matrix_may_be_compared_as_a_whole():
    outcome = pruned(network(), "sparsity=0.5", scope="matrix")
    kept = outcome.masks["1.0.up.weight"].sum(1)
    assert kept.max() - kept.min() > 1
    assert outcome.promise.kept


# --- towers and language ----------------------------------------------------------------------


def clip():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {**sizes, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    text = {**sizes, "num_hidden_layers": 3, "vocab_size": VOCABULARY, "eos_token_id": 1}
    torch.manual_seed(0)
    return CLIPModel(
        CLIPConfig(
            text_config={**text, "bos_token_id": 0, "pad_token_id": 1},
            vision_config=vision,
            projection_dim=8,
        )
    ).eval()


def pairs(model, samples=32):
    """Images and captions; each caption is to be found among those of its batch."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "pixel_values": torch.randn(3, 16, 16, generator=generator),
            "input_ids": torch.randint(2, VOCABULARY, (6,), generator=generator),
            "labels": torch.tensor(0),
        }
        for _ in range(samples)
    ]

    def loss(output, target):
        logits = output.logits_per_image
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))

    def found(output, target):
        logits = output.logits_per_image
        return (logits.argmax(1) == torch.arange(len(logits))).float()

    data = DataLoader(rows, 8)
    return sc.Task(
        model, data, data, loss, {"accuracy": sc.task.Metric(found)},
        {k: v[None] for k, v in rows[0].items() if k != "labels"},
    )  # fmt: skip


def kept_of(outcome, tower):
    masks = [m for n, m in outcome.masks.items() if n.startswith(tower)]
    return sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)


def test_of_two_towers_each_may_have_its_own_budget():
    model = clip()
    task = pairs(model)
    assert set(sub_networks(model, find_blocks(model)).values()) == {"text_model", "vision_model"}
    together = pruned(model, "sparsity=0.5", task, score_samples=8)
    assert together.promise.kept
    apart = pruned(model, "sparsity=0.5", task, score_samples=8, per_model=True)
    assert apart.promise.kept
    for tower in ("text_model", "vision_model"):
        kept, total = kept_of(apart, tower)
        assert abs(kept - total / 2) <= 1
        assert abs(kept_of(together, tower)[0] - total / 2) > 20
    towers = pruned(model, "sparsity=0.5", task, score_samples=8, group="model")
    assert list(shares(towers)) == ["text_model", "vision_model"]
    assert len(set(shares(towers).values())) == 2


def test_encoder_and_decoder_are_networks_and_stages_are_not():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, num_layers=2))
    assert set(sub_networks(t5, find_blocks(t5)).values()) == {"encoder", "decoder"}
    for one in (network(), network(depth=1), nn.Linear(3, 3)):
        assert set(sub_networks(one, find_blocks(one)).values()) == {""}
    stages = nn.Sequential(*(nn.Sequential(*(Residual(4) for _ in range(2))) for _ in range(2)))
    assert set(sub_networks(stages, find_blocks(stages)).values()) == {""}


def test_a_language_model_is_scored_by_its_own_loss():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 40}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().eval()
    tokens = torch.randint(VOCABULARY, (32, 9))
    data = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 16)
    task = sc.language_modelling(model, data, data)
    outcome = pruned(model, "sparsity=0.5", task)
    assert outcome.promise.kept
    assert len(outcome.masks) == 3 * 7
    assert len(set(shares(outcome).values())) == 3
    assert next(outcome.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_sparsity": 0.4}, "max_sparsity: got 0.4; accepted: at least the sparsity, 0.5"),
        ({"max_sparsity": 1.0}, "max_sparsity"),
        ({"score_samples": 0}, "score_samples"),
        ({"score_samples": 1000}, "samples"),
        ({"score_batch": 0}, "score_batch"),
        ({"draws": 0}, "draws"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"inner": "sparsegpt", "scope": "row"}, "scope"),
        ({"pattern": "2:4"}, "pattern: got '2:4'; .* N:M is the same share everywhere"),
        ({"exclude": ["no such layer"]}, "exclude"),
    ],
)
def test_bad_options_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        pruned(network(), "sparsity=0.5", **options)


def test_n_of_m_is_refused():
    with pytest.raises(InputError, match="budget: got '2:4'; accepted: for ecoflap: sparsity="):
        pruned(network(), "2:4")
