"""The tables of the terminal."""

import io

from rich.console import Console

from secateurs.report.console import (
    cost_table,
    layers_table,
    leaderboard_table,
    methods_table,
    outcome_table,
)
from secateurs.report.headline import ENGINES
from secateurs.report.leaderboard import leaderboard, row_of

from .conftest import changed


def shown(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


def test_one_outcome(outcome):
    text = shown(outcome_table([outcome]))
    assert "accuracy 98.40 % 97.80 % −0.60 points" in text
    assert "not zero 1.10k 200 5.5× less" in text
    assert "latency measured 0.21 ms ± 0.01 0.21 ms ± 0.01 1× as fast" in text
    assert "zeros in dense tensors are still multiplied" in text


def test_engines_that_were_timed_have_a_row(outcome, timed):
    text = shown(outcome_table([changed(outcome, tables={ENGINES: timed})]))
    assert "in onnxruntime 0.21 ms ± 0.01 0.105 ms ± 0.005 2× as fast" in text
    assert "compile" not in text


def test_an_outcome_without_measurements(bare):
    assert "weights 1k 100 10× less" in shown(outcome_table([bare]))
    assert "weights 0 0 same" in shown(outcome_table([changed(bare, layers=[])]))


def test_several_outcomes_and_the_leaderboard(many, bare):
    text = shown(outcome_table([*many, bare]), 100)
    assert text.count("small-dense") == 3
    text = shown(leaderboard_table(leaderboard([row_of(o) for o in many])))
    assert "1 global-mp 97.2 % ± 0.5 18.2 % 100 1.02 kB 0.210 ms" in text
    assert "3 seeds" in text
    assert shown(leaderboard_table([]))


def test_names_are_no_markup(outcome):
    assert "[red]x[/red]" in shown(outcome_table([changed(outcome, label="[red]x[/red]")]))


def test_methods_layers_and_costs(outcome):
    rows = [
        {"name": "gmp", "summary": "Cubic ramp.", "paper": "To prune [x]", "budgets": ["sparsity"],
         "needs": ["training"]},
        {"name": "random", "summary": "Random.", "paper": None, "budgets": [], "needs": []},
    ]  # fmt: skip
    assert "gmp Cubic ramp. sparsity training To prune [x]" in shown(methods_table(rows))
    row = {"name": "0.weight", "shape": [16, 8], "weights": 128, "kept": 64, "macs": 128}
    assert "0.weight 16 × 8 128 50.0 % 128" in shown(layers_table([row]))
    text = shown(cost_table(outcome["after"]))
    assert "parameters 1.10k not zero 200 MACs a sample 1k" in text
    assert "MACs of 4 samples 1k" in shown(cost_table({**outcome["before"], "batch": 4}))
