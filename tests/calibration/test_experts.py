"""Experts that are one parameter, against the same experts one by one and against brute force."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.calibration.experts import watching
from secateurs.calibration.layerwise import ASSUMED, UNREACHED, UNSEEN, Removal
from secateurs.calibration.moments import outputs_first
from secateurs.calibration.walk import walk
from secateurs.errors import InputError
from secateurs.parts.costs import count_macs, measure_cost
from secateurs.parts.experts import are_experts
from secateurs.parts.patterns import Block, Unstructured
from secateurs.parts.prunable import prunable_parameters
from secateurs.registry import create

HIDDEN, INNER, EXPERTS = 16, 24, 4
BATCHES = [torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
SIZES = {
    "vocab_size": 32, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip


def drawn(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def mixtral(implementation="eager"):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, experts_implementation=implementation)
    return drawn(MixtralForCausalLM(config)).double()


def gpt_oss(implementation="eager"):
    from transformers import GptOssConfig, GptOssForCausalLM

    layers = {"head_dim": 8, "layer_types": ["full_attention"] * 2}
    config = GptOssConfig(**SIZES, **layers, experts_implementation=implementation)
    return drawn(GptOssForCausalLM(config)).double()


def pruned(model, method, budget, batches=BATCHES, **options):
    """A copy, its masks and the notes."""
    chosen, model = create(method, options), copy.deepcopy(model)
    params = outputs_first(model, chosen.prunable(model))
    removals, notes = chosen.removals(params, chosen.accept(budget))
    masks, more = chosen.apply(model, removals, batches)
    return model, masks, [*notes, *more]


def text_task(model, samples=16):
    tokens = torch.cat(BATCHES + BATCHES)[:samples]
    data = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 4)
    return sc.language_modelling(model, data, data, finetuning=sc.TrainSettings(steps=2))


# a mixture by hand, fused or not


class Fused(nn.Module):
    """Two matrices an expert, each in one array; as transformers', and as users write them."""

    def __init__(self, inputs_first, says):
        super().__init__()
        self.num_experts = EXPERTS
        if says:
            self.is_transposed = inputs_first
        self.inputs_first = inputs_first
        shapes = (INNER, HIDDEN), (HIDDEN, INNER)
        for name, shape in zip(("up", "down"), shapes, strict=True):
            sized = shape[::-1] if inputs_first else shape
            setattr(self, name, nn.Parameter(torch.zeros(EXPERTS, *sized)))

    def forward(self, number, x):
        if self.inputs_first:
            return torch.relu(x @ self.up[number]) @ self.down[number]
        return F.linear(torch.relu(F.linear(x, self.up[number])), self.down[number])


class Separate(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(HIDDEN, INNER, bias=False) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(INNER, HIDDEN, bias=False) for _ in range(EXPERTS))

    def forward(self, number, x):
        return self.down[number](torch.relu(self.up[number](x)))


class Mixture(nn.Module):
    """A block; tokens go to experts by their place, to some experts more of them."""

    def __init__(self, experts, used=EXPERTS):
        super().__init__()
        self.norm, self.experts, self.used = nn.LayerNorm(HIDDEN), experts, used

    def forward(self, x):
        tokens = self.norm(x)
        out = x.clone()
        chosen = torch.arange(len(x)) * 7 // 5 % self.used
        for number in chosen.unique():
            here = chosen == number
            out[here] += self.experts(number, tokens[here])
        return out


def by_hand(experts, used=EXPERTS):
    blocks = [Mixture(experts(), used) for _ in range(2)]
    return drawn(nn.Sequential(nn.Linear(6, HIDDEN), nn.Sequential(*blocks))).double()


INPUTS = [torch.randn(40, 6, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2)]


def matrices(mask, inputs_first):
    return mask.mT if inputs_first else mask


