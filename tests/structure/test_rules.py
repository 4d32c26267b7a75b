"""Rules of operations, each family in a tiny model: against the oracle and against zeroing.

Zeroing is the brute force of `spa.md`, check 2: in the dense model every slice that belongs to a
removed unit is set to zero, in all parameters and buffers, by the indices that surgery used. It
knows nothing of the graph. It holds where no statistic is taken over a shortened axis.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.structure.dimensions import Axis, plain_axes
from secateurs.structure.rewrite import difference, same_outputs
from secateurs.structure.surgery import Shortened, shorten
from secateurs.structure.trace import Trace, dim_of, named_tensors, trace

EXACT = 1e-10

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Layers by name, and a function of (the model, x) as its forward."""

    def __init__(self, forward: Forward, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def net(forward: Forward, **layers: nn.Module | nn.Parameter) -> Net:
    """A model in float64 whose every parameter and statistic is random."""
    torch.manual_seed(0)
    model = Net(forward, **layers).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += torch.randn_like(buffer)
            elif name.endswith("running_var"):
                buffer *= 1 + torch.rand_like(buffer)
    return model


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def gate(m: Any, x: Tensor) -> Tensor:
    gates = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))
    return x * gates


def split_heads(m: Any, x: Tensor, name: str, heads: int) -> Tensor:
    return getattr(m, name)(x).unflatten(-1, (heads, -1)).transpose(1, 2)


def self_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (split_heads(m, x, name, 3) for name in ("q", "k", "v"))
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def written_out(m: Any, x: Tensor) -> Tensor:
    q, k, v = (split_heads(m, x, name, 3) for name in ("q", "k", "v"))
    weights = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
    return m.o((weights @ v).transpose(1, 2).flatten(2))


def grouped_queries(m: Any, x: Tensor) -> Tensor:
    q, k, v = split_heads(m, x, "q", 4), split_heads(m, x, "k", 2), split_heads(m, x, "v", 2)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return m.o(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x * angles.cos() + turned * angles.sin()


def rotary(m: Any, x: Tensor) -> Tensor:
    half = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1])
    angles = torch.cat((half, half), -1).double()
    q, k, v = (split_heads(m, x, name, 3) for name in ("q", "k", "v"))
    q, k = rotated(q, angles), rotated(k, angles)
    return m.o(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2))


def fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, -1))


