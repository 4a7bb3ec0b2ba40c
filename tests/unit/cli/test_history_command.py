"""``history`` as a process: what it shows of earlier runs, and results as files."""

from __future__ import annotations

import json
import sqlite3

import pytest
from plugin_site import PluginSite

from qubes_itests.report.history import History
from qubes_itests.report.result_file import Run
from qubes_itests.report.results import TestResult

MINUTE = 60.0


@pytest.fixture
def site(tmp_path):
    return PluginSite(tmp_path, {"QUBES_ITESTS_CACHE": str(tmp_path / "cache")})


@pytest.fixture
def keep(tmp_path):
    """Return a function that keeps a run in which a test had an outcome."""
    history = History(tmp_path / "cache")

    def run(number, test, outcome="passed", suite="", **more):
        started = 1e9 + number * MINUTE
        made = Run(id=f"{number:032x}", suite=suite, started=started)
        result = {"test": test, "outcome": outcome, "duration": 2.0, "started": started}
        with history.begin(made) as log:
            log.add(TestResult(**result | more))
        history.collect()

    return run


def test_without_runs_there_is_nothing_to_show(site):
    done = site.run("history")
    assert (done.returncode, done.stdout) == (5, "The history has no test.\n")
    done = site.run("history", "smoke")
    assert done.stdout == "The history has no test whose id begins with 'smoke'.\n"


def test_a_test_with_its_rate_times_last_failure_and_flakiness(site, keep):
    keep(1, "a::test_1", duration=1.0)
    keep(2, "a::test_1", "failed", failed=1, cause="1 is not 2", where="x.py:7")
    keep(3, "a::test_1", "flaky", attempts=2, failed=1, cause="late")
    keep(4, "a::test_1", duration=9.0)
    keep(5, "a::test_10")
    done = site.run("history", "a::test_1", TZ="UTC")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "a::test_1\n"
        "  passed      60 % of 5 times\n"
        "  takes       2.0 s as a rule, 1.0 s to 9.0 s\n"
        "  results     .F~.  (the newest on the right)\n"
        "  flaky       75%: of its results differ from the one before;"
        " it failed and passed within 1 of them\n"
        "  last failed 2001-09-09 01:49, 1 run ago: late\n"
        "\n"
        ". passed  F failed  E error  ~ flaky  s skipped  x xfailed  X xpassed\n"
    )


def test_all_tests_are_a_table_with_those_of_each_suite_apart(site, keep):
    keep(1, "a::test_1", "skipped")
    keep(2, "tests/x.py::test", "failed", failed=1, suite="mine")
    lines = site.run("history").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["passed", "runs", "flaky", "takes", "last", "test"],
        ["-", "1", "-", "skipped", "a::test_1"],
        ["#", "mine"],
        ["0", "%", "1", "2.0", "s", "failed", "tests/x.py::test"],
    ]


def test_results_go_to_another_machine_once(site, keep, tmp_path):
    keep(1, "a::test_1", cause="", phases={"setUp": 1.5})
    out = str(tmp_path / "results.jsonl")
    assert site.run("history", "--export", out).stdout == f"Wrote 1 runs to {out}.\n"
    elsewhere = {"QUBES_ITESTS_CACHE": str(tmp_path / "elsewhere")}
    for new in (1, 0):
        done = site.run("history", "--add", out, **elsewhere)
        assert (done.returncode, done.stdout) == (0, f"{out}: {new} new runs.\n")
    shown = [site.run("history", "--json", **e).stdout for e in ({}, elsewhere)]
    assert shown[0] == shown[1]
    (row,) = json.loads(shown[0])["tests"]
    assert row["results"][0]["phases"] == {"setUp": 1.5}


@pytest.mark.parametrize("text", [None, "<testsuites/>\n"])
def test_what_is_no_history_is_one_sentence(site, tmp_path, text):
    path = tmp_path / "file"
    if text:
        path.write_text(text)
    done = site.run("history", "--add", str(path))
    assert done.returncode == 4
    assert done.stderr.startswith(f"itests: {path}")
    assert "Traceback" not in done.stderr


def test_an_export_that_fails_leaves_the_earlier_one(site, keep, tmp_path):
    """The history is read before its file is touched."""
    keep(1, "a::test_1")
    out = tmp_path / "results.jsonl"
    out.write_text("the earlier one")
    done = site.run("history", "--export", "/proc/results.jsonl")
    assert (done.returncode, done.stdout) == (4, "")
    assert "itests: /proc/results.jsonl: No such file" in done.stderr
    with sqlite3.connect(tmp_path / "cache/history/results.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    done = site.run("history", "--export", str(out))
    assert "of a newer program" in done.stderr
    assert out.read_text() == "the earlier one"


def test_an_export_goes_where_a_link_or_a_device_leads(site, keep, tmp_path):
    keep(1, "a::test_1")
    out, link = tmp_path / "results.jsonl", tmp_path / "link"
    out.touch()
    link.symlink_to(out)
    site.run("history", "--export", str(link))
    shown = site.run("history", "--export", "/dev/stdout").stdout
    assert link.is_symlink()
    assert shown.startswith(out.read_text())
    assert out.read_text()


def test_a_history_that_cannot_be_used_is_one_sentence(site, tmp_path):
    (tmp_path / "cache/history/pending/x.jsonl").mkdir(parents=True)
    done = site.run("history")
    assert done.returncode == 4
    assert done.stderr.startswith("itests: the history cannot be used: ")
    assert "Traceback" not in done.stderr
