"""What a traced model costs, as a polynomial in how many units its axes have.

A dimension is a product of axes, an axis maybe a sum; so the elements of a tensor and the
multiply-accumulates of an operation are sums of products of axis sizes, and what the axes in
question do not touch is a constant. The coefficients come from the trace; no layer is named.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from secateurs.parts.posynomial import Posynomial, Term
from secateurs.structure.axes import Structure
from secateurs.structure.dimensions import Axis, Dim, leaves, size_of

CostKind = Literal["params", "macs"]


def cost_polynomial(structure: Structure, kind: CostKind, axes: Sequence[Axis]) -> Posynomial:
    """Parameters, or MACs for the traced inputs, as a function of the counts of `axes`."""
    return polynomial(structure.cost_dims(kind), axes)


def polynomial(dims: Iterable[Dim], axes: Sequence[Axis]) -> Posynomial:
    """The sum of the sizes of `dims` as a function of the counts of `axes`, all others whole.

    Raises:
        InputError: the sizes sum to nothing.
    """
    place = {axis: number for number, axis in enumerate(axes)}
    total: Counter[Term] = Counter()
    for dim in dims:
        total.update(size_terms(dim, place))
    return Posynomial.of_terms(total, len(axes))


def size_terms(dim: Dim, place: Mapping[Axis, int]) -> Counter[Term]:
    """The size of a dimension: coefficients by product of the axes that have a number."""
    product: Counter[Term] = Counter({(): 1})
    for leaf in leaves(dim):
        parts = leaf.parts
        own: Counter[Term] = Counter()
        if parts is None:
            number = place.get(leaf)
            own = Counter({(): leaf.size} if number is None else {(number,): 1})
        else:
            for part in parts:
                own.update(size_terms(part, place))
        multiplied: Counter[Term] = Counter()
        for left, a in product.items():
            for right, b in own.items():
                multiplied[tuple(sorted(left + right))] += a * b
        product = multiplied
    return product


def log_share(dim: Dim, place: Mapping[Axis, int]) -> dict[int, float]:
    """How log of the share of a dimension that stays depends on log r of the numbered axes.

    A product adds the logarithms of its axes. Of a sum (a concatenation) the share is a mean of
    those of its parts, whose logarithm is not concave in log r; it is replaced by the mean of
    their logarithms. That is never more, and the same where all parts are narrowed alike.
    """
    found: dict[int, float] = defaultdict(float)
    for leaf in leaves(dim):
        parts = leaf.parts
        if parts is None:
            if leaf in place:
                found[place[leaf]] += 1.0
            continue
        for part in parts:
            for number, exponent in log_share(part, place).items():
                found[number] += exponent * size_of(part) / leaf.size
    return dict(found)
