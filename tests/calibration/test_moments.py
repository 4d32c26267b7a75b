"""Moments against brute-force loops over windows, and what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from secateurs.calibration import moments
from secateurs.calibration.moments import (
    Moments,
    collect_moments,
    unfolded,
    weight_from_matrices,
    weight_matrices,
)
from secateurs.errors import InputError


class Conv1D(nn.Module):
    """Like the one of transformers: y = x W + b with W (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def brute_force_vectors(layer: nn.Module, inputs: Tensor) -> list[list[Tensor]]:
    """For each group the windows of a zero-padded convolution, one by one."""
    dims = len(layer.kernel_size)
    pads = [p for p in reversed(layer.padding) for _ in range(2)]
    padded = nn.functional.pad(inputs, pads)
    lengths = [
        (padded.shape[2 + a] - layer.dilation[a] * (layer.kernel_size[a] - 1) - 1)
        // layer.stride[a]
        + 1
        for a in range(dims)
    ]
    share = layer.in_channels // layer.groups
    groups = []
    for group in range(layer.groups):
        vectors = []
        for sample in padded:
            for position in itertools.product(*map(range, lengths)):
                vector = []
                for channel in range(group * share, (group + 1) * share):
                    for offset in itertools.product(*map(range, layer.kernel_size)):
                        place = tuple(
                            p * s + o * d
                            for p, s, o, d in zip(
                                position, layer.stride, offset, layer.dilation, strict=True
                            )
                        )
                        vector.append(sample[(channel, *place)])
                vectors.append(torch.stack(vector))
        groups.append(vectors)
    return groups


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv1d(4, 4, 2, groups=4, dilation=3), (2, 4, 8)),
    (nn.Conv2d(3, 5, (2, 3), padding=(0, 1), stride=(2, 1)), (2, 3, 5, 4)),
    (nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), (2, 4, 5, 6)),
    (nn.Conv2d(4, 8, 1, groups=4), (3, 4, 2, 2)),
    (nn.Conv3d(2, 4, (1, 2, 2), groups=2, padding=(0, 1, 0)), (2, 2, 3, 3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v))
def test_convolutions_agree_with_a_loop_over_windows(layer: nn.Module, shape: tuple[int, ...]):
    inputs = drawn(*shape)
    moment = Moments(layer)
    moment.update(inputs)
    expected = brute_force_vectors(layer, inputs)
    assert moment.rows == len(expected[0])
    assert moment.samples == shape[0]
    assert moment.hessian.shape[0] == layer.groups
    assert moment.hessian.dtype == torch.float64
    for group, vectors in enumerate(expected):
        total = sum(torch.outer(v, v) for v in vectors)
        assert torch.allclose(moment.hessian[group], 2 * total / len(vectors), atol=1e-12)
        assert torch.allclose(moment.mean[group], sum(vectors) / len(vectors), atol=1e-12)


LAYERS = [
    *CONVOLUTIONS,
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2), (2, 4, 6, 5)),
    (nn.Conv2d(4, 6, (4, 2), padding="same"), (2, 4, 6, 5)),
    (nn.Conv1d(4, 6, 3, padding="valid"), (2, 4, 6)),
    (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect"), (2, 2, 6, 5)),
    (nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (2, 2, 6)),
    (nn.Conv3d(2, 3, 2, padding="same", padding_mode="replicate"), (1, 2, 3, 4, 3)),
    (nn.Linear(5, 3), (7, 5)),
    (nn.Linear(5, 3), (2, 3, 4, 5)),
    (nn.Linear(5, 3), (5,)),
    (Conv1D(5, 3), (2, 3, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v))
def test_weights_times_vectors_are_the_output(layer: nn.Module, shape: tuple[int, ...]):
    layer = layer.double()
    inputs = drawn(*shape)
    nn.init.zeros_(layer.bias)
    output = (weight_matrices(layer) @ unfolded(layer, inputs)).flatten(0, 1)
    expected = layer(inputs)
    channels = 1 if hasattr(layer, "kernel_size") else -1
    expected = expected.movedim(channels, 0).reshape(len(output), -1)
    assert torch.allclose(output, expected, atol=1e-12)
    assert torch.equal(weight_from_matrices(layer, weight_matrices(layer)), layer.weight)
    layer.float()


def test_a_sample_without_batch_dimension_counts_as_one():
    for layer, shape in [(nn.Conv2d(3, 2, 2), (3, 4, 4)), (nn.Linear(3, 2), (3,))]:
        single, batch = Moments(layer), Moments(layer)
        single.update(drawn(*shape))
        batch.update(drawn(*shape)[None])
        assert torch.equal(single.hessian, batch.hessian)
        assert single.samples == batch.samples == 1


def test_the_cost_of_a_change_is_the_mean_square_of_the_output():
    inputs, change = drawn(3, 4, 5), drawn(2, 5, seed=1)
    moment = Moments(nn.Linear(5, 2))
    moment.update(inputs)
    moved = (inputs.reshape(-1, 5) @ change.t()).square().sum(1).mean()
    assert torch.allclose((change @ moment.hessian[0] @ change.t()).trace() / 2, moved)
    assert (moment.rows, moment.samples) == (12, 3)


@pytest.mark.parametrize("chunk", [1, 7, 40, 10**6])
@pytest.mark.parametrize(("layer", "shape"), LAYERS[:4] + LAYERS[-3:-2], ids=lambda v: str(v))
def test_batches_and_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, shape: tuple[int, ...], chunk: int
):
    whole, parts = Moments(layer), Moments(layer)
    inputs = drawn(6, *shape[1:])
    whole.update(inputs)
    monkeypatch.setattr(moments, "CHUNK", chunk)
    for part in inputs.split([1, 2, 3]):
        parts.update(part)
    assert (parts.rows, parts.samples) == (whole.rows, whole.samples)
    assert torch.allclose(parts.hessian, whole.hessian, atol=1e-12)
    assert torch.allclose(parts.mean, whole.mean, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_summed_in_float64(dtype: torch.dtype):
    inputs = (100 + drawn(500, 3)).to(dtype)
    moment = Moments(nn.Linear(3, 2))
    moment.update(inputs)
    exact = inputs.double().t() @ inputs.double() * 2 / 500
    assert torch.allclose(moment.hessian[0], exact, rtol=1e-13)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)
    )


