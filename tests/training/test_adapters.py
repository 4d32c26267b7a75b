"""Adapters: where they start, what they compute, what merging leaves, against plain formulas."""

import copy
import os

import pytest
import torch
from torch import nn

from secateurs.errors import InputError
from secateurs.training.adapters import (
    AdaptedLayer,
    adapters,
    frozen,
    matrix_of,
    merge,
    obstacles,
    save_adapters,
    unwrap,
    wrap,
)

os.environ["HF_HUB_OFFLINE"] = "1"
KINDS = ("lora", "lora-prune", "mask-lora", "scale-lora")
SPARSE = ("mask-lora", "scale-lora")


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 8)


LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "without bias": (lambda: nn.Linear(8, 6, bias=False), (2, 3, 8)),
    "Conv1D": (conv1d, (2, 3, 8)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
}


def pruned(layer, dtype=torch.float32):
    """A model of one layer, half of it pruned, and its masks."""
    torch.manual_seed(0)
    model = nn.Sequential(layer()).to(dtype)
    mask = torch.rand(model[0].weight.shape) < 0.5
    with torch.no_grad():
        model[0].weight.mul_(mask)
    return model, {"0.weight": mask}


def stir(model, seed=1):
    """Adapters as a training may leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model).values():
            for parameter in (adapter.down, adapter.up):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.3 * noise)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_before_training_a_layer_computes_what_it_did(name, kind):
    layer, shape = LAYERS[name]
    model, masks = pruned(layer)
    x = torch.randn(shape)
    before = model(x)
    wrap(model, ["0"], kind, rank=3, masks=masks)
    tolerance = 1e-6 if kind == "scale-lora" else 0.0
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("name", LAYERS)
def test_merging_changes_neither_the_function_nor_the_zeros(name, kind):
    layer, shape = LAYERS[name]
    model, masks = pruned(layer)
    keys, x = list(model.state_dict()), torch.randn(shape)
    kinds, start = [type(m) for m in model.modules()], model(x)
    wrap(model, ["0"], kind, rank=3, masks=masks)
    stir(model)
    before = model(x)
    assert not torch.allclose(before, start, atol=1e-2)
    merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds


def test_lora_prune_trains_densely_and_is_masked_when_merged():
    model, masks = pruned(lambda: nn.Linear(8, 6), torch.float64)
    weight, mask = model[0].weight.detach().clone(), masks["0.weight"]
    [adapter] = wrap(model, ["0"], "lora-prune", 3, 6.0, masks=masks).values()
    stir(model)
    product = 2.0 * adapter.up.detach() @ adapter.down.detach()
    x = torch.randn(4, 8, dtype=torch.float64)
    dense = x @ (weight + product).T + model[0].bias
    torch.testing.assert_close(model(x), dense)
    merge(model)
    torch.testing.assert_close(model[0].weight.detach(), weight + product * mask)


def test_a_plain_adapter_is_not_merged_into_a_pruned_weight():
    model, masks = pruned(lambda: nn.Linear(8, 6))
    before = copy.deepcopy(model.state_dict())
    wrap(model, ["0"], "lora", 3, masks=masks)
    stir(model)
    with pytest.raises(InputError, match="kind: got 'lora'; accepted: lora-prune, mask-lora"):
        merge(model)
    unwrap(model)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mask-lora", [[2.5, 0.0], [0.0, 3.5]]),
        ("scale-lora", [[2.0, 0.0], [0.0, 3.0]]),
        ("lora", [[2.5, 0.5], [0.5, 3.5]]),
    ],
)
def test_effective_weights_by_hand(kind, expected):
    """The card's third check: W = diag(2, 3), B A all ones, s = 0.5."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    adapter = AdaptedLayer(layer, kind, rank=1, alpha=0.5, mask=torch.eye(2).bool())
    with torch.no_grad():
        adapter.up.fill_(1.0)
        adapter.down.fill_(1.0)
    assert adapter.effective_weight().tolist() == expected


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_the_masked_kind_in_closed_form(recompute):
    """dB = s (G * M) Aᵀ and dA = s Bᵀ (G * M) with G = dL/dW_eff; nothing at a pruned input."""
    model, masks = pruned(lambda: nn.Linear(5, 4), torch.float64)
    mask = masks["0.weight"]
    mask[:, 2] = False
    with torch.no_grad():
        model[0].weight.mul_(mask)
    wrap(model, ["0"], "mask-lora", 3, 6.0, masks=masks, recompute=recompute)
    stir(model)
    adapter, x = model[0], torch.randn(7, 5, dtype=torch.float64)
    torch.sin(model(x)).sum().backward()
    weight = (adapter.base.weight + 2.0 * (adapter.up @ adapter.down) * mask).detach()
    weight.requires_grad_(True)
    torch.sin(x @ weight.T + adapter.base.bias).sum().backward()
    grad = weight.grad * mask
    torch.testing.assert_close(adapter.up.grad, 2.0 * grad @ adapter.down.T)
    torch.testing.assert_close(adapter.down.grad, 2.0 * adapter.up.T @ grad)
    assert not adapter.down.grad[:, 2].any()
    assert adapter.base.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_numerically(kind):
    model, masks = pruned(lambda: nn.Linear(4, 3), torch.float64)
    wrap(model, ["0"], kind, 2, masks=masks)
    stir(model)
    x = torch.randn(2, 4, dtype=torch.float64)

    def of(down, up):
        parameters = {"0.down": down, "0.up": up}
        return torch.func.functional_call(model, parameters, (x,))

    factors = [p.detach().clone().requires_grad_(True) for p in (model[0].down, model[0].up)]
    assert torch.autograd.gradcheck(of, factors)


