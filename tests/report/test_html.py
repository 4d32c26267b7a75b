"""The report is one file that needs nothing else, shows names literally, and takes any outcome."""

import json
import re
from html.parser import HTMLParser

import pytest

from secateurs.errors import InputError
from secateurs.report.headline import ENGINES, SAMPLES, headline
from secateurs.report.html import bound, grouped, labelled, records_table, write_report
from secateurs.report.leaderboard import leaderboard, row_of

from .conftest import changed

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\"{{7*7}}"


class Reader(HTMLParser):
    """Tags with their attributes, the text outside scripts, the scripts."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.scripts, self.inside = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif not self.inside:
            self.words.append(data)


def read(path):
    reader = Reader()
    text = path.read_text(encoding="utf-8")
    reader.feed(text)
    reader.all = text
    reader.text = " ".join(" ".join(reader.words).replace("\u00a0", " ").split())
    kinds = [attrs.get("type") for tag, attrs in reader.tags if tag == "script"]
    reader.figures = [
        json.loads(script)
        for script, kind in zip(reader.scripts, kinds, strict=True)
        if kind == "application/json"
    ]
    return reader


def check_complete(reader):
    for tag, attrs in reader.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        for name, value in attrs.items():
            assert name not in ("src", "href", "srcset", "action", "data"), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    style = re.search("<style>(.*?)</style>", reader.all, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_one_outcome(tmp_path, outcome, events):
    path = write_report(
        tmp_path / "sub" / "report.html",
        title="zoo:mlp on digits",
        outcomes=[outcome],
        recipe="model: zoo:mlp\nstages:\n- prune: global-mp\n",
        events=events,
        environment={"torch": "2.9", "cores": 2, "date": "2025-01-01 10:00"},
        intro="A small network.",
    )
    report = read(path)
    check_complete(report)
    assert list(path.parent.iterdir()) == [path]
    for words in (
        "global-mp keeps 97.8 % accuracy (dense 98.4 %) with 18.2 % of the parameters: 5.5 times "
        "fewer.",
        "runs as fast as the dense one (1×), because zeros in dense tensors are still multiplied",
        "asked 90.00 % sparsity reached 90.00 % ✓ kept",
        "MACs promised, zeros skipped 1k 100 10× fewer",
        "0.21 ms ± 0.01",
        "Zeros are only zeros",
        "2.weight was emptied",
        "Controls",
        "- prune: global-mp",
        "2209.14624",
        "cores 2",
        "A small network.",
    ):
        assert words in report.text, words
    assert len(report.figures) == 4
    assert report.all.count("plotly.js v") == 1


def test_without_task_masks_or_measurements(tmp_path, bare):
    report = read(write_report(tmp_path / "a.html", title="my model", outcomes=[bare]))
    check_complete(report)
    assert "global-mp keeps 10.0 % of the weights: 10 times fewer." in report.text
    assert "No latency was measured" in report.text
    assert len(report.figures) == 1

    nothing = changed(bare, layers=[])
    report = read(write_report(tmp_path / "b.html", title="my model", outcomes=[nothing]))
    check_complete(report)
    assert report.figures == []
    assert "plotly.js v" not in report.all
    assert len(report.all) < 50_000


def test_latency_none(tmp_path, outcome):
    for cost in ("before", "after"):
        outcome[cost]["latency"] = None
    report = read(write_report(tmp_path / "a.html", title="t", outcomes=[outcome]))
    assert "No latency was measured" in report.text
    assert "Promised and measured" not in report.text
    assert "Latency, measured" not in report.text


def test_promised_macs_stand_beside_the_time_in_every_engine(tmp_path, outcome, timed):
    outcome["tables"] = {ENGINES: timed}
    report = read(write_report(tmp_path / "a.html", title="t", outcomes=[outcome]))
    for words in (
        "Promised and measured, by engine",
        "onnxruntime 0.1× 0.21 ms ± 0.01 0.105 ms ± 0.005 0.5× 0.45 to 0.55×",
        "compile 0.1× not timed not timed – –",
        "compile: no compiler.",
        "In onnxruntime it runs 2 times as fast as the dense one.",
    ):
        assert words in report.text, words


def test_a_missed_budget_is_seen(tmp_path, outcome):
    outcome["promise"]["reached"] = 0.8
    outcome["notes"] = ["a remark", "budget sparsity: asked 0.9, MISSED 0.8"]
    report = read(write_report(tmp_path / "a.html", title="t", outcomes=[outcome]))
    assert "reached 80.00 % ✗ missed" in report.text
    assert report.text.index("MISSED") < report.text.index("a remark")


def test_twelve_outcomes(tmp_path, many):
    rows = [row_of(outcome) for outcome in many]
    board = leaderboard([{**row, "seconds": 3.0, "latency_ms": None} for row in rows])
    path = write_report(tmp_path / "a.html", title="t", outcomes=many, leaderboard=board)
    report = read(path)
    check_complete(report)
    assert "At sparsity=0.9, global-mp comes first: 97.2 % ± 0.5 accuracy" in report.text
    assert "Outcome by outcome" in report.text
    assert sum(tag == "details" for tag, _ in report.tags) == 4
    assert "Details below are those of seed 1, the median one." in report.text
    assert "2.weight was emptied (3 times)" in report.text
    assert report.all.count("plotly.js v") == 1
    # without a leaderboard it is made from the outcomes
    made = read(write_report(tmp_path / "b.html", title="t", outcomes=many))
    assert "global-mp comes first: 97.2 % ± 0.5 accuracy" in made.text
    assert "Promised and measured" in made.text
    assert "The masked models run as fast as the dense one" in made.text


def test_several_tasks_and_budgets(tmp_path, many):
    others = [changed(o, budget="sparsity=0.99") for o in many]
    third = [changed(o, source={"model": "zoo:lm", "data": "text"}) for o in many]
    report = read(write_report(tmp_path / "a.html", title="t", outcomes=many + others + third))
    assert "global-mp is the best, or cannot be told from the best, in 3 of 3" in report.text
    assert "(2 tasks, 2 budgets)" in report.text
    assert "sparsity=0.9 — zoo:lm on text" in report.text


def test_no_outcome_at_all(tmp_path):
    report = read(write_report(tmp_path / "a.html", title="t", outcomes=[]))
    check_complete(report)
    assert "No run has finished." in report.text


def test_hostile_names_stay_names(tmp_path, outcome, many):
    wild = changed(
        outcome,
        label=HOSTILE,
        method=HOSTILE,
        budget=HOSTILE,
        primary="accuracy",
        source={"model": HOSTILE, "data": HOSTILE},
        layers=[{"name": HOSTILE, "kept": 1, "total": 2}],
        tables={HOSTILE: [{HOSTILE: HOSTILE}]},
        notes=[HOSTILE],
        history=[],
    )
    wild["metrics_after"][HOSTILE] = 1.0
    events = [{"event": "train", "at": HOSTILE, "stage": "s", "step": 0, "loss": 1.0}]
    for outcomes in ([wild], [wild, *many]):
        path = write_report(
            tmp_path / "a.html",
            title=HOSTILE,
            outcomes=outcomes,
            recipe=HOSTILE,
            events=events,
            environment={HOSTILE: HOSTILE, "date": HOSTILE},
            intro=HOSTILE,
        )
        report = read(path)
        check_complete(report)
        assert HOSTILE in "".join(report.words)
        drawn = json.dumps(report.figures)
        assert "<script" not in drawn
        assert "<img" not in drawn


def test_labels_tell_variants_apart(many):
    variants = [changed(many[0], options={"rounds": n, "rate": 0.2}) for n in (1, 5)]
    labels = [o["label"] for o in labelled([*variants, many[6]])]
    assert labels == ["global-mp (rounds=1)", "global-mp (rounds=5)", "random-pruning"]
    assert [o["label"] for o in labelled([{**many[0], "label": "mine"}])] == ["mine"]
    assert [len(group) for group in grouped(labelled(many))] == [3, 3, 3, 3]


def test_wide_tables_lie_on_their_side():
    layers = {f"layer{n}": 0.5 for n in range(20)}
    table = records_table("index", [{"round": 0, **layers}, {"round": 1, **layers}])
    assert table.head == ["Round", "0", "1"]
    assert len(table.rows) == 20
    assert table.rows[0] == ["layer0", "0.5", "0.5"]
    assert table.folded
    table = records_table("ragged", [{"a": 1}, {"b_c": 0.5}])
    assert table.head == ["A", "B c"]
    assert table.rows == [["1", ""], ["", "0.5"]]


def test_headlines(outcome):
    assert headline(outcome)[0].startswith("global-mp keeps 97.8 % accuracy")
    outcome["metrics_after"]["accuracy"] = 0.42
    assert "falls to 42.0 % accuracy" in headline(outcome)[0]
    outcome["metrics_after"]["accuracy"] = 0.99
    assert "reaches 99.0 % accuracy" in headline(outcome)[0]
    lower = {"primary": "perplexity", "higher_is_better": False}
    worse = changed(
        outcome, **lower, metrics_before={"perplexity": 10.0}, metrics_after={"perplexity": 12.5}
    )
    assert "rises to perplexity 12.5 (dense 10)" in headline(worse)[0]


def test_headline_of_a_part_of_the_samples(outcome):
    outcome["tables"] = {SAMPLES: [{"kept": 25, "of": 200}]}
    sentence = headline(outcome)[0]
    assert "(all samples " in sentence
    assert sentence.endswith(", trained on 12.5 % of the samples.")


def test_headlines_on_speed(outcome):
    after = outcome["after"]
    after["latency"] = {"median": 0.1, "low": 0.1, "high": 0.1, "repeats": 30}
    assert "2.1 times as fast as the dense one; its zeros are still" in headline(outcome)[1]
    after["latency"] = {"median": 0.42, "low": 0.42, "high": 0.42, "repeats": 30}
    assert "2 times slower than the dense one" in headline(outcome)[1]
    after |= {"parameters": 200, "latency": {"median": 0.1, "low": 0.1, "high": 0.1}}
    assert headline(outcome)[1] == (
        "Its tensors are smaller, and on this machine it runs 2.1 times as fast as the dense one."
    )


def test_numbers_stay_with_their_units():
    assert bound("97.8 % of 4.1 ms ± 0.2") == "97.8\u00a0% of 4.1\u00a0ms ±\u00a00.2"


def test_an_outcome_that_is_none_is_refused(tmp_path, outcome):
    del outcome["history"]
    with pytest.raises(InputError, match=r"outcomes\[0\].*'history'"):
        write_report(tmp_path / "a.html", title="t", outcomes=[outcome])
    assert not (tmp_path / "a.html").exists()


def test_a_real_outcome(tmp_path):
    import torch
    from torch import nn

    import secateurs as sc

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    result = sc.prune(model, "global-mp", "sparsity=0.5")
    report = read(write_report(tmp_path / "a.html", title="t", outcomes=[result.as_dict()]))
    assert "global-mp keeps 50.0 % of the weights: 2 times fewer." in report.text
    assert "✓ kept" in report.text