def test_collects_what_the_layers_get():
    model, batches = network().double(), [drawn(2, 1, 4, 4, seed=s) for s in range(3)]
    model[3].eval()
    found = collect_moments(model, ["4", "0"], lambda m: [m(x) for x in batches])
    assert list(found) == ["4", "0"]
    hidden = model[0](torch.cat(batches)).relu().flatten(1)
    assert torch.allclose(found["4"].hessian[0], hidden.t() @ hidden * 2 / 6, atol=1e-12)
    assert found["0"].rows == 6 * 4
    assert [m.training for m in model] == [True, True, True, False, True]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_keyword_arguments_repeated_calls_and_the_model_itself():
    layer = nn.Linear(3, 2)
    inputs = drawn(4, 3).float()
    found = collect_moments(layer, [""], lambda m: [m(input=inputs), m(inputs)])
    assert found[""].rows == 8
    assert found[""].name == "Linear"


def test_hooks_and_modes_are_put_back_when_the_run_fails():
    model = network()

    def run(_: nn.Module) -> None:
        raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="own"):
        collect_moments(model, ["0"], run)
    assert model[0].training
    assert not model[0]._forward_pre_hooks


class Padded(nn.Conv2d):
    """Pads by itself, as those of some image models do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


class Tall(nn.Linear):
    """A subclass that multiplies as its base class does."""


@pytest.mark.parametrize(
    "layer",
    [nn.ReLU(), nn.LayerNorm(3), nn.ConvTranspose2d(2, 2, 2), nn.Embedding(3, 2), Padded(2, 2, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_are_refused(layer: nn.Module):
    kind = type(layer).__name__
    with pytest.raises(InputError, match=f"0.*{kind}.*Conv3d"):
        collect_moments(nn.Sequential(layer), ["0"], lambda m: None)
    with pytest.raises(InputError, match=kind):
        weight_matrices(layer)


def test_subclasses_and_parametrised_layers_are_taken():
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    for layer in (Tall(3, 2), parametrised):
        assert Moments(layer).rows == 0


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="names.*'9'"):
        collect_moments(network(), ["9"], lambda m: None)


def test_a_layer_that_saw_nothing_is_named():
    with pytest.raises(InputError, match=r"^4: got a layer that saw no sample"):
        collect_moments(network(), ["4"], lambda m: m[0](torch.zeros(1, 1, 4, 4)))
    with pytest.raises(InputError, match="seen no input"):
        _ = Moments(nn.Linear(2, 2), "fc").hessian


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "Inf")])
def test_inputs_that_are_not_finite_name_the_layer(value: float, kind: str):
    batch = torch.zeros(2, 1, 4, 4)
    batch[1, 0, 2, 2] = value
    with pytest.raises(InputError, match=f"^0: got {kind} in the inputs"):
        collect_moments(network(), ["0"], lambda m: m(batch))


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(())],
    ids=["width", "integers", "scalar"],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Tensor):
    with pytest.raises(InputError, match="layer.*shape"):
        Moments(nn.Linear(4, 2)).update(inputs)
    with pytest.raises(InputError, match="shape"):
        Moments(nn.Conv1d(4, 2, 1)).update(inputs)


def test_matrices_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"matrices.*\(1, 2, 4\)"):
        weight_from_matrices(nn.Linear(4, 2), torch.zeros(2, 4))


def test_the_real_conv1d_of_transformers():
    layers = pytest.importorskip("transformers.pytorch_utils")
    layer = layers.Conv1D(3, 5)
    inputs = drawn(2, 4, 5).float()
    moment = collect_moments(layer, [""], lambda m: m(inputs))[""]
    assert moment.hessian.shape == (1, 5, 5)
    output = weight_matrices(layer)[0] @ unfolded(layer, inputs)[0]
    assert torch.allclose(output.t().reshape(2, 4, 3) + layer.bias, layer(inputs), atol=1e-6)
