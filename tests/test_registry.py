"""Methods by name: found by typing, refused with the closest name, built from plain values."""

from dataclasses import dataclass
from typing import Literal

import pytest

from secateurs.errors import InputError, require
from secateurs.registry import (
    VOCABULARY,
    Tags,
    build,
    create,
    list_methods,
    method_class,
    options_as_dict,
    options_of,
    register,
    type_name,
)
from secateurs.settings import option


@dataclass(frozen=True)
class Sample:
    rate: float = option(0.5, "a share", "%")
    kind: Literal["a", "b"] = option("a", "a choice")
    count: int | None = option(None, "a number, or none")
    pairs: dict[str, float] = option({}, "names and shares")
    arms: tuple[Literal["x", "y"], ...] = option(("x",), "several choices")
    shift: float = option(0.0, "any number")

    def __post_init__(self):
        require(0 < self.rate < 1, "rate", self.rate, "a share in (0, 1)")


def test_methods_are_listed_by_wildcard_and_by_tag():
    assert list(list_methods("global-mp*")) == ["global-mp", "global-mp-gradual"]
    assert "lottery-ticket" in list_methods(recovery="rewind")
    assert "gmp" not in list_methods(recovery="rewind")
    assert "small-dense" in list_methods(needs="resize")
    assert list(list_methods()) == sorted(list_methods())
    assert list_methods("no-such-*") == {}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [({"unti": "weight"}, "did you mean 'unit'"), ({"unit": "wieght"}, "did you mean 'weight'")],
)
def test_unknown_tags_are_refused(wanted, message):
    with pytest.raises(InputError, match=message):
        list_methods(**wanted)


def test_an_unknown_method_is_refused_with_the_closest():
    with pytest.raises(InputError, match="did you mean 'lottery-ticket'"):
        method_class("lotery-ticket")


def test_strings_become_the_types_of_the_fields():
    made = build(Sample, {"rate": "0.25", "count": "3", "pairs": {"a": "1"}, "arms": ["x", "y"]})
    assert made == Sample(0.25, "a", 3, {"a": 1.0}, ("x", "y"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raet": 0.1}, "option: got 'raet'.*did you mean 'rate'"),
        ({"rate": 2}, r"rate: got 2.0; accepted: a share in \(0, 1\)"),
        ({"rate": "much"}, "rate: got 'much'"),
        ({"kind": "c"}, "kind: got 'c'"),
        ({"arms": ["x", "z"]}, "arms.*'z'"),
        ({"shift": float("nan")}, "shift: got nan; accepted: a finite number"),
        ({"shift": "inf"}, "shift: got inf"),
        ({"pairs": {"a": float("-inf")}}, "pairs: got -inf"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        build(Sample, options)


def test_options_are_read_from_the_class():
    shown = {o.name: (o.type, o.default, o.help, o.unit) for o in options_of(Sample)}
    assert shown["rate"] == ("float", 0.5, "a share", "%")
    assert shown["kind"] == ("a|b", "a", "a choice", "")
    assert shown["count"][0] == "int or none"
    assert shown["pairs"][:2] == ("dict[str, float]", {})
    assert type_name(tuple[int, ...]) == "tuple[int]"


def test_the_options_of_a_method_make_it_again():
    method = create("lottery-ticket", {"rates": {"0": 0.1}, "controls": ["reinit"]})
    assert create("lottery-ticket", options_as_dict(method)) == method


def test_defaults_that_are_containers_are_not_shared():
    assert Sample().pairs is not Sample().pairs


def test_a_name_is_given_once():
    tags = Tags("U", "weight", "PAT", "mag")

    def other_module():
        @dataclass(frozen=True)
        class GlobalMagnitudePruning:
            pass

        # a class of the same name from another file
        GlobalMagnitudePruning.__qualname__ = "GlobalMagnitudePruning"
        return GlobalMagnitudePruning

    before = method_class("global-mp")
    with pytest.raises(InputError, match="name: got 'global-mp'; accepted: a name not taken"):
        register("global-mp", paper=None, tags=tags, budgets=("sparsity",))(other_module())
    assert method_class("global-mp") is before


def test_only_dataclasses_are_methods():
    with pytest.raises(InputError, match="a dataclass"):
        register("plain", paper=None, tags=Tags("U", "weight", "PAT", "mag"), budgets=())(object)
    assert "plain" not in list_methods()


@pytest.mark.parametrize("axis", VOCABULARY)
def test_tags_outside_the_vocabulary_are_refused(axis):
    good = {"speedup": "U", "unit": "weight+nm", "when": "PAT", "criterion": "mag"}
    assert Tags(**good).values("unit") == ["weight", "nm"]
    with pytest.raises(InputError, match=f"tag {axis}: got 'wrong'"):
        Tags(**{**good, axis: "wrong"})
