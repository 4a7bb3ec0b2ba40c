"""Records in words."""

import unicodedata

import pytest

from qubes_itests import timeline
from qubes_itests.timeline import Recorder, recording
from qubes_itests.timeline.words import called, cut, describe, doing, fit, last_lines


def test_a_command_is_told_with_its_end_and_what_it_complained_of():
    with recording(Recorder()) as recorder:
        timeline.begin("run", "work", command="rve", where="t.py:3").end(
            status=127, stderr="1\n2\n3\nsh: rve: not found\n"
        )
    first, *said = [fit(line, 0) for line in describe(recorder.records()[0])]
    assert '"rve"' in first
    assert "status 127" in first
    assert "t.py:3" in first
    assert [line.strip() for line in said] == ["| 2", "| 3", "| sh: rve: not found"]
    assert called(recorder.records()[0]) == 'vm.run("rve") of work, t.py:3'


def test_the_last_lines_end_with_the_failure_and_leave_out_what_came_then():
    with recording(Recorder()) as recorder:
        for number in range(20):
            timeline.note("log", "work", level="ERROR", logger="x", line=str(number))
        timeline.begin("phase", name="tearDown")
        timeline.note("failure", text="AssertionError: no")
        timeline.note("state", "work", state="Halted")
    lines = [fit(line, 0) for line in last_lines(recorder.records(), 10)]
    assert len(lines) == 10
    assert lines[0].endswith("ERROR x: 10")
    assert lines[-1].endswith("ERROR x: 19")


def test_errors_of_a_journal_are_told_and_its_other_lines_are_not():
    with recording(Recorder()) as recorder:
        for priority in (2, 3, 4, 6):
            timeline.note("journal", "work", line=f"p{priority}", priority=priority)
        timeline.note("journal", "work", line="of an earlier version")
    lines = [fit(line, 0) for line in last_lines(recorder.records(), 10)]
    assert [line.split()[-1] for line in lines] == ["p2", "p3"]


def test_what_goes_on_is_told_with_its_step():
    with recording(Recorder()) as recorder:
        timeline.begin("phase", name="call")
        timeline.begin("run", "work", command="sleep 9")
        timeline.begin("start", "work").update(steps=[["boot", 0.1], ["wait", None]])
        assert list(doing(recorder.open())) == [
            "work starts: wait",
            'runs "sleep 9" in work',
        ]


def test_what_a_failed_test_waited_for_has_not_ended_though_its_vm_has():
    with recording(Recorder()) as recorder:
        span = timeline.begin("run", "work", command="sleep 9")
        timeline.note("failure", text="no end within 1 s")
        span.end(status=255, stderr="gone")
    ((_, end),) = last_lines(recorder.records(), 10)
    assert end.endswith("… has not ended")


def test_a_line_is_as_wide_as_it_may_be_and_keeps_its_end():
    with recording(Recorder()) as recorder:
        timeline.begin("run", "work", command="x" * 300, where="t.py:3").end(status=1)
    (line,) = describe(recorder.records()[0])
    assert len(fit(line, 100)) == 100
    assert fit(line, 100).endswith("x…  → status 1, 0.00 s  t.py:3")
    assert [len(part) for part in fit(line, 60).split("\n")] == [60, 35]
    assert len(fit(line, 0)) > 300


def test_a_guest_that_says_a_lot_leaves_room_for_what_was_asked_of_it():
    with recording(Recorder()) as recorder:
        timeline.begin("run", "work", command="crash").end(status=1)
        for number in range(50):
            timeline.note("console", "work", line=str(number))
    lines = [fit(line, 0) for line in last_lines(recorder.records(), 10)]
    assert [line.rpartition(" ")[2] for line in lines[1:]] == ["47", "48", "49"]
    assert "crash" in lines[0]


@pytest.mark.parametrize("text", ["猫" * 99, "e\u0301" * 99, "é" * 99, "\uff46" * 99])
def test_a_line_is_as_many_columns_wide_as_terminals_show_it(text):
    whole = cut(text, 198)
    assert whole == text
    narrow = cut(text, 21)
    assert narrow.endswith("…")
    wide = unicodedata.east_asian_width(text[0]) in "WF"
    seen = [c for c in narrow if not unicodedata.combining(c)]
    assert len(seen) == (11 if wide else 21)
    assert fit((text, "  end"), 80).endswith("…  end")
