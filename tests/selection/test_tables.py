"""Tables by ranges of rows: no shard is larger than asked for, whatever the row groups; Arrow files
and streams, compressed or not; Hugging Face data sets."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.selection.files import Names, open_files
from secateurs.selection.reading import ranges
from secateurs.selection.sources import as_embeddings

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
feather = pytest.importorskip("pyarrow.feather")

ROWS, WIDTH = 1000, 6
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
CAPTIONS = pa.array([f"caption {n}" if n % 3 else None for n in range(ROWS)])


def table(vectors=VECTORS, fixed=False, **columns):
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    if fixed:
        lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    else:
        lists = pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, vectors.shape[1]), flat)
    return pa.table({"embedding": lists, **columns})


def as_stream(path, content, size):
    with pa.ipc.new_stream(str(path), content.schema) as writer:
        writer.write_table(content, max_chunksize=size)


def as_file(path, content, size, compression=None):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), content.schema, options=options) as writer:
        writer.write_table(content, max_chunksize=size)


WRITERS = {
    "parquet": lambda path, content, size: pq.write_table(content, path, row_group_size=size),
    "arrow": as_file,
    "compressed.arrow": lambda path, content, size: as_file(path, content, size, "zstd"),
    "stream.arrow": as_stream,
}


def test_ranges_are_whole_parts_or_pieces_of_large_ones():
    assert list(ranges([130] * 3, 300)) == [(0, 260), (260, 130)]
    assert list(ranges([1000], 300)) == [(0, 300), (300, 300), (600, 300), (900, 100)]
    assert list(ranges([50, 700, 20], 300)) == [(0, 50), (50, 300), (350, 300), (650, 120)]
    assert list(ranges([0, 5, 0], 5)) == [(0, 5)]
    assert list(ranges([], 5)) == []


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("size", [130, 10_000])
def test_shards_are_ranges_of_rows_within_and_across_parts(kind, size, tmp_path):
    names = pa.array([f"r{n}" for n in range(ROWS)])
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, table(id=names, caption=CAPTIONS), size)
    source = open_files(path, rows=300)
    assert [shard.rows for shard in source.shards] == (
        [300, 300, 300, 100] if size > ROWS else [260, 260, 260, 220]
    )
    ids, captions = [], []
    for number, shard in enumerate(source.shards):
        blocks = list(shard.blocks(77))
        assert max(map(len, blocks)) <= 77
        first, last = source.offsets[number : number + 2]
        assert np.array_equal(np.concatenate(blocks), VECTORS[first:last])
        ids += source.ids_of(number).tolist()
        captions += shard.narrow().columns["caption"].to_pylist()
        parts = list(shard.further(77))
        assert [count for count, _ in parts] == [len(part["caption"]) for _, part in parts]
        assert max(count for count, _ in parts) <= 77
        along = [text for _, part in parts for text in part["caption"].to_pylist()]
        assert along == captions[first:last]
    assert ids == names.to_pylist()
    assert captions == CAPTIONS.to_pylist()


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow"])
def test_opening_and_reading_holds_no_whole_row_group(kind, tmp_path):
    rows = np.ones((60_000, 64), np.float32)  # 15 MB
    path = tmp_path / f"rows.{kind}"
    rows[:, 0] = np.arange(len(rows))
    content = table(rows)
    WRITERS[kind](path, content, len(rows))
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        source = open_files(path, rows=20_000)
        assert len(source.shards) == 3
        for shard in source.shards:
            assert sum(len(block) for block in shard.blocks(1000)) == 20_000
        assert pool.max_memory() < 6e6
    finally:
        pa.set_memory_pool(before)


@pytest.mark.parametrize("kind", [*WRITERS, "npz", "data set"])
def test_shards_go_to_other_processes(kind, tmp_path):
    if kind == "data set":
        datasets = pytest.importorskip("datasets")
        source = as_embeddings(datasets.Dataset.from_dict({"embedding": VECTORS.tolist()}))
    else:
        path = tmp_path / f"rows.{kind}"
        if kind == "npz":
            np.savez(path, embeddings=VECTORS)
        else:
            WRITERS[kind](path, table(), 300)
        source = open_files(path, rows=300)
    shard = pickle.loads(pickle.dumps(source.shards[-1]))
    own = np.concatenate(list(source.shards[-1].blocks(77)))
    assert np.array_equal(np.concatenate(list(shard.blocks(77))), own)
    assert shard.fingerprint() == source.shards[-1].fingerprint()


def test_what_a_saved_data_set_of_hugging_face_holds(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = {"embedding": VECTORS.tolist(), "id": [f"u{n}" for n in range(ROWS)]}
    datasets.Dataset.from_dict(whole).save_to_disk(tmp_path / "saved")
    source = open_files(tmp_path / "saved")
    assert source.ids_of(0)[7] == "u7"
    assert np.array_equal(np.concatenate(list(source.shards[0].blocks(100))), VECTORS)


# ---------------------------------------------------------------- what is wrong


def test_damage_in_the_middle_is_named_when_it_is_reached(tmp_path):
    pq.write_table(table(n=np.arange(ROWS)), tmp_path / "rows.parquet", compression="zstd",
                   row_group_size=250)  # fmt: skip
    place = pq.ParquetFile(tmp_path / "rows.parquet").metadata.row_group(2).column(0)
    data = bytearray((tmp_path / "rows.parquet").read_bytes())
    first = place.dictionary_page_offset or place.data_page_offset
    data[first : first + place.total_compressed_size] = b"\x55" * place.total_compressed_size
    (tmp_path / "rows.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"rows.parquet'; accepted: a whole parquet file \("):
        sc.select(tmp_path / "rows.parquet", "density", 0.5, clusters=2)
    as_file(tmp_path / "rows.arrow", table(), 100)
    half = (tmp_path / "rows.arrow").read_bytes()[:9000]
    (tmp_path / "rows.arrow").write_bytes(half)
    with pytest.raises(InputError, match=r"rows.arrow'; accepted: a whole arrow file \("):
        open_files(tmp_path / "rows.arrow")


def test_lists_that_are_no_embeddings(tmp_path):
    tags = pa.table({"tags": pa.array([["a", "b"]] * 50)})
    pq.write_table(tags, tmp_path / "tags.parquet")
    assert open_files(tmp_path / "tags.parquet").width == 0
    with pytest.raises(InputError, match="embeddings: got none"):
        sc.select(tmp_path / "tags.parquet", "density", 0.5)
    with pytest.raises(InputError, match="embedding of tags.parquet: got 'tags'"):
        open_files(tmp_path / "tags.parquet", Names(embedding="tags"))
    pq.write_table(pa.table({"embedding": pa.array([[], []], pa.list_(pa.float32()))}),
                   tmp_path / "none.parquet")  # fmt: skip
    with pytest.raises(InputError, match="no numbers in row 0 of none.parquet"):
        open_files(tmp_path / "none.parquet")
    pq.write_table(table().append_column("tags", pa.array([["a"]] * ROWS)), tmp_path / "b.parquet")
    assert open_files(tmp_path / "b.parquet").columns == ("tags",)


# ---------------------------------------------------------------- Hugging Face


@pytest.fixture
def data():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({
        "embedding": VECTORS[:200].tolist(), "label": [n % 3 for n in range(200)],
        "id": [f"u{n}" for n in range(200)], "quality": np.arange(200.0).tolist(),
    })  # fmt: skip


def test_a_data_set_has_its_ids_labels_and_columns_in_any_format(data):
    for made in (
        data,
        data.with_format("numpy"),
        data.with_format("torch"),
        data.with_transform(lambda batch: {"nothing": [0] * len(batch["id"])}),
        data.rename_column("embedding", "clip"),
    ):
        source = as_embeddings(made)
        assert (source.rows, source.width, source.labelled) == (200, WIDTH, True)
        assert source.columns == ("quality",)
        assert source.narrow(0).ids[3] == "u3"
        assert source.samples is made
    by_column = sc.select(data, "neural-scaling", 0.5, metric="column", column="quality")
    assert by_column.kept == 100
    other = as_embeddings(data.rename_column("id", "url"), names=Names(id="url"))
    assert other.narrow(0).ids[3] == "u3"


def test_rows_of_a_data_set_are_those_that_were_chosen_from_it(data):
    source = as_embeddings(data.select([5, 150, 7]))
    assert source.narrow(0).ids.tolist() == ["u5", "u150", "u7"]
    assert np.array_equal(next(source.shards[0].blocks(10)), VECTORS[[5, 150, 7]])
    sorted_ = as_embeddings(data.shuffle(seed=0).sort("quality", reverse=True))
    assert sorted_.narrow(0).ids[0] == "u199"


def test_pictures_and_arrays_of_a_data_set_are_carried_along(data, tmp_path):
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    grids = np.arange(200 * 4).reshape(200, 2, 2)
    images = {"image": [image.new("L", (4, 4), n) for n in range(200)]}
    made = datasets.concatenate_datasets([data, datasets.Dataset.from_dict(images)], axis=1)
    made = made.add_column("grid", grids.tolist()).cast_column(
        "grid", datasets.Array2D((2, 2), "int64")
    )
    kept = sc.select(made, "density", 0.5, clusters=2).write(tmp_path / "k.parquet", only_kept=True)
    back, wanted = pq.read_table(kept), made.with_format("arrow")[:]
    rows = [int(name[1:]) for name in back["id"].to_pylist()]
    for name in ("image", "grid"):
        assert back[name].to_pylist() == wanted[name].take(rows).to_pylist()


def test_what_is_wrong_with_a_data_set_is_named(data):
    datasets = pytest.importorskip("datasets")
    twice = data.remove_columns("id").add_column("id", ["x"] * 200)
    with pytest.raises(InputError, match="ids: got 'x'; accepted: every id once"):
        sc.select(twice, "density", 0.5)
    with pytest.raises(InputError, match="width 1 in row 1 of the data set"):
        sc.select(datasets.Dataset.from_dict({"embedding": [[1.0, 2.0], [1.0]]}), "density", 0.5)
    with pytest.raises(InputError, match="got no rows"):
        as_embeddings(data.select([]))
    with pytest.raises(InputError, match="got no rows"):
        as_embeddings(data.select([]), encoder=lambda batch: batch)
    whole = datasets.DatasetDict(train=data, test=data)
    with pytest.raises(InputError, match="DatasetDict; accepted: one of its splits: train, test"):
        as_embeddings(whole)
    with pytest.raises(InputError, match="a data set that has a length"):
        as_embeddings(data.to_iterable_dataset())


def test_what_is_given_beside_a_data_set_goes_before_its_own(data):
    source = as_embeddings(data, labels=["a", "b"] * 100, scores={"loss": np.arange(200)})
    assert source.classes()[0] == ["a", "b"]
    assert source.columns == ("quality", "loss")
    assert source.narrow(0).ids[3] == "u3"
    parts = list(source.shards[0].further(150))
    assert [count for count, _ in parts] == [150, 50]
    assert parts[1][1]["loss"].tolist() == list(range(150, 200))
    assert source.column("quality")[0].tolist() == source.column("loss")[0].tolist()
    with pytest.raises(InputError, match=r"labels: got shape \(3,\); accepted: .* 200 rows"):
        as_embeddings(data, labels=[1, 2, 3])


def test_an_encoder_makes_the_embeddings_and_the_rest_is_the_data_sets(data):
    def encoder(batch):
        return torch.stack([batch["quality"].float() + 1, torch.ones(len(batch["quality"]))], 1)

    source = as_embeddings(data.remove_columns("embedding"), encoder=encoder)
    assert next(source.shards[0].blocks(3)).tolist() == [[1, 1], [2, 1], [3, 1]]
    assert source.narrow(0).ids[3] == "u3"
    assert source.columns == ("quality",)
    assert source.classes()[0] == [0, 1, 2]


def test_an_encoder_keeps_its_mode():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 4), nn.Dropout())
    encoder[2].eval()
    modes = []
    encoder.register_forward_hook(lambda module, *_: modes.append(module.training))
    rows = TensorDataset(torch.from_numpy(VECTORS[:50]), torch.arange(50) % 2)
    sc.select(rows, "density", 0.5, encoder=encoder)
    assert set(modes) == {False}
    assert [m.training for m in encoder.modules()] == [True, True, True, False]
