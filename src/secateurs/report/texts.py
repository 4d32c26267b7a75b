"""Texts of samples, from a column that was carried along with the embeddings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from secateurs.errors import unknown
from secateurs.selection.columns import Column, is_arrow
from secateurs.selection.embeddings import Embeddings

USUAL = "text"
"""Column that is shown where nobody names one."""
LONGEST = 280
"""Characters that are shown of a text."""


def check_texts(source: Embeddings, column: str | None) -> None:
    """Raise `InputError` for a column that the embeddings do not have."""
    if column is not None and column not in source.columns:
        raise unknown("text", column, source.columns)


def text_of(source: Embeddings, column: str | None) -> Callable[[int], str]:
    """A function from a row to the beginning of its text; empty where rows have none.

    Args:
        column: None takes ``text``, where there is such a column.
    """
    name = column or USUAL
    if name not in source.columns:
        return lambda row: ""
    latest: dict[int, Column] = {}

    def text(row: int) -> str:
        number = int(np.searchsorted(source.offsets, row, side="right")) - 1
        if number not in latest:  # one shard at a time is held
            latest.clear()
            latest[number] = source.narrow(number).columns[name]
        value = latest[number][row - int(source.offsets[number])]
        value = value.as_py() if is_arrow(value) else value
        found = "" if value is None else str(value)
        return found if len(found) <= LONGEST else found[: LONGEST - 1].rstrip() + "…"

    return text
