"""PERP: what trains, what stays zero, and blocks that are brought back, against brute force."""

import copy
import os
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.calibration.blocks import find_blocks
from secateurs.errors import InputError
from secateurs.methods.weights.perp import (
    MERGING,
    RECONSTRUCTED,
    TRAINED,
    Perp,
    head_of,
    ranks_of,
)
from secateurs.recovery import recovery
from secateurs.registry import create
from secateurs.runs.recipe import Recipe
from secateurs.training.adapters import adapters
from secateurs.training.batches import calibration_inputs
from secateurs.zoo.catalog import make_task

os.environ["HF_HUB_OFFLINE"] = "1"
SPEC = "zoo:vit-tiny?depth=3&hidden=24&dim=16&gated=true"


@pytest.fixture(scope="module")
def small():
    """A gated transformer of three blocks on few digits, a little trained."""
    task = make_task(
        SPEC, "digits?limit=300", training=sc.TrainSettings(steps=30, lr=3e-3, optimizer="adamw"),
        finetuning=sc.TrainSettings(steps=20),
    )  # fmt: skip
    model = task.fresh_model(0)
    sc.fit(model, task, task.training)
    return task, model.eval()


def zeros_are_where_the_masks_say(outcome):
    for name, mask in outcome.masks.items():
        if not torch.equal(outcome.model.get_parameter(name) != 0, mask):
            return False
    return bool(outcome.masks)


def changed(one, other):
    """Names of parameters that differ."""
    others = dict(other.named_parameters())
    return {n for n, p in one.named_parameters() if not torch.equal(p, others[n])}


# what trains


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"biases": False, "head": False, "adapters": "none"}, {"norm"}),
        ({"norms": False, "head": False, "adapters": "none"}, {"bias"}),
        ({"head": False, "adapters": "none"}, {"norm", "bias"}),
        ({"biases": False, "norms": False, "adapters": "none"}, {"head"}),
        ({"biases": False, "norms": False, "head": False}, {"matrix"}),
        ({}, {"norm", "bias", "head", "matrix"}),
    ],
)
def test_what_is_selected_changes_and_nothing_else(small, options, kinds):
    task, model = small
    outcome = sc.prune(model, "perp", "sparsity=0.5", task, lr=1e-2, rank=2, **options)
    raw = sc.prune(model, "magnitude", "sparsity=0.5", task)

    def kind(name):
        if name == "classifier.weight":
            return "head"
        if name.endswith("bias"):
            return "bias"
        if "norm" in name:
            return "norm"
        return "matrix" if name in raw.masks else "frozen"

    expected = {n for n, _ in raw.model.named_parameters() if kind(n) in kinds}
    if "norm" in kinds:  # shifts are norms' as well as biases
        expected |= {n for n, _ in raw.model.named_parameters() if "norm" in n}
    assert changed(outcome.model, raw.model) == expected
    assert zeros_are_where_the_masks_say(outcome)
    assert list(outcome.masks) == list(raw.masks)
    assert all(torch.equal(outcome.masks[n], raw.masks[n]) for n in raw.masks)


def test_the_trained_share_is_counted_once(small):
    task, model = small
    outcome = sc.prune(model, "perp", "sparsity=0.5", task, rank=2, steps=1)
    total = sum(p.numel() for p in model.parameters())
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    scales = sum(
        p.numel() for n, p in model.named_parameters() if "norm" in n and n.endswith("weight")
    )
    low_rank = sum(2 * sum(m.shape) for m in outcome.masks.values())
    head = 2 * sum(model.classifier.weight.shape)
    counts = {"adapters": low_rank, "head": head, "biases": biases, "norms": scales}
    counts["all"] = sum(counts.values())
    rows = outcome.tables[TRAINED]
    assert {row["part"]: row["parameters"] for row in rows} == counts
    assert [row["share"] for row in rows] == [c / total for c in counts.values()]


