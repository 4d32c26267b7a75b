"""What goes along with a row comes out as it went in, and shards agree on its kind at the door."""

from decimal import Decimal

import numpy as np
import pytest
import torch

import secateurs as sc
from secateurs.errors import InputError
from secateurs.selection.columns import carried, numbers, one_kind, plain
from secateurs.selection.files import Names, open_files
from secateurs.selection.result import Selection, read_selection
from secateurs.selection.sources import as_embeddings, from_arrays

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = 40
VECTORS = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
LARGE = 2**60 + 1


def table(rows=slice(None), **columns):
    flat = pa.array(np.ascontiguousarray(VECTORS[rows]).reshape(-1))
    return pa.table({"embedding": pa.FixedSizeListArray.from_arrays(flat, 4), **columns})


def written(source, folder, **how):
    """The table that a selection of every other row is written as, and the selection."""
    kept = np.split(np.arange(source.rows) % 2 == 0, source.offsets[1:-1])
    scores = [np.arange(shard.rows) for shard in source.shards]
    made = Selection.of(source, kept, scores)
    return pq.read_table(made.write(folder / "out.parquet", **how)), made


RICH = {
    "caption": pa.array([None, "a"] * 20),
    "big": pa.array([None] + [LARGE] * 39),
    "when": pa.array(np.arange(ROWS).astype("datetime64[us]")),
    "raw": pa.array([b"\xff\x00", None] * 20),
    "price": pa.array([Decimal("1.25")] * ROWS),
    "meta": pa.array([{"a": 1, "b": None}] * ROWS),
    "tags": pa.array([["x", "y"], None] * 20),
    "boxes": pa.array([[[1.0, 2.0]], []] * 20),
    "kind": pa.array(["u", "v", None, "u"] * 10).dictionary_encode(),
    "half": pa.array(np.arange(ROWS).astype(np.float16)),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "mapping"])
