"""Residual blocks: found by what they compute, and their shortcuts against F set to zero."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.outcome import Outcome
from secateurs.parts.costs import count_macs
from secateurs.structure.residual import residual_blocks, shortcut_of
from secateurs.structure.substitution import resubstitute, substitute
from secateurs.structure.trace import trace
from secateurs.zoo.resnets import cifar_resnet


def conv(inputs, outputs, size=3, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Plain(nn.Module):
    """Its activation is a function that writes into the sum."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = conv(channels, channels), conv(channels, channels)

    def forward(self, x):
        y = self.second(F.relu(self.first(x), inplace=True))
        y += x
        return F.relu(y, inplace=True)


class Before(Plain):
    """Pre-activation: norm and relu come first, nothing after the sum."""

    def forward(self, x):
        return self.second(F.relu(self.first(x))) + x


class Scaled(Plain):
    """F(x) is made by the block's own code."""

    def forward(self, x):
        return x + 0.5 * self.second(self.first(x))


class Twice(Plain):
    """Adds twice, as the blocks of transformers do."""

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


class Leaking(Plain):
    """F(x) is used beside the sum."""

    def forward(self, x):
        y = self.second(self.first(x))
        return (x + y) * y


class Weighted(Plain):
    """A layer follows the sum."""

    def forward(self, x):
        return self.second(x + self.first(x))


class Even(Plain):
    """Neither operand is the shortcut."""

    def forward(self, x):
        return self.first(x) + self.second(x)


class Nested(nn.Module):
    """A block in the branch of a block."""

    def __init__(self, channels):
        super().__init__()
        self.inner, self.last = Plain(channels), conv(channels, channels)

    def forward(self, x):
        return x + self.last(self.inner(x))


def net(*blocks):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *blocks, nn.Flatten(), nn.LazyLinear(3))


def settled(make):
    """A network in eval mode whose norms do something."""
    torch.manual_seed(0)
    model = make()
    model(torch.randn(2, 1, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return model.double().eval()


INPUTS = torch.randn(1, 1, 8, 8, dtype=torch.float64)
MAKERS = {
    "plain": (lambda: net(Plain(4), Plain(4)), ["1", "2"]),
    "before": (lambda: net(Before(4), Plain(4)), ["1", "2"]),
    "zoo": (
        lambda: cifar_resnet((1, 8, 8), 3, 0.25, depth=8),
        ["stages.0.0", "stages.1.0", "stages.2.0"],
    ),
    "nested": (lambda: net(Nested(4)), ["1.inner"]),
    "mixed": (lambda: net(Scaled(4), Twice(4), Leaking(4), Plain(4), Even(4), Weighted(4)), ["4"]),
}


@pytest.mark.parametrize("name", MAKERS)
def test_blocks_are_found_by_what_they_compute(name):
    make, wanted = MAKERS[name]
    assert list(residual_blocks(trace(settled(make), INPUTS))) == wanted


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputError, match="Sequential without residual blocks"):
        residual_blocks(trace(settled(lambda: net(Twice(4), Scaled(4))), INPUTS))


@pytest.mark.parametrize("name", MAKERS)
def test_a_shortcut_is_the_block_with_nothing_from_its_branch(name):
    """Outputs for batches of other sizes, parameters and MACs that go, and again at load."""
    make, _ = MAKERS[name]
    model = settled(make)
    dense, silent = copy.deepcopy(model), copy.deepcopy(model)
    blocks = residual_blocks(trace(model, INPUTS))
    for block in blocks.values():
        end = silent.get_submodule(block.end)
        end.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    plan = substitute(model, {p: shortcut_of(model, b) for p, b in blocks.items()})
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), silent(x), rtol=0, atol=1e-12)
    assert not torch.allclose(model(x), dense(x))

    def count(m):
        return sum(p.numel() for p in m.parameters())

    assert count(dense) - count(model) == sum(b.parameters for b in blocks.values())
    gone = sum(count_macs(dense, INPUTS).values()) - sum(count_macs(model, INPUTS).values())
    assert gone == sum(b.macs for b in blocks.values())
    again = resubstitute(copy.deepcopy(dense), plan)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_behind_a_relu_the_shortcut_of_a_plain_block_is_the_identity():
    model = settled(lambda: nn.Sequential(nn.ReLU(), Plain(1)))
    [block] = residual_blocks(trace(model, INPUTS)).values()
    substitute(model, {"1": shortcut_of(model, block)})
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    given = x.clone()
    assert torch.equal(model(x), x.relu())
    assert torch.equal(x, given), "it wrote into its input"


def test_shortcuts_train_in_both_modes_and_keep_their_projection():
    model = settled(lambda: cifar_resnet((1, 8, 8), 3, 0.25, depth=8)).train()
    blocks = residual_blocks(trace(model, INPUTS))
    substitute(model, {p: shortcut_of(model, b) for p, b in blocks.items()})
    names = [n for n, _ in model.named_parameters() if "stages.1" in n]
    assert len(names) == 3, names
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    means = {n: b.clone() for n, b in model.named_buffers() if n.endswith("running_mean")}
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    moved = [n for n, b in model.named_buffers() if n in means and not torch.equal(b, means[n])]
    assert len(moved) == 3
    model.eval()
    torch.testing.assert_close(model(x)[:2], model(x[:2]))


def test_it_is_saved_without_pickle_and_asks_for_the_dense_block(tmp_path):
    make = MAKERS["plain"][0]
    model = settled(make)
    [first, _] = residual_blocks(trace(model, INPUTS)).values()
    outcome = Outcome(model)
    outcome.surgery.append(substitute(model, {"1": shortcut_of(model, first)}))
    sc.save(outcome, tmp_path / "out")
    read = sc.load(tmp_path / "out", settled(make))
    torch.testing.assert_close(read.model(INPUTS), model(INPUTS), rtol=0, atol=0)
    with pytest.raises(InputError, match="the residual block that the plan was made of"):
        sc.load(tmp_path / "out", settled(lambda: net(Even(4), Plain(4))))


@pytest.mark.parametrize(
    ("library", "name", "count"),
    [
        ("torchvision.models", "resnet18", 8),
        ("timm.models", "resnet26d", 8),
        ("timm.models", "seresnet18", 8),
    ],
)
def test_the_resnets_that_people_use(library, name, count):
    module = pytest.importorskip(library)
    model = getattr(module, name)().eval()
    blocks = residual_blocks(trace(model, torch.randn(1, 3, 32, 32)))
    assert len(blocks) == count
    assert next(iter(blocks)) == "layer1.0"
