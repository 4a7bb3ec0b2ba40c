"""Records in words."""

from qubes_itests import timeline
from qubes_itests.timeline import Recorder, recording
from qubes_itests.timeline.words import called, describe, doing, last_lines


def test_a_command_is_told_with_its_end_and_what_it_complained_of():
    with recording(Recorder()) as recorder:
        timeline.begin("run", "work", command="rve", where="t.py:3").end(
            status=127, stderr="1\n2\n3\nsh: rve: not found\n"
        )
    first, *said = describe(recorder.records()[0])
    assert '"rve"' in first
    assert "status 127" in first
    assert "t.py:3" in first
    assert [line.strip() for line in said] == ["| 2", "| 3", "| sh: rve: not found"]
    assert called(recorder.records()[0]) == 'vm.run("rve") of work, t.py:3'


def test_the_last_lines_end_with_the_failure_and_leave_out_what_came_then():
    with recording(Recorder()) as recorder:
        for number in range(20):
            timeline.note("console", "work", line=str(number))
        timeline.begin("phase", name="tearDown")
        timeline.note("failure", text="AssertionError: no")
        timeline.note("state", "work", state="Halted")
    lines = last_lines(recorder.records(), 10)
    assert len(lines) == 10
    assert "AssertionError: no" in lines[-1]
    assert lines[0].endswith("console: 11")


def test_what_goes_on_is_told_with_its_step():
    with recording(Recorder()) as recorder:
        timeline.begin("phase", name="call")
        timeline.begin("run", "work", command="sleep 9")
        timeline.begin("start", "work").update(steps=[["boot", 0.1], ["wait", None]])
        assert list(doing(recorder.open())) == [
            "work starts: wait",
            'runs "sleep 9" in work',
        ]
