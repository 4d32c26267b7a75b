"""From disk to disk: what comes out is what the same method makes in memory, byte for byte."""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateurs as sc
from secateurs.calibration import shards
from secateurs.calibration.blocks import find_blocks, owner_of
from secateurs.calibration.layerwise import UNREACHED
from secateurs.calibration.moments import outputs_first
from secateurs.calibration.prune_checkpoint import fingerprint
from secateurs.calibration.shards import INDEX
from secateurs.errors import InputError
from secateurs.registry import create

BATCHES = [
    torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(i)) for i in (1, 2)
]


def small_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


@pytest.fixture
def dense(tmp_path):
    small_llama().save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    return tmp_path / "dense"


def reread(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("method", "budget"),
    [("magnitude", "sparsity=0.5"), ("wanda", "2:4"), ("sparsegpt", "sparsity=0.6")],
)
def test_it_is_what_the_method_makes_in_memory_and_from_pretrained_reads_it(
    dense, tmp_path, method, budget
):
    told = sc.prune_checkpoint(dense, tmp_path / "out", method, budget, BATCHES)
    chosen, model = create(method, {}), small_llama()
    removals, _ = chosen.removals(chosen.prunable(model), chosen.accept(budget))
    masks, _ = chosen.apply(model, removals, BATCHES)
    read = reread(tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, read[name]), name
    assert {e["name"]: e["kept"] for e in told["layers"]} == {
        n: int(m.sum()) for n, m in masks.items()
    }
    assert told["sparsity"] == pytest.approx(0.6 if method == "sparsegpt" else 0.5, abs=1e-4)
    assert json.loads((tmp_path / "out" / "secateurs.json").read_text()) == told
    assert sc.prune_checkpoint(dense, tmp_path / "out", method, budget, BATCHES) == told


def test_tied_embeddings_stand_in_the_files_once(tmp_path):
    small_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", "wanda", "2:4", BATCHES)
    read = reread(tmp_path / "out")
    assert read.lm_head.weight is read.model.embed_tokens.weight
    dense = reread(tmp_path / "dense")
    assert torch.equal(read.lm_head.weight, dense.lm_head.weight)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PICTURES = {**SIZES, "image_size": 16, "patch_size": 8}
WORDS = {**SIZES, "vocab_size": 100}


def tiny(name):
    """A model of every way in which files name tensors, and a batch of it."""
    import transformers as tf

    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 12), generator=drawn)
    pixels = torch.randn(2, 3, 16, 16, generator=drawn)
    both = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    torch.manual_seed(0)
    if name == "T5":
        sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
        return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, num_layers=2)), both
    if name == "GPT-2":
        sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)), {"input_ids": ids}
    if name == "GPT-NeoX":
        return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**WORDS)), {"input_ids": ids}
    if name == "BERT":
        return tf.BertForMaskedLM(tf.BertConfig(**WORDS)), {"input_ids": ids}
    if name == "ViT":
        return tf.ViTForImageClassification(tf.ViTConfig(**PICTURES)), {"pixel_values": pixels}
    if name == "Swin":
        sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "window_size": 4}
        config = tf.SwinConfig(**sizes, depths=[2, 2], num_heads=[2, 2])
        return tf.SwinForImageClassification(config), {"pixel_values": pixels}
    if name == "CLIP":
        text = {**WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = tf.CLIPConfig(text_config=text, vision_config=PICTURES)
        return tf.CLIPModel(config), {"input_ids": ids, "pixel_values": pixels}
    if name == "DETR":
        resnet = tf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
        )
        side = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
        sides = {f"{s}_{key}": n for s in ("encoder", "decoder") for key, n in side.items()}
        config = tf.DetrConfig(backbone_config=resnet, d_model=32, num_queries=5, **sides)
        return tf.DetrForObjectDetection(config), {"pixel_values": pixels}
    text = tf.LlamaConfig(**WORDS, num_key_value_heads=2)
    if name == "Llama":
        return tf.LlamaForCausalLM(text), {"input_ids": ids}
    if name == "LLaVA":
        config = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**PICTURES), text_config=text,
            image_token_index=99, vision_feature_layer=-1,
        )  # fmt: skip
        ids[:, 2:6] = 99
        inputs = {"input_ids": ids, "pixel_values": pixels}
        return tf.LlavaForConditionalGeneration(config), inputs
    assert name == "Qwen2-VL"
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text = {**WORDS, "num_key_value_heads": 2, "rope_scaling": rope}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    sizes = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tokens = {"image_token_id": 99, "vision_start_token_id": 97, "vision_end_token_id": 96}
    config = tf.Qwen2VLConfig(text_config=text, vision_config={**vision, **sizes}, **tokens)
    ids[:, 1], ids[:, 2:6] = 97, 99
    patches = torch.randn(2 * 16, 3 * 2 * 16, generator=drawn)
    inputs = {"input_ids": ids, "pixel_values": patches, "mm_token_type_ids": (ids == 99).long()}
    grid = torch.tensor([[1, 4, 4]] * 2)
    return tf.Qwen2VLForConditionalGeneration(config), {**inputs, "image_grid_thw": grid}


