"""The rules of relevance against nets worked by hand, plain formulas and autograd, in float64."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateurs.analysis.relevance import (
    Rules,
    output_magnitudes,
    relevance,
    resnet_rules,
    responses,
)
from secateurs.errors import InputError
from secateurs.structure.trace import trace
from secateurs.zoo.networks import make_network

CLASS_0, CLASS_1 = torch.tensor([0]), torch.tensor([1])
X = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
W1, W2 = [[1, 0.5], [0.5, 1]], [[2, -1], [1, 3]]


def by_hand(first, second):
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(first))
        net[2].weight.copy_(torch.tensor(second))
    return net.double().eval()


def explained(model, inputs, labels, *rules, **options):
    return relevance(trace(model, inputs), inputs, labels, *rules, **options)


def hidden(model, label, *rules):
    return explained(model, X, label, *rules).by_name()["0"][0].tolist()


def test_z_plus_of_the_net_worked_by_hand():
    net = by_hand(W1, W2)
    assert hidden(net, CLASS_0) == pytest.approx([1, 0], abs=1e-8)
    assert hidden(net, CLASS_1) == pytest.approx([2 / 9.5, 7.5 / 9.5], abs=1e-8)


def test_epsilon_of_the_net_worked_by_hand():
    found = hidden(by_hand(W1, W2), CLASS_0, Rules(linear="epsilon"))
    assert found == pytest.approx([8 / 3, -5 / 3], abs=1e-5)
    assert sum(found) == pytest.approx(1, abs=1e-5)


def test_relevance_of_the_inputs_worked_by_hand():
    found = explained(by_hand([[1, -1], [0.5, 1]], [[2, 1], [-1, 3]]), X, CLASS_1)
    assert found.by_name()["0"][0].tolist() == pytest.approx([0, 1], abs=1e-8)
    assert found.input[0].tolist() == pytest.approx([0.2, 0.8], abs=1e-8)


def test_the_seed_may_be_the_logit():
    net = by_hand(W1, W2)
    found = explained(net, X, CLASS_1, seed="logit")
    assert found.logits[0, 1] == pytest.approx(9.5)
    assert found.by_name()["0"][0].tolist() == pytest.approx([2, 7.5], abs=1e-7)


def scattered(name, **options):
    """With norms of all sizes, in float64 and eval mode."""
    torch.manual_seed(0)
    model = make_network(name, inputs=(1, 8, 8), width=0.5, **options).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def images(count=3):
    return torch.rand(
        count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("name", ["mlp", "convnet", "conv-2"])
def test_z_plus_hands_on_all_that_it_receives(name):
    model, inputs = scattered(name), images()
    found = explained(model, inputs, torch.tensor([1, 2, 3]))
    for layer, value in found.by_name().items():
        sums = value.flatten(1).sum(1)
        torch.testing.assert_close(sums, torch.ones(3).double(), atol=1e-5, rtol=0, msg=layer)
        assert bool((value >= 0).all())
    torch.testing.assert_close(found.input.flatten(1).sum(1), torch.ones(3).double(), atol=1e-5,
                               rtol=0)  # fmt: skip


def test_relevance_does_not_see_how_scale_is_spread_over_layers():
    model, inputs, labels = scattered("conv-2"), images(), torch.tensor([4, 5, 6])
    before = explained(model, inputs, labels).by_name()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.hidden.fc1.weight.mul_(7)
        other.hidden.fc2.weight.div_(7)
    after = explained(other, inputs, labels).by_name()
    for layer, value in before.items():
        torch.testing.assert_close(after[layer], value, atol=1e-5, rtol=0)
    sums = [output_magnitudes(trace(m, inputs)) for m in (model, other)]
    fc1 = [next(v for n, v in s.items() if "fc1" in str(n.args[1].target)) for s in sums]
    torch.testing.assert_close(fc1[1], fc1[0] * 7)


CONVOLUTIONS = {
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=True),
    "grouped": nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True),
    "dilated": nn.Conv2d(4, 6, (3, 1), dilation=2, bias=False),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
}


def behind(convolution, height=7, width=9):
    """Relevance before and after a convolution in the middle of a net, and what went into it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), copy.deepcopy(convolution), nn.Flatten())
    net.append(nn.Linear(net(torch.zeros(1, 2, height, width)).shape[1], 3))
    net = net.double().eval()
    inputs = torch.randn(2, 2, height, width, dtype=torch.float64)
    return net, inputs, F.relu(net[0](inputs)).detach().requires_grad_()


