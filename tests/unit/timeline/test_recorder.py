"""The recorder: what is reported comes out in order, bounded, and safe to show."""

import asyncio
import json
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests import timeline
from qubes_itests.portal import Portal
from qubes_itests.timeline import Recorder, recording
from qubes_itests.timeline.document import Header, dump, load


def header(recorder, test="t"):
    return Header(
        test=test,
        started=recorder.started,
        outcome="failed",
        duration=recorder.time(),
        dropped=recorder.dropped,
    )


def test_nothing_is_kept_while_no_test_is_recorded():
    with recording(None):
        timeline.note("state", "work", state="Running")
        timeline.begin("run", "work", command="true").end(status=0)
        assert timeline.lines("console", "work", b"line\nrest") == b""
    with recording(Recorder()) as recorder:
        pass
    timeline.note("state", "work", state="Halted")
    assert recorder.records() == []


def test_a_span_has_what_was_known_at_its_end():
    with recording(Recorder()) as recorder:
        span = timeline.begin("run", "work", command="false")
        timeline.note("state", "work", state="Running")
        (open_one,) = recorder.open()
        assert (open_one["command"], open_one["duration"]) == ("false", None)
        span.end(status=1, stderr="no\n")
        span.end(status=2)
        assert recorder.open() == []
    run, state = recorder.records()
    assert (run["kind"], run["vm"], run["status"]) == ("run", "work", 1)
    assert 0 <= run["t"] <= state["t"] <= run["t"] + run["duration"]
    assert "duration" not in state


def test_a_span_that_outlives_its_test_is_told_to_no_other():
    with recording(Recorder()) as first:
        span = timeline.begin("run", "work", command="sleep 9")
    with recording(Recorder()) as second:
        span.end(status=0)
    assert second.records() == []
    assert first.records()[0]["status"] == 0


def test_the_last_records_of_each_kind_are_kept_and_the_others_are_counted():
    with recording(Recorder()) as recorder:
        timeline.note("state", "work", state="Running")
        for number in range(5000):
            timeline.note("console", "work", line=f"{number}")
        timeline.note("state", "work", state="Halted")
    records = recorder.records()
    lines = [record["line"] for record in records if record["kind"] == "console"]
    assert [r["state"] for r in records if r["kind"] == "state"] == [
        "Running",
        "Halted",
    ]
    assert lines[-1] == "4999"
    assert len(lines) + recorder.dropped == 5000


def test_the_text_of_a_kind_is_bounded_whatever_a_record_has():
    with recording(Recorder()) as recorder:
        for _ in range(3000):
            span = timeline.begin("run", "work", command="x" * 10_000)
            span.update(steps=[["y" * 10_000, 1.0]] * 1000)
            span.end(stderr="z" * 10_000)
    document = dump(header(recorder), recorder.records())
    assert len(document) < 2_000_000
    assert recorder.dropped > 0


def test_a_flood_of_lines_is_cut_and_an_endless_line_is_not_kept_whole():
    with recording(Recorder()) as recorder:
        flood = b"".join(b"%d\n" % number for number in range(10_000))
        assert timeline.lines("console", "work", flood + b"rest") == b"rest"
        assert timeline.lines("console", "work", b"x" * 10_000) == b""
    lines = [record["line"] for record in recorder.records()]
    assert lines[-2] == "9999"
    assert len(lines[-1]) == 500
    assert recorder.dropped > 9000


def test_what_comes_late_has_its_place_in_time_if_that_is_in_the_test():
    recorder = Recorder()
    recorder.note("log", None, {"line": "first"})
    recorder.note_at(recorder.started - 100, "journal", "work", {"line": "before"})
    recorder.note_at(recorder.started + 1e-9, "journal", "work", {"line": "early"})
    recorder.note_at(recorder.started + 100, "journal", "work", {"line": "late"})
    records = recorder.records()
    said = [record["line"] for record in records]
    assert said == ["before", "early", "first", "late"]
    assert records[0]["t"] == 0
    assert records[-1]["t"] <= recorder.time()


def test_logs_are_followed_where_a_recorder_says_so():
    for recorder, follows in (
        (None, False),
        (Recorder(), False),
        (Recorder(follow_logs=True), True),
    ):
        with recording(recorder):
            assert timeline.follows_logs() == follows


def test_commands_of_the_harness_itself_are_not_recorded():
    with recording(Recorder()) as recorder:
        with timeline.unrecorded():
            timeline.command("run", "work", command="theirs").end(status=0)
        timeline.command("run", "work", command="ours").end(status=0)
    assert [record["command"] for record in recorder.records()] == ["ours"]


