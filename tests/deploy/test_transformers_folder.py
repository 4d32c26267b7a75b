"""Shortened transformers models load with plain `from_pretrained`."""

import copy
import dataclasses

import pytest
import torch

import secateurs as sc
from secateurs.deploy.transformers_folder import save_pretrained
from secateurs.errors import InputError
from secateurs.task import Metric, Task

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 40, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
INPUTS = {"input_ids": torch.arange(12)[None]}


def task_of(model):
    return Task(
        model=model, train=None, evaluate=[(INPUTS, torch.zeros(1))],
        loss=lambda output, target: output.logits.square().mean(),
        metrics={"size": Metric(lambda output, target: output.logits.abs().mean((1, 2)))},
        example_inputs=INPUTS, primary="size",
    )  # fmt: skip


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()


@pytest.mark.parametrize("roles", [["neuron"], ["head"], ["neuron", "head"]])
def test_a_llama_loads_again_with_from_pretrained(tmp_path, roles):
    model = llama()
    outcome = sc.prune(model, "spa", "params=0.8", task_of(model), roles=roles, scope="local")
    save_pretrained(outcome, tmp_path / "llama", INPUTS)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert sum(p.numel() for p in read.parameters()) < 0.81 * sum(
        p.numel() for p in model.parameters()
    )
    with torch.no_grad():
        assert torch.allclose(read(**INPUTS).logits, outcome.model(**INPUTS).logits, atol=1e-6)


def test_shapes_that_no_configuration_expresses_are_refused(tmp_path):
    model = llama()
    outcome = sc.prune(model, "spa", "params=0.8", task_of(model), roles=["neuron"])
    kept = {len(units) for units in outcome.surgery[0]["axes"].values()}
    assert len(kept) > 1, "layers of one size: nothing to refuse"
    with pytest.raises(InputError, match="cannot express .*scope=local"):
        save_pretrained(outcome, tmp_path / "llama", INPUTS)
    assert not (tmp_path / "llama").exists()


def test_other_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="a transformers model"):
        save_pretrained(sc.Outcome(torch.nn.Linear(2, 2)), tmp_path / "out", INPUTS)


def test_the_configurations_inside_one_are_tried_too(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(
        **sizes, intermediate_size=56, image_size=16, patch_size=8
    )
    text = transformers.LlamaConfig(
        **sizes, intermediate_size=64, vocab_size=100, num_key_value_heads=2
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=99, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.arange(3, 15)[None].clone()
    ids[:, 2:6] = 99
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    task = dataclasses.replace(
        task_of(model), evaluate=[(inputs, torch.zeros(1))], example_inputs=inputs
    )
    options = {"roles": ["neuron"], "scope": "local", "recover": False}
    narrow = sc.prune(copy.deepcopy(model), "spa", "params=0.9", task, **options)
    # no number is for the width of the projector
    with pytest.raises(InputError, match=r"multi_modal_projector\.linear_1\.weight has \(25, 32\)"):
        save_pretrained(narrow, tmp_path / "llava", inputs)
    outcome = sc.prune(model, "spa", "params=0.9", task, **options, exclude=["projector"])
    save_pretrained(outcome, tmp_path / "llava", inputs)
    read = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    assert read.config.vision_config.intermediate_size < 56
    assert read.config.text_config.intermediate_size < 64
    with torch.no_grad():
        wanted = outcome.model(**inputs).logits
        assert torch.allclose(read.eval()(**inputs).logits, wanted, atol=1e-6)


def test_of_an_encoder_of_sentences_the_model_in_it_is_written(tmp_path):
    from secateurs.zoo.pretrained import SentenceEncoder

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    bert = transformers.BertModel(
        transformers.BertConfig(**sizes, vocab_size=100, num_attention_heads=4),
        add_pooling_layer=False,
    )
    model = SentenceEncoder(bert).eval()
    inputs = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12).long()}
    task = Task(
        model=model, train=None, evaluate=[(inputs, torch.zeros(1))],
        loss=lambda output, target: output.square().mean(),
        metrics={"size": Metric(lambda output, target: output.abs().mean(1))},
        example_inputs=inputs, primary="size",
    )  # fmt: skip
    outcome = sc.prune(
        model, "spa", "params=0.9", task, roles=["neuron"], scope="local", recover=False
    )
    save_pretrained(outcome, tmp_path / "bert", inputs)
    read = transformers.BertModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False)
    assert read.config.intermediate_size < 64
    with torch.no_grad():
        again = SentenceEncoder(read).eval()(**inputs)
        assert torch.allclose(again, outcome.model(**inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options", "advice"),
    [
        ("spa", {"scope": "global"}, r"one size for all layers \(scope=local\)"),
        ("cfsp", {}, r"one size for all layers \(metric=constant\)"),
        ("loraprune", {"protect_first": 0.1, "protect_last": 1}, r"\(protect_first=0 protect_la"),
        ("other", {}, r"one size for all layers of the axes"),
    ],
)
def test_the_refusal_names_options_that_the_method_has(tmp_path, method, options, advice):
    model = llama()
    outcome = sc.prune(model, "spa", "params=0.8", task_of(model), roles=["neuron"], recover=False)
    outcome.method, outcome.options = method, options
    with pytest.raises(InputError, match=advice):
        save_pretrained(outcome, tmp_path / "llama", INPUTS)
