"""Latency: what is measured, what is put back, and engines that fail are named."""

import json
import sys
import time

import pytest
import torch
from torch import nn

from secateurs.deploy import timing
from secateurs.deploy.timing import Comparison, compare_latency, latency_rows, measure_engines
from secateurs.errors import InputError
from secateurs.parts.costs import time_calls


class Sleeping(nn.Module):
    """Takes some milliseconds."""

    def __init__(self, milliseconds):
        super().__init__()
        self.milliseconds = milliseconds
        self.dropout = nn.Dropout(0.5)
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, torch.is_inference_mode_enabled()))
        time.sleep(self.milliseconds / 1e3)
        return self.dropout(x)


X = torch.ones(2, 3)


def test_models_take_turns_and_the_ratio_is_that_of_neighbours():
    dense, pruned = Sleeping(4), Sleeping(2)
    found = compare_latency(dense, pruned, X, engines=["eager"], warmup=2, repeats=11)["eager"]
    assert (len(dense.calls), len(pruned.calls)) == (13, 13)
    assert set(dense.calls) == {(False, True)}
    assert 0.3 < found.ratio < 0.8
    assert found.low <= found.ratio <= found.high
    assert found.dense.median > found.pruned.median >= 2
    assert (found.dense.repeats, found.failure) == (11, "")


def test_calls_are_interleaved_in_alternating_order():
    order = []
    times = time_calls([lambda: order.append("a"), lambda: order.append("b")], warmup=1, repeats=3)
    assert "".join(order) == "baabbaab"
    assert [len(t) for t in times] == [3, 3]
    with pytest.raises(InputError, match="warmup"):
        time_calls([], warmup=-1)


def test_modes_and_threads_are_put_back():
    model, threads = Sleeping(0).train(), torch.get_num_threads()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    measure_engines(model, X, engines=["eager"], threads=2, repeats=1)
    assert set(seen) == {2}
    assert torch.get_num_threads() == threads
    assert model.training
    with pytest.raises(InputError, match="threads"):
        measure_engines(model, X, engines=["eager"], threads=0)


def test_an_engine_that_fails_is_named_with_the_reason_and_the_others_go_on(monkeypatch):
    def broken(model, inputs):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setitem(timing.ENGINES, "compile", broken)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    found = measure_engines(Sleeping(0), X, repeats=2)
    assert list(found) == ["eager", "compile", "onnxruntime"]
    assert found["eager"].latency is not None
    assert found["compile"].latency is None
    assert found["compile"].failure == "RuntimeError: no compiler"
    assert "secateurs[onnx]" in found["onnxruntime"].failure
    both = compare_latency(Sleeping(0), Sleeping(0), X, engines=["compile"])["compile"]
    assert both == Comparison("compile", failure="RuntimeError: no compiler")


class OnlyFive(nn.Module):
    def forward(self, x):
        if x.shape[1] != 5:
            raise ValueError("5 features, please")
        return x


def test_a_model_that_fails_is_reported_too():
    found = compare_latency(Sleeping(0), OnlyFive(), X, engines=["eager"])["eager"]
    assert found.failure == "ValueError: 5 features, please"
    assert found.ratio is None


def test_rows_are_plain():
    found = compare_latency(Sleeping(0), Sleeping(0), X, engines=["eager"], repeats=2)
    [row] = json.loads(json.dumps(latency_rows(found, 0.5)))
    assert (row["engine"], row["promised"]) == ("eager", 0.5)
    assert row["ratio"] > 0
    assert row["dense"]["repeats"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engines": ["onnx"]}, "did you mean 'onnxruntime'"),
        ({"engines": []}, "engines"),
        ({"engines": ["eager"], "repeats": 0}, "repeats"),
        ({"engines": ["eager"], "warmup": -1}, "warmup"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        measure_engines(Sleeping(0), X, **arguments)


class Layers(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(256, hidden), nn.Linear(hidden, 256)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_onnx_runtime_times_a_narrower_model_as_faster():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    inputs = torch.randn(64, 256)
    found = compare_latency(
        Layers(2048), Layers(256), inputs, engines=["onnxruntime"], threads=1, repeats=15
    )["onnxruntime"]
    assert found.failure == ""
    assert found.ratio < 0.6


@pytest.mark.slow
def test_compiled_models_of_one_class_are_each_compiled():
    inputs = torch.randn(32, 256)
    for hidden in (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2):  # more than torch's limit of 8
        found = measure_engines(Layers(hidden), inputs, engines=["compile"], repeats=3, threads=1)
        assert found["compile"].failure == ""
    pruned = compare_latency(Layers(2048), Layers(256), inputs, engines=["compile"], threads=1)
    assert pruned["compile"].ratio < 0.7
