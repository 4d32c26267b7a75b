"""Which images of a class stay, on which canvas they end up, and what is refused."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import secateurs as sc
from secateurs.errors import InputError
from secateurs.methods.samples.pca_dataset_compression import PruneCombineAugment
from secateurs.selection.sources import from_arrays

from .conftest import TRAINING

METHOD = "pca-dataset-compression"
ROWS, CLASSES = 240, 4


def data(sizes=(60, 60, 60, 60), shard=1 << 18, scores=None, **columns):
    """Pictures of one colour each, equal to the row's number, with classes in turn."""
    rows = sum(sizes)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    colours = torch.arange(rows, dtype=torch.float32) / rows
    samples = TensorDataset(colours[:, None, None, None].expand(rows, 3, 8, 8))
    hard = np.random.default_rng(1).permutation(rows).astype(float) if scores is None else scores
    columns = columns or {"el2n": hard}
    source = from_arrays(None, np.arange(rows), labels, columns, rows=shard, samples=samples)
    return source, labels, hard


def select(source, keep=32 / ROWS, **options):
    return sc.select(source, METHOD, keep, **{"canvas": 16, **options})


def test_every_class_has_as_many_and_the_easiest():
    source, labels, hard = data()
    for order, pick in (("easy", lambda v: sorted(v)), ("hard", lambda v: sorted(v)[::-1])):
        selection = select(source, order=order)
        assert selection.kept == 32
        for one in range(CLASSES):
            kept = hard[selection.mask & (labels == one)]
            assert sorted(kept) == sorted(pick(hard[labels == one])[:8])
    chosen = select(source, order="random", seed=1)
    assert [row["kept"] for row in chosen.by_class()] == [8] * CLASSES
    assert set(chosen.indices) != set(select(source, order="random", seed=2).indices)


def test_canvas_b_holds_ranks_b_and_every_ipc_further():
    source, labels, hard = data()
    selection = select(source)
    canvases = PruneCombineAugment(canvas=16).combine(selection)
    assert len(canvases) == 2 * CLASSES, "samples of an epoch"
    assert canvases.labels.tolist() == sorted(list(range(CLASSES)) * 2)
    assert len(set(itertools.chain(*canvases.sources))) == 32, "an id is there twice"
    for number, (label, sources) in enumerate(
        zip(canvases.labels.tolist(), canvases.sources, strict=True)
    ):
        ranked = sorted(np.flatnonzero(labels == label), key=lambda row: hard[row])
        first = number % 2
        assert list(sources) == [ranked[first + 2 * tile] for tile in range(4)]


