"""The history of tests: what is kept, whatever happens, and what is told of it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import signal
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.report import history as module
from qubes_itests.report.history import History, TestHistory
from qubes_itests.report.result_file import HistoryError, Run, read_runs
from qubes_itests.report.results import TestResult

#: A run in a process of its own: two results, the word, and then the end of its input.
RUN = """
import sys
from pathlib import Path
from qubes_itests.report.history import History
from qubes_itests.report.result_file import Run
from qubes_itests.report.results import TestResult

history = History(Path(sys.argv[1]))
log = history.begin(Run(id=f"{int(sys.argv[2]):032x}"))
for name in "one", "two":
    log.add(TestResult(test=f"a::{name}", outcome="passed", duration=1.0))
print("written", flush=True)
sys.stdin.read()
log.end(3.0, "passed")
log.close()
history.collect()
print(history.problems)
"""


def result(test, outcome="passed", duration=1.0, **more):
    return TestResult(test=test, outcome=outcome, duration=duration, **more)


def keep(history, number, *results, suite="", started=0.0):
    run = Run(id=f"{number:032x}", suite=suite, started=started or float(number))
    with history.begin(run) as log:
        for one in results:
            log.add(dataclasses.replace(one, started=run.started))
        log.end(2.0, "passed")
    history.collect()


def outcomes(history, beginning=""):
    return {
        test.test: [one.outcome for one in test.results]
        for test in history.tests(beginning)
    }


@pytest.fixture
def history(tmp_path):
    return History(tmp_path)


@pytest.fixture
def begin(tmp_path):
    """Return a function that starts a run and returns when it has written results."""

    def start(number):
        command = [sys.executable, "-c", RUN, tmp_path, str(number)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert process.stdout.readline() == "written\n"
        started.append(process)
        return process

    started = []
    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_results_of_a_run_are_found_again_with_all_they_say(history):
    kept = result(
        "a::b",
        "flaky",
        attempts=3,
        failed=1,
        cause="1 is not 2",
        where="tests/x.py:7",
        worker="gw1",
        phases={"setUp": 0.5},
        started=1.0,
    )
    keep(history, 1, kept)
    assert history.tests() == [TestHistory("", "a::b", (kept,))]


def test_a_run_that_is_under_way_is_no_history_yet_and_its_file_stays(history):
    with history.begin(Run(id="0" * 32)) as log:
        log.add(result("a::b"))
        history.collect()
        assert history.tests() == []
    history.collect()
    assert outcomes(history) == {"a::b": ["passed"]}


def test_a_killed_run_has_lost_no_result(history, begin):
    process = begin(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    history.collect()
    assert outcomes(history) == {"a::one": ["passed"], "a::two": ["passed"]}
    ((run, _),) = history.runs()
    assert (run.outcome, run.duration) == ("killed", None)


def test_a_line_that_was_cut_takes_nothing_with_it(history, tmp_path):
    with history.begin(Run(id="0" * 32)) as log:
        log.add(result("a::b"))
        log.add(result("a::c"))
    (path,) = tmp_path.rglob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    history.collect()
    assert outcomes(history) == {"a::b": ["passed"]}
    assert not path.exists()


def test_a_file_that_is_no_run_is_told_once_and_kept_apart(history, tmp_path):
    place = tmp_path / "history/pending"
    place.mkdir(parents=True)
    (place / "x.jsonl").write_text("nonsense\n")
    keep(history, 1, result("a::b"))
    (problem,) = history.problems
    assert "a run is not kept" in problem
    assert (tmp_path / "history/unreadable.jsonl").read_text() == "nonsense\n"
    assert outcomes(history) == {"a::b": ["passed"]}
    history.collect()
    assert history.problems == [problem]


def test_runs_that_end_at_once_all_keep_their_results(history, begin):
    runs = [begin(number) for number in range(4)]
    for process in runs:
        process.stdin.close()
    for process in runs:
        assert process.stdout.read() == "[]\n"
    assert outcomes(history) == {"a::one": ["passed"] * 4, "a::two": ["passed"] * 4}


def test_a_damaged_file_is_put_aside_and_the_next_run_is_kept(history, tmp_path):
    keep(history, 1, result("a::b"))
    file = tmp_path / "history/results.sqlite"
    file.write_bytes(b"no database" * 1000)
    keep(history, 2, result("a::c"))
    assert outcomes(history) == {"a::c": ["passed"]}
    (problem,) = history.problems
    assert "was damaged and is now" in problem
    assert file.with_name("damaged.sqlite").read_bytes() == b"no database" * 1000


def test_damage_within_the_file_costs_no_results_of_the_run(history, tmp_path):
    keep(history, 1, *(result(f"a::{n}" * 20) for n in range(400)))
    file = tmp_path / "history/results.sqlite"
    content = file.read_bytes()
    file.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    keep(history, 2, result("a::c"))
    history.collect()
    assert outcomes(history) == {"a::c": ["passed"]}
    assert file.with_name("damaged.sqlite").exists()


def test_a_file_of_a_newer_program_is_left_alone_and_the_results_wait(
    history, tmp_path
):
    keep(history, 1, result("a::b"))
    file = tmp_path / "history/results.sqlite"
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA user_version = 2")
    before = file.read_bytes()
    keep(history, 2, result("a::c"))
    assert file.read_bytes() == before
    assert "newer program" in history.problems[0]
    assert history.times("") == {}
    with pytest.raises(HistoryError, match="newer program"):
        history.tests()
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA user_version = 1")
    history.collect()
    assert outcomes(history) == {"a::b": ["passed"], "a::c": ["passed"]}


def test_results_wait_while_another_process_has_the_database(
    history, tmp_path, monkeypatch
):
    keep(history, 1, result("a::b"))
    monkeypatch.setattr(module, "_PATIENCE", 0.1)
    other = sqlite3.connect(tmp_path / "history/results.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    keep(history, 2, result("a::b"))
    assert "database is locked" in history.problems[0]
    other.execute("COMMIT")
    other.close()
    history.collect()
    assert outcomes(history) == {"a::b": ["passed", "passed"]}


def test_a_run_is_added_once_however_often_it_comes(history, tmp_path):
    keep(history, 1, result("a::b"))
    file = io.BytesIO()
    assert history.write(file) == 1
    file.seek(0)
    assert history.add(read_runs(file, "x")) == 0
    other = History(tmp_path / "other")
    file.seek(0)
    assert other.add(read_runs(file, "x")) == 1
    assert other.tests() == history.tests()
    assert list(other.runs()) == list(history.runs())


def test_the_oldest_runs_go_and_the_newest_stays_however_large(history, monkeypatch):
    monkeypatch.setattr(module, "_MOST_RESULTS", 5)
    for number in range(1, 5):
        keep(history, number, result("a::x"), result(f"a::{number}"))
    assert outcomes(history) == {
        "a::x": ["passed", "passed"],
        "a::3": ["passed"],
        "a::4": ["passed"],
    }
    keep(history, 9, *(result(f"a::{n}") for n in range(10, 20)))
    assert len(outcomes(history)) == 10


def test_the_files_of_runs_that_cannot_be_kept_are_bounded(
    history, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "_MOST_PENDING", 3)
    (tmp_path / "history").mkdir()
    (tmp_path / "history/results.sqlite").mkdir()
    for number in range(6):
        keep(history, number, result("a::b"))
    assert len(list((tmp_path / "history/pending").iterdir())) == 3


def test_times_are_the_median_of_the_last_good_results(history):
    for number in range(1, 21):
        keep(history, number, result("a::b", duration=float(number)))
    keep(history, 30, result("a::b", "failed", duration=300.0))
    assert history.times("") == {"a::b": 15.5}
    # a clone in another folder, which has not run yet
    assert history.times("other") == {"a::b": 15.5}
    keep(history, 31, result("a::c", duration=1.0), suite="other")
    assert history.times("other") == {"a::c": 1.0}


def test_tests_of_two_suites_are_apart(history):
    keep(history, 1, result("tests/x.py::a"), suite="one")
    keep(history, 2, result("tests/x.py::a", "failed"), suite="two")
    assert [(t.suite, t.results[0].outcome) for t in history.tests()] == [
        ("one", "passed"),
        ("two", "failed"),
    ]


@pytest.mark.parametrize(
    ("drawn", "rate", "flakiness"),
    [
        ("", None, 0.0),
        ("s", None, 0.0),
        ("..", 1.0, 0.0),
        ("FF", 0.0, 0.0),
        (".F.F", 0.5, 0.75),
        (".s.", 1.0, 0.0),
        ("~", 0.5, 1.0),
        ("..~.", 0.8, 0.5),
    ],
)
def test_pass_rate_and_flakiness(drawn, rate, flakiness):
    marks = {
        "s": result("t", "skipped"),
        ".": result("t"),
        "F": result("t", "failed", failed=1),
        "~": result("t", "flaky", attempts=2, failed=1),
    }
    test = TestHistory("", "t", tuple(marks[mark] for mark in drawn))
    assert test.pass_rate == rate
    assert test.flakiness == flakiness


HEADER = {
    "format": "qubes_itests-history",
    "version": 1,
    "id": "0" * 32,
    "suite": "",
    "machine": "",
    "started": 0,
    "outcome": "passed",
}
RESULT = {
    "test": "a::b",
    "outcome": "passed",
    "duration": 1,
    "started": 0,
    "attempts": 1,
    "failed": 0,
}


def lines(*rows):
    return [json.dumps(row).encode() + b"\n" for row in rows]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [RESULT],
        [[]],
        [HEADER | {"format": "other"}],
        [HEADER | {"version": 2}],
        [HEADER | {"id": "../../etc"}],
        [HEADER, RESULT | {"outcome": "great"}],
        [HEADER, RESULT | {"duration": -1}],
        [HEADER, RESULT | {"duration": float("nan")}],
        [HEADER, RESULT | {"duration": True}],
        [HEADER, RESULT | {"duration": 10**400}],
        [HEADER, RESULT | {"started": 1e18}],
        [HEADER, RESULT | {"attempts": 1, "failed": 2}],
        [HEADER, RESULT | {"phases": [1]}],
        [HEADER, RESULT | {"test": 7}],
        [HEADER, {"other": 1}],
    ],
)
def test_what_is_no_result_is_refused_and_nothing_of_it_is_kept(history, rows):
    good = lines(HEADER | {"id": "1" * 32}, RESULT) if HEADER in rows else []
    with pytest.raises(HistoryError):
        history.add(read_runs(io.BytesIO(b"".join([*good, *lines(*rows)])), "file"))
    assert history.tests() == []


def test_texts_of_a_file_are_bounded_and_safe_to_show():
    hostile = "\x1b[2J::error::" + "x" * 9999
    rows = lines(HEADER, RESULT | {"cause": hostile, "test": hostile})
    ((_, (read,)),) = read_runs(io.BytesIO(b"".join(rows)), "file")
    assert "\x1b" not in read.cause + read.test
    assert len(read.cause) <= 500


class Endless(io.BytesIO):
    """A line without end; what is asked for at once is bounded."""

    given = 0

    def readline(self, size=-1, /):
        assert 0 < size <= (64 << 20) + 1
        self.given += size
        return bytes(size)


def test_a_line_without_end_is_not_read_to_its_end():
    file = Endless()
    with pytest.raises(HistoryError, match="more than 64 MiB"):
        list(read_runs(file, "file"))
    assert file.given <= (64 << 20) + 1


@given(st.binary(max_size=300))
def test_any_bytes_are_results_or_one_error(data):
    with contextlib.suppress(HistoryError):
        list(read_runs(io.BytesIO(data), "file"))


@given(
    st.lists(
        st.sampled_from(
            lines(
                HEADER,
                RESULT,
                {"outcome": "failed", "duration": 1},
                RESULT | {"test": "c"},
            )
        ),
        max_size=8,
    ),
    st.integers(0, 40),
)
def test_a_file_that_is_cut_anywhere_is_read_up_to_there(rows, cut):
    whole = b"".join([*lines(HEADER), *rows])
    part = whole[: max(len(whole) - cut, len(lines(HEADER)[0]))]
    complete = part[: part.rindex(b"\n") + 1]
    read = list(read_runs(io.BytesIO(part), "file"))
    assert read == list(read_runs(io.BytesIO(complete), "file"))


def test_a_run_that_begins_while_another_ends_keeps_its_results(
    history, tmp_path, monkeypatch
):
    lock, others = fcntl.flock, [History(tmp_path)]

    def late(file, how):
        if others:
            others.pop().collect()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    keep(history, 1, result("a::b"))
    assert outcomes(history) == {"a::b": ["passed"]}


def test_the_last_outcomes_of_tests_come_without_those_of_one_run(tmp_path):
    history = History(tmp_path)
    assert history.recent("", "") == {}
    for number in range(30):
        outcome = "failed" if number >= 28 else "passed"
        keep(history, number, result("a::b", outcome), result("a::c"))
    keep(history, 99, result("a::b", "error"), suite="other")
    recent = history.recent("", f"{29:032x}")
    assert recent == {"a::b": ["passed"] * 19 + ["failed"], "a::c": ["passed"] * 20}


def test_a_history_that_cannot_be_read_has_no_last_outcomes(tmp_path):
    history = History(tmp_path)
    keep(history, 1, result("a::b"))
    database = sqlite3.connect(tmp_path / "history/results.sqlite")
    with contextlib.closing(database):
        database.execute("PRAGMA user_version = 99")
    assert history.recent("", "") == {}
    (problem,) = history.problems
    assert "the results of earlier runs cannot be read" in problem
