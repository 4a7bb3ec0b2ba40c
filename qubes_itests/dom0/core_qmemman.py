"""The qmemman of a core under test: its own daemon, on memory of ours."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from qubes_itests.dom0.xen_server import XenServer
from qubes_itests.exc import HarnessError
from qubes_itests.host.confined import FOLLOW_US
from qubes_itests.qmemman.policy import DEFAULT_POLICY
from qubes_itests.qmemman.state import DomainMemory, MachineMemory
from qubes_itests.untrusted_text import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qubes_itests.dom0.xen import Xen
    from qubes_itests.dom0.xen_server import Clock
    from qubes_itests.qmemman.contract import DomainReading
    from qubes_itests.qmemman.timeline import Recorder

__all__ = ["CoreQmemman"]

log = logging.getLogger("qubes_itests.dom0")

_PROGRAM: Final = "qubes_itests.dom0.qmemmand"
_CONFIG: Final = Path("/etc/qubes/qmemman.conf")
#: Of what a daemon that has ended said last, so many characters are shown.
_SHOWN: Final = 2000
#: Seconds of real time until a daemon serves, or for all that it does in virtual time:
#: then it ends by itself, and says where its threads were.
_LONGEST = 120.0


class CoreQmemman(MachineMemory):
    """Runs the daemon, and shows what it sees; an asynchronous context manager.

    What domains hold is as the machine has it; the rest is what the daemon says.

    :param xen: where its calls go.
    :param directory: an existing one with a short path, for its sockets and its log.
    :param socket: of qmemman; by default one in the directory.
    :param recorder: gets a record whenever it has set targets.
    :param clock: its time; None for real time.
    """

    def __init__(
        self,
        xen: Xen,
        directory: Path,
        socket: Path | None = None,
        recorder: Recorder | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        self.socket = socket or directory / "qmemman.sock"
        self.server = XenServer(xen, directory / "xen.sock", self._on_state, clock)
        #: Done when it has ended by itself.
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._xen = xen
        self._recorder = recorder
        self._virtual = clock is not None
        self._directory = directory
        self._log = directory / "qmemman.log"
        #: What the daemon said last of domains, by number.
        self._said: Mapping[str, Mapping[str, Any]] = {}
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start it, and wait until it serves.

        :raise HarnessError: it ends instead; with what it said.
        """
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.server)
            self._start(stack)
            ready = asyncio.ensure_future(self.server.ready.wait())
            stack.callback(ready.cancel)
            both: list[asyncio.Future[Any]] = [ready, self.ended]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            self.check()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """End it."""
        await self._stack.aclose()

    def _start(self, stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> None:
        words = [
            *(self._directory / "xen.sock", self.socket),
            # of a simulation, what this machine has is no part
            self._directory / "available" if self._virtual else "",
            self._directory / "none" if self._virtual else _CONFIG,
            "virtual" if self._virtual else "real",
            f"{_LONGEST}",
        ]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                [*FOLLOW_US, sys.executable, "-P", "-m", _PROGRAM, *words],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        stack.callback(process.wait)
        stack.callback(process.kill)
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(process.pid)
        stack.callback(os.close, descriptor)
        loop.add_reader(descriptor, self._on_end, descriptor)
        stack.callback(loop.remove_reader, descriptor)

    def _on_end(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        self.ended.set_result(None)
        if not self._virtual:
            log.warning("%s", self._why())

    def check(self) -> None:
        """Raise HarnessError if it has ended."""
        if self.ended.done():
            raise HarnessError(self._why())

    def _why(self) -> str:
        said = self._log.read_text(errors="replace")[-_SHOWN:]
        return f"the qmemman of the core has ended:\n{quoted(said)}"

    def preferred(self, domain: DomainMemory) -> int | None:
        """Return what the algorithm of the core says that a domain should hold."""
        preferred: int | None = self._said.get(domain.domid, {}).get("preferred")
        return preferred

    async def look(self, event: str = "look", amount: int = 0) -> None:
        """Read the machine, and record what there is.

        :param event: of the record; one with targets that have changed since the last
            is a ``balance``.
        :param amount: that a starting VM has asked for, bytes.
        """
        reading = await self._xen.memory.read()
        before = self.domains
        self.total = reading.total
        self.names = {domain.domid: domain.name for domain in reading.domains}
        self.domains = {domain.domid: self._state(domain) for domain in reading.domains}
        assignable = int(reading.free * DEFAULT_POLICY.overhead_factor)
        promised = sum(max(0, d.last_target - d.current) for d in self.domains.values())
        self.free = assignable - promised
        targets = [
            (domid, domain.last_target)
            for domid, domain in self.domains.items()
            if domid in before and domain.last_target != before[domid].last_target
        ]
        if self._recorder is not None:
            event = "balance" if targets and event == "look" else event
            self._recorder.record(self, event, targets, amount)

    def _state(self, reading: DomainReading) -> DomainMemory:
        said = self._said.get(reading.domid, {})
        target = said.get("last_target", 0)
        return DomainMemory(
            domid=reading.domid,
            used=said.get("mem_used"),
            actual=max(reading.current, target),
            current=reading.current,
            maximum=said.get("maximum", 0),
            last_target=target,
            no_progress=said.get("no_progress", False),
            slow_memset_react=said.get("slow_memset_react", False),
            paused=reading.paused,
            balanced=reading.balanced,
        )

    async def _on_state(self, said: Mapping[str, Mapping[str, Any]]) -> None:
        if said != self._said:
            self._said = said
            await self.look()