def channel_shuffled(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    shuffled = x.view(2, 2, 4, 6, 6).transpose(1, 2).reshape(2, 8, 6, 6)
    left, right = shuffled.chunk(2, 1)
    return m.c(torch.cat((left, F.relu(m.b(right))), 1)).mean((2, 3))


def experts(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    weights = m.router(tokens).softmax(-1)
    hidden = torch.einsum("td,edf->tef", tokens, m.up)
    return torch.einsum("tef,efd,te->td", F.gelu(hidden), m.down, weights)


IMAGE, TOKENS = (2, 3, 6, 6), (2, 5, 12)
ATTENTION = dict.fromkeys("qkvo", (12, 12))


def attention_layers() -> dict[str, nn.Module]:
    return {name: nn.Linear(*sizes) for name, sizes in ATTENTION.items()}


ZEROED: dict[str, tuple[Callable[[], Net], tuple[int, ...]]] = {
    "linear": (
        lambda: net(lambda m, x: m.b(F.gelu(m.a(x))), a=nn.Linear(12, 8), b=nn.Linear(8, 3)),
        TOKENS,
    ),
    "convolution and batch norm": (
        lambda: net(lambda m, x: m.b(F.relu(m.n(m.a(x)))), a=conv(3, 8), n=nn.BatchNorm2d(8),
                    b=conv(8, 4)),
        IMAGE,
    ),
    "grouped convolution": (
        lambda: net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 8),
                    b=conv(8, 12, groups=4), c=conv(12, 2)),
        IMAGE,
    ),
    "transposed convolution": (
        lambda: net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 8),
                    b=nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), c=conv(12, 2)),
        IMAGE,
    ),
    "one-dimensional": (
        lambda: net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Conv1d(5, 8, 3), b=nn.Conv1d(8, 2, 3)),
        TOKENS,
    ),
    "residual": (
        lambda: net(lambda m, x: m.o((y := m.s(x)) + m.b(F.relu(m.a(F.relu(y))))), s=conv(3, 8),
                    a=conv(8, 6), b=conv(6, 8), o=conv(8, 2)),
        IMAGE,
    ),
    "gate": (
        lambda: net(lambda m, x: m.o(gate(m, F.relu(m.s(x)))), s=conv(3, 8), down=conv(8, 4, 1),
                    up=conv(4, 8, 1), o=conv(8, 2)),
        IMAGE,
    ),
    "concatenation": (
        lambda: net(lambda m, x: m.c(F.relu(torch.cat((m.a(x), m.b(x)), 1))), a=conv(3, 3),
                    b=conv(3, 5), c=conv(8, 2)),
        IMAGE,
    ),
    "split": (
        lambda: net(lambda m, x: torch.add(*(f(p) for f, p in zip(
            (m.b, m.c), F.relu(m.a(x)).split((3, 5), 1), strict=True))),
            a=conv(3, 8), b=conv(3, 2), c=conv(5, 2)),
        IMAGE,
    ),
    "slices": (
        lambda: net(lambda m, x: m.b(F.relu((y := m.a(x))[:, :4]) * y[:, 4:]), a=conv(3, 8),
                    b=conv(4, 2)),
        IMAGE,
    ),
    "gated linear unit": (
        lambda: net(lambda m, x: m.b(F.glu(m.a(x), -1)), a=nn.Linear(12, 8), b=nn.Linear(4, 3)),
        TOKENS,
    ),
    "flatten": (
        lambda: net(lambda m, x: m.b(F.relu(m.a(x)).flatten(1)), a=conv(3, 4),
                    b=nn.Linear(4 * 36, 3)),
        IMAGE,
    ),
    "pooling and resizing": (
        lambda: net(lambda m, x: m.b(F.interpolate(F.avg_pool2d(F.max_pool2d(m.a(x), 2), 3, 1, 1),
                                                   scale_factor=2.0, mode="bilinear")),
                    a=conv(3, 8), b=conv(8, 2)),
        IMAGE,
    ),
    "pixel shuffle": (
        lambda: net(lambda m, x: m.b(F.relu(F.pixel_shuffle(m.a(x), 2))), a=conv(3, 16),
                    b=conv(4, 2)),
        IMAGE,
    ),
    "pixel unshuffle": (
        lambda: net(lambda m, x: m.b(F.relu(F.pixel_unshuffle(m.a(x), 2))), a=conv(3, 4),
                    b=conv(16, 2)),
        IMAGE,
    ),
    "unfold": (
        lambda: net(lambda m, x: m.b(F.unfold(F.relu(m.a(x)), 2).transpose(1, 2)), a=conv(3, 4),
                    b=nn.Linear(16, 2)),
        IMAGE,
    ),
    "zeros beside channels": (
        lambda: net(lambda m, x: m.c(F.relu(F.pad(m.a(x), (0, 0, 0, 0, 2, 3)) + m.b(x))),
                    a=conv(3, 3), b=conv(3, 8), c=conv(8, 2)),
        IMAGE,
    ),
    "repeated layer": (
        lambda: net(lambda m, x: m.o(F.relu(m.b(F.relu(m.b(F.relu(m.a(x))))))), a=conv(3, 8),
                    b=conv(8, 8), o=conv(8, 2)),
        IMAGE,
    ),
    "embedding": (
        lambda: net(lambda m, x: m.b(F.relu(m.e((x.abs() * 5).long() % 9))), e=nn.Embedding(9, 8),
                    b=nn.Linear(8, 2)),
        (2, 5),
    ),
    "products": (
        lambda: net(lambda m, x: torch.addmm(m.b.bias, F.relu(m.a(x.flatten(0, 1))), m.b.weight.T),
                    a=nn.Linear(12, 8), b=nn.Linear(8, 3)),
        TOKENS,
    ),
    "prelu": (
        lambda: net(lambda m, x: m.b(m.p(m.a(x))), a=conv(3, 8), p=nn.PReLU(8), b=conv(8, 2)),
        IMAGE,
    ),
    "attention": (lambda: net(written_out, **attention_layers()), TOKENS),
    "grouped queries": (
        lambda: net(grouped_queries, q=nn.Linear(12, 16), k=nn.Linear(12, 8), v=nn.Linear(12, 8),
                    o=nn.Linear(16, 12)),
        TOKENS,
    ),
    "rotary": (lambda: net(rotary, **attention_layers()), TOKENS),
    "recurrent": (
        lambda: net(lambda m, x: m.o(m.l(m.i(x))[0]), i=nn.Linear(12, 6), l=nn.LSTM(
            6, 8, num_layers=2, bidirectional=True, batch_first=True), o=nn.Linear(16, 3)),
        TOKENS,
    ),
    "region without autocast": (
        lambda: net(lambda m, x: m.b(without_autocast(m, F.relu(m.a(x)))), a=nn.Linear(12, 8),
                    b=nn.Linear(4, 3)),
        TOKENS,
    ),
}  # fmt: skip
"""Rule family -> model, input shape: those in which zeroing must give the same."""