@pytest.mark.parametrize("side", [16, 225])
def test_a_tile_is_its_source_whole(side):
    source, _, _ = data()
    canvases = PruneCombineAugment(canvas=side).combine(select(source, canvas=side))
    upper = side - side // 2
    for canvas, sources in zip(canvases.images, canvases.sources, strict=True):
        tiles = [canvas[:, a, b] for a in (slice(upper), slice(upper, None))
                 for b in (slice(upper), slice(upper, None))]  # fmt: skip
        for tile, row in zip(tiles, sources, strict=True):
            assert torch.allclose(tile, torch.tensor(row / ROWS), atol=1 / 255)
    assert [t.shape[-1] for t in tiles] == [upper, side // 2, upper, side // 2]


def test_a_grid_of_one_is_plain_selection():
    source, labels, _ = data()
    selection = select(source, grid=1)
    canvases = PruneCombineAugment(grid=1, canvas=8).combine(selection)
    assert len(canvases) == 32
    for (image, label), (row,) in zip(canvases, canvases.sources, strict=True):
        assert torch.equal(image, source.samples[row][0])
        assert label == labels[row]
    assert {row for (row,) in canvases.sources} == set(selection.indices.tolist())


def test_shards_and_equal_scores_do_not_matter():
    coarse = (np.arange(ROWS) * 7 % 5).astype(float)
    made = []
    for shards in (1, 5, 64):
        source, _, _ = data(shard=-(-ROWS // shards), scores=coarse)
        made.append(PruneCombineAugment(canvas=16).combine(select(source)))
    assert made[0].sources == made[1].sources == made[2].sources
    assert torch.equal(made[0].images, made[2].images)


def test_a_class_that_is_too_small():
    source, labels, _ = data((60, 60, 60, 13))
    keep = 80 / 193
    selection = select(source, keep)
    assert [row["kept"] for row in selection.by_class()] == [12] * 4
    assert any("3 canvases a class" in note and "3 (13)" in note for note in selection.notes)
    assert any(note.startswith("budget keep") for note in selection.notes)
    assert len(PruneCombineAugment(canvas=16).combine(selection)) == 12
    again = select(source, keep, short_class="repeat")
    assert [row["kept"] for row in again.by_class()] == [20, 20, 20, 13]
    assert any("used again of class 3" in note for note in again.notes)
    canvases = PruneCombineAugment(canvas=16, short_class="repeat").combine(again)
    assert canvases.labels.bincount().tolist() == [5] * 4
    used = [
        row for s, c in zip(canvases.sources, canvases.labels, strict=True) if c == 3 for row in s
    ]
    assert sorted(set(used)) == np.flatnonzero(labels == 3).tolist()
    assert np.bincount(used).max() == 2, "each once more before one is there a third time"
    with pytest.raises(InputError, match=r"keep: got 20 samples a class, .* 3 \(13\)"):
        select(source, keep, short_class="refuse")
    with pytest.raises(InputError, match="grid: got 13 samples in class 3"):
        select(source, keep, grid=4)


def _twice(rows):
    return [row for n, row in enumerate(rows) if row in rows[:n]]


def test_el2n_is_measured_where_there_is_no_column(digits_task):
    task = replace(digits_task, training=sc.TrainSettings(steps=20, lr=0.2))
    data_set = task.train.dataset
    selection = sc.select(data_set, METHOD, 0.1, task, runs=2, canvas=16)
    from secateurs.selection.dynamics import early_scores, read_el2n

    found = early_scores(task, read_el2n, runs=2)
    assert np.allclose(np.concatenate(selection.scores), -found, atol=1e-6)
    assert selection.promise.kept
    assert selection.kept % 40 == 0
    source = from_arrays(None, np.arange(ROWS), data()[1])
    with pytest.raises(InputError, match=f"task: got {TRAINING} training samples; accepted: the"):
        sc.select(source, METHOD, 0.5, task)


def test_a_task_is_asked_rather_than_a_column_of_any_meaning(digits_task):
    task = replace(digits_task, training=sc.TrainSettings(steps=20, lr=0.2))
    labels = np.array([int(task.train.dataset[row][1]) for row in range(TRAINING)])
    year = {"year": np.arange(float(TRAINING))}
    plain, dated = (from_arrays(None, labels=labels, columns=c) for c in (None, year))
    options = {"runs": 1, "canvas": 16}
    measured = sc.select(plain, METHOD, 0.1, task, **options)
    beside = sc.select(dated, METHOD, 0.1, task, **options)
    assert np.array_equal(np.concatenate(beside.scores), np.concatenate(measured.scores))
    named = sc.select(dated, METHOD, 0.1, task, score="year", **options)
    assert np.array_equal(np.concatenate(named.scores), -year["year"].astype(np.float32))
    assert np.array_equal(sc.select(dated, METHOD, 0.1, **options).mask, named.mask)


def test_which_column_is_the_score():
    source, _, hard = data(el2n=np.arange(240.0), other=-np.arange(240.0))
    assert np.array_equal(np.concatenate(select(source).scores), -np.arange(240.0))
    assert np.array_equal(np.concatenate(select(source, score="other").scores), np.arange(240.0))
    source, _, _ = data(one=hard, two=hard)
    with pytest.raises(InputError, match="scores: got none that can be told apart"):
        select(source)
    with pytest.raises(InputError, match="column: got 'three'"):
        select(source, score="three")


def test_bad_input_is_refused():
    source, labels, hard = data()
    for wrong, told in (
        ({"grid": 0}, "grid"),
        ({"grid": 17}, "grid: got 17"),
        ({"runs": 0}, "runs"),
        ({"epoch": 0.0}, "epoch"),
    ):
        with pytest.raises(InputError, match=told):
            select(source, **wrong)
    holes = hard.copy()
    holes[11] = np.nan
    with pytest.raises(InputError, match="el2n: got NaN in row 11"):
        select(data(scores=holes)[0])
    words = from_arrays(None, np.arange(ROWS), labels.astype(str), {"el2n": hard})
    with pytest.raises(InputError, match="labels: got '0'; accepted: whole numbers"):
        select(words)
    bare = from_arrays(None, np.arange(ROWS), labels, {"el2n": hard})
    with pytest.raises(InputError, match="samples: got None"):
        PruneCombineAugment(canvas=16).combine(select(bare))
    with pytest.raises(InputError, match="samples: got a sample of shape"):
        PruneCombineAugment(canvas=16).combine(select(bare), torch.zeros(ROWS, 64).unbind())
    with pytest.raises(InputError, match="selection: got 8 to 8 samples a class"):
        PruneCombineAugment(grid=3, canvas=16).combine(select(source))