def test_scale_lora_starts_with_a_product_of_ones():
    adapter = AdaptedLayer(nn.Linear(7, 5), "scale-lora", rank=4)
    assert bool((adapter.down == 0.5).all())
    assert bool((adapter.up == 0.5).all())
    assert bool((adapter.up @ adapter.down == 1).all())


def test_a_kept_weight_that_is_zero_trains_and_a_removed_one_does_not():
    """The mask is what was given, not W != 0."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
    wrap(model, ["0"], "mask-lora", 2, masks={"0.weight": torch.tensor([[True, False]])})
    stir(model)
    merge(model)
    assert model[0].weight[0, 0] != 0
    assert model[0].weight[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SPARSE)
def test_half_precision_is_summed_in_float32_and_rounded_once(kind, dtype):
    model, masks = pruned(lambda: nn.Linear(32, 16), dtype)
    weight = model[0].weight.detach().float()
    wrap(model, ["0"], kind, 4, masks=masks)
    stir(model)
    adapter = model[0]
    assert adapter.down.dtype == adapter.up.dtype == torch.float32
    product = adapter.up.detach() @ adapter.down.detach()
    whole = weight * product if kind == "scale-lora" else weight + 8.0 * product
    x = torch.randn(3, 32).to(dtype)
    before = model(x)
    merge(model)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight.detach(), (whole * masks["0.weight"]).to(dtype))
    assert torch.equal(model(x), before)


def test_under_autocast_the_product_is_not_rounded():
    model, masks = pruned(lambda: nn.Linear(32, 16))
    wrap(model, ["0"], "mask-lora", 4, masks=masks)
    stir(model)
    exact = model[0].effective_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model[0].effective_weight(), exact)
        assert model(torch.randn(2, 32)).dtype == torch.bfloat16


def test_a_mask_of_outputs_zeroes_them_with_their_bias():
    model = nn.Sequential(nn.Linear(8, 6))
    [adapter] = wrap(model, ["0"], "lora", 2, outputs=True).values()
    stir(model)
    x = torch.randn(5, 8)
    whole = model(x)
    adapter.outputs[[1, 4]] = 0
    left = model(x)
    assert not left[:, [1, 4]].any()
    assert torch.equal(left[:, [0, 2, 3, 5]], whole[:, [0, 2, 3, 5]])
    assert "0.outputs" in model.state_dict()


def test_dropout_is_of_the_adapter_alone_and_in_training_alone():
    model = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(5, 8)
    plain = model(x)
    wrap(model, ["0"], "lora", 2, dropout=0.5)
    assert torch.equal(model(x), plain)
    stir(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert not model[0].base.training


def test_ranks_by_name_and_draws_by_seed():
    def made(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
        before = torch.get_rng_state()
        found = wrap(model, ["2", "0"], "lora", {"0": 2, "2": 5}, alpha=10.0, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return found

    one, same, other = made(0), made(0), made(1)
    assert {n: a.rank for n, a in one.items()} == {"2": 5, "0": 2}
    assert {n: a.scale for n, a in one.items()} == {"2": 2.0, "0": 5.0}
    for name in one:
        assert torch.equal(one[name].down, same[name].down)
        assert not torch.equal(one[name].down, other[name].down)
        assert one[name].down.abs().max() <= one[name].down.shape[1] ** -0.5
        assert not one[name].up.any()


def test_a_layer_in_two_places_has_one_adapter():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    wrap(model, ["0"], "lora", 2)
    assert model[0] is model[2]
    assert isinstance(model[0], AdaptedLayer)
    assert len(adapters(model)) == 1
    stir(model)
    x = torch.randn(3, 4)
    before = model(x)
    merge(model)
    assert model[0] is model[2] is layer
    torch.testing.assert_close(model(x), before)


def test_code_that_reads_the_weight_gets_the_effective_one():
    """Attention of torch takes the weight of its output layer by itself."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    x = torch.randn(2, 3, 8)
    wrap(model, ["attention.out_proj"], "mask-lora", 2)
    stir(model)
    before = model["attention"](x, x, x)[0]
    assert model["attention"].out_proj.in_features == 8
    merge(model)
    torch.testing.assert_close(model["attention"](x, x, x)[0], before)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight


