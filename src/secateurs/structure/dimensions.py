"""The algebra of dimensions: what a dimension of size 768 is made of.

A dimension is an ordered product of axes, outermost first, as in row-major memory: 768 may be
one axis, or 12 heads ⊗ 64. An axis is a node of a union-find forest and is one of three things:

 - plain: it can be shortened by itself, unless it is frozen;
 - a product ``factors``: it was refined, because a reshape or another dimension asked for it;
 - a sum ``parts`` ⊕ of dimensions, one behind the other: a concatenation, or what a split cuts.

`unify` states that two dimensions run over the same units in the same order, `reshape` re-cuts a
product, `cut` and `concatenate` are the sums. All of them only ever refine and merge, so what was
said before stays true. No tensors here: sizes and indices only.

A frozen axis is never shortened, so all that matters of it is its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from math import prod

import numpy as np

SEGMENTS = 200
"""Sums of more parts are not aligned: two that share a part, shifted, would be cut to crumbs."""

EMPTY = "a tensor without elements"

_numbers = count()


class Mismatch(Exception):  # noqa: N818
    """Two dimensions that cannot be laid side by side; the message shows both."""


@dataclass(eq=False, slots=True)
class Axis:
    """An axis: `size` units that stand or fall one by one.

    Attributes:
        frozen: why it must keep its size; None while it may be shortened.
        over: operations that compute a statistic over it (means, norms, softmax), so that
            removing a unit changes what the others see.
    """

    size: int
    frozen: str | None = None
    over: tuple[str, ...] = ()
    number: int = field(default_factory=lambda: next(_numbers))
    _same: Axis | None = None
    _factors: Dim | None = None
    _parts: tuple[Dim, ...] | None = None

    def __repr__(self) -> str:
        root = self.root
        mark = "!" if root.frozen else ""
        if root._factors is not None:
            return show(root._factors)
        if root._parts is not None:
            return "(" + " ⊕ ".join(show(p) for p in root._parts) + ")"
        return f"{root.size}{mark}"

    @property
    def root(self) -> Axis:
        """The axis that stands for all it was unified with."""
        root = self
        while root._same is not None:
            root = root._same
        node = self
        while node._same is not None:
            node._same, node = root, node._same
        return root

    @property
    def parts(self) -> tuple[Dim, ...] | None:
        """Its segments, if it is a sum; parts that are sums themselves are laid out."""
        root = self.root
        if root._parts is None:
            return None
        laid: list[Dim] = []
        for part in root._parts:
            found = leaves(part)
            inner = found[0].parts if len(found) == 1 else None
            laid += inner if inner is not None else [found]
        root._parts = tuple(laid)
        return root._parts


Dim = tuple[Axis, ...]
"""A product of axes, outermost first; the empty product is a dimension of size 1."""


def axis(size: int, frozen: str | None = None, over: tuple[str, ...] = ()) -> Dim:
    """A dimension of one new axis; of none for size 1."""
    return () if size == 1 else (Axis(size, frozen, over),)


def size_of(dim: Dim) -> int:
    """Number of units."""
    return prod(a.size for a in dim)


def leaves(dim: Dim) -> Dim:
    """The same dimension as a product of axes that are not products themselves."""
    found: list[Axis] = []
    for a in dim:
        root = a.root
        if root._factors is None:
            found.append(root)
        else:
            root._factors = leaves(root._factors)
            found += root._factors
    return tuple(found)


def plain_axes(dim: Dim) -> Iterator[Axis]:
    """The plain axes that a dimension depends on, through products and sums."""
    for leaf in leaves(dim):
        if (parts := leaf.parts) is None:
            yield leaf
        else:
            for part in parts:
                yield from plain_axes(part)


def is_frozen(dim: Dim) -> bool:
    """Whether nothing in it can be shortened."""
    return all(a.frozen is not None for a in plain_axes(dim))


def freeze(dim: Dim, why: str) -> None:
    """Keep every axis of `dim` as it is; the first reason is remembered."""
    for a in plain_axes(dim):
        a.frozen = a.frozen or why


def _why(dim: Dim) -> str:
    """The first reason why a frozen dimension is frozen; single units are, as any constant is."""
    return next((a.frozen for a in plain_axes(dim) if a.frozen), "a constant")


def mark_over(dim: Dim, operation: str) -> None:
    """Note that `operation` computes a statistic over `dim`."""
    for a in plain_axes(dim):
        if operation not in a.over:
            a.over += (operation,)


def show(dim: Dim) -> str:
    """A dimension as people read it: ``12 ⊗ 64``; ``!`` marks frozen axes."""
    return " ⊗ ".join(repr(a) for a in leaves(dim)) or "1"


def unify(left: Dim, right: Dim) -> None:
    """Let two dimensions be one: refine both until they are the same product, and merge.

    Raises:
        Mismatch: the sizes differ, or cannot be laid side by side.
    """
    if size_of(left) != size_of(right):
        raise Mismatch(f"{show(left)} against {show(right)}")
    if size_of(left) == 0:
        return
    xs, ys = _stack(left), _stack(right)
    while xs or ys:
        x, y = _pop(xs), _pop(ys)
        if x.size == y.size:
            _merge(x, y)
            continue
        if x.size > y.size:
            x, y, xs, ys = y, x, ys, xs
        outer, inner = _split(y, x.size, ys)
        xs.append(x)
        ys += reversed(outer + inner)


def reshape(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """The dimensions of the same elements in the same order, cut to other sizes.

    Raises:
        Mismatch: a size would cut through an axis at no whole unit.
    """
    whole = tuple(a for dim in dims for a in dim)
    if size_of(whole) == 0:
        return [axis(n, EMPTY) for n in sizes]
    stack = _stack(whole)
    cut_to = []
    for size in sizes:
        taken: list[Axis] = []
        missing = size
        while missing > 1:
            if not stack:
                raise Mismatch(f"{show(tuple(taken))} for a size of {size}")
            a = _pop(stack)
            if missing % a.size == 0:
                taken.append(a)
                missing //= a.size
            else:
                outer, inner = _split(a, missing, stack)
                stack += reversed(inner)
                taken += outer
                missing //= size_of(outer)
        cut_to.append(tuple(taken))
    if stack:
        raise Mismatch(f"{show(tuple(stack))} left over for sizes {list(sizes)}")
    return cut_to


def concatenate(dims: Sequence[Dim]) -> Dim:
    """Dimensions one behind the other."""
    parts = [d for d in dims if size_of(d)]
    if len(parts) == 1:
        return parts[0]
    whole = Axis(sum(size_of(d) for d in parts))
    whole._parts = tuple(leaves(d) for d in parts)
    return (whole,)


def cut(dim: Dim, places: Sequence[int]) -> list[Dim]:
    """The segments between `places`, which rise strictly inside ``0..size``.

    Raises:
        Mismatch: a place lies inside a unit of the outermost axis.
    """
    segments, rest, done = [], dim, 0
    for place in places:
        left, rest = _cut_once(rest, place - done)
        segments.append(left)
        done = place
    return [*segments, rest]


def _stack(dim: Dim) -> list[Axis]:
    """Leaves, last first; neighbours that are frozen become one, for only their size matters."""
    stack: list[Axis] = []
    for a in reversed(leaves(dim)):
        if a.size == 1:
            continue
        if stack and is_frozen((a,)) and is_frozen((stack[-1],)):
            stack[-1] = Axis(a.size * stack[-1].size, _why((a,)))
        else:
            stack.append(a)
    return stack


def _pop(stack: list[Axis]) -> Axis:
    """The outermost leaf left; what was refined meanwhile is laid out first."""
    while stack:
        found = leaves((stack.pop(),))
        if len(found) == 1:
            return found[0]
        stack += reversed(found)
    raise Mismatch("dimensions of different sizes")


def _split(a: Axis, outer: int, rest: list[Axis]) -> tuple[Dim, Dim]:
    """Refine a leaf into `outer` ⊗ the rest of its size."""
    if a.size % outer:
        if a.frozen is not None and rest and is_frozen((rest[-1],)):
            rest[-1] = Axis(a.size * rest[-1].size, a.frozen)
            return (), ()
        raise Mismatch(f"{a!r} cut into {outer} equal pieces")
    inner = a.size // outer
    if a.parts is not None:
        return _split_sum(a, outer, inner)
    head, tail = (axis(n, a.frozen, a.over) for n in (outer, inner))
    a._factors = head + tail
    return head, tail


def _split_sum(a: Axis, outer: int, inner: int) -> tuple[Dim, Dim]:
    """Refine a sum: into whole units of `inner` where its parts allow, else into equal groups."""
    parts = a.parts
    assert parts is not None
    if all(size_of(part) % inner == 0 for part in parts):
        heads, tails = [], []
        for part in parts:
            head, tail = reshape([part], [size_of(part) // inner, inner])
            heads.append(head)
            tails.append(tail)
        for tail in tails[1:]:
            unify(tails[0], tail)
        head = concatenate(heads)
        a._parts, a._factors = None, leaves(head + tails[0])
        return head, tails[0]
    groups = cut((a,), [inner * k for k in range(1, outer)])
    for group in groups[1:]:
        unify(groups[0], group)
    number = Axis(outer, f"{outer} equal parts of one tensor")
    a._parts, a._factors = None, leaves((number, *groups[0]))
    return (number,), groups[0]


def _merge(x: Axis, y: Axis) -> None:
    """Make two leaves of one size the same axis; beside a frozen one it is enough to freeze."""
    for one, other in ((x, y), (y, x)):
        if is_frozen((one,)):
            freeze((other,), _why((one,)))
            return
    if x.parts is not None and y.parts is not None:
        _align(x, y)
    x, y = x.root, y.root
    if x is y:
        return
    if x._factors is not None or y._factors is not None:  # aligning the sums refined them
        unify((x,), (y,))
        return
    if x.parts is not None:
        x, y = y, x
    x._same = y
    for operation in x.over:
        mark_over((y,), operation)


def _align(x: Axis, y: Axis) -> None:
    """Cut two sums at each other's places and unify their segments."""
    while (left := _places(x)) != (right := _places(y)):
        if len(left) + len(right) > SEGMENTS:
            raise Mismatch(f"{x!r} against {y!r}: too many segments")
        for place in right:
            _cut_axis(x, place)
        for place in left:
            _cut_axis(y, place)
    for a, b in zip(x.parts or (), y.parts or (), strict=True):
        unify(a, b)