def test_threads_that_report_at_once_lose_nothing():
    def report(vm):
        for _ in range(200):
            timeline.begin("run", vm, command="true").end(status=0)
            timeline.note("console", vm, line="x")

    with recording(Recorder()) as recorder:
        threads = [threading.Thread(target=report, args=(f"vm{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    records = recorder.records()
    assert len(records) == 4 * 400
    assert recorder.open() == []
    assert all(r["status"] == 0 for r in records if r["kind"] == "run")


def test_a_listener_is_told_of_what_is_complete():
    told = []
    with recording(Recorder(listener=told.append)):
        span = timeline.begin("run", "work", command="true")
        timeline.note("state", "work", state="Running")
        span.end(status=0)
    assert [record["kind"] for record in told] == ["state", "run"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.text(), values)
def test_no_text_of_a_guest_leaves_its_line_or_steers_a_terminal(vm, value):
    with recording(Recorder()) as recorder:
        timeline.note("log", vm, line=value)
        timeline.lines("console", vm, repr(value).encode("utf-8", "surrogatepass"))
    document = dump(header(recorder), recorder.records())
    for line in document.splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert not {c for c in document.decode() if ord(c) < 32} - {"\n"}
    _, records = load(document)
    assert json.dumps(records) == json.dumps(recorder.records())


def test_a_document_is_read_up_to_a_line_that_was_not_finished():
    with recording(Recorder()) as recorder:
        timeline.note("state", "work", state="Running")
        timeline.note("state", "work", state="Halted")
    document = dump(header(recorder, "a::b"), recorder.records())
    read, records = load(document[:-5])
    assert (read.test, read.outcome, len(records)) == ("a::b", "failed", 1)


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"[]\n", b"{}\n", b'{"format":"x","version":1}\n', b"\xff\n"]
)
def test_what_is_no_timeline_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        load(data)


async def report():
    timeline.command("run", "work", command="true").end(status=0)


async def report_in_a_task():
    await asyncio.create_task(report())


def line_of(recorder):
    path, _, number = recorder.records()[-1]["where"].rpartition(":")
    assert path.endswith("test_recorder.py")
    return int(number)


def test_a_command_tells_which_line_asked_for_it():
    here = report_in_a_task.__code__.co_firstlineno
    with Portal() as portal, recording(Recorder()) as recorder:
        loop = portal.facade
        loop.run_until_complete(report())
        first = line_of(recorder)
        loop.run_until_complete(report_in_a_task())
        assert line_of(recorder) == first + 2
        task = loop.create_task(report())
        loop.run_until_complete(asyncio.wait([task]))
        assert line_of(recorder) == first + 4
        asyncio.run(report())
        assert line_of(recorder) == here - 3


async def called_by_a_guest():
    with timeline.called_by_guest():
        task = asyncio.ensure_future(report())
    await task


def test_what_a_guest_calls_no_line_of_the_test_has_asked_for():
    with Portal() as portal, recording(Recorder()) as recorder:
        portal.facade.run_until_complete(called_by_a_guest())
    assert recorder.records()[0]["where"] is None


def test_an_error_tells_the_last_line_of_the_test_in_its_traceback():
    with pytest.raises(ZeroDivisionError) as caught, Portal() as portal:
        portal.run(division())
    path, _, line = timeline.raised_at(caught.value).rpartition(":")
    assert path.endswith("test_recorder.py")
    assert int(line) == division.__code__.co_firstlineno + 1


async def division():
    return 1 // 0


def test_a_deadline_may_ask_in_the_middle_of_a_record():
    class Interrupted(Recorder):
        def time(self):
            # as the handler of a signal does, in the thread that is interrupted
            asked.append(self.open())
            return super().time()

    asked = []
    recorder = Interrupted()
    thread = threading.Thread(target=recorder.note, args=("log", None, {}), daemon=True)
    thread.start()
    thread.join(300)
    assert asked == [[]]
    assert len(recorder.records()) == 1


def test_instructions_of_no_line_are_of_the_beginning_of_their_function():
    code = compile("where = line_of(frame())", "x.py", "exec").replace(co_linetable=b"")
    told = {"line_of": timeline.line_of, "frame": sys._getframe}
    with recording(Recorder()) as recorder:
        exec(code, told)  # noqa: S102 - no function that is compiled has such code
        timeline.note("failure", where=told["where"])
    assert recorder.records()[0]["where"] == "x.py:1"


def test_a_line_is_named_as_people_find_it_wherever_a_test_has_gone(
    tmp_path, monkeypatch
):
    recorder = Recorder()
    with recording(recorder):
        timeline.command("run", "work", command="true").end()
        monkeypatch.chdir(tmp_path)
        timeline.command("run", "work", command="true").end()
    first, second = recorder.records()
    assert first["where"].split(":")[0] == second["where"].split(":")[0]
    assert "timeline.command" in second["source"]