def separated(fused, inputs_first):
    """The same weights in layers of their own."""
    model = by_hand(Separate)
    with torch.no_grad():
        for block, other in zip(model[1], fused[1], strict=True):
            block.norm.load_state_dict(other.norm.state_dict())
            for name in ("up", "down"):
                parts = matrices(getattr(other.experts, name), inputs_first)
                for layer, part in zip(getattr(block.experts, name), parts, strict=True):
                    layer.weight.copy_(part)
        model[0].load_state_dict(fused[0].state_dict())
    return model


@pytest.mark.parametrize("says", [True, False], ids=["says its layout", "does not"])
@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize(
    ("method", "budget", "options"),
    [
        ("wanda", "sparsity=0.5", {}),
        ("wanda", "sparsity=0.5", {"scope": "matrix"}),
        ("wanda", "2:4", {}),
        ("wanda", "sparsity=0.5", {"pattern": "block:2x4"}),
        ("sparsegpt", "2:4", {}),
        ("sparsegpt", "sparsity=0.5", {}),
    ],
)
def test_fused_experts_are_pruned_as_layers_of_their_own(
    method, budget, options, inputs_first, says
):
    fused = by_hand(lambda: Fused(inputs_first, says))
    one, masks, notes = pruned(fused, method, budget, INPUTS, **options)
    two, others, same = pruned(separated(fused, inputs_first), method, budget, INPUTS, **options)
    assert (not notes) == (not same)  # SparseGPT's on how few tokens there are
    assert set(masks) == {f"1.{b}.experts.{n}" for b in (0, 1) for n in ("up", "down")}
    for name, mask in masks.items():
        weight = matrices(one.get_parameter(name), inputs_first)
        for number, own in enumerate(matrices(mask, inputs_first)):
            assert torch.equal(own, others[f"{name}.{number}.weight"])
            layer = two.get_parameter(f"{name}.{number}.weight")
            assert torch.allclose(weight[number], layer, rtol=0, atol=1e-12)
            assert not weight[number][~own].any()


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("budget", ["2:4", "sparsity=0.5"])
def test_magnitude_reads_the_layout_off_the_module(budget, inputs_first):
    fused = by_hand(lambda: Fused(inputs_first, says=True))
    options = {"scope": "row"}
    _, masks, notes = pruned(fused, "magnitude", budget, (), **options)
    _, others, _ = pruned(separated(fused, inputs_first), "magnitude", budget, (), **options)
    assert not notes
    for name, mask in masks.items():
        for number, own in enumerate(matrices(mask, inputs_first)):
            assert torch.equal(own, others[f"{name}.{number}.weight"])


def test_a_layout_that_nothing_says_is_assumed_where_it_counts_and_noted():
    fused = by_hand(lambda: Fused(inputs_first=True, says=False))
    _, masks, notes = pruned(fused, "magnitude", "2:4", ())
    assert notes == [f"{name}: {ASSUMED}" for name in masks]
    assert bool((masks["1.0.experts.up"].unflatten(2, (-1, 4)).sum(-1) == 2).all())
    assert not pruned(fused, "magnitude", "sparsity=0.5", ())[2]
    assert pruned(fused, "magnitude", "sparsity=0.5", (), scope="row")[2] == notes


def test_experts_whose_inputs_turn_out_not_to_divide_stay_dense():
    """(16, 24): 16 inputs were assumed to be 24, and 3 divides only these."""
    fused = by_hand(lambda: Fused(inputs_first=True, says=False))
    _, masks, notes = pruned(fused, "wanda", "1:3", INPUTS)
    assert bool(masks["1.0.experts.up"].all())
    told = "1.0.experts.up: left dense, 3 does not divide the input dimension"
    assert [n for n in notes if n.startswith("1.0")] == [told]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_without_a_token_is_pruned_by_magnitude_and_named(method):
    fused = by_hand(lambda: Fused(inputs_first=False, says=True), used=EXPERTS - 1)
    one, masks, notes = pruned(fused, method, "sparsity=0.5", INPUTS)
    for name, mask in masks.items():
        [note] = [n for n in notes if n.startswith(name)]
        assert f"expert {EXPERTS - 1}: {UNREACHED}" in note
        weight = fused.get_parameter(name)[-1].abs()
        kept = mask[-1]
        assert int(kept.sum()) == kept.numel() // 2
        assert weight[~kept].max() <= weight[kept].min()
        assert torch.equal(one.get_parameter(name)[-1], fused.get_parameter(name)[-1] * kept)


