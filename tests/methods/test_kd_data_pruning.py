"""The method's arithmetic, who is kept, what the teacher is asked, and what it is refused."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.samples.kd_data_pruning import KDDataPruning, auto_alpha, best
from secateurs.parts.budgets import Budget
from secateurs.selection.random_rows import random_selection
from secateurs.selection.result import read_selection
from secateurs.selection.sources import from_arrays
from secateurs.training.distillation import distilled, soft_label_loss, with_stored_answers

from .conftest import TRAINING, digits, make


@pytest.fixture
def task(digits_task):
    return replace(digits_task, training=sc.TrainSettings(steps=20, lr=0.2))


def run(task, budget="keep=0.25", model=None, **options):
    own = task.fresh_model(0) if model is None else model
    return sc.prune(own, "kd-data-pruning", budget, task, **options)


def facts(outcome):
    return outcome.tables["the kept part"][0]


class Forbidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        raise AssertionError("the teacher was asked")


def test_alpha_falls_as_more_is_kept():
    fractions = (0.001, 0.02, 0.1, 0.5, 1.0)
    assert [auto_alpha(f) for f in fractions] == pytest.approx([1, 1, 0.9, 0.5, 0.25])
    halfway = auto_alpha(math.sqrt(0.1 * 0.5))
    assert halfway == pytest.approx(0.7)
    many = [auto_alpha(f) for f in np.geomspace(1e-3, 1, 50)]
    assert many == sorted(many, reverse=True)


def test_the_numbers_of_the_card():
    """z_s = (2, 0, 0), z_t = (0, 2, 0): KL 1.3610 at τ = 1, 0.0889 at 4, with τ² 1.4224."""
    student = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64)
    for tau, scaled, wanted in ((1, True, 1.3610), (4, False, 0.0889), (4, True, 1.4224)):
        ((a, b, c),) = (student / tau).softmax(1).tolist()
        ((p, q, r),) = (teacher / tau).softmax(1).tolist()
        plain = p * math.log(p / a) + q * math.log(q / b) + r * math.log(r / c)
        assert plain * (tau**2 if scaled else 1) == pytest.approx(wanted, abs=1e-3)
        found = float(soft_label_loss(student, teacher, float(tau), scaled=scaled))
        assert found == pytest.approx(plain * (tau**2 if scaled else 1), abs=1e-12)
    inputs, model = torch.zeros(1, 1), nn.Linear(1, 3).double()
    with torch.no_grad():
        model.bias.copy_(student[0])
    loader = DataLoader(TensorDataset(inputs.double(), torch.tensor([0])), 1)
    task = sc.classification(model, loader, loader)
    taught = copy.deepcopy(model)
    with torch.no_grad():
        taught.bias.copy_(teacher[0])
    own = distilled(task, taught, alpha=0.25, temperature=4.0, reduction="samples")
    entropy = -math.log(float(student.softmax(1)[0, 0]))
    loss = own.batch_loss(model, next(iter(loader))).item()
    assert loss == pytest.approx(0.75 * entropy + 0.25 * 1.4224, abs=1e-3)


def test_all_samples_and_no_teacher_are_the_ordinary_training(task):
    outcome = run(task, "keep=1", alpha=0.0, seed=3)
    plain = task.fresh_model(0)
    sc.fit(plain, task, task.training, seed=3)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, outcome.model.state_dict()[name])
    assert facts(outcome)["teacher_forwards"] == 0


def test_without_a_share_the_teacher_is_never_asked(task):
    batch = next(iter(task.train))
    model = task.fresh_model(1)
    own = distilled(task, Forbidden(), alpha=0.0)
    assert torch.equal(own.batch_loss(model, batch), task.batch_loss(model, batch))


def test_with_the_whole_share_labels_do_not_matter(task):
    inputs, labels = next(iter(task.train))
    model = task.fresh_model(1)
    own = distilled(task, task.fresh_model(2), alpha=1.0, temperature=4.0, reduction="samples")
    gradients = []
    for target in (labels, labels.flip(0)):
        model.zero_grad()
        own.batch_loss(model, (inputs, target)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_teacher_has_seen_everything_and_the_student_a_part(task, tmp_path):
    outcome = run(task, "keep=0.25", work=sc.Workspace(tmp_path))
    told = facts(outcome)
    assert told["kept"] == round(TRAINING / 4)
    assert told["updates"] == 5, "as many epochs, so a fourth of the updates"
    assert told["alpha"] == pytest.approx(auto_alpha(0.25))
    assert told["teacher_forwards"] == 5 * 32
    assert told["teacher_macs"] == 5 * 32 * outcome.before.macs
    teacher = task.fresh_model(0)
    from secateurs.training.order import mix

    sc.fit(teacher, task, task.training, seed=mix(0, 401))
    assert outcome.metrics_before == task.measure(teacher)
    assert [(row["arm"], row["samples"]) for row in outcome.history] == [
        ("teacher", TRAINING), ("student", round(TRAINING / 4)),
    ]  # fmt: skip
    kept = read_selection(tmp_path / "kept.parquet")
    assert kept["keep"].sum() == told["kept"]


def test_as_many_updates_where_that_is_asked_for(task):
    assert facts(run(task, length="iterations"))["updates"] == 20
    epochs = replace(task, training=sc.TrainSettings(epochs=2, lr=0.1))
    assert facts(run(epochs, "keep=0.1"))["updates"] == 2 * math.ceil(TRAINING * 0.1 / 32)
    assert facts(run(epochs, "keep=0.1", length="iterations"))["updates"] == 2 * TRAINING // 32


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU())
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        return self.last(self.body(x))


def test_a_teacher_that_the_task_brings_is_used_and_not_touched(task):
    teacher = Normalized()
    sc.fit(teacher, task, task.training)
    before = copy.deepcopy(teacher.state_dict())
    own = distilled(task, teacher, alpha=0.3)
    for answers in ("online", "stored"):
        outcome = run(own, "keep=0.1", answers=answers)
        assert facts(outcome)["teacher_parameters"] == sum(p.numel() for p in teacher.parameters())
        assert facts(outcome)["alpha"] == pytest.approx(0.9)
        assert outcome.metrics_before == task.measure(teacher)
        assert not own.teacher.training
        for name, tensor in own.teacher.state_dict().items():
            assert torch.equal(tensor, before[name])
    assert outcome.notes == []


def test_a_large_teacher_for_few_samples_is_noted(task):
    own = distilled(task, make(4.0))
    assert any("times the student's parameters" in n for n in run(own, "keep=0.05").notes)
    assert run(own, "keep=0.5").notes == []


def test_stored_and_asked_answers_are_the_same_without_augmentation(task):
    teacher = task.fresh_model(5)
    asked = distilled(task, teacher, alpha=0.5, temperature=4.0, reduction="samples")
    stored = with_stored_answers(asked)
    student = task.fresh_model(6)
    for alike in (asked, stored):
        sc.fit(student, alike, sc.TrainSettings(steps=1), seed=2)
    one, two = task.fresh_model(6), task.fresh_model(6)
    sc.fit(one, asked, task.training, seed=2)
    sc.fit(two, stored, task.training, seed=2)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    calls = [facts(run(task, answers=a))["teacher_forwards"] for a in ("online", "stored")]
    assert calls == [5 * 32, TRAINING // 4]


def test_answers_that_are_not_finite_are_refused(task):
    teacher = task.fresh_model(0)
    with torch.no_grad():
        teacher[4].bias[3] = torch.nan
    for answers in ("online", "stored"):
        with pytest.raises(InputError, match="teacher: got NaN or Inf for sample 0"):
            run(distilled(task, teacher), answers=answers)


def test_alpha_is_tuned_on_samples_that_nothing_is_trained_on(task):
    outcome = run(task, "keep=0.5", alpha="tune", alphas=(0.0, 0.5, 1.0), held_out=0.2)
    tried = outcome.tables["alphas tried"]
    assert [row["alpha"] for row in tried] == [0.0, 0.5, 1.0]
    assert facts(outcome)["alpha"] == best(tried, task)
    chosen = next(row for row in tried if row["alpha"] == facts(outcome)["alpha"])
    assert chosen["accuracy"] == max(row["accuracy"] for row in tried)
    with pytest.raises(InputError, match="held_out: got 1 samples, all of which"):
        run(task, f"keep={1 / TRAINING}", alpha="tune", held_out=0.99)


@pytest.mark.parametrize("selector", ["density-based-pruning", "prune-combine-augment"])
def test_any_selector_may_choose(task, selector):
    options = {"epsilon": None} if "density" in selector else {"runs": 1}
    outcome = run(task, "keep=0.25", selector=selector, selector_options=options)
    assert facts(outcome)["kept"] == pytest.approx(TRAINING / 4, abs=40)
    assert facts(outcome)["selector"] == selector


class Convolutional(nn.Module):
    """Without a linear layer at its end."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(1, 10, 8)

    def forward(self, x):
        return self.last(x.view(-1, 1, 8, 8)).flatten(1)


