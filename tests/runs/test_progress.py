"""Trackers: what a run tells arrives there, under the name of the step it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateurs.runs.progress import Tracker
from secateurs.runs.recipe import Recipe
from secateurs.runs.run import Run

RECIPE = """
model: zoo:mlp?hidden=16
data: digits
threads: 1
latency: false
training: {steps: 6}
stages:
  - train
  - prune: {method: global-mp, budget: sparsity=0.5, recover: false}
"""


def test_losses_of_a_run_reach_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = Recipe.parse(RECIPE)
    run = Run.create(recipe, tmp_path / "run")
    tracker = Tracker("tensorboard", "run", tmp_path / "tracking", recipe.as_dict())
    outcome = run.execute([tracker])
    tracker.close()
    told = EventAccumulator(str(next(tmp_path.glob("tracking/run/events.*"))))
    told.Reload()
    losses = told.Scalars("0-train/train/loss")
    assert [value.step for value in losses] == list(range(6))
    assert all(value.value > 0 for value in losses)
    [accuracy] = told.Scalars("finished/accuracy")
    assert accuracy.value == pytest.approx(outcome.metrics_after["accuracy"])