def test_without_updates_it_is_the_pruner(small):
    task, model = small
    raw = sc.prune(model, "wanda", "sparsity=0.6", task)
    for kind in ("mask-lora", "lora-prune"):
        outcome = sc.prune(
            model, "perp", "sparsity=0.6", task, pruner="wanda", adapters=kind, steps=0
        )
        assert changed(outcome.model, raw.model) == set()
        assert outcome.metrics_after == raw.metrics_after


@pytest.mark.parametrize("kind", ["mask-lora", "scale-lora", "lora-prune"])
def test_every_kind_gets_better_and_keeps_its_zeros(small, kind):
    task, model = small
    raw = sc.prune(model, "magnitude", "sparsity=0.6", task)
    outcome = sc.prune(
        model, "perp", "sparsity=0.6", task, adapters=kind, steps=60, lr=3e-3, rank=4, alpha=8
    )
    assert outcome.metrics_after["loss"] < raw.metrics_after["loss"] - 0.1
    assert zeros_are_where_the_masks_say(outcome)
    merging = outcome.tables.get(MERGING)
    if kind == "lora-prune":
        assert merging[0]["loss"] < merging[1]["loss"] == outcome.metrics_after["loss"]
    else:
        assert merging is None


@pytest.mark.parametrize(
    ("pruner", "mode"),
    [("magnitude", "retrain"), ("sparsegpt", "reconstruct"), ("one-shot", "reconstruct")],
)
def test_n_of_m_holds_in_every_group_after_merging(small, pruner, mode):
    task, model = small
    outcome = sc.prune(model, "perp", "2:4", task, pruner=pruner, mode=mode, steps=5, samples=32)
    assert zeros_are_where_the_masks_say(outcome)
    assert outcome.promise.kept
    for name in outcome.masks:
        weight = outcome.model.get_parameter(name)
        if weight.ndim == 2:
            assert bool(((weight.reshape(-1, 4) == 0).sum(1) == 2).all()), name


def test_plain_adapters_are_kept_in_a_folder_beside_the_pruned_model(small, tmp_path):
    task, model = small
    outcome = sc.prune(
        model, "perp", "sparsity=0.6", task, adapters="lora", steps=60, lr=3e-3,
        adapter_folder=str(tmp_path / "adapters"),
    )  # fmt: skip
    assert zeros_are_where_the_masks_say(outcome)
    with_them, without = outcome.tables[MERGING]
    assert with_them["loss"] < without["loss"] == outcome.metrics_after["loss"]
    peft = pytest.importorskip("peft")
    read = peft.PeftModel.from_pretrained(outcome.model, str(tmp_path / "adapters"))
    assert task.measure(read)["loss"] == pytest.approx(with_them["loss"], rel=1e-5)


@pytest.mark.parametrize("recovers", [True, False])
def test_adapters_overwrite_nothing(small, tmp_path, recovers):
    task, model = small
    mine = tmp_path / "adapters" / "adapter_config.json"
    mine.parent.mkdir()
    mine.write_text("mine")
    options = {"adapters": "lora", "steps": 1, "adapter_folder": str(mine.parent)}
    how = {"recover": {"perp": options}, "samples": 16} if recovers else options
    with pytest.raises(InputError, match="output folder: got .* accepted: a folder that is new"):
        sc.prune(model, "wanda" if recovers else "perp", "sparsity=0.5", task, **how)
    assert [p.name for p in mine.parent.iterdir()] == ["adapter_config.json"]
    assert mine.read_text() == "mine"


# transformers


def llama(**fields):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **fields,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def text():
    steps = torch.randint(1, 3, (64, 13), generator=torch.Generator().manual_seed(0))
    tokens = steps.cumsum(1) % 40
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 8, shuffle=True)
    settings = sc.TrainSettings(steps=4)
    return sc.language_modelling(llama, loader, loader, finetuning=settings)


def test_a_tied_head_gets_no_adapter_and_the_embedding_stays(text):
    model = llama(tie_word_embeddings=True)
    assert head_of(model) == "lm_head"
    outcome = sc.prune(model, "perp", "sparsity=0.5", text, lr=1e-2, rank=2)
    assert torch.equal(outcome.model.lm_head.weight, model.lm_head.weight)
    assert outcome.model.lm_head.weight is outcome.model.model.embed_tokens.weight
    [note] = [n for n in outcome.notes if "lm_head" in n]
    assert note == "no adapter on lm_head: it is a weight shared with model.embed_tokens"


