"""The page of a model: what it says of the axes, what it refuses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from secateurs.cli import main
from secateurs.errors import InputError
from secateurs.report import figures
from secateurs.report.inspection import check_page, write_inspection

from .test_html import HOSTILE, check_complete, read

pytest.importorskip("plotly")

COST = {
    "parameters": 1000, "nonzero": 1000, "macs": 2000, "effective_macs": 2000,
    "dense_bytes": 4000, "sparse_bytes": 4000, "batch": 1, "latency": None,
}  # fmt: skip


def axis(name, role="channel", size=10, parameters=20, macs=80, normalized=(), tensors=2):
    slices = [[f"{name}.t{number}", 0] for number in range(tensors)]
    return {
        "name": name, "role": role, "size": size, "granularity": 1,
        "parameters": parameters, "macs": macs, "normalized": list(normalized), "slices": slices,
    }  # fmt: skip


@pytest.fixture
def found():
    return {
        "model": "zoo:small",
        "layers": [
            {"name": "a.weight", "shape": [10, 3], "weights": 30, "kept": 30, "macs": 100},
        ],
        "axes": [
            axis("stem", "width", 10, 60, 40, ["layer_norm"], tensors=9),
            axis("block", "neuron", 20, 10, 80),
        ],
        "frozen": [{"reason": "an output", "axes": 3, "example": "head.weight[0]"}],
        "unruled": {},
        "traced": {"parameters": 1000, "free_parameters": 900, "macs": 2000},
        "untraced": "",
        "cost": COST,
    }


def test_a_page_says_what_hangs_on_which_axis(tmp_path, found):
    page = read(write_inspection(tmp_path / "a.html", found, environment={"torch": "2.9"}))
    check_complete(page)
    for words in (
        "2 axes can be shortened; they cover 90.0 % of the parameters.",
        "Most parameters hang on stem (width, 10 units): 60.0 %; most MACs on block (neuron, "
        "20 units): 80.0 %.",
        "Parameters 1k 4 kB in a file",
        "Axes that can be shortened 2 3 keep their size",
        "stem width 10 1 60 40 60.0 % 20.0 % 9 layer_norm",
        "an output 3 head.weight[0]",
        "a.weight 10 × 3 30 100",
        "torch 2.9",
    ):
        assert words in page.text, words
    assert len(page.figures) == 1
    assert "Operations without a rule" not in page.text
    assert "Leaderboard" not in page.text


def test_operations_without_a_rule_and_names_that_look_like_tags(tmp_path, found):
    found |= {"model": HOSTILE, "unruled": {"aten.strange": HOSTILE}}
    found["axes"][0] |= {"name": HOSTILE, "slices": [[HOSTILE, 0]]}
    page = read(write_inspection(tmp_path / "a.html", found))
    check_complete(page)
    assert "1 operation has no rule" in page.text
    assert "Operations without a rule" in page.text
    assert "alert(1)" in page.text
    assert "<script>alert(1)" not in page.all


def test_an_untraced_model_has_its_reason_and_no_picture(tmp_path, found):
    nothing = {"parameters": 0, "free_parameters": 0, "macs": 0}
    found |= {"axes": [], "frozen": [], "traced": nothing, "untraced": "it branches on data"}
    page = read(write_inspection(tmp_path / "a.html", found))
    check_complete(page)
    assert "could not be traced" in page.text
    assert "it branches on data" in page.text
    assert page.figures == []
    assert "a.weight" in page.text


def test_masked_weights_are_told(tmp_path, found):
    found["layers"][0]["kept"] = 3
    found["cost"] = {**COST, "nonzero": 100}
    page = read(write_inspection(tmp_path / "a.html", found))
    assert "10.0 % are not zero" in page.text
    assert "a.weight 10 × 3 30 10.0 % 100" in page.text


def test_the_picture_has_a_colour_a_role_and_two_panels(found):
    figure = figures.axis_costs(found["axes"], 1000, 2000)
    bars = {(trace.name, trace.xaxis): trace for trace in figure.data}
    assert list(bars) == [("neuron", "x"), ("width", "x"), ("neuron", "x2"), ("width", "x2")]
    assert {name: trace.marker.color for (name, _), trace in bars.items()} == {
        name: figures.ROLES[name] for name in ("neuron", "width")
    }
    stem, block = bars["width", "x"], bars["neuron", "x"]
    assert (list(stem.x), list(stem.y)) == ([60.0], [0])
    assert (list(block.x), list(block.y)) == ([20.0], [1])
    assert list(bars["neuron", "x2"].x) == [80.0]
    assert list(figure.layout.yaxis.ticktext) == ["stem", "block"]
    for words in ("10 units; one less saves 60 parameters", "normalised over it: layer_norm",
                  "stem.t4[0]", "and 4 more"):  # fmt: skip
        assert words in stem.hovertext[0], words
    assert "stem.t5" not in stem.hovertext[0]


def test_many_axes_stand_side_by_side_without_names(found):
    many = [axis(f"layer{number}", "head", 2, number, 1) for number in range(60)]
    figure = figures.axis_costs(many, 1000, 2000)
    assert figure.layout.height < 700
    assert list(figure.data[0].x) == list(range(1, 61))
    assert figure.data[0].y[59] == pytest.approx(100 * 2 * 59 / 1000)
    assert figure.layout.yaxis.ticktext is None
    assert "<b>layer59</b>" in figure.data[0].hovertext[59]
    with pytest.raises(InputError, match="axes"):
        figures.axis_costs([], 1, 1)


def test_a_page_that_could_not_be_written_is_refused_at_the_door(tmp_path):
    check_page(tmp_path / "new" / "folder" / "a.html")
    with pytest.raises(InputError, match="ends in .html"):
        check_page(tmp_path / "a.txt")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="folder that can be written"):
        check_page(tmp_path / "file" / "a.html")


def test_inspect_writes_the_page_of_what_it_prints(tmp_path: Path):
    target = tmp_path / "new" / "convnet.html"
    result = CliRunner().invoke(main, ["inspect", "zoo:convnet", "--out", str(target), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    traced = answer["traced"]
    assert traced["parameters"] == answer["cost"]["parameters"]
    assert 0.9 * traced["parameters"] < traced["free_parameters"] < traced["parameters"]
    page = read(target)
    check_complete(page)
    assert f"{len(answer['axes'])} axes can be shortened" in page.text
    assert all(row["name"] in page.text for row in answer["axes"])
    # written again, as a report is
    assert CliRunner().invoke(main, ["inspect", "zoo:convnet", "--out", str(target)]).exit_code == 0
    folder = CliRunner().invoke(main, ["inspect", "zoo:convnet", "--out", str(tmp_path)])
    assert folder.exit_code == 2
