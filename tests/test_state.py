"""Trees on disk: whole or not at all, and the same when they come back."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from secateurs.errors import InputError
from secateurs.state import (
    flatten,
    load_tree,
    model_state,
    read_tensors,
    save_tree,
    unflatten,
    write_json,
    write_tensors,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = draw(
        st.lists(st.integers(0, 100), min_size=math.prod(shape), max_size=math.prod(shape))
    )
    return torch.tensor(values).reshape(shape).to(draw(st.sampled_from(DTYPES)))


names = st.text(max_size=5) | st.sampled_from(["__tensor__", "__tuple__", "__pairs__"])
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names | tensors()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(names, inner, max_size=3)
        | st.dictionaries(st.integers() | names, inner, max_size=3)
        | st.dictionaries(st.tuples(st.integers(), st.integers()), inner, max_size=2)
    ),
    max_leaves=12,
)


def same(one, two):
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        pairs = zip(one, two, strict=False)
        return type(one) is type(two) and len(one) == len(two) and all(same(a, b) for a, b in pairs)
    return type(one) is type(two) and one == two


@given(trees)
def test_a_tree_is_put_together_as_it_was(tree):
    taken, skeleton = flatten(tree)
    assert same(tree, unflatten(taken, json.loads(json.dumps(skeleton))))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees)
def test_a_tree_comes_back_from_disk(tmp_path: Path, tree):
    save_tree(tmp_path / "tree", tree)
    assert same(tree, load_tree(tmp_path / "tree"))


def test_the_states_of_optimizers_come_back(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_tree(tmp_path / "adam", optimizer.state_dict())
    read = load_tree(tmp_path / "adam")
    assert same(optimizer.state_dict(), read)
    torch.optim.Adam(model.parameters(), amsgrad=True).load_state_dict(read)


def test_tensors_that_share_memory_are_written_once_each(tmp_path):
    whole = torch.arange(6.0)
    views = {
        "whole": whole,
        "same": whole,
        "tail": whole[1:],
        "head": whole[:4],
        "flat": whole[::2],
    }
    write_tensors(tmp_path / "views", views, {})
    read, _ = read_tensors(tmp_path / "views")
    assert same(dict(sorted(views.items())), dict(sorted(read.items())))


def test_a_model_state_shares_no_memory():
    model = nn.Linear(2, 2)
    state = model_state(model)
    before = state["weight"].clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(state["weight"], before)


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
    save_tree(tmp_path / "whole", {"a": torch.ones(5), "b": [1, 2]})
    data = (tmp_path / "whole").read_bytes()
    for length in range(len(data)):
        cut = tmp_path / "cut"
        cut.write_bytes(data[:length])
        with pytest.raises(InputError, match="a whole safetensors file"):
            load_tree(cut)


def test_what_is_not_a_tree_is_refused(tmp_path):
    with pytest.raises(InputError, match="an existing safetensors file"):
        load_tree(tmp_path / "missing")
    write_tensors(tmp_path / "bare", {"a": torch.ones(1)}, {})
    with pytest.raises(InputError, match="a state of secateurs"):
        load_tree(tmp_path / "bare")
    with pytest.raises(InputError, match="got set"):
        save_tree(tmp_path / "set", {"a": {1, 2}})
    assert not (tmp_path / "set").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_tree(tmp_path / "tree", {"a": 1})

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tree(tmp_path / "tree", {"a": 2})
    monkeypatch.undo()
    assert load_tree(tmp_path / "tree") == {"a": 1}


def test_json_takes_single_numbers_out_of_tensors_and_refuses_the_rest(tmp_path):
    write_json(tmp_path / "x.json", {"a": torch.tensor(1.5), "b": Path("p")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1.5, "b": "p"}
    with pytest.raises(TypeError, match="set has no JSON form"):
        write_json(tmp_path / "x.json", {1, 2})
