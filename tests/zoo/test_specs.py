"""Specs: how they are taken apart, and what is refused."""

from pathlib import Path

import pytest

from secateurs.errors import InputError
from secateurs.zoo.specs import Options, check_hub_name, parse_spec


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("digits", ("digits", "", {}, None)),
        ("zoo:mlp", ("zoo", "mlp", {}, None)),
        ("zoo:mlp?hidden=3,4&width=0.5", ("zoo", "mlp", {"hidden": "3,4", "width": "0.5"}, None)),
        ("timm:a.b@w.safetensors", ("timm", "a.b", {}, Path("w.safetensors"))),
        ("python:package.module:make", ("python", "package.module:make", {}, None)),
    ],
)
def test_parse(text, parts):
    spec = parse_spec(text, "model")
    assert (spec.kind, spec.name, spec.options, spec.weights) == parts


def test_title_leaves_the_weights_out():
    assert parse_spec("zoo:mlp?hidden=3@w.safetensors", "model").title == "zoo:mlp?hidden=3"


@pytest.mark.parametrize("text", ["", " ", "zoo:mlp?hidden", "zoo:mlp?=3", "zoo:mlp?a=1&a=2"])
def test_refuses(text):
    with pytest.raises(InputError, match="model"):
        parse_spec(text, "model")


def test_options_are_typed_and_none_is_left_over():
    options = Options(parse_spec("digits?n=3&on=true&share=0.5&word=b", "data"), "data")
    assert options.integer("n") == 3
    assert options.integer("other", 7) == 7
    assert options.flag("on")
    assert not options.flag("off")
    assert options.fraction("share", 0.1) == 0.5
    assert options.text("word", choices=("a", "b")) == "b"
    options.done()


@pytest.mark.parametrize(
    ("query", "read"),
    [
        ("n=three", lambda o: o.integer("n")),
        ("n=0", lambda o: o.integer("n")),
        ("n=1.5", lambda o: o.integer("n")),
        ("on=yes", lambda o: o.flag("on")),
        ("share=1", lambda o: o.fraction("share", 0.1)),
        ("share=x", lambda o: o.fraction("share", 0.1)),
        ("word=c", lambda o: o.text("word", choices=("a", "b"))),
        ("extra=1", lambda o: o.done()),
    ],
)
def test_options_refuse(query, read):
    with pytest.raises(InputError, match=f"data digits.*{query.partition('=')[0]}"):
        read(Options(parse_spec(f"digits?{query}", "data"), "data"))


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path):
    check_hub_name("model", "owner/name")
    check_hub_name("model", str(tmp_path))
    with pytest.raises(InputError, match="existing folder"):
        check_hub_name("model", "./nowhere")
