"""What a run has left, read for the page: checked, made safe, and bounded.

Whoever wrote the files may be hostile, and so is what guests said in them. A value of
another type than it should have is left out, as are fields and kinds that are unknown.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Final, TypeAlias

from qubes_itests.exc import HarnessError
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["Json", "Record", "read_run", "read_timeline"]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Record: TypeAlias = "dict[str, Json]"
_Fields: TypeAlias = "Mapping[str, Callable[[object], Json]]"

#: Bytes of a timeline that are read, and of one of its lines.
_MOST_READ: Final = 16 << 20
_LONGEST_LINE: Final = 64 << 10
_MOST_READ_OF_RUN: Final = 64 << 20
_MOST_TESTS: Final = 20_000
#: Of names in one object or list: VMs, phases, steps.
_MOST_ITEMS: Final = 64
#: What JavaScript counts exactly; NaN and infinities are beyond it, too.
_LARGEST: Final = 2**53
#: Seconds: more than ten years are no duration.
_LONGEST: Final = 3e8


_SHORT: Final = 100
#: Texts that are short are few and come again: names of VMs most of all.
_name = functools.lru_cache(maxsize=4096)(functools.partial(safe_text, limit=_SHORT))


def _text(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    return _name(value) if len(value) < _SHORT else safe_text(value, limit=1000)


def _lines(value: object) -> str | None:
    return safe_text(value, lines=True) if isinstance(value, str) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= _LARGEST else None


def _seconds(value: object) -> float | None:
    seconds = _number(value)
    return None if seconds is None or not 0 <= seconds <= _LONGEST else seconds


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _texts(value: object) -> list[Json]:
    items = value[:_MOST_ITEMS] if isinstance(value, list) else []
    return [text for item in items if (text := _text(item)) is not None]


def _numbers(value: object) -> dict[str, Json]:
    """Return the numbers of an object, by their names."""
    pairs = list(value.items()) if isinstance(value, dict) else []
    numbers = {_text(name): _number(said) for name, said in pairs[:_MOST_ITEMS]}
    return {n: number for n, number in numbers.items() if n and number is not None}


def _facts(value: object) -> dict[str, Json]:
    """Return what an object says, as texts, by their names."""
    pairs = list(value.items()) if isinstance(value, dict) else []
    return {
        safe_text(name): safe_text(str(said), limit=300)
        for name, said in pairs[:_MOST_ITEMS]
    }


def _steps(value: object) -> list[Json]:
    """Return pairs of a name and seconds; what is under way has none."""
    steps: list[Json] = []
    for step in value[:_MOST_ITEMS] if isinstance(value, list) else ():
        match step:
            case [str(name), seconds] if (
                seconds is None or _seconds(seconds) is not None
            ):
                steps.append([_text(name), _seconds(seconds)])
    return steps


# fmt: off
_SPAN: Final[_Fields] = {"duration": _seconds}
_PLACE: Final[_Fields] = {"where": _text, "source": _text}
_CALL: Final[_Fields] = {
    **_SPAN, **_PLACE,
    "user": _text, "status": _number, "stderr": _lines, "error": _text}
#: Of each kind of record what is shown of it, besides `t`, `kind` and `vm`.
_KINDS: Final[Mapping[str, _Fields]] = {
    "phase": {**_SPAN, "name": _text},
    "failure": {**_PLACE, "text": _lines},
    "state": {"state": _text, "cause": _text},
    "start": {**_SPAN, **_PLACE, "warm": _flag, "ok": _flag, "steps": _steps},
    "run": {**_CALL, "command": _lines, "stdout_bytes": _number},
    "service": {**_CALL, "target": _text, "service": _text},
    "policy": {"target": _text, "service": _text, "decision": _text, "rule": _text},
    "storage": {
        **_SPAN, "operation": _text, "pool": _text, "volume": _text, "ok": _flag},
    "network": {"change": _text, "peer": _text},
    "memory": {
        "event": _text, "targets": _numbers, "used": _numbers, "holds": _numbers,
        "free": _number, "total": _number, "amount": _number},
    "console": {"line": _text},
    "journal": {"line": _text, "priority": _number},
    "log": {"level": _text, "logger": _text, "line": _text},
    "event": {"name": _text, "kwargs": _text},
}
_HEADER: Final[_Fields] = {"started": _number, "dropped": _number, "vms": _texts}
_RUN: Final[_Fields] = {
    "started": _number, "duration": _seconds, "command": _texts, "seed": _number,
    "outcome": _text, "host": _facts}
_TEST: Final[_Fields] = {
    "test": _text, "outcome": _text, "duration": _seconds, "phases": _numbers,
    "cause": _lines, "where": _text, "artifacts": _text, "worker": _text,
    "attempts": _number, "failed": _number, "started": _number, "earlier": _texts}
# fmt: on
#: Which kinds get room first. Of each group the end stays: there the failure is.
_GROUPS: Final = (
    ("phase", "failure", "state", "start"),
    ("run", "service", "policy", "storage", "network"),
    ("memory",),
    ("console", "journal", "log", "event"),
)


def read_run(path: Path) -> tuple[Record, list[Record]]:
    """Return what run.json says of the run, and of each of its tests.

    :raise HarnessError: there is no such file, or it is something else.
    """
    try:
        with path.open("rb") as file:
            run = _object(file.read(_MOST_READ_OF_RUN))
    except OSError as error:
        raise HarnessError(f"The run cannot be read: {error}.") from error
    found = run.get("format"), run.get("version")
    if found != ("qubes_itests.run", 1):
        raise HarnessError(
            f"{path}: expected a qubes_itests.run of version 1, got {found[0]!r:.60}"
            f" of version {found[1]!r:.20}"
        )
    tests = run.get("tests")
    rows = tests[:_MOST_TESTS] if isinstance(tests, list) else []
    return _known(run, _RUN), [_known(r, _TEST) for r in rows if isinstance(r, dict)]


def read_timeline(path: Path, room: int) -> Record | None:
    """Return a timeline, or None if there is none that can be read.

    :param room: the most bytes of JSON that its records may take.
    :return: the header's fields; `records`, in their order; `left_out`, the number of
        those for which there was no room, by their kind.
    """
    if path.is_symlink() or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            lines = _objects(iter(lambda: file.readline(_LONGEST_LINE), b""))
            header = next(lines, {})
            if header.get("format") != "qubes_itests.timeline":
                return None
            records = [record for line in lines if (record := _record(line))]
    except OSError:
        return None
    kept, left_out = _within(records, room)
    return {**_known(header, _HEADER), "records": kept, "left_out": left_out}


def _object(data: bytes) -> dict[str, object]:
    """Return a JSON object; an empty one for what is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _objects(lines: Iterator[bytes]) -> Iterator[dict[str, object]]:
    read = 0
    for line in lines:
        read += len(line)
        if read > _MOST_READ:
            return
        yield _object(line)


