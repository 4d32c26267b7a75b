"""Removing what a choice leaves out: the model, its record and its promise go into the outcome.

Or giving axes other sizes altogether, larger ones too, for models that are drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from secateurs.outcome import Outcome, Promise
from secateurs.parts.budgets import Budget
from secateurs.structure.axes import Structure
from secateurs.structure.choice import Choice
from secateurs.structure.cost import StructureCost
from secateurs.structure.dimensions import Axis, Kept
from secateurs.structure.persistence import plan_of
from secateurs.structure.surgery import Shortened, resize, shorten


def remove(outcome: Outcome, structure: Structure, choice: Choice) -> None:
    """Shorten the traced model to the chosen units; the structure is of no more use.

    The outcome gets the smaller model, the plan by which it is made again, notes, and a table of
    the axes, which after several removals tells of all of them.
    """
    rows = axes_table(structure, choice.kept)
    _record(outcome, structure, choice.kept, shorten(structure.trace, choice.kept), rows)


def remake(outcome: Outcome, structure: Structure, counts: Mapping[Axis, int]) -> None:
    """Give axes of the traced model so many units: the first, or more (`surgery.resize`).

    The outcome gets the same as from `remove`.
    """
    units = {a: np.arange(n) % a.size for a, n in counts.items() if n != a.size}
    rows = axes_table(structure, units)
    _record(outcome, structure, units, resize(structure.trace, counts), rows)


def _record(
    outcome: Outcome,
    structure: Structure,
    kept: Kept,
    made: Shortened,
    rows: list[dict[str, Any]],
) -> None:
    outcome.surgery.append(plan_of(structure, kept, made))
    outcome.model = made.model
    outcome.notes += made.notes
    outcome.tables["axes"] = since(outcome.tables.get("axes", []), rows)


def axes_table(structure: Structure, kept: Kept) -> list[dict[str, Any]]:
    """Units before and after, an axis a row."""
    return [
        {
            "axis": group.name,
            "role": group.role,
            "kept": len(kept.get(group.axis, range(group.size))),
            "total": group.size,
        }
        for group in structure.free
    ]


def since(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with the totals of an earlier table, and its axes that are not there any more.

    An axis that was shortened to one unit is none.
    """
    now = {row["axis"]: row for row in rows}
    first = {row["axis"]: row["total"] for row in before}
    gone = [row for row in before if row["axis"] not in now]
    return [{**row, "total": first.get(row["axis"], row["total"])} for row in rows] + gone


def promise_of(budget: Budget, cost: StructureCost, choice: Choice) -> Promise:
    """The budget as asked and as reached; the tolerance is what the last unit cost."""
    reached = cost.reached(choice.cost)
    last = abs(cost.reached(choice.cost_before_last) - reached)
    return Promise(budget.kind, cost.asked, reached, max(last, 1e-12))
