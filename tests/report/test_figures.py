"""What the figures show; how they look is for eyes."""

import pytest

from secateurs.errors import InputError
from secateurs.report import figures
from secateurs.report.leaderboard import leaderboard, row_of

from .conftest import changed

pytest.importorskip("plotly")


@pytest.fixture
def board(many):
    tight = [changed(o, budget="sparsity=0.95", after={**o["after"], "nonzero": 40}) for o in many]
    return leaderboard([row_of(o) for o in many + tight])


def test_trade_off_has_a_line_a_method_and_switches_its_axis(board):
    figure = figures.trade_off(board)
    assert [trace.name for trace in figure.data] == [
        "global-mp", "gmp", "random-pruning", "small-dense",
    ]  # fmt: skip
    first = figure.data[0]
    assert list(first.x) == pytest.approx([100 * 40 / 1100, 100 * 200 / 1100])
    assert list(first.y) == pytest.approx([97.2, 97.2])
    assert all(half > 0 for half in first.error_y.array)
    assert figure.layout.xaxis.type == "log"
    assert any(shape.line.dash == "dash" and shape.y0 == pytest.approx(98.4)
               for shape in figure.layout.shapes)  # fmt: skip
    buttons = figure.layout.updatemenus[0].buttons
    assert [b.label for b in buttons] == ["Parameters left", "MACs promised",
                                          "Milliseconds measured"]  # fmt: skip
    assert buttons[2].args[0]["x"][0] == [0.21, 0.21]


def test_trade_off_of_one_budget_sets_methods_side_by_side(many):
    figure = figures.trade_off(leaderboard([row_of(o) for o in many]))
    assert [trace.x[0] for trace in figure.data] == [0, 1, 2, 3]
    assert figure.layout.updatemenus[0].buttons[0].label == "Methods"


def test_trade_off_of_several_tasks_and_without_latency(board):
    other = [
        {**row, "task": "b", "metric": "perplexity", "latency_ms": None, "higher_is_better": False}
        for row in board
    ]
    figure = figures.trade_off([{**row, "latency_ms": None} for row in board] + other)
    assert len(figure.data) == 8
    assert len(figure.layout.updatemenus[0].buttons) == 2
    assert "lower is better" in figure.layout.yaxis2.title.text
    with pytest.raises(InputError, match="x: got 'latency'"):
        figures.trade_off(other, x="latency")
    with pytest.raises(InputError, match="did you mean 'density'"):
        figures.trade_off(board, x="densty")
    with pytest.raises(InputError, match="board"):
        figures.trade_off([])


def layers(count):
    return [{"name": f"block{n}.weight", "kept": n % 5, "total": 10} for n in range(count)]


def test_few_layers_are_named_and_counted():
    figure = figures.layer_bars(layers(4))
    assert list(figure.data[0].x) == [0, 10, 20, 30]
    assert list(figure.layout.yaxis.ticktext) == [f"block{n}.weight" for n in range(4)]
    assert list(figure.layout.yaxis2.ticktext)[:2] == ["emptied, 0 of 10", "10.0 %, 1 of 10"]
    assert "1 of 10" in figure.data[0].hovertext[1]
    figure = figures.layer_bars([{**row, "short": "b"} for row in layers(2)])
    assert figure.layout.meta["narrow"]["yaxis.ticktext"] == ["b", "b"]


def test_many_layers_stand_side_by_side():
    figure = figures.layer_bars(layers(160))
    assert figure.layout.height < 400
    assert len(figure.data[0].x) == 160
    assert "block77" in figure.data[0].hovertext[77]
    crosses = figure.data[1]
    assert list(crosses.x) == list(range(1, 161, 5))


def test_rounds_run_from_dense_to_sparse():
    history = [{"round": n, "density": 0.8**n, "accuracy": 0.98 - 0.01 * n} for n in range(10)]
    figure = figures.rounds(history, "accuracy")
    low, high = figure.layout.xaxis.range
    assert low > high
    assert figure.data[0].y[0] == pytest.approx(98)
    assert figures.has_rounds(history, "accuracy")
    assert not figures.has_rounds([{"arm": "finetune", "accuracy": 0.9}], "accuracy")
    with pytest.raises(InputError, match="history"):
        figures.rounds([], "accuracy")


def test_learning_curves_join_the_stages(events):
    figure = figures.learning_curves(events)
    assert max(x for x in figure.data[1].x if x is not None) == 79
    assert len(figure.layout.shapes) == 1
    assert [note.text for note in figure.layout.annotations] == ["train", "prune"]
    # a resumed run tells steps twice: the later telling counts
    again = [*events, {**events[5], "loss": 9.0}]
    assert figures.training_stages(again)["0-train/train"][5]["loss"] == 9.0
    long = [{**events[0], "step": step, "loss": 1.0} for step in range(20_000)]
    assert len(figures.learning_curves(long).data[0].x) <= figures.CURVE_POINTS + 2
    with pytest.raises(InputError, match="events"):
        figures.learning_curves([])


def test_promised_and_measured_says_what_was_not_timed(outcome):
    rows = [
        {"label": "dense", "macs": 1000, "latency": outcome["before"]["latency"]},
        {"label": "gmp", "macs": 100, "latency": None},
    ]
    figure = figures.promised_and_measured(rows)
    words = [text for trace in figure.data if trace.type == "scatter" for text in trace.text]
    assert [word.strip() for word in words] == ["1k", "100", "0.21 ms ± 0.01", "not timed"]


def test_png(tmp_path, monkeypatch, outcome):
    figure = figures.layer_bars(outcome["layers"])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"png: got no browser.*accepted: Chrome"):
        figures.to_png(figure, tmp_path / "a.png")


def test_png_where_there_is_a_browser(tmp_path, outcome):
    figure = figures.layer_bars(outcome["layers"])
    try:
        path = figures.to_png(figure, tmp_path / "sub" / "a.png", width=300, height=200)
    except InputError as error:
        pytest.skip(str(error))
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (600, 400)


def test_missing_plotly_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match=r"pip install 'secateurs\[report\]'"):
        figures.layer_bars(layers(2))
