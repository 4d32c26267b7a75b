"""A base with deltas merged in, as a folder that is a model again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.deploy.delta_file import SparseDelta, merge
from secateurs.errors import InputError, described
from secateurs.outcome import WEIGHTS, Outcome, check_output_folder, load_weights, save
from secateurs.state import write_tensors


def save_merged(
    base: nn.Module,
    deltas: Sequence[SparseDelta],
    folder: str | Path,
    source: dict[str, Any],
) -> Path:
    """Merge deltas into a base, and write what comes out.

    The folder appears whole or not at all. It is one as `secateurs.save` writes it, whose path is
    a model's name from then on. A model of transformers is also a folder ``transformers``, for
    plain `from_pretrained`; where the deltas add tokens to it there are that folder and the
    weights.

    Args:
        base: the module; it takes the merged weights.
        source: specifications from which the base can be made again.

    Raises:
        InputError: a folder that is not empty, deltas that cannot be merged (`merge`), or
            weights that the base has no place for (the first is named).
    """
    target = Path(folder)
    check_output_folder(target)
    state = merge(base.state_dict(), deltas)
    grown = _with_added_tokens(base, state)
    load_weights(base, state)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if grown:
            partial.mkdir()
            write_tensors(partial / WEIGHTS, state, {"format": "pt"})
        else:
            save(Outcome(base.eval(), source=source), partial)
        if hasattr(base, "save_pretrained"):
            hub: Any = base
            hub.save_pretrained(partial / "transformers")
        if target.exists():
            target.rmdir()
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _with_added_tokens(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Give a model of transformers the embeddings that the state has; whether any were added."""
    own = model.state_dict()
    longer = {n: len(t) for n, t in state.items() if n in own and t.ndim and len(t) > len(own[n])}
    if not longer:
        return False
    if not hasattr(model, "resize_token_embeddings") or len(set(longer.values())) > 1:
        raise InputError(
            "delta",
            described(f"one that adds rows to {next(iter(longer))}"),
            "for this base, deltas without added rows",
        )
    hub: Any = model
    with torch.random.fork_rng(devices=[]):
        # new rows are drawn, and then overwritten by those of the delta
        hub.resize_token_embeddings(next(iter(longer.values())), mean_resizing=False)
    return True