def test_a_head_of_its_own_is_merged_densely(text):
    model = llama(tie_word_embeddings=False)
    outcome = sc.prune(model, "perp", "sparsity=0.5", text, lr=1e-2, rank=2)
    assert "lm_head.weight" in changed(outcome.model, model)
    assert "model.embed_tokens.weight" not in changed(outcome.model, model)
    assert zeros_are_where_the_masks_say(outcome)


def test_a_model_without_biases_has_nothing_to_train_when_only_biases_are_asked_for(text):
    options = {"norms": False, "head": False, "adapters": "none"}
    with pytest.raises(InputError, match="adapters: got nothing to train"):
        sc.prune(llama(), "perp", "sparsity=0.5", text, **options)


@pytest.mark.parametrize("mode", ["retrain", "reconstruct"])
def test_half_precision_trains_in_float32_and_comes_back_in_half(text, mode):
    model = llama(tie_word_embeddings=False).bfloat16()
    outcome = sc.prune(model, "perp", "2:4", text, mode=mode, steps=8, lr=1e-2, rank=2, samples=16)
    assert {p.dtype for p in outcome.model.parameters()} == {torch.bfloat16}
    for name, mask in outcome.masks.items():
        assert not outcome.model.get_parameter(name)[~mask].any()
    moved = changed(outcome.model, sc.prune(model, "magnitude", "2:4", text).model)
    assert set(outcome.masks) <= moved
    assert any("norm" in name for name in moved)


def test_heads_are_found_where_they_are(small):
    assert head_of(small[1]) == "classifier"
    assert head_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))) is None  # one block, all of it


# block by block


UNIFORM = {"allocation": "uniform", "exclude": ["patches", "classifier"]}


@pytest.mark.parametrize(
    ("pruner", "own"), [("magnitude", {}), ("wanda", {}), ("one-shot", UNIFORM)]
)
def test_reconstruction_brings_every_block_nearer(small, pruner, own):
    task, model = small
    options = {"mode": "reconstruct", "pruner": pruner, "lr": 3e-3, "samples": 64, "rank": 4}
    options["pruner_options"] = own
    outcome = sc.prune(model, "perp", "sparsity=0.7", task, steps=60, **options)
    rows = outcome.tables[RECONSTRUCTED]
    assert [row["block"] for row in rows] == list(find_blocks(model))
    for row in rows:
        assert 0 < row["after"] < 0.7 * row["before"]
    raw = sc.prune(model, pruner, "sparsity=0.7", task, recover=False, **own)
    assert outcome.metrics_after["loss"] < raw.metrics_after["loss"]
    assert torch.equal(outcome.model.classifier.weight, raw.model.classifier.weight)


def test_targets_are_what_dense_blocks_make_of_a_pruned_prefix(small):
    """The errors before and after, by hand from the outcome's own blocks."""
    task, model = small
    options = {"mode": "reconstruct", "samples": 32, "batch": 8, "lr": 3e-3}
    outcome = sc.prune(model, "perp", "sparsity=0.7", task, steps=20, seed=3, **options)
    raw = sc.prune(model, "magnitude", "sparsity=0.7", task).model
    x = calibration_inputs(task.train, 32, 3, task.unpack)
    made = outcome.model
    with torch.no_grad():
        stream = (made.patches(x) + made.positions).flatten(2).transpose(1, 2)
        for number, row in enumerate(outcome.tables[RECONSTRUCTED]):
            target = model.blocks[number](stream)
            for place, net in (("before", raw), ("after", made)):
                error = (net.blocks[number](stream) - target).square().mean()
                assert row[place] == pytest.approx(float(error), rel=1e-4)
            stream = made.blocks[number](stream)


