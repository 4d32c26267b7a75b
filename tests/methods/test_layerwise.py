"""Magnitude, Wanda and SparseGPT against brute force; what they share: counts, patterns, order."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.calibration.layerwise import Removal, mask_of
from secateurs.calibration.obs import damp
from secateurs.errors import InputError
from secateurs.parts.patterns import NM, Block, Unstructured
from secateurs.registry import create


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model_of(width=8, depth=2):
    torch.manual_seed(0)
    blocks = [Residual(width) for _ in range(depth)]
    return nn.Sequential(nn.Linear(6, width), nn.Sequential(*blocks), nn.Linear(width, 3)).double()


def task_of(model, samples=64):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 6, generator=generator).double()
    data = DataLoader(TensorDataset(inputs, inputs.argmax(1) % 3), 16)
    return sc.classification(model, data, data)


def fed(model, inputs):
    """What every linear layer inside the blocks is given."""
    found = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, n=name: found.update({n: args[0].clone()}))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("1.")
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


def all_inputs(task):
    return torch.cat([x for x, _ in task.train])


def test_only_layers_inside_blocks_are_pruned_and_each_by_the_same_share():
    model = model_of()
    for method in ("magnitude", "wanda", "sparsegpt"):
        outcome = sc.prune(model, method, "sparsity=0.5", task_of(model), samples=64)
        assert set(outcome.masks) == {f"1.{b}.{n}.weight" for b in (0, 1) for n in ("up", "down")}
        assert all(float(m.double().mean()) == 0.5 for m in outcome.masks.values())
        assert torch.equal(outcome.model[0].weight, model[0].weight)
        assert torch.equal(outcome.model[2].weight, model[2].weight)


def test_magnitude_removes_the_smallest_of_every_layer():
    model = model_of()
    outcome = sc.prune(model, "magnitude", "sparsity=0.25", task_of(model))
    for name, mask in outcome.masks.items():
        weight = model.get_parameter(name).abs()
        assert weight[~mask].max() <= weight[mask].min()
        assert int((~mask).sum()) == mask.numel() // 4


def test_wanda_is_its_formula_on_what_the_pruned_prefix_gives():
    model = model_of()
    task = task_of(model)
    outcome = sc.prune(model, "wanda", "sparsity=0.5", task, samples=64)
    # the inputs of a layer are those of the network in which all earlier blocks are pruned, but
    # not yet its own: rebuild block by block
    mixed = copy.deepcopy(model)
    for block in (0, 1):
        inputs = fed(mixed, all_inputs(task))
        for layer in ("up", "down"):
            name = f"1.{block}.{layer}"
            weight = model.get_submodule(name).weight
            score = weight.abs() * inputs[name].square().sum(0).sqrt()
            for row in range(len(weight)):
                order = score[row].argsort(descending=True)
                kept = set(order[: weight.shape[1] // 2].tolist())
                assert set(outcome.masks[f"{name}.weight"][row].nonzero()[:, 0].tolist()) == kept
        mixed[1][block] = outcome.model[1][block]


def brute_sparsegpt(weight, hessian, n, m):
    """2:4 as the paper's algorithm box has it: one column at a time, in float64."""
    weight, inverse = weight.clone(), torch.linalg.inv(damp(hessian).matrix)
    root = torch.linalg.cholesky(inverse, upper=True)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % m == 0:
            costs = weight[:, j : j + m].square() / root.diagonal()[j : j + m].square()
            mask[:, j : j + m] = NM(n, m).mask(costs)
        error = weight[:, j] / root[j, j] * ~mask[:, j]
        weight[:, j:] -= error[:, None] * root[j, j:]
    return weight * mask, mask


def test_sparsegpt_is_its_algorithm_box():
    model = model_of(depth=1)
    task = task_of(model)
    outcome = sc.prune(model, "sparsegpt", "2:4", task, samples=64)
    inputs = fed(model, all_inputs(task))["1.0.up"]
    weight, mask = brute_sparsegpt(model[1][0].up.weight, 2 * inputs.T @ inputs / 64, 2, 4)
    assert torch.equal(outcome.masks["1.0.up.weight"], mask)
    assert torch.allclose(outcome.model[1][0].up.weight, weight, atol=1e-8)


