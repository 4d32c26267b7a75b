"""ONNX in: every operation of ours against ONNX Runtime, layers from weights, and damage.

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
CASES = [
    # kind, opset, input shape, weights after it, attributes
    ("Reshape", 20, X, [ints(0, -1, 8)], {}),
    ("Reshape", 5, X, [ints(2, 3, 64)], {}),
    ("Flatten", 20, X, [], {"axis": 2}),
    ("Flatten", 9, X, [], {"axis": 0}),
    ("Expand", 20, [3, 1], [ints(2, 1, 4)], {}),
    ("Slice", 20, X, [ints(1, -3), ints(8, 2**62), ints(3, 2), ints(2, 1)], {}),
    ("Slice", 20, X, [ints(-1), ints(-(2**62)), ints(3), ints(-1)], {}),
    ("Slice", 20, X, [ints(6), ints(1), ints(2), ints(-2)], {}),
    ("Slice", 9, X, [], {"starts": [1, 0], "ends": [3, -1], "axes": [1, 3]}),
    ("Tile", 20, [2, 3], [ints(2, 3)], {}),
    ("Squeeze", 20, [2, 1, 3, 1], [ints(1, -1)], {}),
    ("Squeeze", 11, [2, 1, 3], [], {"axes": [1]}),
    ("Squeeze", 23, [2, 1, 3, 1], [], {}),
    ("Unsqueeze", 20, [2, 3], [ints(0, -1)], {}),
    ("Unsqueeze", 11, [2, 3], [], {"axes": [1]}),
    ("Transpose", 21, X, [], {"perm": [0, 2, 3, 1]}),
    ("Transpose", 9, [2, 3], [], {}),
    ("CumSum", 20, X, [np.int64(1)], {}),
    ("CumSum", 20, X, [np.int64(-1)], {"exclusive": 1, "reverse": 1}),
    ("Pad", 20, X, [ints(1, 2, 0, 1), np.float32(3), ints(3, 2)], {}),
    ("Pad", 13, X, [ints(0, 0, 1, 2, 0, 0, 3, 0), np.float32(-1)], {"mode": "constant"}),
    ("Pad", 20, X, [ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "reflect"}),
    ("Pad", 20, X, [ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "edge"}),
    ("Pad", 20, X, [ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "wrap"}),
    ("Pad", 9, X, [], {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 2.0}),
    ("ReduceMean", 20, X, [ints(-1, 1)], {"keepdims": 0}),
    ("ReduceMean", 13, X, [], {"axes": [2, 3]}),
    ("ReduceSum", 20, X, [], {"noop_with_empty_axes": 1}),
    ("ReduceSum", 20, X, [ints(1)], {}),
    ("ReduceMax", 20, X, [ints(0, 2)], {}),
    ("ReduceMin", 18, X, [], {"keepdims": 0}),
    ("ReduceProd", 20, X, [ints(1, 3)], {"keepdims": 0}),
    ("ReduceL1", 20, X, [ints(1)], {}),
    ("ReduceL2", 20, X, [ints(1, 2)], {}),
    ("ReduceLogSumExp", 20, X, [ints(1)], {}),
    ("ReduceSumSquare", 20, X, [ints(1)], {}),
    ("Gather", 20, X, [np.int64(-1)], {"axis": 1}),
    ("Gather", 20, X, [ints(2, 0, -1)], {"axis": 3}),
    ("Gather", 20, X, [ints(2, 0, -1, 1).reshape(2, 2)], {"axis": 2}),
    ("GatherND", 20, X, [ints(0, 1, 1, 2).reshape(2, 2)], {}),
    ("ScatterND", 20, [4, 3], [ints(1, 3).reshape(2, 1), numbers(2, 3)], {}),
    ("ScatterElements", 20, [3, 4], [ints(1, -1).reshape(1, 2), numbers(1, 2)], {"axis": 1}),
    ("Trilu", 20, [4, 4], [np.int64(1)], {"upper": 1}),
    ("Trilu", 20, [4, 4], [], {"upper": 0}),
    ("Clip", 20, X, [np.float32(-0.5), np.float32(0.5)], {}),
    ("Clip", 6, X, [], {"min": 0.0, "max": 6.0}),
    ("Gelu", 20, X, [], {}),
    ("Gelu", 20, X, [], {"approximate": "tanh"}),
    ("Mish", 22, X, [], {}),
    ("HardSwish", 22, X, [], {}),
    ("GlobalMaxPool", 20, X, [], {}),
    ("GlobalAveragePool", 22, X, [], {}),
    ("MaxPool", 22, X, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("MaxPool", 20, X, [], {"kernel_shape": [3, 2], "pads": [0, 1, 2, 0], "ceil_mode": 1}),
    ("MaxPool", 20, X, [], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER", "strides": [3, 3]}),
    ("AveragePool", 20, X, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", 20, X, [], {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1], "strides": [2, 2]}),
    ("AveragePool", 19, X, [], {"kernel_shape": [2, 2], "pads": [1, 0, 0, 0],
                                "count_include_pad": 1}),
    ("LayerNormalization", 20, [2, 5, 6], [numbers(6), numbers(6, seed=1)], {}),
    ("LayerNormalization", 17, [2, 5, 6], [numbers(5, 6)], {"axis": 1, "epsilon": 0.1}),
    ("RMSNormalization", 23, [2, 5, 6], [numbers(6)], {"axis": -1}),
    ("GroupNormalization", 21, [2, 6, 4, 4], [numbers(6), numbers(6, seed=1)], {"num_groups": 3}),
    ("InstanceNormalization", 22, X, [numbers(3), numbers(3, seed=1)], {}),
    ("BatchNormalization", 15, X, [numbers(3), numbers(3, seed=1), numbers(3, seed=2),
                                   numbers(3) ** 2 + 1], {}),
    ("Conv", 22, X, [*IMAGE.values()], {"strides": [2, 2], "pads": [0, 1, 1, 1]}),
    ("Conv", 20, X, [*IMAGE.values()], {"auto_pad": "SAME_LOWER", "strides": [3, 3]}),
    ("ConvTranspose", 22, X, [numbers(3, 4, 2, 2)], {"strides": [2, 2]}),
    ("Gemm", 20, [4, 3], [numbers(3, 5), numbers(5)], {"alpha": 0.5, "beta": 2.0}),
    ("Gemm", 9, [4, 3], [numbers(5, 3), np.float32(2)], {"transB": 1}),
    ("Gemm", 20, [3, 4], [numbers(3, 5)], {"transA": 1}),
    ("Resize", 20, X, [np.array([], np.float32), np.array([1, 1, 2, 1.5], np.float32)],
     {"mode": "linear"}),
    ("Resize", 19, X, [np.array([], np.float32), np.array([1, 1, 2, 2], np.float32)],
     {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    ("Resize", 13, X, [np.array([], np.float32), np.array([1, 1, 0.5, 2], np.float32)],
     {"mode": "cubic", "coordinate_transformation_mode": "align_corners"}),
    ("Resize", 10, X, [np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}),
    ("Upsample", 9, X, [np.array([1, 1, 2, 3], np.float32)], {"mode": "nearest"}),
    ("DepthToSpace", 20, [2, 8, 3, 4], [], {"blocksize": 2}),
    ("DepthToSpace", 13, [2, 8, 3, 4], [], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", 20, [2, 3, 4, 6], [], {"blocksize": 2}),
    ("Softmax", 20, X, [], {"axis": 1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "opset", "shape", "weights", "attributes"),
    CASES,
    ids=[f"{kind}-{opset}-{number}" for number, (kind, opset, *_) in enumerate(CASES)],
)
def test_operations_compute_what_onnx_runtime_computes(
    tmp_path, kind, opset, shape, weights, attributes
):
    names = {f"w{i}": w for i, w in enumerate(weights)}
    nodes = [node(kind, " ".join(["x", *names]), "y", **attributes)]
    found = import_onnx(write(tmp_path / "m.onnx", nodes, {"x": shape}, names, opset=opset))
    assert found.relative < 1e-5
    torch.export.export(found.model, (found.example_inputs,), strict=False)


def test_every_operation_of_ours_is_tried_or_belongs_to_shapes():
    tried = {kind for kind, *_ in CASES}
    elsewhere = {
        "Add", "Attention", "CastLike", "Col2Im", "Concat", "ConstantOfShape", "Div", "MatMul",
        "Mul", "OneHot", "Range", "ReduceLogSum", "Shape", "Size", "Split", "Sub", "Swish", "TopK",
        "Where",
    }  # fmt: skip
    assert set(OURS) <= tried | elsewhere


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
