"""The last lines after a failure: test, cause, artefacts, and what to type next."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.frozen.folder import NAME as FROZEN
from qubes_itests.frozen.folder import Folder, FrozenError
from qubes_itests.host.cache import digest
from qubes_itests.program import NAME
from qubes_itests.report.names import one_line
from qubes_itests.timeline.words import Line, fit
from qubes_itests.whole_file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

__all__ = [
    "Failure",
    "LastRun",
    "cause",
    "last_run",
    "load",
    "show",
    "state",
    "store",
]

#: More than these are a flood; `report` shows them all.
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Failure:
    """A test that failed.

    :param test: its id.
    :param cause: one line.
    :param artifacts: directory with what it left, or an empty string.
    :param files: what is in there.
    :param words: of the command line, without which it is not found again.
    :param timeline: the last lines of what happened in it.
    """

    test: str
    cause: str
    artifacts: str = ""
    files: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    timeline: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True)
class LastRun:
    """What is told of a run.

    :param failures: its tests that failed, or were interrupted.
    :param interrupted: whether it was.
    :param not_run: how many tests were not, for that.
    """

    failures: tuple[Failure, ...]
    interrupted: bool = False
    not_run: int = 0

    def ending(self) -> str:
        """Return a sentence about the end of a run that was interrupted, else none."""
        if not self.interrupted:
            return ""
        not_run = "1 test was" if self.not_run == 1 else f"{self.not_run} tests were"
        return f"The run was interrupted: {not_run} not run."


def cause(report: pytest.TestReport) -> str:
    """Return why a test failed, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(getattr(crash, "message", "") or report.longreprtext)
    when: str | None = report.when
    # Of the end of a worker pytest-xdist does not know when it was.
    where = f"in {when}: " if when in ("setup", "teardown") else ""
    # The package of an error class says nothing that its name does not.
    text = re.sub(r"\A(?:[A-Za-z_]\w*\.)+(?=[A-Z]\w*\b)", "", text.strip())
    # pytest's own class says nothing either
    text = text.removeprefix("Failed: ")
    first, _, others = text.partition("\n")
    if first.endswith(":") and others:
        text = f"{first} {one_line(others).removeprefix('- ').removeprefix('| ')}"
    return where + (one_line(text) or "no reason was given")


def show(
    failures: Sequence[Failure],
    command: Sequence[str],
    write: Callable[[str], None],
    limit: int = _SHOWN,
    *,
    again: Sequence[str] = (),
    prefix: str = "--",
) -> None:
    """Write what to know and what to type about each failure.

    :param command: the words that begin a command line of this program.
    :param limit: how many to show in full.
    :param again: the words before the id of a test that run it again, if they are not
        those of this program; then it has no report of the run either.
    :param prefix: of options after these words.
    """
    for failure in failures[:limit]:
        write("")
        for line in _lines(failure, command, again, prefix):
            write(line)
    if len(failures) > limit:
        write("")
        where = "" if again else f": {shlex.join([*command, 'report'])}"
        write(f"and {len(failures) - limit} more{where}")


def _lines(
    failure: Failure, command: Sequence[str], words: Sequence[str], prefix: str
) -> list[str]:
    words = words or command
    test = (*failure.words, failure.test)
    if words is not command:
        test = (failure.test,)
    elif os.environ.get("CI"):
        # who reads that is at another machine, in a checkout of the app
        words, test = (NAME,), tuple(map(_from_here, test))
    again = shlex.join([*words, *test])
    inside = shlex.join([*words, f"{prefix}shell-on-failure", *test])
    disks = shlex.join([*words, f"{prefix}keep=failed", *test])
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    happened = (fit(line, width) for line in failure.timeline)
    lines = [failure.test, *happened, f"  cause       {failure.cause}"]
    if failure.artifacts:
        lines.append(
            f"  artefacts   {failure.artifacts}/  ({', '.join(failure.files)})"
        )
    lines.append(f"  run again   {again}")
    if frozen := sorted(Path(failure.artifacts or os.devnull).glob(f"{FROZEN}*")):
        program = (NAME,) if os.environ.get("CI") else command
        for path in frozen:
            thaw = shlex.join([*program, "thaw", str(path)])
            with contextlib.suppress(FrozenError):  # it was removed meanwhile
                lines += [f"  frozen      {Folder.read(path)}", f"  thaw        {thaw}"]
    elif kept := _kept_disks(failure):
        shells = [shlex.join([*command, "shell", str(path)]) for path in kept]
        lines += [f"  look inside {shell}" for shell in shells]
    # the VMs of a core under test have no such shell, and their disks are its own
    elif "--core" not in failure.words and any(
        name.endswith(".log") for name in failure.files
    ):
        lines += [f"  look inside {inside}", f"  keep disks  {disks}"]
    return lines


def _from_here(word: str) -> str:
    if os.path.isabs(word) and Path(word).is_relative_to(Path.cwd()):  # noqa: PTH117
        return os.path.relpath(word)
    return word


def _kept_disks(failure: Failure) -> list[Path]:
    if not failure.artifacts:
        return []
    return sorted(Path(failure.artifacts).glob("disks/*"))


def state(cache: Path) -> Path:
    """Return where runs in the current directory keep what the next one may use.

    :param cache: the root of the cache.
    """
    return cache / "directories" / digest(str(Path.cwd()))


def last_run(cache: Path) -> Path:
    """Return the file with the failures of the last run in the current directory."""
    return state(cache) / "last-run.json"


def store(path: Path, run: LastRun) -> None:
    """Write what a run has left for `load`, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps(dataclasses.asdict(run), indent=1).encode())


def load(path: Path) -> LastRun | None:
    """Return what `store` wrote, None if there is nothing that can be read."""
    try:
        run = json.loads(path.read_text())
        rows = run["failures"]
        for row in rows:
            row["files"], row["words"] = tuple(row["files"]), tuple(row["words"])
            row["timeline"] = tuple((text, end) for text, end in row["timeline"])
        found = tuple(Failure(**row) for row in rows)
        return LastRun(found, run["interrupted"], run["not_run"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