def times(layer, a, weight, bias=None):
    fresh = copy.deepcopy(layer)
    fresh.weight = nn.Parameter(weight)
    fresh.bias = None if bias is None else nn.Parameter(bias)
    return fresh(a)


def z_plus(layer, a, received):
    z = times(layer, a, layer.weight.clamp(min=0)) + 1e-9
    return a * torch.autograd.grad((z * (received / z).detach()).sum(), a)[0]


def alpha_beta(layer, a, received, alpha=2.0):
    x = (a + 1e-9).detach().requires_grad_()
    parts = []
    for share, weight in (
        (alpha, layer.weight.clamp(min=0)),
        (1 - alpha, layer.weight.clamp(max=0)),
    ):
        z = times(layer, x, weight)
        ratio = torch.where(z == 0, 0.0, share * received / z).detach()
        parts.append(torch.autograd.grad((z * ratio).sum(), x)[0])
    return x * sum(parts)


def epsilon(layer, a, received):
    z = layer(a)
    stable = z + 1e-6 * z.sign() + 1e-6 * (z == 0)
    return a * torch.autograd.grad((z * (received / stable).detach()).sum(), a)[0]


def beta0(layer, a, received):
    z = times(layer, a.clamp(min=0), layer.weight.clamp(min=0))
    z = z + times(layer, a.clamp(max=0), layer.weight.clamp(max=0))
    return a * torch.autograd.grad((z * (received / (z + 1e-12 * (z == 0))).detach()).sum(), a)[0]


def box(layer, a, received, low=-1.5, high=4.0):
    least, most = (torch.full_like(a, v).requires_grad_() for v in (low, high))
    z = times(layer, a, layer.weight) - times(layer, least, layer.weight.clamp(min=0))
    z = z - times(layer, most, layer.weight.clamp(max=0))
    ratio = (received / (z + 1e-6 * z.sign())).detach()
    boxed = (a, least, most)
    sent = torch.autograd.grad((z * ratio).sum(), boxed)
    return sum(x * g for x, g in zip(boxed, sent, strict=True))


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize(
    ("rules", "formula"),
    [
        (Rules(), z_plus),
        (Rules(conv="alpha-beta", alpha=2.0), alpha_beta),
        (Rules(conv="epsilon"), epsilon),
        (Rules(conv="beta0"), beta0),
        (Rules(conv="zB", low=-1.5, high=4.0), box),
    ],
)
def test_every_rule_is_its_formula_on_convolutions_of_every_kind(kind, rules, formula):
    net, inputs, a = behind(CONVOLUTIONS[kind])
    found = explained(net, inputs, torch.tensor([2, 0]), rules).by_name()
    expected = formula(net[2], a, found["2"])
    torch.testing.assert_close(found["0"], expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("rules", "formula"), [(Rules(), z_plus), (Rules("beta0", "beta0"), beta0)]
)
def test_inputs_may_be_negative(rules, formula):
    """z+ takes them as they are, beta0 with the weights of their sign."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    inputs = torch.randn(2, 5, dtype=torch.float64)
    found = explained(net, inputs, torch.tensor([0, 1]), rules)
    expected = formula(net[0], inputs.clone().requires_grad_(), found.by_name()["0"])
    torch.testing.assert_close(found.input, expected.detach(), rtol=1e-9, atol=1e-9)


def test_alpha_one_is_z_plus_up_to_its_guard():
    model, inputs, labels = scattered("conv-2"), images(), torch.tensor([4, 5, 6])
    plus = explained(model, inputs, labels).by_name()
    alpha = explained(model, inputs, labels, Rules("alpha-beta", "alpha-beta")).by_name()
    for layer, value in plus.items():
        torch.testing.assert_close(alpha[layer], value, rtol=1e-5, atol=1e-6)


def test_maximum_pooling_gives_all_to_the_winner():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    ).double()
    inputs = torch.randint(0, 2, (2, 1, 4, 4)).double()  # many ties
    found = explained(net.eval(), inputs, torch.tensor([0, 1])).by_name()["0"]
    _, winners = F.max_pool2d(net[0](inputs), 2, return_indices=True)
    won = torch.zeros(2, 3, 16, dtype=torch.bool).scatter_(2, winners.flatten(2), True)
    assert not bool(found.flatten(2)[~won].any())
    assert found.sum() == pytest.approx(2, abs=1e-6)


class Sums(nn.Module):
    """Functions, operations in place, constants, a difference and a concatenation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        a = self.first(x).relu_()
        b = self.second(a)
        c = (a + b).relu() * 2 + 1
        d = a - b
        return self.last(
            torch.cat([F.adaptive_avg_pool2d(c, 1), d.mean((2, 3), True)], 1).flatten(1)
        )