def _places(a: Axis) -> list[int]:
    return list(accumulate(size_of(part) for part in a.parts or ()))[:-1]


def _cut_once(dim: Dim, place: int) -> tuple[Dim, Dim]:
    """The two segments before and behind `place`."""
    found = leaves(dim)
    if not 0 < place < size_of(found):
        raise Mismatch(f"{show(dim)} cut at {place}")
    if is_frozen(found):
        why = _why(found)
        return axis(place, why), axis(size_of(found) - place, why)
    first, rest = found[0], found[1:]
    at, inside = divmod(place, size_of(rest))
    if inside:
        raise Mismatch(f"{show(dim)} cut at {place}, inside a unit")
    left, right = _cut_axis(first, at)
    return left + rest, right + rest


def _cut_axis(first: Axis, at: int) -> tuple[Dim, Dim]:
    """A leaf cut before its unit number `at`; at its ends there is nothing to cut."""
    if at in (0, first.root.size):
        return (first,), (first,)
    first = first.root
    parts = first.parts
    if parts is None:
        left, right = (axis(n, first.frozen, first.over) for n in (at, first.size - at))
        first._parts = (left, right)
        return left, right
    before: list[Dim] = []
    for number, part in enumerate(parts):
        size = size_of(part)
        if at == 0:
            return concatenate(before), concatenate(parts[number:])
        if at < size:
            low, high = _cut_once(part, at)
            first.root._parts = (*before, low, high, *parts[number + 1 :])
            return concatenate([*before, low]), concatenate([high, *parts[number + 1 :]])
        before.append(part)
        at -= size
    raise AssertionError("parts are as long as their sum")


