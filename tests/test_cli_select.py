"""`secateurs select`: from files to a file, one line for what is wrong, on where it was killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from sklearn.datasets import load_digits

import secateurs as sc
from secateurs.cli import main
from secateurs.selection.result import read_selection
from secateurs.state import Tree
from secateurs.workspace import Workspace

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def select(*words: object) -> Result:
    return CliRunner().invoke(main, ["select", *(str(w) for w in words), "--threads", "1"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The digits in a folder of three Parquet files."""
    images, labels = load_digits(return_X_y=True)
    folder = tmp_path / "digits"
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(images)), 3)):
        flat = pa.array(images[part].astype(np.float16).reshape(-1))
        table = {
            "id": [f"digit-{n}" for n in part],
            "label": labels[part],
            "url": [f"https://example.org/{n}.png" for n in part],
            "embedding": pa.FixedSizeListArray.from_arrays(flat, 64),
        }
        pq.write_table(pa.table(table), folder / f"{number}.parquet")
    return folder


def test_the_way_through(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "kept.parquet"
    result = select(rows, "--method", "density", "--keep", 0.25, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["rows"], told["kept"], told["method"]) == (1797, 449, "density-based-pruning")
    columns = read_selection(out)
    assert columns["keep"].sum() == 449
    assert set(columns) == {"id", "label", "url", "score", "keep", "reason", "cluster", "distance"}
    assert columns["url"][5] == "https://example.org/5.png"
    images, labels = load_digits(return_X_y=True)
    ids = np.array([f"digit-{n}" for n in range(1797)])
    here = sc.select(images.astype(np.float16), "density", 0.25, ids=ids, labels=labels)
    assert np.array_equal(here.mask, columns["keep"])
    assert {p.name for p in out.parent.iterdir()} == {"kept.parquet"}, "no work is left behind"


def test_only_the_kept_rows_with_a_table(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.parquet"
    words = ["--clusters", 20, "--within", "easy", "--only-kept", "--seed", 3]
    result = select(rows, "--method=density-based-pruning", "--keep", 0.1, "--out", out, *words)
    assert result.exit_code == 0, result.output
    columns = read_selection(out)
    assert len(columns["id"]) == 180
    assert columns["keep"].all()
    assert "class 9" in result.stdout
    assert "kept    180 of 1797 rows" in result.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--keep", 0], "keep: got 0.0; accepted: a fraction of the rows: above 0, at most 1"),
        (["--keep", 1.5], "keep: got 1.5; accepted: a fraction of the rows"),
        (["--keep", "nan"], "keep: got nan; accepted: a fraction of the rows"),
        (["--method", "densty"], "did you mean 'density'"),
        (["--method", "magnitude"], "a method that chooses samples"),
        (["--out", "kept.csv"], "a file that ends in .parquet"),
        (["--clusters", 0], "clusters: got 0"),
        (["--clusters", "many"], "clusters"),
        (["--label", "kind"], "label of 0.parquet: got 'kind'"),
        (["--embedding", "url"], "embedding of 0.parquet: got 'url'"),
        (["--threads", 0], "threads"),
        (["--report", "page.txt"], "a file that ends in .html"),
        (["--report", "page.html", "--images", "7x7"], "images: got '7x7'"),
        (["--report", "page.html", "--images", "url"], "images: got 'https://example.org/0.png'"),
        (["--out", "/proc/kept.parquet"], "out: got '/proc/kept.parquet'; accepted: a file in"),
        (["--report", "/proc/page.html"], "report: got '/proc/page.html'; accepted: a file in"),
        (["--out", "{rows}/0.parquet"], "out: got '{rows}/0.parquet'; accepted: a file apart from"),
        (["--out", "{rows}/new/k.parquet"], "accepted: a file apart from {rows}, which is read"),
        (["--report", "{rows}/p.html"], "report: got '{rows}/p.html'; accepted: a file apart from"),
        (["--target", "{rows}"], "target"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    words: list[object], told: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"--method": "density", "--keep": 0.25, "--out": "kept.parquet"}
    pairs = dict(zip(words[::2], words[1::2], strict=False)) if len(words) % 2 == 0 else {}
    lines = [w for k, v in given.items() if k not in pairs and k not in words for w in (k, v)]
    shown = [str(w).format(rows=rows) for w in words]
    result = CliRunner().invoke(main, ["select", str(rows), *(str(w) for w in lines), *shown])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert told.format(rows=rows) in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits"]
    assert sorted(p.name for p in rows.iterdir()) == ["0.parquet", "1.parquet", "2.parquet"]


def test_links_hide_no_source_and_no_target(rows: Path, tmp_path: Path) -> None:
    """What would be written over, by whatever name, is what was read."""
    table = pq.read_table(rows / "0.parquet")
    pq.write_table(table, tmp_path / "one.parquet")
    linked = tmp_path / "shards"
    linked.mkdir()
    (linked / "a.parquet").symlink_to(tmp_path / "one.parquet")
    (tmp_path / "also").symlink_to(rows)
    words = ["--method", "density", "--keep", 0.25]
    aimed = ["--method", "dp4tl", "--keep", 0.5, "--target", tmp_path / "also"]
    for source, out, more in [
        (tmp_path / "one.parquet", tmp_path / "one.parquet", words),
        (linked, tmp_path / "one.parquet", words),
        (rows, tmp_path / "also" / "kept.parquet", words),
        (tmp_path / "one.parquet", rows / "kept.parquet", aimed),
    ]:
        result = select(source, *more, "--out", out)
        assert result.exit_code == 2
        assert f"out: got '{out}'; accepted: a file apart from" in result.stderr
    assert pq.read_table(tmp_path / "one.parquet").equals(table)
    assert sorted(p.name for p in rows.iterdir()) == ["0.parquet", "1.parquet", "2.parquet"]


def test_a_refusal_at_the_end_leaves_the_work_to_go_on_from(rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept.parquet"
    words = ["--method", "density", "--keep", 0.002, "--clusters", 1, "--out", out]
    refused = select(rows, *words, "--forbid-empty-classes")
    assert refused.exit_code == 2
    assert "nothing of class" in refused.stderr
    assert "without --forbid-empty-classes, which goes on from what is done" in refused.stderr
    (folder,) = tmp_path.glob(".kept.parquet.*")
    done = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    assert len(done) > 4
    fitted: list[str] = []

    def once(self: Workspace, name: str, compute: Callable[[], Tree]) -> Tree:
        fitted.extend([name] if not self.has(name) else [])
        return plain(self, name, compute)

    plain = Workspace.once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "once", once)
        assert select(rows, *words).exit_code == 0
    assert not fitted, "nothing is computed again"
    assert not list(tmp_path.glob(".kept.parquet.*"))


def test_a_picture_that_is_no_picture_loses_no_work(rows: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    (tmp_path / "text.png").write_text("no picture")
    table = pq.read_table(rows / "0.parquet").drop(["url"])
    paths = pa.array([str(tmp_path / "text.png")] * len(table))
    pq.write_table(table.append_column("path", paths), source)
    words = ["--method", "density", "--keep", 0.25, "--clusters", 3, "--images", "path"]
    report = ["--report", tmp_path / "page.html"]
    result = select(source, *words, "--out", tmp_path / "kept.parquet", *report)
    assert result.exit_code == 2
    assert "a picture (" in result.stderr
    (folder,) = tmp_path.glob(".kept.parquet.*")
    assert list(folder.rglob("*.safetensors"))


def test_a_bad_row_is_named(rows: Path, tmp_path: Path) -> None:
    table = pq.read_table(rows / "1.parquet")
    images = table["embedding"].to_numpy()
    images = np.stack(images)
    images[7] = np.nan
    lists = pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), 64)
    place = table.schema.get_field_index("embedding")
    pq.write_table(table.set_column(place, "embedding", lists), rows / "1.parquet")
    result = select(rows, "--method", "density", "--keep", 0.25, "--out", tmp_path / "k.parquet")
    assert result.exit_code == 2
    assert "NaN or Inf in row 7 of 1.parquet (id digit-606)" in result.stderr


KILL = """
import os, signal, sys
from secateurs.workspace import Workspace
count, event = int(sys.argv.pop(1)), Workspace.event
def counted(self, kind, **values):
    global count
    event(self, kind, **values)
    if kind == "done":
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
Workspace.event = counted
from secateurs.cli import main
main(sys.argv[1:])
"""


def test_the_same_command_goes_on_where_it_was_killed(rows: Path, tmp_path: Path) -> None:
    words = [str(rows), "--method", "density", "--keep", "0.25", "--threads", "1"]
    out, whole = tmp_path / "kept.parquet", tmp_path / "whole.parquet"
    command = [sys.executable, "-c", KILL, "6", "select", *words, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    (folder,) = tmp_path.glob(".kept.parquet.*")
    assert len(list(folder.rglob("*.safetensors"))) == 6
    result = select(*words, "--out", out)
    assert result.exit_code == 0, result.output
    assert select(*words, "--out", whole).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".kept.parquet.*"))


def test_the_work_of_another_selection_makes_room(rows: Path, tmp_path: Path) -> None:
    old = tmp_path / ".kept.parquet.0123"
    old.mkdir()
    (old / "selection.json").write_text("{}")
    mine = tmp_path / ".kept.parquet.mine"
    mine.mkdir()
    words = ["--method", "density", "--keep", 0.1, "--clusters", 3, "--epsilon", "none"]
    assert select(rows, *words, "--out", tmp_path / "kept.parquet").exit_code == 0
    assert not old.exists()
    assert mine.exists(), "what has no mark is somebody else's"


def test_prune_refuses_what_select_runs_before_it_trains(tmp_path: Path) -> None:
    words = ["--data", "digits", "--method", "density", "--budget", "keep=0.5"]
    result = CliRunner().invoke(main, ["prune", "zoo:mlp", *words, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "secateurs select runs this one" in result.stderr
    assert not (tmp_path / "run").exists()
