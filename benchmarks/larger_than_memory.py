"""A 13.5 GB checkpoint pruned in less than 3 GB: Wanda 2:4 and magnitude, killed and resumed.

    python benchmarks/larger_than_memory.py [--folder /tmp/llama] [--layers 32]

Writes a Llama-shaped checkpoint of bfloat16 noise (hidden 4096, FFN 11008, 32 layers, 32000
tokens), a shard a layer; prunes it in processes of their own, whose largest resident set the
kernel tells; kills a Wanda run in the middle, resumes it and compares the bytes with those of a
run that nobody disturbed; reads the result with plain `from_pretrained`.

Printed on two shared cores, one thread (OMP_NUM_THREADS=1):

    checkpoint: 13.48 GB
    copying it: 17 s
    magnitude 2:4: 232 s (13.5 times the copy), largest resident set 1.85 GB
    wanda 2:4: 369 s (21.4 times the copy), largest resident set 1.87 GB
    wanda 2:4: killed with 16 of 32 shards written
    wanda 2:4: 159 s (9.2 times the copy), largest resident set 1.87 GB
    bytes of the run that was killed and resumed: identical
    from_pretrained: 6.74 billion parameters, of 4 stay [2]

The resident set counts everything: Python, torch, transformers (0.5 GB before any weight),
the mapped pages of the file that is being read. Memory is that of the process, time that of this
machine while it ran; the ratio to one pass of reading and writing the same files is printed too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SAMPLES, TOKENS = 8, 32
LIMIT = 3 << 30
"""Bytes that a process may hold."""


def write_checkpoint(folder: Path, layers: int) -> None:
    """Random weights, a shard a layer, in the names of transformers' Llama."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    # one large draw, cut at another place for every tensor: drawing 6.7 billion takes longer
    # than everything that is measured
    pool = (torch.randn(inner * width + 10_007 * 97, generator=generator) * 0.02).bfloat16()

    def noise(rows: int, columns: int, number: int) -> torch.Tensor:
        start = number * 10_007 % (10_007 * 97)
        return pool[start : start + rows * columns].reshape(rows, columns).clone()

    placed = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        placed.update(dict.fromkeys(tensors, name))

    shapes = {
        **dict.fromkeys([f"self_attn.{p}_proj" for p in "qkvo"], (width, width)),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.{n}.weight": noise(*shape, 7 * layer + number)
            for number, (n, shape) in enumerate(shapes.items())
        }
        norms = {f"{prefix}.{n}_layernorm.weight": torch.ones(width, dtype=torch.bfloat16)
                 for n in ("input", "post_attention")}  # fmt: skip
        shard(f"model-{layer:05d}.safetensors", {**tensors, **norms})
    embedding = torch.cat([noise(vocabulary // 4, width, 900 + i) for i in range(4)])
    shard("model-embedding.safetensors", {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding.flip(0).contiguous(),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
    })  # fmt: skip
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def worker(folder: Path, out: Path, method: str, budget: str) -> None:
    """What a measured process does."""
    import secateurs as sc

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32000, (SAMPLES, TOKENS), generator=generator)
    start = time.perf_counter()
    sc.prune_checkpoint(folder, out, method, budget, list(tokens.split(4)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak}))


def pruned(folder: Path, out: Path, method: str, budget: str, kill_at: int = 0) -> dict[str, float]:
    """Prune in a process of its own; SIGKILL it when so many shards are there."""
    command = [sys.executable, __file__, "--worker", str(folder), str(out), method, budget]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while kill_at and len(list(out.glob("model-block-*"))) < kill_at:
        time.sleep(0.05)
    if kill_at:
        process.kill()
        process.wait()
        return {}
    told, _ = process.communicate()
    assert process.returncode == 0
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def digest(folder: Path) -> str:
    """SHA-256 over the safetensors files of a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def copied(source: Path, target: Path) -> float:
    """Seconds to read and write all shards once."""
    start = time.perf_counter()
    target.mkdir()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/secateurs-llama"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, out, method, budget = options.worker
        worker(Path(folder), Path(out), method, budget)
        return
    base: Path = options.folder
    dense, out = base / "dense", base / "out"
    if not dense.exists():
        write_checkpoint(dense, options.layers)
    size = sum(p.stat().st_size for p in dense.glob("*.safetensors"))
    print(f"checkpoint: {size / 1e9:.2f} GB")
    baseline = copied(dense, base / "copy")
    print(f"copying it: {baseline:.0f} s")
    digests = {}
    for method, budget, kill_at in (
        ("magnitude", "2:4", 0),
        ("wanda", "2:4", 0),
        ("wanda", "2:4", options.layers // 2),
    ):
        shutil.rmtree(out, ignore_errors=True)
        if kill_at:
            pruned(dense, out, method, budget, kill_at)
            there = len(list(out.glob("model-block-*")))
            print(f"{method} {budget}: killed with {there} of {options.layers} shards written")
        told = pruned(dense, out, method, budget)
        verdict = "" if told["peak"] < LIMIT else "  ABOVE 3 GB"
        print(
            f"{method} {budget}: {told['seconds']:.0f} s ({told['seconds'] / baseline:.1f} times "
            f"the copy), largest resident set {told['peak'] / 1e9:.2f} GB{verdict}"
        )
        digests.setdefault((method, budget), []).append(digest(out))
    same = len(set(digests["wanda", "2:4"])) == 1
    print(f"bytes of the run that was killed and resumed: {'identical' if same else 'DIFFERENT'}")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[-1].mlp.down_proj.weight
    groups = (weight.reshape(-1, 4) != 0).sum(1)
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    kept = groups.unique().tolist()
    print(f"from_pretrained: {billions:.2f} billion parameters, of 4 stay {kept}")


if __name__ == "__main__":
    main()
