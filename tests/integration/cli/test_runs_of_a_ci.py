"""Runs in a CI: what it is told of failures, and tests that several machines share."""

from __future__ import annotations

import json

import pytest

NO_GUESTS = ("--hypervisor", "test")
PLUGIN = """
    import unittest

    class TC_One(unittest.TestCase):
        def test_1(self): pass
        def test_2(self): self.assertEqual(1, 2, "100 % numbers")

    class TC_Two(unittest.TestCase):
        def test_1(self): pass

    class TC_Three(unittest.TestCase):
        def test_1(self): pass

    def list_tests():
        return [TC_One, TC_Two, TC_Three]
"""


@pytest.fixture
def site(site):
    site.environment["QUBES_ITESTS_CACHE"] = str(site.work / "cache")
    site.install("shared", PLUGIN)
    (site.site / ".git").mkdir()
    return site


def test_github_is_told_lines_and_a_summary(site):
    summary = site.work / "step"
    summary.write_text("before\n")
    github = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    done = site.run(*NO_GUESTS, "shared::TC_One", **github)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "\n::error file=shared.py,line=6,title=shared%3A%3ATC_One%3A%3Atest_2 (failed)"
        "::AssertionError: 1 != 2 : 100 %25 numbers\n"
    ) in done.stdout
    text = summary.read_text()
    assert text.startswith("before\n### Integration tests\n\n**1 failed, 1 passed** in")
    assert "| `shared::TC_One::test_2` | failed | `AssertionError: 1 != 2" in text


def test_gitlab_is_told_lines_and_the_summary_goes_where_one_wants_it(site):
    words = ("--summary", "summary.md", "--artifacts", "out")
    done = site.run(*NO_GUESTS, *words, "shared::TC_One", GITLAB_CI="true")
    assert done.returncode == 1
    (row,) = json.loads((site.work / "out/code-quality.json").read_text())
    assert row["location"] == {"path": "shared.py", "lines": {"begin": 6}}
    assert "**1 failed, 1 passed**" in (site.work / "summary.md").read_text()


def ran_in(site, name):
    document = json.loads((site.work / name / "run.json").read_text())
    return [test["test"] for test in document["tests"]]


def test_machines_share_the_tests_and_their_results_are_merged(site):
    statuses = []
    for number, workers in (("1", "0"), ("2", "2")):
        words = ("--shard", f"{number}/2", "--artifacts", f"part-{number}")
        junit = f"--junitxml=part-{number}/itests-junit.xml"
        done = site.run(*NO_GUESTS, *words, junit, "-n", workers, "shared")
        statuses.append(done.returncode)
    assert statuses == [1, 0], done.stdout + done.stderr
    one, two = ran_in(site, "part-1"), ran_in(site, "part-2")
    assert sorted({*one, *two}) == sorted([*one, *two])
    assert len([*one, *two]) == 4
    # those of a class stay together
    assert "shared::TC_One::test_1" in one
    assert "shared::TC_One::test_2" in one

    done = site.run("merge", "part-1", "part-2", "--artifacts", "whole")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Merged 4 tests of 2 machines into whole." in done.stdout
    assert "\n  cause       AssertionError: 1 != 2 : 100 % numbers\n" in done.stdout
    assert sorted(ran_in(site, "whole")) == sorted([*one, *two])
    assert (site.work / "whole/itests-junit.xml").read_text().count("<testcase") == 4
    page = (site.work / "whole/report.html").read_text()
    assert all(test in page for test in (*one, *two))
    done = site.run("merge", "part-1", "--artifacts", "half")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        4,
        "shard 2/2 is missing",
    )


def test_a_machine_for_which_no_test_is_left_succeeds_but_no_wrong_selection(site):
    shard = ("--shard", "3/3")
    done = site.run(*NO_GUESTS, *shard, "shared::TC_Two")
    assert done.returncode == 0, done.stdout
    assert "shard 3/3: 0 of 1 tests" in done.stdout
    none = site.run(*NO_GUESTS, *shard, "-k", "no_such_test")
    assert none.returncode == 5


def test_a_template_that_nobody_offers_is_wrong_usage_at_once(site):
    done = site.run("--template", "debain-12", "shared")
    assert (done.returncode, done.stdout) == (4, "")
    assert "--template: expected one of tiny, " in done.stderr
    assert "got 'debain-12'" in done.stderr
