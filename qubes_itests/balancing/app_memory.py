"""qmemman for one app: the daemon, its socket and its timeline, for a while."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, Generic, Self, TypeVar

from qubes_itests.exc import DeadlineError
from qubes_itests.qmemman import plot, timeline
from qubes_itests.qmemman.balancer import Balancer
from qubes_itests.qmemman.budget import MemoryBudget
from qubes_itests.qmemman.client import Client
from qubes_itests.qmemman.contract import MemoryBackend
from qubes_itests.qmemman.exc import TimelineError
from qubes_itests.qmemman.policy import DEFAULT_POLICY, Policy
from qubes_itests.qmemman.server import Server
from qubes_itests.qmemman.sizes import MIB, mib
from qubes_itests.qmemman.timeline import TIMELINE, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType

    from qubes_itests.core.app import Qubes
    from qubes_itests.hypervisor.contract import Domain
    from qubes_itests.qmemman.state import DomainMemory

__all__ = ["AppMemory", "counts", "machine", "timeline_files"]

AnyBackend = TypeVar("AnyBackend", bound=MemoryBackend)

_SOCKET: Final = "qmemman.sock"
_LOOK: Final = 0.02
#: Seconds: others may start before, one after the other, and make saved states first.
_ANSWER: Final = 240.0

#: MiB that a dom0 with a desktop uses, and the most that it boots with.
_DOM0_USES: Final = 1024
_DOM0_BOOTS_WITH: Final = 4096


def machine(size: int) -> MemoryBudget:
    """Return a machine with a dom0 as people have it.

    dom0 boots with 4 GiB, or all that there is, and uses 1 GiB of it.

    :param size: MiB of the whole machine.
    :raise HarnessError: when dom0 does not fit.
    """
    return MemoryBudget(
        total=size * MIB,
        dom0=min(size, _DOM0_BOOTS_WITH) * MIB,
        dom0_used=_DOM0_USES * MIB,
    )


def counts(app: Qubes) -> Callable[[Domain], bool]:
    """Return what tells the domains of an app's VMs from all others.

    Others are those of other apps on the same hypervisor, and the ones without a VM
    that warm starts are made with, whose directories are deeper.
    """
    return lambda domain: domain.spec.directory.parent == app.directory / "vms"


class AppMemory(Generic[AnyBackend]):
    """Balances the memory of an app's VMs, as long as it is entered.

    An async context manager.  Socket and timeline are in the app's directory; the
    starts of its VMs ask for memory meanwhile.

    :param app: whose VMs take part.
    :param backend: the machine that they are on, open.
    :param policy: the numbers to go by.
    """

    def __init__(
        self, app: Qubes, backend: AnyBackend, policy: Policy = DEFAULT_POLICY
    ) -> None:
        self.backend = backend
        #: What the starts of VMs ask.
        self.client = Client(app.directory / _SOCKET, timeout=_ANSWER)
        #: The file that every decision goes to; it outlasts the balancing.
        self.timeline: Path = app.directory / TIMELINE
        self.balancer: Balancer
        self.recorder: Recorder
        self._app = app
        self._policy = policy
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Begin.

        :raise HarnessError: when the machine cannot hold its dom0.
        """
        clock = asyncio.get_running_loop().time
        async with contextlib.AsyncExitStack() as stack:
            self.recorder = Recorder(self.timeline, clock)
            stack.callback(self.recorder.close)
            self.balancer = Balancer(self.backend, self._policy, recorder=self.recorder)
            server = Server(self.balancer, self.client.path)
            await stack.enter_async_context(server)
            # Last in and so first out: a start that asked after the daemon's end would
            # find no socket, and fail.
            stack.callback(setattr, self._app, "qmemman", self._app.qmemman)
            self._app.qmemman = self.client
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let starts go without asking again, and end the daemon."""
        await self._stack.aclose()

    def domains(self) -> Mapping[str, DomainMemory]:
        """Return what is known of each domain's memory, by name; ``dom0`` too."""
        names = self.balancer.names
        return {names.get(d, d): state for d, state in self.balancer.domains.items()}

    async def until(
        self, what: str, condition: Callable[[], bool], timeout: float
    ) -> float:
        """Wait until a condition holds.

        :param what: is waited for, as the error says it.
        :param condition: is called again and again on the event loop.
        :param timeout: seconds.
        :return: how many seconds it took.
        :raise DeadlineError: when it does not; it shows what all domains have.
        """
        clock = asyncio.get_running_loop().time
        start = clock()
        while not condition():
            if clock() - start > timeout:
                raise DeadlineError(what, timeout, self.describe())
            await asyncio.sleep(_LOOK)
        return clock() - start

    def describe(self) -> str:
        """Return who has what, for people: a line for each domain."""
        lines = [f"free {mib(self.balancer.free)}"]
        for name, state in self.domains().items():
            used = "an unknown amount" if state.used is None else mib(state.used)
            marks = {
                "no_progress": state.no_progress,
                "slow_memset_react": state.slow_memset_react,
                "paused": state.paused,
            }
            lines.append(
                f"{name}: uses {used}, holds {mib(state.current)},"
                f" target {mib(state.last_target)}"
                + "".join(f", {mark}" for mark, is_set in marks.items() if is_set)
            )
        return "\n".join(lines)


def timeline_files(directory: Path, limit: int) -> dict[str, bytes]:
    """Return a directory's timeline of memory and its picture, by their file names.

    Nothing where there is no timeline, or one that cannot be read.

    :param limit: bytes of the timeline's end that count.
    """
    path, files = directory / TIMELINE, dict[str, bytes]()
    with contextlib.suppress(OSError, TimelineError):
        files[path.name] = timeline.tail(path, limit)
        picture = plot.draw(timeline.read(path, limit))
        files[f"{path.stem}.svg"] = picture.encode()
    return files
