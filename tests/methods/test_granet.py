"""GraNet: the ends of its options, exact counts, and what regrown weights hold."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.weights.global_mp import GradualGlobalMagnitudePruning
from secateurs.methods.weights.granet import GraNet
from secateurs.parts.allocation import allocate_counts
from secateurs.parts.regrowth import prune_and_regrow
from secateurs.parts.schedules import CosineDecay, Cubic


class Seen(list):
    """Copies of the masks after the attaching and after every step."""

    def __call__(self, at):
        self.append(at.masks.clone())


def same(one, other):
    return all(torch.equal(one[n], other[n]) for n in one)


def attach(weight, budget, *, lr=0.0, momentum=0.0, steps=10, **options):
    """A method at work on one linear layer whose weights and gradients the test sets by hand."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum)
    return GraNet(**options).attach(layer, optimizer, budget, steps)


def step(at, gradient):
    at.model.weight.grad = gradient.clone()
    at.optimizer.step()


def momentum_of(at, name):
    return at.optimizer.state[at.params[name]]["momentum_buffer"]


# the ends of its options


@pytest.mark.parametrize("frequency", [1, 3])
def test_without_regrowth_it_is_global_gradual_pruning(train_attached, frequency):
    granet, global_mp = Seen(), Seen()
    one = train_attached(GraNet(regrow_rate=0.0, end=0.5, frequency=frequency), after=granet)
    other = train_attached(
        GradualGlobalMagnitudePruning(end=0.5, frequency=frequency), after=global_mp
    )
    assert all(same(a, b) for a, b in zip(granet, global_mp, strict=True))
    assert all(torch.equal(one.params[n], other.params[n]) for n in one.params)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_without_regrowth_masks_only_shrink(train_attached, scope):
    seen = Seen()
    train_attached(GraNet(regrow_rate=0.0, frequency=1, scope=scope), after=seen)
    for before, after in pairwise(seen):
        assert not any((after[n] & ~before[n]).any() for n in before)


def test_from_the_target_on_it_exchanges_within_layers_as_rigl(train_attached):
    seen = Seen()
    train_attached(GraNet(initial=0.9, frequency=2), after=seen)
    assert all(masks.kept_by_tensor() == seen[0].kept_by_tensor() for masks in seen)
    changes = [not same(before, after) for before, after in pairwise(seen)]
    assert sum(changes) > 20


def test_from_the_target_on_without_regrowth_nothing_moves(train_attached):
    seen = Seen()
    train_attached(GraNet(initial=0.9, regrow_rate=0.0, frequency=1), after=seen)
    assert all(same(masks, seen[0]) for masks in seen)


