"""What lies on disk and in memory, as shards: every format gives the same rows; what is wrong is
named."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.selection.embeddings import Embeddings
from secateurs.selection.files import Names, open_files
from secateurs.selection.sources import as_embeddings, from_arrays

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
feather = pytest.importorskip("pyarrow.feather")

ROWS, WIDTH = 1000, 6
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(ROWS, WIDTH)).astype(np.float16)
LABELS = RNG.integers(0, 4, ROWS)
QUALITY = RNG.random(ROWS)
IDS = np.array([f"row-{n:04}" for n in range(ROWS)])


def table(vectors=VECTORS, fixed=True, **columns):
    flat = pa.array(np.asarray(vectors).reshape(-1))
    width = vectors.shape[1]
    if fixed:
        lists = pa.FixedSizeListArray.from_arrays(flat, width)
    else:
        lists = pa.ListArray.from_arrays(np.arange(0, flat.__len__() + 1, width), flat)
    given = {"id": IDS, "label": LABELS, "quality": QUALITY, **columns}
    return pa.table({**{k: v for k, v in given.items() if v is not None}, "embedding": lists})


def write(kind, folder, vectors=VECTORS):
    """One file of a kind, and the whole content."""
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table(vectors), path, row_group_size=130)
    elif kind == "lists.parquet":
        pq.write_table(table(vectors, fixed=False), path, row_group_size=130)
    elif kind in ("feather", "arrow"):
        compression = "uncompressed" if kind == "arrow" else "lz4"
        feather.write_feather(table(vectors), path, compression=compression, chunksize=130)
    elif kind == "npy":
        np.save(path, vectors)
        for name, values in (("ids", IDS), ("labels", LABELS), ("quality", QUALITY)):
            np.save(folder / f"rows.{name}.npy", values)
    else:
        save = np.savez_compressed if kind == "compressed.npz" else np.savez
        save(path, embeddings=vectors, ids=IDS, labels=LABELS, quality=QUALITY)
    return path


KINDS = ("parquet", "lists.parquet", "feather", "arrow", "npy", "npz", "compressed.npz")


def everything(source: Embeddings, size=77):
    blocks, narrow = [], []
    for number, shard in enumerate(source.shards):
        blocks += [b.copy() for b in shard.blocks(size)]
        assert all(len(b) <= size for b in blocks)
        narrow.append(source.narrow(number))
    quality = [n.columns["quality"] for n in narrow]
    return (np.concatenate(blocks), np.concatenate([n.ids for n in narrow]),
            np.concatenate([n.labels for n in narrow]), np.concatenate(quality))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_rows_with_all_that_goes_along(kind, tmp_path):
    source = open_files(write(kind, tmp_path), rows=300)
    assert (source.rows, source.width) == (ROWS, WIDTH)
    assert source.labelled
    assert source.columns == ("quality",)
    if "npz" not in kind:
        assert len(source.shards) in (4, 5)
    for found, wanted in zip(everything(source), (VECTORS, IDS, LABELS, QUALITY), strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_selects_the_same_rows(kind, tmp_path):
    chosen = {"clusters": 8, "epsilon": 1e-3}
    here = sc.select(VECTORS, "density", 0.3, ids=IDS, labels=LABELS, **chosen)
    there = sc.select(write(kind, tmp_path), "density", 0.3, **chosen)
    assert np.array_equal(here.ids, there.ids)
    assert here.by_class() == there.by_class()


def test_a_folder_of_shards_is_read_in_the_order_of_the_names(tmp_path):
    for number, part in enumerate(np.array_split(np.arange(ROWS), 3)):
        pq.write_table(table().take(part), tmp_path / f"part-{number}.parquet")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "readme.txt").touch()
    source = open_files(tmp_path)
    assert [s.name for s in source.shards] == [f"part-{n}.parquet" for n in range(3)]
    assert np.array_equal(everything(source)[1], IDS)


def test_rows_without_ids_are_numbered_over_all_shards(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", VECTORS[number * 10 : number * 10 + 10])
    source = open_files(tmp_path, rows=4)
    ids = np.concatenate([source.narrow(n).ids for n in range(len(source.shards))])
    assert ids.tolist() == list(range(30))


def test_columns_under_other_names(tmp_path):
    made = table().rename_columns(["url", "kind", "quality", "clip"])
    pq.write_table(made, tmp_path / "a.parquet")
    source = open_files(tmp_path / "a.parquet", Names("clip", "url", "kind"))
    assert source.labelled
    assert source.narrow(0).ids[3] == "row-0003"
    with pytest.raises(InputError, match="id of a.parquet: got 'uri'.*did you mean 'url'"):
        open_files(tmp_path / "a.parquet", Names(id="uri"))


def bad_files(folder):
    """What is wrong, how the refusal begins."""
    ragged = pa.table({"embedding": pa.array([[1.0, 2.0], [3.0]])})
    pq.write_table(ragged, folder / "ragged.parquet")
    pq.write_table(pa.table({"embedding": pa.array([[1.0, 2.0], None])}), folder / "none.parquet")
    pq.write_table(pa.table({"embedding": pa.array([[1.0, None]])}), folder / "null.parquet")
    (folder / "shards").mkdir()
    np.save(folder / "shards" / "a.npy", VECTORS)
    np.save(folder / "shards" / "b.npy", VECTORS[:, :4])
    (folder / "mixed").mkdir()
    pq.write_table(table(), folder / "mixed" / "a.parquet")
    pq.write_table(table(label=None), folder / "mixed" / "b.parquet")
    (folder / "half.npy").write_bytes((folder / "shards" / "a.npy").read_bytes()[:400])
    (folder / "torn.parquet").write_bytes(b"PAR1 and no more")
    (folder / "torn.npz").write_bytes(b"PK and no more")
    np.save(folder / "turned.npy", np.asfortranarray(VECTORS))
    np.save(folder / "flat.npy", VECTORS[:, 0])
    np.save(folder / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.save(folder / "long.npy", VECTORS)
    np.save(folder / "long.labels.npy", LABELS[:3])
    (folder / "words.txt").write_text("hello")
    (folder / "empty").mkdir()
    return {
        "ragged.parquet": "width 1 in row 1 of ragged.parquet",
        "none.parquet": "no embedding in row 1 of none.parquet",
        "null.parquet": "a missing number in row 0 of null.parquet",
        "shards": "width 4 in b.npy; accepted: width 6 in every shard, as in a.npy",
        "mixed": r"columns \['quality'\] in b.parquet",
        "half.npy": "a whole file",
        "torn.parquet": "a whole parquet file",
        "torn.npz": "a whole npz file",
        "turned.npy": "an array in Fortran order",
        "flat.npy": r"float16 of shape \(1000,\) in flat.npy",
        "objects.npy": "an array in objects",
        "long.npy": r"shape \(3,\) in long.labels.npy; accepted: one value for each of 1000 rows",
        "words.txt": "words.txt'; accepted: a file in .parquet",
        "empty": "a folder with files that end in",
        "nowhere": "an existing file or folder",
    }


def test_what_is_wrong_with_files_is_named(tmp_path):
    for name, told in bad_files(tmp_path).items():
        with pytest.raises(InputError, match=told):
            sc.select(tmp_path / name, "density", 0.5, clusters=1)


@pytest.mark.parametrize("kind", ["parquet", "npy", "npz"])
def test_a_bad_row_is_named_with_its_shard_and_its_id(kind, tmp_path):
    broken = VECTORS.copy()
    broken[777, 2] = np.nan
    with pytest.raises(InputError, match="NaN or Inf in row .* of rows.* .id row-0777."):
        sc.select(write(kind, tmp_path, broken), "density", 0.5)
    broken[777] = 0
    with pytest.raises(
        InputError, match=r"a zero vector in row .*id row-0777\); accepted: vectors"
    ):
        sc.select(write(kind, tmp_path, broken), "density", 0.5)


def test_large_numbers_are_no_infinities():
    rows = np.array([[3e30, 4e30], [1.0, 0.0]], np.float32)
    assert next(as_embeddings(rows).vectors(0))[0].tolist() == pytest.approx([0.6, 0.8])


def test_ids_that_repeat_are_refused_across_shards():
    ids = np.arange(100)
    ids[95] = 3
    with pytest.raises(InputError, match="ids: got 3; accepted: every id once"):
        from_arrays(VECTORS[:100], ids, rows=30).check_ids(sc.Workspace())
    texts = IDS[:100].copy()
    texts[95] = "row-0003"
    with pytest.raises(InputError, match="ids: got 'row-0003'"):
        from_arrays(VECTORS[:100], texts, rows=30).check_ids(sc.Workspace())
    from_arrays(VECTORS[:100], IDS[:100], rows=30).check_ids(sc.Workspace())


# ---------------------------------------------------------------- in memory


class Pairs(Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, row):
        return torch.full((1, 2, 2), float(row + 1)), row % 3


def test_tensors_arrays_mappings_and_data_sets():
    kept = {}
    for name, source in {
        "array": VECTORS,
        "tensor": torch.from_numpy(VECTORS),
        "float64": VECTORS.astype(np.float64),
        "bfloat16": torch.from_numpy(VECTORS).bfloat16(),
        "mapping": {"embeddings": VECTORS, "labels": LABELS, "quality": QUALITY},
    }.items():
        selection = sc.select(source, "density", 0.2, clusters=5)
        kept[name] = selection.indices.tolist()
        assert bool(selection.by_class()) == (name == "mapping")
    assert kept["array"] == kept["tensor"] == kept["float64"] == kept["mapping"]
    assert len(kept["bfloat16"]) == len(kept["array"])


def test_a_torch_data_set_with_an_encoder(tmp_path):
    calls = []

    def encoder(batch):
        calls.append(tuple(batch.shape))
        return torch.cat([batch.flatten(1), -batch.flatten(1).sqrt()], dim=1)

    source = as_embeddings(Pairs(), encoder=encoder, batch_size=20, work=sc.Workspace(tmp_path))
    assert calls == [(20, 1, 2, 2), (20, 1, 2, 2), (10, 1, 2, 2)]
    assert (source.rows, source.width) == (50, 8)
    assert source.classes()[0] == [0, 1, 2]
    assert isinstance(source.samples, Pairs)
    again = as_embeddings(Pairs(), encoder=encoder, batch_size=20, work=sc.Workspace(tmp_path))
    assert len(calls) == 3, "what was encoded is kept"
    assert np.array_equal(again.shards[0].vectors, source.shards[0].vectors)
    with pytest.raises(InputError, match=r"encoder: got shape \(20,\)"):
        as_embeddings(Pairs(), encoder=lambda b: b.flatten(1)[:, 0], batch_size=20)


def test_a_data_set_without_an_encoder_has_ids_and_labels_only():
    source = as_embeddings(TensorDataset(torch.ones(9, 2), torch.arange(9) % 2))
    assert (source.rows, source.width, source.labelled) == (9, 0, True)
    with pytest.raises(InputError, match="embeddings: got none"):
        sc.select(source, "density", 0.5)


def test_hugging_face_data_sets():
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {"embedding": VECTORS[:60].astype(np.float32).tolist(), "label": LABELS[:60].tolist()}
    )
    source = as_embeddings(made)
    assert (source.rows, source.width, source.labelled) == (60, WIDTH, True)
    here = sc.select(VECTORS[:60].astype(np.float32), "density", 0.5)
    assert np.array_equal(sc.select(made, "density", 0.5).indices, here.indices)
    texts = datasets.Dataset.from_dict({"text": ["a", "bb", "ccc"], "label": [0, 1, 1]})
    encoded = as_embeddings(texts, encoder=lambda words: torch.tensor([[len(w), 1] for w in words]))
    assert encoded.shards[0].vectors.tolist() == [[1, 1], [2, 1], [3, 1]]
    assert encoded.classes()[0] == [0, 1]


def test_lengths_that_differ_and_things_that_are_no_rows():
    with pytest.raises(InputError, match=r"labels: got shape \(3,\); accepted: one value for each"):
        sc.select(VECTORS, "density", 0.5, labels=[1, 2, 3])
    with pytest.raises(InputError, match=r"embeddings: got float16 of shape \(1000,\)"):
        sc.select(VECTORS[:, 0], "density", 0.5)
    with pytest.raises(InputError, match="no rows"):
        sc.select(VECTORS[:0], "density", 0.5)
    with pytest.raises(InputError, match="labels: got nan; accepted: a class, in row 1"):
        sc.select(VECTORS[:2], "density", 0.5, labels=[1.0, np.nan]).by_class()
    source = from_arrays(VECTORS)
    with pytest.raises(InputError, match="labels: got embeddings in files"):
        as_embeddings(source, labels=LABELS)


# ---------------------------------------------------------------- folders


def test_suffixes_in_any_case_are_read(tmp_path):
    pq.write_table(table(), tmp_path / "A.PARQUET")
    pq.write_table(table(), tmp_path / "b.pq")
    feather.write_feather(table(), str(tmp_path / "c.Feather"))
    assert [shard.name for shard in open_files(tmp_path).shards] == [
        "A.PARQUET", "b.pq", "c.Feather",
    ]  # fmt: skip
    assert open_files(tmp_path / "A.PARQUET").rows == ROWS
    for name, values in (("D.NPY", VECTORS), ("D.Labels.NPY", LABELS)):
        with open(tmp_path / name, "wb") as file:
            np.save(file, values)
    assert open_files(tmp_path / "D.NPY", Names(label="Labels")).labelled


def test_files_in_subfolders_are_noted(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    np.save(tmp_path / "sub" / "deep" / "b.npy", VECTORS)
    np.save(tmp_path / ".hidden" / "c.npy", VECTORS)
    with pytest.raises(InputError, match=r"whose files are in .*sub; accepted: a folder with"):
        open_files(tmp_path)
    np.save(tmp_path / "a.npy", VECTORS)
    made = sc.select(tmp_path, "density", 0.5, clusters=2)
    assert made.total == ROWS
    assert made.as_dict()["notes"][0].startswith("files in subfolders were not read: ")
    assert made.as_dict()["notes"][0].endswith("sub")


# ---------------------------------------------------------------- numbers of any size


def test_rows_of_any_size_have_a_direction():
    rows = VECTORS[:200].astype(np.float64)
    wanted = torch.cat(list(as_embeddings(rows.astype(np.float32)).vectors(0)))
    for size in (1e-310, 1e-300, 1e-45, 1e-30, 1e-23, 1e-16, 1e16, 1e25, 1e200, 1e305):
        found = torch.cat(list(as_embeddings(rows * size).vectors(0)))
        assert torch.allclose(found, wanted, atol=2e-7 if size > 1e-300 else 1e-5), size
    for size in (1e-30, 1e-23, 1e30):
        small = rows.astype(np.float32) * np.float32(size)
        assert sc.select(small, "density", 0.5, clusters=4).kept == 100


def test_other_rows_keep_their_bits():
    rows = VECTORS[:100].astype(np.float64)
    alone = torch.cat(list(as_embeddings(rows).vectors(0)))
    rows[7], rows[9] = 1e200, 1e-200
    beside = torch.cat(list(as_embeddings(rows).vectors(0)))
    others = [n for n in range(100) if n not in (7, 9)]
    assert torch.equal(alone[others], beside[others])
    plain = VECTORS[:100].astype(np.float32)
    lengths = torch.linalg.vector_norm(torch.from_numpy(plain), dim=1, keepdim=True)
    assert torch.equal(alone, torch.from_numpy(plain) / lengths)


def test_duplicates_among_rows_of_any_size():
    rows = np.concatenate([VECTORS[:50], VECTORS[:50]]).astype(np.float64)
    rows[:50] *= 1e200
    made = sc.select(rows, "density", 0.4, clusters=2, epsilon=1e-4)
    assert made.count("duplicate") == 50


def test_what_euclidean_distances_cannot_tell_is_named():
    rows = VECTORS[:10].astype(np.float64)
    rows[3] *= 1e200
    with pytest.raises(InputError, match="a number beyond float32 in row 3 of the rows .id 3."):
        list(as_embeddings(rows).vectors(0, "euclidean"))
    rows[3] = np.inf
    for metric in ("euclidean", "cosine"):
        with pytest.raises(InputError, match="NaN or Inf in row 3"):
            list(as_embeddings(rows).vectors(0, metric))
    rows[3] = 0
    assert len(next(as_embeddings(rows).vectors(0, "euclidean"))) == 10
