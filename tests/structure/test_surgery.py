"""Surgery: the user's own module stays a consistent, ordinary module; the graph does as well."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateurs.errors import InputError
from secateurs.structure import surgery
from secateurs.structure.dimensions import Axis, plain_axes, reshape
from secateurs.structure.surgery import Shortened, shorten
from secateurs.structure.trace import Trace, dim_of, named_tensors, trace

EXACT = 1e-10


class Convolutions(nn.Module):
    """Ordinary, depthwise, grouped and transposed convolutions, three norms, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.batch = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.prelu = nn.PReLU(8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.group = nn.GroupNorm(4, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=4)
        self.last = nn.Conv2d(8, 6, 1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.depthwise(torch.relu(self.batch(self.stem(x)))))
        x = torch.relu(self.up(torch.relu(self.group(self.grouped(x)))))
        x = torch.relu(self.last(x)).mean((2, 3))
        return self.head(self.dropout(x))


class Block(nn.Module):
    """A transformer block over 5 tokens; `way` says how queries come about."""

    def __init__(self, width: int = 12, heads: int = 3, way: str = "separate") -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.way = heads, width // heads, way
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if way in ("fused", "fused rotary"):
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        if way == "one norm":
            self.q_norm = self.k_norm = nn.LayerNorm(width // heads)
        if way == "normed":
            self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.out = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 16), nn.Linear(16, width)
        angles = torch.outer(torch.arange(5.0), 0.5 ** torch.arange(self.head_dim // 2))
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def rotated(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos + turned * self.sin

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = self.norm1(x)
        if "fused" in self.way:
            qkv = self.qkv(y).reshape(n, t, 3, self.num_heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                layer(y).view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
                for layer in (self.q, self.q if self.way == "query is key" else self.k, self.v)
            )
        if "rotary" in self.way:
            q, k = self.rotated(q), self.rotated(k)
        if "norm" in self.way:
            q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v)
        if self.way == "query goes on":
            y = y + q
        x = x + self.out(y.transpose(1, 2).reshape(n, t, -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Language(nn.Module):
    """Two blocks, a tied head; the LSTM in between is used for both."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.blocks = nn.ModuleList([Block(**options), Block(**options)])
        self.lstm = nn.LSTM(12, 7, batch_first=True)
        self.back = nn.Linear(7, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
            x = x + self.back(self.lstm(x)[0])
        return self.head(self.norm(x))


class HardCoded(nn.Module):
    """Sizes in the code: only the graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.norm = nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(2, 5, 3, 4) for layer in (self.q, self.k, self.v))
        y = torch.einsum("nqhd,nkhd->nhqk", q, k).softmax(-1)
        y = torch.einsum("nhqk,nkhd->nqhd", y, v).reshape(2, 5, 12)
        y = self.norm(y.transpose(1, 2)).transpose(1, 2)
        return self.head(self.dropout(torch.relu(y)).mean(1))


def made(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            if tensor.is_floating_point() and not name.endswith(("cos", "sin")):
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + drawn.abs() if "var" in name else 0.4 * drawn)
    return model.double().eval()


def example(model: nn.Module, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, Language):
        return torch.randint(0, 13, (2, 5), generator=generator)
    shape = (2, 3, 6, 6) if isinstance(model, Convolutions) else (2, 5, 12)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def free_axes(found: Trace) -> list[Axis]:
    axes = {a.number: a for dims in found.tensors.values() for d in dims for a in plain_axes(d)}
    return [axes[n] for n in sorted(axes) if axes[n].frozen is None and axes[n].size > 1]


def half(axes: list[Axis], seed: int = 0) -> dict[Axis, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {a: np.sort(rng.permutation(a.size)[: a.size // 2]) for a in axes}


def halved(model: nn.Module) -> Shortened:
    found = trace(model, example(model))
    done = shorten(found, half(free_axes(found)))
    assert done.gap is not None
    assert done.gap <= EXACT
    return done


def only(found: Trace, tensor: str, place: int, which: int = 0) -> Axis:
    """One plain axis of a dimension of a tensor."""
    return list(plain_axes(dim_of(found, tensor, place)))[which]


MODELS: list[Callable[[], nn.Module]] = [
    Convolutions, Language, lambda: Language(way="fused"), lambda: Block(way="fused rotary"),
]  # fmt: skip


# --- the user's own module --------------------------------------------------------------------


@pytest.fixture(params=MODELS, ids=["convolutions", "language", "language fused", "block"])
def dense(request: pytest.FixtureRequest) -> nn.Module:
    return made(request.param())


def test_the_module_and_its_parameters_stay_the_same_objects(dense: nn.Module) -> None:
    before = named_tensors(dense)
    modules = dict(dense.named_modules())
    count = sum(p.numel() for p in dense.parameters())
    done = halved(dense)
    assert (done.form, done.model) == ("module", dense)
    assert dict(dense.named_modules()) == modules
    after = named_tensors(dense)
    assert list(after) == list(before)
    assert all(after[n] is before[n] for n in before)
    assert all(p.requires_grad and p.is_contiguous() for p in dense.parameters())
    assert sum(p.numel() for p in dense.parameters()) < 0.75 * count
    assert {n: list(t.shape) for n, t in after.items()} == {
        n: list(t.shape) for n, t in dense.state_dict(keep_vars=True).items()
    }


def test_attributes_agree_with_tensors() -> None:
    model = made(Convolutions())
    assert halved(model).form == "module"
    for layer in (model.stem, model.depthwise, model.grouped, model.last):
        assert layer.weight.shape[0] == layer.out_channels
        assert layer.weight.shape[1] * layer.groups == layer.in_channels
    assert model.up.weight.shape[0] == model.up.in_channels
    assert model.up.weight.shape[1] * model.up.groups == model.up.out_channels
    assert model.stem.out_channels == model.depthwise.groups == model.batch.num_features == 2
    assert model.prelu.num_parameters == model.depthwise.out_channels
    assert model.group.num_channels == model.grouped.out_channels
    assert model.group.num_groups == model.grouped.groups == model.up.groups == 2
    assert model.last.out_channels == model.head.in_features == 3
    assert model.head.out_features == 5
    rebuilt = nn.ConvTranspose2d(
        model.up.in_channels, model.up.out_channels, 2, stride=2, groups=model.up.groups
    )
    assert rebuilt.weight.shape == model.up.weight.shape


@pytest.mark.parametrize("way", ["separate", "fused"])
def test_attributes_of_a_language_model(way: str) -> None:
    model = made(Language(way=way))
    assert halved(model).form == "module"
    assert model.head.weight is model.embedding.weight
    assert model.embedding.embedding_dim == model.norm.normalized_shape[0] == 6
    assert (model.head.in_features, model.head.out_features) == (6, 13)
    assert (model.lstm.input_size, model.lstm.hidden_size, model.back.in_features) == (6, 3, 3)
    for block in model.blocks:
        assert (block.num_heads, block.head_dim) == (1, 2)
        assert block.fc1.out_features == block.fc2.in_features == 8
        assert block.norm1.normalized_shape == (6,)
        assert block.out.in_features == 2


def test_it_can_be_trained(dense: nn.Module) -> None:
    x = example(dense)
    dense(x).sum().backward()
    model = halved(dense).model
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    sliced = [p for p in model.parameters() if p.grad is None]
    assert sliced
    assert falls(model, x)


def falls(model: nn.Module, x: Tensor) -> bool:
    """Whether a few small steps lower a loss."""
    with torch.no_grad():
        wanted = model(x) + 1

    def loss() -> Tensor:
        return F.mse_loss(model(x), wanted)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = loss().item()
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
    return loss().item() < before


def test_it_can_be_copied_moved_saved_and_exported(dense: nn.Module) -> None:
    model, x = halved(dense).model, example(dense)
    with torch.no_grad():
        wanted = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), wanted)
        twin.load_state_dict(model.state_dict())
        exported = torch.export.export(model, (x,), strict=False).module()
        assert torch.allclose(exported(x), wanted, rtol=1e-12)
        traced = torch.jit.trace(model, (x,), check_trace=False)
        assert torch.allclose(traced(x), wanted, rtol=1e-12)
        low = twin.to(torch.float16)
        assert torch.allclose(low.float()(x.float() if x.is_floating_point() else x).double(),
                              wanted, atol=0.05 * wanted.abs().max().item())  # fmt: skip
        meta = copy.deepcopy(model).to("meta")
        assert meta(x.to("meta")).shape == wanted.shape


def test_it_can_be_scripted_where_the_dense_one_could() -> None:
    model = made(Convolutions())
    torch.jit.script(copy.deepcopy(model))
    model, x = halved(model).model, example(model)
    with torch.no_grad():
        assert torch.allclose(torch.jit.script(model)(x), model(x), rtol=1e-12)


def test_other_batches_and_lengths_still_run() -> None:
    model = halved(made(Language())).model
    assert model(torch.zeros(3, 9, dtype=torch.long)).shape == (3, 9, 13)


def test_train_mode_is_what_it_was() -> None:
    model = made(Convolutions())
    model.train()
    model.batch.eval()
    halved(model)
    assert model.training
    assert model.dropout.training
    assert not model.batch.training


class Twice(nn.Module):
    """A block under two names, called by the second one, and a convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.last = self.blocks[-1]
        self.one = nn.Conv1d(12, 12, 1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.last(x)).transpose(1, 2)
        return self.one(torch.relu(self.one(x))).mean(1)


def test_a_module_used_twice_under_another_name() -> None:
    model = made(Twice())
    done = halved(model)
    assert done.form == "module"
    assert model.blocks[0] is model.last
    assert (model.last.num_heads, model.last.head_dim) == (1, 2)
    assert model.one.weight.shape[0] == model.one.out_channels
    assert model.one.weight.shape[1] * model.one.groups == model.one.in_channels


def test_norms_without_parameters_follow() -> None:
    model = made(
        nn.Sequential(
            nn.Conv1d(12, 8, 1),
            nn.InstanceNorm1d(8),
            nn.Conv1d(8, 6, 1),
            nn.GroupNorm(1, 6, affine=False),
            nn.BatchNorm1d(6, affine=False),
            nn.Conv1d(6, 8, 1),
            nn.Flatten(),
            nn.Linear(40, 10),
            nn.LayerNorm(10, elementwise_affine=False),
            nn.Linear(10, 3),
        )
    )
    found = trace(model, example(model).mT)
    done = shorten(found, half(free_axes(found)))
    assert (done.form, done.gap is not None and done.gap <= EXACT) == ("module", True)
    assert model[1].num_features == model[2].in_channels == 4
    assert model[3].num_channels == model[4].num_features == model[5].in_channels == 3
    assert model[8].normalized_shape == (5,)


# --- the scale of attention -------------------------------------------------------------------


WAYS = [
    "separate",
    "fused",
    "rotary",
    "fused rotary",
    "normed",
    "one norm",
    "query is key",
    "query goes on",
]


@pytest.mark.parametrize("way", WAYS)
def test_the_scale_is_kept_when_heads_get_narrower(way: str) -> None:
    """By hand: attention of the dense module, without some units of every head."""
    model = made(Block(way=way))
    plain = copy.deepcopy(model)
    x, other = example(model), example(model, seed=2)
    found = trace(model, x)
    widths = narrow(found)
    done = shorten(found, half(widths, seed=3))
    assert done.gap is not None
    assert done.gap <= EXACT
    if "norm" in way:
        return
    with torch.no_grad():
        for name, places in done.tensors.items():
            tensor = named_tensors(plain)[name]
            for place, kept in places.items():
                gone = sorted(set(range(tensor.shape[place])) - set(kept))
                tensor.index_fill_(place, torch.tensor(gone), 0.0)
        assert torch.allclose(done.model(other), plain(other), rtol=1e-10, atol=1e-12)


def narrow(found: Trace) -> list[Axis]:
    """Axes that the width of a head is made of."""
    (_, width), *_ = found.notes.scales
    values = [a for n in ("v.weight", "qkv.weight") if n in found.tensors
              for a in plain_axes(dim_of(found, n, 0)) if a.size in (2, 4)]  # fmt: skip
    return [a for a in dict.fromkeys([*plain_axes(width), *values]) if a.frozen is None]


@pytest.mark.parametrize("way", ["separate", "fused", "rotary", "fused rotary"])
def test_scales_are_folded_into_the_queries(way: str) -> None:
    model = made(Block(way=way))
    before = {n: t.clone() for n, t in named_tensors(model).items()}
    done = shorten_widths(model)
    assert done.form == "module"
    changed = set()
    for name, tensor in named_tensors(model).items():
        old = before[name]
        for place, kept in done.tensors.get(name, {}).items():
            old = old.index_select(place, torch.tensor(kept))
        if not torch.equal(tensor, old):
            changed.add(name)
            rows = slice(0, tensor.shape[0] // 3) if "fused" in way else slice(None)
            assert torch.allclose(tensor[rows], old[rows] * math.sqrt(2 / 4))
            assert torch.equal(tensor[rows.stop :], old[rows.stop :]) or "fused" not in way
    layer = "qkv" if "fused" in way else "q"
    assert changed == {f"{layer}.weight", f"{layer}.bias"}


def shorten_widths(model: nn.Module) -> Shortened:
    found = trace(model, example(model))
    return shorten(found, half(narrow(found)))


# --- the graph --------------------------------------------------------------------------------


def test_hard_coded_sizes_give_a_graph() -> None:
    model = made(HardCoded())
    done = halved(model)
    assert done.form == "graph"
    assert any("handed back as a graph" in note for note in done.notes)
    x = example(model)
    with torch.no_grad():
        wanted = done.model(x)
        assert torch.equal(copy.deepcopy(done.model)(x), wanted)
        low = copy.deepcopy(done.model).float()(x.float()).double()
        assert torch.allclose(low, wanted, atol=1e-4)
        assert torch.allclose(
            torch.export.export(done.model, (x,), strict=False).module()(x), wanted, rtol=1e-12
        )
    assert falls(done.model, x)


def test_the_graph_keeps_names_of_parameters() -> None:
    model = made(HardCoded())
    names = [n for n, _ in model.named_parameters()]
    done = halved(model)
    assert sorted(n for n, _ in done.model.named_parameters()) == sorted(names)
    assert "norm.running_var" in done.model.state_dict()


def test_the_graph_follows_train_and_eval() -> None:
    model = made(HardCoded())
    model.train()
    done = halved(model)
    graph, x = done.model, example(model)
    assert graph.training
    # dropout: that so few units come out alike ten times would be a wonder
    assert any(not torch.equal(graph(x), graph(x)) for _ in range(10))
    before = graph.norm.running_mean.clone()
    graph(x)
    assert not torch.equal(graph.norm.running_mean, before)
    graph.eval()
    before = graph.norm.running_mean.clone()
    with torch.no_grad():
        first = graph(x)
        assert torch.equal(first, graph(x))
    assert torch.equal(graph.norm.running_mean, before)
    twin = copy.deepcopy(graph).train()
    assert any(not torch.equal(twin(x), twin(x)) for _ in range(10))
    assert torch.equal(graph(x), first)


def test_a_tied_weight_is_one_weight_in_the_graph() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(13, 12), nn.Linear(12, 13)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = torch.relu(self.embedding(tokens)).view(2, 5, 3, 4)
            return self.head(x.transpose(2, 3).reshape(2, 5, 4, 3).mT.reshape(2, 5, 12))

    model = made(Tied())
    found = trace(model, torch.randint(0, 13, (2, 5)))
    done = shorten(found, half(free_axes(found)))
    assert (done.form, done.gap is not None and done.gap <= EXACT) == ("graph", True)
    assert len(list(done.model.parameters())) == 2
    done.model(torch.randint(0, 13, (2, 5))).sum().backward()
    twin = copy.deepcopy(done.model)
    assert len({id(p) for p in twin.parameters()}) == 2


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([], r"kept: got \[\]; accepted: at least one index in 0..15"),
        ([0, 16], r"kept: got \[0, 16\]; accepted: at least one index in 0..15"),
        ([-1, 3], r"at least one index in 0..15"),
        ([*range(15), 99], r"at least one index in 0..15"),
        ([True] * 8 + [False] * 8, "got bool values; accepted: indices of units"),
        ([0.5, 2.0], "got float64 values; accepted: indices of units"),
    ],
)
def test_units_that_an_axis_does_not_have_are_refused(units: list[Any], message: str) -> None:
    model = made(Block())
    found = trace(model, example(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        shorten(found, {only(found, "fc1.weight", 0): units})
    assert_unchanged(model, before)


def test_frozen_and_composed_axes_are_refused() -> None:
    model = made(Block())
    found = trace(model, example(model))
    vocabulary = Axis(6, "a vocabulary")
    with pytest.raises(InputError, match=r"got a frozen axis \(a vocabulary\)"):
        shorten(found, {vocabulary: [0, 1]})
    width = Axis(12)
    reshape([(width,)], [3, 4])
    with pytest.raises(InputError, match="got 3 ⊗ 4; accepted: plain axes"):
        shorten(found, {width: [0, 1]})


def test_all_units_of_an_axis_change_nothing() -> None:
    model = made(Block())
    found = trace(model, example(model))
    before = copy.deepcopy(model.state_dict())
    done = shorten(found, {only(found, "fc1.weight", 0): np.arange(16)})
    assert (done.form, done.tensors, done.edits) == ("module", {}, {})
    assert_unchanged(model, before)


@pytest.mark.parametrize("where", ["_fold_scales", "rewritten", "_resize"])
def test_an_error_leaves_the_model_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Block())
    found = trace(model, example(model))
    before = copy.deepcopy(model.state_dict())
    model(example(model)).sum().backward()

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(surgery, where, broken)
    with pytest.raises(RuntimeError, match="broken"):
        shorten(found, half(free_axes(found)))
    assert_unchanged(model, before)
    assert all(p.grad is not None for n, p in model.named_parameters() if "k.bias" not in n)


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    with torch.no_grad():
        model(example(model))
