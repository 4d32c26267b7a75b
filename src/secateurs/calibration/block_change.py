"""How far a block moves the hidden state of every token, measured while the block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateurs.errors import InputError, described, require, unknown

Metric = Literal["angular", "cosine", "mse", "mae", "constant"]


def token_change(before: Tensor, after: Tensor, metric: Metric = "angular") -> Tensor:
    """How far a block moves every token, over the last dimension, in float64.

    Angular: arccos(cos) / π in [0, 1]; a token of zeros counts as cos 0.5, as in the code.
    """
    before, after = before.double(), after.double()
    match metric:
        case "mse":
            return (after - before).square().mean(-1)
        case "mae":
            return (after - before).abs().mean(-1)
        case "constant":
            return torch.zeros(before.shape[:-1], dtype=torch.float64)
        case "angular" | "cosine":
            norms = before.norm(dim=-1) * after.norm(dim=-1)
            cosine = (before * after).sum(-1) / norms
            cosine = torch.where(norms == 0, 0.5, cosine).clamp(-1, 1)
            return 1 - cosine if metric == "cosine" else cosine.arccos() / torch.pi
    raise unknown("metric", metric, get_args(Metric))


@dataclass
class Change:
    """The running mean of `token_change` over what a block is called with."""

    block: str
    metric: Metric
    total: float = 0.0
    tokens: int = 0

    @contextmanager
    def of(self, block: nn.Module) -> Iterator[None]:
        """Listen to a block."""
        handle = block.register_forward_hook(self._take, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @property
    def mean(self) -> float:
        return self.total / max(self.tokens, 1)

    def _take(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.metric == "constant":
            return
        before, after = stream_in((args, kwargs)), stream_in(output)
        shapes = described(f"{tuple(before.shape)} -> {tuple(after.shape)}")
        same = before.shape == after.shape
        require(same, self.block, shapes, "a block that keeps the shape, or metric=constant")
        change = token_change(before, after, self.metric)
        self.total += float(change.sum())
        self.tokens += change.numel()


def stream_in(values: Any) -> Tensor:
    """The hidden state among what a block is given or gives: its first tensor of numbers."""
    tensors = (v for v in tree_leaves(values) if isinstance(v, Tensor) and v.is_floating_point())
    found = next(tensors, None)
    if found is None:
        raise InputError("model", described("a block without hidden states"), "one with them")
    return found
