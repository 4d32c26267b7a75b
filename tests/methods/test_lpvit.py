"""LPViT against its formulas written out, and against what the card says it must do."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.weights.lpvit import LPViT, distortion, gradients, layer_blocks
from secateurs.parts.costs import count_macs
from secateurs.parts.patterns import Block
from secateurs.zoo.catalog import make_task


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def blocks_of(weight, gradients, block):
    """From one gradient a mini-batch."""
    tiles = Block(*block)
    sizes = tiles.unit_sizes(weight.shape)
    changes = torch.stack([tiles.pool(weight * g) * sizes for g in gradients])
    return layer_blocks(weight, torch.stack(list(gradients)).mean(0), changes, tiles)


def curve_of(weight, gradients, block, kind="fisher", **options):
    """D at every number of removed blocks, and the blocks in the order in which they go."""
    made = blocks_of(weight, gradients, block)
    order = made.first_to_go("taylor")
    removed = torch.arange(len(order) + 1)
    return distortion(made, removed, order, kind, **options), order


def after_removal(weight, order, count, block):
    """δ when the first `count` blocks have gone."""
    tiles = Block(*block)
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[order[:count]] = False
    return weight * tiles.expand(kept, weight.shape) - weight


def test_the_worked_example_of_the_card():
    weight = torch.tensor([[1.0, 2], [3, 4]], dtype=torch.float64)
    ones = [torch.ones(2, 2, dtype=torch.float64)]
    loss, order = curve_of(weight, ones, (1, 1), "mean-grad", damping=0.0)
    assert order.tolist() == [0, 1, 2, 3]
    assert float(loss[0]) == 0
    assert float(loss[2]) == pytest.approx(5 / 4 + 4.5, abs=1e-14)
    first, _ = curve_of(weight, ones, (1, 1), "mean-grad", terms=1)
    assert float(first[2]) == pytest.approx(5 / 4, abs=1e-14)
    fisher, _ = curve_of(weight, ones, (1, 1), "fisher")
    assert float(fisher[2]) == pytest.approx(4.5, abs=1e-14)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5),
    st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_the_curves_are_those_of_the_formulas(rows, cols, high, wide, batches, seed):
    weight, damping = drawn(rows, cols, seed=seed), 0.3
    slopes = [drawn(rows, cols, seed=seed + 1 + s) for s in range(batches)]
    mean = sum(slopes) / batches
    fisher, order = curve_of(weight, slopes, (high, wide))
    rank_one, _ = curve_of(weight, slopes, (high, wide), "mean-grad", damping=damping)
    for count in range(len(order) + 1):
        delta = after_removal(weight, order, count, (high, wide))
        expected = sum(float((delta * g).sum()) ** 2 for g in slopes) / 2 / batches
        assert float(fisher[count]) == pytest.approx(expected, abs=1e-11)
        flat, g = delta.flatten(), mean.flatten()
        hessian = torch.outer(g, g) + damping * torch.eye(len(g), dtype=torch.float64)
        expected = (delta * mean).square().mean() + flat @ hessian @ flat / 2
        assert float(rank_one[count]) == pytest.approx(float(expected), abs=1e-11)


def test_the_second_term_may_be_taken_step_by_step():
    """What the released code is after: D_new − D_old = 1/2 (2 old + step) · step."""
    weight, slopes = drawn(8, 12), [drawn(8, 12, seed=1)]
    both, order = curve_of(weight, slopes, (2, 3), "mean-grad", damping=0.0)
    squares, _ = curve_of(weight, slopes, (2, 3), "mean-grad", terms=1)
    old = running = 0.0
    for count in range(1, len(order) + 1):
        delta = after_removal(weight, order, count, (2, 3))
        step = float((delta * slopes[0]).sum()) - old
        running += (2 * old + step) * step / 2
        old += step
        assert float(both[count] - squares[count]) == pytest.approx(running, abs=1e-12)


def test_ragged_blocks_are_averaged_over_what_is_there():
    weight, slope = drawn(50, 30), drawn(50, 30, seed=1)
    made = blocks_of(weight, [slope], (16, 16))
    assert len(made.sizes) == 4 * 2
    assert made.sizes.tolist() == [256, 224] * 3 + [32, 28]
    assert float(made.taylor[-1]) == pytest.approx(
        float((weight * slope)[48:, 16:].abs().mean()), abs=1e-14
    )
    assert float(made.l1[1]) == pytest.approx(float(weight[:16, 16:].abs().mean()), abs=1e-14)
    mask = Block(16, 16).expand(torch.tensor([True] * 7 + [False]), weight.shape)
    assert mask.shape == (50, 30)
    assert int((~mask).sum()) == 28


def test_gradients_are_of_the_mean_square_of_all_logits():
    """In closed form for one linear layer: d/dW mean(f²) = 2/(N C) Σ f xᵀ."""
    model = nn.Linear(5, 3).double().train()
    x = drawn(8, 5)
    data = DataLoader(TensorDataset(x, torch.zeros(8, dtype=torch.long)), 8)
    task = sc.classification(model, data, data)
    [found] = gradients(model, {"weight": model.weight}, task, [x])
    expected = 2 / 24 * model(x).T @ x
    assert torch.allclose(found["weight"], expected, atol=1e-14)
    assert model.weight.grad is None
    assert model.training


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dropout_is_active_in_training_mode_only_and_drawn_from_the_seed(mode):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    x = torch.randn(8, 5)
    data = DataLoader(TensorDataset(x, torch.zeros(8, dtype=torch.long)), 8)
    task = sc.classification(model, data, data)
    params = {"1.weight": model[1].weight}

    def found(seed):
        before = torch.get_rng_state()
        [made] = gradients(model, params, task, [x], mode, seed)
        assert torch.equal(before, torch.get_rng_state())
        return made["1.weight"]

    assert torch.equal(found(0), found(0))
    assert torch.equal(found(0), found(1)) == (mode == "eval")


@pytest.mark.parametrize("budget", ["macs=1", "density=1", "sparsity=0"])
@pytest.mark.parametrize("solver", ["lagrangian", "slope"])
def test_a_full_budget_prunes_nothing(digits_task, trained, budget, solver):
    outcome = sc.prune(trained, "lpvit", budget, digits_task, recover=False, solver=solver)
    assert outcome.masks.density == 1
    x = digits_task.example_inputs
    assert torch.equal(outcome.model(x), trained(x))


@pytest.mark.parametrize("curve", ["fisher", "mean-grad"])
@pytest.mark.parametrize("solver", ["lagrangian", "slope"])
@pytest.mark.parametrize("budget", ["macs=0.6", "sparsity=0.4", "macs=1500"])
def test_the_budget_is_met_and_every_layer_keeps_its_share(
    digits_task, trained, curve, solver, budget
):
    options = {"curve": curve, "solver": solver, "block": (4, 4), "min_keep": 0.1, "power": False}
    outcome = sc.prune(trained, "lpvit", budget, digits_task, recover=False, **options)
    if solver == "lagrangian":
        # one block of 16 weights, each used once a sample
        unit = 16 / outcome.masks.total if budget.startswith("sparsity") else 16
        assert outcome.promise.tolerance == pytest.approx(unit)
        assert outcome.promise.kept
    if budget.startswith("macs"):
        assert outcome.promise.reached == outcome.after.effective_macs
    for row in outcome.tables["blocks"]:
        assert row["kept"] >= max(1, 0.1 * row["total"])
        mask = outcome.masks[row["weight"]]
        stay = Block(4, 4).pool(mask.float()) > 0
        assert int(stay.sum()) == row["kept"]
        assert torch.equal(Block(4, 4).expand(stay, mask.shape), mask)


def test_the_head_counts_once_not_once_a_class(digits_task, trained):
    macs = count_macs(trained, digits_task.example_inputs)
    assert macs["4"] == 16 * 10
    outcome = sc.prune(trained, "lpvit", "macs=0.5", digits_task, recover=False, block=(4, 4))
    row = next(r for r in outcome.tables["blocks"] if r["weight"] == "4.weight")
    assert row["share of cost"] == pytest.approx(160 / (64 * 32 + 32 * 16 + 160))


class Twice(nn.Module):
    """Two layers of the same weights, one of which sees every sample twice."""

    def __init__(self):
        super().__init__()
        self.once, self.twice = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.twice.load_state_dict(self.once.state_dict())

    def forward(self, x):
        pair = torch.stack([x, torch.zeros_like(x)], 1)  # the second adds cost, no gradient
        return self.once(x) + self.twice(pair).sum(1)


def test_of_two_equal_layers_the_one_with_more_tokens_loses_more():
    torch.manual_seed(0)
    model = Twice()
    data = DataLoader(TensorDataset(torch.randn(64, 16), torch.zeros(64).long()), 16)
    task = sc.classification(model, data, data)
    for budget in ("macs=0.9", "macs=0.7", "macs=0.5", "macs=0.3"):
        options = {"block": (2, 2), "power": False, "recover": False}
        outcome = sc.prune(model, "lpvit", budget, task, **options)
        once, twice = (int(m.sum()) for m in outcome.masks.values())
        assert list(outcome.masks) == ["once.weight", "twice.weight"]
        assert twice < once, budget


def test_masked_weights_stay_zero_through_momentum_and_decay(digits_task, trained):
    recipe = sc.TrainSettings(steps=20, lr=0.1, momentum=0.9, weight_decay=0.1)
    task = replace(digits_task, finetuning=recipe)
    outcome = sc.prune(trained, "lpvit", "sparsity=0.5", task, block=(4, 4))
    for name, mask in outcome.masks.items():
        assert not bool(outcome.model.get_parameter(name)[~mask].any())
        assert not torch.equal(outcome.model.get_parameter(name), trained.get_parameter(name))


def test_distillation_lets_the_dense_model_teach(digits_task, trained):
    arms = {
        share: sc.prune(
            trained, "lpvit", "sparsity=0.5", digits_task, block=(4, 4), distillation=share
        )
        for share in (0.0, 0.5)
    }
    one, other = arms.values()
    for name, mask in one.masks.items():
        assert torch.equal(mask, other.masks[name])
        assert not torch.equal(one.model.get_parameter(name), other.model.get_parameter(name))


def test_final_masks_by_magnitude_keep_as_many_blocks_but_others(digits_task, trained):
    options = {"block": (4, 4), "recover": False}
    taylor = sc.prune(trained, "lpvit", "sparsity=0.5", digits_task, **options)
    l1 = sc.prune(trained, "lpvit", "sparsity=0.5", digits_task, final="l1", **options)
    kept = [[r["kept"] for r in o.tables["blocks"]] for o in (taylor, l1)]
    assert kept[0] == kept[1]
    name = "0.weight"
    assert not torch.equal(taylor.masks[name], l1.masks[name])
    scores = Block(4, 4).pool(trained.get_parameter(name).detach().abs())
    stays = Block(4, 4).pool(l1.masks[name].float()) > 0
    assert float(scores[stays].min()) >= float(scores[~stays].max())


def energy_of(outcome, passes):
    """Energy of the surviving products, in the released code's terms."""
    return sum(
        r["kept"] * passes[r["weight"]] for r in outcome.tables["blocks"] if r["weight"] in passes
    )


