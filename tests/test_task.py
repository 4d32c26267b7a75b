"""Tasks: what a batch is, how quality is measured, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.devices import to_device
from secateurs.errors import InputError
from secateurs.task import batch_size, head, logits_of, multitask, seeded, split_batch

LABELS = torch.tensor([0, 1, 2, 0, 1])
INPUTS = F.one_hot(torch.tensor([0, 1, 1, 0, 2]), 3).float()


def pairs(size=2, shuffle=False):
    return DataLoader(TensorDataset(INPUTS, LABELS), size, shuffle=shuffle)


def make_net():
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3, bias=False))


def test_samples_count_equally_whatever_the_batches():
    """Three of five inputs point at their label; batches of 2, 2 and 1."""
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(2 * torch.eye(3))
    task = sc.classification(model, None, pairs())
    loss = float(F.cross_entropy(2 * INPUTS, LABELS))
    assert task.measure(model) == pytest.approx({"accuracy": 0.6, "loss": loss})
    assert task.measure(model, pairs(5)) == pytest.approx({"accuracy": 0.6, "loss": loss})


def test_measuring_leaves_mode_and_generator_alone():
    model = make_net()
    model[1].eval()  # as a user freezes a normalisation layer
    task = sc.classification(make_net, None, pairs(shuffle=True))
    before = torch.get_rng_state()
    assert task.measure(model) == task.measure(model)
    assert [m.training for m in model.modules()] == [True, True, False]
    assert torch.equal(before, torch.get_rng_state())


def test_label_smoothing_is_the_loss_of_training_and_measuring():
    model = nn.Linear(3, 3)
    task = sc.classification(model, None, pairs(), label_smoothing=0.2)
    expected = F.cross_entropy(model(INPUTS[:2]), LABELS[:2], label_smoothing=0.2)
    assert torch.equal(task.batch_loss(model, (INPUTS[:2], LABELS[:2])), expected)


class Tagger(nn.Module):
    """Takes keyword arguments, answers with a field `logits`, as transformers do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 7)

    def forward(self, tokens):
        return type("Output", (), {"logits": self.table(tokens)})()


def test_dictionaries_with_labels_are_keyword_arguments():
    data = [{"tokens": torch.tensor([1, 2, 3]), "labels": torch.tensor([2, 3, 4])}] * 2
    task = sc.language_modelling(Tagger, None, DataLoader(data, 2))
    model = task.fresh_model(0)
    measured = task.measure(model)
    logits = model.table.weight[[1, 2, 3]].detach()
    nll = float(F.cross_entropy(logits, torch.tensor([2, 3, 4])))
    assert measured["perplexity"] == pytest.approx(math.exp(nll))
    assert measured["loss"] == pytest.approx(nll)
    assert not task.higher_is_better
    assert task.example_inputs["tokens"].shape == (1, 3)


def test_other_batches_need_a_split():
    three = (INPUTS, LABELS, LABELS)
    with pytest.raises(InputError, match=r"Task\(split=\.\.\.\)"):
        split_batch(three)
    with pytest.raises(InputError, match="a key 'labels'"):
        split_batch({"x": INPUTS})
    loader = DataLoader(TensorDataset(INPUTS, LABELS, LABELS), 2)
    task = sc.Task(
        nn.Linear(3, 3),
        None,
        loader,
        sc.task.cross_entropy(),
        {"first": sc.Metric(lambda output, target: output[:, 0])},
        INPUTS[:1],
        primary="first",
        split=lambda batch: batch[:2],
    )
    expected = float(task.model(INPUTS)[:, 0].detach().mean())
    assert task.measure(task.model)["first"] == pytest.approx(expected)


def test_fresh_models_come_from_the_seed_alone():
    task = sc.classification(make_net, None, pairs())
    before = torch.get_rng_state()
    one, two, other = task.fresh_model(1), task.fresh_model(1), task.fresh_model(2)
    assert torch.equal(one[1].weight, two[1].weight)
    assert not torch.equal(one[1].weight, other[1].weight)
    assert torch.equal(before, torch.get_rng_state())
    assert seeded(lambda: torch.rand(1), 3) == seeded(lambda: torch.rand(1), 3)


def test_a_given_module_is_where_it_starts_and_cannot_be_fresh():
    model = make_net()
    task = sc.classification(model, None, pairs())
    assert task.starting_model(5) is model
    with pytest.raises(InputError, match="task.model: got a module"):
        task.fresh_model(0)
    made = task.with_model(make_net)
    assert torch.equal(made.starting_model(5)[1].weight, made.fresh_model(5)[1].weight)


def test_refusals():
    with pytest.raises(InputError, match="did you mean 'accuracy'"):
        sc.classification(make_net, None, pairs(), primary="acuracy")
    task = sc.classification(make_net, None, pairs())
    with pytest.raises(InputError, match="task.train: got None"):
        task.training_loader()
    with pytest.raises(InputError, match="an empty loader"):
        task.measure(task.fresh_model(0), [])
    with pytest.raises(InputError, match="tensors"):
        batch_size("text")


def test_nested_batches_keep_their_shape():
    batch = {"a": [INPUTS, (LABELS, "note")], "b": 3}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["a"][1][1] == "note"
    assert moved["b"] == 3
    assert isinstance(moved["a"][1], tuple)
    first = head(batch, 2)
    assert first["a"][0].shape == (2, 3)
    assert first["a"][1][0].tolist() == [0, 1]
    assert batch_size(batch) == 5


def test_the_loss_of_several_tasks_is_the_sum_of_theirs():
    losses = {
        "square": lambda out, target: (out - 1).square().mean(),
        "label": lambda out, target: F.cross_entropy(out, target),
    }
    first = sc.Metric(lambda out, target: (out.argmax(1) == target).float())
    task = multitask(make_net, None, pairs(), losses, {"right": first})
    model = task.fresh_model(0)
    assert task.primary == "right"
    found = task.measure_losses(model)
    whole = model.eval()(INPUTS).detach()
    assert found == pytest.approx({k: float(f(whole, LABELS)) for k, f in losses.items()})
    assert task.measure(model)["loss"] == pytest.approx(sum(found.values()))
    assert task.measure_losses(model, pairs(5)) == pytest.approx(found)


def test_a_single_loss_is_a_task_of_its_own():
    task = sc.classification(make_net, None, pairs())
    model = task.fresh_model(0)
    assert task.measure_losses(model) == {"loss": task.measure(model)["loss"]}


@pytest.mark.parametrize(("losses", "metrics"), [({}, {"a": None}), ({"a": None}, {})])
def test_several_tasks_need_losses_and_metrics(losses, metrics):
    with pytest.raises(InputError, match="losses|metrics"):
        multitask(make_net, None, pairs(), losses, metrics)


def test_losses_over_nothing_are_refused():
    with pytest.raises(InputError, match="at least one batch"):
        sc.classification(make_net, None, pairs()).measure_losses(make_net(), [])


def test_logits_are_the_output_or_its_field():
    logits = torch.randn(2, 3)
    assert logits_of(logits) is logits
    assert logits_of({"loss": logits.mean(), "logits": logits}) is logits
    assert logits_of(SimpleNamespace(logits=logits)) is logits
    told = "output of the model: got a dict with last_hidden_state, pooler_output; accepted: a tens"
    with pytest.raises(InputError, match=told):
        logits_of({"last_hidden_state": logits, "pooler_output": logits})
    with pytest.raises(InputError, match="got a tuple; accepted"):
        logits_of((logits, logits))
