"""Sequences of any length, padded to the longest of their batch: what a collator gives."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

import secateurs as sc
from secateurs.calibration.walk import walk
from secateurs.errors import InputError
from secateurs.registry import create
from secateurs.task import Metric, Task, logits_of
from secateurs.training.batches import calibration_batches, calibration_inputs

SETTINGS = {"steps": 2, "optimizer": "adamw", "lr": 1e-3}
LENGTHS = [4, 5, 6, 7, 8, 9, 10, 11] * 3


def padded(rows):
    longest = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
    seen = torch.stack([F.pad(torch.ones_like(row), (0, longest - len(row))) for row in rows])
    return {"input_ids": ids, "attention_mask": seen, "labels": ids.masked_fill(seen == 0, -100)}


def nll(output, labels):
    logits = logits_of(output)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


@pytest.fixture(scope="module")
def ragged():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rows = [torch.randint(3, 50, (length,)) for length in LENGTHS]
    loader = DataLoader(rows, 4, collate_fn=padded, shuffle=True)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    inputs = padded(rows[:1])
    del inputs["labels"]
    metric = Metric(lambda output, labels: nll(output, labels)[None], higher_is_better=False)
    settings = sc.TrainSettings(**SETTINGS)
    task = Task(
        model, loader, loader, nll, {"loss of tokens": metric}, inputs, primary="loss of tokens",
        finetuning=settings, training=settings,
    )  # fmt: skip
    return task, model, rows


BLOCKWISE = {"samples": 16, "batch": 4}


@pytest.mark.parametrize(
    ("method", "budget", "options"),
    [
        ("wanda", "sparsity=0.5", BLOCKWISE),
        ("sparsegpt", "2:4", BLOCKWISE),
        ("ecoflap", "sparsity=0.5", {**BLOCKWISE, "score_samples": 8, "score_batch": 4}),
        ("cfsp", "keep=0.5", BLOCKWISE),
        ("lpvit", "sparsity=0.3", {**BLOCKWISE, "block": (4, 4)}),
        ("perp", "sparsity=0.5", {**BLOCKWISE, "mode": "reconstruct", "rank": 2}),
        ("spa", "params=0.8", {"when": "no-training", "samples": 16, "roles": ["neuron"]}),
    ],
)
def test_methods_that_look_at_inputs(ragged, method, budget, options):
    task, model, _ = ragged
    outcome = sc.prune(model, method, budget, task, recover=False, **options)
    assert outcome.promise.kept, str(outcome.promise)
    assert outcome.metrics_after["loss"] > 0


@pytest.mark.parametrize("q", ["output", "learned"])
def test_deltas(ragged, q):
    task, model, _ = ragged
    tuned = copy.deepcopy(model)
    sc.fit(tuned, task, task.finetuning)
    options = {"q": q, "samples": 16, "seeds": 2}
    outcome = sc.prune(tuned, "darex", "sparsity=0.5", task, base=model, **options)
    assert outcome.promise.kept


def test_batches_are_collated_anew_by_the_loader_itself(ragged):
    task, _, rows = ragged
    batches = calibration_batches(task.train, 10, 4, 3)
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 2]
    read = [ids[seen == 1] for b in batches for ids, seen in zip(*b.values(), strict=True)]
    for batch in batches:
        assert int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]
    whole = calibration_inputs(task.train, 10, 3)
    assert whole["input_ids"].shape == (10, max(len(row) for row in read))
    for row, ids, seen in zip(read, *whole.values(), strict=True):
        assert torch.equal(row, ids[seen == 1])
        assert any(torch.equal(row, own) for own in rows)
    with pytest.raises(InputError, match="samples: got 25; accepted: at most 24"):
        calibration_batches(task.train, 25, 4, 3)
    everything = calibration_batches(task.train, 25, 4, 3, fewer=True)
    assert sum(len(b["input_ids"]) for b in everything) == len(rows)


def test_loaders_of_their_own_order_are_cut_and_joined_where_batches_fit(ragged):
    _, _, rows = ragged
    drawn = WeightedRandomSampler(torch.ones(24), 24, replacement=True)
    loader = DataLoader(rows, 3, collate_fn=padded, sampler=drawn)
    batches = calibration_batches(loader, 20, 4, 0)
    assert sum(len(b["input_ids"]) for b in batches) == 20
    assert all(1 <= len(b["input_ids"]) <= 4 for b in batches)
    for one, other in pairwise(batches):  # what is less than 4 does not fit what follows
        widths = one["input_ids"].shape[1], other["input_ids"].shape[1]
        assert len(one["input_ids"]) == 4 or widths[0] != widths[1]
    with pytest.raises(InputError, match="whose batches differ in shape"):
        calibration_inputs(loader, 20, 0)
    plain = DataLoader([torch.tensor([float(i)]) for i in range(24)], 3, sampler=drawn)
    cut = calibration_batches(plain, 20, 8, 0, lambda batch: (batch, None))
    assert [len(b) for b in cut] == [8, 8, 4]
    assert torch.equal(torch.cat(cut), calibration_inputs(plain, 20, 0, lambda b: (b, None)))


def test_moments_are_of_every_token_of_every_batch(ragged):
    """The squares of a layer's inputs are those of the batches one by one."""
    task, model, _ = ragged
    batches = create("wanda", BLOCKWISE).batches(task, 0)
    assert len({b["input_ids"].shape for b in batches}) > 1
    name = "model.layers.1.mlp.up_proj"
    found = next(v.moments([name]) for v in walk(model, batches) if v.index == 1)
    seen = []
    layer: nn.Module = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    tokens = torch.cat(seen).double()
    assert found[name].rows == len(tokens)
    squares = tokens.square().sum(0)
    assert torch.allclose(found[name].squares.reshape(-1), squares / len(tokens), rtol=1e-5)
