"""LoRA of peft: taken out of its model, pruned by LoRAPrune, made small by DAREx."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.channels.loraprune import LoRAPrune, adapted_layers
from secateurs.parts.deltas import low_rank_delta
from secateurs.parts.prunable import prunable_parameters
from secateurs.training.adapters import wrap
from secateurs.training.peft_adapters import detach, merged

peft = pytest.importorskip("peft")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENDS = {"protect_first": 0.0, "protect_last": 0}


def llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def adapted(model, drawn=True, **config):
    """A peft model on a copy, its B drawn too."""
    fields = {"r": 3, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": ALL} | config
    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**fields)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if drawn and "lora_B" in name:
                parameter.normal_(0, 0.05)
    return made


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(2)
    tokens = torch.randint(40, (32, 9))
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 8)
    settings = sc.TrainSettings(steps=6)
    return sc.language_modelling(llama, loader, loader, finetuning=settings, training=settings)


TOKENS = torch.arange(16).view(2, 8)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_what_is_taken_out_is_what_peft_computed():
    model = adapted(llama(), use_rslora=True, rank_pattern={"up_proj": 2})
    wanted = logits(model)
    copied = merged(model)
    torch.testing.assert_close(logits(copied), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), wanted)  # itself it is as it was
    inner, found = detach(model)
    assert inner is model.get_base_model()
    assert not any("peft" in type(m).__module__ for m in inner.modules())
    assert all(p.requires_grad for p in inner.parameters())
    assert len(found) == 14
    lora = found["model.layers.1.mlp.up_proj"]
    assert (lora.rank, lora.scale) == (2, pytest.approx(12 / 2**0.5))
    assert detach(inner) == (inner, {})


def test_loraprune_trains_and_prunes_the_adapters_that_are_there(task):
    """With A as our own is drawn and B zero it is plain LoRAPrune, to the bit."""
    model = llama()
    options = {**ENDS, "lr": 1e-2, "dropout": 0.0}
    plain = sc.prune(model, "loraprune", "params=0.8", task, rank=3, alpha=12.0, **options)
    given = adapted(model, drawn=False)
    ours = copy.deepcopy(model)
    made = wrap(ours, adapted_layers(ours), "lora", 3, 12.0)
    with torch.no_grad():
        for name, layer in made.items():
            given.get_base_model().get_submodule(name).lora_A.default.weight.copy_(layer.down)
    outcome = sc.prune(given, "loraprune", "params=0.8", task, **options)
    assert "LoRA of peft on 14 layers was trained on and merged" in outcome.notes
    assert type(outcome.model) is type(model)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, outcome.model.state_dict()[name]), name
    assert outcome.before.parameters == plain.before.parameters
    assert outcome.before.parameters > outcome.after.parameters
    assert any("lora_A" in n for n, _ in given.named_parameters())  # a copy was pruned


def test_without_updates_and_removal_it_is_the_merged_model(task):
    given = adapted(llama(), target_modules=["q_proj", "v_proj"])
    outcome = sc.prune(given, "loraprune", "params=1", task, steps=0, **ENDS)
    wanted = copy.deepcopy(given).merge_and_unload().state_dict()
    for name, tensor in outcome.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)


def test_what_the_user_did_not_adapt_is_not_looked_at(task):
    given = adapted(llama(), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    outcome = sc.prune(given, "loraprune", "params=0.9", task, lr=1e-2, **ENDS)
    for layer, before in zip(outcome.model.model.layers, llama().model.layers, strict=True):
        assert layer.self_attn.k_proj.out_features == 4
        assert torch.equal(layer.mlp.up_proj.weight, before.mlp.up_proj.weight)
    assert outcome.history[0]["loss"] == pytest.approx(outcome.metrics_after["loss"], rel=1e-4)


def test_in_place_an_error_gives_the_peft_model_back(task):
    given = adapted(llama())
    wanted = logits(given)
    with pytest.raises(InputError, match="budget"):
        sc.prune(given, "loraprune", "params=0.01", task, inplace=True, **ENDS)
    assert torch.equal(logits(given), wanted)


@pytest.mark.parametrize(
    ("config", "told"),
    [({"use_dora": True}, "variant"), ({"lora_bias": True}, "bias"),
     ({"target_modules": ["embed_tokens", "q_proj"]}, "Embedding"),
     ({"modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper")],
)  # fmt: skip
def test_other_adapters_are_refused(config, told):
    model = llama()
    if "lora_bias" in config:
        for name, module in list(model.named_modules()):
            if name.endswith("proj"):
                module.bias = nn.Parameter(torch.zeros(module.out_features))
    given = adapted(model, **config)
    with pytest.raises(InputError, match=f"{told}.*accepted: one plain LoRA, active"):
        detach(given)


def test_two_merged_or_foreign_adapters_are_refused():
    given = adapted(llama())
    given.add_adapter("other", peft.LoraConfig(r=2, target_modules=ALL))
    given.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="active adapters default, other"):
        detach(copy.deepcopy(given))
    given.base_model.set_adapter("default")
    assert len(detach(copy.deepcopy(given))[1]) == 14
    given.merge_adapter()
    with pytest.raises(InputError, match="merged or switched off"):
        detach(given)
    with pytest.raises(InputError, match="LlamaForCausalLM without LoRA of peft.get_peft_model"):
        detach(adapted(llama()).get_base_model())


@pytest.mark.parametrize("method", ["wanda", "cfsp", "perp", "spa", "gmp", "lottery-ticket"])
def test_other_methods_refuse_a_peft_model(task, method):
    budget = "params=0.9" if method in ("cfsp", "spa") else "sparsity=0.5"
    given = adapted(llama())
    told = r"model: got peft's PeftModel; .* merge_and_unload\(\) first"
    with pytest.raises(InputError, match=told):
        sc.prune(given, method, budget, task)
    with pytest.raises(InputError, match=r"peft's Linear at model.layers.0.self_attn.q_proj"):
        prunable_parameters(given.get_base_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_darex_takes_the_delta_of_the_adapters_exactly(task, dtype):
    model = llama(dtype)
    given = adapted(model)
    outcome = sc.prune(given, "darex", "sparsity=0.5", task, base=model, q="dare", store="float32")
    assert len(outcome.delta.entries) == 14
    for name, entry in outcome.delta.entries.items():
        layer = given.get_base_model().get_submodule(name.removesuffix(".weight"))
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        delta = low_rank_delta(a.detach(), b.detach(), 4.0)
        assert torch.equal(entry.values, delta[entry.mask] / 0.5)
        base = model.get_parameter(name).detach()
        wanted = (base.float() + delta * entry.mask / 0.5).to(dtype)
        assert torch.equal(outcome.model.get_parameter(name), wanted)
    nothing = sc.prune(given, "darex", "sparsity=0", task, base=model, q="dare")
    tight = dtype == torch.float32
    close = {"rtol": 1e-4, "atol": 1e-5} if tight else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(logits(nothing.model), logits(given), **close)
    with pytest.raises(InputError, match="base: got peft's PeftModel"):
        sc.prune(model, "darex", "sparsity=0.5", task, base=given)


def test_adapters_begin_where_others_are():
    model = llama()
    _, found = detach(adapted(model))
    assert LoRAPrune.takes_adapters
    for name, lora in found.items():
        layer = model.get_submodule(name)
        assert torch.equal(lora.delta(layer), lora.scale * lora.up @ lora.down)
