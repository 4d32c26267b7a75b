"""The loop: whatever is random at update t is drawn from (seed, t), so it starts anywhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateurs as sc
from secateurs.errors import DivergedError, InputError
from secateurs.parts.masks import Masks
from secateurs.parts.prunable import prunable_parameters
from secateurs.settings import TrainSettings
from secateurs.training.loop import fit, fit_once, total_steps
from secateurs.workspace import Workspace


def trained(task, seed=0, **options):
    model = task.fresh_model(3)
    fit(model, task, task.training, seed=seed, **options)
    return model.state_dict()


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def differ(one, two):
    return any(not torch.equal(tensor, two[name]) for name, tensor in one.items())


def watched(task, recorder, *parts):
    """Inputs and learning rates, update by update, of trainings over several parts."""
    seen, ear = [], recorder()

    def split(batch):
        seen.append(batch[0])
        return batch

    watching = replace(task, split=split)
    model = task.fresh_model(0)
    for begin, end in parts:
        work = Workspace(listeners=[ear])
        fit(model, watching, task.training, seed=1, start_step=begin, stop_step=end, work=work)
    return seen, [event["lr"] for event in ear.of("train")]


@pytest.mark.parametrize("cut", [1, 10, 11, 12, 29])
def test_a_training_in_two_parts_sees_the_batches_and_rates_of_one(tiny_task, recorder, cut):
    task = tiny_task(noise=0.5, warmup=3)
    seen, rates = watched(task, recorder, (0, 30))
    seen_again, rates_again = watched(task, recorder, (0, cut), (cut, 30))
    assert rates == rates_again
    assert len(seen) == len(seen_again) == 30
    assert all(torch.equal(a, b) for a, b in zip(seen, seen_again, strict=True))


def test_without_momentum_two_parts_are_one_training_bit_for_bit(tiny_task):
    task = tiny_task(noise=0.5, momentum=0.0)
    model = task.fresh_model(3)
    fit(model, task, task.training, stop_step=13)
    fit(model, task, task.training, start_step=13)
    assert_same(model.state_dict(), trained(task))


def test_with_the_optimizer_handed_on_two_parts_are_one_training(tiny_task):
    task = tiny_task(noise=0.5, optimizer="adam", lr=0.01)
    model = task.fresh_model(3)
    first = fit_once(model, task, task.training, stop_step=13, keep_optimizer=True)
    fit(model, task, task.training, start_step=13, optimizer_state=first.optimizer)
    assert_same(model.state_dict(), trained(task))


def test_a_rewound_training_goes_on_at_step_k(tiny_task, recorder):
    """T=100, k=20, milestones 50 and 75: 80 updates, the drops at the 30th and 55th of them."""
    task = tiny_task(
        steps=100, lr=1.0, schedule="step", milestones=(0.5, 0.75), warmup=10, weight_decay=0.0
    )
    _, rates = watched(task, recorder, (20, 100))
    assert len(rates) == 80
    drops = [i for i in range(1, 80) if rates[i] != rates[i - 1]]
    assert drops == [30, 55]
    assert rates[0] == 1.0, "the warm-up is not repeated"
    assert [rates[29], rates[30], rates[55]] == pytest.approx([1.0, 0.1, 0.01])


@given(
    st.integers(2, 400).flatmap(lambda total: st.tuples(st.integers(1, total - 1), st.just(total)))
)
def test_a_milestone_given_as_a_fraction_is_met_at_its_step(place):
    step, total = place
    recipe = TrainSettings(lr=1.0, schedule="step", milestones=(step / total,))
    assert recipe.rate_at(step - 1, total) == 1.0
    assert recipe.rate_at(step, total) == pytest.approx(0.1)


def test_rates_of_the_schedules_at_their_ends():
    cosine = TrainSettings(lr=2.0, warmup=4)
    assert [cosine.rate_at(s, 104) for s in (0, 3, 4)] == pytest.approx([0.4, 1.6, 2.0])
    assert cosine.rate_at(54, 104) == pytest.approx(1.0)
    assert cosine.rate_at(104, 104) == pytest.approx(0.0, abs=1e-12)
    linear = TrainSettings(lr=2.0, schedule="linear")
    assert [linear.rate_at(s, 8) for s in (0, 2, 8)] == pytest.approx([2.0, 1.5, 0.0])
    assert TrainSettings(lr=2.0, schedule="constant").rate_at(7, 8) == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("optimizer", "rmsprop"), ("schedule", "cosin"), ("precision", "fp8")),
        *(("lr", 0.0), ("lr", float("nan")), ("momentum", 1.0), ("weight_decay", -1e-4)),
        *(("milestones", (0.5, 1.0)), ("warmup", -1), ("clip_norm", 0.0), ("epochs", -1)),
    ],
)
def test_settings_refuse_what_they_cannot_mean(field, value):
    with pytest.raises(InputError, match=field):
        TrainSettings(**{field: value})


def test_the_seed_decides_every_bit(tiny_task):
    task = tiny_task(noise=0.5)
    first = trained(task, seed=4)
    torch.manual_seed(99)
    assert_same(first, trained(task, seed=4))
    assert differ(first, trained(task, seed=5))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_at", [0, 9, 17])
def test_a_killed_training_resumes_to_the_same_bits(
    tiny_task, recorder, tmp_path, workers, stop_at
):
    """Dropout, augmentation, momentum and a pruner that grows by gradients, all in flight."""
    task = tiny_task(noise=0.5, workers=workers)
    method = sc.create("granet", {"frequency": 3})

    def attach(model, optimizer, total):
        return [method.attach(model, optimizer, "sparsity=0.7", total)]

    whole = trained(task, attach=attach)
    work = Workspace(tmp_path, [recorder(stop_at)], snapshot_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        trained(task, attach=attach, work=work)
    ear = recorder()
    resumed = trained(task, attach=attach, work=Workspace(tmp_path, [ear]))
    assert_same(whole, resumed)
    assert [e["step"] for e in ear.of("train")] == list(range(stop_at, 30))


def test_the_number_of_loader_workers_changes_nothing(tiny_task):
    assert_same(trained(tiny_task(noise=0.5)), trained(tiny_task(noise=0.5, workers=2)))


def test_the_global_generator_is_left_alone(tiny_task, tmp_path):
    task = tiny_task(noise=0.5)
    model = task.fresh_model(0)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    fit(model, task, task.training, evaluate_every=7, work=Workspace(tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(DivergedError):
        fit(model, replace(task, loss=lambda output, _: output.sum() * torch.inf), task.training)
    assert torch.equal(before, torch.get_rng_state()), "not even by a training that failed"


@pytest.mark.parametrize(("bad", "kind"), [(torch.nan, "NaN"), (torch.inf, "Inf")])
def test_a_loss_that_is_not_finite_names_the_step(tiny_task, bad, kind):
    task = tiny_task()
    calls = []

    def loss(output, target):
        calls.append(0)
        return output.sum() * 0 + (bad if len(calls) == 8 else 1.0)

    with pytest.raises(DivergedError, match=f"{kind} at step 7 of arm/big"):
        fit(
            task.fresh_model(0),
            replace(task, loss=loss),
            task.training,
            name="big",
            work=Workspace().child("arm"),
        )


def test_bf16_trains_float32_weights_and_leaves_the_model_as_it_was(tiny_task):
    task = tiny_task()
    half = replace(task.training, precision="bf16")
    model = task.fresh_model(3)
    begin = task.measure(model)["loss"]
    fit(model, task, half)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model), "Accelerate's wrapper was left on"
    assert task.measure(model)["loss"] < begin
    exact = trained(task)
    assert differ(model.state_dict(), exact), "it did not run in bf16"
    assert_same(exact, trained(task))


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (31, None), (5, 4), (0, 31)])
def test_parts_outside_the_training_are_refused(tiny_task, start, stop):
    with pytest.raises(InputError, match=r"start_step|stop_step"):
        trained(tiny_task(), start_step=start, stop_step=stop)


class Hook:
    def __init__(self):
        self.calls = []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def finish(self):
        self.calls.append("finish")

    def remove(self):
        self.calls.append("remove")


def test_hooks_finish_with_the_training_and_are_removed_in_any_case(tiny_task):
    task = tiny_task()
    part, whole, failed = Hook(), Hook(), Hook()
    trained(task, stop_step=29, attach=lambda *_: [part])
    trained(task, attach=lambda *_: [whole])
    broken = replace(task, loss=lambda output, _: output.sum() * torch.nan)
    with pytest.raises(DivergedError):
        trained(broken, attach=lambda *_: [failed])
    assert [part.calls, whole.calls, failed.calls] == [["remove"], ["finish", "remove"], ["remove"]]


def test_evaluations_are_made_every_so_many_updates(tiny_task):
    task = tiny_task()
    model = task.fresh_model(3)
    history = fit(model, task, task.training, evaluate_every=12)
    assert [step for step, _ in history.evaluations] == [12, 24]
    half = task.fresh_model(3)
    fit(half, task, task.training, stop_step=12)
    assert history.evaluations[0][1] == task.measure(half)


def test_clipping_bounds_the_first_update(tiny_task):
    task = tiny_task(lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=1e-3, schedule="constant")
    before = {n: p.detach() for n, p in task.fresh_model(3).named_parameters()}
    after = trained(task, stop_step=1)
    moved = torch.stack([(after[n] - p).norm() for n, p in before.items()]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-3)


def test_a_finished_training_is_read_not_repeated(tiny_task, tmp_path):
    task = tiny_task()
    first = task.fresh_model(3)
    done = fit_once(first, task, task.training, work=Workspace(tmp_path, snapshot_seconds=0.0))
    second = task.fresh_model(4)
    unable = replace(task, loss=lambda output, _: 1 / 0)
    read = fit_once(second, unable, task.training, work=Workspace(tmp_path))
    assert_same(first.state_dict(), second.state_dict())
    assert read.history == done.history
    assert not list(tmp_path.glob("*.snapshot"))


def test_masks_hold_through_a_training_and_its_last_step(tiny_task):
    task = tiny_task()
    model = task.fresh_model(3)
    masks = Masks({n: p.abs() > 0.1 for n, p in prunable_parameters(model).items()})
    sc.finetune(sc.Outcome(model, masks), task, task.training)
    for name, mask in masks.items():
        assert bool((model.get_parameter(name)[~mask] == 0).all())
        assert bool((model.get_parameter(name)[mask] != 0).any())


@settings(max_examples=30)
@given(st.floats(0, 20), st.integers(1, 50))
def test_epochs_are_rounded_to_whole_steps(epochs, per_epoch):
    assert TrainSettings(epochs=epochs).total_steps(per_epoch) == round(epochs * per_epoch)
    assert TrainSettings(epochs=epochs, steps=7).total_steps(per_epoch) == 7


def test_total_steps_of_a_task(tiny_task):
    assert total_steps(tiny_task(steps=None, epochs=2.5), TrainSettings(epochs=2.5)) == 28
