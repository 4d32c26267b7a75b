"""Data and models of Hugging Face, from folders on disk: nothing here asks the hub."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from secateurs.errors import InputError
from secateurs.zoo.catalog import make_task
from secateurs.zoo.datasets import TensorData, load_data
from secateurs.zoo.models import load_model

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("offline")

WORDS = ("good", "bad", "fine", "poor")


def pictures(count, side=(8, 8), mode="L"):
    stream = np.random.default_rng(0)
    shape = side if mode == "L" else (*side, 3)
    return [Image.fromarray(stream.integers(0, 256, shape, np.uint8)) for _ in range(count)]


@pytest.fixture
def saved(tmp_path):
    """Write columns, or splits of columns, as save_to_disk does; returns the spec."""

    def write(columns, features=None):
        folder = tmp_path / "data"
        features = None if features is None else datasets.Features(features)
        if all(isinstance(value, dict) for value in columns.values()):
            parts = {
                name: datasets.Dataset.from_dict(part, features) for name, part in columns.items()
            }
            datasets.DatasetDict(parts).save_to_disk(str(folder))
        else:
            datasets.Dataset.from_dict(columns, features).save_to_disk(str(folder))
        return f"hf:{folder}"

    return write


def digit_features():
    return {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}


class TestData:
    def test_images_with_labels(self, saved):
        part = {"image": pictures(6), "label": [0, 1, 2] * 2}
        spec = saved({"train": part, "test": part}, digit_features())
        data = load_data(spec)
        assert (len(data.train), len(data.test)) == (6, 6)
        assert (data.inputs, data.classes, data.kind) == ((1, 8, 8), 3, "classification")
        batch, labels = next(iter(data.loaders(4)[1]))
        assert batch.shape == (4, 1, 8, 8)
        assert labels.tolist() == [0, 1, 2, 0]
        pixels = torch.from_numpy(np.array(part["image"][0])).float() / 255
        torch.testing.assert_close(batch[0, 0], (pixels - 0.449) / 0.226)

    def test_without_a_test_split_a_fifth_of_each_class_is_held_out(self, saved):
        spec = saved({"image": pictures(15), "label": [0, 1, 2] * 5}, digit_features())
        data = load_data(spec)
        assert (len(data.train), len(data.test)) == (12, 3)
        assert sorted(data.test[i][1] for i in range(3)) == [0, 1, 2]
        again = load_data(spec)
        assert all(torch.equal(data.test[i][0], again.test[i][0]) for i in range(3))

    def test_validation_stands_in_for_test_and_options_choose(self, saved):
        part = {"image": pictures(4, mode="RGB"), "label": [0, 1, 2, 0]}
        few = {"image": pictures(2, mode="RGB"), "label": [0, 1]}
        spec = saved({"train": part, "validation": few, "extra": few}, digit_features())
        assert len(load_data(spec).test) == 2
        data = load_data(f"{spec}?train=extra&test=train&limit=1&size=4")
        assert (len(data.train), len(data.test), data.inputs) == (1, 4, (3, 4, 4))

    def test_numbers_go_into_memory(self, saved):
        spec = saved({"x": [[float(i), 1.0] for i in range(10)], "target": [0, 1] * 5})
        data = load_data(spec)
        assert isinstance(data.train, TensorData)
        assert (data.inputs, data.classes, len(data.test)) == ((2,), 2, 2)

    def test_texts_without_labels_are_language(self, saved):
        spec = saved({"train": {"text": ["ab" * 20] * 3}, "test": {"text": ["cd" * 20]}})
        data = load_data(f"{spec}?block=8")
        assert (data.kind, data.classes, data.inputs) == ("language", 256, (8,))
        assert bytes(data.train[0][0].tolist()) == b"abababab"
        assert len(data.train) == (3 * 40 + 2 - 1) // 8

    def test_texts_with_labels_take_a_tokenizer(self, saved, tokenizer):
        spec = saved({"text": ["good fine", "bad", "poor bad good"] * 5, "label": [1, 0, 0] * 5})
        with pytest.raises(InputError, match="tokenizer=NAME"):
            load_data(spec)
        data = load_data(f"{spec}?tokenizer={tokenizer}&block=2")
        batch = next(iter(data.loaders(3)[1]))
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["input_ids"].shape == (3, 2)
        assert "labels" not in data.example()
        language = load_data(f"{spec}?tokenizer={tokenizer}&block=2&as=language")
        assert language.classes == len(WORDS) + 2

    @pytest.mark.parametrize(
        ("columns", "query", "message"),
        [
            ({"x": [[1.0], [2.0]] * 5}, "", "labels"),
            ({"x": [[1.0], [float("nan")]] * 5, "label": [0, 1] * 5}, "", "NaN"),
            ({"x": [[1.0], [2.0, 3.0]] * 5, "label": [0, 1] * 5}, "", "one shape"),
            ({"x": [[1.0], [2.0]] * 5, "label": [0, -1] * 5}, "", "label -1"),
            ({"x": [[1.0], [2.0]] * 5, "label": ["a", "b"] * 5}, "", "whole numbers"),
            ({"x": [[1.0], [2.0]] * 5, "label": [0, 1] * 5}, "?label=y", "option label"),
            ({"x": [[1.0], [2.0]] * 5, "label": [0, 1] * 5}, "?train=t", "option train"),
            ({"x": [[1.0], [2.0]] * 5, "label": [0, 1] * 5}, "?inpt=x", "did you mean 'input'"),
            ({"a": [1.0] * 5, "b": [1.0] * 5, "label": [0] * 5}, "", "input=NAME"),
            ({"text": ["x"] * 5}, "", "tokens"),
            ({"x": [], "label": []}, "", "data hf"),
        ],
    )
    def test_refuses(self, saved, columns, query, message):
        with pytest.raises(InputError, match=message):
            load_data(saved(columns) + query)

    def test_images_of_several_sizes_ask_for_one(self, saved):
        images = [*pictures(2), *pictures(2, side=(6, 6))]
        part = {"image": images, "label": [0, 1, 2, 0]}
        spec = saved({"train": part, "test": part}, digit_features())
        with pytest.raises(InputError, match=r"size=N"):
            list(load_data(spec).loaders(4)[1])
        assert next(iter(load_data(f"{spec}?size=8").loaders(4)[1]))[0].shape == (4, 1, 8, 8)

    def test_a_damaged_table_or_image_is_told(self, saved):
        broken = {"bytes": b"no image", "path": None}
        part = {"image": [broken] * 3, "label": [0, 1, 2]}
        spec = saved({"train": part, "test": part}, digit_features())
        with pytest.raises(InputError, match="damaged"):
            load_data(spec + "?size=8")
        for file in Path(spec.removeprefix("hf:")).glob("*/*.arrow"):
            file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(InputError, match="data hf"):
            load_data(spec)

    @pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-name-anywhere", ""])
    def test_refuses_what_cannot_be_had(self, name):
        with pytest.raises(InputError, match="hf"):
            load_data(f"hf:{name}")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A tokenizer of four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The folder of a very small Llama with weights."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """The folder of a very small ViT for 8x8 grey images and 10 classes."""
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_channels=1, num_labels=10,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def story(tmp_path):
    (tmp_path / "story.txt").write_text("once upon a time " * 60)
    return f"text:{tmp_path / 'story.txt'}?block=16"


class TestModels:
    def test_a_language_model_with_its_weights(self, llama, story):
        task = make_task(f"hf:{llama}", story, batch_size=4)
        assert isinstance(task.model, transformers.LlamaForCausalLM)
        metrics = task.measure(task.model)
        assert 100 < metrics["perplexity"] < 600
        again = load_model(f"hf:{llama}").make()
        assert all(
            torch.equal(a, b)
            for a, b in zip(task.model.parameters(), again.parameters(), strict=True)
        )

    def test_fresh_weights_and_another_dtype(self, llama):
        source = load_model(f"hf:{llama}?fresh=true&dtype=bfloat16")
        model = source.make()
        assert not source.pretrained
        assert model.dtype == torch.bfloat16
        assert model(source.example_inputs()).logits.shape == (1, 16, 256)

    def test_an_image_classifier(self, vit):
        data = load_data("digits")
        source = load_model(f"hf:{vit}", data=data)
        assert type(source.make()).__name__ == "ViTForImageClassification"
        assert source.make()(source.example_inputs()).logits.shape == (1, 10)
        assert load_model(f"hf:{vit}").example_inputs().shape == (1, 1, 8, 8)

    def test_another_number_of_classes_starts_a_fresh_output_layer(self, vit):
        stored, other = (load_model(f"hf:{vit}{q}").make() for q in ("", "?classes=3"))
        assert other.classifier.weight.shape == (3, 16)
        name = "vit.layernorm.weight"
        assert torch.equal(stored.state_dict()[name], other.state_dict()[name])

    def test_a_text_classifier(self, tmp_path, saved, tokenizer):
        config = transformers.BertConfig(
            vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24,
        )  # fmt: skip
        transformers.BertModel(config).save_pretrained(str(tmp_path / "bert"))
        spec = saved({"text": ["good fine", "bad", "poor bad good"] * 5, "label": [1, 0, 2] * 5})
        task = make_task(f"hf:{tmp_path / 'bert'}", f"{spec}?tokenizer={tokenizer}", batch_size=3)
        assert type(task.model).__name__ == "BertForSequenceClassification"
        assert 0 <= task.measure(task.model)["accuracy"] <= 1
        bare = load_model(f"hf:{tmp_path / 'bert'}")
        assert type(bare.make()).__name__ == "BertModel"

    def test_pickled_weights_are_refused(self, llama, tmp_path):
        (tmp_path / "config.json").write_text((llama / "config.json").read_text())
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match="safetensors"):
            load_model(f"hf:{tmp_path}").make()

    def test_a_vocabulary_that_is_too_small(self, tmp_path, story):
        config = transformers.LlamaConfig(
            vocab_size=99, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        config.save_pretrained(str(tmp_path / "small"))
        with pytest.raises(InputError, match="vocabulary of 256"):
            load_model(f"hf:{tmp_path / 'small'}?fresh=true", data=load_data(story))

    def test_a_head_that_the_model_does_not_have(self, vit, story):
        with pytest.raises(InputError, match="CausalLM"):
            load_model(f"hf:{vit}", data=load_data(story))

    @pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-name-anywhere", ""])
    def test_refuses_what_cannot_be_had(self, name):
        with pytest.raises(InputError, match="hf:|model hf"):
            load_model(f"hf:{name}")

    def test_refuses_a_folder_without_a_configuration(self, tmp_path):
        with pytest.raises(InputError, match=r"config\.json"):
            load_model(f"hf:{tmp_path}")