def test_a_tied_weight_is_refused_because_merging_would_change_the_other():
    model = Tied()
    assert obstacles(model, ["head"]) == {"head": "a weight shared with table"}
    with pytest.raises(InputError, match="names head: got a weight shared with table"):
        wrap(model, ["head"])
    assert isinstance(model.head, nn.Linear)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["1"], {}, "names 1: got a ReLU"),
        (["7"], {}, "names: got '7'"),
        ([""], {}, "names: got ''"),
        (["0"], {"rank": 0}, "rank: got 0"),
        (["0"], {"rank": {"2": 4}}, "rank: got none for 0"),
        (["0"], {"alpha": 0.0}, "alpha"),
        (["0"], {"kind": "masked"}, "kind: got 'masked'"),
        (["0"], {"kind": "lora", "dropout": 1.0}, "dropout"),
        (["0"], {"dropout": 0.1}, "dropout: got 0.1; accepted: 0 for mask-lora"),
        (["0"], {"masks": {"0.weight": torch.ones(3, 3, dtype=torch.bool)}}, "masks 0.weight"),
        (["2"], {"kind": "lora", "outputs": True}, "a linear layer"),
    ],
)
def test_what_cannot_be_is_refused_and_the_model_left_as_it_was(names, options, message):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Conv1d(6, 4, 1))
    with pytest.raises(InputError, match=message):
        wrap(model, names, **options)
    assert not adapters(model)


def test_an_error_while_adapters_are_in_takes_them_out():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    model[1].weight.requires_grad_(False)

    def failing():
        with frozen(model):
            assert not any(p.requires_grad for p in model.parameters())
            wrap(model, ["0"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not adapters(model)
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    assert trains == {"0.weight": True, "0.bias": True, "1.weight": False, "1.bias": True}


def tiny_gpt():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [tiny_gpt, tiny_llama])
def test_plain_adapters_are_kept_as_peft_reads_them(make, tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    blocks = ("transformer.h.", "model.layers.")
    names = [n.removesuffix(".weight") for n, p in model.named_parameters()
             if n.startswith(blocks) and p.ndim == 2]  # fmt: skip
    ranks = {n: 2 + i % 3 for i, n in enumerate(names)}
    wrap(model, names, "lora", ranks, alpha=6.0, dropout=0.1)
    model.eval()
    stir(model)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(tokens).logits
    save_adapters(adapters(model), tmp_path / "adapters")
    unwrap(model)
    with torch.no_grad():
        assert not torch.allclose(model(tokens).logits, expected, atol=1e-3)
        read = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapters")).eval()
        torch.testing.assert_close(read(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_other_kinds_are_not_what_peft_has(tmp_path):
    model = nn.Sequential(nn.Linear(8, 6))
    wrap(model, ["0"], "mask-lora")
    with pytest.raises(InputError, match="adapter 0: got 'mask-lora'"):
        save_adapters(adapters(model), tmp_path / "adapters")
    assert not (tmp_path / "adapters").exists()


def test_a_convolutions_matrix_is_its_rows():
    layer = nn.Conv2d(4, 6, 3, groups=2)
    assert torch.equal(matrix_of(layer), layer.weight.flatten(1))
    transposed = conv1d()
    assert torch.equal(matrix_of(transposed), transposed.weight.t())