def test_power_moves_the_budget_to_products_that_take_little_energy(digits_task, trained):
    passes = {"0.weight": 4, "2.weight": 2, "4.weight": 1}
    options = {"block": (4, 4), "recover": False}
    arms = {
        arm: sc.prune(trained, "lpvit", "macs=0.6", digits_task, **own, **options)
        for arm, own in {
            "power": {},
            "none": {"power": False},
            "released": {"legacy_power_sign": True},
        }.items()
    }
    energy = {arm: energy_of(outcome, passes) for arm, outcome in arms.items()}
    assert energy["power"] < energy["none"] <= energy["released"]


def test_a_measured_table_takes_the_place_of_the_released_model(digits_task, trained, tmp_path):
    path = tmp_path / "energy.json"
    # the 64-wide layer is almost free, the 16-wide one dear
    rows = [
        {"rows": 4, "cols": 4, "width": w, "energy": e} for w, e in [(64, 0.01), (32, 1), (16, 99)]
    ]
    path.write_text(json.dumps({"unit": "nJ", "blocks": rows}))
    options = {"block": (4, 4), "recover": False}
    plain = sc.prune(trained, "lpvit", "macs=0.6", digits_task, power=False, **options)
    dear = sc.prune(trained, "lpvit", "macs=0.6", digits_task, energy=str(path), **options)
    assert int(dear.masks["4.weight"].sum()) < int(plain.masks["4.weight"].sum())
    with pytest.raises(InputError, match="block: got '8x8'; accepted: a measured one: 4x4"):
        sc.prune(trained, "lpvit", "macs=0.6", digits_task, energy=str(path), block=(8, 8))


