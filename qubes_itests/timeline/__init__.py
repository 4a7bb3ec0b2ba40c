"""The timeline of a test: what happened to its VMs, when, and who asked for it."""

from qubes_itests.timeline.caller import (
    called_by_guest,
    called_here,
    is_machinery,
    line_of,
    raised_at,
)
from qubes_itests.timeline.recorder import (
    Record,
    Recorder,
    Span,
    Value,
    begin,
    command,
    current,
    follows_logs,
    lines,
    note,
    recording,
    unrecorded,
    wants_events,
)

__all__ = [
    "Record",
    "Recorder",
    "Span",
    "Value",
    "begin",
    "called_by_guest",
    "called_here",
    "command",
    "current",
    "follows_logs",
    "is_machinery",
    "line_of",
    "lines",
    "note",
    "raised_at",
    "recording",
    "unrecorded",
    "wants_events",
]
