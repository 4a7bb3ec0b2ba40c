"""Core dumps and errors that guests log, as failures of the test where that is asked.

What is looked for are the lines of journals and kernels in the timeline of the test: it
has those of VMs as well that have ended meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from typing import TYPE_CHECKING, Any, Final

import pytest

from qubes_itests.exc import HarnessError
from qubes_itests.pytest_plugin.collection import PluginNode
from qubes_itests.run.result import Prepared
from qubes_itests.run.settings import Complaint
from qubes_itests.testcase.outcomes import TimedTestCase
from qubes_itests.timeline import current
from qubes_itests.timeline.words import ERROR

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from qubes_itests.guest.link.journal import GuestJournal
    from qubes_itests.run.context import RunContext
    from qubes_itests.timeline import Record

__all__ = ["COMPLAINS", "GuestComplaints"]

#: The mark of a test in which guests log errors on purpose.
COMPLAINS: Final = "guest_complains"
#: What Linux (arch/x86: fault.c, traps.c; fs/coredump.c), systemd-coredump and systemd
#: say of a program that a signal has ended which dumps core.
_CORE: Final = re.compile(
    r"^kernel: (traps: )?\S.*\[\d+\]:? (segfault at|trap |general protection)"
    r"|^kernel: .*[Cc]ore dump to "
    r"|^systemd-coredump(\[\d+\])?: .*Process \d+ "
    r"|^systemd(\[\d+\])?: .* code=(dumped|killed), status="
    r"(3/QUIT|4/ILL|5/TRAP|6/ABRT|7/BUS|8/FPE|11/SEGV|24/XCPU|25/XFSZ|31/SYS)"
)
#: What the kernels and systems of bundled templates say at each boot.
_HARMLESS: Final = (r"^systemd(\[1\])?: Failed to find module 'autofs4'$",)
#: Seconds that guests have to log what they did so far.
_SETTLE: Final = 20.0
#: Lines that are told of one test.
_TOLD: Final = 10


class GuestComplaints:
    """A pytest plugin, inside of the one that keeps what failed tests leave.

    :param context: the run.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Check when the test is over and its VMs are there: before any tearDown."""
        node = item.getparent(PluginNode)
        own = Prepared.told().complaints.get(node.plugin.name if node else "", {})
        settings = self._context.settings
        kinds = {*settings.fail_on, *map(Complaint, own.get("fail_on", ()))}
        allowed = [*_HARMLESS, *settings.allow_line, *own.get("allow_line", ())]
        for mark in item.iter_markers(COMPLAINS):
            allowed += mark.args or [""]  # which is found in each line
        check = functools.partial(self._check, kinds, allowed)
        case = item.instance if isinstance(item, pytest.Function) else None
        if not kinds:
            return (yield)
        if isinstance(case, TimedTestCase):
            case.check = check
            return (yield)
        result = yield
        check()
        return result

    def _check(self, kinds: set[Complaint], allowed: Iterable[str]) -> None:
        __tracebackhide__ = True
        testbed, recorder = self._context.opened_testbed, current()
        if testbed is None or recorder is None:
            return
        testbed.portal.run(_settle(testbed.journals()))
        said = [
            f"VM {record['vm']}: {record['line']}"
            for record in recorder.records("journal")
            if any(_SAYS[kind](record) for kind in kinds)
            and not any(re.search(p, str(record["line"])) for p in allowed)
        ]
        if not said:
            return
        more = [f"and {len(said) - _TOLD} more lines"] if len(said) > _TOLD else []
        lines = "\n".join([*said[:_TOLD], *more])
        pytest.fail(
            f"a guest complained (--fail-on {' '.join(sorted(kinds))}): {lines}",
            pytrace=False,
        )


def _is_error(record: Record) -> bool:
    priority = record.get("priority")
    return isinstance(priority, int) and priority <= ERROR


_SAYS: Final[dict[Complaint, Callable[[Record], bool]]] = {
    Complaint.COREDUMP: lambda record: bool(_CORE.search(str(record["line"]))),
    Complaint.JOURNAL: _is_error,
}


async def _settle(journals: Iterable[GuestJournal]) -> None:
    """Wait until all is recorded that guests have logged."""

    async def settle(journal: GuestJournal) -> None:
        # one that does not answer is for others to tell
        with contextlib.suppress(HarnessError):
            await journal.settle(_SETTLE)

    await asyncio.gather(*map(settle, journals))