def pruned_in_memory(model, batches, method, budget, **options):
    chosen = create(method, options)
    params = outputs_first(model, chosen.prunable(model))
    removals, _ = chosen.removals(params, chosen.accept(budget))
    chosen.apply(model, removals, batches)
    return model.state_dict()


def names_in(folder):
    return {n for file in folder.glob("*.safetensors") for n in load_file(file)}


@pytest.mark.parametrize(
    "name",
    ["Llama", "T5", "BERT", "GPT-2", "GPT-NeoX", "ViT", "Swin", "CLIP", "LLaVA", "Qwen2-VL",
     "DETR"],
)  # fmt: skip
def test_every_architecture_goes_the_same_way(tmp_path, name):
    """Under the names that transformers gives tensors in files, which are not always its own."""
    model, inputs = tiny(name)
    model.eval().save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    out = tmp_path / "out"
    sc.prune_checkpoint(tmp_path / "dense", out, "wanda", "sparsity=0.5", [inputs])
    wanted = pruned_in_memory(model, [inputs], "wanda", "sparsity=0.5")
    read, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(t, read.state_dict()[n]) for n, t in wanted.items())
    assert names_in(out) == names_in(tmp_path / "dense")


def test_names_of_older_files_stay_and_what_no_model_reads_is_carried_over(tmp_path):
    """Files of a bare GPT-2 with its masks, read by the model with a head; BERT's gamma."""
    model, inputs = tiny("GPT-2")
    model.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    mask = torch.ones(1, 1, 32, 32).tril()
    tensors |= {"h.0.attn.bias": mask, "h.1.attn.bias": mask.clone()}
    save_file(tensors, file, {"format": "pt"})
    out = tmp_path / "out"
    sc.prune_checkpoint(tmp_path / "dense", out, "wanda", "2:4", [inputs])
    wanted = pruned_in_memory(model.eval(), [inputs], "wanda", "2:4")
    read = type(model).from_pretrained(out).state_dict()
    assert all(torch.equal(t, read[n]) for n, t in wanted.items())
    assert names_in(out) == set(tensors)

    model, inputs = tiny("BERT")
    model.save_pretrained(tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(file)
    for new, former in old.items():
        tensors = {n.replace(new, former): t for n, t in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    sc.prune_checkpoint(tmp_path / "bert", tmp_path / "older", "magnitude", "2:4")
    assert names_in(tmp_path / "older") == set(tensors)


def mixture(name):
    """Twelve experts, so that their numbers do not sort as words do."""
    import transformers

    sizes = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_local_experts": 12, "num_experts_per_tok": 2}
    more = {"moe_intermediate_size": 24} if name == "Qwen3Moe" else {}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **experts, **more)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss"])
@pytest.mark.parametrize(
    ("method", "budget"),
    [("magnitude", "2:4"), ("wanda", "sparsity=0.5"), ("sparsegpt", "2:4")],
)
def test_experts_come_back_under_the_names_under_which_they_were(tmp_path, name, method, budget):
    """One by one in the files of Mixtral and Qwen3-MoE, as one array in GPT-OSS's."""
    model, out = mixture(name), tmp_path / "out"
    model.save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    told = sc.prune_checkpoint(tmp_path / "dense", out, method, budget, BATCHES)
    chosen = create(method, {})
    params = outputs_first(model, chosen.prunable(model))
    removals, _ = chosen.removals(params, chosen.accept(budget))
    masks, notes = chosen.apply(model, removals, BATCHES)
    read = reread(out).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, read[key]), key
    assert told["notes"] == notes
    assert told["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert {e["name"]: (e["kept"], e["total"]) for e in told["layers"]} == {
        n: (int(m.sum()), m.numel()) for n, m in masks.items()
    }
    names = [
        set(json.loads((folder / INDEX).read_text())["weight_map"])
        for folder in (tmp_path / "dense", out)
    ]
    assert names[0] == names[1]
    assert any(".11." in n for n in names[0]) == (name != "GptOss")


