"""One operator a model, over opsets, attributes and shapes: PyTorch against ONNX Runtime.

Every case is written as a file with that one node, imported, and its forward compared with what
ONNX Runtime computes, on the inputs of the import and on others. A case is a line of `TABLE`:
operator, opset, shape of the input (or type and shape), then constants and attributes.
"""

import numpy as np
import pytest
import torch

from secateurs.deploy.onnx_export import export_onnx
from secateurs.deploy.onnx_import import import_onnx
from secateurs.deploy.onnx_operators import OURS
from secateurs.deploy.onnx_session import OnnxSession
from secateurs.errors import ConversionError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx2torch")
pytest.importorskip("onnxruntime")

FLOAT, INT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
IMAGE, SIGNAL, VOLUME, TOKENS = [2, 3, 8, 8], [2, 3, 7], [2, 3, 5, 6, 4], [2, 5, 6]


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float32)


def case(kind, opset, shape, *constants, **attributes):
    return kind, opset, shape, constants, attributes


def each(kind, opsets, shape, *constants, **attributes):
    return [case(kind, opset, shape, *constants, **attributes) for opset in opsets]


NORM = numbers(3), numbers(3, seed=1), numbers(3, seed=2), numbers(3, seed=3) ** 2 + 0.5
KERNEL, TURNED, BIAS = numbers(4, 3, 3, 3), numbers(3, 4, 3, 3), numbers(4)
NO_ROI = np.array([], np.float32)