def test_convolutions_are_pruned_as_matrices_and_head_and_patches_with_them():
    task = make_task("zoo:vit-tiny?depth=2&dim=16&hidden=32", "digits")
    model = task.fresh_model(0)
    outcome = sc.prune(
        model, "lpvit", "macs=0.7", task, block=(4, 2), recover=False, samples=64, batch=16
    )
    assert outcome.promise.kept
    patches = outcome.masks["patches.weight"]
    assert patches.shape == (16, 1, 2, 2)
    # 4x2 blocks of the (16, 1 · 2 · 2) matrix
    whole = patches.reshape(4, 4, 2, 2).float().mean((1, 3))
    assert bool(((whole == 0) | (whole == 1)).all())
    assert "classifier.weight" in outcome.masks


def test_layers_that_no_pass_reaches_or_a_block_covers_stay_dense_with_a_note():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)
            self.small = nn.Linear(16, 4)

        def forward(self, x):
            return self.small(self.used(x))

    data = DataLoader(TensorDataset(torch.randn(8, 16), torch.zeros(8).long()), 4)
    model = Model()
    task = sc.classification(model, data, data)
    outcome = sc.prune(model, "lpvit", "sparsity=0.5", task, block=(4, 16), recover=False)
    assert list(outcome.masks) == ["used.weight"]
    assert "left dense, no forward pass reaches them: idle.weight" in outcome.notes
    assert "left dense, one block of 4x16 or less: small.weight" in outcome.notes


