"""Shortened transformers models load with plain `from_pretrained`."""

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
