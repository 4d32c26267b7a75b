"""ONNX out: what is written computes the same, or nothing is written."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateurs.deploy.onnx_export import export_onnx
from secateurs.deploy.onnx_session import OnnxSession, largest_difference
from secateurs.errors import ConversionError, InputError

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_the_batch_is_free_and_the_model_as_it_was(small, images, tmp_path):
    small.train()
    small.norm.eval()
    before = {name: t.clone() for name, t in small.state_dict().items()}
    found = export_onnx(small, images, tmp_path / "m.onnx")
    assert (found.path, found.dynamic_batch, found.fixed_because) == (
        tmp_path / "m.onnx",
        True,
        "",
    )
    assert found.relative < 1e-5
    assert small.training
    assert not small.norm.training
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    batch = torch.randn(5, 3, 8, 8)
    [given] = OnnxSession(found.path)(batch)
    torch.testing.assert_close(given, small.eval()(batch).detach(), atol=1e-5, rtol=1e-5)


def test_a_fixed_batch(small, images, tmp_path):
    found = export_onnx(small, images, tmp_path / "m.onnx", dynamic_batch=False)
    assert not found.dynamic_batch
    with pytest.raises(ConversionError, match="ONNX Runtime failed"):
        OnnxSession(found.path)(torch.randn(2, 3, 8, 8))


class Masked(nn.Module):
    """Attention with a mask, in five dimensions, of keyword arguments."""

    def forward(self, tokens, mask):
        windows = tokens.unflatten(1, (2, -1)).unsqueeze(2)
        mixed = F.scaled_dot_product_attention(windows, windows, windows)
        return {"mixed": mixed.flatten(1, 3) * mask[:, :, None], "rest": tokens.sum(-1)}


def test_keyword_arguments_nested_outputs_and_attention_in_five_dimensions(tmp_path):
    inputs = {"tokens": torch.randn(2, 6, 4), "mask": torch.ones(2, 6)}
    found = export_onnx(Masked(), inputs, tmp_path / "m.onnx")
    session = OnnxSession(found.path)
    assert session.inputs == ["tokens", "mask"]
    expected = Masked()(**inputs)
    for given, name in zip(session(inputs), ("mixed", "rest"), strict=True):
        torch.testing.assert_close(given, expected[name], atol=1e-5, rtol=1e-5)


class Deceitful(nn.Module):
    """Is another function while it is exported."""

    def forward(self, x):
        return x + 1 if torch.compiler.is_exporting() else x


def test_outputs_that_differ_are_refused_and_nothing_changes_on_disk(tmp_path):
    target = tmp_path / "m.onnx"
    target.write_text("mine")
    with pytest.raises(ConversionError, match=r"differs from PyTorch by .* in output"):
        export_onnx(Deceitful(), torch.randn(2, 3), target)
    assert target.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


class ByTheBatch(nn.Module):
    """Takes batches of 2 only."""

    def forward(self, x):
        return x.reshape(2, 3, 2).sum(1)


def test_why_a_batch_is_fixed_is_told(tmp_path):
    found = export_onnx(ByTheBatch(), torch.randn(2, 6), tmp_path / "m.onnx")
    assert not found.dynamic_batch
    assert found.fixed_because
    with pytest.raises(ConversionError, match="with a free batch"):
        export_onnx(ByTheBatch(), torch.randn(2, 6), tmp_path / "n.onnx", dynamic_batch=True)


class Particular(nn.Module):
    """Refuses other batches than 2, but not while it is exported."""

    def forward(self, x):
        if not torch.compiler.is_exporting() and len(x) != 2:
            raise ValueError("2 samples, please")
        return x + 1


def test_a_model_that_refuses_other_batches_gets_a_fixed_one(tmp_path):
    found = export_onnx(Particular(), torch.randn(2, 3), tmp_path / "m.onnx")
    assert not found.dynamic_batch
    assert "ValueError: 2 samples, please" in found.fixed_because


class Unexportable(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x).real


def test_an_opset_that_torch_does_not_write_is_not_replaced_by_another(small, images, tmp_path):
    with pytest.raises(ConversionError, match=r"wrote opset \d+, not 7"):
        export_onnx(small, images, tmp_path / "m.onnx", opset=7)
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_cannot_is_told(tmp_path):
    with pytest.raises(ConversionError, match="torch.onnx.export failed"):
        export_onnx(Unexportable(), torch.randn(1, 3, 3), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_refuses(small, images, tmp_path):
    with pytest.raises(InputError, match="existing folder"):
        export_onnx(small, images, tmp_path / "none" / "m.onnx")
    with pytest.raises(InputError, match="not a folder"):
        export_onnx(small, images, tmp_path)
    with pytest.raises(InputError, match="example_inputs"):
        export_onnx(small, [], tmp_path / "m.onnx")
    with pytest.raises(InputError, match="opset: got 99"):
        export_onnx(small, images, tmp_path / "m.onnx", opset=99)
    with pytest.raises(InputError, match="tolerance"):
        export_onnx(small, images, tmp_path / "m.onnx", tolerance=0)


class TestLargestDifference:
    def test_is_absolute_and_over_the_largest_value(self):
        a, b = torch.tensor([1.0, 10.5]), torch.tensor([1.0, 10.0])
        assert largest_difference([a], [b]) == (0.5, 0.05)
        assert largest_difference([b], [b]) == (0.0, 0.0)

    @pytest.mark.parametrize(
        "other",
        [
            [],
            [torch.zeros(3)],
            [torch.tensor([1.0, torch.nan])],
            [torch.tensor([1.0, torch.inf])],
        ],
    )
    def test_what_cannot_be_compared_is_infinitely_far(self, other):
        assert largest_difference(other, [torch.ones(2)])[1] == float("inf")

    def test_equal_infinities_and_nans_are_equal(self):
        values = torch.tensor([torch.inf, -torch.inf, 2.0])
        assert largest_difference([values], [values]) == (0.0, 0.0)
        assert largest_difference([values], [-values])[0] == float("inf")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(ConversionError, match="ONNX Runtime refuses"):
        OnnxSession(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="existing"):
        OnnxSession(tmp_path / "none.onnx")
