"""Factorised layers: the dense convolution to rounding, real MACs, saved and loaded."""

import copy

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.outcome import Outcome
from secateurs.parts.costs import count_macs
from secateurs.parts.low_rank import MODES, full_rank, spectrum
from secateurs.structure.factorised import Factorised, sites
from secateurs.structure.substitution import substitute

LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "3x5": lambda: nn.Conv2d(4, 6, (3, 5), padding=(1, 2), bias=False),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=1),
    "same": lambda: nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2)),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_the_thin_layers_are_the_cut_convolution(name, mode):
    torch.manual_seed(0)
    dense = LAYERS[name]().double()
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    found = spectrum(dense.weight, mode)
    for rank in (full_rank(dense.weight.shape, mode), 2):
        cut = copy.deepcopy(dense)
        with torch.no_grad():
            cut.weight.copy_(found.truncated(rank))
        layer = Factorised.of(dense, found, rank)
        torch.testing.assert_close(layer(x), cut(x), rtol=1e-10, atol=1e-10)
    biases = sum(p.numel() for n, p in layer.named_parameters() if n.endswith("bias"))
    assert biases == (0 if dense.bias is None else 6)
    assert len(layer.branches) == (rank if mode == "ND" else 1)


def test_a_linear_layer_is_two_of_them():
    torch.manual_seed(0)
    dense = nn.Linear(7, 5)
    x = torch.randn(3, 2, 7)
    layer = Factorised.of(dense, spectrum(dense.weight, "NC"), 5)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_price_is_what_is_counted(name, mode):
    dense = nn.Sequential(LAYERS[name](), nn.ReLU())
    x = torch.randn(2, 4, 9, 11)
    site = sites(dense, x)["0"]
    macs, params = site.price(mode, "macs"), site.price(mode, "params")
    assert macs.dense == sum(count_macs(dense, x).values())
    assert params.dense == dense[0].weight.numel()
    for rank in (1, 2):
        thin = Factorised(dense[0], mode, rank)
        weights = sum(p.numel() for n, p in thin.named_parameters() if n.endswith("weight"))
        assert sum(count_macs(thin, x).values()) == rank * macs.a_rank
        assert weights == rank * params.a_rank


class Net(nn.Module):
    """A convolution called twice, a tied one, one with groups, attention."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.one.weight
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.unused = nn.Conv2d(4, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = self.grouped(self.other(self.one(self.twice(self.twice(x)[:, :, ::2]))))
        x = x.flatten(2).mT
        return self.last(self.attention(x, x, x)[0].mean(1))


def test_layers_are_found_in_the_order_of_the_pass():
    net = Net()
    found = sites(net, torch.randn(3, 4, 6, 6))
    assert list(found) == ["twice", "last"]
    assert found["twice"].outputs == 3 * (36 + 18)
    assert not net.twice._forward_hooks


def test_saved_and_loaded(tmp_path):
    def make():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))

    torch.manual_seed(1)
    model, x = make().eval(), torch.randn(2, 3, 8, 8)
    outcome = Outcome(model)
    layers = {
        "0": Factorised.of(model[0], spectrum(model[0].weight, "VH"), 2),
        "3": Factorised.of(model[3], spectrum(model[3].weight, "NC"), 1),
    }
    outcome.surgery.append(substitute(model, layers))
    sc.save(outcome, tmp_path / "out")
    again = sc.load(tmp_path / "out", make).model
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_making_layers_leaves_the_generator_alone():
    dense = nn.Conv2d(3, 8, 3)
    before = torch.get_rng_state()
    Factorised(dense, "ND", 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("layer", "mode"),
    [(nn.Conv2d(4, 4, 3, groups=2), "NC"), (nn.Linear(3, 3), "VH"), (nn.Conv1d(3, 3, 3), "NC")],
)
def test_other_layers_are_refused(layer, mode):
    with pytest.raises(InputError, match="layer: got .*Conv2d without groups, or Linear as NC"):
        Factorised(layer, mode, 1)
