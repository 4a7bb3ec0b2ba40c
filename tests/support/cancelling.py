"""Coroutines that are cancelled at each point where they wait, one run for each."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable, Generator
from typing import Any

#: More points than any of our operations has: one that waits for ever ends there.
_MOST = 10_000


class _Cancelled(Awaitable[Any]):
    """Awaits something; its task is cancelled at the given waits, or right after.

    :param at: numbers of the waits.
    :param late: whether what was waited for has come by then, as when a client hangs up
        in the very moment.
    """

    def __init__(self, awaited: Awaitable[Any], at: range, *, late: bool) -> None:
        self._awaited = awaited
        self._at = at
        self._late = late
        self.waits = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        task, steps = asyncio.current_task(), self._awaited.__await__()
        assert task is not None
        step = functools.partial(next, steps)
        while True:
            try:
                waited_for = step()
            except StopIteration as end:
                return end.value
            number, self.waits = self.waits, self.waits + 1
            if number in self._at:
                if not self._late:
                    task.cancel()
                elif waited_for is None:  # sleep(0)
                    asyncio.get_running_loop().call_soon(task.cancel)
                else:
                    # before the callback that wakes the task up
                    waited_for.add_done_callback(lambda _done: task.cancel())
            try:
                yield waited_for
            except BaseException as error:  # noqa: BLE001 - handed on
                step = functools.partial(steps.throw, error)
            else:
                step = functools.partial(next, steps)


async def cancelled_everywhere(
    make: Callable[[], Awaitable[Any]], check: Callable[[], Awaitable[None]]
) -> int:
    """Run something again and again, cancelled at another of its waits each time.

    Once at each, once with a second cancellation right behind, and once when what was
    waited for has just come.

    :param make: returns what is to run.
    :param check: called after each run that was cancelled.
    :return: how often it was cancelled.
    """
    count = 0
    for length, late in ((1, False), (2, False), (1, True)):
        for first in itertools.count():
            assert first < _MOST
            run = _Cancelled(make(), range(first, first + length), late=late)
            task = asyncio.ensure_future(_awaited(run))
            await asyncio.wait([task])
            if run.waits <= first:
                task.result()
                break
            if task.cancelled():
                count += 1
            else:
                task.result()
            await check()
    return count


async def _awaited(run: _Cancelled) -> Any:
    return await run
