"""Parameters that weight decay leaves alone: gates, thresholds, whatever has a scale of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def spare_from_decay(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Move `parameters` of an optimizer into groups like their own, without weight decay.

    Parameters that the optimizer does not hold are passed over.
    """
    spared = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in spared]
        if not moved or not group.get("weight_decay"):
            continue
        group["params"] = [p for p in group["params"] if id(p) not in spared]
        settings = {k: v for k, v in group.items() if k != "params"}
        optimizer.add_param_group({**settings, "params": moved, "weight_decay": 0.0})
