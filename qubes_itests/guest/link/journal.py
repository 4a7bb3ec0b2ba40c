"""What a running guest logs, line by line, for the timeline of the test that runs.

systemd's journal; of a guest without it, if that is wanted, the kernel's log.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from typing import TYPE_CHECKING, Final, TypeAlias

from qubes_itests import timeline
from qubes_itests.guest.exc import GuestError
from qubes_itests.guest.link.frames import Channel
from qubes_itests.guest.link.process import answer_of

if TYPE_CHECKING:
    from qubes_itests.guest.link.agent import GuestAgent

__all__ = ["GuestJournal"]

#: Lines of the boot that come before all that follow. To read all costs as much as to
#: start journalctl, and most tests do not ask: the last tell how a start ended.
_LAST_LINES: Final = 50
_MOST_OF_A_BOOT: Final = 2000
#: journalctl leaves the text of a field out that has more than 4096 bytes.
_JOURNAL: Final = (
    "exec journalctl --boot --follow --lines={} --output=json"
    " --output-fields=MESSAGE,PRIORITY,SYSLOG_IDENTIFIER,_PID"
)
_KERNEL_LOG: Final = "exec cat /dev/kmsg"
_CHUNK: Final = 64 << 10
#: Bytes of a line of either.
_LONGEST: Final = 32 << 10
#: Lines of one entry that are recorded.
_MOST_LINES: Final = 20
#: Bytes a second that are read: a guest that logs all the time is slowed down, not us.
_RATE: Final = 512 << 10
#: As the kernel's documentation has it (ABI/testing/dev-kmsg).
_KMSG: Final = re.compile(r"([0-9]{1,10}),[0-9]+,[0-9]+,[^;]*;(.*)")
#: Of priorities; what is above is the facility.
_LEVELS: Final = 8
#: Have what a program wrote before in the journal, and the cores that are under way.
_SYNC: Final = (
    "for i in $(seq 50); do systemctl -q is-active 'systemd-coredump@*' || break;"
    " sleep 0.2; done; journalctl --sync"
)


class GuestJournal:
    """Follows the log of one guest until that goes away.

    :param agent: the guest's.
    :param init: as `Identity` has it.
    :param since: seconds since the epoch when its start began. A clock that says less
        was saved with the guest, or is wrong.
    """

    def __init__(self, agent: GuestAgent, init: str, since: float) -> None:
        self._agent = agent
        self._has_journald = init == "systemd"
        self._since = since
        #: What is waited for, by the mark that the guest is to log then.
        self._marks: dict[str, asyncio.Event] = {}
        self._task = asyncio.create_task(self._follow())

    async def settle(self, timeout: float) -> None:
        """Wait until all is recorded that the guest has logged so far.

        :param timeout: seconds; what has not come by then is not waited for.
        :raise DeadlineError: the guest does not answer.
        :raise GuestError: it went away.
        """
        mark, seen = secrets.token_hex(8), asyncio.Event()
        self._marks[mark] = seen
        write = f"echo '<7>qubes_itests {mark}' >/dev/kmsg"
        if self._has_journald:
            write = f"{_SYNC}; echo {mark} | systemd-cat --identifier=qubes_itests"
        try:
            with timeline.unrecorded():
                process = await self._agent.spawn(write, user="root")
            await answer_of(process, "settle its journal", timeout=timeout)
            waiting = asyncio.ensure_future(seen.wait())
            await asyncio.wait(
                [waiting, self._task],
                timeout=timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            waiting.cancel()
        finally:
            del self._marks[mark]

    async def _follow(self) -> None:
        command = _KERNEL_LOG
        if self._has_journald:
            recorder = timeline.current()
            whole = recorder is not None and recorder.whole_logs
            command = _JOURNAL.format(_MOST_OF_A_BOOT if whole else _LAST_LINES)
        rest = b""
        # the guest may go at any time, and that is no concern of who only listens
        try:
            with timeline.unrecorded():
                process = await self._agent.spawn(command, user="root")
            process.stdin.write_eof()
            process.drop(Channel.STDERR)
            while chunk := await process.stdout.read(_CHUNK):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._take(line)
                rest = rest if len(rest) <= _LONGEST else b""
                await asyncio.sleep(len(chunk) / _RATE)
        except GuestError:
            pass

    def _take(self, line: bytes) -> None:
        """Record a line as it came."""
        read = _entry if self._has_journald else _kernel_line
        if len(line) > _LONGEST or (said := read(line)) is None:
            return
        priority, source, message, when = said
        for mark, seen in self._marks.items():
            if mark in message:
                seen.set()
                return
        recorder = timeline.current()
        if recorder is None:
            return
        # of the guest's own clock only what can be
        when = min(max(when or time.time(), self._since), time.time())
        for text in message.split("\n")[:_MOST_LINES]:
            fields: timeline.Record = {"line": f"{source}: {text}"}
            fields["priority"] = priority
            recorder.note_at(when, "journal", self._agent.vm, fields)


#: What is logged: priority, who says it, what, and when if that is known.
_Said: TypeAlias = "tuple[int, str, str, float | None]"


def _entry(line: bytes) -> _Said | None:
    """Return an entry of the journal; None for what is none."""
    try:
        fields = json.loads(line)
        priority = int(fields.get("PRIORITY", 6))
        when = int(fields["__REALTIME_TIMESTAMP"]) / 1e6
    except (
        *(ValueError, KeyError, TypeError, AttributeError),
        *(OverflowError, RecursionError),
    ):
        return None
    name, pid = _text(fields.get("SYSLOG_IDENTIFIER")), _text(fields.get("_PID"))
    source = (name or "unknown") + (f"[{pid}]" if pid else "")
    return priority, source, _text(fields.get("MESSAGE")), when


def _text(value: object) -> str:
    """Return the text of a field of the journal: what is no text is a list of bytes."""
    if isinstance(value, list):
        try:
            return bytes(value).decode("utf-8", "backslashreplace")
        except (TypeError, ValueError):  # a field that an entry has more than once
            return ", ".join(_text(item) for item in value)
    return "" if value is None else str(value)


def _kernel_line(line: bytes) -> _Said | None:
    match = _KMSG.fullmatch(line.decode("utf-8", "backslashreplace"))
    return match and (int(match[1]) % _LEVELS, "kernel", match[2], None)
