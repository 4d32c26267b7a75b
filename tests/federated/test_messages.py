"""Arrays hold what is kept, no more; masks and their changes come back as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("flwr")

from secateurs.errors import InputError
from secateurs.federated.candidates import candidate_of, pool_of
from secateurs.federated.messages import (
    BITS,
    INDICES,
    Layout,
    arrays_of,
    config_of,
    content,
    metrics_of,
    size_of,
    weighted_mean,
)
from secateurs.parts.masks import Masks
from secateurs.state import model_state

MASKED = ("3.weight", "7.weight")


def random_masks(layout, density, seed):
    generator = torch.Generator().manual_seed(seed)
    return layout.shaped(torch.rand(layout.total, generator=generator) < density)


@pytest.fixture
def state(net):
    return model_state(net)


@pytest.fixture
def layout(state):
    return Layout.of(state, dict.fromkeys(MASKED))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_a_state_comes_back_with_zeros_where_the_masks_have_none(state, layout, density):
    masks = random_masks(layout, density, 1)
    masks.apply_({n: state[n] for n in MASKED})
    arrays = layout.pack(state, masks)
    assert arrays["values"].numel() == masks.kept
    back = layout.unpack(arrays, masks)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype


@given(st.floats(0, 1), st.integers(0, 50))
def test_masks_and_changes_come_back(density, seed):
    layout = Layout({"a": torch.Size([7, 9]), "b": torch.Size([130])}, {}, {}, torch.float32)
    one, two = random_masks(layout, density, seed), random_masks(layout, density, seed + 1)
    assert torch.equal(layout.flat(layout.unpack_mask(layout.pack_mask(one))), layout.flat(one))
    changed = layout.changed(one, layout.pack_change(one, two))
    assert torch.equal(layout.flat(changed), layout.flat(two))


def test_a_mask_takes_the_smaller_form(layout):
    """Four bytes an index pay below a density of 1/32; a dense model needs no mask at all."""
    assert INDICES in layout.pack_mask(random_masks(layout, 0.02, 0))
    assert BITS in layout.pack_mask(random_masks(layout, 0.2, 0))
    assert layout.pack_mask(random_masks(layout, 1.0, 0)) == {}


def test_candidates_are_the_largest_weights_of_each_layer_and_nested(state, layout):
    counts = torch.tensor([[10, 5], [20, 3], [1, 192]])
    pool = pool_of(layout, state, counts)
    assert pool["ranked"].numel() == 20 + 192
    for number, kept in enumerate(counts.tolist()):
        made, masks = candidate_of(layout, pool, number)
        for name, count in zip(MASKED, kept, strict=True):
            order = state[name].flatten().abs().argsort(descending=True)
            expected = torch.zeros(state[name].numel(), dtype=torch.bool)
            expected[order[:count]] = True
            assert torch.equal(masks[name].flatten(), expected)
            assert torch.equal(made[name], state[name] * masks[name])
        assert torch.equal(made["0.weight"], state["0.weight"])
    small, large = (candidate_of(layout, pool, i)[1] for i in (0, 1))
    assert not bool((small["3.weight"] & ~large["3.weight"]).any())


def test_a_mean_is_weighted_and_keeps_integers_whole():
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    two = {"w": torch.tensor([5.0, 0.0]), "n": torch.tensor(4)}
    mean = weighted_mean([one, two], [1, 3])
    assert torch.equal(mean["w"], torch.tensor([4.0, 0.5]))
    assert torch.equal(mean["n"], torch.tensor(4))
    assert torch.equal(weighted_mean([one], [17])["w"], one["w"])


def test_records_carry_arrays_values_and_numbers():
    arrays = {"a": torch.arange(5, dtype=torch.int32), "b": torch.tensor([[1.5]])}
    record = content(arrays, config={"round": 3, "names": ["x"]}, metrics={"loss": 0.5})
    back = arrays_of(record)
    assert all(torch.equal(back[n], arrays[n]) and back[n].dtype == arrays[n].dtype for n in back)
    assert config_of(record) == {"round": 3, "names": ["x"]}
    assert metrics_of(record) == {"loss": 0.5}
    assert arrays_of(content({})) == {}


def test_sizes_of_messages_are_those_of_the_paper(layout):
    """A ResNet-18 of 10 classes at density 0.01, within 5 % of values and indices alone."""
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        resnet = torchvision.models.resnet18(num_classes=10)
    masked = {n: p for n, p in resnet.named_parameters() if p.ndim > 1 and n != "conv1.weight"}
    whole = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in resnet.state_dict().items()}
    layout = Layout.of(whole, masked)
    assert layout.total == 11_172_032 - 9_408
    flat = torch.zeros(layout.total, dtype=torch.bool)
    flat[torch.arange(0, 111_626) * 100] = True
    masks = layout.shaped(flat)
    kilobytes = {
        "every round": (size_of(content(layout.pack(whole, masks))), 446.5 + 114.5),
        "a newcomer": (
            size_of(content(layout.pack(whole, masks) | layout.pack_mask(masks))),
            893 + 114.5,
        ),
        "dense": (
            size_of(content(layout.pack(whole, Masks.ones_like({n: whole[n] for n in masked})))),
            44_765,
        ),
    }
    for what, (measured, expected) in kilobytes.items():
        assert measured / 1000 == pytest.approx(expected, rel=0.05), what


def test_values_that_do_not_fit_the_masks_are_refused(state, layout):
    arrays = layout.pack(state, random_masks(layout, 0.5, 0))
    with pytest.raises(InputError, match="values: got .* values; accepted: .*, one a kept weight"):
        layout.unpack(arrays, random_masks(layout, 0.9, 0))
    with pytest.raises(InputError, match="message: got .* entries"):
        layout.unpack_dense({**arrays, "dense": arrays["dense"][:-1]})
