"""Which parameters a weight-pruning method may touch.

The weights of convolutions, linear layers, recurrent layers, attention projections and of experts
that are one array (`secateurs.parts.experts`); never biases, normalisation parameters or
embeddings. A tensor that is used twice is listed once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from secateurs.errors import InputError, described
from secateurs.parts.experts import are_experts
from secateurs.parts.peft_layers import refuse_adapters

_WEIGHTED = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable_parameters(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, nn.Parameter]:
    """The prunable weights of `model` by qualified name, in registration order.

    Args:
        include: regular expressions; when given, only names that match one are listed, and
            tensors shared with an embedding may be listed too.
        exclude: regular expressions of names to leave out.

    Raises:
        InputError: a pattern matches nothing, nothing is left to prune, a weight has NaN or Inf
            (the layer is named), or the model has adapters of peft.
    """
    refuse_adapters(model)
    embedded = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        for p in m.parameters(recurse=False)
    }
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not _is_weight(module, local, parameter):
                continue
            if id(parameter) in embedded and not include:
                continue
            seen.add(id(parameter))
            found[f"{prefix}.{local}" if prefix else local] = parameter
    chosen = _filtered(found, include, exclude)
    if not chosen:
        raise InputError(
            "model",
            described(f"{type(model).__name__} with nothing to prune"),
            "a model with convolution, linear, recurrent or attention weights left to prune",
        )
    check_finite(chosen)
    return chosen


def _is_weight(module: nn.Module, local: str, parameter: nn.Parameter) -> bool:
    if parameter.ndim < 2 or not parameter.is_floating_point():
        return False
    if isinstance(module, _WEIGHTED):
        return local == "weight"
    if isinstance(module, nn.MultiheadAttention):
        return local in _ATTENTION_WEIGHTS
    if isinstance(module, nn.RNNBase):
        return local.startswith("weight_")
    # transformers' Conv1D (GPT-2): a linear layer with the weight stored transposed
    if type(module).__name__ == "Conv1D":
        return local == "weight"
    return are_experts(module, local, parameter)


def _filtered(
    found: dict[str, nn.Parameter], include: Sequence[str], exclude: Sequence[str]
) -> dict[str, nn.Parameter]:
    chosen = found
    if include:
        chosen = {n: p for n, p in found.items() if matches_any(n, include)}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(matches_any(name, [pattern]) for name in found):
                raise InputError(
                    argument, pattern, "a regular expression matching one of " + ", ".join(found)
                )
    return {n: p for n, p in chosen.items() if not matches_any(n, exclude)}


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Whether any regular expression is found in `name`."""
    for pattern in patterns:
        try:
            if re.search(pattern, name):
                return True
        except re.error as error:
            raise InputError("pattern", pattern, f"a regular expression ({error})") from None
    return False


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise `InputError` naming the first tensor with a NaN or an Inf; without memory none has."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        # one pass and no temporary: NaN and Inf both survive a sum, an overflow is re-checked
        if not torch.isfinite(tensor.detach().sum()) and not torch.isfinite(tensor).all():
            kind = "NaN" if torch.isnan(tensor).any() else "Inf"
            raise InputError(name, described(f"{kind} in the weights"), "finite weights")


def sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of elements by name."""
    return {name: tensor.numel() for name, tensor in tensors.items()}


def fixed_parameters(model: nn.Module, prunable: Mapping[str, Tensor]) -> int:
    """Parameters of the model that are not in `prunable`, tied tensors counted once."""
    listed = {id(p) for p in prunable.values()}
    return sum(p.numel() for p in model.parameters() if id(p) not in listed)