@pytest.mark.parametrize("pruner", ["magnitude", "one-shot"])
def test_of_nothing_pruned_nothing_is_lost_and_nothing_moves(small, pruner):
    task, model = small
    outcome = sc.prune(
        model, "perp", "sparsity=0", task, mode="reconstruct", pruner=pruner, steps=10, samples=16
    )
    for row in outcome.tables[RECONSTRUCTED]:
        assert row["before"] == row["after"] == 0
    assert changed(outcome.model, model) == set()
    assert any(n.startswith("adapters on layers of which nothing is pruned") for n in outcome.notes)


def test_methods_that_see_inputs_see_those_of_the_reconstructed_prefix(small):
    """Wanda's masks of later blocks differ from those on a prefix that is only pruned."""
    task, model = small
    raw = sc.prune(model, "wanda", "sparsity=0.7", task, samples=32, batch=8)
    outcome = sc.prune(
        model, "perp", "sparsity=0.7", task, pruner="wanda", mode="reconstruct", samples=32,
        steps=40, lr=1e-2,
    )  # fmt: skip
    same = {n: torch.equal(raw.masks[n], outcome.masks[n]) for n in raw.masks}
    assert all(ok for n, ok in same.items() if n.startswith("blocks.0."))
    assert not all(ok for n, ok in same.items() if n.startswith("blocks.2."))


# after any method


@pytest.mark.parametrize(
    ("method", "budget"),
    [("wanda", "sparsity=0.6"), ("global-mp", "sparsity=0.6"), ("gmp", "sparsity=0.6"),
     ("lottery-ticket", "sparsity=0.3"), ("random-pruning", "sparsity=0.5")],
)  # fmt: skip
def test_it_recovers_what_any_method_left(small, method, budget):
    task, model = small
    task = replace(task, training=sc.TrainSettings(steps=8, lr=1e-3))
    how = {"perp": {"rank": 2, "lr": 3e-3, "steps": 20}}
    raw = sc.prune(model, method, budget, task, recover=False)
    outcome = sc.prune(model, method, budget, task, recover=how)
    assert all(torch.equal(outcome.masks[n], raw.masks[n]) for n in raw.masks)
    for name, mask in outcome.masks.items():
        assert not outcome.model.get_parameter(name)[~mask].any()
    assert outcome.metrics_after["loss"] < raw.metrics_after["loss"]
    assert outcome.metrics_after == task.measure(outcome.model)
    assert outcome.method == method


def test_it_recovers_a_model_that_is_smaller(small):
    task, model = small
    options = {"roles": ["neuron"]}
    raw = sc.prune(model, "spa", "params=0.8", task, recover=False, **options)
    outcome = sc.prune(model, "spa", "params=0.8", task, recover={"perp": {"lr": 3e-3}}, **options)
    assert outcome.after.parameters == raw.after.parameters
    assert outcome.metrics_after["loss"] < raw.metrics_after["loss"]
    assert not any(n.startswith("adapters on layers of which nothing") for n in outcome.notes)


STRUCTURAL = [
    ("cfsp", "keep=0.5", {"samples": 64}),
    ("spa", "params=0.75", {"roles": ["neuron", "head"]}),
]


@pytest.mark.parametrize(("method", "budget", "options"), STRUCTURAL)
def test_smaller_blocks_are_brought_nearer_to_the_dense_ones(small, method, budget, options):
    """The errors before and after, by hand: dense blocks on what the smaller prefix gives."""
    task, model = small
    how = {"mode": "reconstruct", "samples": 64, "batch": 64, "steps": 60, "lr": 3e-3, "rank": 4}
    raw = sc.prune(model, method, budget, task, recover=False, **options)
    made = sc.prune(model, method, budget, task, recover={"perp": how}, **options)
    assert made.after.parameters == raw.after.parameters
    rows = made.tables[RECONSTRUCTED]
    assert [row["block"] for row in rows] == list(find_blocks(model))
    x = calibration_inputs(task.train, 64, 0, task.unpack)
    with torch.no_grad():
        stream = (made.model.patches(x) + made.model.positions).flatten(2).transpose(1, 2)
        for number, row in enumerate(rows):
            target = model.blocks[number](stream)
            for place, net in (("before", raw.model), ("after", made.model)):
                error = (net.blocks[number](stream) - target).square().mean()
                assert row[place] == pytest.approx(float(error), rel=1e-4)
            assert row["before"] == 0 or row["after"] < 0.8 * row["before"]
            stream = made.model.blocks[number](stream)
    assert made.metrics_after["loss"] < raw.metrics_after["loss"]


