"""Data order as a function of (seed, step), shared among any number of processes."""

from dataclasses import replace
from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from secateurs.errors import InputError
from secateurs.settings import TrainSettings
from secateurs.training.batches import first_batch
from secateurs.training.loop import fit
from secateurs.training.order import SeededBatches, batches_from, mix, steps_per_epoch

NUMBERS = TensorDataset(torch.arange(23))


def epochs(loader, seed=0, step=0, count=12):
    """The numbers in the first batches from a step on."""
    return [batch[0].tolist() for batch, _ in islice(batches_from(loader, seed, step), count)]


def global_batches(world, length, size, drop_last):
    """Each global batch as the ranks see it: a list of shares, and the ranks' weights."""
    ranks = [
        SeededBatches(length, size, 3, shuffle=True, drop_last=drop_last, rank=rank, world=world)
        for rank in range(world)
    ]
    shares = zip(*ranks, strict=True)
    return [
        (list(batch), [r.share(position) for r in ranks]) for position, batch in enumerate(shares)
    ]


shapes = st.tuples(st.integers(1, 40), st.integers(1, 12), st.booleans(), st.sampled_from([2, 3]))


@given(shapes)
def test_several_processes_see_the_batches_of_one(shape):
    length, size, drop_last, world = shape
    alone = [batch[0] for batch, _ in global_batches(1, length, size, drop_last)]
    together = global_batches(world, length, size, drop_last)
    assert len(alone) == len(together)
    for whole, (shares, weights) in zip(alone, together, strict=True):
        seen = [s for share, w in zip(shares, weights, strict=True) if w for s in share]
        assert sorted(seen) == sorted(whole)


@given(shapes)
def test_the_average_of_weighted_losses_is_the_mean_over_the_global_batch(shape):
    length, size, drop_last, world = shape
    losses = torch.rand(length, dtype=torch.float64)
    alone = [batch[0] for batch, _ in global_batches(1, length, size, drop_last)]
    for whole, (shares, weights) in zip(
        alone, global_batches(world, length, size, drop_last), strict=True
    ):
        ranks = [float(losses[s].mean()) * w for s, w in zip(shares, weights, strict=True)]
        assert sum(ranks) / world == pytest.approx(float(losses[whole].mean()))


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    loader = DataLoader(NUMBERS, 4, shuffle=True)
    first, second = epochs(loader)[:6], epochs(loader)[6:]
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 3]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(23))
    assert first != second
    assert first != epochs(loader, seed=1)[:6]


def test_without_shuffling_the_order_is_that_of_the_data():
    assert epochs(DataLoader(NUMBERS, 5, drop_last=True), count=4) == [
        *([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]),
    ]


def weighted():
    return DataLoader(NUMBERS, 4, sampler=WeightedRandomSampler(torch.ones(23), 23))


LOADERS = {
    "shuffled": lambda: DataLoader(NUMBERS, 4, shuffle=True),
    "in order": lambda: DataLoader(NUMBERS, 4),
    "drop last": lambda: DataLoader(NUMBERS, 4, shuffle=True, drop_last=True),
    "some of them": lambda: DataLoader(NUMBERS, 4, sampler=RandomSampler(NUMBERS, num_samples=9)),
    "with replacement": lambda: DataLoader(
        NUMBERS, 4, sampler=RandomSampler(NUMBERS, replacement=True, num_samples=50)
    ),
    "weighted": weighted,
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("step", [1, 6, 8])
def test_the_order_from_any_step_is_the_tail_of_the_whole(kind, step):
    torch.manual_seed(step)
    assert epochs(LOADERS[kind](), step=step) == epochs(LOADERS[kind](), count=12 + step)[step:]


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_has_as_many_batches_as_the_loader_says(kind):
    """The epochs of a loader with its own number of samples are not cut short or drawn out."""
    loader = LOADERS[kind]()
    per_epoch = steps_per_epoch(loader)
    sizes = [len(batch) for batch in epochs(loader, count=2 * per_epoch)]
    assert sum(sizes[:per_epoch]) == sum(sizes[per_epoch:]) == sum(len(b[0]) for b in loader)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10).split(1))


def test_a_stream_needs_a_number_of_steps(tiny_task):
    task = tiny_task()
    stream = DataLoader(Stream(), 4)
    with pytest.raises(InputError, match=r"without a length.*TrainSettings\(steps"):
        steps_per_epoch(stream)
    seen = [batch.flatten().tolist() for batch, _ in islice(batches_from(stream, 0, 0), 4)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    later = [batch.flatten().tolist() for batch, _ in islice(batches_from(stream, 0, 4), 2)]
    assert later == [[4, 5, 6, 7], [8, 9]]
    points = replace(task, train=DataLoader(PointStream(task.train.dataset), 4))
    history = fit(task.fresh_model(0), points, TrainSettings(steps=15, lr=0.1))
    assert history.steps == 15


class PointStream(IterableDataset):
    def __init__(self, points):
        self.points = points

    def __iter__(self):
        return (self.points[i] for i in range(len(self.points)))


def test_an_empty_loader_is_refused():
    with pytest.raises(InputError, match="0 batches"):
        steps_per_epoch(DataLoader(NUMBERS, 40, drop_last=True))


def test_augmented_batches_depend_on_the_seed_alone(tiny_task):
    """Scores that look at a batch are drawn outside of any training loop."""
    task = tiny_task(noise=0.5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = first_batch(task, 7)[0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, first_batch(task, 7)[0])
    assert not torch.equal(first, first_batch(task, 8)[0])


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
def test_mixed_seeds_fit_a_generator(parts):
    seed = mix(*parts)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)


def test_mixed_seeds_do_not_collide_nor_commute():
    seeds = {mix(a, b) for a in range(60) for b in range(60)}
    assert len(seeds) == 3600
    assert mix(1, 2) != mix(2, 1)
    assert mix(1) != mix(1, 0)
