"""``memory``: the memory of VMs, live on the terminal or as a picture."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host import rundir
from qubes_itests.host.cache import Cache
from qubes_itests.qmemman import live, plot, timeline
from qubes_itests.whole_file import write_output

if TYPE_CHECKING:
    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

#: Of a table that goes into a file or a pipe.
_WIDTH = 120
#: Seconds between two looks for a run.
_PAUSE = 0.5


def execute(command: Command, settings: Settings) -> int:
    """Show it, plot it, or compare."""
    words = list(command.words)
    if words[:1] == ["compare"]:
        from qubes_itests.cli.memory_comparison import compare

        picture, well = compare(settings, words[1:])
        _write(picture, Path(command.output or "memory.svg"))
        return ExitCode.OK if well else ExitCode.TESTS_FAILED
    plotting = words[:1] == ["plot"]
    files = words[1:] if plotting else words
    if len(files) > 1:
        raise HarnessError(f"Expected one timeline, got {len(files)}.")
    cache = Cache()
    path = Path(files[0]) if files else _newest(cache)
    if path is None and not plotting and sys.stdout.isatty():
        print("Waiting for a run with --memory-budget; Ctrl-C ends this.")
        while path is None:
            time.sleep(_PAUSE)
            path = _newest(cache)
    if path is None:
        raise HarnessError(
            "No run balances memory now: begin one with --memory-budget=4096, or name"
            f" a timeline, as failed tests leave it: {timeline.TIMELINE}."
        )
    if plotting:
        picture = plot.draw(timeline.read(path))
        _write(picture, Path(command.output or path.with_suffix(".svg").name))
    else:
        terminal = sys.stdout.isatty()
        newest = None if files else functools.partial(_newest, cache)
        live.follow(path, Console(width=None if terminal else _WIDTH), newest)
    return ExitCode.OK


def _write(picture: str, target: Path) -> None:
    try:
        write_output(target, picture.encode())
    except OSError as error:
        raise HarnessError(f"The picture cannot be written: {error}.") from error
    print(f"Wrote {target}.")


def _newest(cache: Cache) -> Path | None:
    """Return the timeline of a run under way that was written to last."""
    found: list[tuple[float, Path]] = []
    for run in rundir.under_way(cache):
        file = f"vm/apps/*/{timeline.TIMELINE}"
        # the second are those of workers
        for path in (*run.glob(file), *run.glob(f"*/{file}")):
            with contextlib.suppress(FileNotFoundError):  # the run may end meanwhile
                found.append((path.stat().st_mtime, path))
    return max(found)[1] if found else None
