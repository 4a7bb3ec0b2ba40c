"""What is read of run.json and of timelines, whoever wrote them."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_itests.exc import HarnessError
from qubes_itests.html_report import reading
from qubes_itests.html_report.reading import read_run, read_timeline

HEADER = {"format": "qubes_itests.timeline", "version": 1, "started": 7, "vms": ["a"]}
ROOM = 1 << 20


def written(directory, records, header=HEADER):
    path = directory / "timeline.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record)
             for record in (header, *records)]  # fmt: skip
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(directory, *records, room=ROOM):
    return read_timeline(written(directory, records), room)


def record(kind="run", t=1.5, **fields):
    return {"t": t, "kind": kind, "vm": "a", **fields}


def test_known_fields_of_the_right_type_are_read(tmp_path):
    one = record(command="true", status=0, duration=0.5, user="user", stderr="a\nb\n")
    assert read(tmp_path, one) == {
        "started": 7,
        "vms": ["a"],
        "left_out": {},
        "records": [one],
    }


@pytest.mark.parametrize(
    "field",
    [
        {"status": "0"},
        {"status": True},
        {"duration": -1},
        {"duration": 1e300},
        {"duration": float("nan")},
        {"command": ["true"]},
        {"colour": "red"},
        {"steps": [["a", 1]]},
    ],
)
def test_what_is_not_known_or_has_another_type_is_left_out(tmp_path, field):
    assert read(tmp_path, record(**field))["records"] == [record()]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        "[" * 100_000,
        record(kind="colour"),
        record(kind=["run"]),
        record(t=-1),
        record(t="0"),
        {"kind": "run"},
    ],
)
def test_a_line_that_is_no_record_does_no_harm(tmp_path, line):
    assert read(tmp_path, line, record())["records"] == [record()]


def test_steps_are_pairs_of_a_name_and_seconds(tmp_path):
    steps = [
        ["boot", 1],
        ["boot"],
        ["boot", "1"],
        "boot",
        ["agent", 0.5],
        ["root", None],
    ]
    (found,) = read(tmp_path, record("start", steps=steps))["records"]
    assert found["steps"] == [["boot", 1], ["agent", 0.5], ["root", None]]


@pytest.mark.parametrize("header", [{}, {"format": "qubes_itests.run"}, []])
def test_another_file_is_no_timeline(tmp_path, header):
    assert read_timeline(written(tmp_path, [record()], header), ROOM) is None


def test_there_may_be_no_timeline(tmp_path):
    assert read_timeline(tmp_path / "none", ROOM) is None
    assert read_timeline(tmp_path, ROOM) is None


def test_where_room_is_short_what_explains_most_is_kept(tmp_path):
    """Of lines and calls the last, of memory a curve of all the time."""
    records = [
        made
        for number in range(1000)
        for made in (
            record("console", number, line="x" * 100),
            record("memory", number, used={"a": number}),
            record("run", number, command="true"),
        )
    ]
    records += [record("state", 0, state="Running"), record("failure", 999, text="no")]
    found = read(tmp_path, *records, room=90_000)
    by_kind = {}
    for one in found["records"]:
        by_kind.setdefault(one["kind"], []).append(one["t"])
    assert by_kind["failure"] == [999]
    assert by_kind["state"] == [0]
    assert by_kind["run"] == list(range(1000))
    assert by_kind["console"][-1] == 999
    assert by_kind["console"] == list(range(by_kind["console"][0], 1000))
    assert by_kind["memory"][0] == 0
    assert by_kind["memory"][-1] > 900
    kept = {kind: len(times) for kind, times in by_kind.items()}
    assert found["left_out"] == {
        kind: 1000 - kept[kind] for kind in ("console", "memory")
    }


def test_a_flood_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MOST_READ", 10_000)
    found = read(tmp_path, *[record("console", line="x")] * 10_000)
    assert 100 < len(found["records"]) < 250


def test_a_long_line_is_cut(tmp_path):
    said = [record("console", line="x" * 5000), record(stderr="y" * 50_000)]
    console, command = read(tmp_path, *said)["records"]
    assert len(console["line"]) == 1000
    assert len(command["stderr"]) == 4096
    assert read(tmp_path, record("console", line="x" * 70_000))["records"] == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted({name for fields in reading._KINDS.values() for name in fields})
RECORDS = st.builds(
    lambda fields, t, kind: {**fields, "t": t, "kind": kind},
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5),
    VALUES | st.floats(0, 9),
    st.sampled_from(sorted(reading._KINDS)),
)


def texts(value):
    match value:
        case str():
            yield value
        case dict():
            for name, inner in value.items():
                yield from texts(name)
                yield from texts(inner)
        case list():
            for inner in value:
                yield from texts(inner)


@settings(max_examples=40)
@given(st.lists(RECORDS, max_size=6), st.integers(0, 2000))
def test_whatever_is_written_is_read_within_its_room_and_safe(
    tmp_path_factory, records, room
):
    directory = tmp_path_factory.mktemp("any")
    found = read_timeline(written(directory, records), room)
    json.dumps(found, allow_nan=False)
    assert len(json.dumps(found["records"])) <= room + 2
    for text in texts(found):
        odd = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")}
        assert odd <= {"\n", "\t"}


@pytest.mark.parametrize("text", ["", "[]", '{"format": "qubes_itests.run"}', "\0"])
def test_another_file_is_no_run(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(HarnessError, match=r"expected a qubes_itests.run of version 1"):
        read_run(path)


def test_without_a_run_the_error_names_the_file(tmp_path):
    with pytest.raises(HarnessError, match=r"run.json"):
        read_run(tmp_path / "run.json")


def test_tests_of_a_run_are_objects(tmp_path):
    path = tmp_path / "run.json"
    row = {"test": "a", "outcome": "passed", "phases": {"test": 1}, "earlier": []}
    rows = [row, None, 7, "b"]
    run = {"format": "qubes_itests.run", "version": 1, "seed": 3, "tests": rows}
    path.write_text(json.dumps({**run, "host": {"cpus": 2}, "started": "x"}))
    assert read_run(path) == (
        {"seed": 3, "host": {"cpus": "2"}, "command": []},
        rows[:1],
    )