def test_sparsegpt_loses_less_of_the_output_than_wanda_and_wanda_less_than_magnitude():
    model = model_of(width=32, depth=1)
    with torch.no_grad():  # inputs of unlike sizes, as language models have them
        model[1][0].norm.weight.copy_(torch.linspace(-2, 2, 32).exp())
    task = task_of(model, samples=512)
    inputs = all_inputs(task)
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        options = {} if method == "magnitude" else {"samples": 512}
        outcome = sc.prune(model, method, "sparsity=0.6", task, **options)
        with torch.no_grad():
            errors[method] = float((outcome.model(inputs) - model(inputs)).square().mean())
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    share=st.floats(0, 1),
    scope=st.sampled_from(["row", "matrix"]),
)
def test_counts_are_exact_and_rows_differ_by_one_at_most(rows, columns, share, scope):
    scores = torch.rand(1, rows, columns)
    keep = round(share * rows * columns)
    mask = mask_of(scores, Removal(keep, Unstructured()), scope)
    assert int(mask.sum()) == keep
    if scope == "row":
        counts = mask.sum(-1).flatten()
        assert int(counts.max() - counts.min()) <= 1


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 4), m=st.sampled_from([4, 8]), rows=st.integers(1, 5))
def test_every_group_of_m_keeps_its_n_largest(n, m, rows):
    scores = torch.randint(0, 5, (rows, 3 * m)).float()
    mask = NM(n, m).mask(scores)
    order = scores.reshape(-1, m).argsort(dim=1, descending=True, stable=True)[:, :n]
    wanted = torch.zeros(3 * rows, m, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(mask.reshape(-1, m), wanted)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_blocks_of_weights_go_as_one(method):
    model = model_of()
    outcome = sc.prune(model, method, "sparsity=0.5", task_of(model, 128), pattern="block:2x4")
    pattern = Block(2, 4)
    for mask in outcome.masks.values():
        tiles = pattern.pool(mask.float())
        assert set(tiles.tolist()) <= {0.0, 1.0}
    assert outcome.unit == 8


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.wide(torch.relu(self.conv(self.norm(x))))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_groups_of_a_convolution_run_along_its_channels(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Sequential(Convolutions(), Convolutions()), nn.Flatten(),
        nn.Linear(8 * 16, 3),
    ).eval()  # fmt: skip
    inputs = torch.randn(32, 1, 6, 6)
    data = DataLoader(TensorDataset(inputs, torch.randint(0, 3, (32,))), 16)
    outcome = sc.prune(
        model, method, "2:4", sc.classification(model, data, data), samples=32
    )  # fmt: skip
    for mask in outcome.masks.values():
        assert torch.equal(
            mask.unflatten(1, (-1, 4)).sum(2), torch.full((8, mask.shape[1] // 4, 3, 3), 2)
        )
    assert len(outcome.masks) == 4


def test_a_layer_that_no_input_reaches_is_named():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(6)
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

        def forward(self, x):
            return x + self.experts[0](self.norm(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(Mixture(), Mixture()), nn.Linear(6, 3)).double()
    outcome = sc.prune(model, "wanda", "sparsity=0.5", task_of(model), samples=64)
    assert [n for n in outcome.notes if "no calibration input" in n] == [
        f"0.{b}.experts.1.weight: no calibration input reached it; pruned by magnitude"
        for b in range(2)
    ]
    assert outcome.masks.sparsity == 0.5


def test_fused_attention_is_left_dense_and_said_to_be():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
    inputs = torch.randn(32, 5, 6)
    data = DataLoader(TensorDataset(inputs, torch.randint(0, 3, (32, 5))), 16)
    task = sc.language_modelling(model, data, data)
    outcome = sc.prune(model, "wanda", "sparsity=0.5", task, samples=32)
    assert any("their inputs cannot be seen" in note for note in outcome.notes)
    assert not any("in_proj" in name for name in outcome.masks)
    missed = [note for note in outcome.notes if "no calibration input" in note]
    assert [note.partition(":")[0][-15:] for note in missed] == ["out_proj.weight"] * 2


def test_every_weight_of_an_attention_with_several_is_pruned():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)

    torch.manual_seed(0)
    outcome = sc.prune(nn.Sequential(Attending(), Attending()), "magnitude", "sparsity=0.5")
    own = [f"{n}_proj_weight" for n in "qkv"]
    names = {f"{b}.attention.{n}" for b in (0, 1) for n in (*own, "out_proj.weight")}
    assert set(outcome.masks) == names
    assert all(float(m.double().mean()) == 0.5 for m in outcome.masks.values())


def test_bad_input_is_refused():
    model, task = model_of(), task_of(model_of(), samples=40)
    with pytest.raises(InputError, match="samples: got 64; accepted: at most 40"):
        sc.prune(model, "wanda", "sparsity=0.5", task, samples=64)
    with pytest.raises(InputError, match="task"):
        sc.prune(model, "wanda", "sparsity=0.5")
    with pytest.raises(InputError, match="budget"):
        sc.prune(model, "wanda", "3:5", task, samples=40)
    with pytest.raises(InputError, match="samples"):
        create("wanda", {"samples": 0})
    with pytest.raises(InputError, match="damping"):
        create("sparsegpt", {"damping": -1})
    broken = model_of()
    with torch.no_grad():
        broken[1][0].up.weight[0, 0] = math.nan
    with pytest.raises(InputError, match=r"1\.0\.up.*NaN"):
        sc.prune(broken, "magnitude", "sparsity=0.5")


def test_groups_of_n_m_run_along_the_inputs_of_a_layer_that_stores_its_transpose():
    """GPT-2's layers are (inputs, outputs): 9 outputs are no obstacle, 9 inputs are."""
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(*(nn.Sequential(conv(9, 8), nn.ReLU(), conv(8, 9)) for _ in range(2)))
    outcome = sc.prune(model, "magnitude", "2:4", recover=False)
    assert set(outcome.masks) == {"0.0.weight", "1.0.weight"}
    for name, mask in outcome.masks.items():
        inputs_last = mask.t().reshape(9, 2, 4)
        assert bool((inputs_last.sum(-1) == 2).all()), name
    assert any("left dense, 4 does not divide" in note for note in outcome.notes)
