"""Timeline of memory: one line of JSON for each decision, and for what it led to."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.qmemman.exc import TimelineError
from qubes_itests.qmemman.sizes import MIB
from qubes_itests.timeline import note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from qubes_itests.qmemman.algorithm import Target
    from qubes_itests.qmemman.state import MachineMemory

__all__ = [
    "TIMELINE",
    "DomainRecord",
    "Record",
    "Recorder",
    "parse_record",
    "read",
    "tail",
]

#: The name of the file in the directory of an app.
TIMELINE: Final = "memory.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainRecord:
    """One domain at one moment; bytes.

    :param target: what it was last told to hold.
    :param preferred: None until it has reported what it used.
    """

    name: str
    used: int | None
    current: int
    actual: int
    target: int
    preferred: int | None
    maximum: int
    no_progress: bool = False
    slow_memset_react: bool = False
    paused: bool = False
    balanced: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One moment.

    :param time: seconds on the recorder's clock.
    :param event: ``look``, ``balance``, ``balloon``, ``step``, ``granted``,
        ``refused``, ``set`` or ``note``.
    :param total: the machine's memory, bytes.
    :param free: what is free and promised to nobody, bytes.
    :param domains: by number.
    :param targets: that were decided on: number and bytes, in order.
    :param amount: what a starting VM asked for, bytes.
    :param text: of a note.
    """

    time: float
    event: str
    total: int
    free: int
    domains: Mapping[str, DomainRecord]
    targets: Sequence[Target] = field(default=())
    amount: int = 0
    text: str = ""


class Recorder:
    """Appends to a timeline; close it in the end.

    :param path: the file; it is created.
    :param clock: gives the time in seconds, for instance the loop's.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.path = path
        self._clock = clock
        # a line at a time: who follows the file sees whole lines, and none is lost
        self._file = path.open("ab", buffering=0)
        self._last: Record | None = None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def record(
        self,
        machine: MachineMemory,
        event: str,
        targets: Sequence[Target],
        amount: int = 0,
    ) -> None:
        """Append what a daemon sees."""
        domains = {
            domid: DomainRecord(
                name=machine.names.get(domid, domid),
                used=state.used,
                current=state.current,
                actual=state.actual,
                target=state.last_target,
                preferred=machine.preferred(state),
                maximum=state.maximum,
                no_progress=state.no_progress,
                slow_memset_react=state.slow_memset_react,
                paused=state.paused,
                balanced=state.balanced,
            )
            for domid, state in machine.domains.items()
        }
        record = Record(
            time=self._clock(),
            event=event,
            total=machine.total,
            free=machine.free,
            domains=domains,
            targets=tuple(targets),
            amount=amount,
        )
        self._append(record)
        _report(record, dict(machine.names))

    def note(self, text: str) -> None:
        """Append a remark, for instance what a scenario does now."""
        last = self._last
        self._append(
            Record(
                time=self._clock(),
                event="note",
                total=last.total if last else 0,
                free=last.free if last else 0,
                domains=last.domains if last else {},
                text=text,
            )
        )

    def _append(self, record: Record) -> None:
        # for `note`, which has no balancer at hand
        self._last = record
        line = json.dumps(asdict(record), separators=(",", ":")) + "\n"
        self._file.write(line.encode("ascii"))


def _report(record: Record, names: Mapping[str, str]) -> None:
    """Have the timeline of the test show a decision; steps on the way are none."""
    if record.event == "step":
        return
    used = {
        d.name: d.used // MIB for d in record.domains.values() if d.used is not None
    }
    note(
        "memory",
        event=record.event,
        targets={names.get(d, d): size // MIB for d, size in record.targets},
        used=dict(used),
        holds={d.name: d.actual // MIB for d in record.domains.values()},
        free=record.free // MIB,
        total=record.total // MIB,
        amount=record.amount // MIB,
    )


def parse_record(line: str) -> Record:
    """Return the record that a line holds.

    :raise ValueError: when it holds none.
    """
    try:
        values: dict[str, Any] = json.loads(line)
        domains = {
            str(domid): DomainRecord(**domain)
            for domid, domain in values.pop("domains").items()
        }
        targets = tuple(
            (str(domid), int(size)) for domid, size in values.pop("targets")
        )
        record = Record(domains=domains, targets=targets, **values)
        # what else is in it is drawn and shown, so it must be numbers
        float(record.time), int(record.free), int(record.total)
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a record: {error}") from error
    return record


def read(path: Path, most: int | None = None) -> list[Record]:
    """Return a timeline's records; a last line that is still being written is left out.

    :param most: only the lines within the last so many bytes; None for all.
    :raise TimelineError: when the file is none, or cannot be read.
    """
    try:
        text = tail(path, most).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TimelineError(path, str(error)) from error
    return list(_parse(path, text.splitlines()))


def tail(path: Path, most: int | None = None) -> bytes:
    """Return the whole lines of a file within its last `most` bytes."""
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        start = 0 if most is None else max(0, length - most)
        # one byte more tells whether a line begins at the start
        file.seek(max(0, start - 1))
        if start:
            file.readline()
        data = file.read()
    return data[: data.rfind(b"\n") + 1]


def _parse(path: Path, lines: Iterable[str]) -> Iterable[Record]:
    for number, line in enumerate(lines, 1):
        try:
            yield parse_record(line)
        except ValueError as error:
            raise TimelineError(path, f"line {number}: {error}") from error
