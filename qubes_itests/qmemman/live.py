"""Timeline on the terminal: a table of the last moment, and following the file."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, TextIO

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qubes_itests.qmemman.exc import TimelineError
from qubes_itests.qmemman.sizes import MIB, mib
from qubes_itests.qmemman.timeline import parse_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console, RenderableType

    from qubes_itests.qmemman.timeline import DomainRecord, Record

__all__ = ["follow", "render"]

_BAR = 30
_LONGEST_NAME = 31
_INTERVAL = 0.25


def render(record: Record) -> RenderableType:
    """Return what one moment looks like.

    :param record: the moment; names in it are untrusted and shown as plain text.
    """
    table = Table(box=None, pad_edge=False)
    longest = max((len(domain.name) for domain in record.domains.values()), default=0)
    # names are what one looks for: rather the bars are cut on a narrow terminal
    table.add_column("VM", no_wrap=True, min_width=min(longest, _LONGEST_NAME))
    for heading in ("uses", "holds", "target", "prefers", "of the machine", ""):
        right = heading in ("uses", "holds", "target", "prefers")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for domain in record.domains.values():
        table.add_row(*_cells(domain, record.total))
    note = record.text or (f" of {mib(record.amount)}" if record.amount else "")
    head = (
        f"{record.time:.1f} s  {record.event}{note and ' '}{note.strip()}"
        f"  |  free {mib(record.free)} of {mib(record.total)}"
    )
    legend = Text("MiB; # is used, - is held and not used", style="dim")
    return Group(Text(head, style="bold"), table, legend)


def _cells(domain: DomainRecord, total: int) -> Iterator[Text]:
    sizes = (domain.used, domain.current, domain.target, domain.preferred)
    yield Text(domain.name)
    for size in sizes:
        yield Text("-" if size is None else f"{size // MIB}")
    used = min(domain.used or 0, domain.current)
    cells = [round(size / max(total, 1) * _BAR) for size in (used, domain.current)]
    yield Text("#" * cells[0] + "-" * (cells[1] - cells[0]), style="cyan")
    flags = {
        "gives nothing": domain.no_progress,
        "gives slowly": domain.slow_memset_react,
        "paused": domain.paused,
        "takes no part": not domain.balanced,
        "has not reported": domain.balanced and domain.used is None,
    }
    yield Text(", ".join(text for text, true in flags.items() if true), style="yellow")


def follow(
    path: Path, console: Console, newest: Callable[[], Path | None] | None = None
) -> None:
    """Show a timeline; on a terminal go on as it grows, until it is removed.

    :param newest: asked for the timeline to go on with: another one when a new test
        has begun, None when there is none any more.
    :raise TimelineError: when a file is none.
    """
    if not console.is_terminal:
        with _opened(path) as file:
            console.print(render(_first(path, file)))
        return
    with Live(console=console, auto_refresh=False) as live:
        following: Path | None = path
        while following is not None:
            try:
                _follow_one(following, live, newest)
            except TimelineError:
                if newest is None or following.exists():
                    raise
            following = newest() if newest else None


def _follow_one(
    path: Path, live: Live, newest: Callable[[], Path | None] | None
) -> None:
    with _opened(path) as file:
        if newest is None:
            live.update(render(_first(path, file)), refresh=True)
        while path.exists():
            if record := _last(path, file):
                live.update(render(record), refresh=True)
            elif newest and newest() != path:
                return
            time.sleep(_INTERVAL)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8") as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        raise TimelineError(path, str(error)) from error


def _first(path: Path, file: TextIO) -> Record:
    record = _last(path, file)
    if record is None:
        raise TimelineError(path, "it is empty")
    return record


def _last(path: Path, file: TextIO) -> Record | None:
    """Return the last whole record beyond the file's position, and move there."""
    last = None
    while True:
        position = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(position)
            break
        last = line
    try:
        return parse_record(last) if last else None
    except ValueError as error:
        raise TimelineError(path, str(error)) from error
