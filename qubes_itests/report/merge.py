"""The results of several machines put together: run.json, artefacts, JUnit XML.

What they left came over a network, from machines that anybody's tests ran on: sizes are
bounded, names of files are checked, and links are left out.
"""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qubes_itests.report.names import file_name
from qubes_itests.report.result_file import (
    HistoryError,
    Run,
    read_result,
    read_run,
    read_runs,
)
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from qubes_itests.report.results import TestResult

__all__ = ["Part", "merge", "problems", "read_part", "read_results"]

#: The name of the file that says what came of a run.
_RUN = "run.json"
_JUNIT = "itests-junit.xml"
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """What one machine has left.

    :param directory: with its run.json and the folders of failed tests.
    :param junit: its JUnit XML, if there is one.
    :param run: its run.
    :param results: of its tests.
    :param document: its run.json.
    """

    directory: Path
    junit: Path | None
    run: Run
    results: tuple[TestResult, ...]
    document: Mapping[str, Any]

    @property
    def shard(self) -> tuple[int, int, str] | None:
        """Which of how many parts it is, and of which plan; None if it is the whole."""
        told = self.document.get("shard")
        match told:
            case {"number": int(number), "of": int(of), "plan": str(plan)}:
                return number, of, plan
        return None


def read_part(place: Path) -> Part:
    """Return what a machine has left.

    :param place: the directory of its artefacts, or one with that and its JUnit XML.
    :raise HistoryError: it has no run.json, or one that is something else.
    """
    inner = next((p.parent for p in sorted(place.glob(f"*/{_RUN}"))), place)
    directory = place if (place / _RUN).is_file() else inner
    path = directory / _RUN
    try:
        with path.open("rb") as file:
            # one that is larger ends in the middle, and is no JSON
            document = json.loads(file.read(_MOST_BYTES))
        header = {"machine": str((document.get("host") or {}).get("name", ""))}
        run = read_run({"suite": "", **header, **document}, "qubes_itests.run")
        # what was interrupted has no result
        document["tests"] = [row for row in document["tests"] if row["outcome"]]
        results = tuple(map(read_result, document["tests"]))
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        found = safe_text(str(error), limit=80)
        raise HistoryError(
            f"{path}: expected the results of a run, got {found}"
        ) from error
    junit = next(iter(sorted({*place.glob("*.xml"), *directory.glob("*.xml")})), None)
    return Part(directory, junit, run, results, document)


def read_results(path: Path) -> list[tuple[Run, list[TestResult]]]:
    """Return the runs that a machine has told of.

    :param path: a file of `history --export`, or a directory as `read_part` takes it.
    :raise HistoryError: it has no results, or others.
    """
    if path.is_dir():
        part = read_part(path)
        return [(part.run, list(part.results))]
    try:
        with path.open("rb") as file:
            return list(read_runs(file, str(path)))
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror}") from error


def problems(parts: Sequence[Part]) -> Iterator[str]:
    """Yield what keeps parts from being the whole, a sentence each."""
    plans = {part.shard and part.shard[1:] for part in parts}
    if len(plans) > 1:
        yield (
            "the machines have shared out the tests in different ways, so that some may"
            " have run nowhere: give all of them the same history and selection"
        )
        return
    for plan in filter(None, plans):
        numbers = {part.shard[0] for part in parts if part.shard}
        for number in sorted(set(range(1, min(plan[0], 1000) + 1)) - numbers):
            yield f"shard {number}/{plan[0]} is missing"
    counts = Counter(result.test for part in parts for result in part.results)
    if twice := [test for test, count in counts.items() if count > 1]:
        yield f"{len(twice)} tests ran on several machines, as {twice[0]}"


def merge(parts: Sequence[Part], target: Path) -> list[TestResult]:
    """Write what several machines have left as if one had, and return the results.

    :param target: an empty directory, or one to be made.
    :raise HistoryError: it has something in it.
    :raise OSError: it cannot be written.
    """
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise HistoryError(f"{target}: expected an empty directory, or none")
    results = [result for part in parts for result in part.results]
    tests = []
    for number, part in enumerate(parts, 1):
        machine = f"machine {part.shard[0] if part.shard else number}"
        for row, result in zip(part.document["tests"], part.results, strict=True):
            folder = file_name(result.test)
            source = part.directory / folder
            kept = source.is_dir() and not source.is_symlink()
            if kept and not (target / folder).exists():
                shutil.copytree(source, target / folder, ignore=_links)
            worker = f"{machine} {result.worker}".rstrip()
            more = {"artifacts": folder if kept else None, "worker": worker}
            tests.append({**row, **more})
    outcomes = [part.run.outcome for part in parts]
    worst = next((o for o in ("interrupted", "failed") if o in outcomes), "passed")
    document = {
        **parts[0].document,
        "started": min(part.run.started for part in parts),
        "duration": max(part.run.duration or 0.0 for part in parts),
        "outcome": worst,
        "shard": None,
        "tests": tests,
    }
    (target / _RUN).write_text(json.dumps(document, indent=1))
    if junits := [part.junit for part in parts if part.junit]:
        _merge_junit(junits, target / _JUNIT)
    return results


def _links(directory: str, names: list[str]) -> list[str]:
    paths = [Path(directory, name) for name in names]
    plain = [
        p.name for p in paths if not p.is_symlink() and (p.is_dir() or p.is_file())
    ]
    return [name for name in names if name not in plain]


def _merge_junit(paths: Sequence[Path], target: Path) -> None:
    whole = ET.Element("testsuites", name="pytest tests")
    for path in paths:
        if path.stat().st_size > _MOST_BYTES:
            raise HistoryError(f"{path}: it has more than {_MOST_BYTES >> 20} MiB")
        try:
            root = ET.parse(path).getroot()  # noqa: S314 - expat bounds entities
        except ET.ParseError as error:
            raise HistoryError(f"{path}: it is no JUnit XML: {error}") from error
        whole.extend([root] if root.tag == "testsuite" else root.findall("testsuite"))
    ET.ElementTree(whole).write(target, encoding="utf-8", xml_declaration=True)
