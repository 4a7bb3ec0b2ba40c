"""The results of several machines put together, and what keeps them from being all."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET

import pytest

from qubes_itests.cli.arguments import Command
from qubes_itests.cli.merge import execute
from qubes_itests.report.merge import merge, problems, read_part
from qubes_itests.report.names import file_name
from qubes_itests.report.result_file import HistoryError
from qubes_itests.run.settings import Settings


@pytest.fixture
def part(tmp_path):
    """Return a function that makes what a machine leaves."""

    def make(number, *tests, of=2, plan="p", **changed):
        place = tmp_path / f"part-{number}"
        directory = place / "itests-artifacts"
        rows = []
        for name, outcome in tests:
            bad = outcome == "failed"
            if bad:
                (directory / file_name(name)).mkdir(parents=True)
                (directory / file_name(name) / "failure.txt").write_text(name)
            row = {"test": name, "outcome": outcome, "duration": 1.5, "started": 7}
            row |= {"attempts": 1, "failed": int(bad), "phases": {}, "worker": None}
            rows.append({**row, "artifacts": file_name(name) if bad else None})
        document = {
            "format": "qubes_itests.run",
            "version": 1,
            "id": f"{number:032x}",
            "suite": "",
            "started": 7.0 + number,
            "duration": 2.0 * number,
            "outcome": "failed" if any(o == "failed" for _, o in tests) else "passed",
            "shard": {"number": number, "of": of, "plan": plan},
            "host": {"name": "m"},
            "tests": rows,
        }
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "run.json").write_text(json.dumps(document | changed))
        cases = "".join(f'<testcase name="{name}"/>' for name, _ in tests)
        (place / "itests-junit.xml").write_text(
            f'<testsuites><testsuite name="pytest">{cases}</testsuite></testsuites>'
        )
        return place

    return make


def test_parts_become_one_run(part, tmp_path):
    places = [part(1, ("a::b", "failed")), part(2, ("a::c", "passed"))]
    parts = [read_part(place) for place in places]
    assert list(problems(parts)) == []
    target = tmp_path / "whole"
    assert [r.test for r in merge(parts, target)] == ["a::b", "a::c"]
    document = json.loads((target / "run.json").read_text())
    assert (document["outcome"], document["shard"]) == ("failed", None)
    assert (document["started"], document["duration"]) == (8.0, 4.0)
    assert [test["test"] for test in document["tests"]] == ["a::b", "a::c"]
    workers = [test["worker"] for test in document["tests"]]
    assert workers == ["machine 1", "machine 2"]
    folder = document["tests"][0]["artifacts"]
    assert (target / folder / "failure.txt").read_text() == "a::b"
    suites = ET.parse(target / "itests-junit.xml").getroot()  # noqa: S314 - our own
    assert [c.get("name") for c in suites.iter("testcase")] == ["a::b", "a::c"]
    assert read_part(target).results == tuple(
        dataclasses.replace(result, worker=worker)
        for one, worker in zip(parts, workers, strict=True)
        for result in one.results
    )


def test_a_test_that_was_interrupted_has_no_result(part, tmp_path):
    parts = [read_part(part(1, ("a::b", "passed"), ("a::c", ""), of=1))]
    assert [r.test for r in merge(parts, tmp_path / "whole")] == ["a::b"]


def test_a_part_that_is_missing_or_planned_otherwise_is_told(part):
    first, third = read_part(part(1, of=3)), read_part(part(3, of=3))
    assert list(problems([first, third])) == ["shard 2/3 is missing"]
    other = read_part(part(2, of=3, plan="q"))
    (problem,) = problems([first, other, third])
    assert "shared out the tests in different ways" in problem


def test_a_test_that_ran_twice_is_told(part):
    parts = [read_part(part(n, ("a::b", "passed"))) for n in (1, 2)]
    assert list(problems(parts)) == ["1 tests ran on several machines, as a::b"]


def test_a_machine_chooses_no_path_and_gives_no_link(part, tmp_path):
    place = part(1, ("a::b", "failed"), of=1)
    directory = place / "itests-artifacts"
    (directory / file_name("a::b") / "link").symlink_to("/etc/passwd")
    document = json.loads((directory / "run.json").read_text())
    document["tests"][0]["artifacts"] = "../../../etc"
    (directory / "run.json").write_text(json.dumps(document))
    merge([read_part(place)], tmp_path / "whole")
    found = sorted(p.name for p in (tmp_path / "whole").rglob("*"))
    assert found == [file_name("a::b"), "failure.txt", "itests-junit.xml", "run.json"]


@pytest.mark.parametrize(
    "changed",
    [{"format": "x"}, {"version": 2}, {"id": "x"}, {"tests": [7]}, {"tests": None}],
)
def test_what_is_no_result_of_a_run_is_refused(part, changed):
    with pytest.raises(HistoryError, match="expected the results of a run"):
        read_part(part(1, **changed))


def test_what_is_there_already_is_not_overwritten(part, tmp_path):
    place = part(1)
    with pytest.raises(HistoryError, match="expected an empty directory"):
        merge([read_part(place)], place)
    with pytest.raises(HistoryError, match=r"run\.json: No such file"):
        read_part(tmp_path / "nowhere")


def test_a_history_that_cannot_be_used_hides_no_failure(
    part, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("QUBES_ITESTS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/history").touch()
    command = Command(name="merge", words=(str(part(1, ("a::b", "failed"), of=1)),))
    assert execute(command, Settings(artifacts=tmp_path / "whole")) == 1
    said = capsys.readouterr().out
    assert "history: the results are not kept" in said
    assert "run again" in said