def without_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x[..., :4] * x[..., 4:]


NORMALIZED: dict[str, tuple[Callable[[], Net], tuple[int, ...]]] = {
    "layer norm": (
        lambda: net(lambda m, x: m.b(m.n(m.a(x))), a=nn.Linear(12, 8), n=nn.LayerNorm(8),
                    b=nn.Linear(8, 3)),
        TOKENS,
    ),
    "group norm": (
        lambda: net(lambda m, x: m.b(F.relu(m.n(m.a(x)))), a=conv(3, 8), n=nn.GroupNorm(4, 8),
                    b=conv(8, 2)),
        IMAGE,
    ),
    "root mean square norm": (
        lambda: net(lambda m, x: m.b(m.n(m.a(x))), a=nn.Linear(12, 8), n=nn.RMSNorm(8),
                    b=nn.Linear(8, 3)),
        TOKENS,
    ),
    "norm of channels first": (
        lambda: net(lambda m, x: m.b((y := m.a(x)) - y.mean(1, keepdim=True)), a=conv(3, 8),
                    b=conv(8, 2)),
        IMAGE,
    ),
    "softmax over channels": (
        lambda: net(lambda m, x: m.b(m.a(x).softmax(1)), a=conv(3, 8), b=conv(8, 2)), IMAGE,
    ),
    "distances": (
        lambda: net(lambda m, x: torch.cdist(m.a(x), m.b), a=nn.Linear(12, 8),
                    b=nn.Parameter(torch.randn(6, 8))),
        TOKENS,
    ),
    "weight norm": (
        lambda: net(lambda m, x: m.b(F.relu(m.a(x))),
                    a=nn.utils.parametrizations.weight_norm(nn.Linear(12, 8)), b=nn.Linear(8, 3)),
        TOKENS,
    ),
    "experts": (
        lambda: net(experts, router=nn.Linear(12, 4), up=nn.Parameter(torch.randn(4, 12, 8)),
                    down=nn.Parameter(torch.randn(4, 8, 12))),
        TOKENS,
    ),
    "scaled by width": (lambda: net(self_attention, **attention_layers()), TOKENS),
    "fused": (
        lambda: net(fused, qkv=nn.Linear(12, 36), o=nn.Linear(12, 12)), TOKENS,
    ),
    "channel shuffle": (
        lambda: net(channel_shuffled, a=conv(3, 8), b=conv(4, 4), c=conv(8, 2)), IMAGE,
    ),
}  # fmt: skip
"""The same for models in which the oracle alone can tell."""


def free_axes(found: Trace) -> list[Axis]:
    return list(_free(found))


def _free(found: Trace) -> Iterator[Axis]:
    seen = set()
    for dims in found.tensors.values():
        for axis in (a for d in dims for a in plain_axes(d)):
            if axis.frozen is None and axis.size > 1 and axis not in seen:
                seen.add(axis)
                yield axis


