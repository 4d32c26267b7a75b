"""Outcomes on disk: whole or not at all, loaded anywhere, and the first misfit is named."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.outcome import Outcome, Promise, load, outcome_folder, save
from secateurs.parts.masks import Masks
from secateurs.state import read_tensors, write_tensors


def make_net(hidden=12):
    return nn.Sequential(
        nn.Linear(8, hidden), nn.BatchNorm1d(hidden), nn.Dropout(0.5), nn.Linear(hidden, 3)
    )


def make_task():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(40, 8, generator=generator)
    data = TensorDataset(points, (points[:, 0] > 0).long())
    settings = sc.TrainSettings(steps=6)
    return sc.classification(
        make_net,
        DataLoader(data, 8, shuffle=True),
        DataLoader(data, 40),
        training=settings,
        finetuning=settings,
    )


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture(scope="module")
def outcome(task):
    return sc.prune(task.fresh_model(0), "gmp", "sparsity=0.7", task, seed=3, with_latency=True)


def test_everything_comes_back(task, outcome, tmp_path):
    folder = save(outcome, tmp_path / "out")
    read = load(folder, make_net)
    for name, tensor in outcome.model.state_dict().items():
        assert torch.equal(tensor, read.model.state_dict()[name])
    for name, mask in outcome.masks.items():
        assert torch.equal(mask, read.masks[name])
    assert read.promise == outcome.promise
    assert (read.before, read.after) == (outcome.before, outcome.after)
    assert json.dumps(read.as_dict()) == json.dumps(outcome.as_dict())
    assert task.measure(read.model) == outcome.metrics_after


def test_a_loaded_model_is_ready_for_use(outcome, tmp_path):
    read = load(save(outcome, tmp_path / "out"), make_net)
    inputs = torch.randn(4, 8)
    assert torch.equal(read.model(inputs), outcome.model(inputs)), "dropout is on"


def test_masks_take_one_bit_a_weight(tmp_path):
    model = nn.Linear(1000, 100)
    masks = Masks({"weight": torch.rand(100, 1000) > 0.5})
    folder = save(Outcome(model, masks), tmp_path / "out")
    assert (folder / "masks.safetensors").stat().st_size < 100_000 / 8 + 500
    assert torch.equal(load(folder, model).masks["weight"], masks["weight"])


def test_an_outcome_without_masks_or_task_comes_back(tmp_path):
    read = load(save(Outcome(nn.Linear(2, 2)), tmp_path / "out"), lambda: nn.Linear(2, 2))
    assert len(read.masks) == 0
    assert read.promise is None
    assert read.before is None


def test_tied_tensors_are_saved(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model = make()
    read = load(save(Outcome(model), tmp_path / "out"), make)
    assert read.model[0].weight is read.model[1].weight
    assert torch.equal(read.model[0].weight, model[0].weight)


def test_a_folder_with_files_is_refused_and_kept(outcome, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="output folder.*new or empty"):
        save(outcome, tmp_path)
    with pytest.raises(InputError, match="output folder"):
        save(outcome, tmp_path / "mine.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert (save(outcome, tmp_path / "empty") / "outcome.json").is_file()


def test_a_failed_save_leaves_nothing(tmp_path):
    broken = Outcome(nn.Linear(2, 2), options={"made of": object()})
    with pytest.raises(TypeError):
        save(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make_net(11), r"weights 0.weight: got shape \(12, 8\); accepted: shape \(11, 8\)"),
        (lambda: nn.Sequential(*make_net(), nn.Linear(3, 3)), "no tensor '4.weight'"),
        (lambda: make_net()[:2], "weights: got '3.bias'; accepted: tensors that the model has"),
    ],
)
def test_the_wrong_model_is_told_its_first_difference(outcome, tmp_path, model, message):
    folder = save(outcome, tmp_path / "out")
    with pytest.raises(InputError, match=message):
        load(folder, model)


@pytest.mark.parametrize("name", ["model.safetensors", "masks.safetensors", "outcome.json"])
def test_a_truncated_file_is_named(outcome, tmp_path, name):
    folder = save(outcome, tmp_path / "out")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"file: got .*{name}.*whole"):
        load(folder, make_net)


def test_folders_that_hold_no_outcome_are_refused(outcome, tmp_path):
    with pytest.raises(InputError, match="a folder with outcome.json"):
        load(tmp_path, make_net)
    run = tmp_path / "run"
    save(outcome, run / "outcome")
    assert outcome_folder(run) == run / "outcome"
    assert load(run, make_net).method == "gmp"
    with pytest.raises(InputError, match="the dense model or a function"):
        load(run)


def test_masks_of_others_are_refused(outcome, tmp_path):
    folder = save(outcome, tmp_path / "out")
    packed, _ = read_tensors(folder / "masks.safetensors")
    write_tensors(folder / "masks.safetensors", packed, {})
    with pytest.raises(InputError, match=r"masks\.safetensors'; accepted: masks as"):
        load(folder, make_net)


def test_a_place_where_no_folder_can_be_made_is_refused(outcome):
    with pytest.raises(InputError, match="a place where a folder can be made"):
        save(outcome, "/dev/null/out")


@pytest.mark.parametrize(("plan", "message"), [([], "written by"), ({"versions": 0}, "format up")])
def test_plans_of_others_are_refused(outcome, tmp_path, plan, message):
    folder = save(outcome, tmp_path / "out")
    if plan:
        plan = json.loads((folder / "outcome.json").read_text())
        plan["versions"]["format"] = 99
    (folder / "outcome.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match=message):
        load(folder, make_net)


def test_a_promise_is_kept_within_one_unit():
    assert Promise("sparsity", 0.9, 0.8999, 0.0001).kept
    assert not Promise("sparsity", 0.9, 0.8998, 0.0001).kept
    assert "MISSED 0.5 (tolerance 0.1)" in str(Promise("sparsity", 0.9, 0.5, 0.1))
