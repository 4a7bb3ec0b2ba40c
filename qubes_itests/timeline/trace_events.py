"""A timeline as trace events, which Perfetto and the profilers of browsers open.

The format is that of "Trace Event Format" (the Chromium project): a JSON object with
complete (X), instant (i), counter (C), flow (s, f) and metadata (M) events; times in
microseconds.  A VM is a process; calls at the same time are in threads of their own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.timeline.words import headline

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qubes_itests.timeline.document import Header
    from qubes_itests.timeline.recorder import Record

__all__ = ["NAME", "trace_events"]

#: The name of the file beside the timeline.
NAME: Final = "trace.json"
_Event = dict[str, Any]
#: The process of what happens to no VM.
_TEST: Final = 1


def trace_events(header: Header, records: Iterable[Record]) -> bytes:
    """Return the file of a timeline.

    :param records: in order, as `document.load` returns them.
    """
    records = list(records)
    names = {str(record["vm"]): None for record in records if record["vm"]}
    names |= {str(record["target"]): None for record in records if "target" in record}
    processes = {name: number for number, name in enumerate(names, _TEST + 1)}
    export = _Export(processes, header.duration)
    events = [event for record in records for event in export.of(record)]
    named = [_named(_TEST, header.test), *(_named(p, n) for n, p in processes.items())]
    document = {
        "traceEvents": [*named, *events],
        "displayTimeUnit": "ms",
        "otherData": {"test": header.test, "started": header.started},
    }
    return json.dumps(document, separators=(",", ":")).encode()


def _named(process: int, name: str) -> _Event:
    args = {"name": name}
    return {"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": args}


class _Export:
    """Turns records into events.

    :param processes: the number of each VM.
    :param end: of the test, in seconds: that of what has not ended.
    """

    def __init__(self, processes: dict[str, int], end: float) -> None:
        self._processes = processes
        self._end = end
        self._calls = 0
        #: By process, the ends of what is in each of its threads, innermost last.
        self._threads: dict[int, list[list[float]]] = {}

    def of(self, record: Record) -> Iterator[_Event]:
        """Yield the events of a record."""
        begun = _number(record["t"])
        process = self._processes.get(str(record["vm"]), _TEST)
        if record["kind"] == "memory":
            yield from self._memory(record, begun)
            return
        event = {
            "name": headline(record),
            "cat": record["kind"],
            "ts": round(begun * 1e6),
            "pid": process,
            "tid": 0,
            "args": {n: v for n, v in record.items() if n not in ("t", "kind", "vm")},
        }
        if "duration" not in record:
            yield event | {"ph": "i", "s": "t"}
            return
        took = record["duration"]
        end = self._end if took is None else begun + _number(took)
        duration = max(0, round((end - begun) * 1e6))
        thread = self._thread(process, begun, end)
        yield event | {"ph": "X", "dur": duration, "tid": thread}
        if record["kind"] == "service":
            yield from self._call(record, event | {"tid": thread}, begun, end)

    def _thread(self, process: int, begun: float, end: float) -> int:
        """Return a thread in which this is inside of what goes on there, or alone."""
        threads = self._threads.setdefault(process, [])
        for number, ends in enumerate(threads, 1):
            while ends and ends[-1] <= begun:
                ends.pop()
            if not ends or end <= ends[-1]:
                ends.append(end)
                return number
        threads.append([end])
        return len(threads)

    def _call(
        self, record: Record, event: _Event, begun: float, end: float
    ) -> Iterator[_Event]:
        """Yield the other end of a call, and the arrow there."""
        self._calls += 1
        target = self._processes[str(record["target"])]
        thread = self._thread(target, begun, end)
        duration = max(0, round((end - begun) * 1e6))
        there = event | {"pid": target, "tid": thread}
        yield there | {"ph": "X", "dur": duration}
        arrow = {"name": "call", "cat": "call", "id": self._calls, "ts": event["ts"]}
        yield arrow | {"ph": "s", "pid": event["pid"], "tid": event["tid"]}
        yield arrow | {"ph": "f", "bp": "e", "pid": target, "tid": thread}

    def _memory(self, record: Record, begun: float) -> Iterator[_Event]:
        used = record["used"]
        for name, size in used.items() if isinstance(used, dict) else ():
            yield {
                "name": "memory, MiB",
                "ph": "C",
                "ts": round(begun * 1e6),
                "pid": self._processes.get(name, _TEST),
                "args": {"used" if name in self._processes else name: size},
            }


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
