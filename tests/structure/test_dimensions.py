"""The algebra of dimensions against brute force: what may be removed, seen index by index.

A program is a random list of statements about dimensions. What a statement means is written
down here a second time, for sets of indices: `unify` says that the same indices stay on both
sides, `reshape` that the same elements of a tensor stay, `concatenate` and `cut` that the
indices that stay are laid one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secateurs.structure import dimensions
from secateurs.structure.dimensions import (
    Axis,
    Dim,
    Mismatch,
    axis,
    concatenate,
    cut,
    freeze,
    is_frozen,
    kept_indices,
    leaves,
    mark_over,
    plain_axes,
    reshape,
    shortened_size,
    show,
    size_of,
    unify,
    units_of,
)

LARGEST = 48
STEPS = 50_000
"""Far more calls than any program of this file needs."""

steps = [0]


def fuzzed(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop of the algebra calls `leaves`: one that does not end fails instead."""
    leaves_of = dimensions.leaves

    def counted(dim: Dim) -> Dim:
        steps[0] += 1
        assert steps[0] < STEPS, "the algebra does not come to an end"
        return leaves_of(dim)

    monkeypatch.setattr(dimensions, "leaves", counted)


# --- programs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """``results = kind(operands, numbers)``; operands and results are numbers of dimensions."""

    kind: str
    operands: tuple[int, ...]
    numbers: tuple[int, ...] = ()
    results: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """Sizes of all dimensions, the first of which are given; and the statements about them."""

    sizes: tuple[int, ...]
    given: int
    statements: tuple[Statement, ...]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def programs(
    draw: Any,
    kinds: Sequence[str] = ("unify", "reshape", "concatenate", "cut", "freeze"),
    lengths: tuple[int, int] = (1, 10),
    smallest: int = 1,
) -> Program:
    given = draw(st.integers(2, 5))
    some = [n for n in (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24) if n >= smallest]
    sizes = [draw(st.sampled_from(some)) for _ in range(given)]
    statements: list[Statement] = []

    def state(kind: str, operands: Sequence[int], numbers: Sequence[int], new: list[int]) -> None:
        results = tuple(range(len(sizes), len(sizes) + len(new)))
        sizes.extend(new)
        statements.append(Statement(kind, tuple(operands), tuple(numbers), results))

    for _ in range(draw(st.integers(*lengths))):
        kind = draw(st.sampled_from(kinds))
        one = draw(st.integers(0, len(sizes) - 1))
        size = sizes[one]
        if kind == "unify":
            equal = [n for n, s in enumerate(sizes) if s == size]
            state(kind, (one, draw(st.sampled_from(equal))), (), [])
        elif kind == "reshape":
            operands = [one]
            if draw(st.booleans()):
                other = draw(st.integers(0, len(sizes) - 1))
                if size * sizes[other] <= LARGEST:
                    operands.append(other)
            left = prod(sizes[o] for o in operands)
            wanted = []
            for _ in range(draw(st.integers(0, 2))):
                wanted.append(draw(st.sampled_from(divisors(left))))
                left //= wanted[-1]
            state(kind, operands, (), [*wanted, left])
        elif kind == "concatenate":
            operands = [one, *draw(st.lists(st.integers(0, len(sizes) - 1), max_size=2))]
            whole = sum(sizes[o] for o in operands)
            if whole <= LARGEST:
                state(kind, operands, (), [whole])
        elif kind == "cut":
            inside = list(range(smallest, size - smallest + 1))
            if not inside:
                continue
            places = sorted(draw(st.sets(st.sampled_from(inside), min_size=1, max_size=3)))
            pieces = np.diff([0, *places, size]).tolist()
            if min(pieces) >= smallest:
                state(kind, (one,), places, pieces)
        else:
            state(kind, (one,), (), [])
    return Program(tuple(sizes), given, tuple(statements))


@dataclass
class Ran:
    dims: list[Dim]
    mismatches: list[str]