class Opaque(Fused):
    """Multiplies by a way that is no product of matrices."""

    def forward(self, number, x):
        up = torch.relu((x[:, None] * self.up[number]).sum(-1))
        return (up[:, None] * self.down[number]).sum(-1)


def test_products_that_nobody_sees_are_told():
    fused = by_hand(lambda: Opaque(inputs_first=False, says=True))
    _, masks, notes = pruned(fused, "wanda", "sparsity=0.5", INPUTS)
    assert notes == [f"{name}: experts 0, 1, 2, 3: {UNSEEN}" for name in masks]
    _, others, _ = pruned(fused, "magnitude", "sparsity=0.5", ())
    assert all(torch.equal(mask, others[name]) for name, mask in masks.items())


def test_blocks_lie_within_an_expert_and_their_rounding_is_made_up_for():
    fused = by_hand(lambda: Fused(inputs_first=False, says=True))
    _, masks, _ = pruned(fused, "magnitude", "sparsity=0.3", (), pattern="block:5x7")
    pattern = Block(5, 7)
    for mask in masks.values():
        for own in mask:
            assert set(pattern.pool(own.float()).tolist()) <= {0.0, 1.0}
        assert abs(int(mask.sum()) - 0.7 * mask.numel()) <= 5 * 7
    outcome = sc.prune(fused, "magnitude", "sparsity=0.3", pattern="block:5x7")
    assert outcome.unit == 5 * 7


# transformers' own mixtures


def fed_by_hand(model, block):
    """What every expert of a block is fed, from the routing that its module is given."""
    experts = model.model.layers[block].mlp.experts
    found = {
        "gate_up_proj": [[] for _ in range(EXPERTS)],
        "down_proj": [[] for _ in range(EXPERTS)],
    }

    def record(module, args, kwargs):
        tokens, chosen = (*args, *kwargs.values())[:2]
        for number in range(EXPERTS):
            own = tokens[(chosen == number).any(-1)]
            weight = matrices(module.gate_up_proj[number], module.is_transposed)
            up = own @ weight.T
            if module.has_bias:
                up = up + module.gate_up_proj_bias[number]
            found["gate_up_proj"][number].append(own)
            found["down_proj"][number].append(module._apply_gate(up))

    handle = experts.register_forward_pre_hook(record, with_kwargs=True)
    with torch.no_grad():
        for batch in BATCHES:
            model(batch)
    handle.remove()
    return {name: [torch.cat(own) for own in lists] for name, lists in found.items()}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_moments_of_every_expert_are_those_of_its_tokens(make, implementation):
    model = make(implementation)
    wanted = fed_by_hand(model, block=1)
    for visit in walk(model, BATCHES):
        if visit.index == 1:
            parameters = dict(visit.block.mlp.experts.named_parameters())
            with watching(visit.block, {n: parameters[n] for n in wanted}) as fed:
                visit.run()
    for name, tokens in wanted.items():
        assert fed[name].inputs_first == (make is gpt_oss)
        assert set(fed[name].moments) == {n for n, rows in enumerate(tokens) if len(rows)}
        for number, moments in fed[name].moments.items():
            rows = tokens[number]
            assert moments.rows == len(rows)
            assert torch.allclose(moments.hessian[0], 2 / len(rows) * rows.T @ rows, rtol=1e-10)
            assert torch.allclose(moments.squares[0], rows.square().mean(0), rtol=1e-10)
            assert torch.allclose(moments.mean[0], rows.mean(0), rtol=1e-10)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_two_of_four_inputs_stay_in_every_expert(make, method):
    model, masks, _ = pruned(make(), method, "2:4")
    inputs = 1 if make is gpt_oss else 2
    names = [n for n in masks if "experts" in n]
    assert len(names) == 4
    for name in names:
        groups = masks[name].movedim(inputs, -1).unflatten(-1, (-1, 4))
        assert bool((groups.sum(-1) == 2).all())
        across = masks[name].movedim(3 - inputs, -1).unflatten(-1, (-1, 4))
        assert not bool((across.sum(-1) == 2).all()), "the other way would have passed, too"
        assert not model.get_parameter(name)[~masks[name]].any()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_promise_is_kept_over_the_experts_too(method):
    model = mixtral().float()
    outcome = sc.prune(model, method, "sparsity=0.6", text_task(model), samples=16, batch=4)
    experts = {n: m for n, m in outcome.masks.items() if "experts" in n}
    whole = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert sum(m.numel() for m in experts.values()) == whole > 0.7 * outcome.masks.total
    for mask in (*experts.values(), outcome.masks["model.layers.0.self_attn.q_proj.weight"]):
        assert 1 - float(mask.double().mean()) == pytest.approx(0.6, abs=0.01)
    assert outcome.masks.sparsity == pytest.approx(0.6, abs=1e-4)
    zeros = sum(int((outcome.model.get_parameter(n) == 0).sum()) for n in outcome.masks)
    assert zeros == outcome.masks.total - outcome.masks.kept


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_other_implementations_give_the_same_and_are_put_back(make, implementation):
    one, two = make().float(), make(implementation).float()
    for method in ("wanda", "sparsegpt"):
        _, masks, notes = pruned(one, method, "2:4")
        after, others, same = pruned(two, method, "2:4")
        assert notes == same
        assert all(torch.equal(mask, others[name]) for name, mask in masks.items())
        assert after.config._experts_implementation == implementation


