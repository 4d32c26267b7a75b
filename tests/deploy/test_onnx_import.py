"""ONNX in: graphs of several operations, layers from weights, free sizes, and damage.

`import_onnx` compares every model with ONNX Runtime itself; a test that imports has compared.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from secateurs.deploy.onnx_export import export_onnx
from secateurs.deploy.onnx_import import import_onnx
from secateurs.deploy.onnx_operators import OURS
from secateurs.errors import ConversionError, InputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx2torch")
pytest.importorskip("onnxruntime")

FLOAT, INT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL


def node(kind, inputs, outputs, **attributes):
    return onnx.helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def write(path, nodes, inputs, weights=(), outputs=("y",), opset=20):
    """A model of nodes; inputs are name -> shape, or (type, shape); outputs of unknown shape."""
    given = [
        onnx.helper.make_tensor_value_info(
            name, *(shape if isinstance(shape, tuple) else (FLOAT, shape))
        )
        for name, shape in inputs.items()
    ]
    made = [onnx.helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
    stored = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in dict(weights).items()]
    graph = onnx.helper.make_graph(nodes, "g", given, made, stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


X = [2, 3, 8, 8]
IMAGE = {"w": numbers(4, 3, 3, 3), "b": numbers(4)}


class TestSeveral:
    def test_splits_and_outputs_that_are_parts_inputs_and_weights(self, tmp_path):
        nodes = [
            node("Split", "x", "a b", axis=1, num_outputs=2),
            node("TopK", "b k", "top where", axis=-1),
            node("Mul", "a two", "c"),
        ]
        weights = {"k": ints(2), "two": np.float32(2)}
        path = write(
            tmp_path / "m.onnx", nodes, {"x": [2, 5]}, weights, ("a", "top", "x", "two", "c")
        )
        found = import_onnx(path)
        a, top, x, two, c = found.model(found.example_inputs)
        torch.testing.assert_close(a, found.example_inputs[:, :3])
        torch.testing.assert_close(top, found.example_inputs[:, 3:].sort(descending=True).values)
        torch.testing.assert_close(x, found.example_inputs)
        torch.testing.assert_close(c, 2 * a)
        assert two == 2

    def test_an_output_that_is_given_twice(self, tmp_path):
        nodes = [node("Relu", "x", "y"), node("Split", "y", "a b", axis=1, num_outputs=2)]
        path = write(tmp_path / "m.onnx", nodes, {"x": [2, 4]}, outputs=("y", "y", "a", "a"))
        found = import_onnx(path)
        first, second, a, again = found.model(found.example_inputs)
        assert torch.equal(first, second)
        assert torch.equal(a, again)

    @pytest.mark.parametrize("opset", [11, 13, 18])
    def test_a_split_of_which_only_the_first_part_is_read(self, tmp_path, opset):
        parts = {"num_outputs": 2} if opset == 18 else {}
        nodes = [node("Split", "x", "y rest", axis=1, **parts)]
        found = import_onnx(write(tmp_path / "m.onnx", nodes, {"x": [2, 4]}, opset=opset))
        assert torch.equal(found.model(found.example_inputs), found.example_inputs[:, :2])

    @pytest.mark.parametrize("name", ["class", "self", "torch", "1st"])
    def test_inputs_called_as_python_itself(self, tmp_path, name):
        path = write(tmp_path / "m.onnx", [node("Relu", name, "y")], {name: [2, 3]})
        found = import_onnx(path)
        assert torch.equal(found.model(found.example_inputs), found.example_inputs.relu())

    def test_outputs_that_nobody_reads_are_none(self, tmp_path):
        path = write(tmp_path / "m.onnx", [node("Dropout", "x", "y mask")], {"x": [3, 4]}, opset=13)
        found = import_onnx(path)
        assert torch.equal(found.model(found.example_inputs), found.example_inputs)

    def test_constants_in_every_form(self, tmp_path):
        nodes = [
            node("Constant", "", "a", value_floats=[1.0, 2.0]),
            node("Constant", "", "b", value_float=3.0),
            node("Constant", "", "c", value_ints=[2]),
            node("Identity", "b", "bb"),
            node("Mul", "x a", "p"),
            node("Add", "p bb", "q"),
            node("Unsqueeze", "q c", "y"),
        ]
        found = import_onnx(write(tmp_path / "m.onnx", nodes, {"x": [4, 2]}))
        x = found.example_inputs
        torch.testing.assert_close(found.model(x), (x * torch.tensor([1.0, 2.0]) + 3)[:, :, None])

    def test_attention(self, tmp_path):
        nodes = [node("Attention", "x x x", "y", q_num_heads=2, kv_num_heads=2, is_causal=1)]
        found = import_onnx(write(tmp_path / "m.onnx", nodes, {"x": [2, 5, 8]}, opset=23))
        assert found.relative < 1e-5

    def test_several_inputs_are_a_dictionary_of_python_names(self, tmp_path):
        nodes = [
            node("Gather", "table input.1", "rows"),
            node("Where", "0mask rows zero", "y"),
        ]
        inputs = {"input.1": (INT, ["batch", 3]), "0mask": (BOOL, ["batch", 3, 1])}
        weights = {"table": numbers(7, 4), "zero": np.float32(0)}
        found = import_onnx(write(tmp_path / "m.onnx", nodes, inputs, weights))
        assert list(found.example_inputs) == ["input_1", "_0mask"]
        assert found.model(**found.example_inputs).shape == (1, 3, 4)
        assert any(isinstance(m, nn.Embedding) for m in found.model.children())


class TestShapes:
    def test_free_dimensions_stay_free(self, tmp_path):
        """x (N, T, 6) -> heads (N, 2, T, 3) by sizes that are read from x; and positions."""
        nodes = [
            node("Shape", "x", "shape"),
            node("Gather", "shape zero", "n"),
            node("Gather", "shape one", "t"),
            node("Unsqueeze", "n first", "n1"),
            node("Unsqueeze", "t first", "t1"),
            node("Concat", "n1 t1 two three", "split", axis=0),
            node("Reshape", "x split", "heads"),
            node("Range", "zero t one", "places"),
            node("Cast", "places", "floats", to=FLOAT),
            node("Unsqueeze", "floats last", "column"),
            node("Transpose", "heads", "turned", perm=[0, 2, 1, 3]),
            node("Add", "turned column", "y"),
        ]
        weights = {"zero": np.int64(0), "one": np.int64(1), "first": ints(0), "two": ints(2),
                   "three": ints(3), "last": ints(1)}  # fmt: skip
        path = write(tmp_path / "m.onnx", nodes, {"x": ["N", "T", 6]}, weights)
        found = import_onnx(path, sizes={"T": 4})
        assert found.sizes == {"N": 1, "T": 4}
        assert set(found.free) == {"N", "T"}
        assert found.example_inputs.shape == (1, 4, 6)
        x = torch.randn(3, 7, 6)
        expected = x.reshape(3, 7, 2, 3).transpose(1, 2) + torch.arange(7)[:, None]
        torch.testing.assert_close(found.model(x), expected)
        exported = torch.export.export(found.model, (x,), strict=False)
        torch.testing.assert_close(exported.module()(x), expected)

    def test_a_batch_that_is_written_into_the_graph_is_not_free(self, tmp_path):
        nodes = [node("Reshape", "x shape", "y")]
        path = write(tmp_path / "m.onnx", nodes, {"x": ["N", 6]}, {"shape": ints(1, 2, 3)})
        assert import_onnx(path).free == ()

    def test_constants_of_shape(self, tmp_path):
        value = onnx.helper.make_tensor("v", FLOAT, [1], [2.5])
        nodes = [
            node("Shape", "x", "shape"),
            node("ConstantOfShape", "shape", "filled", value=value),
            node("Size", "x", "size"),
            node("CastLike", "size x", "count"),
            node("Sub", "filled count", "y"),
        ]
        found = import_onnx(write(tmp_path / "m.onnx", nodes, {"x": ["N", 3]}))
        torch.testing.assert_close(found.model(torch.zeros(2, 3)), torch.full((2, 3), 2.5 - 6))

    def test_sizes_are_named_as_in_the_file(self, tmp_path):
        path = write(tmp_path / "m.onnx", [node("Relu", "x", "y")], {"x": ["batch", "width"]})
        assert import_onnx(path).example_inputs.shape == (1, 1)
        assert import_onnx(path, sizes={"width": 5}).example_inputs.shape == (1, 5)
        with pytest.raises(InputError, match="did you mean 'width'"):
            import_onnx(path, sizes={"widht": 5})
        with pytest.raises(InputError, match="at least 1"):
            import_onnx(path, sizes={"width": 0})


class TestLayers:
    def test_products_become_linear_layers_with_the_names_of_their_weights(self, tmp_path):
        nodes = [
            node("MatMul", "x up.weight", "a"),
            node("Add", "a up.bias", "b"),
            node("Relu", "b", "c"),
            node("Gemm", "c down.weight down.bias", "y", transB=1),
        ]
        weights = {"up.weight": numbers(3, 4), "up.bias": numbers(4),
                   "down.weight": numbers(2, 4), "down.bias": numbers(2)}  # fmt: skip
        found = import_onnx(write(tmp_path / "m.onnx", nodes, {"x": ["N", 3]}, weights))
        shapes = {name: tuple(p.shape) for name, p in found.model.named_parameters()}
        assert shapes == {
            "up.weight": (4, 3), "up.bias": (4,), "down.weight": (2, 4), "down.bias": (2,),
        }  # fmt: skip
        assert not list(found.model.buffers())

    def test_a_bias_that_others_read_too_stays_a_sum(self, tmp_path):
        nodes = [
            node("MatMul", "x w", "a"),
            node("Add", "a b", "c"),
            node("Mul", "a c", "y"),
        ]
        weights = {"w": numbers(3, 4), "b": numbers(4)}
        found = import_onnx(write(tmp_path / "m.onnx", nodes, {"x": ["N", 3]}, weights))
        assert found.relative < 1e-5
        assert sum(p.numel() for p in found.model.parameters()) == 16

    def test_tied_matrices_stay_tied_and_equal_constants_do_not_tie(self, tmp_path):
        nodes = [
            node("Gather", "table ids", "e"),
            node("LayerNormalization", "e ones zeros", "n"),
            node("MatMul", "n square", "s"),
            node("LayerNormalization", "s ones zeros", "m"),
            node("Transpose", "table", "turned"),
            node("MatMul", "m turned", "y"),
        ]
        weights = {"table": numbers(9, 4), "square": numbers(4, 4), "ones": np.ones(4, np.float32),
                   "zeros": np.zeros(4, np.float32)}  # fmt: skip
        path = write(tmp_path / "m.onnx", nodes, {"ids": (INT, ["N", 3])}, weights)
        model = import_onnx(path).model
        [table] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        assert linear[1].weight is table.weight
        assert norms[0].weight is not norms[1].weight

    def test_weights_that_are_computed_are_folded(self, tmp_path):
        nodes = [node("Mul", "w two", "v"), node("Conv", "x v", "y", pads=[1, 1, 1, 1])]
        weights = {"w": IMAGE["w"], "two": np.float32(2)}
        model = import_onnx(write(tmp_path / "m.onnx", nodes, {"x": X}, weights)).model
        [layer] = model.children()
        torch.testing.assert_close(layer.weight.detach(), torch.from_numpy(2 * IMAGE["w"]))

    def test_masks_are_no_parameters(self, tmp_path):
        mask = np.where(np.tri(3) > 0, 0, -np.inf).astype(np.float32)
        nodes = [node("Add", "x mask", "a"), node("Softmax", "a", "b"), node("Mul", "b scale", "y")]
        path = write(tmp_path / "m.onnx", nodes, {"x": [3, 3]}, {"mask": mask, "scale": numbers(3)})
        model = import_onnx(path).model
        assert [tuple(p.shape) for p in model.parameters()] == [(3,)]
        assert [tuple(b.shape) for b in model.buffers()] == [(3, 3)]

    def test_it_trains_copies_and_saves(self, tmp_path):
        nodes = [node("Conv", "x c.weight c.bias", "a"), node("Flatten", "a", "b"),
                 node("Gemm", "b f.weight", "y", transB=1)]  # fmt: skip
        weights = {"c.weight": IMAGE["w"], "c.bias": IMAGE["b"], "f.weight": numbers(5, 4 * 36)}
        found = import_onnx(write(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, weights))
        twin = copy.deepcopy(found.model).train()
        twin(torch.randn(4, 3, 8, 8)).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
        found.model.load_state_dict(twin.state_dict())


class TestRefuses:
    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(InputError, match="existing ONNX file"):
            import_onnx(tmp_path / "none.onnx")

    @pytest.mark.parametrize("length", [0, 10, 400])
    def test_truncated_files(self, tmp_path, length):
        weights = {"w": numbers(20, 20)}
        path = write(tmp_path / "m.onnx", [node("MatMul", "x w", "y")], {"x": [2, 20]}, weights)
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(InputError, match=r"m\.onnx.*accepted: a whole ONNX model"):
            import_onnx(path)

    def test_missing_external_weights(self, tmp_path):
        weights = {"w": numbers(20, 20)}
        path = write(tmp_path / "m.onnx", [node("MatMul", "x w", "y")], {"x": [2, 20]}, weights)
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin",
                  size_threshold=0)  # fmt: skip
        assert import_onnx(path).relative < 1e-5
        (tmp_path / "w.bin").unlink()
        with pytest.raises(InputError, match="whole ONNX model"):
            import_onnx(path)

    def test_operations_without_a_counterpart_are_all_named(self, tmp_path):
        nodes = [node("Hardmax", "x", "a"), node("Hardmax", "a", "b"), node("Det", "b", "y")]
        path = write(tmp_path / "m.onnx", nodes, {"x": [3, 3]})
        with pytest.raises(ConversionError, match=r"Det \(1x\), Hardmax \(2x\)"):
            import_onnx(path)

    def test_forms_that_torch_does_not_have(self, tmp_path):
        nodes = [node("ScatterND", "x i u", "y", reduction="add")]
        weights = {"i": ints(0).reshape(1, 1), "u": numbers(1, 3)}
        path = write(tmp_path / "m.onnx", nodes, {"x": [4, 3]}, weights)
        with pytest.raises(ConversionError, match="reduction 'add'"):
            import_onnx(path)

    def test_a_norm_that_is_still_in_training(self, tmp_path):
        nodes = [node("BatchNormalization", "x s b m v", "y mean var", training_mode=1)]
        weights = dict.fromkeys("sbmv", np.ones(3, np.float32))
        path = write(tmp_path / "m.onnx", nodes, {"x": X}, weights, ("y", "mean", "var"), opset=15)
        with pytest.raises(ConversionError, match="training_mode=1"):
            import_onnx(path)

    def test_inputs_that_are_one_name_in_python(self, tmp_path):
        path = write(
            tmp_path / "m.onnx", [node("Add", "a.b a_b", "y")], {"a.b": [2, 3], "a_b": [2, 3]}
        )
        with pytest.raises(ConversionError, match=r"'a\.b' and 'a_b' are the same name"):
            import_onnx(path)

    def test_what_computes_something_else(self, tmp_path, monkeypatch):
        monkeypatch.setitem(OURS, "Gelu", lambda at, n: OURS["Mish"](at, n))
        path = write(tmp_path / "m.onnx", [node("Gelu", "x", "y")], {"x": [3, 3]})
        with pytest.raises(ConversionError, match="differs from ONNX Runtime by"):
            import_onnx(path)


def test_there_and_back_and_there_again(small, images, tmp_path):
    small.eval()
    first = export_onnx(small, images, tmp_path / "a.onnx")
    found = import_onnx(first.path)
    assert found.free == ("batch",)
    batch = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(found.model(batch), small(batch), atol=1e-5, rtol=1e-5)
    names = {name for name, _ in found.model.named_parameters()}
    assert {"stem.weight", "depthwise.weight", "classifier.weight", "classifier.bias"} <= names
    assert export_onnx(found.model, found.example_inputs, tmp_path / "b.onnx").dynamic_batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["timm:test_vit", "timm:test_efficientnet", "torchvision:mobilenet_v3_small",
     "torchvision:shufflenet_v2_x0_5", "timm:resnetv2_50", "timm:poolformer_s12",
     "torchvision:convnext_tiny", "timm:levit_128s", "timm:swin_tiny_patch4_window7_224"],
)  # fmt: skip
def test_networks_of_the_libraries_come_back(name, tmp_path):
    pytest.importorskip("timm")
    from secateurs.zoo.models import load_model

    source = load_model(name)
    model, inputs = source.make().eval(), source.example_inputs()
    found = import_onnx(export_onnx(model, inputs, tmp_path / "m.onnx").path)
    assert found.free == ("batch",)
    with torch.no_grad():
        expected, given = model(inputs), found.model(inputs)
    torch.testing.assert_close(given, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    torch.export.export(found.model, (inputs,), strict=False)
