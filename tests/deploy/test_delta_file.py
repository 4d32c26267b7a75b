"""Sparse deltas: merged back to the bit, as small as they can be, refused over another base."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.deploy.delta_file import (
    DELTA,
    Entries,
    SparseDelta,
    base_hash,
    load_delta,
    merge,
    save_delta,
    shared_seeds,
)
from secateurs.errors import InputError
from secateurs.parts.deltas import same_bits
from secateurs.state import read_tensors, write_tensors

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def drawn(seed, *shape, dtype=torch.float32, wild=False):
    """Numbers of one size, or of all sizes that the dtype has, zeros of both signs included."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    if wild:
        scale = math.log10(torch.finfo(dtype).max) * 0.9
        powers = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale
        numbers = numbers.sign() * 10.0**powers
        numbers[torch.rand(shape, generator=generator) < 0.1] = 0.0
        numbers[torch.rand(shape, generator=generator) < 0.1] = -0.0
    return numbers.to(dtype)


def between(base, tuned, mask, exactly=True):
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    values = (tuned.to(wide) - base.to(wide))[mask]
    return Entries.of(base, mask, values, tuned.dtype, tuned[mask] if exactly else None)


def delta_of(base, entries, **fields):
    return SparseDelta(base_hash(base), entries, **fields)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert same_bits(tensor, two[name]), name


@pytest.fixture
def base():
    return {
        "a.weight": drawn(0, 6, 5),
        "a.bias": drawn(1, 6),
        "scale": drawn(2),
        "count": torch.tensor(3),
    }


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    wild=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_kept_entries_are_the_fine_tuned_ones_to_the_bit(
    tmp_path_factory, shape, dtype, density, wild, seed
):
    base = {"w": drawn(seed, *shape, dtype=dtype, wild=wild)}
    tuned = drawn(seed + 1, *shape, dtype=dtype, wild=wild)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    delta = delta_of(base, {"w": between(base["w"], tuned, mask)})
    path = save_delta(tmp_path_factory.mktemp("delta") / "d.safetensors", delta)
    read = load_delta(path)
    assert path.stat().st_size == delta.file_bytes == read.file_bytes
    assert (read.kept, read.total) == (int(mask.sum()), mask.numel())
    merged = merge(base, read)["w"]
    assert same_bits(merged, torch.where(mask, tuned, base["w"]))


@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES), count=st.integers(2, 4))
@settings(max_examples=50, deadline=None)
def test_several_deltas_are_summed_and_rounded_once(seed, dtype, count):
    base = {"w": drawn(seed, 4, 5, dtype=dtype)}
    deltas, total = [], base["w"].double().clone()
    for number in range(count):
        mask = drawn(seed + 10 * number, 4, 5) > 0.3
        values = drawn(seed + 10 * number + 1, int(mask.sum())) * 0.01
        deltas.append(delta_of(base, {"w": Entries.of(base["w"], mask, values, dtype)}))
        total[mask] += values.double()
    merged = merge(base, deltas)["w"]
    assert merged.dtype == dtype
    assert torch.equal(merged, total.to(dtype))


def test_a_sum_that_misses_is_corrected_and_only_then():
    base = torch.tensor([0.5, 0.5, 1.0])
    tuned = torch.tensor([1e-9, 0.25, 1.5])
    entries = between(base, tuned, torch.ones(3, dtype=torch.bool))
    assert entries.missed.tolist() == [True, False, False]
    assert same_bits(entries.on(base), tuned)
    plain = between(base, tuned, torch.ones(3, dtype=torch.bool), exactly=False)
    assert plain.on(base).tolist() == [0.0, 0.25, 1.5]
    assert entries.difference(base).tolist() == [float(tuned[0]) - 0.5, -0.25, 0.5]


def test_half_precision_is_added_in_float32():
    base = torch.full((1,), 1024.0, dtype=torch.float16)
    entries = Entries.of(base, torch.ones(1, dtype=torch.bool), torch.tensor([0.75]), base.dtype)
    assert entries.on(base).item() == 1025.0
    small = Entries.of(
        torch.zeros(1, dtype=torch.float16), torch.ones(1, dtype=torch.bool),
        torch.tensor([3e-8]), torch.float16,
    )  # fmt: skip
    assert small.values.item() == pytest.approx(3e-8), "the difference underflowed"


@pytest.mark.parametrize(("kept", "form"), [(1, "indices"), (3, "indices"), (5, "bits")])
def test_places_are_kept_in_the_smaller_form(base, tmp_path, kept, form):
    weight = drawn(3, 128)  # 16 bytes as bits, 4 an index
    mask = torch.zeros(128, dtype=torch.bool)
    mask[torch.arange(kept) * 25] = True
    entries = Entries.of(weight, mask, drawn(4, kept), weight.dtype)
    path = save_delta(tmp_path / DELTA, delta_of({"w": weight}, {"w": entries}))
    tensors, metadata = read_tensors(path)
    assert json.loads(metadata["delta"])["tensors"]["w"]["places"] == form
    places = tensors["places/w"]
    assert places.numel() * places.element_size() == min(16, 4 * kept)
    assert torch.equal(load_delta(path).entries["w"].mask, mask)


