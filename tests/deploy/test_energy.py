"""Tables of energy: measured points, what lies between, what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateurs.deploy.energy import PASSES, EnergyTable, Measured, energy_model
from secateurs.errors import InputError

BLOCKS = [
    {"rows": 16, "cols": 16, "width": 128, "energy": 2.0},
    {"rows": 16, "cols": 16, "width": 384, "energy": 6.0},
    {"rows": 32, "cols": 32, "width": 128, "energy": 5.0},
]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "energy.json"
    path.write_text(json.dumps({"unit": "nJ", "blocks": BLOCKS}))
    return EnergyTable.read(path)


def test_the_released_code_counts_passes_of_sixteen_rounded_down():
    assert [PASSES.of(16, 16, d) for d in (15, 16, 31, 384)] == [0, 1, 1, 24]
    assert energy_model(None) is PASSES


def test_measured_widths_are_met_and_others_lie_between(table):
    assert table.unit == "nJ"
    assert table.of(16, 16, 128) == 2
    assert table.of(16, 16, 384) == 6
    assert table.of(16, 16, 192) == pytest.approx(3)
    assert table.of(16, 16, 8) == 2
    assert table.of(16, 16, 9999) == 6
    assert table.of(32, 32, 500) == 5


@given(st.integers(1, 600))
def test_it_lies_between_the_smallest_and_the_largest(width):
    made = EnergyTable(tuple(Measured(**b) for b in BLOCKS))
    assert 2 <= made.of(16, 16, width) <= 6


def test_an_unmeasured_shape_is_refused_with_those_that_are(table):
    with pytest.raises(InputError, match="block: got '16x32'; accepted: a measured one: 16x16, 32"):
        table.of(16, 32, 128)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"blocks": []}',
        '{"blocks": [{"rows": 16, "cols": 16, "width": 16}]}',
        '{"blocks": [{"rows": 16, "cols": 16, "width": 16, "energy": "much"}]}',
        '{"blocks": [{"rows": 0, "cols": 16, "width": 16, "energy": 1}]}',
        '{"blocks": [{"rows": 16, "cols": 16, "width": 16, "energy": -1}]}',
        json.dumps({"blocks": [BLOCKS[0], BLOCKS[0]]}),
    ],
)
def test_bad_files_are_refused(tmp_path, text):
    path = tmp_path / "energy.json"
    path.write_text(text)
    with pytest.raises(InputError, match="energy|rows"):
        energy_model(str(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="a JSON file"):
        energy_model(str(tmp_path / "none.json"))
