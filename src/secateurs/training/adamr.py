"""AdamR: Adam whose decay pulls towards the weights that the training began with.

Paper: "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models", arXiv
2410.09344: fine-tuned with it, a model stays near its base, and its delta can be pruned. A step,
after m and v of all parameters have been brought up to date:

    v̄ = sqrt( mean of v̂ over all entries of all parameters ),   v̂ = v / (1 − β₂ᵗ)
    θ ← θ − lr λ/v̄ (θ − θ_pre)             (l1: the sign of the difference)
    θ ← θ − lr/(1 − β₁ᵗ) · m/(√v̂ + ε)

In the authors' code θ_pre is a list in the order of the parameters of one group, so that with
several groups the wrong tensors meet; here it is keyed by parameter and part of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from secateurs.errors import InputError, described, require


class AdamR(torch.optim.Optimizer):
    """Adam with decay towards a reference.

    Args:
        params: parameters, or groups of them.
        reference: θ_pre by parameter, such as ``{p: base[n] for n, p in named_parameters()}``;
            None takes the values that the parameters have now.
        lr, betas, eps: of Adam.
        weight_decay: λ; 0 leaves Adam.
        l1: decay by the sign of the difference.

    Raises:
        InputError: a parameter without a reference or with one of another shape, a reference of
            no parameter, or a number out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        reference: Mapping[Tensor, Tensor] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        l1: bool = False,
    ) -> None:
        require(lr > 0, "lr", lr, "a rate above 0")
        require(all(0 <= b < 1 for b in betas), "betas", betas, "two values in [0, 1)")
        require(eps >= 0, "eps", eps, "0 or more")
        require(weight_decay >= 0, "weight_decay", weight_decay, "0 or more")
        self._given = None if reference is None else dict(reference)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "l1": l1}
        super().__init__(params, defaults)
        if self._given is not None:
            own = {p for group in self.param_groups for p in group["params"]}
            strangers = sum(p not in own for p in self._given)
            shown = described(f"{strangers} tensors that are not optimized")
            require(not strangers, "reference", shown, "the optimizer's own parameters as keys")
        self._given = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; parameters without a given reference are held where they are now."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["reference"] = self._reference_of(parameter)

    def _reference_of(self, parameter: Tensor) -> Tensor:
        if self._given is None:
            return parameter.detach().clone()
        if parameter not in self._given:
            shown = described(f"none for a parameter of shape {tuple(parameter.shape)}")
            raise InputError("reference", shown, "a tensor for every parameter")
        reference = self._given[parameter]
        if reference.shape != parameter.shape:
            raise InputError(
                "reference",
                described(f"shape {tuple(reference.shape)}"),
                f"shape {tuple(parameter.shape)}, the parameter's",
            )
        return reference.detach().to(parameter, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not moved:
            return loss
        for parameter, group in moved:
            self._take_in(parameter, *group["betas"])
        scale = self._scale(moved)
        for parameter, group in moved:
            self._decay(parameter, group, scale)
            self._move(parameter, group)
        return loss

    def _take_in(self, parameter: Tensor, first: float, second: float) -> None:
        """m and v of one parameter."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise InputError("gradient", described("a sparse tensor"), "dense gradients")
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)

    def _unbiased_square(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """v̂ of one parameter."""
        state = self.state[parameter]
        unbiased: Tensor = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"].item())
        return unbiased

    def _scale(self, moved: list[tuple[Tensor, dict[str, Any]]]) -> float:
        """v̄, the root of the mean of v̂ over everything that moves; 1 where that is 0."""
        total = sum(float(self._unbiased_square(p, g).sum(dtype=torch.float64)) for p, g in moved)
        mean = total / sum(p.numel() for p, _ in moved)
        return mean**0.5 if mean > 0 else 1.0

    def _decay(self, parameter: Tensor, group: dict[str, Any], scale: float) -> None:
        if not group["weight_decay"]:
            return
        away = parameter - self.state[parameter]["reference"]
        pull = away.sign() if group["l1"] else away
        parameter.sub_(pull, alpha=group["lr"] * group["weight_decay"] / scale)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        rate = group["lr"] / (1 - group["betas"][0] ** state["step"].item())
        root = self._unbiased_square(parameter, group).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], root, value=-rate)
