"""What cannot be repeated, and which tests are known to fail."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qubes_itests.pytest_plugin.known_issues import KnownIssue, KnownIssues, read
from qubes_itests.pytest_plugin.repetition import Repetition
from qubes_itests.run.settings import Settings, own_settings


class Config:
    """A pytest config; with `several`, one that distributes tests."""

    def __init__(self, *, several=False, reruns=None):
        self.option = SimpleNamespace(
            dist="load" if several else "no", tx=["popen"] * several, collectonly=False
        )
        self._reruns = reruns

    def getoption(self, _name, default):
        return self._reruns or default


@pytest.mark.parametrize(
    ("settings", "config", "said"),
    [
        ({"rerun_failed": 1, "repeat": 2}, {}, "--repeat or --until-fail are two ways"),
        ({"rerun_failed": 1, "until_fail": True}, {}, "leave one out"),
        ({"rerun_failed": 1}, {"reruns": 2}, "of pytest-rerunfailures do the same"),
        ({"until_fail": True}, {"several": True}, "say --repeat=NUMBER too"),
    ],
)
def test_options_that_contradict_each_other_are_refused(settings, config, said):
    with pytest.raises(pytest.UsageError, match=said):
        Repetition(Config(**config), Settings(**settings), None)


def test_until_fail_does_not_repeat_the_first_of_several_tests_for_ever():
    session = SimpleNamespace(items=[1, 2])
    endless = Repetition(Config(), Settings(until_fail=True), None)
    with pytest.raises(pytest.UsageError, match="the first of 2 tests without an end"):
        endless.pytest_runtestloop(session)
    bounded = Repetition(Config(), Settings(until_fail=True, repeat=3), None)
    bounded.pytest_runtestloop(session)
    session.items.pop()
    endless.pytest_runtestloop(session)


def test_a_file_of_known_issues_has_patterns_and_references(tmp_path):
    path = tmp_path / "known"
    path.write_text("# why\n\na::*::test_[12]  #1, and\ta \x1b[2J more\na::b[1] no\n")
    first, second = read(path)
    assert first == KnownIssue(
        "a::*::test_[12]", "#1, and\\ta \\x1b[2J more", f"{path}:3"
    )
    assert first.of("a::TC::test_1")
    assert not first.of("a::TC::test_3")
    assert second.of("a::b[1]")


def test_a_line_without_a_reference_is_told_with_its_place(tmp_path):
    path = tmp_path / "known"
    path.write_text("\na::b\n")
    with pytest.raises(pytest.UsageError, match="known:2: expected a pattern"):
        KnownIssues.of_files([path])
    with pytest.raises(pytest.UsageError, match="nowhere: No such file"):
        KnownIssues.of_files([tmp_path / "nowhere"])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(pytest.UsageError, match="codec can't decode"):
        KnownIssues.of_files([path])


def test_an_app_names_its_own_file(tmp_path):
    assert own_settings(tmp_path).known_issues == ()
    (tmp_path / "setup.cfg").write_text(
        "[qubes_itests]\nknown_issues = tests/known-issues\n"
    )
    assert own_settings(tmp_path).known_issues == (tmp_path / "tests/known-issues",)


def test_a_report_tells_of_its_own_attempt_alone(tmp_path, monkeypatch):
    (tmp_path / "test_some_attempts.py").write_text(
        "seen = []\n"
        "def test_third_fails(record_property):\n"
        "    seen.append(1)\n"
        "    print('attempt', len(seen))\n"
        "    record_property('attempt', len(seen))\n"
        "    assert len(seen) < 3\n"
    )
    reports = []

    class Watch:
        def begin_attempt(self, test, number):
            pass

        def pytest_runtest_logreport(self, report):
            reports.append(report)

    watch = Watch()
    monkeypatch.chdir(tmp_path)
    repetition = Repetition(Config(), Settings(until_fail=True, repeat=5), watch)
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:asyncio", "-c", "/dev/null"]
    words += ["--rootdir=.", "--import-mode=importlib", "."]
    pytest.main(words, [repetition, watch])
    (failure,) = [report for report in reports if report.failed]
    assert failure.capstdout == "attempt 3\n"
    assert failure.user_properties == [("attempt", 3)]