def test_experts_that_are_one_array_in_the_files_stay_so(tmp_path):
    model = mixture("Mixtral")
    model.save_pretrained(tmp_path / "dense", save_original_format=False)
    sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", "magnitude", "2:4")
    placed = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert set(placed) == set(load_file(tmp_path / "dense" / "model.safetensors"))
    assert set(placed) == set(model.state_dict())
    down = reread(tmp_path / "out").model.layers[1].mlp.experts.down_proj
    assert bool(((down != 0).unflatten(2, (-1, 4)).sum(-1) == 2).all())


@pytest.mark.slow
def test_experts_go_on_where_a_run_died(tmp_path, monkeypatch):
    mixture("Mixtral").save_pretrained(tmp_path / "dense")
    arguments = ("wanda", "2:4", BATCHES)
    sc.prune_checkpoint(tmp_path / "dense", tmp_path / "whole", *arguments)
    write = shards.write_shard

    def fail_at_the_second(path, tensors):
        if "00002-of" in path.name:
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(shards, "write_shard", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        sc.prune_checkpoint(tmp_path / "dense", tmp_path / "died", *arguments)
    monkeypatch.undo()
    assert len(list((tmp_path / "died").glob("model-block*"))) == 1
    sc.prune_checkpoint(tmp_path / "dense", tmp_path / "died", *arguments)
    assert hashes(tmp_path / "died") == hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, n: t.pop(n),
            r"checkpoint model\.layers\.1.*gate_up_proj: got 23 tensors, .* do not fit",
        ),
        (lambda t, n: t.update({"odd": t.pop(n)}), r"checkpoint: got 'odd'; accepted: tensors"),
        (lambda t, n: t.update({n: t[n][:-1]}), r"gate_up_proj: got 24 tensors.* do not fit"),
    ],
)
def test_experts_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    mixture("Mixtral").save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    change(tensors, "model.layers.1.block_sparse_moe.experts.3.w1.weight")
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=message):
        sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", "wanda", "2:4", BATCHES)
    assert not (tmp_path / "out").exists()


