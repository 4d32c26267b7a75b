"""Tasks by name: what they are made of, and that their settings work."""

import pytest
import torch

import secateurs as sc
from secateurs.errors import InputError
from secateurs.settings import TrainSettings
from secateurs.zoo.catalog import default_settings, inspectable, make_task, remake


def test_the_demo_task_learns_the_digits():
    task = make_task("zoo:convnet", "digits")
    model = task.fresh_model(0)
    sc.fit(model, task, task.training)
    assert task.measure(model)["accuracy"] >= 0.97


def test_the_parts_of_a_task():
    task = make_task("zoo:convnet", "digits", batch_size=50, seed=3)
    assert task.name == "zoo:convnet on digits"
    assert task.example_inputs.shape == (1, 1, 8, 8)
    assert (task.train.batch_size, task.train.drop_last) == (50, False)
    assert isinstance(task.train.sampler, torch.utils.data.RandomSampler)
    assert isinstance(task.evaluate.sampler, torch.utils.data.SequentialSampler)
    assert (task.training, task.finetuning) == default_settings("zoo:convnet", "digits")
    assert task.resize(0.5).classifier.in_features == 32
    assert sum(len(y) for _, y in task.train) == 1347


def test_given_settings_and_widths_are_taken():
    training, finetuning = TrainSettings(epochs=1), TrainSettings(epochs=2)
    task = make_task(
        "zoo:mlp?hidden=8", "digits", training=training, finetuning=finetuning, width=0.5
    )
    assert (task.training, task.finetuning) == (training, finetuning)
    assert task.fresh_model(0).classifier.in_features == 4
    assert task.resize(0.5).classifier.in_features == 2


def test_label_smoothing_reaches_the_loss():
    logits, target = torch.tensor([[9.0, 0.0]]), torch.tensor([0])
    plain, smooth = (
        make_task("zoo:mlp", "digits", label_smoothing=s).loss(logits, target) for s in (0.0, 0.2)
    )
    assert smooth > plain + 0.5


def test_a_model_with_weights_is_a_module_and_the_same_each_time(tmp_path):
    from safetensors.torch import save_file

    fresh = make_task("zoo:mlp?hidden=8", "digits").fresh_model(5)
    save_file(fresh.state_dict(), tmp_path / "w.safetensors")
    task = make_task(f"zoo:mlp?hidden=8@{tmp_path}/w.safetensors", "digits")
    assert torch.equal(task.model.classifier.weight, fresh.classifier.weight)
    with pytest.raises(InputError):
        task.fresh_model(0)


def test_language(tmp_path):
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    task = make_task(
        "zoo:char-transformer?dim=16&heads=2&depth=1&hidden=32",
        f"text:{tmp_path / 't.txt'}?block=16&level=char",
        batch_size=16,
        training=TrainSettings(optimizer="adamw", lr=1e-2, weight_decay=0.0, steps=40),
    )
    model = task.fresh_model(0)
    before = task.measure(model)
    sc.fit(model, task, task.training)
    assert task.primary == "perplexity"
    assert task.measure(model)["perplexity"] < before["perplexity"] / 2


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import secateurs as sc\n"
        "from secateurs.zoo.datasets import load_data\n"
        "from secateurs.zoo.networks import make_network\n"
        "def make(width=1.0):\n"
        "    return make_network('mlp', inputs=(1, 8, 8), hidden=(4,), width=width)\n"
        "def task():\n"
        "    train, test = load_data('digits').loaders(32)\n"
        "    return sc.classification(make, train, test, name='mine',\n"
        "        training=sc.TrainSettings(epochs=7), resize=make)\n"
    )
    return f"python:{tmp_path}/mine.py:task"


def test_a_users_task_as_it_is(mine):
    task = make_task(mine, mine, finetuning=TrainSettings(epochs=2))
    assert (task.name, task.training.epochs, task.finetuning.epochs) == ("mine", 7, 2)
    assert task.resize is not None


def test_another_model_for_a_users_task(mine):
    task = make_task("zoo:convnet?classes=10", mine)
    assert task.training.epochs == 7
    assert task.name == f"zoo:convnet?classes=10 on {mine}"
    assert task.measure(task.fresh_model(0))["accuracy"] < 0.5
    with pytest.raises(InputError, match="classes=N"):
        make_task("zoo:convnet", mine)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("zoo:vit-tiny", "digits"),
        ("zoo:char-transformer", "text:x"),
        ("hf:name", "hf:data"),
        ("zoo:convnet", "digits?limit=10"),
        ("zoo:convnet", "fashion-mnist?limit=6000&size=14"),
        ("torchvision:resnet18", "imagefolder:x"),
    ],
)
def test_every_pair_has_settings(model, data):
    training, finetuning = default_settings(model, data)
    assert training.epochs > finetuning.epochs
    assert training.lr >= finetuning.lr


class TestRemake:
    def test_shapes_follow_the_source(self):
        model = remake("zoo:mlp?hidden=8", "digits", 0.5)
        assert [tuple(p.shape) for p in model.parameters()] == [(4, 64), (4,), (10, 4), (10,)]

    def test_a_file_of_weights_may_be_gone(self):
        assert remake("zoo:mlp?hidden=8@gone.safetensors", "digits").classifier.in_features == 8

    def test_the_global_generator_is_left_alone(self):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        remake("zoo:vit-tiny", "digits")
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("width", [None, 0.5])
    def test_saved_outcomes_are_read_back_by_it(self, tmp_path, width):
        source = {"model": "zoo:convnet?width=0.25", "data": "digits"}
        if width is not None:
            source["width"] = width
        task = make_task(source["model"], source["data"], width=width or 1.0)
        outcome = sc.prune(task.fresh_model(0), "global-mp", "sparsity=0.5")
        outcome.source = source
        sc.save(outcome, tmp_path / "saved")
        again = sc.load(tmp_path / "saved")
        pairs = zip(again.model.parameters(), outcome.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


class TestInspectable:
    def test_a_name_alone(self):
        model, inputs, masks = inspectable("zoo:convnet")
        assert model(inputs).shape == (1, 10)
        assert not model.training
        assert dict(masks) == {}

    def test_a_name_with_data(self):
        _, inputs, _ = inspectable("zoo:resnet-8?width=0.25", "digits")
        assert inputs.shape == (1, 1, 8, 8)

    def test_a_saved_outcome_has_masks_and_knows_its_data(self, tmp_path):
        task = make_task("zoo:convnet?width=0.25", "digits")
        outcome = sc.prune(task.fresh_model(0), "global-mp", "sparsity=0.5")
        outcome.source = {"model": "zoo:convnet?width=0.25", "data": "digits"}
        sc.save(outcome, tmp_path / "saved")
        model, inputs, masks = inspectable(str(tmp_path / "saved"))
        assert inputs.shape == (1, 1, 8, 8)
        assert masks.keys() == outcome.masks.keys()
        assert model(inputs).shape == (1, 10)
