"""Experts of a mixture that are one array, as transformers 5 holds them.

A layer's experts are one parameter (experts, outputs, inputs), or (experts, inputs, outputs)
where the module that holds it has `is_transposed`. Each expert multiplies its tokens with its own
slice, which so is a weight matrix like that of a linear layer. No model is known by name: it is
an array of three dimensions in a module that says how many experts it has, or that is named after
experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def are_experts(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter of a module is the matrices of its experts."""
    if isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear):
        return False
    if parameter.ndim != 3 or min(parameter.shape[1:]) < 2 or not parameter.is_floating_point():
        return False
    named = f"{type(module).__name__}.{name.rpartition('.')[2]}".lower()
    counts = (v for n, v in vars(module).items() if "expert" in n and isinstance(v, int))
    return "expert" in named or parameter.shape[0] in counts


def expert_matrices(experts: Tensor, *, inputs_first: bool) -> Tensor:
    """A view (experts, outputs, inputs) of what is stored so, or with inputs first."""
    return experts.mT if inputs_first else experts


def says_layout(module: nn.Module) -> bool:
    """Whether a module of experts says which dimension is the inputs."""
    return isinstance(getattr(module, "is_transposed", None), bool)


def inputs_come_first(module: nn.Module) -> bool:
    """Whether its arrays are (experts, inputs, outputs); if it does not say so, they are not."""
    return getattr(module, "is_transposed", None) is True


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Experts of transformers run in a loop, each a plain product of matrices, not as one kernel.

    Which kernel a model is configured with (`experts_implementation`) is put back.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation") and any(
            are_experts(module, n, p) for n, p in module.named_parameters(recurse=False)
        ):
            configs[id(config)] = config
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = {"": "eager"}  # of this one, not of those inside it
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = {"": implementation}