def test_sums_are_split_in_proportion_and_functions_count_like_modules():
    torch.manual_seed(0)
    net = Sums().double().eval()
    inputs, labels = images(), torch.tensor([0, 1, 2])
    found = explained(net, inputs, labels, Rules(linear="epsilon"))
    torch.testing.assert_close(found.logits, net(inputs))
    with torch.no_grad():
        a = net.first(inputs).relu()
        b = net.second(a)
        s, c = a + b, (a + b).relu() * 2 + 1
        last = torch.cat([c.mean((2, 3)), (a - b).mean((2, 3))], 1)
        z = net.last(last)[range(3), labels]
        sent = last * net.last.weight[labels] / (z + 1e-6 * z.sign())[:, None]
        of_c, of_d = (v[..., None, None] for v in sent.split(4, 1))
        of_c = c * of_c / 64 / (lambda m: m + 1e-6 * m.sign())(c.mean((2, 3), True))
        d = a - b
        of_d = d * of_d / 64 / (lambda m: m + 1e-6 * m.sign())(d.mean((2, 3), True))
        expected = b * of_c / (s + 1e-6 * s.sign()) - b * of_d / (d + 1e-6 * d.sign())
    torch.testing.assert_close(found.by_name()["second"], expected, rtol=1e-8, atol=1e-10)


def fused_by_hand(model):
    """A copy of a convnet whose norms are in its convolutions."""
    own = copy.deepcopy(model)
    for block in own.features:
        if isinstance(block, nn.Sequential):
            norm, factor = block.norm, block.norm.weight / (block.norm.running_var + 1e-5).sqrt()
            bias = nn.Parameter((norm.bias - norm.running_mean * factor).detach())
            block.conv.weight.data *= factor[:, None, None, None]
            block.conv.bias, block.norm = bias, nn.Identity()
    return own


@pytest.mark.parametrize("rules", [Rules(), Rules("epsilon", "epsilon"), resnet_rules(0.0, 1.0)])
def test_batch_norm_counts_as_part_of_the_layer_before_it(rules):
    model, inputs, labels = scattered("convnet"), images(), torch.tensor([7, 8, 9])
    fused = fused_by_hand(model)
    torch.testing.assert_close(fused(inputs), model(inputs), rtol=1e-9, atol=1e-9)
    before = copy.deepcopy(model.state_dict())
    ours, theirs = explained(model, inputs, labels, rules), explained(fused, inputs, labels, rules)
    torch.testing.assert_close(ours.logits, model(inputs))
    for layer, value in theirs.by_name().items():
        torch.testing.assert_close(ours.by_name()[layer], value, rtol=1e-8, atol=1e-9)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_norm_behind_nothing_that_it_could_be_fused_with_passes_relevance_on():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 2)
    ).double()
    net[2].running_var.uniform_(0.5, 2)
    inputs = images(2)
    found = explained(net.eval(), inputs, torch.tensor([0, 1]), Rules(linear="beta0")).by_name()
    normed = net[2](net[0](inputs).relu()).flatten(1).detach().requires_grad_()
    rest = beta0(net[4], normed, found["4"])
    alive = net[0](inputs) > 0
    torch.testing.assert_close(found["0"], rest.view_as(alive).detach())


