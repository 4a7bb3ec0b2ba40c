"""The recorder: what the layers above report, kept in memory until somebody asks.

Everything reports by `note`, `begin` and `lines`, from whatever thread it is in; while
no test is recorded these do nothing.  Texts are cut when they come, and made safe to
show when they are taken out: most tests pass, and nobody looks.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, Self, TypeVar

from qubes_itests.timeline.caller import caller, source
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Record",
    "Recorder",
    "Span",
    "Value",
    "begin",
    "command",
    "current",
    "follows_logs",
    "lines",
    "note",
    "recording",
    "unrecorded",
    "wants_events",
]

#: What a record may have in its fields: what JSON has.
Value = str | int | float | bool | list["Value"] | dict[str, "Value"] | None
#: A record as it leaves the recorder: `t`, `kind`, `vm`, and the fields of its kind.
Record = dict[str, Value]

#: Of each kind so many records are kept, and so many characters in them: the last ones.
#: By kind, so that a guest that floods its console hides nothing else.
_MOST_RECORDS: Final = 2000
_MOST_CHARACTERS: Final = 500_000
#: Characters of a text in a record.
_LONGEST_TEXT: Final = 2000
#: Entries of a list or of a mapping in a record.
_MOST_ENTRIES: Final = 200
#: What a record takes besides its texts, in characters.
_OVERHEAD: Final = 100
#: Lines that are taken of what a guest says at once: the last of them.
_MOST_LINES: Final = 200
_LONGEST_LINE: Final = 500


class Span:
    """Something that takes time: a record that is completed when it ends.

    :param recorder: whom its end is told; None for what is a mere moment.
    """

    __slots__ = (
        *("_recorder", "duration", "fields", "is_kept", "is_span"),
        *("kind", "number", "size", "t", "vm"),
    )

    def __init__(
        self,
        recorder: Recorder | None,
        kind: str,
        vm: str | None,
        fields: Record,
    ) -> None:
        self._recorder = recorder
        self.kind = kind
        self.vm = vm
        self.fields = fields
        #: Seconds since the test began; and the end of that, None before.
        self.t = 0.0
        self.duration: float | None = None
        self.is_span = recorder is not None
        #: Characters, and whether they are counted.
        self.size = 0
        self.is_kept = True
        #: In the order in which they came.
        self.number = 0

    def update(self, **fields: Value) -> None:
        """Take note of what is known meanwhile."""
        if self._recorder is not None:
            self._recorder.complete(self, fields, ended=False)

    def end(self, **fields: Value) -> None:
        """Take note that it has ended; a second call does nothing.

        :param fields: what is known only now.
        """
        if self._recorder is not None:
            self._recorder.complete(self, fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.end()


#: What `begin` returns while no test is recorded.
_UNWANTED: Final = Span(None, "", None, {})


class _Ring:
    """The last records of one kind."""

    def __init__(self) -> None:
        self.records: deque[Span] = deque()
        self.characters = 0
        self.dropped = 0

    def add(self, record: Span) -> None:
        self.records.append(record)
        self.characters += record.size
        while (
            len(self.records) > _MOST_RECORDS or self.characters > _MOST_CHARACTERS
        ) and len(self.records) > 1:
            oldest = self.records.popleft()
            oldest.is_kept = False
            self.characters -= oldest.size
            self.dropped += 1


class Recorder:
    """The timeline of one test, as long as it grows.

    :param events: whether events of the core are wanted.
    :param follow_logs: whether what guests log is wanted whether the test fails or not.
    :param listener: is called with each record that is complete, in the thread that
        reported it and under no lock; it must be quick.
    """

    def __init__(
        self,
        *,
        events: bool = False,
        follow_logs: bool = False,
        listener: Callable[[Record], None] | None = None,
    ) -> None:
        self.events = events
        self.follow_logs = follow_logs
        self.listener = listener
        #: Seconds since the epoch.
        self.started = time.time()
        self._zero = time.monotonic()
        # Consoles, the event loop, threads of storage and the test itself meet here. A
        # deadline comes as a signal, in the test's thread, which may have it, and asks
        # what is open.
        self._lock = threading.RLock()
        self._rings: dict[str, _Ring] = {}
        self._open: dict[int, Span] = {}
        self._numbers = itertools.count()

    def time(self) -> float:
        """Return the seconds since the test began."""
        return time.monotonic() - self._zero

    def note(self, kind: str, vm: str | None, fields: Record) -> None:
        """Record a moment; the parameters are those of `note` of this module."""
        self._note(kind, vm, fields, None)

    def note_at(self, when: float, kind: str, vm: str | None, fields: Record) -> None:
        """Record a moment that is over, as far as it was in this test.

        :param when: seconds since the epoch.
        """
        self._note(kind, vm, fields, max(0.0, when - self.started))

    def _note(self, kind: str, vm: str | None, fields: Record, t: float | None) -> None:
        record = Span(None, kind, vm, {n: _cut(v) for n, v in fields.items()})
        self._add(record, t=t)
        if self.listener is not None:
            self.listener(_plain(record))

    def begin(self, kind: str, vm: str | None, fields: Record) -> Span:
        """Record the beginning of what takes time."""
        cut = {name: _cut(value) for name, value in fields.items()}
        span = Span(self, kind, vm, cut)
        self._add(span, is_open=True)
        return span

    def _add(
        self, record: Span, *, is_open: bool = False, t: float | None = None
    ) -> None:
        record.size = _OVERHEAD + _length(record.fields)
        with self._lock:
            record.t = self.time() if t is None else min(t, self.time())
            record.number = next(self._numbers)
            if is_open:
                self._open[record.number] = record
            self._rings.setdefault(record.kind, _Ring()).add(record)

    def complete(self, span: Span, fields: Record, *, ended: bool = True) -> None:
        """See `Span.update` and `Span.end`."""
        cut = {name: _cut(value) for name, value in fields.items()}
        with self._lock:
            if span.duration is not None:
                return
            span.fields.update(cut)
            if span.is_kept:
                grown = _OVERHEAD + _length(span.fields) - span.size
                span.size += grown
                self._rings[span.kind].characters += grown
            if ended:
                span.duration = self.time() - span.t
                del self._open[span.number]
        if ended and self.listener is not None:
            self.listener(_plain(span))

    def lines(self, kind: str, vm: str, text: bytes) -> bytes:
        """Record whole lines of what a guest says; return the rest."""
        *whole, rest = text.split(b"\n")
        if len(rest) > _LONGEST_LINE:
            whole.append(rest)
            rest = b""
        if (dropped := len(whole) - _MOST_LINES) > 0:
            with self._lock:
                self._rings.setdefault(kind, _Ring()).dropped += dropped
        for line in whole[-_MOST_LINES:]:
            if said := line[:_LONGEST_LINE].rstrip(b"\r"):
                self.note(kind, vm, {"line": said.decode("utf-8", "backslashreplace")})
        return rest

    def open(self) -> list[Record]:
        """Return what has begun and not ended, in order; its duration is None."""
        with self._lock:
            spans = [_copy(span) for span in self._open.values()]
        return [_plain(span) for span in spans]

    @property
    def dropped(self) -> int:
        """How many records were dropped to keep the bounds."""
        with self._lock:
            return sum(ring.dropped for ring in self._rings.values())

    def records(self, *kinds: str) -> list[Record]:
        """Return what was recorded so far, in order, with texts safe to show.

        :param kinds: only of these; without any, all.
        """
        with self._lock:
            spans = [
                _copy(span)
                for kind, ring in self._rings.items()
                for span in ring.records
                if kind in kinds or not kinds
            ]
        spans.sort(key=lambda span: (span.t, span.number))
        return [_plain(span) for span in spans]


def _copy(span: Span) -> Span:
    """Return a span as it is now, which others complete."""
    copy = Span(None, span.kind, span.vm, dict(span.fields))
    copy.t, copy.number, copy.duration = span.t, span.number, span.duration
    copy.is_span = span.is_span
    return copy


def _plain(span: Span) -> Record:
    record: Record = {"t": round(span.t, 6), "kind": span.kind, "vm": _safe(span.vm)}
    if span.is_span:
        took = span.duration
        record["duration"] = None if took is None else round(took, 6)
    record |= {name: _safe(value) for name, value in span.fields.items()}
    if isinstance(where := record.get("where"), str) and (text := source(where)):
        record["source"] = _safe(text)
    return record


def _cut(value: Value) -> Value:
    """Return a value with no more text and no more entries than may be kept."""
    match value:
        case str():
            return value[:_LONGEST_TEXT]
        case list():
            return [_cut(entry) for entry in value[:_MOST_ENTRIES]]
        case dict():
            entries = itertools.islice(value.items(), _MOST_ENTRIES)
            return {name[:_LONGEST_TEXT]: _cut(entry) for name, entry in entries}
    return value


def _length(value: Value) -> int:
    """Return how many characters a value has, about."""
    match value:
        case str():
            return len(value)
        case list():
            return sum(map(_length, value))
        case dict():
            return sum(len(name) + _length(entry) for name, entry in value.items())
    return 8


def _safe(value: Value) -> Value:
    match value:
        case str():
            return safe_text(value, lines=True, limit=None)
        case float() if not math.isfinite(value):
            return None  # JSON has no such number
        case list():
            return [_safe(entry) for entry in value]
        case dict():
            return {_key(name): _safe(entry) for name, entry in value.items()}
    return value


def _key(name: str) -> str:
    return safe_text(name, limit=None)


_Recorder = TypeVar("_Recorder", bound=Recorder | None)
_current: Recorder | None = None
#: Whether commands that this task begins are the harness's own.
_unrecorded: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "unrecorded", default=False
)


def current() -> Recorder | None:
    """Return the recorder of the test that runs, None if it is not recorded."""
    return _current


@contextlib.contextmanager
def recording(recorder: _Recorder) -> Iterator[_Recorder]:
    """Have all reported to a recorder, or to None, until the context ends."""
    global _current  # noqa: PLW0603 - one test at a time runs in a process
    before, _current = _current, recorder
    try:
        yield recorder
    finally:
        _current = before


def note(kind: str, vm: str | None = None, **fields: Value) -> None:
    """Report that something happened.

    :param kind: of the table in docs/timeline.md, as for the fields.
    :param vm: name of the VM that it happened to; None for none.
    """
    if _current is not None:
        _current.note(kind, vm, fields)


def begin(kind: str, vm: str | None = None, **fields: Value) -> Span:
    """Report that something begins, and return what is told its end."""
    if _current is None:
        return _UNWANTED
    return _current.begin(kind, vm, fields)


def command(kind: str, vm: str | None, **fields: Value) -> Span:
    """Do as `begin`, and tell which line of the test asked for it."""
    if _current is None or _unrecorded.get():
        return _UNWANTED
    return _current.begin(kind, vm, {**fields, "where": caller()})


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Have no commands recorded that this task begins in here: no test asked for them.

    Others of the harness, such as the services that a start needs, are recorded.
    """
    token = _unrecorded.set(True)
    try:
        yield
    finally:
        _unrecorded.reset(token)


def lines(kind: str, vm: str, text: bytes) -> bytes:
    """Report what a guest says, and return what is not a whole line yet."""
    return b"" if _current is None else _current.lines(kind, vm, text)


def follows_logs() -> bool:
    """Return whether what guests log is wanted as it comes."""
    return _current is not None and _current.follow_logs


def wants_events() -> bool:
    """Return whether events of the core are wanted."""
    return _current is not None and _current.events
