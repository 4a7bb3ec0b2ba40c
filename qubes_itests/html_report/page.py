"""The page: a template, a style, a script, and the run as data that run nothing.

Data are in elements of which a browser runs none, and are no text that could end one: a
summary of all tests as JSON without any ``<``, and for each test its timeline, deflated
and in base64, which the page unpacks when somebody looks at that test.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import zlib
from collections import defaultdict
from importlib import resources
from pathlib import Path, PurePosixPath
from string import Template
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from qubes_itests.exc import HarnessError
from qubes_itests.html_report.reading import read_run, read_timeline
from qubes_itests.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qubes_itests.html_report.reading import Json, Record

__all__ = ["REPORT", "RUN", "TIMELINE", "write_report"]

#: Names of files: what is written, and what it is made of.
REPORT: Final = "report.html"
RUN: Final = "run.json"
TIMELINE: Final = "timeline.jsonl"

#: Bytes of JSON: for all timelines together, and for one at most and at least. Deflated
#: they are a tenth.
_ROOM, _MOST_ROOM, _LEAST_ROOM = 64 << 20, 1 << 20, 16 << 10
_MOST_FILES, _MOST_ATTEMPTS = 100, 10
#: Slow is what takes so many times as long as in three quarters of the tests, and some
#: seconds.
_SLOW_TIMES, _SLOW_SECONDS = 3, 1.0
_SCRIPTS: Final = (
    *("elements.js", "lists.js", "lanes.js", "workers.js", "test.js", "run.js"),
)


def write_report(directory: Path) -> Path:
    """Write the report of a run, at once or not at all, and return its path.

    :param directory: of the run's artefacts; the report goes there as well.
    :raise HarnessError: there is no run in it, or it cannot be written.
    """
    run, tests = read_run(directory / RUN)
    target = directory / REPORT
    try:
        with whole_file(target) as file:
            file.writelines(part.encode() for part in _page(directory, run, tests))
    except OSError as error:
        raise HarnessError(f"The report cannot be written: {error}.") from error
    return target


def _page(directory: Path, run: Record, tests: Sequence[Record]) -> Iterator[str]:
    parts = resources.files(__package__) / "page"
    style = (parts / "page.css").read_text(encoding="utf-8")
    scripts = [(parts / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    script = "\n".join(scripts)
    template = Template((parts / "page.html").read_text(encoding="utf-8"))
    head, _, end = template.substitute(
        style=style,
        script=script,
        style_digest=_digest(style),
        script_digest=_digest(script),
    ).partition("<!-- data -->")
    yield head
    room = max(_LEAST_ROOM, min(_MOST_ROOM, _ROOM // max(1, len(tests))))
    _mark_slow(tests)
    for number, test in enumerate(tests):
        folder = _folder(directory, str(test.pop("artifacts", "")))
        if folder is None:
            continue
        test["files"] = list(_files(directory, folder))
        # Of a repeated test also those of attempts that failed before the last.
        attempts = [p for p in sorted(folder.glob("attempt-*")) if not p.is_symlink()]
        names: list[Json] = []
        for place in (folder, *attempts[:_MOST_ATTEMPTS]):
            if timeline := read_timeline(place / TIMELINE, room):
                test.setdefault("vms", timeline.get("vms"))
                name = f"timeline-{number}-{len(names)}"
                packed = base64.b64encode(zlib.compress(_json(timeline).encode()))
                yield _element(name, "text/plain", packed.decode())
                names.append(ascii(place.name)[1:-1] if place != folder else "")
        test["timelines"] = names
    yield _element("run", "application/json", _escaped({**run, "tests": [*tests]}))
    yield end


def _element(identifier: str, kind: str, text: str) -> str:
    return f'<script type="{kind}" id="{identifier}">{text}</script>\n'


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _escaped(value: Json) -> str:
    """Return JSON that ends no element and begins no comment."""
    return _json(value).replace("<", r"\u003c").replace("&", r"\u0026")


def _folder(directory: Path, name: str) -> Path | None:
    """Return the folder of a test, None if it is none or elsewhere."""
    folder = directory / name
    # a loop of links is a RuntimeError until Python 3.13
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        if name and folder.resolve().is_relative_to(directory.resolve()):
            return folder if folder.is_dir() else None
    return None


def _files(directory: Path, folder: Path) -> Iterator[Json]:
    """Return what a test has left: names, links that lead there, sizes in bytes."""
    for path in sorted(folder.iterdir())[:_MOST_FILES]:
        place = PurePosixPath(path.relative_to(directory))
        mark = "/" * path.is_dir()
        link = "./" + quote(os.fsencode(place)) + mark
        size = None if mark else path.lstat().st_size
        yield [ascii(path.name)[1:-1] + mark, link, size]


def _mark_slow(tests: Sequence[Record]) -> None:
    """Say of each test what of it is slow, with the usual seconds; "" is all of it."""
    taken: dict[str, list[float]] = defaultdict(list)
    for test in tests:
        for name, seconds in _times(test):
            taken[name].append(seconds)
    # Of three quarters of the tests, since a run may mix short tests with long ones.
    usual = {name: sorted(times)[3 * len(times) // 4] for name, times in taken.items()}
    for test in tests:
        slow: dict[str, Json] = {
            name: usual[name]
            for name, seconds in _times(test)
            if seconds >= max(_SLOW_SECONDS, _SLOW_TIMES * usual[name])
        }
        if slow:
            test["slow"] = slow


def _times(test: Record) -> Iterator[tuple[str, float]]:
    """Return how long a test took, under an empty name, and its phases."""
    phases = test.get("phases")
    pairs = phases.items() if isinstance(phases, dict) else ()
    for name, seconds in [("", test.get("duration")), *pairs]:
        if isinstance(seconds, int | float):
            yield name, seconds
