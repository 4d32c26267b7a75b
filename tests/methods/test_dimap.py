"""DIMAP's score against its double loop, its modules, its exact counts."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.weights.dimap import (
    cumulative_magnitude,
    default_modules,
    given_modules,
    module_prune,
)
from secateurs.parts.prunable import prunable_parameters

DOUBLE = torch.float64


def score(weight, module="mlp"):
    return cumulative_magnitude({module: {"w": weight}})[module]["w"]


@pytest.mark.parametrize("weights", [[3.0, 2, 1], [3.0, -2, 1], [30.0, 20, 10]])
def test_worked_example(weights):
    expected = torch.tensor([1, 4 / 13, 1 / 14], dtype=DOUBLE)
    assert torch.allclose(score(torch.tensor([weights])), expected[None], atol=1e-15)


@settings(deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=20))
def test_the_score_is_the_double_loop_and_orders_by_magnitude(values):
    weight = torch.tensor([values], dtype=DOUBLE)
    found = score(weight)[0]
    n = len(values)
    for j in range(n):
        # among equal ones the sum is over the later
        at_least = [
            values[i] ** 2
            for i in range(n)
            if abs(values[i]) > abs(values[j]) or (abs(values[i]) == abs(values[j]) and i >= j)
        ]
        expected = values[j] ** 2 / sum(at_least) if values[j] else 0.0
        assert float(found[j]) == pytest.approx(expected, abs=1e-10)
    if any(values):
        assert float(found.max()) == 1
    for i in range(n):
        for j in range(n):
            if abs(values[i]) > abs(values[j]):
                assert found[i] > found[j]


def test_score_order_is_magnitude_order():
    weight = torch.randn(40, 25, generator=torch.Generator().manual_seed(0))
    assert torch.equal(score(weight).flatten().argsort(), weight.abs().flatten().argsort())


def test_scale_does_not_matter_to_it_as_it_does_to_global_magnitude():
    layers = {"a": torch.tensor([[3.0, 2, 1]]), "b": torch.tensor([[30.0, 20, 10]])}
    masks, thresholds = module_prune({"mlp": layers}, 1 / 3)
    assert masks["a"].tolist() == masks["b"].tolist() == [[True, True, False]]
    assert thresholds["mlp"] == pytest.approx(1 / 14)


def test_an_all_zero_layer_scores_zero_and_goes_first():
    layers = {"a": torch.tensor([[3.0, 2, 1]]), "z": torch.zeros(1, 3)}
    assert not cumulative_magnitude({"mlp": layers})["mlp"]["z"].any()
    masks, _ = module_prune({"mlp": layers}, 0.5)
    assert masks["a"].all()
    assert not masks["z"].any()


def drawn_modules(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "qkv": {"0.q": matrix(4, 7), "1.q": matrix(4, 9)},
        "mlp": {"0.up": matrix(3, 11), "1.up": matrix(5, 5)},
    }


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 0.99), st.sampled_from(["module", "layer", "model"]), st.booleans())
def test_counts_are_exact_also_among_equal_weights(ratio, scope, equal):
    modules = drawn_modules()
    if equal:
        modules = {m: {n: torch.ones_like(w) for n, w in own.items()} for m, own in modules.items()}
    masks, _ = module_prune(modules, ratio, scope)

    def cut(names):
        return sum(int((~masks[n]).sum()) for n in names)

    def size(names):
        return sum(masks[n].numel() for n in names)

    groups = {
        "module": [list(own) for own in modules.values()],
        "layer": [[n] for n in masks],
        "model": [list(masks)],
    }[scope]
    for names in groups:
        assert cut(names) == int(ratio * size(names) + 1e-9)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 0.95))
def test_no_layer_is_emptied_while_there_are_as_many_weights_as_layers(ratio):
    modules = drawn_modules()
    masks, _ = module_prune(modules, ratio)
    for own in modules.values():
        if sum(int(masks[n].sum()) for n in own) >= len(own):
            assert all(bool(masks[n].any()) for n in own)


def lamp(weights, keep):
    """Lee et al. (2010.07611), a weight at a time: w² over those of its layer not below it."""
    scored = []
    for name, weight in weights.items():
        left = 0.0
        for place, value in sorted(enumerate(weight.flatten().tolist()), key=lambda p: -abs(p[1])):
            left += value**2
            scored.append((value**2 / left, name, place))
    chosen = {(name, place) for _, name, place in sorted(scored, reverse=True)[:keep]}
    return {n: [(n, i) in chosen for i in range(w.numel())] for n, w in weights.items()}


def test_the_whole_model_as_one_module_is_lamp(trained):
    ours = sc.prune(trained, "dimap", "sparsity=0.8", scope="model")
    wanted = lamp({n: trained.get_parameter(n).detach() for n in ours.masks}, ours.masks.kept)
    assert ours.masks.kept == round(0.2 * ours.masks.total)
    for name, mask in ours.masks.items():
        assert mask.flatten().tolist() == wanted[name], name


def test_layer_scope_is_uniform_magnitude(trained):
    ours = sc.prune(trained, "dimap", "sparsity=0.75", scope="layer")
    uniform = sc.prune(trained, "magnitude", "sparsity=0.75")
    for name, mask in ours.masks.items():
        assert torch.equal(mask, uniform.masks[name])


def test_separate_queries_keys_and_values_are_scored_as_the_fused_matrix():
    generator = torch.Generator().manual_seed(0)
    parts = {
        f"{block}.attn.{c}.weight": scale * torch.randn(6, 6, generator=generator)
        for block in "01"
        for c, scale in zip("qkv", (1.0, 3.0, 0.3), strict=True)
    }
    whole = {
        f"{b}.attn.qkv.weight": torch.cat([parts[f"{b}.attn.{c}.weight"] for c in "qkv"])
        for b in "01"
    }
    separate, one = module_prune({"qkv": parts}, 0.5)
    fused, other = module_prune({"qkv": whole}, 0.5)
    assert one == other
    for block in "01":
        joined = torch.cat([separate[f"{block}.attn.{c}.weight"] for c in "qkv"])
        assert torch.equal(joined, fused[f"{block}.attn.qkv.weight"])
    # and that differs from three layers on their own
    apart, _ = module_prune({"mlp": parts}, 0.5)
    assert any(not torch.equal(apart[n], separate[n]) for n in parts)


IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def timm_swin():
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    return pytest.importorskip("timm").create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, num_classes=5, **sizes
    )


def transformers_swin():
    tf = pytest.importorskip("transformers")
    config = tf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return tf.SwinForImageClassification(config)


def torchvision_swin():
    models = pytest.importorskip("torchvision.models.swin_transformer")
    return models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4])


@pytest.mark.parametrize("make", [timm_swin, transformers_swin, torchvision_swin])
@pytest.mark.parametrize("inputs", [IMAGE, None], ids=["seen", "by name"])
def test_the_modules_of_a_swin(make, inputs):
    model = make()
    params = prunable_parameters(model)
    modules = default_modules(params, model, inputs)
    assert list(modules) == ["qkv", "proj", "mlp"]
    # widths 16 and 32, two blocks each: 3 d², d² and 8 d² a block
    squares = 2 * (16**2 + 32**2)
    sizes = {m: sum(p.numel() for p in own.values()) for m, own in modules.items()}
    assert sizes == {"qkv": 3 * squares, "proj": squares, "mlp": 8 * squares}
    aux = set(params).difference(*modules.values())
    assert len(aux) == 3, "patch embedding, patch merging and the head"


def test_what_is_excluded_does_not_change_what_the_others_are():
    model = timm_swin()
    params = prunable_parameters(model, exclude=("attn.proj",))
    modules = default_modules(params, model, IMAGE)
    whole = default_modules(prunable_parameters(model), model, IMAGE)
    assert modules == {m: own for m, own in whole.items() if m != "proj"}


@pytest.mark.parametrize("make", [timm_swin, transformers_swin])
def test_aux_is_never_touched_and_ratio_0_changes_nothing(make):
    model = make().eval()
    dense = copy.deepcopy(model.state_dict())
    none = sc.prune(model, "dimap", "sparsity=0")
    assert none.masks.density == 1
    for name, value in none.model.state_dict().items():
        assert torch.equal(value, dense[name])
    outcome = sc.prune(model, "dimap", "sparsity=0.9")
    assert any("relative_position_bias_table" in n for n in dense)
    for name, value in outcome.model.state_dict().items():
        if name not in outcome.masks:
            assert torch.equal(value, dense[name]), name
    for row in outcome.tables["modules"]:
        assert row["total"] - row["kept"] == int(0.9 * row["total"])


def test_a_model_without_attention_is_one_module(trained):
    outcome = sc.prune(trained, "dimap", "density=0.3")
    [row] = outcome.tables["modules"]
    assert row["module"] == "mlp"
    assert row["layers"] == 3
    assert outcome.promise.kept


def test_modules_of_ones_own_and_what_is_refused(trained):
    own = {"first": (r"^0\.",), "rest": (r"^2\.",)}
    outcome = sc.prune(trained, "dimap", "sparsity=0.5", modules=own)
    assert [r["module"] for r in outcome.tables["modules"]] == ["first", "rest"]
    assert list(outcome.masks) == ["0.weight", "2.weight"]
    assert outcome.notes == ["left dense: 4.weight"]
    for bad, match in [
        ({"a": ("no such",)}, "modules a: got .'no such'.; accepted: patterns of some of 0.weight"),
        ({"a": ("0",), "b": ("weight",)}, "modules b.*one module for 0.weight, which is in a too"),
    ]:
        with pytest.raises(InputError, match=match):
            sc.prune(trained, "dimap", "sparsity=0.5", modules=bad)
    conv = {"c.weight": nn.Parameter(torch.randn(2, 2, 3, 3))}
    with pytest.raises(InputError, match="modules qkv: got c.weight of shape .*matrices"):
        given_modules(conv, {"qkv": ("c",)})
    assert given_modules(conv, {"mlp": ("c",)}) == {"mlp": conv}
    with pytest.raises(InputError, match="ratio mlp"):
        module_prune({"mlp": {"w": torch.ones(2, 2)}}, 1.0)


def test_own_ratios_of_modules_leave_the_rest_of_the_budget_to_the_others(trained):
    own = {"first": (r"^0\.",), "rest": (r"^[24]\.",)}
    options = {"modules": own, "ratios": {"rest": 0.25}}
    outcome = sc.prune(trained, "dimap", "sparsity=0.5", **options)
    assert outcome.promise.kept
    first, rest = outcome.tables["modules"]
    assert rest["total"] - rest["kept"] == int(0.25 * 672)
    assert first["total"] - first["kept"] == int(0.5 * 2720 - 0.25 * 672)
    with pytest.raises(InputError, match="ratios"):
        sc.prune(trained, "dimap", "sparsity=0.9", modules=own, ratios={"first": 0.1})
    with pytest.raises(InputError, match="ratios: got 'second'"):
        sc.prune(trained, "dimap", "sparsity=0.9", modules=own, ratios={"second": 0.1})
    with pytest.raises(InputError, match="ratios"):
        sc.prune(trained, "dimap", "sparsity=0.9", ratios={"mlp": 1.0})


def test_masked_weights_stay_zero_through_momentum_and_decay(digits_task, trained):
    recipe = sc.TrainSettings(steps=20, lr=0.1, momentum=0.9, weight_decay=0.1)
    task = replace(digits_task, finetuning=recipe)
    outcome = sc.prune(trained, "dimap", "sparsity=0.8", task)
    for name, mask in outcome.masks.items():
        assert not bool(outcome.model.get_parameter(name)[~mask].any())
        assert not torch.equal(outcome.model.get_parameter(name), trained.get_parameter(name))
