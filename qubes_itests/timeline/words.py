"""Records in words, for terminals."""

from __future__ import annotations

import itertools
import unicodedata
from typing import TYPE_CHECKING, Final

from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.timeline.recorder import Record

__all__ = [
    "ERROR",
    "Line",
    "called",
    "cut",
    "describe",
    "doing",
    "explains",
    "fit",
    "headline",
    "last_lines",
    "waited_for",
]

#: Lines of consoles that are shown in a row.
_CONSOLE_LINES: Final = 3
#: What a line says, and its end, which is not to be cut.
Line = tuple[str, str]
#: Columns that what a line says gets at least, or its end is in the next one.
_LEAST: Final = 50
_INDENT: Final = " " * 9
#: Lines of the error output of a command that are shown with it.
_STDERR_LINES: Final = 3
_LONGEST: Final = 1000
#: Kinds of records that may explain a failure, all of them.
_TOLD: Final = ("start", "run", "service", "policy", "console", "network", "log")
#: The least severe priority of syslog that is an error.
ERROR: Final = 3
#: Seconds from which an operation of storage is worth telling.
_SLOW: Final = 0.5


def headline(record: Record) -> str:
    """Return what a record is about, in a few words, without how it ended."""
    text = _WORDS.get(str(record["kind"]), "{kind}").format_map(_Fields(record))
    return safe_text(text, limit=_LONGEST)


_WORDS: Final = {
    "phase": "{name}",
    "state": "is {state}",
    "start": "starts",
    "run": 'runs "{command}"',
    "service": "calls {service} in {target}",
    "policy": "may call {service} in {target}: {decision} ({rule})",
    "console": "console: {line}",
    "journal": "journal: {line}",
    "storage": "storage: {operation} {volume}",
    "memory": "memory: {event} {amount} MiB, {free} of {total} MiB are free",
    "network": "network: {change} {peer}",
    "event": "event {name} {kwargs}",
    "log": "{level} {logger}: {line}",
    "failure": "FAILS: {text}",
}


class _Fields(dict[str, object]):
    """The fields of a record, of which any may be missing."""

    def __missing__(self, name: str) -> str:
        return "?"


def _ending(record: Record) -> str:
    """Return how something ended that takes time."""
    took = record["duration"]
    if not isinstance(took, float | int):
        return "  … has not ended"
    parts = []
    if "status" in record:
        parts.append(f"status {record['status']}")
    if record.get("error"):
        parts.append(str(record["error"]))
    if record.get("ok") is False:
        parts.append("FAILED")
    return f"  → {', '.join([*parts, f'{took:.2f} s'])}"


def describe(record: Record) -> list[Line]:
    """Return a record as a line, and the end of what it wrote as errors below that."""
    time = record["t"] if isinstance(record["t"], float | int) else 0.0
    text = f"{time:8.2f} {record['vm'] or ''}".rstrip() + f" {headline(record)}"
    end = safe_text(_ending(record)) if "duration" in record else ""
    if where := record.get("where"):
        end += f"  {where}"
    said = str(record.get("stderr") or "").splitlines()[-_STDERR_LINES:]
    return [(text, end), *((f"{_INDENT}| {line}", "") for line in said)]


def fit(line: Line, width: int) -> str:
    """Return a line that is no wider than a terminal, in two where one does not do.

    :param width: columns; 0 for any.
    """
    text, end = line
    if not width:
        return text + end
    room = width - sum(map(_columns, end))
    if room < _LEAST and sum(map(_columns, text)) > room:
        return f"{cut(text, width)}\n{_INDENT}{cut(end.strip(), width - len(_INDENT))}"
    return cut(text, room) + end


def cut(text: str, width: int) -> str:
    """Return a text that is safe to show, or as much of it as columns have room for."""
    if sum(map(_columns, text)) <= width:
        return text
    used = itertools.accumulate(map(_columns, text))
    return "".join(c for c, end in zip(text, used, strict=True) if end < width) + "…"


def _columns(character: str) -> int:
    """Return how many columns of a terminal a character takes; none if it is a mark.

    Of what is seen: the others, that join or turn characters, are escaped by then.
    """
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def last_lines(records: list[Record], count: int) -> list[Line]:
    """Return the last lines before a failure, as things were then.

    :param records: of the test, in order.
    :param count: the most lines.
    """
    kinds = [record["kind"] for record in records]
    if "failure" in kinds:
        failure = kinds.index("failure")
        records = [_as_of(records[failure], record) for record in records[:failure]]
    lines: list[Line] = []
    console = 0
    for record in reversed([record for record in records if explains(record)]):
        # of a guest that says a lot its last words do
        console = console + 1 if record["kind"] == "console" else 0
        if console > _CONSOLE_LINES:
            continue
        lines[:0] = describe(record)
        if len(lines) >= count:
            break
    return lines[-count:]


def _as_of(moment: Record, record: Record) -> Record:
    """Return a record as it was at a moment: what its VM's end did to it came later."""
    match moment["t"], record["t"], record.get("duration"):
        case float(now), float(begun), float(took) if begun + took > now:
            return record | {"duration": None, "stderr": "", "ok": None}
    return record


def explains(record: Record) -> bool:
    """Return whether a record may explain a failure; others are for the file."""
    match record["kind"]:
        case "state":
            # those of a start are told with it
            return record["state"] not in ("Transient", "Running", "Halting")
        case "storage":
            took = record["duration"]
            slow = not isinstance(took, float | int) or took > _SLOW
            return slow or record.get("ok") is False
        case "memory":
            return record.get("event") == "refused"
        case "journal":
            priority = record.get("priority")
            return isinstance(priority, int) and priority <= ERROR
        case kind:
            return kind in _TOLD


def called(record: Record) -> str:
    """Return a command or a service as the call of the test that began it."""
    if record["kind"] == "run":
        text = f'vm.run("{record["command"]}") of {record["vm"]}'
    elif record["kind"] == "service":
        text = f'vm.run_service("{record["service"]}") of {record["target"]}'
    else:
        text = f"{headline(record)} ({record['vm']})"
    where = record.get("where")
    return safe_text(text + (f", {where}" if where else ""), limit=_LONGEST)


def waited_for(open_records: list[Record], line: str | None) -> str:
    """Return what a test waits for: the call of it that began last, or its line.

    :param line: where the test is, None where its thread is in none of its lines.
    """
    for record in reversed(open_records):
        # what goes on in the background was begun elsewhere in the test
        if record["kind"] == "start" or (line and record.get("where") == line):
            return called(record)
    return f"the test, {line}" if line else "the test"


def doing(open_records: list[Record]) -> Iterator[str]:
    """Yield what goes on, in words that follow the name of a test, the last first."""
    for record in reversed(open_records):
        if record["kind"] == "phase":
            continue
        steps = record.get("steps")
        step = ""
        if isinstance(steps, list) and steps and isinstance(steps[-1], list):
            step = f": {steps[-1][0]}"
        place = f" in {record['vm']}" if record["kind"] == "run" else ""
        subject = "" if record["kind"] == "run" else f"{record['vm']} "
        yield safe_text(f"{subject}{headline(record)}{place}{step}", limit=_LONGEST)