@pytest.mark.parametrize("name", ["resnet-8", "convnet"])
def test_rows_without_a_label_are_padding(name):
    model, inputs, labels = scattered(name), images(4), torch.tensor([1, 2, 3])
    some = explained(model, inputs[:3], labels).by_name()
    padded = explained(model, inputs, labels).by_name()
    for layer, value in some.items():
        torch.testing.assert_close(padded[layer][:3], value)
        assert not bool(padded[layer][3].any())


def test_responses_are_outputs_and_gradients():
    model, inputs, labels = scattered("convnet"), images(), torch.tensor([1, 2, 3])
    seen = {}
    model.features[2].conv.register_forward_hook(
        lambda m, i, o: (seen.update(o=o), o.retain_grad())[0]
    )
    F.cross_entropy(model(inputs), labels).backward()
    model.features[2].conv._forward_hooks.clear()
    found = responses(trace(model, inputs), inputs, lambda z: F.cross_entropy(z, labels))
    output, gradient = next(
        v for n, v in found.items() if str(n.args[1].target) == "features.2.conv.weight"
    )
    torch.testing.assert_close(output, seen["o"].detach())
    torch.testing.assert_close(gradient, seen["o"].grad)


def test_magnitudes_of_grouped_transposed_filters():
    layer = copy.deepcopy(CONVOLUTIONS["transposed"])
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(6 * 13 * 17, 2))
    [found, _] = output_magnitudes(trace(net, torch.randn(1, 4, 7, 9))).values()
    weight = layer.weight.detach().abs().double()
    expected = torch.cat([weight[:2].sum((0, 2, 3)), weight[2:].sum((0, 2, 3))])
    torch.testing.assert_close(found, expected)


class Multiplied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.gate, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(x * self.inner.gate(x).sigmoid())


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Multiplied(), "operation mul"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "layer_norm in 1"),
        (nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1)), "softmax in 1"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(model, named):
    with pytest.raises(InputError, match=named):
        explained(model.eval(), torch.randn(1, 4), CLASS_0)


def test_bad_labels_outputs_and_rules_are_refused():
    net = nn.Sequential(nn.Linear(4, 3))
    for labels in (torch.tensor([3]), torch.tensor([-1]), torch.tensor([0.5]), torch.tensor([[1]])):
        with pytest.raises(InputError, match="labels"):
            explained(net, torch.randn(1, 4), labels)
    with pytest.raises(InputError, match="labels"):
        explained(net, torch.randn(1, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(InputError, match="logits"):
        explained(nn.Conv2d(1, 1, 1), torch.randn(1, 1, 2, 2), CLASS_0)
    with pytest.raises(InputError, match="zB"):
        Rules(first="zB")
    with pytest.raises(InputError, match="zB"):
        Rules(first="zB", low=1.0, high=2.0)
    with pytest.raises(InputError, match="alpha"):
        Rules(alpha=0.5)
    with pytest.raises(InputError, match="epsilon"):
        Rules(epsilon=0.0)


def test_relevance_that_is_not_finite_names_the_layer():
    net = by_hand(W1, W2)
    with torch.no_grad():
        net[2].weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="0: got relevance that is NaN or Inf"):
        explained(net, X, CLASS_0)


def test_without_zennit_its_extra_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"secateurs\[explain\]"):
        Rules().hook("z+")
