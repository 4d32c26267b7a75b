"""Saliencies against finite differences, explicit Hessians and closed forms, in float64."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateurs.errors import InputError
from secateurs.parts.prunable import prunable_parameters
from secateurs.parts.saliency import SALIENCIES, Probe, saliency, uniform_like

GRADIENT_BASED = ("weight-gradient", "snip", "grasp")


def loss_of(model, batch):
    inputs, target = batch
    return F.cross_entropy(model(inputs), target)


def batches(inputs, classes, count=2, size=6):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, inputs, generator=generator, dtype=torch.float64),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def ten_parameters():
    """2·2 + 3·2 = 10 weights and no biases, smooth so that the Hessian is defined everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 2, bias=False), nn.Tanh(), nn.Linear(2, 3, bias=False)
    ).double()


def convolutional():
    """With everything that a score could disturb: batch norm, dropout, a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(12, 5),
    ).double()
    model[1].weight.requires_grad_(False)
    return model


def probe_of(model, data=(), **fields):
    return Probe(model, prunable_parameters(model), data, loss_of, **fields)


def every_probe():
    model = convolutional()
    return probe_of(
        model,
        batches(16, 5),
        example_inputs=torch.randn(1, 16),
        generator=torch.Generator().manual_seed(0),
    )


def test_magnitude():
    model = ten_parameters()
    scores = saliency("magnitude")(probe_of(model))
    assert list(scores) == ["0.weight", "2.weight"]
    assert torch.equal(scores["2.weight"], model[2].weight.abs())
    assert not scores["2.weight"].requires_grad


# gradients


def gate_gradients(model, batch, step=1e-6):
    """∂L/∂c of gates c = 1 on every weight, by central differences of L(c)."""
    found = {}
    for name, parameter in prunable_parameters(model).items():
        weight = parameter.detach().clone()
        gradient = torch.zeros_like(weight)
        for index in range(weight.numel()):
            losses = []
            for gate in (1 + step, 1 - step):
                with torch.no_grad():
                    parameter.view(-1)[index] = weight.view(-1)[index] * gate
                    losses.append(loss_of(model, batch))
                    parameter.copy_(weight)
            gradient.view(-1)[index] = (losses[0] - losses[1]) / (2 * step)
        found[name] = gradient
    return found


def test_snip_against_finite_differences():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    data = batches(4, 2)
    scores = saliency("snip")(probe_of(model, data))
    differences = {n: g.abs() for n, g in gate_gradients(model, data[0]).items()}
    norm = sum(d.sum() for d in differences.values())
    for name in scores:
        assert torch.allclose(scores[name], differences[name] / norm, rtol=1e-6, atol=1e-9)
    assert sum(s.sum() for s in scores.values()) == pytest.approx(1)


def test_weight_gradient_is_that_of_the_mean_loss_over_all_batches():
    model, data = ten_parameters(), batches(2, 3, count=3)
    scores = saliency("weight-gradient")(probe_of(model, data))
    gradients = [gate_gradients(model, batch) for batch in data]
    for name, score in scores.items():
        mean = sum(g[name] for g in gradients) / 3
        assert torch.allclose(score, mean.abs(), rtol=1e-6, atol=1e-9)


def test_grasp_against_the_explicit_hessian():
    model, data, temperature = ten_parameters(), batches(2, 3), 200.0
    scores = saliency("grasp")(probe_of(model, data))

    def total_loss(flat):
        first, second = flat[:4].reshape(2, 2), flat[4:].reshape(3, 2)
        outputs = [torch.tanh(x @ first.T) @ second.T / temperature for x, _ in data]
        return sum(F.cross_entropy(o, y) for o, (_, y) in zip(outputs, data, strict=True))

    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert len(weights) == 10
    gradient = torch.autograd.functional.jacobian(total_loss, weights)
    hessian = torch.autograd.functional.hessian(total_loss, weights)
    expected = weights * (hessian @ gradient)
    expected = expected / (expected.sum().abs() + 1e-10)
    found = torch.cat([s.reshape(-1) for s in scores.values()])
    assert torch.allclose(found, expected, rtol=1e-4)


def test_grasp_asks_for_the_temperature():
    model, data = ten_parameters(), batches(2, 3)
    cool, warm = (SALIENCIES["grasp"](probe_of(model, data), t) for t in (1.0, 200.0))
    assert not torch.allclose(cool["0.weight"], warm["0.weight"], rtol=1e-3)


# synflow


def chain(*widths):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in pairwise(widths)])


def test_synflow_conserves_the_sum_of_scores_over_layers():
    model = chain(5, 7, 3, 4)
    scores = saliency("synflow")(probe_of(model, example_inputs=torch.randn(1, 5)))
    sums = [float(s.sum()) for s in scores.values()]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)
    flow = torch.ones(1, 5, dtype=torch.float64)
    for layer in model:
        flow = flow @ layer.weight.detach().double().abs().T
    assert sums[0] == pytest.approx(float(flow.sum()), rel=1e-12)


def test_synflow_conserves_flow_through_every_neuron():
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False))
    scores = saliency("synflow")(probe_of(model, example_inputs=torch.randn(2, 5)))
    assert torch.allclose(scores["0.weight"].sum(1), scores["2.weight"].sum(0), rtol=1e-12)


def test_synflow_sees_masked_weights_as_gone():
    model = chain(5, 7, 3)
    mask = torch.rand(7, 5) < 0.5
    masks = {"0.weight": mask, "1.weight": torch.ones(3, 7, dtype=torch.bool)}
    inputs = torch.randn(1, 5)
    masked = saliency("synflow")(probe_of(model, example_inputs=inputs, masks=masks))
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned[0].weight.mul_(mask)
    expected = saliency("synflow")(probe_of(pruned, example_inputs=inputs))
    assert torch.equal(masked["1.weight"], expected["1.weight"])


def test_synflow_takes_dictionaries_of_inputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2, bias=False)

        def forward(self, x):
            return self.layer(x)

    model = Named()
    scores = saliency("synflow")(probe_of(model, example_inputs={"x": torch.randn(1, 5)}))
    assert torch.allclose(scores["layer.weight"], model.layer.weight.detach().double().abs())


# randomness


def test_random_scores_are_uniform_and_of_one_stream_a_name():
    model = chain(50, 50, 50)
    scores = saliency("random")(probe_of(model, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(scores["0.weight"], scores["1.weight"])
    for score in scores.values():
        assert 0 <= score.min() <= score.max() < 1
        assert score.mean() == pytest.approx(0.5, abs=0.03)


def test_random_scores_depend_on_the_seed_and_not_on_the_company():
    model = chain(4, 4, 4)
    one, again, other = (
        saliency("random")(probe_of(model, generator=torch.Generator().manual_seed(s)))
        for s in (0, 0, 1)
    )
    assert torch.equal(one["1.weight"], again["1.weight"])
    assert not torch.equal(one["1.weight"], other["1.weight"])
    alone = {"1.weight": model[1].weight}
    alone = saliency("random")(Probe(model, alone, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(alone["1.weight"], one["1.weight"])


def test_uniform_draws_do_not_depend_on_the_shape_or_the_global_generator():
    torch.manual_seed(5)
    one = uniform_like(torch.empty(3, 4), 7, "w")
    torch.manual_seed(6)
    assert torch.equal(uniform_like(torch.empty(12, device="meta"), 7, "w"), one.reshape(-1))


@pytest.mark.parametrize("name", GRADIENT_BASED)
def test_scores_under_dropout_follow_the_probes_generator(name):
    def scores(seed, noise):
        torch.manual_seed(noise)
        probe = probe_of(
            convolutional(), batches(16, 5), generator=torch.Generator().manual_seed(seed)
        )
        torch.manual_seed(noise)
        return saliency(name)(probe)["6.weight"]

    assert torch.equal(scores(0, noise=1), scores(0, noise=2))
    assert not torch.equal(scores(0, noise=1), scores(1, noise=1))


# the user's model


@pytest.mark.parametrize("name", sorted(SALIENCIES))
@pytest.mark.parametrize("training", [True, False])
def test_the_users_model_is_left_as_it_was(name, training):
    probe = every_probe()
    model = probe.model.train(training)
    model[2].eval()
    model[6].weight.grad = torch.full_like(model[6].weight, 2.0)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    needed = [p.requires_grad for p in model.parameters()]
    data = copy.deepcopy(list(probe.batches))
    generator = torch.get_rng_state()

    scores = saliency(name)(probe)

    assert set(scores) == set(probe.params)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needed
    assert [p.grad is not None for p in model.parameters()].count(True) == 1
    assert bool((model[6].weight.grad == 2).all())
    assert torch.equal(torch.get_rng_state(), generator)
    for (inputs, _), (before, _) in zip(probe.batches, data, strict=True):
        assert torch.equal(inputs, before)
        assert not inputs.requires_grad


@pytest.mark.parametrize("name", sorted(SALIENCIES))
def test_scores_have_the_shapes_of_the_weights(name):
    probe = every_probe()
    scores = saliency(name)(probe)
    assert {n: s.shape for n, s in scores.items()} == {n: p.shape for n, p in probe.params.items()}
    assert all(bool(torch.isfinite(s).all()) for s in scores.values())
    assert all(not s.requires_grad for s in scores.values())


# what is refused


@pytest.mark.parametrize("name", GRADIENT_BASED)
def test_scores_that_need_data_ask_for_it(name):
    with pytest.raises(InputError, match=f"'{name}'; accepted: a task with training data"):
        saliency(name)(probe_of(ten_parameters()))


def test_synflow_asks_for_inputs():
    with pytest.raises(InputError, match="example_inputs"):
        saliency("synflow")(probe_of(ten_parameters()))


def test_random_asks_for_a_generator():
    with pytest.raises(InputError, match="generator"):
        saliency("random")(probe_of(ten_parameters()))


def test_snip_refuses_scores_that_are_all_zero():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[1].weight)
    with pytest.raises(InputError, match="SNIP scores that are all zero"):
        saliency("snip")(probe_of(model, batches(2, 2)))


@pytest.mark.parametrize("name", GRADIENT_BASED)
def test_a_weight_that_the_loss_does_not_see_is_refused_by_name(name):
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "spare": nn.Linear(2, 2)}).double()
    model.forward = lambda inputs: model["used"](inputs)
    probe = Probe(
        model,
        prunable_parameters(model),
        batches(2, 2),
        lambda net, batch: (
            F.cross_entropy(net["used"](batch[0]), batch[1])
            if isinstance(net, nn.ModuleDict)
            else F.cross_entropy(net.model["used"](batch[0]), batch[1])
        ),
    )
    with pytest.raises(InputError, match=r"spare\.weight: got a weight the loss does not"):
        saliency(name)(probe)


def test_an_unknown_saliency_suggests_the_closest():
    with pytest.raises(InputError, match="did you mean 'synflow'"):
        saliency("sinflow")