def halved(model: Net, shape: tuple[int, ...]) -> tuple[Shortened, Tensor]:
    """Half of every free axis removed, drawn at random, and the input."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = trace(model, x)
    draw = np.random.default_rng(0)
    kept = {a: draw.permutation(a.size)[: a.size // 2] for a in free_axes(found)}
    assert kept, "nothing to shorten"
    return shorten(found, kept), x


@pytest.mark.parametrize("name", [*ZEROED, *NORMALIZED])
def test_a_shortened_model_gives_what_the_oracle_expects(name: str) -> None:
    build, shape = (ZEROED | NORMALIZED)[name]
    shortened, x = halved(build(), shape)
    assert shortened.gap is not None
    assert shortened.gap <= EXACT
    with torch.no_grad():
        assert torch.isfinite(shortened.model(x)).all()


@pytest.mark.parametrize("name", ZEROED)
def test_a_shortened_model_gives_what_zeroing_gives(name: str) -> None:
    build, shape = ZEROED[name]
    model = build()
    dense = copy.deepcopy(model)
    shortened, x = halved(model, shape)
    tensors = named_tensors(dense)
    with torch.no_grad():
        for tensor, places in shortened.tensors.items():
            for place, kept in places.items():
                gone = np.setdiff1d(np.arange(tensors[tensor].shape[place]), kept)
                tensors[tensor].index_fill_(place, torch.from_numpy(gone), 0.0)
        assert difference(shortened.model(x), dense(x)) <= EXACT


def test_nothing_removed_changes_nothing() -> None:
    build, shape = ZEROED["residual"]
    model = build()
    x = torch.randn(shape, dtype=torch.float64)
    before = model(x)
    found = trace(model, x)
    shortened = shorten(found, {a: np.arange(a.size) for a in free_axes(found)})
    assert torch.equal(shortened.model(x), before)


# --- checks 3 to 6 of spa.md ------------------------------------------------------------------


def axis_of(found: Trace, tensor: str, place: int) -> Axis:
    (axis,) = plain_axes(dim_of(found, tensor, place))
    return axis


def test_a_residual_stream_is_one_axis_and_the_inner_width_another() -> None:
    build, shape = ZEROED["residual"]
    found = trace(build(), torch.randn(shape, dtype=torch.float64))
    stream = axis_of(found, "s.weight", 0)
    for tensor, place in (("b.weight", 0), ("b.bias", 0), ("a.weight", 1), ("o.weight", 1)):
        assert axis_of(found, tensor, place) is stream
    assert axis_of(found, "a.weight", 0) is axis_of(found, "b.weight", 1)
    assert axis_of(found, "a.weight", 0) is not stream


def test_concatenation_shifts_indices_by_the_offset() -> None:
    build, shape = ZEROED["concatenation"]
    found = trace(build(), torch.randn(shape, dtype=torch.float64))
    made = shorten(found, {axis_of(found, "b.weight", 0): [0, 1, 3, 4]})
    assert made.tensors["c.weight"] == {1: [0, 1, 2, 3, 4, 6, 7]}
    assert "a.weight" not in made.tensors


def test_flatten_maps_channel_one_to_columns_four_to_seven() -> None:
    model = net(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(3, 4), b=nn.Linear(16, 3))
    found = trace(model, torch.randn(1, 3, 2, 2, dtype=torch.float64))
    made = shorten(found, {axis_of(found, "a.weight", 0): [0, 2, 3]})
    assert made.tensors["b.weight"] == {1: [0, 1, 2, 3, *range(8, 16)]}


def test_depthwise_groups_follow_the_channels() -> None:
    model = net(lambda m, x: m.p(F.relu(m.d(F.relu(m.s(x))))), s=conv(3, 8),
                d=conv(8, 8, groups=8), p=conv(8, 2, 1))  # fmt: skip
    found = trace(model, torch.randn(IMAGE, dtype=torch.float64))
    made = shorten(found, {axis_of(found, "s.weight", 0): [1, 4, 6]})
    assert made.form == "module"
    depthwise = made.model.get_submodule("d")
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels) == (3, 3, 3)


def test_a_key_head_goes_with_its_query_heads() -> None:
    """4 query heads, 2 key heads of width 8: key head 0 takes q rows and o columns 0..15 along."""
    model = net(grouped_queries, q=nn.Linear(12, 32), k=nn.Linear(12, 16), v=nn.Linear(12, 16),
                o=nn.Linear(32, 12))  # fmt: skip
    found = trace(model, torch.randn(TOKENS, dtype=torch.float64))
    heads, width = plain_axes(dim_of(found, "k.weight", 0))
    assert (heads.size, width.size) == (2, 8)
    made = shorten(found, {heads: [1]})
    assert made.tensors["q.weight"] == {0: [*range(16, 32)]}
    assert made.tensors["o.weight"] == {1: [*range(16, 32)]}
    assert made.tensors["v.weight"] == {0: [*range(8, 16)]}
    assert made.gap is not None
    assert made.gap <= EXACT


# --- what is unknown or crosses between parts -------------------------------------------------


def test_an_operation_without_a_rule_freezes_and_is_named() -> None:
    model = net(lambda m, x: m.b(torch.linalg.qr(m.a(x))[0]), a=nn.Linear(12, 5),
                b=nn.Linear(5, 3))  # fmt: skip
    found = trace(model, torch.randn(TOKENS, dtype=torch.float64))
    assert free_axes(found) == []
    assert "linalg_qr" in found.notes.unruled


def test_an_unused_tensor_is_frozen() -> None:
    model = net(lambda m, x: m.b(m.a(x)), a=nn.Linear(12, 8), b=nn.Linear(8, 3),
                auxiliary=nn.Linear(8, 4))  # fmt: skip
    found = trace(model, torch.randn(TOKENS, dtype=torch.float64))
    assert axis_of(found, "auxiliary.weight", 1).frozen == "not used in the traced forward"
    assert len(free_axes(found)) == 1


class Detector(nn.Module):
    """Backbone, a choice that depends on the data, and two heads of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))
        self.scores = nn.Sequential(nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
        self.boxes = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)
        scores = self.scores(features).flatten()
        best = [i for i, score in enumerate(scores.tolist()) if score > 0]
        return [scores, self.boxes(features.flatten(0, 1)[best])]