PLAIN = [
    ("Reshape", 20, IMAGE, [ints(0, -1, 8)], {}),
    ("Reshape", 5, IMAGE, [ints(2, 3, 64)], {}),
    ("Flatten", 20, IMAGE, [], {"axis": 2}),
    ("Flatten", 9, IMAGE, [], {"axis": 0}),
    ("Expand", 20, [3, 1], [ints(2, 1, 4)], {}),
    ("Slice", 20, IMAGE, [ints(1, -3), ints(8, 2**62), ints(3, 2), ints(2, 1)], {}),
    ("Slice", 20, IMAGE, [ints(-1), ints(-(2**62)), ints(3), ints(-1)], {}),
    ("Slice", 20, IMAGE, [ints(6), ints(1), ints(2), ints(-2)], {}),
    ("Slice", 9, IMAGE, [], {"starts": [1, 0], "ends": [3, -1], "axes": [1, 3]}),
    ("Tile", 20, [2, 3], [ints(2, 3)], {}),
    ("Squeeze", 20, [2, 1, 3, 1], [ints(1, -1)], {}),
    ("Squeeze", 11, [2, 1, 3], [], {"axes": [1]}),
    ("Squeeze", 23, [2, 1, 3, 1], [], {}),
    ("Unsqueeze", 20, [2, 3], [ints(0, -1)], {}),
    ("Unsqueeze", 11, [2, 3], [], {"axes": [1]}),
    ("Transpose", 21, IMAGE, [], {"perm": [0, 2, 3, 1]}),
    ("Transpose", 9, [2, 3], [], {}),
    ("CumSum", 20, IMAGE, [np.int64(1)], {}),
    ("CumSum", 20, IMAGE, [np.int64(-1)], {"exclusive": 1, "reverse": 1}),
    ("Pad", 20, IMAGE, [ints(1, 2, 0, 1), np.float32(3), ints(3, 2)], {}),
    ("Pad", 13, IMAGE, [ints(0, 0, 1, 2, 0, 0, 3, 0), np.float32(-1)], {"mode": "constant"}),
    ("Pad", 20, IMAGE, [ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "reflect"}),
    ("Pad", 20, IMAGE, [ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "edge"}),
    ("Pad", 20, IMAGE, [ints(0, 0, 1, 2, 0, 0, 3, 1)], {"mode": "wrap"}),
    ("Pad", 9, IMAGE, [], {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 2.0}),
    ("ReduceMean", 20, IMAGE, [ints(-1, 1)], {"keepdims": 0}),
    ("ReduceMean", 13, IMAGE, [], {"axes": [2, 3]}),
    ("ReduceSum", 20, IMAGE, [], {"noop_with_empty_axes": 1}),
    ("ReduceSum", 20, IMAGE, [ints(1)], {}),
    ("ReduceMax", 20, IMAGE, [ints(0, 2)], {}),
    ("ReduceMin", 18, IMAGE, [], {"keepdims": 0}),
    ("ReduceProd", 20, IMAGE, [ints(1, 3)], {"keepdims": 0}),
    ("ReduceL1", 20, IMAGE, [ints(1)], {}),
    ("ReduceL2", 20, IMAGE, [ints(1, 2)], {}),
    ("ReduceLogSumExp", 20, IMAGE, [ints(1)], {}),
    ("ReduceSumSquare", 20, IMAGE, [ints(1)], {}),
    ("Gather", 20, IMAGE, [np.int64(-1)], {"axis": 1}),
    ("Gather", 20, IMAGE, [ints(2, 0, -1)], {"axis": 3}),
    ("Gather", 20, IMAGE, [ints(2, 0, -1, 1).reshape(2, 2)], {"axis": 2}),
    ("GatherND", 20, IMAGE, [ints(0, 1, 1, 2).reshape(2, 2)], {}),
    ("ScatterND", 20, [4, 3], [ints(1, 3).reshape(2, 1), numbers(2, 3)], {}),
    ("ScatterElements", 20, [3, 4], [ints(1, -1).reshape(1, 2), numbers(1, 2)], {"axis": 1}),
    ("Trilu", 20, [4, 4], [np.int64(1)], {"upper": 1}),
    ("Trilu", 20, [4, 4], [], {"upper": 0}),
    ("Clip", 20, IMAGE, [np.float32(-0.5), np.float32(0.5)], {}),
    ("Clip", 6, IMAGE, [], {"min": 0.0, "max": 6.0}),
    ("Gelu", 20, IMAGE, [], {}),
    ("Gelu", 20, IMAGE, [], {"approximate": "tanh"}),
    ("Mish", 22, IMAGE, [], {}),
    ("HardSwish", 22, IMAGE, [], {}),
    ("GlobalMaxPool", 20, IMAGE, [], {}),
    ("GlobalAveragePool", 22, IMAGE, [], {}),
    ("MaxPool", 22, IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("MaxPool", 20, IMAGE, [], {"kernel_shape": [3, 2], "pads": [0, 1, 2, 0], "ceil_mode": 1}),
    ("MaxPool", 20, IMAGE, [], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER",
                            "strides": [3, 3]}),
    ("AveragePool", 20, IMAGE, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", 20, IMAGE, [], {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1],
                                "strides": [2, 2]}),
    ("AveragePool", 19, IMAGE, [], {"kernel_shape": [2, 2], "pads": [1, 0, 0, 0],
                                "count_include_pad": 1}),
    ("LayerNormalization", 20, [2, 5, 6], [numbers(6), numbers(6, seed=1)], {}),
    ("LayerNormalization", 17, [2, 5, 6], [numbers(5, 6)], {"axis": 1, "epsilon": 0.1}),
    ("RMSNormalization", 23, [2, 5, 6], [numbers(6)], {"axis": -1}),
    ("GroupNormalization", 21, [2, 6, 4, 4], [numbers(6), numbers(6, seed=1)], {"num_groups": 3}),
    ("InstanceNormalization", 22, IMAGE, [numbers(3), numbers(3, seed=1)], {}),
    ("BatchNormalization", 15, IMAGE, [numbers(3), numbers(3, seed=1), numbers(3, seed=2),
                                   numbers(3) ** 2 + 1], {}),
    ("Conv", 22, IMAGE, [KERNEL, BIAS], {"strides": [2, 2], "pads": [0, 1, 1, 1]}),
    ("Conv", 20, IMAGE, [KERNEL, BIAS], {"auto_pad": "SAME_LOWER", "strides": [3, 3]}),
    ("ConvTranspose", 22, IMAGE, [numbers(3, 4, 2, 2)], {"strides": [2, 2]}),
    ("Gemm", 20, [4, 3], [numbers(3, 5), numbers(5)], {"alpha": 0.5, "beta": 2.0}),
    ("Gemm", 9, [4, 3], [numbers(5, 3), np.float32(2)], {"transB": 1}),
    ("Gemm", 20, [3, 4], [numbers(3, 5)], {"transA": 1}),
    ("Resize", 20, IMAGE, [np.array([], np.float32), np.array([1, 1, 2, 1.5], np.float32)],
     {"mode": "linear"}),
    ("Resize", 19, IMAGE, [np.array([], np.float32), np.array([1, 1, 2, 2], np.float32)],
     {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    ("Resize", 13, IMAGE, [np.array([], np.float32), np.array([1, 1, 0.5, 2], np.float32)],
     {"mode": "cubic", "coordinate_transformation_mode": "align_corners"}),
    ("Resize", 10, IMAGE, [np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}),
    ("Upsample", 9, IMAGE, [np.array([1, 1, 2, 3], np.float32)], {"mode": "nearest"}),
    ("DepthToSpace", 20, [2, 8, 3, 4], [], {"blocksize": 2}),
    ("DepthToSpace", 13, [2, 8, 3, 4], [], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", 20, [2, 3, 4, 6], [], {"blocksize": 2}),
    ("Softmax", 20, IMAGE, [], {"axis": 1}),
]  # fmt: skip


def convolutions():
    yield from each("Conv", (7, 11, 22), IMAGE, KERNEL, BIAS, pads=[1, 1, 1, 1])
    yield case("Conv", 11, IMAGE, KERNEL, dilations=[2, 1], strides=[1, 2], pads=[2, 0, 1, 3])
    for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
        yield case("Conv", 11, IMAGE, KERNEL, auto_pad=auto, strides=[2, 3])
        yield case("ConvTranspose", 11, IMAGE, TURNED, BIAS, auto_pad=auto, strides=[2, 2])
        yield case("ConvTranspose", 11, IMAGE, TURNED, auto_pad=auto, strides=[1, 3])
    yield case("Conv", 11, [2, 4, 8, 8], numbers(6, 2, 3, 3), numbers(6), group=2)
    yield case("Conv", 11, SIGNAL, numbers(4, 3, 3), BIAS, pads=[2, 0])
    yield case("Conv", 11, VOLUME, numbers(4, 3, 2, 2, 2), pads=[1, 0, 1, 0, 1, 1])
    yield from each("ConvTranspose", (7, 11, 22), IMAGE, TURNED, BIAS)
    yield case("ConvTranspose", 11, [2, 4, 5, 5], numbers(4, 3, 2, 2), group=2)
    yield case("ConvTranspose", 11, IMAGE, TURNED, strides=[2, 2], pads=[1, 1, 1, 1],
               output_padding=[1, 1])  # fmt: skip
    yield case("ConvTranspose", 11, IMAGE, TURNED, strides=[3, 3], pads=[0, 1, 2, 0],
               output_padding=[1, 2], dilations=[2, 1])  # fmt: skip
    yield case("ConvTranspose", 11, IMAGE, TURNED, strides=[2, 2], output_shape=[17, 15])
    yield case("ConvTranspose", 11, IMAGE, TURNED, strides=[2, 2], output_shape=[18, 16],
               auto_pad="SAME_UPPER")  # fmt: skip
    yield case("ConvTranspose", 11, SIGNAL, numbers(3, 4, 4), strides=[2], output_shape=[13])


def products():
    weight, bias = numbers(3, 5), numbers(5)
    yield from each("Gemm", (7, 9, 11, 13), [4, 3], weight, bias)
    for c in (numbers(4, 5), numbers(4, 1), numbers(1, 5), numbers(1, 1), np.float32(2)):
        yield case("Gemm", 13, [4, 3], weight, c, alpha=0.5, beta=2.0)
    yield case("Gemm", 13, [3, 4], numbers(5, 3), bias, transA=1, transB=1, alpha=0.5)
    yield case("Gemm", 13, [4, 3], weight, bias, beta=0.0)
    yield case("MatMul", 13, [3], weight)
    yield case("MatMul", 13, [2, 3], numbers(3))
    yield case("MatMul", 9, [2, 2, 4, 3], numbers(2, 3, 5))
    yield case("Einsum", 12, [2, 3, 4], numbers(2, 4, 5), equation="bij,bjk->bik")


def norms():
    yield from each("BatchNormalization", (7, 8, 9, 14, 15), IMAGE, *NORM)
    for shape in ([4, 3], SIGNAL, VOLUME):
        yield case("BatchNormalization", 15, shape, *NORM, epsilon=0.1)
    for shape in ((6,), (1,), ()):
        scale = numbers(*shape) if shape else np.float32(2)
        yield case("LayerNormalization", 17, TOKENS, scale, epsilon=0.1)
    yield case("LayerNormalization", 17, TOKENS, numbers(5, 6), numbers(5, 6), axis=-2)
    yield case("LayerNormalization", 17, TOKENS, numbers(5, 1), axis=1)
    yield case("LayerNormalization", 17, TOKENS, numbers(6), numbers(6, seed=1), axis=2)
    yield case("GroupNormalization", 18, [2, 6, 4], numbers(3), numbers(3), num_groups=3)
    yield case("GroupNormalization", 21, [2, 6, 4], numbers(6), numbers(6), num_groups=2)
    yield case("InstanceNormalization", 7, SIGNAL, numbers(3), numbers(3), epsilon=0.1)
    yield case("RMSNormalization", 23, TOKENS, numbers(5, 6), axis=1)
    yield case("LRN", 13, IMAGE, size=5, alpha=0.1, beta=0.5, bias=2.0)


def pools():
    yield from each("MaxPool", (7, 8, 10, 12, 22), IMAGE, kernel_shape=[3, 3])
    yield from each("AveragePool", (7, 10, 11, 19, 22), IMAGE, kernel_shape=[3, 3])
    ways = [
        {"strides": [2, 2], "ceil_mode": 1},
        {"strides": [3, 3], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
        {"strides": [4, 4], "ceil_mode": 1, "pads": [2, 2, 2, 2]},
        {"strides": [3, 3], "ceil_mode": 1, "pads": [1, 0, 2, 2]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
        {"strides": [2, 2], "auto_pad": "VALID"},
        {"pads": [0, 1, 2, 0]},
    ]
    for way in ways:
        yield case("MaxPool", 12, IMAGE, kernel_shape=[3, 3], **way)
        for count in (0, 1):
            yield case("AveragePool", 19, IMAGE, kernel_shape=[3, 3], count_include_pad=count,
                       **way)  # fmt: skip
    yield case("MaxPool", 12, IMAGE, kernel_shape=[3, 3], dilations=[2, 1], pads=[1, 0, 1, 0])
    yield case("MaxPool", 12, SIGNAL, kernel_shape=[2], strides=[2], ceil_mode=1)
    yield case("AveragePool", 11, VOLUME, kernel_shape=[2, 2, 2], pads=[0, 0, 0, 1, 1, 1])
    yield case("GlobalAveragePool", 7, VOLUME)
    yield case("GlobalMaxPool", 7, SIGNAL)


def pads():
    yield case("Pad", 11, IMAGE, ints(0, 0, -1, 1, 0, 0, 2, -2), np.float32(1))
    for mode in ("reflect", "edge"):
        yield case("Pad", 9, IMAGE, pads=[0, 0, 1, 2, 0, 0, 3, 4], mode=mode)
        yield case("Pad", 13, IMAGE, ints(1, 0, 0, 1, 0, 1, 2, 0), mode=mode)
        yield case("Pad", 13, [3, 4], ints(1, 2, 0, 1), mode=mode)
        yield case("Pad", 13, [4], ints(2, 3), mode=mode)
    yield case("Pad", 18, IMAGE, ints(2, 1), None, ints(-1), mode="reflect")
    yield case("Pad", 19, IMAGE, ints(1, 1, 2, 1), None, ints(1, 2), mode="wrap")
    yield case("Pad", 18, IMAGE, ints(1, 1, 2, 1), np.float32(7), ints(-2, -1))


def bounds():
    low, high = np.float32(-0.5), np.float32(0.5)
    for opset in (11, 12, 13):
        for constants in ((low, high), (low,), (None, high), ()):
            yield case("Clip", opset, SIGNAL, *constants)
    yield case("Clip", 6 + 1, SIGNAL, min=-0.5)
    yield case("Clip", 6 + 1, SIGNAL, max=0.5)


def slices():
    far = 2**62
    yield case("Slice", 9, IMAGE, starts=[0, -4], ends=[1, 2**31 - 1], axes=[0, 2])
    yield case("Slice", 10, IMAGE, ints(1), ints(7), ints(3), ints(3))
    yield case("Slice", 13, IMAGE, ints(0, 1), ints(2, 3))
    yield case("Slice", 13, IMAGE, ints(7, 7), ints(-far, -9), ints(-1, -2), ints(-1, -3))
    yield case("Slice", 13, IMAGE, ints(far), ints(0), ints(3), ints(-2))
    yield case("Slice", 13, IMAGE, ints(2), ints(-5), ints(3), ints(-1))  # nothing
    yield case("Slice", 13, IMAGE, ints(-100), ints(-200), ints(2), ints(-1))
    yield case("Split", 13, [2, 3], ints(3), axis=1)
    yield case("Tile", 7, [2, 3], ints(1, 2))
    yield case("Expand", 8, [2, 1, 3], ints(1))


def shapes():
    yield from each("Reshape", (7, 13, 14, 21), IMAGE, ints(0, -1))
    yield case("Reshape", 14, [6], ints(2, 3), allowzero=1)
    yield from (case("Flatten", 13, IMAGE, axis=axis) for axis in (0, 1, 2, -1, -2, 4))
    yield case("Flatten", 9, [3])
    yield case("Squeeze", 9, [1, 3, 1])
    yield case("Squeeze", 13, [1, 3, 1], ints(-3))
    yield case("Unsqueeze", 9, SIGNAL, axes=[1, 3])
    yield case("Unsqueeze", 13, SIGNAL, ints(3, 0, 5))
    yield case("Shape", 15, SIGNAL, start=-2)
    yield case("Shape", 15, SIGNAL, end=-1)
    yield case("Size", 13, SIGNAL)


def reductions():
    for kind in ("L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"):
        yield case(f"Reduce{kind}", 7, IMAGE, axes=[1, 3])
        yield case(f"Reduce{kind}", 18, IMAGE, ints(-1, 0), keepdims=0)
        yield case(f"Reduce{kind}", 18, IMAGE, keepdims=0)
        yield case(f"Reduce{kind}", 18, IMAGE, ints(), noop_with_empty_axes=1)
    yield from each("ArgMax", (11, 12, 13), SIGNAL, axis=-1, keepdims=0)
    for reverse in (0, 1):
        yield case("CumSum", 14, SIGNAL, np.int64(1), reverse=reverse, exclusive=1 - reverse)


def looks():
    yield from each("Gather", (7, 11, 13), [4, 5], ints(0, 2))
    yield case("Gather", 13, IMAGE, np.array([-1, 0], np.int32), axis=-1)
    yield case("Gather", 13, IMAGE, np.int64(-2), axis=-2)
    yield from each("GatherElements", (11, 13), [3, 4], ints(0, -1, 2, 1, 1, 0).reshape(3, 2),
                    axis=-1)  # fmt: skip
    yield case("GatherND", 13, IMAGE, ints(0, -1).reshape(1, 2))
    yield case("ScatterND", 13, [4, 3], ints(-1, 0).reshape(2, 1), numbers(2, 3))
    yield case("ScatterElements", 13, [3, 4], ints(0, -1).reshape(1, 2), numbers(1, 2))
    yield case("OneHot", 11, (INT, [3, 2]), np.int64(4), floats(2, 5), axis=1)
    yield case("OneHot", 11, (INT, [3]), np.int64(1), floats(0, 1))  # beyond the depth
    yield case("NonZero", 13, SIGNAL)
    yield case("Trilu", 14, [2, 4, 5], np.int64(-1))
    yield case("Where", 9, (BOOL, [3, 1]), numbers(4), np.float32(0))


def elementwise():
    for kind in ("Softmax", "LogSoftmax"):
        yield from each(kind, (7, 11, 13), SIGNAL)
        yield from each(kind, (7, 11, 13), SIGNAL, axis=0)
    yield case("HardSigmoid", 7, SIGNAL, alpha=0.3, beta=0.4)
    yield case("Elu", 7, SIGNAL, alpha=0.5)
    yield case("Celu", 12, SIGNAL, alpha=2.0)
    yield from each("LeakyRelu", (7, 16), SIGNAL, alpha=0.3)
    yield case("PRelu", 9, IMAGE, numbers(3, 1, 1))
    yield case("PRelu", 16, IMAGE, numbers(8))
    yield case("Swish", 24, SIGNAL, alpha=2.0)
    for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum"):
        yield case(kind, 8, SIGNAL, numbers(3, 1) + 3)
    yield case("Pow", 15, SIGNAL, np.int64(3))
    yield case("Div", 13, (INT, [4]), ints(2, 3, -4, 5))
    yield case("Mod", 13, SIGNAL, np.float32(0.7), fmod=1)
    yield case("Max", 12, (INT, [3]), ints(0, 1, 2))
    for kind in (FLOAT, INT, BOOL, onnx.TensorProto.INT32):
        yield from each("Cast", (9, 13, 19), SIGNAL, to=kind)
    yield from each("Dropout", (7, 10, 22), SIGNAL)


def resizes():
    coordinates = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    for mode in ("nearest", "linear", "cubic"):
        for way in coordinates:
            for scales in ((2, 2), (0.5, 0.5), (1.3, 0.6), (3, 1)):
                yield case("Resize", 13, IMAGE, None, floats(1, 1, *scales), mode=mode,
                           coordinate_transformation_mode=way)  # fmt: skip
            yield case("Resize", 13, IMAGE, None, None, ints(2, 3, 5, 1), mode=mode,
                       coordinate_transformation_mode=way)  # fmt: skip
    for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        for way in coordinates:
            yield case("Resize", 13, IMAGE, None, floats(1, 1, 1.3, 0.5), mode="nearest",
                       nearest_mode=rounding, coordinate_transformation_mode=way)  # fmt: skip
    yield case("Resize", 11, IMAGE, NO_ROI, floats(1, 1, 2, 2), mode="linear")
    yield case("Resize", 13, VOLUME, None, floats(1, 1, 2, 2, 2), mode="linear")
    yield case("Resize", 13, [4, 5], None, floats(2, 2), mode="linear")
    yield case("Resize", 13, IMAGE, None, floats(1, 2, 1, 1), mode="nearest")
    yield case("Resize", 18, IMAGE, None, None, ints(5, 6), mode="nearest", axes=[3, 2])
    yield case("Resize", 13, IMAGE, None, floats(1, 1, 2, 2), mode="cubic", cubic_coeff_a=-0.5)
    yield case("Resize", 13, IMAGE, None, floats(1, 1, 0.7, 2), mode="cubic", exclude_outside=1)
    for mode in ("linear", "cubic"):
        yield case("Resize", 18, IMAGE, None, floats(1, 1, 0.5, 2), mode=mode, antialias=1,
                   exclude_outside=1, cubic_coeff_a=-0.5)  # fmt: skip
        yield case(
            "Resize", 10, IMAGE, floats(1, 1, 1.5, 1.7), mode=mode.replace("cubic", "nearest")
        )
    yield case("Upsample", 9, IMAGE, floats(1, 1, 2, 3), mode="linear")
    yield case("Upsample", 7, IMAGE, scales=[1.0, 1.0, 2.0, 2.0], mode="nearest")


FAMILIES = (
    convolutions, products, norms, pools, pads, bounds, slices, shapes, reductions, looks,
    elementwise, resizes,
)  # fmt: skip
TABLE = [*PLAIN, *(one for family in FAMILIES for one in family())]


def write(path, kind, opset, shape, constants, attributes):
    """A file with one node; absent constants are inputs without a name."""
    names = ["" if value is None else f"c{place}" for place, value in enumerate(constants)]
    node = onnx.helper.make_node(kind, ["x", *names], ["y"], **attributes)
    stored = [
        onnx.numpy_helper.from_array(np.asarray(value), name)
        for name, value in zip(names, constants, strict=True)
        if value is not None
    ]
    given = onnx.helper.make_tensor_value_info(
        "x", *(shape if isinstance(shape, tuple) else (FLOAT, shape))
    )
    graph = onnx.helper.make_graph([node], "g", [given], [onnx.ValueInfoProto(name="y")], stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = 8
    # the type of the output follows from the operator; its shape is left open
    model = onnx.shape_inference.infer_shapes(model)
    kind = model.graph.output[0].type.tensor_type.elem_type or FLOAT
    model.graph.output[0].type.tensor_type.elem_type = kind
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    return path


def other_inputs(like):
    """Others of the same kind: integers from −3 to 3, with a zero for what divides by nothing."""
    stream = torch.Generator().manual_seed(7)
    if like.dtype.is_floating_point:
        return 2 * torch.randn(like.shape, generator=stream)
    if like.dtype is torch.bool:
        return torch.rand(like.shape, generator=stream) > 0.5
    return torch.randint(-3, 4, like.shape, generator=stream)


@pytest.mark.parametrize(
    ("kind", "opset", "shape", "constants", "attributes"),
    TABLE,
    ids=[f"{number}-{kind}-{opset}" for number, (kind, opset, *_) in enumerate(TABLE)],
)
def test_one_operator_computes_what_onnx_runtime_computes(
    tmp_path, kind, opset, shape, constants, attributes
):
    path = write(tmp_path / "m.onnx", kind, opset, shape, constants, attributes)
    found = import_onnx(path)
    session = OnnxSession(path, threads=1)
    for inputs in (found.example_inputs, other_inputs(found.example_inputs)):
        with torch.no_grad():
            given = found.model(inputs)
        [expected] = session([inputs])
        assert given.dtype == expected.dtype
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    torch.export.export(found.model, (found.example_inputs,), strict=False)


def test_every_operation_of_ours_is_tried_or_belongs_to_shapes():
    tried = {kind for kind, *_ in TABLE}
    elsewhere = {
        "Add", "Attention", "CastLike", "Col2Im", "Concat", "ConstantOfShape", "Div", "MatMul",
        "Mul", "OneHot", "Range", "ReduceLogSum", "Shape", "Size", "Split", "Sub", "Swish", "TopK",
        "Where",
    }  # fmt: skip
    assert set(OURS) <= tried | elsewhere


def test_the_table_is_large_and_every_line_is_another_one():
    assert len({repr(one) for one in TABLE}) == len(TABLE) > 300


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (case("Resize", 18, IMAGE, None, floats(1, 1, 0.5, 1), mode="linear", antialias=1),
         "antialias at half_pixel coordinates, exclude_outside=0"),
        (case("AveragePool", 19, IMAGE, kernel_shape=[2, 2], dilations=[2, 2]), "a dilated mean"),
        (case("ScatterElements", 18, [3, 4], ints(0).reshape(1, 1), numbers(1, 1),
              reduction="add"), "reduction 'add'"),
        (case("LSTM", 14, [3, 2, 5], numbers(1, 16, 5), numbers(1, 16, 4), hidden_size=4),
         r"without a counterpart in PyTorch: LSTM \(1x\)"),
    ],
)  # fmt: skip
def test_what_is_not_carried_over_is_refused_with_a_reason(tmp_path, one, message):
    with pytest.raises(ConversionError, match=message):
        import_onnx(write(tmp_path / "m.onnx", *one))


def test_an_interpolation_leaves_the_batch_free(tmp_path):
    path = write(tmp_path / "m.onnx", *case("Resize", 13, ["N", 3, 8, 8], None,
                 floats(1, 1, 1.3, 2), mode="linear"))  # fmt: skip
    found = import_onnx(path)
    assert found.free == ("N",)
    again = export_onnx(found.model, found.example_inputs, tmp_path / "again.onnx")
    assert again.dynamic_batch
