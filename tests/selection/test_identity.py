"""Selections that share a workspace: the same goes on, another begins anew."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs as sc
from secateurs.selection.embeddings import ArrayShard, Embeddings, Narrow
from secateurs.selection.identity import (
    identity,
    told_of_encoder,
    told_of_rows,
    told_of_samples,
    told_of_task,
)
from secateurs.selection.sources import from_arrays

ROWS = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)


class Counted:
    """Hears of every step that is computed."""

    def __init__(self):
        self.done = 0

    def event(self, kind, values):
        self.done += kind == "done"

    def begin(self, label, total): ...

    def advance(self, label, done): ...

    def end(self, label): ...


def test_one_workspace_serves_other_rows_seeds_and_options(tmp_path):
    heard = Counted()
    work = sc.Workspace(tmp_path, [heard])
    calls = [
        (ROWS, {}),
        (-ROWS[::-1].copy(), {}),
        (ROWS, {"seed": 7}),
        (ROWS, {"clusters": 5}),
        (ROWS, {"labels": np.arange(200) % 3}),
        (ROWS, {"ids": np.arange(200)[::-1].copy()}),
    ]
    for rows, options in calls:
        before = heard.done
        kept = sc.select(rows, "density", 0.5, work=work, **options)
        assert heard.done > before
        alone = sc.select(rows, "density", 0.5, **options)
        assert np.array_equal(kept.mask, alone.mask)
        assert np.array_equal(np.concatenate(kept.scores), np.concatenate(alone.scores))
    before = heard.done
    again = sc.select(ROWS.copy(), "density", 0.5, work=work)
    assert heard.done == before, "the same selection is read"
    assert np.array_equal(again.mask, sc.select(ROWS, "density", 0.5).mask)


def test_another_target_or_fraction_is_another_selection(tmp_path):
    work = sc.Workspace(tmp_path)
    labels = np.arange(200) % 5
    for target, keep in ((ROWS[:9], 0.4), (ROWS[50:60], 0.4), (ROWS[50:60], 0.6)):
        own = sc.select(ROWS, "dp4tl", keep, labels=labels, target=target, work=work)
        alone = sc.select(ROWS, "dp4tl", keep, labels=labels, target=target)
        assert np.array_equal(own.mask, alone.mask)
        assert own.by_cluster() == alone.by_cluster()


def test_what_an_encoder_made_is_not_taken_for_what_another_makes(tmp_path):
    work, heard = sc.Workspace(tmp_path), Counted()
    first = nn.Linear(8, 4)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        second = nn.Linear(8, 4)
    data = TensorDataset(torch.from_numpy(ROWS), torch.arange(200) % 3)
    other = TensorDataset(torch.from_numpy(-ROWS), torch.arange(200) % 3)
    for samples, encoder in ((data, first), (data, second), (other, second)):
        kept = sc.select(samples, "density", 0.5, encoder=encoder, work=work)
        alone = sc.select(samples, "density", 0.5, encoder=encoder)
        assert np.array_equal(kept.mask, alone.mask)
    work = sc.Workspace(tmp_path, [heard])
    sc.select(other, "density", 0.5, encoder=second, work=work)
    assert not heard.done


def test_arrays_are_told_by_type_shape_and_every_byte():
    def told(vectors, **columns):
        return identity({"rows": told_of_rows(from_arrays(vectors, columns=columns))})

    plain = told(ROWS)
    assert told(ROWS.copy()) == plain
    assert told(np.asfortranarray(ROWS)) == plain, "the values, however they lie in memory"
    changed = ROWS.copy()
    changed[123, 4] += 1
    seen = {
        plain,
        told(changed),
        told(ROWS.view(np.int32)),
        told(ROWS.reshape(100, 16)),
        told(ROWS, score=np.arange(200.0)),
        told(ROWS, score=np.arange(200.0) + 1),
        told(ROWS, other=np.arange(200.0)),
        told(ROWS, when=np.arange(200).astype("datetime64[s]")),
        told(ROWS, text=np.array(["a"] * 200)),
        told(ROWS, text=np.array(["a"] * 199 + ["b"])),
    }
    assert len(seen) == 10
    ids = np.arange(3)
    swapped = [Narrow(ids, np.zeros(3, int)), Narrow(np.zeros(3, int), ids)]
    one, two = (told_of_rows(Embeddings([ArrayShard("rows", n)])) for n in swapped)
    assert one != two


def test_tasks_data_sets_and_encoders():
    def task(scale=1.0, steps=3, width=4):
        data = TensorDataset(scale * torch.from_numpy(ROWS), torch.arange(200) % 3)
        return sc.classification(
            lambda: nn.Linear(8, width), DataLoader(data, 20), DataLoader(data, 20),
            training=sc.TrainSettings(steps=steps),
        )  # fmt: skip

    plain = told_of_task(task())
    assert told_of_task(task()) == plain
    for other in (task(scale=2.0), task(steps=4), task(width=5)):
        assert told_of_task(other) != plain
    state = torch.get_rng_state()

    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, row):
            return torch.rand(2) + row

    assert told_of_samples(Augmented()) == told_of_samples(Augmented())
    assert torch.equal(state, torch.get_rng_state())
    assert told_of_encoder(np.linalg.norm) == told_of_encoder(np.linalg.norm)
    assert told_of_encoder(lambda x: x) != told_of_encoder(lambda x: x + 1)
    assert told_of_encoder(nn.Linear(2, 2)) != told_of_encoder(nn.Linear(2, 2))


@pytest.mark.parametrize("rows", [64, 70, 1])
def test_every_row_of_a_small_data_set_counts(rows):
    data = [(float(i), i % 2) for i in range(rows)]
    assert told_of_samples(data) == told_of_samples(list(data))
    assert told_of_samples(data) != told_of_samples([(9.5, 0), *data[1:]])
    assert told_of_samples(data) != told_of_samples(data + data[-1:])
