"""Layers that read one array: against brute force, copied, moved, saved, made plain again."""

import copy

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.outcome import Outcome
from secateurs.parts.costs import count_macs, dense_bytes
from secateurs.parts.hashing import UniversalHash, loads
from secateurs.structure.persistence import rebuild
from secateurs.structure.shared import (
    SharedArray,
    memory_report,
    place_of,
    share,
    shareable,
    shared_arrays,
    shared_layers,
    unshare,
)

BLOCK = (3, 4)


class Net(nn.Module):
    """Everything that may share: embedding tied to a head, convolutions of all kinds, attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1, groups=2, padding_mode="circular")
        self.conv2 = nn.Conv2d(1, 4, (3, 5), stride=2, padding=(1, 2), bias=False)
        self.conv3 = nn.Conv3d(4, 4, 3, padding="same", groups=4)
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.same = nn.Linear(8, 8)
        self.again = self.same
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.again(torch.relu(self.same(self.embed(tokens))))
        x = self.conv1(x.mT).mT
        y = self.conv3(self.conv2(x[:, None])[:, :, None]).mean((2, 3, 4))
        return self.head(self.attention(x, x, x)[0]) + self.norm(y).mean(1)[:, None, None]


TOKENS = torch.tensor([[1, 5, 0, 10, 2], [3, 0, 0, 7, 7]])


def shared(net, size=97, mapping="fold", dtype=torch.float64, cache=False, arrays=1, **fields):
    """A network whose weights share arrays of a size, and its plan."""
    net = net.to(dtype)
    generator = torch.Generator().manual_seed(3)
    places, offset, tiles = [], 0, 0
    for number, own in enumerate(shareable(net)):
        place = place_of(
            own, array=number % arrays, size=size, offset=offset, tiles=tiles, map=mapping,
            scale=0.5 + number, u=UniversalHash.drawn(1), g=UniversalHash.drawn(number),
            block=BLOCK, **fields,
        )  # fmt: skip
        places.append((own, place))
        offset, tiles = offset + place.count, tiles + place.tile_rows
    made = {
        n: SharedArray(torch.randn(size, generator=generator, dtype=dtype)) for n in range(arrays)
    }
    plan = share(net, places, made, cache=cache)
    for layer in shared_layers(net).values():
        if layer.bias is not None:
            nn.init.normal_(layer.bias, generator=generator)
    return net, plan


def brute_weight(layer):
    """The weight entry by entry, in Python integers."""
    place, values = layer.place, layer.array_read.values.detach()
    out = torch.zeros(place.count, dtype=values.dtype)
    width = place.count // place.shape[0]
    for i in range(place.count):
        location = place.offset + i
        if place.map == "fold":
            chunk, rest = divmod(location, place.size)
            slot = (int(place.u(torch.tensor(chunk), place.size)) + rest) % place.size
        elif place.map == "hash":
            slot = int(place.u(torch.tensor(location), place.size))
        else:
            output, inputs = divmod(i, width)
            if place.embedding:
                height, wide, row, column = 1, BLOCK[1], output + place.tiles, inputs
            else:
                height, wide = BLOCK
                row, column = inputs + place.tiles * height, output
            start = place.u.of_pair(
                torch.tensor(row // height), torch.tensor(column // wide),
                place.size - height * wide + 1,
            )  # fmt: skip
            slot = int(start) + row % height * wide + column % wide
        sign = int(place.g.signs(torch.tensor(i)))
        zero = place.padding is not None and i // width == place.padding
        out[i] = 0 if zero else place.scale * sign * values[slot]
    return out.view(place.shape)


@pytest.mark.parametrize("mapping", ["fold", "hash", "tile"])
@pytest.mark.parametrize("cache", [False, True])
def test_weights_are_what_the_maps_say(mapping, cache):
    net, _ = shared(Net(), mapping=mapping, cache=cache)
    assert len(shared_layers(net)) == 7
    for layer in shared_layers(net).values():
        torch.testing.assert_close(layer.weight, brute_weight(layer))
        assert (layer.slots is not None) == cache


@pytest.mark.parametrize("mapping", ["fold", "hash", "tile"])
@pytest.mark.parametrize("training", [False, True])
def test_plain_layers_compute_the_same(mapping, training):
    net, _ = shared(Net(), mapping=mapping)
    net.train(training)
    dense = unshare(net)
    assert not shared_layers(dense)
    assert shared_layers(net)
    torch.testing.assert_close(copy.deepcopy(net)(TOKENS), dense(TOKENS), rtol=1e-9, atol=1e-9)
    assert dense.head.weight is dense.embed.weight
    assert dense.again is dense.same
    assert isinstance(dense.conv3, nn.Conv3d)
    assert dense.training == training
    assert [n for n, _ in dense.named_parameters()] == [n for n, _ in Net().named_parameters()]
    single = shared(Net(), dtype=torch.float32)[0].eval()
    torch.testing.assert_close(unshare(single)(TOKENS), single(TOKENS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mapping", ["fold", "hash", "tile"])
def test_gradients_are_scattered_and_summed(mapping):
    """Against autograd through the plain weights, scattered one by one."""
    net, _ = shared(Net(), mapping=mapping)
    net.eval()
    dense = unshare(net)
    net(TOKENS).square().sum().backward()
    dense(TOKENS).square().sum().backward()
    [array] = shared_arrays(net)
    expected, seen = torch.zeros_like(array.values), set()
    for path, layer in shared_layers(net).items():
        if layer.place.offset in seen:
            continue
        seen.add(layer.place.offset)
        slots, signs = layer.addresses()
        gradient = dense.get_submodule(path).weight.grad * signs * layer.place.scale
        for slot, value in zip(slots.flatten().tolist(), gradient.flatten().tolist(), strict=True):
            expected[slot] += value
    torch.testing.assert_close(array.values.grad, expected, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    net, _ = shared(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), size=7)
    [array] = shared_arrays(net)
    tokens = torch.tensor([[0, 3, 3]])

    def output(values):
        return torch.func.functional_call(net, {"0.array.values": values}, tokens)

    assert torch.autograd.gradcheck(output, array.values.detach().clone().requires_grad_())


def test_the_array_is_one_parameter_and_once_in_the_state():
    net, _ = shared(Net())
    [array] = shared_arrays(net)
    assert [n for n, _ in net.named_parameters() if n.endswith("values")] == ["embed.array.values"]
    assert sum(t.data_ptr() == array.values.data_ptr() for t in net.state_dict().values()) == 1
    for other in (copy.deepcopy(net), copy.deepcopy(net).float()):
        [own] = shared_arrays(other)
        assert own is not array
        assert all(layer.array_read is own for layer in shared_layers(other).values())
        with torch.no_grad():
            own.values.fill_(1.0)
        assert all((layer.weight.abs() > 0).any() for layer in shared_layers(other).values())
    other = copy.deepcopy(net)
    other.load_state_dict({n: t + 1 for n, t in net.state_dict().items()}, assign=True)
    assert torch.equal(other.head.array_read.values, array.values + 1)


@pytest.mark.parametrize("arrays", [1, 3])
def test_saved_and_loaded(arrays, tmp_path):
    net, plan = shared(Net(), arrays=arrays)
    net.eval()
    outcome = Outcome(net, surgery=[plan])
    sc.save(outcome, tmp_path / "out")
    again = sc.load(tmp_path / "out", lambda: Net().double()).model
    assert torch.equal(again(TOKENS), net(TOKENS))
    assert len(shared_arrays(again)) == arrays
    assert again.again is again.same
    assert again.state_dict().keys() == net.state_dict().keys()
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < dense_bytes(net) + 4000


def test_another_network_is_refused_at_load():
    _, plan = shared(Net())
    other = Net()
    other.same = nn.Linear(8, 9)
    with pytest.raises(InputError, match="layer: got Linear of another kind or shape"):
        rebuild(other, [plan])


def test_what_is_stored_and_what_is_multiplied():
    dense = Net().double()
    macs = sum(count_macs(dense, TOKENS).values())
    parameters = sum(p.numel() for p in dense.parameters())
    read = sum(own.weight.numel() for own in shareable(dense))
    net, _ = shared(dense)
    report = memory_report(net)
    assert report["original"] == parameters
    assert report["read"] == read
    assert report["stored"] == 97 + parameters - read == sum(p.numel() for p in net.parameters())
    assert report["index_bytes"] == 0
    assert sum(count_macs(net, TOKENS).values()) == macs
    cached, _ = shared(Net(), cache=True)
    # the head is tied to the embedding, and has its own copy of slots and signs
    assert memory_report(cached)["index_bytes"] == 5 * (read + 88)
    assert dense_bytes(cached) == dense_bytes(net) + 5 * (read + 88)


def test_a_fold_of_as_many_slots_as_weights_is_one_to_one_over_all_layers():
    size = sum(own.weight.numel() for own in shareable(Net()))
    net, _ = shared(Net(), size=size)
    tied = {layer.place.offset: layer.addresses()[0] for layer in shared_layers(net).values()}
    assert loads(tied.values(), size).unique().tolist() == [1]


def test_a_shared_network_is_exported():
    torch.manual_seed(0)
    net, _ = shared(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 3)))
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        made = torch.export.export(net.eval(), (x,), strict=False).module()
    torch.testing.assert_close(made(x), net(x))


class Own(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


def test_what_cannot_share_stays():
    tied = nn.Linear(4, 4)
    other = nn.Bilinear(4, 1, 4)
    other.weight = tied.weight
    model = nn.Sequential(
        Own(4, 4), nn.Embedding(5, 4, max_norm=1.0), tied, other, nn.Linear(4, 3),
        nn.ConvTranspose1d(3, 3, 1), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    )  # fmt: skip
    assert [own.name for own in shareable(model)] == ["4.weight"]
    assert [own.name for own in shareable(Net(), exclude=["conv", "embed"])] == [
        "attention.out_proj.weight", "same.weight",
    ]  # fmt: skip
    assert [own.name for own in shareable(Net(), min_size=88)] == ["embed.weight", "conv1.weight",
                                                                  "conv3.weight"]  # fmt: skip


def test_bad_input():
    with pytest.raises(InputError, match="model: got Sequential with nothing to prune"):
        shareable(nn.Sequential(nn.ReLU()))
    with pytest.raises(InputError, match="exclude: got 'nothing'"):
        shareable(Net(), exclude=["nothing"])
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).half())
    with pytest.raises(InputError, match="weights of one dtype"):
        shareable(mixed)
    broken = nn.Sequential(nn.Linear(3, 3))
    nn.init.constant_(broken[0].weight, torch.nan)
    with pytest.raises(InputError, match=r"0\.weight: got NaN"):
        shareable(broken)
    [layer] = shared_layers(shared(nn.Sequential(nn.Linear(3, 3)))[0]).values()
    with pytest.raises(InputError, match="array: got 5; accepted: 97 slots"):
        layer.read(SharedArray(torch.zeros(5)))