def test_what_cannot_be_is_refused(digits_task, trained):
    for options, match in [
        ({"block": (128, 128)}, "block: got '128x128'; accepted: a block smaller than some matrix"),
        ({"min_keep": 0.6}, "budget: got 'sparsity=0.5'; accepted: at least 0.7 kept"),
    ]:
        with pytest.raises(InputError, match=match):
            sc.prune(trained, "lpvit", "sparsity=0.5", digits_task, **options)
    with pytest.raises(InputError, match="task"):
        sc.prune(trained, "lpvit", "sparsity=0.5")
    for options in (
        {"block": (0, 4)}, {"points": 1}, {"smooth": 1.0}, {"stencil": 3}, {"tolerance": 0.0},
        {"min_keep": 2.0}, {"samples": 0}, {"batch": 0}, {"distillation": 2.0},
        {"temperature": 0.0}, {"damping": -1.0},
    ):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(options))):
            LPViT(**options)


def test_a_model_whose_outputs_do_not_depend_on_its_weights_is_refused():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            return self.layer(x).detach() + x.requires_grad_(True)

    data = DataLoader(TensorDataset(torch.randn(8, 32), torch.zeros(8).long()), 4)
    model = Deaf()
    task = sc.classification(model, data, data)
    with pytest.raises(InputError, match="outputs without a gradient"):
        sc.prune(model, "lpvit", "sparsity=0.5", task)
