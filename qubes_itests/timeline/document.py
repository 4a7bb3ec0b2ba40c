"""The file ``timeline.jsonl``: a line about the test, and one for each record.

docs/timeline.md describes it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qubes_itests.timeline.recorder import Record

__all__ = ["FORMAT", "NAME", "VERSION", "Header", "dump", "load"]

#: The name of the file among a test's artefacts.
NAME: Final = "timeline.jsonl"
FORMAT: Final = "qubes_itests.timeline"
VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the first line says.

    :param test: the test's id.
    :param started: seconds since the epoch, to which all times of records are added.
    :param outcome: ``passed``, ``failed``, ``error``, ``skipped`` …; empty while it
        runs.
    :param duration: seconds, of set-up and tear-down too.
    :param dropped: how many records were dropped to keep the bounds.
    """

    test: str
    started: float
    outcome: str
    duration: float
    dropped: int = 0


def dump(header: Header, records: Iterable[Record]) -> bytes:
    """Return the file of a test's records, which are in order."""
    records = list(records)
    vms = sorted({str(record["vm"]) for record in records if record["vm"]})
    first = {"format": FORMAT, "version": VERSION, **asdict(header), "vms": vms}
    lines = (json.dumps(line, separators=(",", ":")) for line in (first, *records))
    return "".join(f"{line}\n" for line in lines).encode()


def load(data: bytes) -> tuple[Header, list[Record]]:
    """Return what `dump` wrote; a last line that was not finished is left out.

    :raise ValueError: when it is something else.
    """
    try:
        first, *lines = data[: data.rindex(b"\n")].splitlines()
        values = json.loads(first)
        if values.pop("format") != FORMAT or values.pop("version") != VERSION:
            raise ValueError("another format, or another version of it")
        known = {name: values[name] for name in Header.__slots__}
        return Header(**known), [dict(json.loads(line)) for line in lines]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no timeline: {error!r}") from error
