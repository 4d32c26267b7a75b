"""Running statistics of batch norm as vectors, averaged over clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from secateurs.errors import described, require


def tracked_norms(model: nn.Module) -> dict[str, _NormBase]:
    """Layers that keep running means and variances, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    }


def statistics_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    """All running means and all running variances, each (channels,), end to end."""
    layers = tracked_norms(model).values()
    means = [layer.running_mean for layer in layers if layer.running_mean is not None]
    variances = [layer.running_var for layer in layers if layer.running_var is not None]
    require(bool(means), "model", described("no running statistics"), "a model with batch norm")
    return torch.cat(means).detach().cpu(), torch.cat(variances).detach().cpu()


@torch.no_grad()
def set_statistics(model: nn.Module, means: Tensor, variances: Tensor) -> None:
    """The inverse of `statistics_of`, in place."""
    begin = 0
    for layer in tracked_norms(model).values():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        end = begin + layer.num_features
        layer.running_mean.copy_(means[begin:end])
        layer.running_var.copy_(variances[begin:end])
        begin = end
    shown = described(f"{means.numel()} channels")
    require(begin == means.numel(), "statistics", shown, f"{begin}, the model's")


def aggregate_statistics(
    replies: Sequence[Mapping[str, Tensor]], weights: Sequence[float], *, pooled: bool = False
) -> tuple[Tensor, Tensor]:
    """Means and variances over clients, summed in double precision in the order given.

    μ = Σ w_k μ_k and σ² = Σ w_k σ_k², with w_k the client's share of the samples. `pooled` adds
    Σ w_k (μ_k − μ)², so that σ² is the variance over all clients' samples together.

    Args:
        replies: ``means`` and ``variances`` of each client, of one shape.

    Raises:
        InputError: the clients' statistics have different shapes.
    """
    shapes = {tuple(reply[key].shape) for reply in replies for key in ("means", "variances")}
    shown = described(f"shapes {sorted(shapes)}")
    require(len(shapes) == 1, "statistics", shown, "one shape: the same norms at every client")
    shares = [weight / sum(weights) for weight in weights]
    means = torch.stack([r["means"].double() * w for r, w in zip(replies, shares, strict=True)])
    mean = means.sum(0)
    spread = torch.zeros_like(mean)
    for reply, share in zip(replies, shares, strict=True):
        spread += share * reply["variances"].double()
        if pooled:
            spread += share * (reply["means"].double() - mean).square()
    dtype = replies[0]["means"].dtype
    return mean.to(dtype), spread.to(dtype)