def test_no_sparsity_trains_as_if_it_were_not_there(train_attached, digits_task, run_steps):
    at = train_attached(GraNet(regrow_rate=0.0, frequency=1), "sparsity=0", steps=20)
    plain = digits_task.fresh_model(0)
    run_steps(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9), 0, 20)
    for one, other in zip(at.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


# counts


@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_whole_follows_the_ramp_and_ends_at_the_target(train_attached, initial, scope):
    seen = Seen()
    at = train_attached(GraNet(initial=initial, end=30, frequency=1, scope=scope), after=seen)
    ramp = Cubic(0.9, 0, 30, initial=initial)
    for now, masks in enumerate(seen):
        assert abs(masks.kept - (1 - ramp(now)) * masks.total) <= 1
    assert at.masks.kept == at.masks.total - round(0.9 * at.masks.total)


@pytest.mark.parametrize("frequency", [1, 7, 1000])
@pytest.mark.parametrize("end", [0.5, 1.0, 41])
def test_the_target_is_exact_whatever_the_frequency(train_attached, frequency, end):
    at = train_attached(GraNet(end=end, frequency=frequency), budget="sparsity=0.87")
    assert at.masks.kept == at.masks.total - round(0.87 * at.masks.total)


def test_regeneration_changes_no_layers_count(train_attached, monkeypatch):
    updates = []

    def watched(weight, mask, growth, rate):
        new = prune_and_regrow(weight, mask, growth, rate)
        updates.append((int(mask.sum()), int(new.sum()), torch.equal(mask, new)))
        return new

    monkeypatch.setattr("secateurs.methods.weights.granet.prune_and_regrow", watched)
    train_attached(GraNet(end=30, frequency=1))
    # three layers, every step but the last
    assert len(updates) == 3 * 59
    assert all(before == after for before, after, _ in updates)
    assert sum(unchanged for *_, unchanged in updates) < len(updates) / 2


def test_the_exchange_rate_falls_along_the_whole_training(train_attached, monkeypatch):
    rates = []

    def watched(weight, mask, growth, rate):
        rates.append(rate)
        return mask

    monkeypatch.setattr("secateurs.methods.weights.granet.prune_and_regrow", watched)
    train_attached(GraNet(end=30, frequency=1))
    decay = CosineDecay(0.5, 60, floor=0.005)
    assert rates[::3] == pytest.approx([decay(t) for t in range(1, 60)])


def test_counts_are_exact_among_equal_weights():
    at = attach(torch.ones(4, 5), "sparsity=0.6", end=1.0)
    for now in range(1, 11):
        step(at, torch.zeros(4, 5))
        assert at.masks.kept == 20 - round(Cubic(0.6, 0, 10)(now) * 20)
    assert at.masks.kept == 8


# the random start


@pytest.mark.parametrize("allocation", ["erk", "er", "uniform"])
def test_the_start_has_the_densities_of_its_allocation_exactly(train_attached, allocation):
    seen = Seen()
    at = train_attached(GraNet(initial=0.5, start_allocation=allocation), steps=1, after=seen)
    keep = at.masks.total - round(0.5 * at.masks.total)
    assert seen[0].kept_by_tensor() == allocate_counts(at.params, keep, allocation)


def test_the_start_is_random_and_a_function_of_the_seed(digits_task):
    def start(seed):
        model = digits_task.fresh_model(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        at = GraNet(initial=0.5).attach(model, optimizer, "sparsity=0.9", 10, seed=seed)
        weights = digits_task.fresh_model(0)[0].weight.detach().abs()
        kept, gone = weights[at.masks["0.weight"]], weights[~at.masks["0.weight"]]
        assert kept.mean() == pytest.approx(gone.mean().item(), rel=0.1)
        return at.masks

    assert same(start(0), start(0))
    assert not same(start(0), start(1))


# what weights hold


def test_worked_example_of_the_card():
    weight = torch.tensor([[0.5, 0.1, 0.0, 0.0, 0.3]])
    options = {"regrow_rate": 0.34, "regrow_floor": 0.34, "initial": 0.4, "end": 0.0}
    at = attach(weight, "sparsity=0.4", frequency=1, **options)
    at.masks.update({"weight": torch.tensor([[True, True, False, False, True]])})
    with torch.no_grad():
        at.model.weight.copy_(weight)
    step(at, torch.tensor([[0.0, 9.0, 1.0, 2.0, 0.0]]))
    assert at.masks["weight"].int().tolist() == [[1, 1, 0, 1, 0]]
    assert at.model.weight.tolist() == [pytest.approx([0.5, 0.1, 0.0, 0.0, 0.0])]


def test_what_is_dropped_and_grown_at_once_keeps_value_and_momentum():
    weight = torch.tensor([[0.5, 0.1, 0.4, 0.3]])
    at = attach(weight, "sparsity=0", momentum=0.9, regrow_rate=0.25, frequency=1)
    step(at, torch.tensor([[0.0, 9.0, 0.0, 0.0]]))
    assert at.masks["weight"].all()
    assert at.model.weight.tolist() == weight.tolist()
    assert momentum_of(at, "weight").tolist() == [[0.0, 9.0, 0.0, 0.0]]


def test_what_the_cut_zeroed_and_is_grown_again_starts_from_zero():
    # the ramp's only update cuts index 1; the gradient is largest there, so it is grown again
    weight = torch.tensor([[0.5, 0.1, 0.4, 0.3]])
    at = attach(weight, "sparsity=0.25", momentum=0.9, regrow_rate=0.3, begin=2, end=2)
    gradient = torch.tensor([[1.0, 9.0, 1.0, 1.0]])
    step(at, gradient)
    assert momentum_of(at, "weight").tolist() == [[1.0, 9.0, 1.0, 1.0]]
    step(at, gradient)
    assert at.masks["weight"].int().tolist() == [[1, 1, 1, 0]]
    assert at.model.weight[0, 1] == 0
    assert momentum_of(at, "weight")[0, 1] == 0
    assert momentum_of(at, "weight")[0, 3] == 0
    assert momentum_of(at, "weight")[0, 0] == pytest.approx(1.9)


@pytest.mark.parametrize("initial", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_removed_weights_and_their_moments_are_zero_after_every_step(
    digits_task, run_steps, initial, optimizer
):
    model = digits_task.fresh_model(0)
    made = (
        torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)
        if optimizer == "adam"
        else torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    )
    at = GraNet(initial=initial, frequency=2).attach(model, made, "sparsity=0.9", 40)

    def check():
        for name, mask in at.masks.items():
            assert not at.params[name][~mask].any()
            for value in made.state[at.params[name]].values():
                if value.shape == mask.shape:
                    assert not value[~mask].any()

    run_steps(model, made, 0, 40, check)
    assert at.step == 40
    inputs = digits_task.example_inputs
    masked = nn.functional.linear(inputs, model[0].weight * at.masks["0.weight"], model[0].bias)
    assert torch.equal(model.eval()[0](inputs), masked)


def test_growth_sees_the_dense_gradient(train_attached):
    def watch(at):
        if at.step == 1:
            assert all(p.grad[~start[n]].any() for n, p in at.params.items() if n != "4.weight")
        start.update(at.masks.clone())

    start = {}
    train_attached(GraNet(initial=0.5), steps=2, after=watch)


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_connections_grow_where_they_should(growth):
    weight = torch.cat([torch.ones(1, 50), torch.zeros(1, 450)], 1)
    gradient = torch.cat([torch.zeros(1, 450), torch.ones(1, 50)], 1)
    at = attach(weight, "sparsity=0.9", initial=0.9, growth=growth, end=0.0, frequency=1)
    at.masks.update({"weight": weight.bool()})
    with torch.no_grad():
        at.model.weight.copy_(weight)
    step(at, gradient)
    grown = at.masks["weight"] & ~weight.bool()
    assert at.masks.kept == 50
    assert bool((grown & (gradient == 0)).any()) == (growth == "random")


# resume


@pytest.mark.parametrize("options", [{}, {"initial": 0.5}, {"growth": "random"}])
@pytest.mark.parametrize("interrupt", [1, 14, 45])
def test_a_run_resumed_in_mid_ramp_gives_the_same_masks(train_attached, options, interrupt):
    method = GraNet(frequency=2, **options)
    whole = train_attached(method)
    resumed = train_attached(method, interrupt=interrupt)
    assert same(whole.masks, resumed.masks)
    assert all(torch.equal(whole.params[n], resumed.params[n]) for n in whole.params)


def test_by_name_and_task(digits_task, trained):
    outcome = sc.prune(trained, "granet", "sparsity=0.9", digits_task, initial=0.5)
    assert outcome.promise.kept
    assert outcome.metrics_after["accuracy"] > 0.6


# what is refused


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"initial": 1.0}, "initial"),
        ({"initial": -0.1}, "initial"),
        ({"regrow_rate": 1.0}, "regrow_rate"),
        ({"regrow_floor": -0.1}, "regrow_floor"),
        ({"frequency": 0}, "frequency"),
    ],
)
def test_bad_options_are_refused_by_name(options, argument):
    with pytest.raises(InputError) as caught:
        GraNet(**options)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"initial": 0.95}, "initial"), ({"begin": 0.6, "end": 0.5}, "end"), ({"end": 11}, "end")],
)
def test_what_does_not_fit_the_training_is_refused(options, argument):
    with pytest.raises(InputError) as caught:
        attach(torch.ones(4, 4), "sparsity=0.9", **options)
    assert caught.value.argument == argument


def test_a_missing_gradient_at_an_update_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GraNet(frequency=1).attach(model, optimizer, "sparsity=0.5", 4)
    model[0](torch.ones(1, 4)).sum().backward()
    with pytest.raises(InputError, match=r"^1\.weight: got None; accepted: a gradient"):
        optimizer.step()
