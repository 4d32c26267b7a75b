"""Masks: what is removed is zero and stays apart from what is merely zero; one bit a weight.

And the keeper, which holds a model to them while somebody else trains.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateurs.errors import InputError
from secateurs.parts.masks import Masks, named_parameters
from secateurs.state import load_tree, save_tree
from secateurs.training.keeping import MaskKeeper

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


def random_masks(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return Masks({f"w{i}": torch.rand(s, generator=generator) < 0.4 for i, s in enumerate(shapes)})


def equal(one, other):
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


@given(st.lists(shapes, max_size=4), st.integers(0, 99))
def test_packing_and_unpacking_gives_the_masks_back(shapes, seed):
    masks = random_masks(shapes, seed)
    packed = masks.pack()
    assert all(b.numel() == -(-masks[n].numel() // 8) for n, b in packed.items())
    assert all(b.dtype == torch.uint8 for b in packed.values())
    assert equal(Masks.unpack(packed, {n: tuple(m.shape) for n, m in masks.items()}), masks)


def test_unpacking_checks_the_number_of_bits():
    packed = Masks({"w": torch.ones(3, 3, dtype=torch.bool)}).pack()
    with pytest.raises(InputError, match=r"mask w: got 2 bytes; accepted: 3 bytes for"):
        Masks.unpack(packed, {"w": (3, 6)})


def test_counts():
    masks = Masks({"a": torch.tensor([True, False]), "b": torch.zeros(2, 3, dtype=torch.bool)})
    assert (masks.kept, masks.total) == (1, 8)
    assert masks.density == 1 / 8
    assert masks.sparsity == 7 / 8
    assert masks.kept_by_tensor() == {"a": 1, "b": 0}
    assert masks.empty_tensors() == ["b"]
    assert repr(masks) == "Masks(2 tensors, 1 of 8 weights kept)"


def test_no_masks_keep_everything():
    assert Masks({}).density == 1
    Masks({}).apply_({})


@pytest.mark.parametrize("mask", [torch.ones(2), torch.ones(2, dtype=torch.uint8)])
def test_a_mask_that_is_not_bool_is_an_error_not_a_cast(mask):
    with pytest.raises(InputError, match=r"mask w: got torch\.\w+; accepted: a bool tensor"):
        Masks({"w": mask})
    with pytest.raises(InputError, match="a bool tensor"):
        Masks({"w": torch.ones(2, dtype=torch.bool)}).update({"w": mask})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_applying_multiplies(dtype):
    masks = random_masks([(3, 4), (2, 3, 2)], 0)
    weights = {n: torch.randn(m.shape).to(dtype) for n, m in masks.items()}
    expected = {n: torch.where(masks[n], w, torch.zeros((), dtype=dtype)) for n, w in
                weights.items()}  # fmt: skip
    masks.apply_(weights)
    assert all(torch.equal(weights[n], expected[n]) for n in weights)


def test_applying_reaches_tensors_of_several_dtypes_one_after_the_other():
    masks = Masks({"w": torch.tensor([True, False])})
    for dtype in (torch.float32, torch.float64, torch.float32):
        weights = {"w": torch.tensor([1.0, 2.0], dtype=dtype)}
        masks.apply_(weights)
        assert weights["w"].tolist() == [1.0, 0.0]
        assert weights["w"].dtype == dtype


def test_full_masks_change_no_bit():
    weights = {"w": torch.tensor([0.0, -0.0, 1e-45, -3.4e38, float("inf")])}
    before = weights["w"].view(torch.int32).clone()
    Masks.ones_like(weights).apply_(weights)
    assert torch.equal(weights["w"].view(torch.int32), before)


def test_a_kept_weight_may_be_zero():
    masks = Masks({"w": torch.tensor([True, True])})
    masks.apply_({"w": torch.zeros(2)})
    assert masks.kept == 2


def test_updating_takes_effect_although_the_old_masks_were_applied():
    masks = Masks({"w": torch.tensor([True, False])})
    weights = {"w": torch.ones(2)}
    masks.apply_(weights)
    masks.update({"w": torch.tensor([False, True])})
    masks.apply_(weights)
    assert weights["w"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"w": torch.ones(3, dtype=torch.bool)}, r"mask w: got shape \(3,\); accepted: .*\(2,\)"),
        ({"v": torch.ones(2, dtype=torch.bool)}, "masks: got 'v'; accepted: .*: w"),
    ],
)
def test_updating_with_what_does_not_fit_is_refused(masks, message):
    with pytest.raises(InputError, match=message):
        Masks({"w": torch.ones(2, dtype=torch.bool)}).update(masks)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"v": torch.ones(2)}, "masks: got 'w'; accepted: names of parameters: v"),
        ({"w": torch.ones(3)}, r"mask w: got shape \(2,\); accepted: shape \(3,\)"),
    ],
)
def test_checking_against_other_parameters_is_refused(params, message):
    with pytest.raises(InputError, match=message):
        Masks({"w": torch.ones(2, dtype=torch.bool)}).check(params)


def test_a_clone_shares_no_memory():
    masks = Masks({"w": torch.tensor([True, False])})
    clone = masks.clone()
    clone["w"][0] = False
    assert masks["w"].tolist() == [True, False]


def test_gradients_are_masked_where_there_are_any():
    params = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    params["a"].grad = torch.tensor([3.0, 4.0])
    masks = Masks({n: torch.tensor([False, True]) for n in params})
    masks.apply_to_gradients_(params)
    assert params["a"].grad.tolist() == [0.0, 4.0]
    assert params["b"].grad is None


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_moments_of_removed_weights_are_zeroed_and_others_left(make):
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    parameter = nn.Parameter(torch.randn(2, 3))
    optimizer = make([parameter], lr=0.1, **options)
    for _ in range(2):
        parameter.grad = torch.randn(2, 3)
        optimizer.step()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    before = {
        k: v.clone() for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor)
    }
    Masks({"w": mask}).apply_to_state_({"w": parameter}, optimizer)
    after = optimizer.state[parameter]
    moments = [k for k, v in before.items() if v.shape == mask.shape]
    assert moments
    for key in moments:
        assert torch.equal(after[key], before[key] * mask)
    for key in set(before) - set(moments):
        assert torch.equal(after[key], before[key])


def test_named_parameters_finds_tied_ones_under_every_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert named_parameters(model, {"1.weight": None})["1.weight"] is model[0].weight


def test_named_parameters_refuses_a_name_the_model_has_not():
    with pytest.raises(InputError, match=r"masks: got '2\.weight'"):
        named_parameters(nn.Sequential(nn.Linear(2, 2)), {"2.weight": None})


# the keeper

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, 0.1, weight_decay=1e-2),
    "adamw": lambda params: torch.optim.AdamW(params, 0.1, weight_decay=1e-2),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def half(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("0.weight", "2.weight")
    params = named_parameters(model, dict.fromkeys(names))
    return Masks({n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in params.items()})


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gradients", ["masked", "dense"])
@pytest.mark.parametrize("state", ["kept", "zeroed"])
def test_removed_weights_are_exactly_zero_after_every_step(optimizer, gradients, state):
    model = network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    masks = half(model)
    train(model, optimizer, 3)
    keeper = MaskKeeper(model, optimizer, masks, gradients=gradients, optimizer_state=state)
    for step in range(4):
        for name, mask in masks.items():
            assert not keeper.params[name][~mask].any()
            assert keeper.params[name][mask].all()
        train(model, optimizer, 1, first=step)
    assert keeper.step == 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_survivors_train_as_if_the_removed_were_not_there(optimizer):
    model, plain = network(), network()
    masks = half(model)
    kept = OPTIMIZERS[optimizer](model.parameters())
    by_hand = OPTIMIZERS[optimizer](plain.parameters())
    MaskKeeper(model, kept, masks)
    params = named_parameters(plain, masks)
    masks.apply_(params)
    for step in range(4):
        train(model, kept, 1, first=step)
        train(plain, by_hand, 1, first=step)
        with torch.no_grad():
            for name, mask in masks.items():
                params[name].copy_(torch.where(mask, params[name], torch.zeros(())))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gradients", ["masked", "dense"])
def test_gradients_are_masked_or_left_as_asked(gradients):
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks = half(model)
    MaskKeeper(model, optimizer, masks, gradients=gradients)
    train(model, optimizer, 1)
    removed = model[0].weight.grad[~masks["0.weight"]]
    assert bool((removed == 0).all()) == (gradients == "masked")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("state", ["kept", "zeroed"])
def test_moments_are_kept_or_zeroed_as_asked(optimizer, state):
    model = network()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    masks = half(model)
    MaskKeeper(model, optimizer, masks, gradients="dense", optimizer_state=state)
    train(model, optimizer, 2)
    moments = [
        value[~masks["0.weight"]]
        for value in optimizer.state[model[0].weight].values()
        if isinstance(value, torch.Tensor) and value.shape == model[0].weight.shape
    ]
    assert moments
    assert all(bool((m == 0).all()) == (state == "zeroed") for m in moments)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_keeper_resumes_where_it_was(optimizer, tmp_path):
    model = network()
    opt = OPTIMIZERS[optimizer](model.parameters())
    keeper = MaskKeeper(model, opt, half(model))
    train(model, opt, 3)
    save_tree(tmp_path / "keeper", keeper.state_dict())
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    train(model, opt, 3, first=3)

    resumed = network()
    again = OPTIMIZERS[optimizer](resumed.parameters())
    other = MaskKeeper(resumed, again, half(resumed, seed=1))
    resumed.load_state_dict(weights)
    again.load_state_dict(moments)
    other.load_state_dict(load_tree(tmp_path / "keeper"))
    assert other.step == 3
    train(resumed, again, 3, first=3)

    assert equal(other.masks, keeper.masks)
    for one, other_one in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other_one)


def test_a_removed_keeper_lets_go():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    keeper = MaskKeeper(model, optimizer, half(model))
    keeper.remove()
    train(model, optimizer, 1)
    assert model[2].weight.all()
    assert keeper.step == 0


def test_a_keeper_finds_the_optimizer_inside_a_wrapper():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    masks = half(model)
    MaskKeeper(model, Wrapper(Wrapper(optimizer)), masks)
    train(model, optimizer, 1)
    assert not model[0].weight[~masks["0.weight"]].any()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"gradients": "sparse"}, "gradients"),
        ({"optimizer_state": "gone"}, "optimizer_state"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"optimizer": OPTIMIZERS["sgd"](network().parameters())}, "optimizer"),
        ({"masks": Masks({"4.weight": torch.ones(3, 8).bool()})}, "masks"),
        ({"masks": Masks({"2.weight": torch.ones(8, 3).bool()})}, "mask 2.weight"),
    ],
)
def test_a_keeper_refuses_what_does_not_fit(change, argument):
    model = network()
    arguments = {
        "model": model,
        "optimizer": OPTIMIZERS["sgd"](model.parameters()),
        "masks": half(model),
        **change,
    }
    with pytest.raises(InputError) as caught:
        MaskKeeper(**arguments)
    assert caught.value.argument == argument
