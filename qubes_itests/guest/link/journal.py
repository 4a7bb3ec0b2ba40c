"""What a running guest logs, line by line, for the timeline of the test that runs.

systemd's journal, or the kernel's log of a guest without it, followed where that is
wanted. Else journals are read when a test fails: to follow one takes 4 % of the CPU
time of a guest that lives for some seconds, and most tests pass.
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

#: Lines that are read of what was logged before.
_MOST_OF_BEFORE: Final = 1000
#: journalctl leaves the text of a field out that has more than 4096 bytes.
_JOURNAL: Final = (
    f"journalctl --boot --lines={_MOST_OF_BEFORE} --output=json"
    " --output-fields=MESSAGE,PRIORITY,SYSLOG_IDENTIFIER,_PID"
)
#: Bytes of what was logged before.
_MOST_BYTES: Final = 1 << 20
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
    """The log of one guest, followed until that goes away, or read once.

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
        self._following: asyncio.Task[None] | None = None

    def follow(self) -> None:
        """Record all from the boot on, and each line as it comes."""
        self._following = asyncio.create_task(self._follow())

    async def read(self, timeout: float) -> None:
        """Record the last lines of the journal, unless it is followed.

        :param timeout: seconds.
        :raise DeadlineError: the guest does not answer.
        :raise GuestError: it went away.
        """
        if self._following is not None or not self._has_journald:
            return
        command = f"{_JOURNAL} | tail -c {_MOST_BYTES}"
        process = await self._agent.spawn(command, user="root")
        what = "show its journal"
        answer = await answer_of(process, what, timeout=timeout, limit=_MOST_BYTES)
        for line in answer.stdout.split(b"\n"):
            self._take(line)

    async def settle(self, timeout: float) -> None:
        """Wait until all is recorded that a guest that is followed has logged so far.

        :param timeout: seconds; what has not come by then is not waited for.
        :raise DeadlineError: the guest does not answer.
        :raise GuestError: it went away.
        """
        if self._following is None:
            return
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
            try:
                await asyncio.wait(
                    [waiting, self._following],
                    timeout=timeout,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                waiting.cancel()
        finally:
            del self._marks[mark]

    async def _follow(self) -> None:
        command = f"exec {_JOURNAL} --follow" if self._has_journald else _KERNEL_LOG
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
        name, pid = _text(fields.get("SYSLOG_IDENTIFIER")), _text(fields.get("_PID"))
        message = _text(fields.get("MESSAGE"))
    except (
        *(ValueError, KeyError, TypeError, AttributeError),
        *(OverflowError, RecursionError),
    ):
        return None
    return priority, (name or "unknown") + (f"[{pid}]" if pid else ""), message, when


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
