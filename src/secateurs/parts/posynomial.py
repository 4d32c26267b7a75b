"""Costs as functions of widths: sums of products with coefficients above zero.

A convolution between n_in and n_out channels costs a · n_in · n_out, its bias n_out, a depthwise
one a · n, and what cannot change a constant. So parameters and multiply-accumulates are

    f(x) = Σ_i a_i · Π_v x_v^{e_iv},      a_i > 0, e_iv a whole number, 0 or more.

It is differentiable in x, so a penalty on it can train gates; and log f(exp u) is convex in u,
so widths can be found under a limit on it (`secateurs.parts.width_program`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateurs.errors import InputError, described, require

Term = tuple[int, ...]
"""The numbers of the variables of a product, rising, each as often as it is a factor."""


@dataclass(frozen=True)
class Posynomial:
    """Σ_i coefficients_i · Π_v x_v^{exponents_iv}.

    Attributes:
        coefficients: (terms,), float64.
        exponents: (terms, variables), float64 for speed, whole numbers.
    """

    coefficients: np.ndarray
    exponents: np.ndarray

    @staticmethod
    def of_terms(terms: Mapping[Term, float], variables: int) -> Posynomial:
        """From coefficients by product; the empty product is the constant.

        Raises:
            InputError: a coefficient that is negative or not finite, or none above zero.
        """
        for term, value in terms.items():
            require(0 <= value < float("inf"), f"term {term}", value, "a finite number, 0 or more")
        found = {t: a for t, a in sorted(terms.items()) if a > 0}
        if not found:
            raise InputError("terms", described("none above zero"), "at least one")
        exponents = np.zeros((len(found), variables))
        for row, term in enumerate(found):
            for variable in term:
                exponents[row, variable] += 1
        return Posynomial(np.array(list(found.values()), dtype=float), exponents)

    def at(self, x: np.ndarray) -> float:
        """The value at widths; exact for whole numbers up to 2⁵³."""
        return float(self.coefficients @ np.prod(x**self.exponents, axis=1))

    def __call__(self, x: Tensor) -> Tensor:
        """The same for a tensor (variables,), with its graph."""
        exponents = torch.as_tensor(self.exponents, dtype=x.dtype, device=x.device)
        coefficients = torch.as_tensor(self.coefficients, dtype=x.dtype, device=x.device)
        return coefficients @ x.pow(exponents).prod(1)

    def log_at(self, u: np.ndarray) -> tuple[float, np.ndarray]:
        """log f(exp u) and its gradient in u, which is convex in u."""
        powers = np.log(self.coefficients) + self.exponents @ u
        largest = powers.max()
        shares = np.exp(powers - largest)
        total = shares.sum()
        return float(largest + np.log(total)), self.exponents.T @ (shares / total)

    def scaled(self, widths: np.ndarray) -> Posynomial:
        """The same function of shares: g(r) = f(r · widths)."""
        return Posynomial(
            self.coefficients * np.prod(widths**self.exponents, axis=1), self.exponents
        )
