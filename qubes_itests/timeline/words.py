"""Records in words, for terminals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.timeline.recorder import Record

__all__ = ["called", "describe", "doing", "headline", "last_lines"]

#: Lines of the error output of a command that are shown with it.
_STDERR_LINES: Final = 3
_LONGEST: Final = 1000
#: What explains a failure; the rest is for the file.
_TOLD: Final = (
    *("state", "start", "run", "service", "policy", "console", "storage"),
    *("memory", "network", "failure", "log"),
)


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
    "memory": "memory: {event} of {amount} MiB, {free} of {total} MiB free",
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


def describe(record: Record) -> list[str]:
    """Return a record as a line, and the end of what it wrote as errors below that."""
    text = headline(record)
    if "duration" in record:
        text += safe_text(_ending(record))
    if where := record.get("where"):
        text += f"  {where}"
    time = record["t"] if isinstance(record["t"], float | int) else 0.0
    vm = str(record["vm"] or "")
    lines = [f"{time:9.3f}  {vm:16} {text}".rstrip()]
    said = str(record.get("stderr") or "").splitlines()[-_STDERR_LINES:]
    return lines + [f"{'':28}| {line}" for line in said]


def last_lines(records: list[Record], count: int) -> list[str]:
    """Return the last lines before a failure, its own included.

    :param records: of the test, in order.
    :param count: the most lines.
    """
    kinds = [record["kind"] for record in records]
    if "failure" in kinds:
        records = records[: kinds.index("failure") + 1]
    told = [record for record in records if record["kind"] in _TOLD]
    lines: list[str] = []
    for record in reversed(told):
        lines[:0] = describe(record)
        if len(lines) >= count:
            break
    return lines[-count:]


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