def test_everything_about_a_delta_comes_back(base, tmp_path):
    entries = between(base["a.weight"], drawn(8, 6, 5), drawn(9, 6, 5) > 0)
    delta = delta_of(
        base, {"a.weight": entries}, whole={"a.bias": drawn(5, 6)},
        rows={"a.weight": drawn(6, 2, 5)}, tied={"b.weight": "a.weight"}, method="darex",
        options={"q": "output", "exclude": ["head"]}, seed=7, p=0.9, q={"a.weight": 0.25},
    )  # fmt: skip
    read = load_delta(save_delta(tmp_path / "new" / DELTA, delta))
    assert load_delta(tmp_path / "new").base == delta.base == base_hash(base)
    for name in ("tied", "method", "options", "seed", "p", "q"):
        assert getattr(read, name) == getattr(delta, name)
    assert_same(merge(base, read), merge(base, delta))
    assert [p.name for p in (tmp_path / "new").iterdir()] == [DELTA], "no partial file is left"


def test_rows_whole_tensors_and_tied_names(base):
    entries = between(base["a.weight"], drawn(8, 6, 5), torch.ones(6, 5, dtype=torch.bool))
    delta = delta_of(
        base, {"a.weight": entries}, whole={"count": torch.tensor(9), "new": drawn(3, 2)},
        rows={"a.weight": drawn(6, 2, 5)}, tied={"b.weight": "a.weight"},
    )  # fmt: skip
    merged = merge(base, [delta])
    assert same_bits(merged["a.weight"], torch.cat([drawn(8, 6, 5), drawn(6, 2, 5)]))
    assert same_bits(merged["b.weight"], merged["a.weight"])
    assert merged["count"].item() == 9
    assert same_bits(merged["new"], drawn(3, 2))
    assert same_bits(merged["scale"], base["scale"])
    assert merged["scale"] is not base["scale"]


def test_a_delta_over_another_base_is_refused_by_both_hashes(base):
    delta = delta_of(base, {})
    other = {**base, "scale": base["scale"] + 1}
    message = f"over the base {base_hash(base)[:12]}; .* this base, {base_hash(other)[:12]}"
    with pytest.raises(InputError, match=message):
        merge(other, delta)
    with pytest.raises(InputError, match="at least one delta"):
        merge(base, [])


def test_the_hash_is_of_names_dtypes_shapes_and_bytes(base):
    own = base_hash(base)
    assert base_hash(dict(reversed(base.items()))) == own
    changed = [
        {**base, "a.bias": -base["a.bias"]},
        {**base, "a.weight": base["a.weight"].view(5, 6)},
        {**base, "count": base["count"].int()},
        {("b" if n == "scale" else n): t for n, t in base.items()},
        {n: t for n, t in base.items() if n != "count"},
    ]
    assert len({own, *map(base_hash, changed)}) == 1 + len(changed)
    assert base_hash({"w": drawn(0, 4, dtype=torch.bfloat16)})


def test_whole_tensors_of_several_deltas_count_as_differences(base):
    heads = [drawn(n, 6) for n in (20, 21)]
    merged = merge(base, [delta_of(base, {}, whole={"a.bias": head}) for head in heads])
    expected = sum(h.double() for h in heads) - base["a.bias"].double()
    assert torch.allclose(merged["a.bias"].double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        ("whole", "count", (torch.tensor(4), torch.tensor(5))),
        ("whole", "new", (torch.ones(2), torch.zeros(2))),
        ("rows", "a.weight", (torch.ones(1, 5), torch.zeros(1, 5))),
    ],
)
def test_deltas_that_cannot_be_summed_must_agree(base, kind, name, values):
    one, two = (delta_of(base, {}, **{kind: {name: value}}) for value in values)
    with pytest.raises(InputError, match=f"several that replace '{name}' or add rows"):
        merge(base, [one, two])
    assert name in merge(base, [one, one])


def test_random_deltas_of_one_seed_are_told(base):
    one = delta_of(base, {}, options={"criterion": "random"}, seed=1)
    assert shared_seeds([one, one]) == [1]
    assert shared_seeds([one, replace(one, seed=2)]) == []
    assert shared_seeds([replace(one, options={"criterion": "magnitude"})] * 2) == []


@pytest.fixture
def stored(base, tmp_path):
    mask = drawn(9, 6, 5) > 0
    delta = delta_of(base, {"a.weight": between(base["a.weight"], drawn(8, 6, 5), mask)})
    return save_delta(tmp_path / DELTA, delta)


def test_files_that_are_no_deltas_are_refused(stored, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_delta(tmp_path / "nowhere")
    with pytest.raises(InputError, match=f"a folder with {DELTA}"):
        load_delta(stored.parent.parent / stored.parent.name / "..")
    write_tensors(tmp_path / "plain.safetensors", {"w": torch.zeros(2)}, {})
    with pytest.raises(InputError, match=r"plain\.safetensors.*as secateurs.save writes it"):
        load_delta(tmp_path / "plain.safetensors")
    stored.write_bytes(stored.read_bytes()[:-3])
    with pytest.raises(InputError, match="whole safetensors"):
        load_delta(stored)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("values/a.weight", torch.zeros(1), "1 values for .* places"),
        ("places/a.weight", torch.zeros(1, dtype=torch.uint8), "1 bytes"),
        ("values/a.weight", None, "a whole delta"),
    ],
)
def test_deltas_that_do_not_fit_themselves_are_refused(stored, key, value, message):
    tensors, metadata = read_tensors(stored)
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    write_tensors(stored, tensors, metadata)
    with pytest.raises(InputError, match=message):
        load_delta(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 9}, "format 9"), ({"base": None, "q": None}, "whole"), ({"tensors": 3}, "whole")],
)
def test_headers_of_others_are_refused(stored, change, message):
    tensors, metadata = read_tensors(stored)
    header = {**json.loads(metadata["delta"]), **change}
    header = {k: v for k, v in header.items() if v is not None}
    write_tensors(stored, tensors, {"delta": json.dumps(header)})
    with pytest.raises(InputError, match=message):
        load_delta(stored)