def test_the_implementation_is_put_back_where_a_run_fails():
    model = mixtral("batched_mm")
    experts = {"experts": model.model.layers[0].mlp.experts.gate_up_proj}

    def fail():
        with watching(model, experts):
            assert model.config._experts_implementation == "eager"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.config._experts_implementation == "batched_mm"


def test_experts_that_all_see_their_own_rows_in_one_batched_product():
    """As Llama 4 has them: rows of zeros are tokens of other experts."""

    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_experts = EXPERTS
            self.matrices = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER).double())

        def forward(self, x):
            return torch.bmm(x, self.matrices)

    torch.manual_seed(0)
    module = Batched()
    x = torch.randn(EXPERTS, 5, HIDDEN).double()
    x[1, 2:] = 0
    x[3] = 0
    with watching(module, dict(module.named_parameters())) as fed, torch.no_grad():
        module(x)
    seen = fed["matrices"]
    assert seen.inputs_first
    assert {n: m.rows for n, m in seen.moments.items()} == {0: 5, 1: 2, 2: 5}
    for number, moments in seen.moments.items():
        wanted = 2 / moments.rows * x[number].T @ x[number]
        assert torch.allclose(moments.hessian[0], wanted, rtol=1e-10)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w[2],
        lambda x, w: torch.addmm(torch.zeros(INNER).double(), x, w[2]),
        lambda x, w: (w[2].T @ x.T).T,
        lambda x, w: torch.stack([row @ w[2] for row in x]),
        lambda x, w: torch.einsum("nd,do->no", x, w[2]),
        lambda x, w: torch.baddbmm(torch.zeros(1, 7, INNER).double(), x[None], w[2:3]),
        lambda x, w: F.linear(x, w.mT[2]),
    ],
)
def test_every_way_to_multiply_is_seen(product):
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER).double())
    x = torch.randn(7, HIDDEN).double()
    with watching(module, dict(module.named_parameters())) as fed, torch.no_grad():
        product(x, module.experts)
    seen = fed["experts"]
    assert seen.inputs_first
    assert set(seen.moments) == {2}
    assert seen.moments[2].rows == 7
    assert torch.allclose(seen.moments[2].hessian[0], 2 / 7 * x.T @ x, rtol=1e-10)