def test_columns_of_every_kind_come_out_as_they_went_in(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("secateurs.selection.result.BLOCK_ROWS", 7)
    if kind == "mapping":
        source = as_embeddings({"embeddings": VECTORS, **RICH})
    elif kind == "parquet":
        pq.write_table(table(**RICH), tmp_path / "in.parquet", row_group_size=15)
        source = open_files(tmp_path / "in.parquet", rows=10)
    else:
        with pa.ipc.new_file(str(tmp_path / "in.arrow"), table(**RICH).schema) as writer:
            writer.write_table(table(**RICH), max_chunksize=15)
        source = open_files(tmp_path / "in.arrow", rows=10)
    made, _ = written(source, tmp_path)
    for name, values in RICH.items():
        assert made[name].to_pylist() == values.to_pylist(), name
        assert made[name].type == values.type, name
    back = read_selection(tmp_path / "out.parquet")
    assert back["big"][1].as_py() == LARGE
    assert back["half"].tolist() == list(range(ROWS))
    kept, _ = written(source, tmp_path, only_kept=True)
    assert kept["big"].to_pylist() == RICH["big"].to_pylist()[::2]
    assert kept["id"].to_pylist() == list(range(0, ROWS, 2))


def test_large_columns_are_written_in_several_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("secateurs.selection.result.BLOCK_ROWS", 8)
    monkeypatch.setattr("secateurs.selection.result.GROUP_BYTES", 1500)
    texts = pa.array(["x" * 100] * ROWS)
    made, _ = written(as_embeddings({"embeddings": VECTORS, "text": texts}), tmp_path)
    assert made["text"].to_pylist() == texts.to_pylist()
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 3


def test_a_long_text_does_not_widen_the_others(tmp_path):
    texts = ["u"] * (ROWS - 1) + ["x" * 20_000]
    pq.write_table(table(url=pa.array(texts)), tmp_path / "in.parquet")
    held = open_files(tmp_path / "in.parquet").narrow(0).columns["url"]
    assert held.nbytes < 25_000
    own = as_embeddings({"embeddings": VECTORS, "url": texts}).narrow(0).columns["url"]
    assert own.nbytes < 25_000


def test_ids_and_labels_are_read_without_the_columns_beside_them(tmp_path, monkeypatch):
    pq.write_table(table(key=np.arange(ROWS), **RICH), tmp_path / "in.parquet")
    source = open_files(tmp_path / "in.parquet")
    asked = []
    read = type(source.shards[0].table).batches
    monkeypatch.setattr(
        type(source.shards[0].table),
        "batches",
        lambda self, columns, *how: (asked.append(list(columns)), read(self, columns, *how))[1],
    )
    narrow = source.narrow(0)
    assert asked == [["key"]]
    assert set(narrow.columns) == set(RICH)
    assert narrow.columns["big"][1].as_py() == LARGE
    assert asked == [["key"], ["big"]]


def test_missing_ids_and_labels_are_refused_with_their_row(tmp_path):
    pq.write_table(table(id=pa.array([1, None] + [3] * 38)), tmp_path / "ids.parquet")
    with pytest.raises(InputError, match=r"ids: got no value in row 1 of ids.parquet"):
        sc.select(tmp_path / "ids.parquet", "density", 0.5, clusters=2)
    for labels in (
        ["a", None] * 20,
        np.array(["a", None] * 20, object),
        pa.array(["a", None] * 20),
    ):
        with pytest.raises(InputError, match=r"labels: got no value in row 1 of the rows"):
            sc.select(VECTORS, "density", 0.5, clusters=2, labels=labels)
    with pytest.raises(InputError, match=r"labels: got int64, str in the rows"):
        plain(np.array([1, "a"], object), "labels", "the rows")
    for kind, values in {"timestamp": RICH["when"], "list": RICH["tags"]}.items():
        pq.write_table(table(label=values), tmp_path / "l.parquet")
        with pytest.raises(InputError, match=f"labels: got {kind}.* in l.parquet; accepted: whole"):
            open_files(tmp_path / "l.parquet", Names(label="label"))


def test_a_usual_name_of_another_kind_is_a_column_like_others(tmp_path):
    pq.write_table(table(id=RICH["half"], label=RICH["tags"]), tmp_path / "in.parquet")
    made, _ = written(open_files(tmp_path / "in.parquet"), tmp_path)
    assert made["id"].to_pylist() == list(range(ROWS))
    assert made["source_id"].to_pylist() == RICH["half"].to_pylist()
    assert made["source_label"].to_pylist() == RICH["tags"].to_pylist()


def test_a_column_of_numbers_is_asked_for_without_gaps():
    source = as_embeddings({"embeddings": VECTORS, **RICH})
    with pytest.raises(InputError, match="big: got no value in row 0 of the rows"):
        source.column("big")
    with pytest.raises(InputError, match="caption: got string in the rows; accepted: numbers"):
        source.column("caption")
    assert source.column("half")[0].tolist() == list(range(ROWS))
    assert source.numeric == ("big", "half")
    with pytest.raises(InputError, match="q: got NaN in row 1 of x"):
        numbers(np.array([0.0, np.nan]), "q", "x")
    with pytest.raises(InputError, match="caption: got no value in row 0"):
        source.values(0, "caption")
    assert source.values(0, "half")[3] == 3


def test_the_sources_columns_of_our_names_are_renamed_and_noted(tmp_path):
    own = {"score": np.arange(40), "keep": ["no"] * 40, "source_score": np.arange(40) * 2}
    made, selection = written(as_embeddings({"embeddings": VECTORS, **own}), tmp_path)
    assert made["source_source_score"].to_pylist() == list(range(40))
    assert made["source_score"].to_pylist() == list(range(0, 80, 2))
    assert made["source_keep"].to_pylist() == ["no"] * 40
    assert made["keep"].to_pylist() == [True, False] * 20
    assert selection.as_dict()["notes"] == [
        "the source's column score is written as source_source_score",
        "the source's column keep is written as source_keep",
    ]


def test_what_parquet_cannot_hold_is_left_out_with_a_note(tmp_path):
    kinds = pa.array([{}] * ROWS, pa.struct([]))
    whole = {"embeddings": VECTORS, "empty": kinds, "imaginary": np.ones(ROWS, np.complex64)}
    made, selection = written(as_embeddings(whole), tmp_path)
    assert made.column_names == ["id", "score", "keep", "reason"]
    assert selection.notes[0] == "column empty is left out: Parquet does not hold struct<>"
    assert "imaginary is left out" in selection.notes[1]


def test_only_the_usual_name_that_is_used_is_taken_from_a_mapping():
    whole = {"embeddings": VECTORS, "x": np.arange(40), "id": np.arange(40) + 5,
             "key": np.arange(40), "label": ["a"] * 40, "class": np.arange(40)}  # fmt: skip
    source = as_embeddings(whole)
    assert source.columns == ("x", "key", "class")
    assert source.narrow(0).ids[0] == 5
    assert as_embeddings(whole, names=Names(id="key", label="class")).narrow(0).ids[0] == 0
    assert as_embeddings(whole, ids=np.arange(40) * 2).columns == ("x", "id", "key", "class")


# ---------------------------------------------------------------- shards that differ


def folder_of(tmp_path, *tables):
    for number, one in enumerate(tables):
        pq.write_table(one, tmp_path / f"{'abc'[number]}.parquet")
    return tmp_path


def halves(first, second, name="year"):
    return (table(slice(0, 20), **{name: first}), table(slice(20, 40), **{name: second}))


def test_shards_are_widened_to_one_kind(tmp_path):
    whole, gaps = pa.array(range(20)), pa.array([None, *range(19)])
    for first, second, kind in (
        (whole, gaps, pa.int64()),
        (whole, gaps.cast(pa.float64()), pa.float64()),
        (whole.cast(pa.int8()), whole, pa.int64()),
        (pa.nulls(20), pa.array(["a"] * 20), pa.string()),
        (pa.array(["a"] * 20).dictionary_encode(), pa.array(["b"] * 20), pa.string()),
        (pa.array([{"a": 1}] * 20), pa.array([{"b": 2}] * 20), None),
    ):
        source = open_files(folder_of(tmp_path, *halves(first, second)))
        (tmp_path / "out").mkdir(exist_ok=True)
        made, _ = written(source, tmp_path / "out")
        assert kind is None or made["year"].type == kind
        last = second.to_pylist()[-1]
        assert made["year"].to_pylist()[-1] == ({"a": None, **last} if kind is None else last)
        changed = any("year is double" in note for note in source.notes)
        assert changed == (kind == pa.float64())


def test_kinds_that_no_other_holds_are_refused_at_the_door_with_the_files(tmp_path):
    number, text = pa.array(range(20)), pa.array([f"r{n}" for n in range(20)])
    for name, role in (("id", "ids"), ("label", "labels"), ("year", "year")):
        source = folder_of(tmp_path, *halves(number, text, name))
        told = f"{role}: got string in b.parquet; accepted: int64, as in a.parquet"
        with pytest.raises(InputError, match=told):
            open_files(source)
    with pytest.raises(InputError, match="n: got uint64 in b; accepted: int64, as in a"):
        one_kind("n", [("a", pa.int64()), ("b", np.dtype(np.uint64))])


def test_the_order_of_columns_does_not_matter(tmp_path):
    a, b = pa.array(range(20)), pa.array([0.5] * 20)
    source = folder_of(
        tmp_path, table(slice(0, 20), a=a, b=b), table(slice(20, 40), b=b, a=a)
    )  # fmt: skip
    source = open_files(source)
    assert [n for number in (0, 1) for n in source.values(number, "a").tolist()] == [*range(20)] * 2


def test_what_is_carried_and_how():
    assert carried([1, 2], "n").dtype.kind == "i"
    assert carried(["a", None], "n").to_pylist() == ["a", None]
    assert carried(np.array(["a", None], object), "n").null_count == 1
    assert carried(pa.array([1]), "n").type == pa.int64()
    assert carried(np.array(["a", "b"], np.dtypes.StringDType()), "n").to_pylist() == ["a", "b"]
    with pytest.raises(InputError, match="n: got .*; accepted: values of one kind"):
        carried(["a", 3], "n")
    assert plain(np.array([b"\xc3\xa9"]), "ids", "x").tolist() == ["é"]
    with pytest.raises(InputError, match="ids: got bytes in x that are no text"):
        plain(np.array([b"\xff"]), "ids", "x")
    assert plain(pa.chunked_array([["a"], ["b"]]), "ids", "x").tolist() == ["a", "b"]


def test_columns_of_pandas_keep_their_digits():
    pd = pytest.importorskip("pandas")
    held = carried(pd.Series([LARGE, None], dtype="Int64"), "n")
    assert held.to_pylist() == [LARGE, None]
    assert carried(pd.Series(["a", None], dtype="string"), "n").to_pylist() == ["a", None]
    assert carried(pd.Series([1.5, np.nan]), "n").dtype == np.float64
    with pytest.raises(InputError, match="labels: got no value in row 1"):
        as_embeddings(VECTORS[:2], labels=pd.Series([1, None], dtype="Int64"))


def test_columns_in_memory_tell_a_selection_from_another():
    told = {
        from_arrays(VECTORS, columns={name: values}).shards[0].fingerprint()
        for name in ("a", "b")
        for values in (np.arange(40), np.arange(40) + 1, pa.array(["x"] * 40), pa.nulls(40))
    }
    assert len(told) == 8


def test_tensors_that_numpy_does_not_know():
    small = torch.from_numpy(VECTORS).to(torch.float8_e4m3fn)
    assert torch.equal(torch.from_numpy(as_embeddings(small).shards[0].vectors), small.float())
    assert np.array_equal(
        as_embeddings(torch.from_numpy(VECTORS).to_sparse()).shards[0].vectors, VECTORS
    )
    with pytest.raises(InputError, match="embeddings: got list: .*; accepted: numbers of shape"):
        as_embeddings({"embeddings": [[1.0, 2.0], [1.0]]})
