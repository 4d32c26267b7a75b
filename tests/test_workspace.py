"""Finished steps are read, unfinished ones computed; listeners hear of both."""

import pytest
import torch

from secateurs.errors import InputError
from secateurs.workspace import EventLog, Workspace, read_events


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"calls": self.calls, "tensor": torch.full((2,), float(self.calls))}


def test_once_computes_once(tmp_path):
    compute = Counter()
    first = Workspace(tmp_path).once("step", compute)
    again = Workspace(tmp_path).once("step", compute)
    assert compute.calls == 1
    assert first["calls"] == again["calls"] == 1
    assert torch.equal(first["tensor"], again["tensor"])
    assert Workspace(tmp_path).has("step")
    assert not Workspace(tmp_path).has("other")


def test_without_a_folder_nothing_is_kept():
    compute, work = Counter(), Workspace()
    work.once("step", compute)
    work.once("step", compute)
    work.snapshot("step", compute, force=True)
    assert compute.calls == 2
    assert not work.has("step")
    assert work.last_snapshot("step") is None


def test_a_step_that_failed_is_not_finished(tmp_path):
    work = Workspace(tmp_path)
    with pytest.raises(ZeroDivisionError):
        work.once("step", lambda: 1 / 0)
    assert not work.has("step")
    assert work.once("step", lambda: {"a": 1}) == {"a": 1}


def test_children_keep_apart(tmp_path):
    work = Workspace(tmp_path)
    work.child("a").child("b").once("step", lambda: {"at": "b"})
    assert (tmp_path / "a" / "b" / "step.safetensors").is_file()
    assert work.child("a").child("b").label == "a/b"
    assert not work.has("step")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "a b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="step: got"):
        Workspace(tmp_path).child(name)


def test_snapshots_are_taken_at_most_every_so_often(tmp_path):
    slow, compute = Workspace(tmp_path, snapshot_seconds=3600), Counter()
    slow.snapshot("step", compute)
    assert compute.calls == 0
    slow.snapshot("step", compute, force=True)
    assert slow.last_snapshot("step")["calls"] == 1
    eager = Workspace(tmp_path, snapshot_seconds=0)
    eager.snapshot("step", compute)
    assert Workspace(tmp_path).last_snapshot("step")["calls"] == 2
    eager.drop_snapshot("step")
    eager.drop_snapshot("step")
    assert eager.last_snapshot("step") is None


def test_a_log_holds_what_happened_where(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    work = Workspace(listeners=[log]).child("round-1")
    with work.progress("train", 10) as advance:
        advance(5)
        work.event("note", text="half way")
    heard = [(e["event"], e["at"]) for e in read_events(tmp_path / "events.jsonl")]
    assert heard == [("begin", "round-1/train"), ("note", "round-1"), ("end", "round-1/train")]


def test_progress_ends_even_when_the_work_fails(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(ZeroDivisionError), Workspace(listeners=[log]).progress("train", 2):
        _ = 1 / 0
    assert [e["event"] for e in read_events(tmp_path / "events.jsonl")] == ["begin", "end"]


def test_a_half_written_line_costs_only_itself(tmp_path):
    path = tmp_path / "events.jsonl"
    EventLog(path).event("note", {"text": "one"})
    with open(path, "a") as file:
        file.write('{"event": "note", "te')
    EventLog(path).event("note", {"text": "two"})
    assert [e["text"] for e in read_events(path)] == ["one", "two"]
    assert read_events(tmp_path / "missing") == []