def test_ranks_of_reconstructed_blocks_are_those_that_the_method_gives(small):
    task, model = small
    how = {"mode": "reconstruct", "samples": 16, "steps": 1, "rank": 4, "biases": False}
    given = {"recover": {"perp": how | {"norms": False}}, "samples": 64, "alpha": 3.0}
    outcome = sc.prune(model, "cfsp", "keep=0.5", task, **given)
    ranks = ranks_of([f"{b}.x" for b in outcome.rank_weights], outcome.rank_weights, 4)
    assert len(set(ranks.values())) > 1
    trained = 0
    for name, block in find_blocks(outcome.model).items():
        sizes = [m.in_features + m.out_features for m in block.modules() if is_linear(m)]
        trained += ranks[f"{name}.x"] * sum(sizes)
    assert outcome.tables[TRAINED][-1] == {
        "part": "all", "parameters": trained, "share": pytest.approx(trained / size_of(outcome))
    }  # fmt: skip


def is_linear(module):
    return type(module) is nn.Linear


def size_of(outcome):
    return sum(p.numel() for p in outcome.model.parameters())


def test_a_stream_that_became_narrower_cannot_be_compared(small):
    task, model = small
    how = {"recover": {"perp": {"mode": "reconstruct", "samples": 16}}}
    with pytest.raises(InputError, match="mode: got reconstruct, but blocks.0 takes or gives"):
        sc.prune(model, "spa", "params=0.6", task, roles=["channel", "width"], **how)


def test_as_a_recovery_and_as_a_method_it_is_the_same(small):
    task, model = small
    for mode in ("retrain", "reconstruct"):
        options = {"mode": mode, "steps": 10, "samples": 16}
        one = sc.prune(model, "global-mp", "sparsity=0.6", task, recover={"perp": options})
        other = sc.prune(model, "perp", "sparsity=0.6", task, pruner="global-mp", **options)
        assert changed(one.model, other.model) == set()


def test_reconstruction_needs_the_dense_blocks(small):
    task, model = small
    how = {"perp": {"mode": "reconstruct"}}
    for method in ("gmp", "lottery-ticket"):
        told = f"mode: got reconstruct after {method}, which trains: .* accepted: retrain"
        with pytest.raises(InputError, match=told):
            sc.prune(model, method, "sparsity=0.5", task, recover=how)
    outcome = sc.prune(model, "wanda", "sparsity=0.5", task)
    with pytest.raises(InputError, match="mode: got reconstruct, and no dense blocks to compare"):
        recovery(how).recover(outcome, task)


def test_recoveries_by_name(small):
    task, model = small
    trained = sc.prune(model, "wanda", "sparsity=0.6", task, recover="finetune")
    plain = sc.prune(model, "wanda", "sparsity=0.6", task)
    assert trained.metrics_after["loss"] < plain.metrics_after["loss"]
    none = sc.prune(model, "global-mp", "sparsity=0.6", task, recover="none")
    raw = sc.prune(model, "global-mp", "sparsity=0.6", task, recover=False)
    assert changed(none.model, raw.model) == set()
    assert recovery({"perp": {"rank": 3}}) == Perp(rank=3)
    assert recovery(True) is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("maybe", "recover: got 'maybe'; accepted: one of .*perp"),
        ("wanda", "recover: got 'wanda'"),
        ({"perp": {"ranks": 3}}, "option: got 'ranks'"),
        ({"perp": 3}, "recover perp: got 3"),
        ({"perp": {}, "finetune": {}}, "one recovery"),
        ({"finetune": {"lr": 1}}, "recover finetune"),
    ],
)
def test_recoveries_that_are_none_are_refused(small, given, message):
    task, model = small
    with pytest.raises(InputError, match=message):
        sc.prune(model, "magnitude", "sparsity=0.5", task, recover=given)
    with pytest.raises(InputError, match="task.train: got None"):
        sc.prune(model, "magnitude", "sparsity=0.5", recover="perp")


