"""DAREx against plain formulas: what is dropped, what it is divided by, what is merged back."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateurs as sc
from secateurs.calibration.output_change import OutputChange
from secateurs.deploy.delta_file import DELTA, base_hash
from secateurs.errors import InputError
from secateurs.parts.deltas import same_bits
from secateurs.parts.rescaling import row_q
from secateurs.registry import create
from secateurs.training.batches import calibration_inputs

HEAD = (r"^4\.",)
PAIR = []


@pytest.fixture
def pair(trained, digits_task):
    """A base and what 60 more updates made of it: made once, not to be changed."""
    if not PAIR:
        model = copy.deepcopy(trained)
        settings = sc.TrainSettings(steps=60, lr=0.1, schedule="constant")
        sc.fit(model, digits_task, settings, seed=5)
        PAIR.extend((trained, model.eval()))
    return PAIR


@pytest.fixture
def base(pair):
    return pair[0]


@pytest.fixture
def tuned(pair):
    return pair[1]


@pytest.fixture
def encode(base, tuned, digits_task):
    def run(budget="sparsity=0.9", task=digits_task, **options):
        options = {"exclude": HEAD, **options}
        return sc.prune(tuned, "darex", budget, task, base=base, **options)

    return run


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert same_bits(tensor, two[name]), name


# ---------------------------------------------------------------- dropping and rescaling


def test_with_nothing_dropped_it_is_the_fine_tuned_model_to_the_bit(encode, tuned):
    for options in ({"q": 1.0}, {}, {"q": "validation"}, {"criterion": "magnitude"}):
        outcome = encode("sparsity=0", **options)
        assert_same(outcome.model.state_dict(), tuned.state_dict())
        assert outcome.delta.q == 1.0


def test_what_is_kept_is_divided_and_the_rest_is_the_base(encode, base, tuned):
    outcome = encode("sparsity=0.7", q=0.4)
    weights, before, after = (m.state_dict() for m in (outcome.model, base, tuned))
    for name, entries in outcome.delta.entries.items():
        expected = before[name] + entries.mask * (after[name] - before[name]) / 0.4
        assert torch.allclose(weights[name], expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(weights[name][~entries.mask], before[name][~entries.mask])
    for name in ("4.weight", "4.bias"):
        assert same_bits(weights[name], after[name]), "the head is the fine-tuned one"
    assert set(outcome.delta.whole) == {"4.weight", "4.bias"}


def test_dare_divides_by_what_it_keeps(encode):
    assert encode("density=0.2", q="dare").delta.q == pytest.approx(0.2)


def test_include_drops_from_nothing_else(encode, tuned):
    outcome = encode(include=("^2",), exclude=())
    assert set(outcome.delta.entries) == {"2.weight", "2.bias"}
    for name in ("0.weight", "0.bias", "4.weight"):
        assert same_bits(outcome.model.state_dict()[name], tuned.state_dict()[name])


def test_the_base_and_the_given_model_stay_as_they_are(encode, base, tuned):
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (base, tuned)]
    encode(q="output")
    encode(q="learned")
    for module, state in zip((base, tuned), before, strict=True):
        assert_same(module.state_dict(), state)


@pytest.mark.parametrize("structure", ["row", "column"])
@pytest.mark.parametrize("criterion", ["random", "magnitude"])
def test_rows_and_columns_go_as_one(encode, structure, criterion):
    outcome = encode("sparsity=0.5", structure=structure, criterion=criterion, q=1.0)
    axis = 1 if structure == "row" else 0
    for name, entries in outcome.delta.entries.items():
        if entries.mask.ndim == 2:
            assert bool((entries.mask.all(axis) | ~entries.mask.any(axis)).all()), name
    assert outcome.promise.kept


# ---------------------------------------------------------------- importance


def test_the_largest_differences_of_every_tensor_stay_as_they_are(encode, base, tuned):
    outcome = encode("sparsity=0.8", criterion="magnitude")
    for name, entries in outcome.delta.entries.items():
        away = (tuned.state_dict()[name] - base.state_dict()[name]).abs()
        assert away[entries.mask].min() >= away[~entries.mask].max()
        share = float(entries.mask.double().mean())
        assert share == pytest.approx(0.2, abs=1.01 / entries.mask.numel())
    weights, after = outcome.model.state_dict(), tuned.state_dict()
    for name, entries in outcome.delta.entries.items():
        assert same_bits(weights[name][entries.mask], after[name][entries.mask])
    assert outcome.delta.kept == outcome.delta.total - round(0.8 * outcome.delta.total)


def test_wandas_score_is_the_difference_times_the_norm_of_the_input(
    encode, base, tuned, digits_task
):
    outcome = encode("sparsity=0.8", criterion="wanda")
    inputs = calibration_inputs(digits_task.train, 128, 0)
    for name, x in (("0", inputs), ("2", F.relu(tuned[0](inputs)))):
        weight = f"{name}.weight"
        away = (tuned.state_dict()[weight] - base.state_dict()[weight]).abs()
        score = away * x.detach().square().sum(0).sqrt()
        mask = outcome.delta.entries[weight].mask
        expected = score.flatten().topk(int(mask.sum())).indices.sort().values
        assert torch.equal(mask.flatten().nonzero().flatten(), expected)


# ---------------------------------------------------------------- the choice of q


@pytest.mark.parametrize("kind", ["hidden", "topk_logits"])
def test_the_change_of_outputs_is_what_it_says(base, tuned, digits_task, kind):
    inputs = calibration_inputs(digits_task.train, 16, 0)
    change = OutputChange(tuned, inputs, digits_task.forward, kind, 3)
    if kind == "hidden":
        expected = (base[:4](inputs) - tuned[:4](inputs)).abs().mean().detach()
        assert change.layer == "4"
    else:
        top, places = tuned(inputs).topk(3)
        expected = (base(inputs).gather(1, places) - top).square().mean().detach()
    assert change(base) == pytest.approx(float(expected), rel=1e-6)
    assert change(tuned) == 0


def test_output_takes_the_q_of_the_least_change(encode, tuned, digits_task):
    outcome = encode("sparsity=0.95", q="output", seeds=1, outliers=0)
    tried = outcome.tables["search"]
    assert outcome.delta.q == max(tried, key=lambda row: row["score"])["value"]
    assert outcome.delta.q > 0.05
    assert {row["grid"] for row in tried} == {"coarse", "fine"}
    assert min(row["value"] for row in tried) == pytest.approx(0.05)


def test_validation_takes_the_q_of_the_best_metric_and_says_on_what(encode):
    outcome = encode("sparsity=0.97", q="validation")
    tried = outcome.tables["search"]
    best = max(row["score"] for row in tried)
    assert outcome.delta.q == [r["value"] for r in tried if r["score"] == best][-1]
    assert 0 < best <= 1
    assert "q was chosen on the evaluation set that also scores the outcome" in outcome.notes


def test_a_metric_of_which_less_is_better_is_minimised(encode, digits_task):
    error = sc.Metric(lambda o, t: (o.argmax(-1) != t).float(), higher_is_better=False)
    task = replace(digits_task, metrics={"error": error}, primary="error")
    up = encode("sparsity=0.97", q="validation")
    down = encode("sparsity=0.97", q="validation", task=task)
    assert down.delta.q == up.delta.q
    assert all(row["score"] <= 0 for row in down.tables["search"])


@pytest.mark.parametrize("mode", ["exact", "release"])
def test_the_analytic_q_is_of_mean_inputs_and_the_bias(encode, base, tuned, digits_task, mode):
    outcome = encode("sparsity=0.9", q="analytic", eta=0.4, mode=mode)
    inputs = calibration_inputs(digits_task.train, 128, 0)
    q = {}
    for name, x in (("0", inputs), ("2", F.relu(tuned[0](inputs)))):
        away = {
            k: tuned.state_dict()[f"{name}.{k}"] - base.state_dict()[f"{name}.{k}"]
            for k in ("weight", "bias")
        }
        mean = x.detach().double().mean(0).float()
        terms = torch.cat([away["weight"] * mean, away["bias"][:, None]], 1)
        q[f"{name}.weight"] = q[f"{name}.bias"] = float(row_q(terms, 0.9, 0.4, mode=mode).mean())
    assert outcome.delta.q == pytest.approx(q)
    everywhere = encode("sparsity=0.9", q="analytic", eta=0.4, mode=mode, scope="global").delta.q
    assert everywhere == pytest.approx((q["0.weight"] + q["2.weight"]) / 2)


def test_the_weight_of_the_bias_is_searched(encode):
    outcome = encode("sparsity=0.95", q="analytic", low=0.1, step=0.2, decay=0.5, seeds=2)
    tried = outcome.tables["search"]
    eta = max(enumerate(tried), key=lambda row: (row[1]["score"], row[0]))[1]["value"]
    again = encode("sparsity=0.95", q="analytic", eta=eta)
    assert outcome.delta.q == again.delta.q
    noted = encode("sparsity=0.95", q="analytic", eta="validation", step=0.5, seeds=2)
    assert any("evaluation set" in note for note in noted.notes)


def test_factors_are_learned_and_do_better_than_dare(encode, tuned, digits_task):
    inputs = calibration_inputs(digits_task.train, 128, 0)
    change = OutputChange(tuned, inputs, digits_task.forward, "topk_logits", 5)
    dare = encode("sparsity=0.95", q="dare")
    layers = encode("sparsity=0.95", q="learned")
    one = encode("sparsity=0.95", q="learned", scope="global")
    for outcome in (layers, one):
        assert change(outcome.model) < 0.9 * change(dare.model)
    assert layers.delta.q["0.weight"] == layers.delta.q["0.bias"] != layers.delta.q["2.weight"]
    assert isinstance(one.delta.q, float)
    scores = [row["score"] for row in layers.tables["search"]]
    assert scores[0] == pytest.approx(-change(dare.model), rel=0.05), "it begins at DARE"
    assert change(layers.model) == pytest.approx(-max(scores), rel=1e-4)
    masks = [o.delta.entries["0.weight"].mask for o in (dare, layers)]
    assert torch.equal(*masks), "factors are learned on the mask that they are used with"


def test_the_search_is_not_done_twice(base, tuned, digits_task, tmp_path, monkeypatch):
    given = ("darex", "sparsity=0.9", digits_task)
    first = sc.prune(tuned, *given, base=base, work=sc.Workspace(tmp_path), exclude=HEAD)
    monkeypatch.setattr("secateurs.methods.deltas.darex.Trials.score", None)
    again = sc.prune(tuned, *given, base=base, work=sc.Workspace(tmp_path), exclude=HEAD)
    assert_same(first.model.state_dict(), again.model.state_dict())
    assert first.tables == again.tables


def test_a_q_of_no_use_is_noted(encode):
    assert any("below 1-p" in note for note in encode(q=0.05).notes)
    assert not any("below 1-p" in note for note in encode(q=0.5).notes)
    assert not any("below 1-p" in note for note in encode("density=0.1", q=0.1).notes)


# ---------------------------------------------------------------- deltas as files


def test_the_file_and_the_base_are_enough(encode, base, tmp_path):
    outcome = encode("sparsity=0.95", q=0.1, seed=3)
    sc.save(outcome, tmp_path / "out")
    read = sc.load_delta(tmp_path / "out")
    assert_same(sc.merge(base.state_dict(), read), outcome.model.state_dict())
    assert (read.method, read.seed, read.p, read.q) == ("darex", 3, 0.95, 0.1)
    assert create("darex", read.options) == create("darex", outcome.options)
    again = sc.load(tmp_path / "out", copy.deepcopy(base))
    assert_same(again.model.state_dict(), outcome.model.state_dict())
    assert repr(again.delta) == repr(outcome.delta)
    size = (tmp_path / "out" / DELTA).stat().st_size
    assert outcome.tables["bytes"][1]["bytes"] == size


@pytest.mark.parametrize("store", ["float16", "bfloat16"])
def test_half_precision_files_are_smaller_and_as_exact(encode, base, store):
    whole, half = encode("sparsity=0.9", q=0.2), encode("sparsity=0.9", q=0.2, store=store)
    assert_same(sc.merge(base.state_dict(), half.delta), half.model.state_dict())
    kept = half.delta.kept
    assert whole.delta.file_bytes - half.delta.file_bytes == pytest.approx(2 * kept, abs=64)
    for name, weight in half.model.state_dict().items():
        assert torch.allclose(weight, whole.model.state_dict()[name], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(base, tuned, dtype):
    one, two = copy.deepcopy(base).to(dtype), copy.deepcopy(tuned).to(dtype)
    whole = sc.prune(two, "darex", "sparsity=0", base=one, q=1.0)
    assert_same(whole.model.state_dict(), two.state_dict())
    outcome = sc.prune(two, "darex", "sparsity=0.5", base=one, q="dare")
    assert_same(sc.merge(one.state_dict(), outcome.delta), outcome.model.state_dict())
    stored = outcome.delta.entries["0.weight"].values.dtype
    assert stored == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_several_fine_tunes_over_one_base(base, tuned, encode, digits_task):
    other = copy.deepcopy(base)
    sc.fit(other, digits_task, sc.TrainSettings(steps=20, lr=0.1), seed=9)
    one = encode("sparsity=0.8", q="dare").delta
    two = sc.prune(
        other, "darex", "sparsity=0.8", digits_task, base=base, q="dare", seed=1, exclude=HEAD
    ).delta
    merged = sc.merge(base.state_dict(), [one, two])
    assert not torch.equal(one.entries["0.weight"].mask, two.entries["0.weight"].mask)
    before = base.state_dict()["0.weight"].double()
    parts = (d.entries["0.weight"].difference(before) for d in (one, two))
    assert torch.equal(merged["0.weight"], (before + sum(parts)).float())


def test_over_another_base_it_is_refused_and_both_are_named(encode, base, tuned):
    delta = encode("sparsity=0.9", q="dare").delta
    names = f"{base_hash(base.state_dict())[:12]}.*{base_hash(tuned.state_dict())[:12]}"
    with pytest.raises(InputError, match=names):
        sc.merge(tuned.state_dict(), delta)


# ---------------------------------------------------------------- models that are not plain


class Tagger(nn.Module):
    """Tokens to classes: embeddings tied to a decoder, and a norm with buffers."""

    def __init__(self, tokens):
        super().__init__()
        self.embeddings = nn.Embedding(tokens, 6)
        self.mixer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.decoder = nn.Linear(6, tokens, bias=False)
        self.decoder.weight = self.embeddings.weight
        self.classifier = nn.Linear(6, 3)


def tagger(tokens, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Tagger(tokens)
        with torch.no_grad():
            net.norm.running_var.uniform_(0.5, 2)
            net.norm.num_batches_tracked += seed
    return net


def test_added_rows_tied_tensors_buffers_and_the_head():
    base, model = tagger(10, 1), tagger(12, 2)
    outcome = sc.prune(model, "darex", "sparsity=0.9", base=base, q="dare")
    delta, weights = outcome.delta, outcome.model.state_dict()
    assert delta.tied == {"decoder.weight": "embeddings.weight"}
    assert delta.rows["embeddings.weight"].shape == (2, 6)
    assert same_bits(
        weights["embeddings.weight"][10:], model.state_dict()["embeddings.weight"][10:]
    )
    assert outcome.model.decoder.weight is outcome.model.embeddings.weight
    for name in ("norm.running_var", "norm.num_batches_tracked", "classifier.weight"):
        assert same_bits(weights[name], model.state_dict()[name])
        assert name not in delta.entries
    assert "norm.weight" not in delta.entries, "it is the base's still"
    assert_same(sc.merge(base.state_dict(), delta), weights)


def test_convolutions_have_their_analytic_q_and_wandas_score():
    def net(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()]
            return nn.Sequential(*layers, nn.Linear(64, 3))

    data = [(torch.randn(2, 8, 8), i % 3) for i in range(8)]
    loader = torch.utils.data.DataLoader(data, 4)
    task = sc.classification(net(0), loader, loader)
    for options in ({"q": "analytic", "eta": 0.5}, {"criterion": "wanda"}):
        outcome = sc.prune(net(1), "darex", "sparsity=0.5", task, base=net(0), **options)
        assert outcome.promise.kept
        assert set(outcome.delta.entries) == set(outcome.model.state_dict())


# ---------------------------------------------------------------- refusals


def test_what_it_needs_and_what_it_does_not(base, tuned, digits_task):
    with pytest.raises(InputError, match="base: got None.* darex needs it"):
        sc.prune(tuned, "darex", "sparsity=0.9", digits_task)
    with pytest.raises(InputError, match="base: got a module.*none: magnitude has no use"):
        sc.prune(tuned, "magnitude", "sparsity=0.9", digits_task, base=base)
    for q in ("auto", "output", "validation", "analytic", "learned"):
        with pytest.raises(InputError, match="task: got None.*q=dare, or a number"):
            sc.prune(tuned, "darex", "sparsity=0.9", base=base, q=q)
    with pytest.raises(InputError, match="task: got None"):
        sc.prune(tuned, "darex", "sparsity=0.9", base=base, criterion="wanda")
    with pytest.raises(InputError, match="model: got weights that are all the base's"):
        sc.prune(base, "darex", "sparsity=0.9", base=base)


def test_another_architecture_is_named_by_its_first_difference(base, tuned):
    other = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 16), *tuned[3:])
    with pytest.raises(InputError, match=r"weights 2.weight: got shape \(16, 20\)"):
        sc.prune(other, "darex", "sparsity=0.9", base=base, q="dare", include=("^2",))
    with pytest.raises(InputError, match="base: got no tensor '5.weight'"):
        sc.prune(
            nn.Sequential(*copy.deepcopy(tuned), nn.Linear(10, 4)), "darex", "sparsity=0.9",
            base=base, q="dare",
        )  # fmt: skip


def test_a_comparison_that_no_q_changes_is_refused(encode):
    with pytest.raises(InputError, match="kind: got 'hidden'.*does not reach what 4 is given"):
        encode(include=("^4",), exclude=(), q="output")
    assert encode(include=("^4",), exclude=(), q="output", kind="topk_logits").delta.q > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("q", {"q": 0.0}),
        ("q", {"q": -1}),
        ("q", {"q": "dare", "criterion": "magnitude"}),
        ("q", {"q": "analytic", "criterion": "wanda"}),
        ("scope", {"scope": "layer", "q": "output"}),
        ("eta", {"eta": 0.0}),
        ("gamma", {"gamma": 1.0}),
        ("stop", {"stop": 0.0}),
        ("outliers", {"seeds": 1}),
        ("samples", {"samples": 0}),
        ("top", {"top": 0}),
        ("low", {"low": 0.0}),
        ("high", {"low": 0.5, "high": 0.2}),
        ("step", {"step": 0.0}),
        ("decay", {"decay": 1.0}),
        ("patience", {"patience": -1}),
        ("exclude", {"exclude": ("no_such_tensor",)}),
        ("include", {"include": ("no_such_tensor",)}),
        ("exclude", {"exclude": ("weight", "bias")}),
    ],
)
def test_impossible_options_are_refused(encode, name, options):
    with pytest.raises(InputError, match=name):
        encode(**options)
