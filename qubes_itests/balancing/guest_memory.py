"""Memory that a running guest uses, and gives back, on command."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.link.process import answer_of
from qubes_itests.qmemman.sizes import KIB, MIB, mib

if TYPE_CHECKING:
    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.link.process import GuestProcess

__all__ = ["GuestMemory"]

#: dd fills a buffer and blocks when it writes it out: nobody reads more than a byte,
#: which says that the buffer is full. It ends when the standard input does. The copy
#: of the pipe keeps it open in shells that replace themselves by their last command.
_HOLD: Final = (
    "exec 3<&0; dd if=/dev/zero bs={size} count=1 iflag=fullblock 2>/dev/null"
    " </dev/null | {{ exec 4<&0; head -c 1 | wc -c; cat <&3 >/dev/null; }}"
)
_AVAILABLE: Final = "grep MemAvailable: /proc/meminfo"
_KB: Final = re.compile(rb"MemAvailable:\s+([0-9]{1,13}) kB\n", re.ASCII)
_LONGEST_ANSWER: Final = 200

#: What is left to a guest when it takes memory, so that it never has to swap for it.
_LEFT: Final = 16 * MIB
#: Taking less than this in one go is not worth a process.
_LEAST: Final = 8 * MIB
_LOOK: Final = 0.1
#: Seconds that it takes at most to look how much there is.
_LOOK_TIMEOUT: Final = 30.0


class GuestMemory:
    """Memory that a guest uses beyond what it needs by itself.

    :param vm: a VM; it has to run when memory is used.
    """

    def __init__(self, vm: QubesVM) -> None:
        self._vm = vm
        self._holders: list[tuple[int, GuestProcess]] = []

    @property
    def size(self) -> int:
        """What is used, bytes."""
        return sum(size for size, _ in self._holders)

    async def use(self, size: int, *, timeout: float = 30.0) -> None:
        """Use so many bytes from now on; returns when the guest has touched them all.

        A guest that has not so much is given time to get it: it takes what it has, and
        waits for more.

        :param size: more or less than before.
        :param timeout: seconds.
        :raise DeadlineError: the guest has not got so much in time; it keeps what it
            has.
        :raise HarnessError: a part was lost, to an OOM kill for instance.
        """
        # those of an earlier run of the VM are gone with it
        self._holders = [h for h in self._holders if h[1].returncode is None]
        if size < self.size:
            await self.release()
        try:
            async with asyncio.timeout(timeout):
                while (missing := size - self.size) > 0:
                    await self._take(missing)
        except TimeoutError:
            raise DeadlineError(
                f"{mib(size)} in use by VM {self._vm.name}",
                timeout,
                f"it uses {mib(self.size)}",
            ) from None

    async def release(self, *, timeout: float = 10.0) -> None:
        """Use nothing; returns when the guest has all of it back.

        :param timeout: seconds.
        :raise DeadlineError: the guest is too busy.
        """
        processes = [process for _, process in self._holders]
        self._holders.clear()
        for process in processes:
            process.hang_up()
        try:
            async with asyncio.timeout(timeout):
                await asyncio.gather(*(p.wait() for p in processes))
        except TimeoutError:
            what = f"release of memory by VM {self._vm.name}"
            raise DeadlineError(what, timeout) from None

    async def _take(self, missing: int) -> None:
        """Take as much of what is missing as the guest has."""
        answer = await answer_of(
            await self._spawn(_AVAILABLE), "tell its free memory", timeout=_LOOK_TIMEOUT
        )
        found = _KB.fullmatch(answer.stdout)
        available = int(found[1]) * KIB if found else 0
        size = min(missing, available - _LEFT)
        if size < min(missing, _LEAST):
            await asyncio.sleep(_LOOK)
            return
        process = await self._spawn(_HOLD.format(size=size))
        held = False
        try:
            held = (await self._answer(process)).strip() == b"1"
        finally:
            if not held:
                process.hang_up()
        if not held:
            raise HarnessError(
                f"VM {self._vm.name} does not hold {mib(size)} that it used: see its"
                " console for an OOM kill"
            )
        self._holders.append((size, process))

    async def _spawn(self, command: str) -> GuestProcess:
        return await self._vm.running_agent().spawn(command, user="root")

    @staticmethod
    async def _answer(process: GuestProcess) -> bytes:
        line = b""
        while not line.endswith(b"\n") and len(line) < _LONGEST_ANSWER:
            part = await process.stdout.read(_LONGEST_ANSWER - len(line))
            if not part:
                break
            line += part
        return line