def run(program: Program, order: Sequence[int] | None = None) -> Ran:
    """State everything; what cannot be laid side by side freezes what it touches."""
    dims: dict[int, Dim] = {n: axis(program.sizes[n]) for n in range(program.given)}
    mismatches = []
    steps[0] = 0
    for number in order if order is not None else range(len(program.statements)):
        s = program.statements[number]
        operands = [dims[o] for o in s.operands]
        try:
            results = _stated(s, operands, [program.sizes[r] for r in s.results])
        except Mismatch as reason:
            mismatches.append(str(reason))
            for dim in operands:
                freeze(dim, "a mismatch")
            results = [axis(program.sizes[r], "a mismatch") for r in s.results]
        dims.update(zip(s.results, results, strict=True))
    return Ran([dims[n] for n in range(len(program.sizes))], mismatches)


def _stated(s: Statement, operands: list[Dim], sizes: list[int]) -> list[Dim]:
    if s.kind == "unify":
        unify(*operands)
    elif s.kind == "reshape":
        return reshape(operands, sizes)
    elif s.kind == "concatenate":
        return [concatenate(operands)]
    elif s.kind == "cut":
        return cut(operands[0], s.numbers)
    else:
        freeze(operands[0], "asked for")
    return []


def holds(s: Statement, kept: Sequence[np.ndarray], sizes: Sequence[int]) -> bool:
    """Whether a statement is true of the indices that stay."""
    ins = [kept[o] for o in s.operands]
    outs = [kept[r] for r in s.results]
    out_sizes = [sizes[r] for r in s.results]
    if s.kind == "unify":
        return np.array_equal(ins[0], ins[1])
    if s.kind == "reshape":
        return np.array_equal(
            elements(ins, [sizes[o] for o in s.operands]), elements(outs, out_sizes)
        )
    if s.kind == "concatenate":
        return np.array_equal(laid(ins, [sizes[o] for o in s.operands]), outs[0])
    if s.kind == "cut":
        return np.array_equal(ins[0], laid(outs, out_sizes))
    return len(ins[0]) == sizes[s.operands[0]]