RECIPE = """
model: zoo:vit-tiny?depth=1&hidden=8&dim=8
data: digits?limit=100
training: {steps: 3}
finetuning: {steps: 3}
latency: false
stages:
  - train
  - prune:
      method: wanda
      budget: sparsity=0.5
      samples: 16
      recover: {perp: {rank: 2}}
"""


def test_a_stage_of_a_recipe_recovers_by_it(tmp_path):
    from secateurs.runs.run import Run

    recipe = Recipe.parse(RECIPE)
    assert Recipe.parse(recipe.as_yaml()) == recipe
    outcome = Run.create(recipe, tmp_path / "run").execute()
    assert outcome.tables[TRAINED][-1]["part"] == "all"
    assert zeros_are_where_the_masks_say(outcome)
    with pytest.raises(InputError, match="rank"):
        Recipe.parse(RECIPE.replace("rank: 2", "rank: 0"))


# resuming, and what is refused


class KilledError(Exception):
    """Stands for a kill."""


class Killer:
    """A listener in whose presence the work dies at an event."""

    def __init__(self, *wanted):
        self.wanted, self.seen = wanted, []

    def event(self, kind, values):
        if kind in ("train", "block"):
            self.seen.append(values.get("step", values.get("block")))
            if self.seen[-1] in self.wanted:
                raise KilledError

    def begin(self, label, total): ...

    def advance(self, label, done): ...

    def end(self, label): ...


@pytest.mark.parametrize(("mode", "place"), [("retrain", 7), ("reconstruct", "blocks.1")])
def test_a_killed_run_goes_on_with_the_same_bits(small, tmp_path, mode, place):
    task, model = small

    def run(*listeners, folder=None):
        work = sc.Workspace(folder, listeners, snapshot_seconds=0.0)
        return sc.prune(
            model, "perp", "sparsity=0.6", task, work=work, mode=mode, steps=12, samples=16
        )

    whole = run()
    with pytest.raises(KilledError):
        run(Killer(place), folder=tmp_path)
    rest = Killer()
    outcome = run(rest, folder=tmp_path)
    assert changed(whole.model, outcome.model) == set()
    assert rest.seen[0] == (7 if mode == "retrain" else "blocks.0")


def test_an_error_leaves_no_adapter_in_the_callers_model(small):
    task, model = small
    own = copy.deepcopy(model)
    with pytest.raises(KilledError):
        sc.prune(
            own, "perp", "sparsity=0.6", task, inplace=True, work=sc.Workspace(None, [Killer(3)])
        )
    assert not adapters(own)
    assert changed(own, model) == set()
    assert all(p.requires_grad for p in own.parameters())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"warmup": 1.0}, "warmup"),
        ({"dropout": 0.1}, "dropout: got 0.1; accepted: 0 without lora"),
        ({"adapters": "lora"}, "adapter_folder"),
        ({"adapter_folder": "somewhere"}, "adapter_folder"),
        ({"adapters": "lora", "adapter_folder": "x", "mode": "reconstruct"}, "adapters"),
        ({"adapters": "none", "biases": False, "norms": False, "head": False}, "adapters"),
        ({"pruner": "perp"}, "pruner: got 'perp'"),
        ({"pruner": "gmp"}, "pruner: got 'gmp'; accepted: a one-shot method; with others, recover"),
        ({"pruner": "wander"}, "did you mean 'wanda'"),
        ({"pruner_options": {"scope": "all"}}, "scope"),
    ],
)
def test_bad_options_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        create("perp", options)


def test_a_pattern_and_a_sparsity_that_contradict_it_are_refused(small):
    task, model = small
    with pytest.raises(InputError, match="budget: got 'sparsity=0.6'; accepted: 2:4"):
        sc.prune(
            model, "perp", "sparsity=0.6", task, pruner="magnitude",
            pruner_options={"pattern": "2:4"},
        )  # fmt: skip