Kept = Mapping[Axis, np.ndarray]
"""Rising indices of the units that stay, by plain axis; axes that are not there stay whole."""


def counts_of(kept: Kept) -> Callable[[Axis], int]:
    """How many units stay of every axis."""
    return lambda axis: len(kept[axis]) if axis in kept else axis.size


def kept_indices(dim: Dim, kept: Kept) -> np.ndarray:
    """Which indices of a dimension stay when `kept` stays of its axes; int64, rising.

    i ⊗ j is at i · |j| + j, a part of a sum at its offset.
    """
    found = np.zeros(1, np.int64)
    for leaf in leaves(dim):
        found = (found[:, None] * leaf.size + _kept_of_leaf(leaf, kept)[None, :]).reshape(-1)
    return found


def _kept_of_leaf(leaf: Axis, kept: Kept) -> np.ndarray:
    if (parts := leaf.parts) is None:
        units = kept.get(leaf)
        return np.arange(leaf.size) if units is None else units
    offsets = accumulate((size_of(p) for p in parts), initial=0)
    return np.concatenate([o + kept_indices(p, kept) for o, p in zip(offsets, parts, strict=False)])


def shortened_size(dim: Dim, count_of: Callable[[Axis], int]) -> int:
    """Size of a dimension when ``count_of(axis)`` units stay of every plain axis."""
    size = 1
    for leaf in leaves(dim):
        parts = leaf.parts
        if parts is None:
            size *= count_of(leaf)
        else:
            size *= sum(shortened_size(p, count_of) for p in parts)
    return size


def units_of(dim: Dim, wanted: Axis) -> np.ndarray:
    """Which unit of a plain axis each index of `dim` belongs to; −1 where it belongs to none."""
    found = np.full(1, -1, np.int64)
    for leaf in leaves(dim):
        own = _units_of_leaf(leaf, wanted)
        size = len(found)
        outer, inner = np.repeat(found, leaf.size), np.tile(own, size)
        found = np.where(inner >= 0, inner, outer)
    return found


def _units_of_leaf(leaf: Axis, wanted: Axis) -> np.ndarray:
    if leaf is wanted:
        return np.arange(leaf.size)
    parts = leaf.parts
    if parts is None:
        return np.full(leaf.size, -1, np.int64)
    return np.concatenate([units_of(p, wanted) for p in parts])