def elements(kept: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Which elements of a tensor stay, in row-major order."""
    mask = np.ones(tuple(sizes), bool)
    for place, (indices, size) in enumerate(zip(kept, sizes, strict=True)):
        own = np.zeros(size, bool)
        own[indices] = True
        mask &= own.reshape([-1] + [1] * (len(sizes) - 1 - place))
    return np.flatnonzero(mask)


def laid(kept: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    offsets = np.cumsum([0, *sizes])
    return np.concatenate([k + o for k, o in zip(kept, offsets, strict=False)])


def free_axes(dims: Sequence[Dim]) -> list[Axis]:
    found = {a.number: a for d in dims for a in plain_axes(d) if a.frozen is None}
    return [found[n] for n in sorted(found)]


def some_kept(axes: Sequence[Axis], seed: int) -> dict[Axis, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {a: np.sort(rng.permutation(a.size)[: rng.integers(1, a.size + 1)]) for a in axes}


# --- soundness --------------------------------------------------------------------------------


@fuzzed(600)
@given(programs(), st.integers(0, 1000))
def test_what_may_be_removed_is_true_of_every_statement(program: Program, seed: int) -> None:
    ran = run(program)
    assert [size_of(d) for d in ran.dims] == list(program.sizes)
    axes = free_axes(ran.dims)
    for kept in ({}, some_kept(axes, seed), some_kept(axes, seed + 1)):
        indices = [kept_indices(d, kept) for d in ran.dims]
        for s in program.statements:
            assert holds(s, indices, program.sizes), s
        for dim, own in zip(ran.dims, indices, strict=True):
            assert np.array_equal(own, np.unique(own))
            assert shortened_size(dim, lambda a, k=kept: len(k.get(a, range(a.size)))) == len(own)


@fuzzed(200)
@given(programs(), st.integers(0, 1000))
def test_units_of_tells_which_indices_go_with_a_unit(program: Program, seed: int) -> None:
    ran = run(program)
    for a in free_axes(ran.dims)[:4]:
        unit = seed % a.size
        kept = {a: np.delete(np.arange(a.size), unit)}
        for dim in ran.dims:
            gone = np.setdiff1d(np.arange(size_of(dim)), kept_indices(dim, kept))
            units = units_of(dim, a)
            assert np.isin(np.flatnonzero(units == unit), gone).all()
            if not squared(dim, a):  # an index of a ⊗ a belongs to two units
                assert np.array_equal(np.flatnonzero(units == unit), gone)
                assert set(units) - {-1} in (set(), set(range(a.size)))


def squared(dim: Dim, a: Axis) -> bool:
    """Whether an axis is in two factors of one product."""
    inside = [any(x is a for x in plain_axes((leaf,))) for leaf in leaves(dim)]
    parts = [p for leaf in leaves(dim) for p in leaf.parts or ()]
    return sum(inside) > 1 or any(squared(p, a) for p in parts)


# --- nothing is tied or frozen without need ---------------------------------------------------


class Classes:
    """Union-find over (dimension, index): which indices are equal, without any product."""

    def __init__(self, program: Program) -> None:
        self.parent = {(d, i): (d, i) for d, n in enumerate(program.sizes) for i in range(n)}
        self.frozen = set()
        for s in program.statements:
            if s.kind == "unify":
                left, right = s.operands
                self._join(((left, i), (right, i)) for i in range(program.sizes[left]))
            elif s.kind == "freeze":
                self.frozen |= {(s.operands[0], i) for i in range(program.sizes[s.operands[0]])}
            else:
                whole, pieces = s.operands[0], s.results
                if s.kind == "concatenate":
                    whole, pieces = s.results[0], s.operands
                inside = [(p, i) for p in pieces for i in range(program.sizes[p])]
                self._join(((whole, n), index) for n, index in enumerate(inside))

    def of(self, index: tuple[int, int]) -> tuple[int, int]:
        while self.parent[index] != index:
            index = self.parent[index]
        return index

    def _join(self, pairs: Any) -> None:
        for left, right in pairs:
            self.parent[self.of(left)] = self.of(right)

    def members(self) -> dict[tuple[int, int], set[tuple[int, int]]]:
        found: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for index in self.parent:
            found.setdefault(self.of(index), set()).add(index)
        return found


@fuzzed(300)
@given(programs(kinds=("unify", "unify", "concatenate", "cut", "cut", "freeze")))
def test_without_products_units_are_the_classes_of_equal_indices(program: Program) -> None:
    ran = run(program)
    if ran.mismatches:
        return
    classes = Classes(program)
    members = classes.members()
    single, frozen = set(), {classes.of(i) for i in classes.frozen}
    for number, dim in enumerate(ran.dims):
        units = {(number, i): set() for i in range(size_of(dim))}
        for a in plain_axes(dim):
            for i, unit in enumerate(units_of(dim, a)):
                if unit >= 0:
                    units[number, i].add((a, int(unit)))
        single |= {classes.of(i) for i, own in units.items() if not own}
    for number, dim in enumerate(ran.dims):
        for a in plain_axes(dim):
            for i, unit in enumerate(units_of(dim, a)):
                if unit < 0:
                    continue
                own = classes.of((number, i))
                if a.frozen is not None:  # segments of one unit are constants
                    assert own in frozen | single
                    continue
                assert own not in frozen
                together = {
                    (d, int(j))
                    for d, other in enumerate(ran.dims)
                    for j in np.flatnonzero(units_of(other, a) == unit)
                }
                assert together == members[own]


Labels = tuple[frozenset[tuple[int, int]], ...]
"""The truth about a dimension: for every index the (atom, unit) it depends on."""


@dataclass(frozen=True)
class Truth:
    """A program whose every statement is true of the labels of its dimensions."""

    program: Program
    labels: tuple[Labels, ...]


def factored(labels: Labels, outer: int) -> tuple[Labels, Labels] | None:
    """Labels of the rows and of the columns, where the labels of the elements are their unions."""
    inner = len(labels) // outer
    table = [labels[i * inner : (i + 1) * inner] for i in range(outer)]
    rows = tuple(frozenset.intersection(*row) for row in table)
    columns = tuple(frozenset.intersection(*(row[j] for row in table)) for j in range(inner))
    fits = all(table[i][j] == rows[i] | columns[j] for i in range(outer) for j in range(inner))
    return (rows, columns) if fits else None


def product(left: Labels, right: Labels) -> Labels:
    return tuple(a | b for a in left for b in right)


@st.composite
def truths(draw: Any) -> Truth:
    """Start from products and sums of atoms, and take them apart in random steps."""
    atoms: list[Labels] = []
    for number, size in enumerate(draw(st.lists(st.integers(2, 6), min_size=2, max_size=5))):
        atoms.append(tuple(frozenset({(number, unit)}) for unit in range(size)))
    labels: list[Labels] = []
    for _ in range(draw(st.integers(1, 3))):
        parts = []
        for _ in range(draw(st.integers(1, 3))):
            chosen = draw(st.permutations(range(len(atoms))))[: draw(st.integers(1, 2))]
            part: Labels = (frozenset(),)
            for a in chosen:
                part = product(part, atoms[a])
            parts.append(part)
        labels.append(tuple(label for part in parts for label in part)[: 2 * LARGEST])
    given = len(labels)
    blanks: list[int] = []
    statements: list[Statement] = []

    def state(
        kind: str, operands: Sequence[int], numbers: Sequence[int], new: list[Labels]
    ) -> None:
        results = tuple(range(len(labels), len(labels) + len(new)))
        labels.extend(new)
        statements.append(Statement(kind, tuple(operands), tuple(numbers), results))

    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["rows", "rows", "flat", "cut", "concatenate", "same", "new"]))
        one = draw(st.integers(0, len(labels) - 1))
        own = labels[one]
        if kind == "rows":
            ways = [n for n in divisors(len(own)) if 1 < n < len(own) and factored(own, n)]
            if ways:
                outer = draw(st.sampled_from(ways))
                state("reshape", (one,), (), list(factored(own, outer) or ()))
        elif kind == "flat":
            other = draw(st.integers(0, len(labels) - 1))
            apart = not ({a for x in own for a, _ in x} & {a for x in labels[other] for a, _ in x})
            if apart and len(own) * len(labels[other]) <= 2 * LARGEST:
                state("reshape", (one, other), (), [product(own, labels[other])])
        elif kind == "cut":
            places = [
                p
                for p in range(2, len(own) - 1)
                if {a for a, _ in own[p - 1]} != {a for a, _ in own[p]}
                and not splits_an_axis(own[:p], own[p:])
            ]
            if places:
                p = draw(st.sampled_from(places))
                state("cut", (one,), (p,), [own[:p], own[p:]])
        elif kind == "concatenate":
            other = draw(st.integers(0, len(labels) - 1))
            if len(own) + len(labels[other]) <= 2 * LARGEST:
                state("concatenate", (one, other), (), [own + labels[other]])
        elif kind == "same":
            other = draw(st.sampled_from([n for n, x in enumerate(labels) if x == own]))
            state("unify", (one, other), (), [])
        else:
            blanks.append(one)
    # new dimensions of which only the size is known, unified with one that is known
    order = {n: n if n < given else n + len(blanks) for n in range(len(labels))}
    moved = [
        Statement(
            s.kind, tuple(order[o] for o in s.operands), s.numbers,
            tuple(order[r] for r in s.results),
        )
        for s in statements
    ]  # fmt: skip
    moved += [Statement("unify", (given + n, order[b])) for n, b in enumerate(blanks)]
    all_labels = [*labels[:given], *(labels[b] for b in blanks), *labels[given:]]
    program = Program(tuple(map(len, all_labels)), given + len(blanks), tuple(moved))
    return Truth(program, tuple(all_labels))


def splits_an_axis(left: Labels, right: Labels) -> bool:
    """Whether of some axis other units lie on one side than on the other."""
    sides = [{label for x in side for label in x} for side in (left, right)]
    shared = {a for a, _ in sides[0]} & {a for a, _ in sides[1]}
    return any(
        {u for a, u in sides[0] if a == s} != {u for a, u in sides[1] if a == s} for s in shared
    )


@fuzzed(300)
@given(truths(), st.randoms(use_true_random=False))
def test_what_is_truly_one_unit_can_be_removed_alone(truth: Truth, random: Any) -> None:
    ran = run(truth.program, shuffled(truth.program, random))
    if ran.mismatches:  # a sum re-cut into equal groups has no other places any more
        assert any("inside a unit" in m or "cut into" in m for m in ran.mismatches)
        return
    named = sorted({label for labels in truth.labels for x in labels for label in x})
    units = {a: [units_of(d, a) for d in ran.dims] for a in free_axes(ran.dims)}
    for label in named:
        stays = [
            np.array([i for i, x in enumerate(labels) if label not in x], np.int64)
            for labels in truth.labels
        ]
        kept = {
            a: np.unique(np.concatenate([u[k] for u, k in zip(own, stays, strict=True)]))
            for a, own in units.items()
        }
        kept = {a: k[k >= 0] for a, k in kept.items()}
        for dim, own in zip(ran.dims, stays, strict=True):
            assert np.array_equal(kept_indices(dim, kept), own), (label, show(dim))


def shuffled(program: Program, random: Any) -> list[int]:
    """A random order of the statements in which every operand is there before it is used."""
    known, left, order = set(range(program.given)), list(range(len(program.statements))), []
    while left:
        ready = [n for n in left if known.issuperset(program.statements[n].operands)]
        number = ready[random.randrange(len(ready))]
        left.remove(number)
        order.append(number)
        known.update(program.statements[number].results)
    return order


@fuzzed(300)
@given(programs(), st.randoms(use_true_random=False))
def test_the_order_of_statements_does_not_matter(program: Program, random: Any) -> None:
    first, second = run(program), run(program, shuffled(program, random))
    if first.mismatches or second.mismatches:
        return
    assert removals(first) == removals(second)


def removals(ran: Ran) -> set[tuple[tuple[int, ...], ...]]:
    """What goes with every free unit: the indices of all dimensions."""
    found = set()
    for a in free_axes(ran.dims):
        for unit in range(a.size):
            kept = {a: np.delete(np.arange(a.size), unit)}
            found.add(
                tuple(
                    tuple(np.setdiff1d(np.arange(size_of(d)), kept_indices(d, kept)).tolist())
                    for d in ran.dims
                )
            )
    return found


# --- closed cases -----------------------------------------------------------------------------


def free(dim: Dim) -> list[int]:
    return [a.size for a in plain_axes(dim) if a.frozen is None]


def without(dim: Dim, *removed: tuple[Dim, int]) -> list[int]:
    """Indices that stay of `dim` without some units of axes."""
    kept = {}
    for (only,), unit in ((leaves(d), u) for d, u in removed):
        kept[only] = np.setdiff1d(kept.get(only, np.arange(only.size)), [unit])
    return kept_indices(dim, kept).tolist()


def test_a_view_as_heads_refines_the_width() -> None:
    width = axis(768)
    heads, each = reshape([width], [12, 64])
    assert show(width) == "12 ⊗ 64"
    assert without(width, (heads, 3)) == [i for i in range(768) if i // 64 != 3]
    assert without(width, (each, 5)) == [i for i in range(768) if i % 64 != 5]
    assert shortened_size(width, lambda a: a.size // 2) == 6 * 32


@pytest.mark.parametrize("refined_first", [True, False])
def test_fused_qkv_is_three_equal_parts(refined_first: bool) -> None:
    """One weight, seen as 3 ⊗ h ⊗ d by one layer and as q ⊕ k ⊕ v by another."""
    qkv = axis(3 * 4 * 8)

    def view() -> list[Dim]:
        return reshape([qkv], [3, 4, 8])

    def segments() -> list[Dim]:
        return [reshape([s], [4, 8])[0] for s in cut(qkv, [32, 64])]

    if refined_first:
        three, heads, each = view()
        segments()
    else:
        segments()
        three, heads, each = view()
    assert (free(three), free(heads), free(each)) == ([], [4], [8])
    assert without(qkv, (heads, 1)) == [i for i in range(96) if i // 8 % 4 != 1]
    assert without(qkv, (each, 1)) == [i for i in range(96) if i % 8 != 1]


def test_separate_segments_stay_free_of_each_other() -> None:
    qkv = axis(96)
    q, k, v = cut(qkv, [32, 64])
    unify(q, k)
    value_heads, value_width = reshape([v], [4, 8])
    heads, width = reshape([q], [4, 8])
    unify(heads, value_heads)
    assert without(qkv, (width, 0)) == [i for i in range(96) if i >= 64 or i % 8]
    assert without(qkv, (value_width, 0)) == [i for i in range(96) if i < 64 or i % 8]
    assert without(qkv, (heads, 0)) == [i for i in range(96) if i // 8 % 4]


def test_query_heads_are_key_value_heads_times_repetitions() -> None:
    queries, keys = axis(8 * 16), axis(2 * 16)
    q_heads, q_width = reshape([queries], [8, 16])
    kv_heads, kv_width = reshape([keys], [2, 16])
    repeats = axis(4)
    unify(q_heads, kv_heads + repeats)
    unify(q_width, kv_width)
    assert show(queries) == "2 ⊗ 4 ⊗ 16"
    assert without(queries, (kv_heads, 1)) == list(range(64))
    assert without(keys, (kv_heads, 1)) == list(range(16))
    assert without(keys, (repeats, 1)) == list(range(32))
    assert without(queries, (repeats, 1)) == [i for i in range(128) if i // 16 % 4 != 1]


def test_rotary_embedding_ties_the_halves() -> None:
    width = axis(64)
    left, right = cut(width, [32])
    unify(width, concatenate([right, left]))
    assert without(width, (left, 3)) == [i for i in range(64) if i % 32 != 3]


def test_channel_shuffle_keeps_groups_and_their_insides() -> None:
    left, right = axis(6), axis(6)
    both = concatenate([left, right])
    number, inner = reshape([both], [2, 6])
    shuffled_ = reshape([inner, number], [12])[0]
    assert (free(number), free(shuffled_)) == ([], [6])
    assert without(shuffled_, (inner, 2)) == [i for i in range(12) if i // 2 != 2]
    assert without(left, (inner, 2)) == without(right, (inner, 2)) == [0, 1, 3, 4, 5]


def test_dense_concatenation_chains_are_flat_sums() -> None:
    grown = stem = axis(16)
    layers = []
    for _ in range(150):
        layers.append(axis(4))
        grown = concatenate([grown, layers[-1]])
    assert len(leaves(grown)[0].parts or ()) == 151
    weight = axis(16 + 150 * 4)
    unify(weight, grown)
    assert without(weight, (layers[3], 1)) == [i for i in range(616) if i != 16 + 3 * 4 + 1]
    assert without(weight, (stem, 15)) == [i for i in range(616) if i != 15]


def test_sums_that_are_cut_differently_are_aligned() -> None:
    a, b, c, d = (axis(n) for n in (6, 4, 3, 7))
    whole = concatenate([a, b])
    unify(whole, concatenate([c, d]))
    assert show(whole) == "(3 ⊕ 3 ⊕ 4)"
    low, _ = cut(a, [3])
    assert without(whole, (low, 0), (c, 1)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert without(d, (b, 3)) == [0, 1, 2, 3, 4, 5]


def test_freezing_goes_through_products_and_sums() -> None:
    whole = concatenate([axis(6), axis(4)])
    twin = axis(10)
    unify(twin, whole)
    number, inner = reshape([twin], [5, 2])
    assert not is_frozen(number)
    freeze(inner, "a test")
    assert [a.frozen for a in plain_axes(whole)] == [None, None, "a test"]
    freeze(whole, "another")
    assert is_frozen(twin)
    assert is_frozen(number)
    assert {a.frozen for a in plain_axes(inner)} == {"a test"}
    assert show(inner) == "2!"


@pytest.mark.parametrize("later", ["refined", "cut", "unified", "aligned"])
@pytest.mark.parametrize("mark", ["over", "frozen"])
def test_marks_stay_whatever_is_said_later(mark: str, later: str) -> None:
    dim = axis(12)

    def say() -> None:
        if later == "refined":
            reshape([dim], [3, 4])
        elif later == "cut":
            cut(dim, [4, 7])
        elif later == "unified":
            unify(axis(12), dim)
        else:
            unify(concatenate([axis(5), axis(7)]), dim)

    def found() -> bool:
        if mark == "frozen":
            return is_frozen(dim)
        return all(a.over == ("norm",) for a in plain_axes(dim))

    mark_over(dim, "norm") if mark == "over" else freeze(dim, "a test")
    say()
    assert found()
    if mark == "over":
        mark_over(dim, "norm")  # once is enough
        assert found()


def test_what_is_marked_stays_marked_for_both_sides() -> None:
    a, b = axis(12), concatenate([axis(5), axis(7)])
    mark_over(a, "norm")
    unify(a, b)
    assert [x.over for x in plain_axes(b)] == [("norm",), ("norm",)]
    mark_over(b, "softmax")
    assert [x.over for x in plain_axes(a)] == [("norm", "softmax")] * 2


def test_frozen_neighbours_are_only_a_size() -> None:
    """(2! ⊗ 6!) against (3! ⊗ 4!): no refinement is needed, and none is refused."""
    outer = axis(5)
    left = axis(2, "space") + axis(6, "space") + outer
    right = axis(3, "space") + axis(4, "space") + axis(5)
    unify(left, right)
    assert free(right) == [5]
    assert without(right, (outer, 0)) == [i for i in range(60) if i % 5]
    (flat, five) = reshape([left], [12, 5])
    assert (free(flat), free(five)) == ([], [5])


def test_frozen_sums_are_not_aligned() -> None:
    """Found by the fuzzer: aligning them did not end."""
    left = concatenate([axis(3, "x"), axis(5, "x")])
    right = concatenate([axis(4), axis(4)])
    steps[0] = 0
    unify(left, right)
    assert is_frozen(right)


def test_tensors_without_elements_are_constants() -> None:
    empty = axis(0)
    assert [size_of(d) for d in reshape([axis(3), empty], [2, 0, 5])] == [2, 0, 5]
    unify(axis(3) + empty, empty)
    assert concatenate([empty, width := axis(3)]) == width


def test_sums_that_freeze_while_they_are_aligned() -> None:
    """Found by the fuzzer as well: (4 ⊕ 4 ⊕ 12!) in four equal groups."""
    part = axis(4)
    steps[0] = 0
    number, inner = reshape([concatenate([part, part, axis(12, "x")])], [4, 5])
    assert free(number) == free(inner) == free(part) == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: unify(axis(4), axis(6)), "4 against 6"),
        (lambda: unify(axis(4) + axis(9), axis(6) + axis(6)), "6 cut into 4 equal pieces"),
        (lambda: reshape([axis(6)], [4]), "6 cut into 4 equal pieces"),
        (lambda: reshape([axis(6)], [2]), r"3 left over for sizes \[2\]"),
        (lambda: reshape([axis(6)], [6, 2]), "1 for a size of 2"),
        (lambda: cut(axis(3) + axis(4), [6]), "3 ⊗ 4 cut at 6, inside a unit"),
        (lambda: cut(axis(3), [3]), "3 cut at 3"),
        (lambda: cut(axis(3), [2, 1]), "1 cut at -1"),
    ],
)
def test_a_mismatch_shows_the_expression_and_the_size(
    state: Callable[[], Any], message: str
) -> None:
    with pytest.raises(Mismatch, match=message):
        state()