def test_a_model_that_depends_on_its_data_is_traced_in_parts() -> None:
    torch.manual_seed(0)
    model = Detector().double().eval()
    x = torch.randn(TOKENS, dtype=torch.float64)
    found = trace(model, x)
    assert found.divided
    assert [p.path for p in found.parts] == ["backbone", "scores", "boxes"]
    assert axis_of(found, "backbone.2.weight", 0).frozen == "an output"  # it is indexed outside
    free = free_axes(found)
    assert sorted(a.size for a in free) == [6, 6, 10]
    made = shorten(found, {a: np.arange(0, a.size, 2) for a in free})
    assert made.form == "module"
    assert made.gap is not None
    assert made.gap <= EXACT
    assert model.boxes[0].out_features == 3


def test_the_code_between_parts_chooses_what_it_chose_before() -> None:
    """A shortened part gives other scores, by which other boxes would be chosen."""

    class Counted(Detector):
        def forward(self, x: Tensor) -> list[Tensor]:
            features = self.backbone(x)
            scores = self.scores(features).flatten()
            best = [i for i, score in enumerate(scores.tolist()) if score > 0]
            boxes = self.boxes(features.flatten(0, 1)[best])
            return [scores, boxes.reshape(len(best), 2, 2)]

    for seed in range(4):
        torch.manual_seed(seed)
        model = Counted().double().eval()
        x = torch.randn(TOKENS, dtype=torch.float64)
        with torch.no_grad():
            scores = model.scores(model.backbone(x))
            model.scores[3].bias -= scores.median()
        found = trace(model, x)
        made = shorten(found, {a: np.arange(0, a.size, 2) for a in free_axes(found)})
        assert made.gap is not None
        assert made.gap <= EXACT


def test_a_tensor_that_goes_from_part_to_part_only_is_free() -> None:
    class Chosen(Detector):
        def forward(self, x: Tensor) -> list[Tensor]:
            scores = self.scores(self.backbone(x))
            return [scores[i] for i, s in enumerate(scores.sum((1, 2)).tolist()) if s > 0]

    torch.manual_seed(0)
    model = Chosen().double().eval()
    x = torch.randn(TOKENS, dtype=torch.float64)
    found = trace(model, x)
    passing = axis_of(found, "backbone.2.weight", 0)
    assert passing.frozen is None
    assert passing is axis_of(found, "scores.1.weight", 1)
    dense = copy.deepcopy(model)
    made = shorten(found, {passing: [0, 3, 4]})
    with torch.no_grad():
        dense.backbone[2].weight[[1, 2, 5, 6, 7]] = 0
        dense.backbone[2].bias[[1, 2, 5, 6, 7]] = 0
        assert same_outputs(made.model(x), dense(x), EXACT)
