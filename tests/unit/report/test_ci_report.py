"""What a CI is told: annotations, the report of code quality, the summary."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.host import tree
from qubes_itests.host.tree import Originals
from qubes_itests.report import ci
from qubes_itests.report.ci import (
    Place,
    code_quality,
    errors,
    place,
    summary,
    write,
)
from qubes_itests.report.results import TestResult


def result(test, outcome="failed", cause="no", where=""):
    return TestResult(test=test, outcome=outcome, duration=1, cause=cause, where=where)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    (tmp_path / "app/.git").mkdir(parents=True)
    (tmp_path / "app/tests").mkdir()
    (tmp_path / "app/tests/a.py").write_text("the test")
    monkeypatch.setattr(ci, "START", str(tmp_path))
    return tmp_path / "app"


def test_a_line_is_told_as_it_stands_in_its_repository(repository):
    assert place("app/tests/a.py:7") == Place("tests/a.py", 7)
    assert place(f"{repository}/tests/a.py:7") == Place("tests/a.py", 7)


def test_of_a_copy_the_file_of_the_app_is_told_which_is_the_same(repository, tmp_path):
    copy = tmp_path / "cache/site-packages/a.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("the test")
    assert place(f"{copy}:7", [Originals(repository)]) == Place("tests/a.py", 7)
    copy.write_text("another")
    assert place(f"{copy}:7", [Originals(repository)]) is None


def test_an_app_is_walked_once_however_many_tests_have_failed(
    repository, tmp_path, monkeypatch
):
    walks = []
    monkeypatch.setattr(tree, "files_of", lambda app: walks.append(app) or [])
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    results = [result(f"a::{n}", where=f"{tmp_path}/copy{n}.py:1") for n in range(9)]
    lines = write(results, [repository], 1.0, tmp_path, tmp_path / "summary.md")
    assert (len(lines), walks) == (9, [repository])


@pytest.mark.parametrize("where", ["", "a.py", "a.py:x", "nowhere.py:1", "\0:1", ":1"])
def test_what_is_nowhere_has_no_place(repository, where):
    assert place(where, [Originals(repository)]) is None


def test_github_shows_failures_at_their_lines():
    results = [result("a::b", cause="50 % lost"), result("a::c", "passed"), result("d")]
    assert list(errors(results, {"a::b": Place("tests/x,y.py", 7)})) == [
        "::error file=tests/x%2Cy.py,line=7,title=a%3A%3Ab (failed)::50 %25 lost",
        "::error title=d (failed)::no",
    ]


def test_gitlab_shows_failures_that_are_in_the_code():
    results = [result("a::b"), result("a::c", "flaky"), result("d")]
    places = {"a::b": Place("x.py", 7), "a::c": Place("y.py", 8)}
    rows = code_quality(results, places)
    assert [row["severity"] for row in rows] == ["major", "minor"]
    assert rows[0]["location"] == {"path": "x.py", "lines": {"begin": 7}}
    assert len({row["fingerprint"] for row in rows}) == 2


def test_the_summary_has_counts_causes_and_links():
    results = [
        result("a::b", cause="1 | 2 `x`", where="x.py:3"),
        result("a::c", "passed"),
        result("a::d", "xfailed", "known issue: #7"),
    ]
    environment = {
        "ITESTS_NAME": "mine",
        "GITHUB_SERVER_URL": "https://example.org",
        "GITHUB_REPOSITORY": "o/r",
        "GITHUB_SHA": "abc",
        "GITHUB_RUN_ID": "9",
    }
    text = summary(results, {"a::b": Place("t x.py", 7)}, 65.0, environment)
    assert text == (
        "### Integration tests: `mine`\n\n"
        "**1 failed, 1 passed, 1 xfailed** in 1 min 05 s\n\n"
        "| test | outcome | cause | place |\n|---|---|---|---|\n"
        "| `a::b` | failed | `1 \\| 2 'x'` |"
        " [`t x.py:7`](https://example.org/o/r/blob/abc/t%20x.py#L7) |\n\n"
        "| expected to fail | reason |\n|---|---|\n| `a::d` | `known issue: #7` |\n\n"
        "[Artefacts](https://example.org/o/r/actions/runs/9#artifacts):"
        " consoles, logs and timelines.\n"
    )
    (row,) = re.findall("a::b.*", summary(results, {}, 1.0, {}))
    assert row == "a::b` | failed | `1 \\| 2 'x'` | `x.py:3` |"


def test_a_flood_of_failures_is_cut():
    results = [result(f"a::{n}") for n in range(80)]
    assert len(list(errors(results, {}))) == 50
    assert "\nand 30 more.\n" in summary(results, {}, 1.0, {})


@given(st.text(), st.text(), st.text())
def test_no_text_leaves_its_cell_or_its_line(test, cause, where):
    results = [result(test, cause=cause, where=where)]
    (line,) = errors(results, {})
    assert "\n" not in line
    assert line.count("::") >= 2
    rows = [r for r in summary(results, {}, 1.0, {}).splitlines() if " failed | " in r]
    (row,) = (row for row in rows if row.startswith("|"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_any_name_of_a_file_can_be_told(tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step"))
    bad = [result("a::b", cause="é…", where="\udcff.py:3")]
    for file in (None, tmp_path / "file"):
        write(bad, (), 1.0, tmp_path, file)
    said = (tmp_path / "file").read_text(encoding="utf-8")
    assert (tmp_path / "step").read_text(encoding="utf-8") == said
    assert "`é…` | `\\udcff.py:3` |" in said
