"""What a CI shows of a run: lines of its code with failures, and a summary.

What a test or a guest has said is safe text already, and here it is also kept from
being a command or a markup of the CI.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.host.tree import Originals
from qubes_itests.report.heartbeat import duration
from qubes_itests.timeline.caller import START

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from qubes_itests.report.results import TestResult

__all__ = ["Place", "code_quality", "errors", "place", "summary", "write"]

#: Of a summary and of annotations: more is a flood, and the artefacts have all.
_MOST_TOLD = 50
_ORDER = ("failed", "error", "flaky", "passed", "skipped", "xfailed", "xpassed")


@dataclass(frozen=True, slots=True)
class Place:
    """A line in a repository.

    :param file: relative to the root of the repository.
    :param line: from 1.
    """

    file: str
    line: int


def place(where: str, apps: Iterable[Originals] = ()) -> Place | None:
    """Return where a line is in its repository; None if it is in none.

    :param where: ``FILE:LINE``, relative to where the run was called.
    :param apps: repositories whose tests run from a copy.
    """
    name, _, line = where.rpartition(":")
    if not name or not line.isdecimal():
        return None
    path = Path(START, name)
    try:
        if (root := _root(path)) is None:
            path = next(filter(None, (app.find(path) for app in apps)), path).absolute()
            root = _root(path)
    except OSError:
        return None
    if root is None or not path.is_file():
        return None
    return Place(path.relative_to(root).as_posix(), int(line))


def _root(path: Path) -> Path | None:
    """Return the root of a checkout by git, which may be that of a work tree."""
    return next((up for up in path.parents if (up / ".git").exists()), None)


def errors(results: Iterable[TestResult], places: Mapping[str, Place]) -> Iterator[str]:
    """Yield the commands by which GitHub shows failures in the code.

    :param places: of tests, by id.
    """
    for result in [result for result in results if result.bad][:_MOST_TOLD]:
        properties = {"title": f"{result.test} ({result.outcome})"}
        if found := places.get(result.test):
            properties = {"file": found.file, "line": str(found.line), **properties}
        told = ",".join(
            f"{key}={_data(value).replace(':', '%3A').replace(',', '%2C')}"
            for key, value in properties.items()
        )
        yield f"::error {told}::{_data(result.cause)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def code_quality(
    results: Iterable[TestResult], places: Mapping[str, Place]
) -> list[dict[str, object]]:
    """Return the failures as GitLab's report of code quality has them.

    :param places: of tests, by id; those without one are left to JUnit XML.
    """
    return [
        {
            "description": f"{result.test}: {result.cause}",
            "check_name": f"itests-{result.outcome}",
            "fingerprint": hashlib.sha256(result.test.encode()).hexdigest(),
            "severity": "minor" if result.outcome == "flaky" else "major",
            "location": {"path": found.file, "lines": {"begin": found.line}},
        }
        for result in results
        if result.bad and (found := places.get(result.test))
    ]


def summary(
    results: Sequence[TestResult],
    places: Mapping[str, Place],
    seconds: float,
    environment: Mapping[str, str] = os.environ,
) -> str:
    """Return a run as Markdown: counts, and a table of what failed and why.

    :param places: of tests, by id.
    :param seconds: that the run took.
    :param environment: in which a CI tells where its repository and artefacts are.
    """
    name = environment.get("ITESTS_NAME", "")
    counts = Counter(result.outcome for result in results)
    told = ", ".join(f"{counts[o]} {o}" for o in _ORDER if counts[o]) or "no tests"
    lines = [
        f"### Integration tests{': ' + _code(name) if name else ''}",
        "",
        f"**{told}** in {duration(seconds)}",
    ]
    bad = [result for result in results if result.bad]
    if bad:
        lines += ["", "| test | outcome | cause | place |", "|---|---|---|---|"]
        lines += [_row(result, places, environment) for result in bad[:_MOST_TOLD]]
    if len(bad) > _MOST_TOLD:
        lines += ["", f"and {len(bad) - _MOST_TOLD} more."]
    if known := [result for result in results if result.outcome == "xfailed"]:
        lines += ["", "| expected to fail | reason |", "|---|---|"]
        lines += [f"| {_code(r.test)} | {_code(r.cause)} |" for r in known[:_MOST_TOLD]]
    if bad and (address := _artifacts(environment)):
        lines += ["", f"[Artefacts]({address}): consoles, logs and timelines."]
    return "\n".join(lines) + "\n"


def _row(
    result: TestResult, places: Mapping[str, Place], environment: Mapping[str, str]
) -> str:
    shown = _code(result.where) if result.where else ""
    if found := places.get(result.test):
        shown = _code(f"{found.file}:{found.line}")
        if base := _code_address(environment):
            # brackets and blanks would end a link
            file = found.file.replace(" ", "%20").replace(")", "%29")
            shown = f"[{shown}]({base}/{file}#L{found.line})"
    return (
        f"| {_code(result.test)} | {result.outcome} | {_code(result.cause)} | {shown} |"
    )


def _code(text: str) -> str:
    """Return a text as it is, whatever Markdown would make of it."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""


def _code_address(environment: Mapping[str, str]) -> str:
    if project := environment.get("CI_PROJECT_URL"):
        return f"{project}/-/blob/{environment.get('CI_COMMIT_SHA', 'HEAD')}"
    server, name = (
        environment.get(f"GITHUB_{n}") for n in ("SERVER_URL", "REPOSITORY")
    )
    if server and name:
        return f"{server}/{name}/blob/{environment.get('GITHUB_SHA', 'HEAD')}"
    return ""


def _artifacts(environment: Mapping[str, str]) -> str:
    if job := environment.get("CI_JOB_URL"):
        return f"{job}/artifacts/browse"
    server, name = (
        environment.get(f"GITHUB_{n}") for n in ("SERVER_URL", "REPOSITORY")
    )
    run = environment.get("GITHUB_RUN_ID")
    return f"{server}/{name}/actions/runs/{run}#artifacts" if server and run else ""


def write(
    results: Sequence[TestResult],
    apps: Sequence[Path],
    seconds: float,
    directory: Path,
    file: Path | None,
) -> list[str]:
    """Tell a CI of a run: by the files that it reads, and by lines to be printed.

    :param apps: directories of the apps that were tested.
    :param seconds: that the run took.
    :param directory: of the artefacts.
    :param file: for the summary; by default the one that GitHub has told.
    :return: the lines.
    :raise OSError: a file cannot be written.
    """
    originals = [Originals(app) for app in apps]
    places = {
        result.test: found
        for result in results
        if result.bad and (found := place(result.where, originals))
    }
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    # whatever the locale is, and bytes that names of files have
    text = summary(results, places, seconds).encode("utf-8", "backslashreplace")
    if file is not None:
        file.write_bytes(text)
    elif step:
        with Path(step).open("ab") as steps:
            steps.write(text)
    if os.environ.get("GITLAB_CI"):
        directory.mkdir(parents=True, exist_ok=True)
        rows = json.dumps(code_quality(results, places), indent=1)
        (directory / "code-quality.json").write_text(rows)
    if os.environ.get("GITHUB_ACTIONS"):
        return list(errors(results, places))
    return []
