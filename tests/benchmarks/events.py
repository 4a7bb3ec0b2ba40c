"""What firing an event costs: 50 handlers in a class, 5 of them matching.

The figures are of CPU time, which other work of the machine hardly changes.

Run: ``.venv/bin/python tests/benchmarks/events.py``
"""

from __future__ import annotations

import sys
import time
import timeit

from bench import heading, row

from qubes_itests.core.events import Emitter, handler

ROUNDS, CALLS = 15, 20_000


def _returning(*events):
    @handler(*events)
    def on_event(_subject, event, **_kwargs):
        return [event]

    return on_event


def _yielding(*events):
    @handler(*events)
    def on_event(_subject, event, **_kwargs):
        yield event

    return on_event


#: One of each kind that answers to ``property-set:memory``, and 45 that do not.
HANDLERS = {
    "any": _returning("*"),
    "of_property": _returning("property-*"),
    "of_set": _yielding("property-set:*"),
    "of_memory": _returning("property-set:memory"),
    "of_two": _yielding("property-set:memory", "property-reset:memory"),
    **{f"other{n}": _returning(f"domain-feature-set:{n}*") for n in range(45)},
}
Subject = type("Subject", (Emitter,), HANDLERS)


def microseconds(subject, event):
    """Return what one call takes, in each of several rounds."""
    subject.events_enabled = True
    timer = timeit.Timer(
        lambda: subject.fire_event(event, name="memory", newvalue=400),
        timer=time.process_time,
    )
    return [1e6 * timer.timeit(CALLS) / CALLS for _ in range(ROUNDS)]


def first_time(subject, number):
    """Return the seconds of an event that the class has not resolved yet."""
    return timeit.timeit(lambda: subject.fire_event(f"new:{number}"), number=1)


def main():
    """Measure and print."""
    heading("Firing an event on an object whose class has 50 handlers")
    subject = Subject()
    subject.events_enabled = True
    if len(subject.fire_event("property-set:memory")) != 5:
        sys.exit("not 5 handlers answer")
    row("5 match", microseconds(subject, "property-set:memory"), "us", "< 8 us")
    row("1 matches", microseconds(subject, "unheard-of"), "us")
    subject.add_handler("property-set:*", lambda *_, **__: None)
    six = microseconds(subject, "property-set:memory")
    row("5 match, and 1 of the object", six, "us")
    first = [1e6 * first_time(subject, number) for number in range(200)]
    row("a name never fired before", first, "us")


if __name__ == "__main__":
    main()
