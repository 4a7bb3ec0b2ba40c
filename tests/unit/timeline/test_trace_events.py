"""Timelines as trace events: what profilers ask of them."""

import json

import pytest

from qubes_itests.cli.arguments import Command
from qubes_itests.cli.last_run import execute
from qubes_itests.exc import HarnessError
from qubes_itests.run.settings import ConfigurationError, Settings
from qubes_itests.timeline import Recorder, begin, note, recording
from qubes_itests.timeline.document import Header, dump
from qubes_itests.timeline.trace_events import trace_events


def timeline():
    """Return a header and records in which two calls overlap and one never ends."""
    with recording(Recorder()) as recorder:
        with begin("phase", name="call"):
            first = begin("service", "a", target="b", service="x.Y+", status=None)
            second = begin("run", "a", command="true")
            first.end(status=0)
            note("memory", None, used={"a": 12, "dom0": 1024})
            second.end(status=1)
            note("state", "a", state="Halted")
        begin("run", "b", command="sleep 9")
    header = Header(
        test="p::t", started=1.5, outcome="failed", duration=recorder.time()
    )
    return header, recorder.records()


def test_events_are_such_as_the_format_has():
    document = json.loads(trace_events(*timeline()))
    events = document["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert set(names.values()) == {"p::t", "a", "b"}
    assert {e["ph"] for e in events} == {"M", "X", "i", "C", "s", "f"}
    assert all(isinstance(e["ts"], int) for e in events if e["ph"] != "M")
    assert all(e["pid"] in names and isinstance(e["name"], str) for e in events)
    arrows = {e["ph"]: names[e["pid"]] for e in events if e["ph"] in "sf"}
    assert arrows == {"s": "a", "f": "b"}
    (counter,) = [e for e in events if e["ph"] == "C" and names[e["pid"]] == "a"]
    assert counter["args"] == {"used": 12}


def test_what_is_in_one_thread_is_in_one_another():
    events = json.loads(trace_events(*timeline()))["traceEvents"]
    threads = {}
    for event in events:
        if event["ph"] != "X":
            continue
        ends = threads.setdefault((event["pid"], event["tid"]), [])
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        end = event["ts"] + event["dur"]
        assert not ends or end <= ends[-1] + 1  # rounding
        ends.append(end)


def export(directory):
    return execute(Command(name="report", words=("trace", str(directory))), Settings())


def test_the_command_writes_them_beside_each_timeline(tmp_path, capsys):
    place = tmp_path / "a.test"
    place.mkdir()
    with pytest.raises(ConfigurationError, match="there is no timeline"):
        export(tmp_path)
    (place / "timeline.jsonl").write_bytes(dump(*timeline()))
    assert export(tmp_path) == export(place) == 0
    assert "a.test/trace.json" in capsys.readouterr().out
    assert json.loads((place / "trace.json").read_text())["traceEvents"]
    (place / "timeline.jsonl").write_bytes(b"{}\n")
    with pytest.raises(ConfigurationError, match="timeline"):
        export(tmp_path)


@pytest.mark.parametrize("text", ["\x1b[2J", "::error::", "a\nb"])
def test_names_are_of_one_line_and_steer_nothing(text):
    with recording(Recorder()) as recorder:
        begin("run", text, command=text).end(status=0, stderr=text)
    header = Header(test="t", started=0.0, outcome="", duration=1.0)
    for event in json.loads(trace_events(header, recorder.records()))["traceEvents"]:
        assert "\n" not in event["name"]
        assert "\x1b" not in event["name"]


def test_the_command_writes_through_no_link(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "trace.json"
    victim.write_text("mine")
    link.symlink_to(victim)
    (tmp_path / "timeline.jsonl").write_bytes(dump(*timeline()))
    assert export(tmp_path) == 0
    assert victim.read_text() == "mine"
    assert not link.is_symlink()


@pytest.mark.parametrize("record", [b"7", b"{}", b'{"t": 1, "kind": "service"}'])
def test_what_is_no_record_is_refused(tmp_path, record):
    header, _ = timeline()
    (tmp_path / "timeline.jsonl").write_bytes(dump(header, []) + record + b"\n")
    with pytest.raises(ConfigurationError, match="expected a timeline"):
        export(tmp_path)


def test_the_command_finds_the_attempts_and_nothing_elsewhere(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    for place in (run / "a/attempt-1", other):
        place.mkdir(parents=True)
        (place / "timeline.jsonl").write_bytes(dump(*timeline()))
    (run / "b").symlink_to(other)
    assert export(run) == 0
    assert capsys.readouterr().out == f"Wrote {run}/a/attempt-1/trace.json.\n"
    assert not (other / "trace.json").exists()


def test_a_timeline_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "timeline.jsonl").mkdir()
    with pytest.raises(HarnessError, match=r"timeline\.jsonl: Is a directory"):
        export(tmp_path)