@pytest.mark.parametrize("options", [{"metric": "random"}, {"metric": "el2n", "runs": 1}])
def test_features_are_not_asked_of_the_teacher_where_the_selector_reads_none(task, options):
    task = replace(task, model=Convolutional)
    outcome = run(task, "keep=0.5", selector="neural-scaling", selector_options=options)
    assert facts(outcome)["kept"] == TRAINING // 2
    with pytest.raises(InputError, match="one that ends in a linear layer, for embeddings"):
        run(task, "keep=0.5", selector="neural-scaling")


def test_random_rows_are_the_same_for_any_shards():
    labels = np.repeat(np.arange(5), [400, 300, 200, 90, 10])
    chosen = []
    for shards in (1, 7, 64):
        source = from_arrays(None, np.arange(1000), labels, rows=-(-1000 // shards))
        selection = random_selection(source, Budget.parse("keep=0.1234"), seed=4)
        assert selection.kept == 123
        chosen.append(selection.indices.tolist())
        fair = random_selection(source, Budget.parse("keep=0.1"), seed=4, per_class=True)
        assert [row["kept"] for row in fair.by_class()] == [40, 30, 20, 9, 1]
    assert chosen[0] == chosen[1] == chosen[2]
    other = random_selection(source, Budget.parse("keep=0.1234"), seed=5)
    assert other.indices.tolist() != chosen[0]


def test_the_same_share_of_every_class(task):
    method = KDDataPruning(per_class=True)
    chosen = method.choose(task, Budget.parse("keep=0.1"), task.fresh_model(0), 0, sc.Workspace())
    labels = digits()[1][:TRAINING].numpy()
    kept = np.bincount(labels[chosen.indices], minlength=10)
    assert np.abs(kept - np.bincount(labels) / 10).max() < 1
    assert kept.sum() == round(TRAINING / 10)


def test_bad_options_are_refused(task):
    for wrong, told in (
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"alphas": (0.5, 2.0)}, "alpha"),
        ({"alphas": ()}, "alphas"),
        ({"temperature": 0.0}, "temperature"),
        ({"held_out": 1.0}, "held_out"),
        ({"selector": "magnitude"}, "selector: got 'magnitude'"),
        ({"selector": "no-such"}, "method: got 'no-such'"),
        ({"selector_options": {"clusters": 3}}, "selector_options"),
        ({"selector": "density", "per_class": True}, "per_class"),
        ({"selector": "density", "selector_options": {"cluster": 3}}, "option: got 'cluster'"),
    ):
        with pytest.raises(InputError, match=told):
            run(task, **wrong)
    for budget in ("keep=0", "keep=1.1", "sparsity=0.5"):
        with pytest.raises(InputError, match="budget"):
            run(task, budget)
    with pytest.raises(InputError, match="keep: got 0.0001"):
        run(task, "keep=0.0001")


def test_a_teacher_of_other_classes_and_loaders_without_rows_are_refused(task):
    with pytest.raises(InputError, match="logits: got .*of one shape"):
        run(distilled(task, nn.Linear(64, 7)))
    with pytest.raises(InputError, match="with stored answers"):
        run(with_stored_answers(distilled(task, task.fresh_model(0))))

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(*digits()))

    with pytest.raises(InputError, match="task.train"):
        run(replace(task, train=DataLoader(Stream(), 32)))
    images, _ = digits()
    dense = TensorDataset(images[:64], images[:64])
    with pytest.raises(InputError, match="labels: got targets of another kind"):
        run(replace(task, train=DataLoader(dense, 32), loss=lambda o, t: o.square().mean()),
            per_class=True)  # fmt: skip
