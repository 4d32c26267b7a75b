"""Models by name: every kind, weights from files, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import secateurs as sc
from secateurs.errors import InputError
from secateurs.zoo.datasets import load_data
from secateurs.zoo.models import has_weights, load_model


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def outputs(source):
    return source.make().eval()(source.example_inputs()).shape


class TestZoo:
    def test_shapes_come_from_the_data(self, digits):
        source = load_model("zoo:convnet", data=digits)
        assert outputs(source) == (1, 10)
        assert source.example_inputs().shape == (1, 1, 8, 8)
        assert not source.pretrained

    def test_without_data_it_is_as_its_paper_has_it(self):
        source = load_model("zoo:resnet-8")
        assert source.example_inputs().shape == (1, 3, 32, 32)
        assert outputs(source) == (1, 10)
        assert outputs(load_model("zoo:resnet-8?classes=3")) == (1, 3)
        assert outputs(load_model("zoo:char-transformer")) == (1, 128, 256)

    def test_widths_multiply(self):
        source = load_model("zoo:mlp?hidden=64&width=0.5", width=0.5)
        assert source.make().classifier.in_features == 16
        assert source.resize(0.25).classifier.in_features == 4
        assert source.resize(2).classifier.in_features == 32

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("zoo:convnt", "did you mean 'convnet'"),
            ("zoo:mlp?hiden=3", "did you mean 'hidden'"),
            ("zoo:mlp?width=0", "width"),
            ("zoo:mlp?width=wide", "width"),
            ("zoo:mlp?classes=0", "classes"),
            ("zoo:", "zoo:NAME"),
            ("convnet", "zoo:convnet"),
            ("zooo:convnet", "did you mean 'zoo'"),
            ("", "model"),
        ],
    )
    def test_refuses(self, spec, message):
        with pytest.raises(InputError, match=message):
            load_model(spec)

    def test_refuses_data_of_another_kind(self, tmp_path):
        (tmp_path / "t.txt").write_text("word " * 200)
        with pytest.raises(InputError, match="language data"):
            load_model("zoo:convnet", data=load_data(f"text:{tmp_path / 't.txt'}"))

    def test_refuses_a_negative_width(self):
        with pytest.raises(InputError, match="width"):
            load_model("zoo:mlp", width=-1)


class TestWeights:
    def write(self, path, spec="zoo:mlp?hidden=5"):
        model = load_model(spec).make()
        save_file(model.state_dict(), path)
        return model

    def test_a_file_after_the_name(self, tmp_path):
        model = self.write(tmp_path / "w.safetensors")
        for source in (
            load_model(f"zoo:mlp?hidden=5@{tmp_path}/w.safetensors"),
            load_model("zoo:mlp?hidden=5", weights=tmp_path / "w.safetensors"),
        ):
            assert source.pretrained
            same = zip(source.make().parameters(), model.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in same)
            assert source.resize(2).classifier.in_features == 10

    def test_the_first_difference_is_named_with_both_shapes(self, tmp_path):
        self.write(tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=r"features\.fc1\.weight.*\(5, 784\).*\(6, 784\)"):
            load_model(f"zoo:mlp?hidden=6@{tmp_path}/w.safetensors").make()

    def test_missing_and_left_over_tensors(self, tmp_path):
        self.write(tmp_path / "w.safetensors")
        with pytest.raises(InputError, match=r"norm1"):
            load_model(f"zoo:mlp?hidden=5&batch_norm=true@{tmp_path}/w.safetensors").make()
        save_file({"stranger": torch.zeros(1)}, tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="no tensor"):
            load_model(f"zoo:mlp?hidden=5@{tmp_path}/x.safetensors").make()

    def test_tied_tensors_are_found_under_their_other_name(self, tmp_path, monkeypatch):
        source = (
            "from torch import nn\n"
            "def make():\n"
            "    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))\n"
            "    model[1].weight = model[0].weight\n"
            "    return model\n"
        )
        (tmp_path / "tied.py").write_text(source)
        values = torch.randn(4, 3)
        save_file({"0.weight": values}, tmp_path / "w.safetensors")
        model = load_model(f"python:{tmp_path}/tied.py:make@{tmp_path}/w.safetensors").make()
        assert torch.equal(model[1].weight, values)

    @pytest.mark.parametrize("length", [0, 20, 200])
    def test_damaged_and_missing_files(self, tmp_path, length):
        self.write(tmp_path / "w.safetensors")
        raw = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "short.safetensors").write_bytes(raw[:length])
        with pytest.raises(InputError, match=r"short\.safetensors"):
            load_model(f"zoo:mlp?hidden=5@{tmp_path}/short.safetensors").make()
        with pytest.raises(InputError, match="existing"):
            load_model(f"zoo:mlp@{tmp_path}/none.safetensors")

    def test_weights_alone_or_twice(self, tmp_path):
        file = tmp_path / "w.safetensors"
        self.write(file)
        with pytest.raises(InputError, match="MODEL@FILE"):
            load_model(str(file))
        with pytest.raises(InputError, match="once"):
            load_model(f"zoo:mlp@{file}", weights=file)


class TestTorchvision:
    def test_fresh_weights_for_the_classes_of_the_data(self):
        source = load_model("torchvision:squeezenet1_1?classes=7")
        assert source.example_inputs().shape == (1, 3, 224, 224)
        assert outputs(source) == (1, 7)
        assert not source.pretrained

    def test_refuses(self, digits):
        with pytest.raises(InputError, match="'resnet18'"):
            load_model("torchvision:resnet17")
        with pytest.raises(InputError, match=r"data digits.*shape \(1, 1, 8, 8\)"):
            load_model("torchvision:squeezenet1_1", data=digits)
        with pytest.raises(InputError, match="no width"):
            load_model("torchvision:squeezenet1_1", width=0.5)
        with pytest.raises(InputError, match="weights"):
            load_model("torchvision:squeezenet1_1?weights=DEFAULT")


class TestTimm:
    def test_channels_and_classes_come_from_the_data(self, digits):
        source = load_model("timm:resnet10t", data=digits)
        assert outputs(source) == (1, 10)

    def test_a_fixed_image_size_follows_the_data(self):
        source = load_model("timm:test_vit?classes=4")
        assert outputs(source) == (1, 4)

    def test_refuses(self):
        with pytest.raises(InputError, match="'resnet50'"):
            load_model("timm:resnet51")


class TestPython:
    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "mine.py").write_text(
            "from torch import nn\n"
            "import secateurs as sc\n"
            "from secateurs.zoo.datasets import load_data\n"
            "def make(width=1.0):\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10 * int(width)))\n"
            "def plain():\n"
            "    return make()\n"
            "def task():\n"
            "    train, test = load_data('digits').loaders(32)\n"
            "    return sc.classification(make, train, test, name='mine')\n"
            "def number():\n"
            "    return 3\n"
        )
        return f"python:{tmp_path}/mine.py"

    def test_a_function_and_its_width(self, file, digits):
        source = load_model(f"{file}:make", data=digits)
        assert outputs(source) == (1, 10)
        assert source.resize(2)[1].out_features == 20
        assert load_model(f"{file}:plain").resize is None

    def test_the_model_of_a_task(self, file):
        assert load_model(f"{file}:task").make()[1].out_features == 10

    def test_trained(self, file):
        assert load_model(f"{file}:make?trained=true").pretrained
        assert not load_model(f"{file}:make").pretrained

    def test_refuses(self, file):
        with pytest.raises(InputError, match="a int"):
            load_model(f"{file}:number").make()
        with pytest.raises(InputError, match="did you mean 'make'"):
            load_model(f"{file}:mke")
        with pytest.raises(InputError, match="does not say what it takes"):
            load_model(f"{file}:make").example_inputs()


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        torch.manual_seed(0)
        model = load_model("zoo:mlp?hidden=6", data=load_data("digits")).make()
        outcome = sc.prune(model, "global-mp", "sparsity=0.5")
        outcome.source = {"model": "zoo:mlp?hidden=6", "data": "digits"}
        sc.save(outcome, tmp_path / "run" / "outcome")
        return tmp_path / "run"

    def test_a_saved_outcome_or_its_run(self, folder):
        for path in (folder, folder / "outcome"):
            source = load_model(str(path))
            assert source.pretrained
            model = source.make()
            zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim == 2)
            assert zeros == (64 * 6 + 60) // 2
            assert source.example_inputs().shape == (1, 1, 8, 8)

    def test_other_folders_are_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"outcome\.json"):
            load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("zoo:convnet", False),
        ("torchvision:resnet18", False),
        ("timm:resnet18", False),
        ("hf:anything", True),
        ("hf:anything?fresh=true", False),
        ("python:module:function", False),
        ("python:module:function?trained=true", True),
        ("zoo:convnet@w.safetensors", True),
    ],
)
def test_has_weights_is_said_by_the_spec(spec, expected):
    assert has_weights(spec) is expected


def test_has_weights_refuses_unknown_kinds():
    with pytest.raises(InputError, match="zoo"):
        has_weights("zooo:convnet")


def test_makes_are_fresh_modules():
    source = load_model("zoo:mlp?hidden=4")
    first, second = source.make(), source.make()
    assert isinstance(first, nn.Module)
    assert first is not second
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
