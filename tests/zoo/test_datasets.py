"""Data sets: shapes, splits, determinism, batches, and every kind of damage."""

import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.zoo.datasets import (
    TensorData,
    as_fetched,
    data_from,
    load_data,
    stratified_split,
    tensor_data,
)
from secateurs.zoo.text import TokenBlocks


def same_rows(a, b):
    """Rows of `a` that occur in `b`."""
    theirs = {row.tobytes() for row in b.numpy()}
    return sum(row.tobytes() in theirs for row in a.numpy())


class TestDigits:
    data = load_data("digits")

    def test_shapes_and_statistics(self):
        train, test = self.data.train, self.data.test
        assert (len(train) + len(test), len(test)) == (1797, 450)
        assert (self.data.inputs, self.data.classes) == ((1, 8, 8), 10)
        assert (train.inputs.dtype, train.targets.dtype) == (torch.float32, torch.int64)
        assert train.inputs.shape[1:] == test.inputs.shape[1:] == (1, 8, 8)
        assert train.inputs.mean().item() == pytest.approx(0, abs=1e-5)
        assert train.inputs.std().item() == pytest.approx(1, abs=1e-5)

    def test_the_parts_share_no_sample_and_are_split_alike(self):
        train, test = self.data.train, self.data.test
        assert same_rows(test.inputs, train.inputs) == 0
        held_out = test.targets.bincount() / (train.targets.bincount() + test.targets.bincount())
        torch.testing.assert_close(held_out, torch.full((10,), 0.25), atol=0.01, rtol=0)

    def test_is_always_the_same(self):
        again = load_data("digits")
        assert torch.equal(again.train.inputs, self.data.train.inputs)
        assert torch.equal(again.test.targets, self.data.test.targets)

    def test_limit_takes_the_first_and_leaves_the_test_samples(self):
        few = load_data("digits?limit=100")
        assert torch.equal(few.train.targets, self.data.train.targets[:100])
        assert torch.equal(few.test.targets, self.data.test.targets)

    def test_share_of_test_samples(self):
        assert len(load_data("digits?test=0.4").test) == 719


class TestBatches:
    inputs, targets = torch.randn(10, 1, 2, 2), torch.arange(10)
    data = TensorData(inputs, targets)

    def test_a_batch_is_what_stacking_gives(self):
        fast = next(iter(DataLoader(self.data, 4, collate_fn=as_fetched)))
        slow = next(iter(DataLoader([self.data[i] for i in range(10)], 4)))
        assert torch.equal(fast[0], slow[0])
        assert torch.equal(fast[1], slow[1])

    def test_a_subset_keeps_the_fast_path(self):
        loader = DataLoader(Subset(self.data, [7, 3, 5]), 2, collate_fn=as_fetched)
        assert torch.cat([y for _, y in loader]).tolist() == [7, 3, 5]

    def test_loaders_lose_nothing_and_shuffle_by_the_seed(self):
        data = tensor_data("ten", (self.inputs, self.targets), (self.inputs, self.targets))
        orders = []
        for seed in (0, 0, 1):
            train, test = data.loaders(4, seed=seed)
            orders.append(torch.cat([y for _, y in train]).tolist())
            assert torch.cat([y for _, y in test]).tolist() == list(range(10))
        assert orders[0] == orders[1] != orders[2]
        assert sorted(orders[0]) == list(range(10))

    def test_example_is_a_batch_of_one(self):
        data = tensor_data("ten", (self.inputs, self.targets), (self.inputs, self.targets))
        assert torch.equal(data.example(), self.inputs[:1])

    def test_workers(self):
        data = tensor_data("ten", (self.inputs, self.targets), (self.inputs, self.targets))
        _, test = data.loaders(4, workers=1)
        assert torch.cat([y for _, y in test]).tolist() == list(range(10))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_stratified_split_is_a_partition_with_rounded_shares(labels, share):
    labels = torch.tensor(labels)
    train, test = stratified_split(labels, share)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    for label in labels.unique():
        members, held_out = (int((part == label).sum()) for part in (labels, labels[test]))
        if members > 1:
            assert held_out == min(max(round(share * members), 1), members - 1)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ((torch.zeros(0, 3), torch.zeros(0).long()), None, "no samples"),
        ((torch.zeros(2, 3), torch.zeros(3).long()), None, "2 inputs, 3 labels"),
        ((torch.tensor([[1.0], [torch.nan]]), torch.tensor([0, 1])), None, "NaN"),
        ((torch.tensor([[1.0], [torch.inf]]), torch.tensor([0, 1])), None, "Inf"),
        ((torch.rand(2, 3), torch.tensor([0, -1])), None, "label -1"),
        ((torch.rand(2, 3), torch.tensor([0, 5])), None, "label 5"),
        ((torch.rand(2, 3), torch.tensor([0.0, 1.0])), None, "torch.float32"),
        ((torch.rand(2, 3), torch.zeros(2, 1).long()), None, r"labels of shape \(2, 1\)"),
        (None, (torch.rand(2, 4), torch.zeros(2).long()), "samples of one shape"),
        (None, (torch.zeros(0, 3), torch.zeros(0).long()), r"\(test\).*no samples"),
        ((torch.ones(2, 3), torch.zeros(2).long()), None, "constant"),
    ],
)
def test_tensor_data_refuses(train, test, message):
    good = torch.rand(4, 3), torch.tensor([0, 1, 2, 2])
    with pytest.raises(InputError, match=message):
        tensor_data("x", train or good, test or good, classes=3, standardise=True)


