"""npy and npz: read by ranges of rows from where they stand in the file; what is wrong is named."""

import os
import zipfile

import numpy as np
import pytest

import secateurs as sc
from secateurs.errors import InputError
from secateurs.selection.files import Names, open_files

ROWS, WIDTH = 500, 8
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
KINDS = RNG.integers(0, 3, ROWS)


def everything(source):
    blocks = [block for shard in source.shards for block in shard.blocks(33)]
    return np.concatenate(blocks)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_has_shards_like_an_npy(save, tmp_path):
    texts = np.array([f"é{n}" for n in range(ROWS)])
    save(tmp_path / "rows.npz", embeddings=VECTORS, ids=texts, labels=KINDS, n=np.arange(ROWS))
    source = open_files(tmp_path / "rows.npz", rows=120)
    assert [shard.rows for shard in source.shards] == [120, 120, 120, 120, 20]
    assert np.array_equal(everything(source), VECTORS)
    for number, shard in enumerate(source.shards):
        first, last = source.offsets[number : number + 2]
        narrow = source.narrow(number)
        assert np.array_equal(narrow.ids, texts[first:last])
        assert np.array_equal(narrow.labels, KINDS[first:last])
        assert np.array_equal(narrow.columns["n"], np.arange(first, last))
        assert shard.name == f"rows.npz[{first}:{last}]"


def test_a_block_of_a_large_npz_is_read_alone(tmp_path, monkeypatch):
    np.savez(tmp_path / "rows.npz", embeddings=VECTORS)
    source = open_files(tmp_path / "rows.npz", rows=100)
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # nothing is unpacked
    assert np.array_equal(next(source.shards[3].blocks(10)), VECTORS[300:310])


def test_columns_by_name_beside_an_npy(tmp_path):
    np.save(tmp_path / "n.npy", VECTORS)
    np.save(tmp_path / "n.kind.npy", KINDS)
    assert open_files(tmp_path / "n.npy").columns == ("kind",)
    source = open_files(tmp_path / "n.npy", Names(label="kind"), rows=120)
    assert source.classes()[0] == [0, 1, 2]
    assert source.columns == ()
    with pytest.raises(InputError, match="label of n.npy: got 'nonexist'; accepted: one of kind"):
        open_files(tmp_path / "n.npy", Names(label="nonexist"))


def test_a_name_like_a_pattern_has_its_columns(tmp_path):
    np.save(tmp_path / "p[0].npy", VECTORS)
    np.save(tmp_path / "p[0].label.npy", KINDS)
    np.save(tmp_path / "p0.npy", VECTORS)
    assert open_files(tmp_path / "p[0].npy").labelled
    assert not open_files(tmp_path / "p0.npy").labelled


def test_what_lies_beside_it_tells_a_file_from_another(tmp_path):
    np.save(tmp_path / "a.npy", VECTORS)
    np.save(tmp_path / "a.labels.npy", KINDS)
    before = open_files(tmp_path / "a.npy").shards[0].fingerprint()
    assert open_files(tmp_path / "a.npy").shards[0].fingerprint() == before
    np.save(tmp_path / "a.labels.npy", KINDS[::-1])
    os.utime(tmp_path / "a.labels.npy", ns=(1, 1))
    assert open_files(tmp_path / "a.npy").shards[0].fingerprint() != before


def test_other_byte_orders_and_widths_of_numbers(tmp_path):
    for kind in (">f4", ">f2", ">i4", ">u2", "u8", "bool"):
        rows = VECTORS > -0.5 if kind == "bool" else (np.abs(VECTORS) * 20 + 1).astype(kind)
        np.save(tmp_path / "a.npy", rows)
        np.savez(tmp_path / "b.npz", embeddings=rows, ids=np.arange(ROWS).astype(">i8"))
        for name in ("a.npy", "b.npz"):
            source = open_files(tmp_path / name)
            assert np.array_equal(everything(source), rows)
            assert everything(source).dtype.isnative
            assert len(next(source.vectors(0))) == ROWS
    np.save(tmp_path / "a.npy", VECTORS.astype(">f4"))
    assert sc.select(tmp_path / "a.npy", "density", 0.5, clusters=2).kept == 250
    made = sc.select(VECTORS.astype(">f4"), "density", 0.5, clusters=2)
    assert np.array_equal(made.mask, sc.select(VECTORS, "density", 0.5, clusters=2).mask)
    np.save(tmp_path / "c.npy", VECTORS.astype(np.longdouble))
    with pytest.raises(InputError, match="c.npy; accepted: .* of at most 64 bits"):
        open_files(tmp_path / "c.npy")
    with pytest.raises(InputError, match="accepted: numbers of at most 64 bits"):
        sc.select(VECTORS.astype(np.longdouble), "density", 0.5)


def test_texts_are_utf8_and_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", VECTORS)
    np.save(tmp_path / "a.ids.npy", np.array([f"é{n}".encode() for n in range(ROWS)]))
    assert open_files(tmp_path / "a.npy").ids_of(0)[3] == "é3"
    np.save(tmp_path / "a.ids.npy", np.array([b"\xff%d" % n for n in range(ROWS)]))
    with pytest.raises(InputError, match="ids: got bytes in a.npy that are no text"):
        sc.select(tmp_path / "a.npy", "density", 0.5)
    np.save(tmp_path / "a.ids.npy", np.array(["x"] * ROWS, object), allow_pickle=True)
    with pytest.raises(InputError, match="an array in objects in a.ids.npy; accepted: numbers, or"):
        open_files(tmp_path / "a.npy")


def test_archives_that_are_empty_or_damaged(tmp_path):
    np.savez(tmp_path / "none.npz")
    with pytest.raises(InputError, match="no arrays in none.npz"):
        open_files(tmp_path / "none.npz")
    np.savez_compressed(tmp_path / "z.npz", embeddings=VECTORS)
    data = bytearray((tmp_path / "z.npz").read_bytes())
    data[5000:5100] = b"\x55" * 100
    (tmp_path / "z.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"z.npz'; accepted: a whole npz file \("):
        sc.select(tmp_path / "z.npz", "density", 0.5)
    np.save(tmp_path / "cut.npy", VECTORS)
    source = open_files(tmp_path / "cut.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cut.npy'; accepted: a whole npy file \("):
        sc.select(source, "density", 0.5)
