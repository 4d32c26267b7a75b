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
from secateurs.calibration.moments import outputs_first
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


def test_an_encoder_decoder_goes_the_same_way(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=2)).eval()
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    batches = [{"input_ids": b, "decoder_input_ids": b} for b in BATCHES]
    sc.prune_checkpoint(tmp_path / "dense", tmp_path / "out", "wanda", "sparsity=0.5", batches)
    chosen, same = create("wanda", {}), copy.deepcopy(model)
    removals, _ = chosen.removals(chosen.prunable(same), chosen.accept("sparsity=0.5"))
    chosen.apply(same, removals, batches)
    read = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert all(torch.equal(t, read.state_dict()[n]) for n, t in same.state_dict().items())


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
    "shards_before", [0, pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)]
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