WORKER = """
import sys
from pathlib import Path

import torch

import secateurs as sc
from secateurs.calibration import shards

slow = shards.write_shard


def write(path, tensors):
    print(path.name, flush=True)
    sys.stdin.readline()
    slow(path, tensors)


shards.write_shard = write
batches = [torch.tensor(b) for b in {batches}]
sc.prune_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), "wanda", "2:4", batches)
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "shards_before",
    [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)],
)
def test_killed_at_any_block_it_goes_on_and_writes_the_same_bytes(dense, tmp_path, shards_before):
    sc.prune_checkpoint(dense, tmp_path / "whole", "wanda", "2:4", BATCHES)
    script = WORKER.format(batches=[b.tolist() for b in BATCHES])
    with subprocess.Popen(
        [sys.executable, "-c", script, str(dense), str(tmp_path / "killed")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        for number in range(shards_before + 1):
            assert process.stdout.readline(), "it ended before it was killed"
            if number < shards_before:
                process.stdin.write("\n")
                process.stdin.flush()
        time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("model-block*")}
    assert len(finished) == min(shards_before, 3)
    assert not (tmp_path / "killed" / INDEX).exists()
    sc.prune_checkpoint(dense, tmp_path / "killed", "wanda", "2:4", BATCHES)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    for name, written in finished.items():
        assert (tmp_path / "killed" / name).stat().st_mtime_ns == written, "pruned twice"


def broken(dense, how):
    shard = sorted(dense.glob("model-*.safetensors"))[1]
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "not safetensors":
        shard.write_bytes(b"PK\x03\x04")
    else:
        tensors = load_file(shard)
        name = next(n for n in tensors if "proj" in n)
        if how == "nan":
            tensors[name][0, 0] = torch.nan
        if how == "shape":
            tensors[name] = tensors[name][:, :-1].contiguous()
        save_file(tensors, shard, {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"shard: got .*model-00002.*existing file"),
        ("truncated", r"bytes in .*model-00002.*as its header says"),
        ("not safetensors", r"model-00002.*a whole safetensors file"),
        ("nan", r"NaN in the weights"),
        ("shape", r"checkpoint .*proj.*shape"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(dense, tmp_path, how, message):
    broken(dense, how)
    with pytest.raises(InputError, match=message):
        sc.prune_checkpoint(dense, tmp_path / "out", "wanda", "2:4", BATCHES)
    assert not (tmp_path / "out" / INDEX).exists()


def test_what_it_is_not_made_for_is_refused(dense, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="layer-wise"):
        sc.prune_checkpoint(dense, out, "global-mp", "sparsity=0.5")
    with pytest.raises(InputError, match="batches"):
        sc.prune_checkpoint(dense, out, "wanda", "2:4")
    with pytest.raises(InputError, match="folder"):
        sc.prune_checkpoint(tmp_path, out, "wanda", "2:4", BATCHES)
    assert not out.exists()
    sc.prune_checkpoint(dense, out, "wanda", "2:4", BATCHES)
    with pytest.raises(InputError, match="output folder: got a run with budget 2:4"):
        sc.prune_checkpoint(dense, out, "wanda", "1:4", BATCHES)
    with pytest.raises(InputError, match="output folder: got a run with inputs"):
        sc.prune_checkpoint(dense, out, "wanda", "2:4", BATCHES[:1])


def test_the_command_line_does_the_same(dense, tmp_path):
    from click.testing import CliRunner

    from secateurs.cli import main

    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(90)) * 40)
    told = CliRunner().invoke(main, [
        "prune-shards", str(dense), "--data", f"text:{text}?block=16", "--method", "wanda",
        "--budget", "2:4", "--samples", "8", "--out", str(tmp_path / "out"), "--json",
    ])  # fmt: skip
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["sparsity"] == 0.5
    down = reread(tmp_path / "out").model.layers[2].mlp.down_proj.weight
    assert torch.equal((down.reshape(-1, 4) != 0).sum(1), torch.full((down.numel() // 4,), 2))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_the_model_does_not_take_leaves_no_folder_behind(tmp_path, dense, method):
    out = tmp_path / "out"
    pixels, beyond = torch.rand(2, 16), BATCHES[0] + 90
    if method == "magnitude":
        sc.prune_checkpoint(dense, out, method, "2:4", [pixels])  # it does not look at them
        return
    for wrong in ([pixels], [beyond], [BATCHES[0], beyond], [{"ids": BATCHES[0]}]):
        with pytest.raises(InputError, match=r"batches: got inputs on which LlamaForCausalLM fai"):
            sc.prune_checkpoint(dense, out, method, "2:4", wrong)
        assert not out.exists()
    sc.prune_checkpoint(dense, out, method, "2:4", BATCHES)


def test_what_a_later_tower_lacks_is_refused_before_the_first_is_pruned(tmp_path):
    model, inputs = tiny("CLIP")
    model.save_pretrained(tmp_path / "dense")
    text = {"input_ids": inputs["input_ids"]}
    with pytest.raises(InputError, match=r"inputs on which CLIPModel fails.*pixel_values"):
        sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", "wanda", "2:4", [text])
    assert not (tmp_path / "out").exists()


def test_a_run_that_stops_before_its_first_block_leaves_no_folder_behind(
    dense, tmp_path, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(create("wanda", {})), "prune_block", stop)
    with pytest.raises(KeyboardInterrupt):
        sc.prune_checkpoint(dense, tmp_path / "out", "wanda", "2:4", BATCHES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", [False, True])
def test_every_tensor_keeps_the_dtype_that_it_has_in_the_files(tmp_path, named):
    """bfloat16 with norms in float32; the configuration says bfloat16, or nothing."""
    model = small_llama().bfloat16()
    model.save_pretrained(tmp_path / "dense")
    file, config = tmp_path / "dense" / "model.safetensors", tmp_path / "dense" / "config.json"
    tensors = load_file(file)
    wide = {n: t.float() * 1.0001 for n, t in tensors.items() if "norm" in n or "up_proj" in n}
    save_file(tensors | wide, file, {"format": "pt"})
    said = json.loads(config.read_text())
    assert said.pop("dtype") == "bfloat16"
    if not named:
        config.write_text(json.dumps(said))
    sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", "wanda", "2:4", BATCHES)
    out = {n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()}
    assert {n: t.dtype for n, t in out.items()} == {
        n: torch.float32 if n in wide else torch.bfloat16 for n in tensors
    }
    for name, tensor in wide.items():
        kept = out[name] != 0
        assert torch.equal(out[name][kept], tensor[kept]), name
        assert ("norm" in name) == bool(kept.all())
    same = type(model).from_pretrained(tmp_path / "dense").eval()
    wanted = pruned_in_memory(same, BATCHES, "wanda", "2:4")
    read = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(t, read[n]) for n, t in wanted.items())


def test_other_keywords_are_another_run(dense, tmp_path):
    ids, ones = BATCHES[0], torch.ones_like(BATCHES[0])
    arguments = (dense, tmp_path / "out", "wanda", "2:4")
    sc.prune_checkpoint(*arguments, [{"input_ids": ids, "attention_mask": ones}])
    with pytest.raises(InputError, match="output folder: got a run with inputs"):
        sc.prune_checkpoint(*arguments, [{"input_ids": ids, "position_ids": ones}])
    sc.prune_checkpoint(*arguments, [{"attention_mask": ones, "input_ids": ids}])
    same = fingerprint([{"x": torch.tensor(1)}])
    assert same != fingerprint([{"y": torch.tensor(1)}])
    assert same != fingerprint([{"x": torch.tensor(2)}])
    assert fingerprint([{"x": True}]) != fingerprint([{"x": False}])


@pytest.mark.parametrize("exclude", [(), ("vision",)])
def test_text_alone_calibrates_the_language_model_of_two(tmp_path, exclude):
    """The tower that it never reaches goes by magnitude, and is named; or stays out of it."""
    model, inputs = tiny("LLaVA")
    model.eval().save_pretrained(tmp_path / "dense")
    text = [{"input_ids": inputs["input_ids"] % 90}]
    arguments = ("wanda", "2:4", text)
    told = sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", *arguments, exclude=exclude)
    wanted = pruned_in_memory(copy.deepcopy(model), text, "wanda", "2:4", exclude=exclude)
    read = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(t, read[n]) for n, t in wanted.items())
    towers = [n for n in find_blocks(model) if "vision" in n]
    assert len(towers) == 2
    by_magnitude = pruned_in_memory(copy.deepcopy(model), [], "magnitude", "2:4")
    for name, tensor in wanted.items():
        if owner_of(name, towers):
            dense = model.state_dict()[name]
            assert torch.equal(tensor, dense if exclude else by_magnitude[name]), name
    assert told["notes"] == ([] if exclude else [f"{name}: {UNREACHED}" for name in towers])


def test_a_block_that_is_never_reached_goes_by_magnitude_as_it_is_stored(tmp_path):
    """GPT-2's weights stand as (inputs, outputs): groups of 2:4 are along the inputs still."""

    class Skipping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt = tiny("GPT-2")[0].eval()

        def forward(self, ids):
            blocks = self.gpt.transformer.h
            self.gpt.transformer.h = blocks[:1]
            try:
                return self.gpt(ids)
            finally:
                self.gpt.transformer.h = blocks

    wanted = pruned_in_memory(Skipping(), [], "magnitude", "2:4")
    found = pruned_in_memory(Skipping(), [BATCHES[0]], "wanda", "2:4")
    second = [n for n in wanted if ".h.1." in n]
    assert second
    assert all(torch.equal(found[n], wanted[n]) for n in second)