def test_experts_that_are_multiplied_from_both_sides_are_refused():
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(2, 4, 4))
    with torch.no_grad(), watching(module, dict(module.named_parameters())):
        torch.ones(3, 4) @ module.experts[0]
        with pytest.raises(InputError, match="experts: got experts .* from both sides"):
            torch.ones(3, 4) @ module.experts[1].T


# what counts as experts, and what they cost


def test_only_matrices_of_experts_are_experts():
    fused = Fused(inputs_first=False, says=True)
    assert are_experts(fused, "up", fused.up)
    assert not are_experts(fused, "up", fused.up.flatten(1))
    assert not are_experts(fused, "scale", torch.ones(EXPERTS, 1, HIDDEN))
    positions = nn.Module()
    assert not are_experts(positions, "positions", torch.ones(1, 9, HIDDEN))
    assert not are_experts(nn.Conv1d(4, 4, 3), "weight", torch.ones(4, 4, 3))
    names = prunable_parameters(mixtral())
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert sum(p.numel() for n, p in names.items() if "experts" in n) == (
        2 * EXPERTS * 3 * HIDDEN * INNER
    )


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_macs_of_experts_are_counted_and_masks_save_theirs(implementation):
    model = mixtral(implementation).float()
    tokens = BATCHES[0]
    macs = count_macs(model, tokens)["model.layers.0.mlp.experts"]
    assert macs == tokens.numel() * 2 * 3 * HIDDEN * INNER  # two experts a token, three matrices
    name = "model.layers.0.mlp.experts.down_proj"
    mask = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
    mask[:, :, : INNER // 2] = False
    cost = measure_cost(model, tokens, {name: mask})
    assert cost.macs - cost.effective_macs == macs // 6  # half of a third
    assert cost.parameters - cost.nonzero == mask.numel() // 2


# other methods on the same weights


def test_methods_that_rank_single_weights_take_experts_along():
    model = mixtral().float()
    for method in ("global-mp", "one-shot", "dimap"):
        outcome = sc.prune(model, method, "sparsity=0.5", text_task(model), recover=False)
        assert sum("experts" in name for name in outcome.masks) == 4
        assert outcome.masks.sparsity == pytest.approx(0.5, abs=1e-3)
    outcome = sc.prune(model, "one-shot", "2:4", text_task(model), recover=False)
    assert not any("experts" in name for name in outcome.masks)
    assert any("experts have patterns with magnitude only" in note for note in outcome.notes)


def test_ecoflap_and_perp_prune_experts():
    model = mixtral("grouped_mm").float()
    task = text_task(model)
    shared = {"samples": 16, "batch": 4}
    options = {"score_samples": 8, "score_batch": 4}
    spread = sc.prune(model, "ecoflap", "sparsity=0.5", task, **shared, **options)
    turned = sc.prune(
        model, "perp", "2:4", task, pruner="wanda", pruner_options={"samples": 16},
        mode="reconstruct", steps=3, **shared,
    )  # fmt: skip
    for outcome in (spread, turned):
        assert outcome.masks.sparsity == pytest.approx(0.5, abs=1e-3)
        for name, mask in outcome.masks.items():
            assert not outcome.model.get_parameter(name)[~mask].any()
        assert sum("experts" in name for name in outcome.masks) == 4


# and without experts all is as it was


def test_a_model_without_experts_gives_what_its_layers_moments_give():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {n: v for n, v in SIZES.items() if "expert" not in n}
    model = drawn(LlamaForCausalLM(LlamaConfig(**sizes))).double()
    chosen = create("wanda", {})
    _, masks, notes = pruned(model, "wanda", "sparsity=0.5")
    again = copy.deepcopy(model)
    assert not notes
    for visit in walk(again, BATCHES):
        for name, moments in visit.moments(visit.layers, products=False).items():
            weight = again.get_submodule(name).weight
            removal = Removal(weight.numel() // 2, Unstructured())
            made = chosen.prune_layer(weight[None], removal, moments)
            assert torch.equal(made.mask[0], masks.pop(f"{name}.weight"))
            with torch.no_grad():
                weight.copy_(made.weight[0])
    assert not masks