def _known(found: Mapping[str, object], fields: _Fields) -> Record:
    values = {name: read(found.get(name)) for name, read in fields.items()}
    return {name: value for name, value in values.items() if value is not None}


def _record(line: Mapping[str, object]) -> Record | None:
    kind, time, vm = line.get("kind"), _seconds(line.get("t")), _text(line.get("vm"))
    if not isinstance(kind, str) or kind not in _KINDS or time is None:
        return None
    record: Record = {"t": time, "kind": kind}
    if vm is not None:
        record["vm"] = vm
    return record | _known(line, _KINDS[kind])


def _within(records: Sequence[Record], room: int) -> tuple[list[Json], dict[str, Json]]:
    """Return those records for which there is room, and how many others there are."""
    sizes = [len(json.dumps(record)) + len(", ") for record in records]
    kept: set[int] = set()
    for kinds in _GROUPS:
        group = [n for n, record in enumerate(records) if record["kind"] in kinds]
        if kinds == ("memory",):
            # A curve of fewer points says more than the end of one.
            total = sum(sizes[number] for number in group)
            group = group[:: max(1, math.ceil(total / max(1, room // 2)))]
        for number in reversed(group):
            room -= sizes[number]
            if room < 0:
                break
            kept.add(number)
        room = max(0, room)
    others = (str(r["kind"]) for n, r in enumerate(records) if n not in kept)
    return [records[number] for number in sorted(kept)], dict(Counter(others))
