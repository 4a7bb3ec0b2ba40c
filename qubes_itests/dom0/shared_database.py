"""The database of a VM, in dom0 and in its guest: what one writes, the other has.

In Qubes OS a daemon of dom0 and one of the guest talk of each change. Here the guest is
told of what dom0 writes, and asked for what it has itself when that matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import HarnessError
from qubes_itests.guest.exc import GuestError
from qubes_itests.guest.link.process import answer_of
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qubes_itests.dom0.stores import QubesDB
    from qubes_itests.guest.link.agent import GuestAgent

__all__ = ["SharedDatabase", "read_entries"]

#: Seconds for a guest to say what it has.
_TIMEOUT: Final = 60.0
#: Of what it says in place of that, so many bytes are shown.
_SHOWN: Final = 500
#: Of all entries of a guest so many are kept.
_MOST: Final = 1000
_ENTRY: Final = re.compile(rb"(/[!-~]*) = (.*)", re.DOTALL)


def read_entries(said: bytes) -> dict[str, bytes]:
    """Return the entries that ``qubesdb-multiread`` has printed, by path.

    A line that begins none goes on with the value before: values may have several.
    """
    entries: dict[str, bytes] = {}
    path = None
    for line in said.removesuffix(b"\n").split(b"\n"):
        if (entry := _ENTRY.fullmatch(line)) is not None:
            path = entry[1].decode("ascii")
            entries[path] = entry[2]
        elif path is not None:
            entries[path] += b"\n" + line
    return entries


class SharedDatabase:
    """Keeps the two alike while a guest runs; made on the event loop.

    :param database: that of dom0.
    :param agent: of the guest.
    :param told: what the guest was given at its start.
    :param follow: called on the event loop with a path whose value the guest has from
        now on.
    """

    def __init__(
        self,
        database: QubesDB,
        agent: GuestAgent,
        told: Mapping[str, str],
        *,
        follow: Callable[[str], None],
    ) -> None:
        self._followed = follow
        self._database = database
        self._agent = agent
        #: What the guest is known to have: what it has besides, it has written.
        self._told = {path: value.encode() for path, value in told.items()}
        # Held from a change, or a question, to its answer: an entry that changes while
        # the guest says what it has would be taken for a change by the guest.
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        database.pass_on = self._pass_on
        agent.on_db_change(self._follow)
        # what dom0 has written since the start began
        now = database.texts()
        for path in now.keys() | told.keys():
            if now.get(path) != told.get(path):
                self._pass_on(path, now.get(path))

    def _pass_on(self, path: str, value: str | None) -> None:
        """Have the guest's follow: from any thread, without waiting."""
        asyncio.run_coroutine_threadsafe(self._change(path, value), self._loop)

    async def _change(self, path: str, value: str | None) -> None:
        # a guest that is ending hears of it no more
        with contextlib.suppress(HarnessError):
            async with self._lock:
                if value is None:
                    await self._agent.remove_db(path)
                    self._told.pop(path, None)
                else:
                    await self._agent.write_db(path, value)
                    self._told[path] = value.encode()
                    self._followed(path)

    def _follow(self, path: str, value: str | None) -> None:
        """Have dom0's follow what the agent says of block devices."""
        before = self._database.read(path)
        if value is None:
            self._told.pop(path, None)
            if before is not None:
                self._database.take_over(path, before, None)
        elif before is not None or len(self._told) < _MOST:
            self._told[path] = value.encode()
            self._database.take_over(path, before, self._told[path])

    async def take_over(self) -> None:
        """Have dom0's follow what the guest has written; what dom0 writes wins.

        :raise HarnessError: the guest does not say it, or has too much.
        """
        async with self._lock:
            told = dict(self._told)
            process = await self._agent.spawn("qubesdb-multiread -f /", user="root")
            answer = await answer_of(
                process, "say what is in its qubesdb", timeout=_TIMEOUT
            )
            if answer.status:
                said = safe_text(answer.stderr[-_SHOWN:])
                reason = f"it cannot say what is in its qubesdb: {said}"
                raise GuestError(process.vm, reason)
            has = read_entries(answer.stdout)
            # what its agent has said meanwhile is newer
            for path, _ in self._told.items() ^ told.items():
                has.pop(path, None)
                if path in self._told:
                    has[path] = self._told[path]
            for path in has.keys() | self._told.keys():
                before, value = self._told.get(path), has.get(path)
                if value != before:
                    self._database.take_over(path, before, value)
            self._told = has