def idx(path, values, *, kind=8, cut=None, shape=None):
    """Write an IDX file of bytes, whole or damaged."""
    values = np.asarray(values, np.uint8)
    shape = shape or values.shape
    raw = bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    raw += values.tobytes()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    path.write_bytes(raw[:cut])


@pytest.fixture
def clothes(tmp_path):
    """A Fashion-MNIST of 40 and 20 images in a folder."""
    stream = np.random.default_rng(0)
    folder = tmp_path / "clothes"
    folder.mkdir()
    for part, count in (("train", 40), ("t10k", 20)):
        images = stream.integers(0, 256, (count, 28, 28))
        idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder


class TestFashionMnist:
    def test_shapes_and_statistics(self, clothes):
        data = load_data(f"fashion-mnist:{clothes}")
        assert (len(data.train), len(data.test), data.classes) == (40, 20, 10)
        assert data.inputs == (1, 28, 28)
        assert data.train.inputs.mean().item() == pytest.approx(0, abs=1e-5)
        assert data.train.inputs.std().item() == pytest.approx(1, abs=1e-5)
        assert data.test.targets.tolist() == [i % 10 for i in range(20)]

    def test_limit_and_size_are_the_first_images_pooled(self, clothes):
        data = load_data(f"fashion-mnist:{clothes}?limit=6&size=14")
        raw = gzip.decompress((clothes / "train-images-idx3-ubyte.gz").read_bytes())[16:]
        images = np.frombuffer(raw, np.uint8).reshape(40, 28, 28)[:6] / 255
        pooled = images.reshape(6, 14, 2, 14, 2).mean((2, 4))
        expected = (pooled - pooled.mean()) / pooled.std(ddof=1)
        assert data.inputs == (1, 14, 14)
        np.testing.assert_allclose(data.train.inputs[:, 0].numpy(), expected, atol=1e-5)
        assert len(data.test) == 20

    def test_found_through_the_environment(self, clothes, monkeypatch):
        monkeypatch.setenv("SECATEURS_DATA", str(clothes))
        assert len(load_data("fashion-mnist").train) == 40
        (clothes.parent / "fashion-mnist").symlink_to(clothes)
        monkeypatch.setenv("SECATEURS_DATA", str(clothes.parent))
        assert len(load_data("fashion-mnist").train) == 40

    def test_files_that_are_not_zipped_and_torchvisions_folders(self, clothes, tmp_path):
        folder = tmp_path / "root" / "FashionMNIST" / "raw"
        folder.mkdir(parents=True)
        for file in clothes.iterdir():
            (folder / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        data = load_data(f"fashion-mnist:{tmp_path / 'root'}")
        zipped = load_data(f"fashion-mnist:{clothes}")
        assert torch.equal(data.train.inputs, zipped.train.inputs)

    def test_missing_says_where_it_comes_from(self, tmp_path):
        with pytest.raises(InputError, match="apt install dataset-fashion-mnist"):
            load_data(f"fashion-mnist:{tmp_path}")

    @pytest.mark.parametrize(
        ("name", "damage", "message"),
        [
            ("train-images-idx3-ubyte.gz", {"cut": -10}, "damaged"),
            ("train-images-idx3-ubyte.gz", {"shape": (41, 28, 28)}, "header says"),
            ("train-images-idx3-ubyte.gz", {"shape": (39, 28, 28)}, "header says"),
            ("train-images-idx3-ubyte.gz", {"kind": 13}, "header"),
            ("train-images-idx3-ubyte.gz", {"shape": (40, 784)}, "header"),
            ("train-images-idx3-ubyte.gz", {"shape": (40, 14, 56)}, "14x56"),
            ("train-labels-idx1-ubyte.gz", {"values": np.full(40, 77)}, "label 77"),
            ("train-labels-idx1-ubyte.gz", {"values": np.zeros(39)}, "39 labels"),
            ("t10k-labels-idx1-ubyte.gz", {"cut": 0}, "header"),
        ],
    )
    def test_damage_is_told_with_the_file(self, clothes, name, damage, message):
        shape = (40, 28, 28) if "images" in name else (40,)
        values = damage.pop("values", np.ones(shape))
        idx(clothes / name, values, **damage)
        with pytest.raises(InputError, match=message) as refusal:
            load_data(f"fashion-mnist:{clothes}")
        assert name in str(refusal.value)

    def test_not_gzip_at_all(self, clothes):
        (clothes / "t10k-images-idx3-ubyte.gz").write_bytes(b"no gzip")
        with pytest.raises(InputError, match="t10k-images-idx3-ubyte.gz.*damaged"):
            load_data(f"fashion-mnist:{clothes}")

    def test_no_images(self, clothes):
        idx(clothes / "train-images-idx3-ubyte.gz", np.zeros((0, 28, 28)))
        idx(clothes / "train-labels-idx1-ubyte.gz", np.zeros(0))
        with pytest.raises(InputError, match="no images"):
            load_data(f"fashion-mnist:{clothes}")

    def test_labels_file_missing(self, clothes):
        (clothes / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(InputError, match="t10k-labels-idx1-ubyte"):
            load_data(f"fashion-mnist:{clothes}")

    def test_size_must_divide(self, clothes):
        with pytest.raises(InputError, match="divisor of 28"):
            load_data(f"fashion-mnist:{clothes}?size=13")


def photographs(folder, *, colours=(("blue", 200), ("red", 90)), count=5, side=(12, 10)):
    """A folder of PNGs a class, each of one grey value."""
    for number, (name, value) in enumerate(colours):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((*side, 3), value + i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}-{i}.png")


class TestImageFolder:
    def test_one_folder_is_split_by_class(self, tmp_path):
        photographs(tmp_path)
        data = load_data(f"imagefolder:{tmp_path}?size=8")
        assert (len(data.train), len(data.test), data.classes) == (8, 2, 2)
        assert data.inputs == (3, 8, 8)
        assert sorted(y for _, y in (data.test[i] for i in range(2))) == [0, 1]
        again = load_data(f"imagefolder:{tmp_path}?size=8")
        for part in ("train", "test"):
            assert getattr(data, part).indices == getattr(again, part).indices
        assert not set(data.train.indices) & set(data.test.indices)

    def test_pixels_are_normalised_as_pretrained_networks_expect(self, tmp_path):
        photographs(tmp_path, count=2)
        pixels, label = load_data(f"imagefolder:{tmp_path}?size=4").test[0]
        value = {0: 200, 1: 90}[label]
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        candidates = [(torch.tensor((value + i) / 255) - mean) / deviation for i in range(2)]
        distances = [(pixels.mean((1, 2)) - c).abs().max() for c in candidates]
        assert min(distances) < 1e-5

    @pytest.mark.parametrize("name", ["test", "val"])
    def test_parts_in_folders(self, tmp_path, name):
        photographs(tmp_path / "train", count=3)
        photographs(tmp_path / name, count=1)
        data = load_data(f"imagefolder:{tmp_path}?size=8&limit=4")
        assert (len(data.train), len(data.test)) == (4, 2)
        batch, labels = next(iter(data.loaders(4)[0]))
        assert batch.shape == (4, 3, 8, 8)
        assert labels.dtype == torch.int64

    def test_refuses_what_is_no_folder_of_classes(self, tmp_path):
        with pytest.raises(InputError, match="existing folder"):
            load_data(f"imagefolder:{tmp_path / 'nowhere'}")
        with pytest.raises(InputError, match="imagefolder"):
            load_data(f"imagefolder:{tmp_path}")
        photographs(tmp_path / "train")
        with pytest.raises(InputError, match="'test' or 'val'"):
            load_data(f"imagefolder:{tmp_path}")
        photographs(tmp_path / "val", colours=(("blue", 1), ("green", 2)))
        with pytest.raises(InputError, match="green"):
            load_data(f"imagefolder:{tmp_path}")

    def test_one_image_a_class_cannot_be_split(self, tmp_path):
        photographs(tmp_path, count=1)
        with pytest.raises(InputError, match="at least two"):
            load_data(f"imagefolder:{tmp_path}")

    def test_a_damaged_file_is_named_when_it_is_read(self, tmp_path):
        photographs(tmp_path, count=2)
        for file in tmp_path.glob("*/*.png"):
            file.write_bytes(file.read_bytes()[:-40])
        data = load_data(f"imagefolder:{tmp_path}?size=8")
        with pytest.raises(InputError, match=r"\d-\d\.png.*damaged"):
            data.train[0]


class TestText:
    def test_bytes_in_blocks_with_the_next_as_target(self, tmp_path):
        (tmp_path / "b.txt").write_text("fghij" * 40)
        (tmp_path / "a.txt").write_text("abcde" * 40)
        data = load_data(f"text:{tmp_path}?block=8")
        whole = b"abcde" * 40 + b"fghij" * 40
        assert (data.kind, data.classes, data.inputs) == ("language", 256, (8,))
        train, test = data.loaders(3)
        tokens, targets = next(iter(test))
        assert tokens.shape == targets.shape == (3, 8)
        assert tokens.dtype == torch.int64
        assert bytes(tokens.flatten().tolist()) == whole[360:384]
        assert bytes(targets.flatten().tolist()) == whole[361:385]
        assert sum(len(x) for x, _ in train) == len(data.train) == (360 - 1) // 8

    def test_characters(self, tmp_path):
        (tmp_path / "t.txt").write_text("äöü€" * 50, encoding="utf-8")
        data = load_data(f"text:{tmp_path / 't.txt'}?level=char&block=4")
        assert data.classes == 4
        assert data.train[0][0].tolist() == [0, 1, 2, 3]
        assert data.train[0][1].tolist() == [1, 2, 3, 0]
        assert data.example().tolist() == [data.test[0][0].tolist()]

    @pytest.mark.parametrize(
        ("content", "query", "message"),
        [
            (b"", "", "not empty"),
            (b"short", "", "5 tokens|0 tokens"),
            (b"\xff\xfe" * 500, "?level=char", "UTF-8"),
            (b"x" * 500, "?level=word", "level"),
        ],
    )
    def test_refuses(self, tmp_path, content, query, message):
        (tmp_path / "t.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_data(f"text:{tmp_path / 't.txt'}{query}")

    def test_refuses_what_is_not_there(self, tmp_path):
        for path in (tmp_path, tmp_path / "none.txt", ""):
            with pytest.raises(InputError, match="text"):
                load_data(f"text:{path}")


@given(st.integers(0, 50), st.integers(1, 7))
def test_blocks_cover_the_stream_without_overlap(length, block):
    blocks = TokenBlocks(torch.arange(length), block)
    assert len(blocks) == max(0, length - 1) // block
    seen = [t for i in range(len(blocks)) for t in blocks[i][0].tolist()]
    assert seen == list(range(len(blocks) * block))
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def pair(classes=3):
    inputs, labels = torch.randn(9, 4), torch.arange(9) % classes
    return TensorDataset(inputs, labels), TensorDataset(inputs[:3], labels[:3])


class Listed(torch.utils.data.Dataset):
    """A data set as torchvision has them."""

    classes = ("cat", "dog")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((1, 2, 2), float(index)), index % 2


class TestPython:
    def test_a_pair_of_tensor_data_sets_takes_the_fast_path(self):
        data = data_from(pair(), "mine")
        assert isinstance(data.train, TensorData)
        assert (data.classes, data.inputs, data.name) == (3, (4,), "mine")

    def test_a_pair_of_others_says_its_classes(self):
        data = data_from((Listed(), Listed()), "mine")
        assert (data.classes, data.inputs, data.collate) == (2, (1, 2, 2), None)
        assert data.example().shape == (1, 1, 2, 2)

    def test_a_task(self):
        train, test = pair()
        task = sc.classification(torch.nn.Linear(4, 3), DataLoader(train), DataLoader(test))
        data = data_from(task, "mine")
        assert (data.task, data.inputs, data.classes) == (task, (4,), None)
        assert (data.train, data.test) == (train, test)

    def test_by_name_from_a_file_and_from_the_working_folder(self, tmp_path, monkeypatch):
        source = "from secateurs.zoo import datasets\nmake = lambda: datasets.load_data('digits')\n"
        (tmp_path / "my_digits_here.py").write_text(source)
        monkeypatch.chdir(tmp_path)
        for spec in (f"{tmp_path}/my_digits_here.py:make", "my_digits_here:make"):
            assert load_data(f"python:{spec}").name == "digits"

    @pytest.mark.parametrize(
        "value", [None, 3, (1, 2), pair()[0], (pair()[0], 3), (range(3), range(3))]
    )
    def test_refuses(self, value):
        with pytest.raises(InputError, match="data mine"):
            data_from(value, "mine")

    def test_refuses_a_pair_without_classes_or_samples(self):
        class Nameless(Listed):
            classes = None

        class Empty(Listed):
            def __len__(self):
                return 0

        with pytest.raises(InputError, match="without `classes`"):
            data_from((Nameless(), Listed()), "mine")
        with pytest.raises(InputError, match="no samples"):
            data_from((Listed(), Empty()), "mine")

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("python:no_such_module:f", "no_such_module"),
            ("python:json:dump5", "did you mean 'dump'"),
            ("python:json", "python:module:function"),
            ("python:/nowhere/x.py:f", "existing file"),
            ("python:json:dumps?x=1", "no options"),
        ],
    )
    def test_refuses_names(self, spec, message):
        with pytest.raises(InputError, match=message):
            load_data(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digitz", "did you mean 'digits'"),
        ("digits:folder", "without a path"),
        ("digits?limt=3", "did you mean 'limit'"),
        ("digits?limit=0", "integer >= 1"),
        ("digits?test=2", "fraction"),
        ("digits@w.safetensors", "weights belong to the model"),
        ("fashion-mnist:/nowhere", "existing folder"),
        ("", "a name such as"),
    ],
)
def test_refuses(spec, message):
    with pytest.raises(InputError, match=message):
        load_data(spec)
