"""Stability distances and the barrier between two solutions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateurs.analysis.stability import distance, interpolate, interpolation_barrier, stability
from secateurs.errors import InputError
from secateurs.parts.masks import Masks
from secateurs.parts.prunable import prunable_parameters
from secateurs.state import model_state
from secateurs.training.loop import fit

ALL = {"w": torch.ones(3, dtype=torch.bool)}


def state(*values):
    return {"w": torch.tensor(values)}


vectors = st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3).filter(
    lambda v: sum(map(abs, v)) > 0.1
)


@given(vectors, st.floats(0.1, 100))
def test_a_distance_scales_and_an_angle_does_not(values, scale):
    one = {"w": torch.tensor(values, dtype=torch.float64)}
    other = {"w": one["w"] + torch.tensor([1.0, -2.0, 0.5])}
    large = [{"w": scale * s["w"]} for s in (one, other)]
    assert distance(*large, ALL) == pytest.approx(scale * distance(one, other, ALL))
    assert distance(*large, ALL, "angle") == pytest.approx(
        distance(one, other, ALL, "angle"), abs=1e-6
    )


@given(vectors)
def test_angles_of_a_vector_with_itself_and_its_opposite(values):
    one = {"w": torch.tensor(values)}
    assert distance(one, one, ALL) == distance(one, one, ALL, "angle") == 0
    assert distance(one, {"w": -one["w"]}, ALL, "angle") == pytest.approx(180)
    assert distance(one, {"w": 7 * one["w"]}, ALL, "angle") == pytest.approx(0, abs=1e-4)


def test_worked_distances_over_the_survivors_only():
    a = {"w": torch.tensor([3.0, 0.0, 9.0]), "bias": torch.tensor([1.0])}
    b = {"w": torch.tensor([0.0, 4.0, -9.0]), "bias": torch.tensor([5.0])}
    two = {"w": torch.tensor([True, True, False])}
    assert distance(a, b, two) == pytest.approx(5.0)
    assert distance(a, b, two, "angle") == pytest.approx(90.0)
    assert distance(a, b, ALL) == pytest.approx(math.sqrt(25 + 18**2))


def test_refusals():
    with pytest.raises(InputError, match="metric: got 'cosine'"):
        distance(state(1.0, 2.0, 3.0), state(1.0, 2.0, 3.0), ALL, "cosine")
    with pytest.raises(InputError, match="state: got 'w'"):
        distance(state(1.0, 2.0, 3.0), {}, ALL)
    with pytest.raises(InputError, match="state: got 'v'"):
        interpolation_barrier(state(1.0), {"w": torch.ones(1), "v": torch.ones(1)}, lambda s: 0.0)
    with pytest.raises(InputError, match="points: got 1"):
        interpolation_barrier(state(1.0), state(1.0), lambda s: 0.0, points=1)


@pytest.mark.parametrize("masks", [{}, {"w": torch.zeros(3, dtype=torch.bool)}])
@pytest.mark.parametrize("metric", ["l2", "angle"])
def test_masks_without_survivors_are_refused(masks, metric):
    with pytest.raises(InputError, match="masks.*at least one survivor"):
        distance(state(1.0, 2.0, 3.0), state(1.0, 2.0, 3.0), masks, metric)


def test_the_barrier_of_a_bowl_with_two_bottoms():
    """error(w) = (w² − 1)²: 0 at both ends −1 and 1, and 1 half way."""
    error = lambda s: float((s["w"] ** 2 - 1).square().sum())  # noqa: E731
    barrier, errors = interpolation_barrier(state(1.0), state(-1.0), error, points=31)
    assert errors[0] == errors[-1] == 0
    assert barrier == pytest.approx(1.0)
    assert len(errors) == 31


def test_the_barrier_is_counted_from_the_mean_of_the_ends():
    error = lambda s: float(s["w"].sum())  # noqa: E731
    barrier, errors = interpolation_barrier(state(3.0), state(1.0), error)
    assert (errors[0], errors[-1]) == (1.0, 3.0), "α = 0 is the second state, α = 1 the first"
    assert barrier == pytest.approx(3.0 - 2.0)
    assert interpolation_barrier(state(3.0), state(3.0), error)[0] == 0


def test_counters_are_not_interpolated():
    a = {"w": torch.tensor([2.0]), "batches": torch.tensor(10)}
    b = {"w": torch.tensor([0.0]), "batches": torch.tensor(3)}
    middle = interpolate(a, b, 0.25)
    assert middle["w"] == 0.5
    assert middle["batches"] == 10
    ends = interpolate(a, b, 1)
    ends["w"].zero_()
    assert a["w"] == 2.0, "the ends share memory with the states"


def rows_of(task, masks=None, **options):
    model = task.fresh_model(3)
    start = model_state(model)
    kept = masks or Masks.ones_like(prunable_parameters(model))
    rows = stability(model, task, start, kept, **options)
    return {(row["mask"], row["to"]): row for row in rows}


def test_a_full_mask_is_perfectly_stable_to_pruning(tiny_task):
    rows = rows_of(tiny_task(), samples=2)
    for mask in ("method", "random"):
        assert rows[mask, "pruning"]["max"] == rows[mask, "pruning"]["angle"] == 0
        assert rows[mask, "data order"]["min"] > 0


def some(model):
    return Masks({n: p.abs() > p.abs().median() for n, p in prunable_parameters(model).items()})


def test_both_distances_are_those_of_trainings_made_by_hand(tiny_task):
    from secateurs.training.order import mix
    from secateurs.training.rounds import masked_state, train_masked

    task = tiny_task()
    start = task.fresh_model(3)
    fit(start, task, task.training, stop_step=15)
    masks = some(start)
    state = model_state(start)
    rows = stability(start, task, state, masks, start_step=15, samples=2, seed=4)

    def trained(kept, order):
        model = task.fresh_model(3)
        model.load_state_dict(masked_state(state, kept))
        return train_masked(model, kept, task, seed=mix(4, order, 7), start_step=15)

    full = Masks({n: torch.ones_like(m) for n, m in masks.items()})
    sparse, dense = [[trained(kept, order) for order in (0, 1)] for kept in (masks, full)]
    pruning = [distance(d.trained, s.trained, masks) for d, s in zip(dense, sparse, strict=True)]
    first = rows[0]
    assert (first["mask"], first["to"]) == ("method", "pruning")
    assert (first["min"], first["max"]) == (min(pruning), max(pruning))
    assert rows[1]["distance"] == distance(sparse[0].trained, sparse[1].trained, masks)
    assert rows[1]["accuracy"] == pytest.approx(
        (sparse[0].metrics["accuracy"] + sparse[1].metrics["accuracy"]) / 2
    )


def test_distances_fall_when_less_training_is_left(tiny_task):
    task = tiny_task()
    start = task.fresh_model(3)
    masks = some(start)
    early = rows_of(task, masks, samples=2)["method", "data order"]
    late = rows_of(task, masks, samples=2, start_step=36)["method", "data order"]
    assert late["distance"] < early["distance"]


def test_one_data_order_is_not_enough(tiny_task):
    with pytest.raises(InputError, match="samples: got 1"):
        rows_of(tiny_task(), samples=1)
