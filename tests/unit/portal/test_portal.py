"""The portal: a loop in a thread of its own, used from threads that block."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
import unittest.mock

import pytest

from qubes_itests.exc import DeadlineError
from qubes_itests.portal import (
    Portal,
    PortalError,
)


@pytest.fixture
def portal():
    with Portal() as portal:
        yield portal


async def answer(value=42):
    await asyncio.sleep(0)
    return value


def test_run_returns_and_raises(portal):
    async def fail():
        await asyncio.sleep(0)
        raise KeyError("which")

    assert portal.run(answer()) == 42
    with pytest.raises(KeyError, match="which"):
        portal.run(fail())


def test_many_threads_at_once(portal):
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(portal.run(answer(n))))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert sorted(results) == list(range(20))


def test_own_thread_is_refused_not_deadlocked(portal):
    """A synchronous call from inside a coroutine raises, and closes its coroutine."""

    async def wrong():
        portal.run(answer())

    async def wrong_too():
        portal.facade.run_until_complete(answer())

    for coroutine in (wrong, wrong_too):
        with pytest.raises(PortalError, match="own thread"):
            portal.run(coroutine(), timeout=300)


def test_deadline_cancels_and_shows_where_it_stood(portal):
    cancelled = threading.Event()

    async def endless():
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(DeadlineError, match="endless") as info:
        portal.run(endless(), timeout=0.05)
    assert cancelled.is_set()
    assert "in endless" in info.value.evidence


def test_timeout_of_the_coroutine_is_its_own(portal):
    async def impatient():
        await asyncio.wait_for(asyncio.Event().wait(), 0.01)

    with pytest.raises(TimeoutError) as info:
        portal.run(impatient(), timeout=300)
    assert not isinstance(info.value, DeadlineError)


def test_interrupt_cancels_the_coroutine(portal):
    """Ctrl-C while a test waits ends the coroutine too, before it is raised."""
    cancelled = threading.Event()

    async def endless():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        portal.run(endless())
    assert cancelled.is_set()


def test_background_goes_on_while_the_test_blocks(portal):
    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0.005)

    async def start():
        return asyncio.create_task(tick())

    task = portal.run(start())
    deadline = time.monotonic() + 300
    while len(ticks) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)  # a test that blocks, which is the point
    task.cancel()
    assert len(ticks) >= 5


def test_what_a_thread_schedules_waits_for_it(portal):
    """As with a loop that stands still: nothing starts before the thread waits."""
    ran = []
    portal.facade.call_soon(ran.append, "kept")
    portal.facade.call_soon(ran.append, "cancelled").cancel()
    portal.call(lambda: None)
    assert ran == []
    portal.run(answer())
    assert ran == ["kept"]


def test_facade_runs_coroutines_tasks_and_futures(portal):
    loop = portal.facade
    assert isinstance(loop, asyncio.AbstractEventLoop)
    assert not loop.is_running()
    assert not loop.is_closed()
    assert loop.run_until_complete(answer(1)) == 1
    assert loop.run_until_complete(loop.create_task(answer(2))) == 2
    future = loop.create_future()
    loop.call_later(0.01, future.set_result, 3)
    assert loop.run_until_complete(future) == 3
    assert loop.run_until_complete(loop.run_in_executor(None, lambda: 4)) == 4


def test_future_set_from_the_test_wakes_the_loop(portal):
    """A future made and set in the test's thread is seen by a coroutine at once."""
    loop = portal.facade
    future = loop.create_future()

    async def wait_for_it():
        return await future

    task = loop.create_task(wait_for_it())
    future.set_result("here")
    assert portal.run(asyncio.wait_for(task, 300)) == "here"


def test_module_functions_use_the_current_loop(portal):
    with portal.as_current_loop() as loop:
        assert asyncio.get_event_loop() is loop
        gathered = asyncio.gather(answer(1), answer(2))
        assert loop.run_until_complete(gathered) == [1, 2]
        assert loop.run_until_complete(asyncio.ensure_future(answer())) == 42
        assert loop.run_until_complete(asyncio.wait_for(answer(5), 300)) == 5


def test_subprocess_from_the_facade(portal):
    async def echo():
        process = await asyncio.create_subprocess_exec(
            "echo", "hello", stdout=asyncio.subprocess.PIPE
        )
        return await process.communicate()

    assert portal.facade.run_until_complete(echo()) == (b"hello\n", None)


@pytest.mark.parametrize("name", ["run_forever", "stop", "close"])
def test_what_would_break_the_loop_is_refused(portal, name):
    with pytest.raises(PortalError, match=f"loop.{name}"):
        getattr(portal.facade, name)()
    assert portal.run(answer()) == 42


def test_signal_handlers_are_refused(portal):
    with pytest.raises(PortalError, match=r"signal\.signal"):
        portal.facade.add_signal_handler(signal.SIGUSR1, print)


def test_only_awaitables_of_this_loop(portal):
    with pytest.raises(TypeError, match="needs a coroutine"):
        portal.facade.run_until_complete(answer)
    other = asyncio.new_event_loop()
    with pytest.raises(ValueError, match="another event loop"):
        portal.facade.run_until_complete(other.create_future())
    other.close()


def test_cancelled_task_raises_cancelled_error(portal):
    task = portal.facade.create_task(asyncio.Event().wait())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        portal.facade.run_until_complete(task)


def test_failures_of_the_background_are_recorded(portal):
    def stumble():
        raise ArithmeticError("in a callback")

    portal.facade.call_soon(stumble)
    portal.run(answer())
    (failure,) = portal.take_failures()
    assert isinstance(failure.exception, ArithmeticError)
    assert "in a callback" in str(failure)
    assert portal.take_failures() == []


def test_outside_its_context_it_says_so():
    portal = Portal()
    with pytest.raises(PortalError, match="with Portal"):
        portal.run(answer())
    with portal:
        pass
    with pytest.raises(PortalError):
        portal.facade.run_until_complete(answer())
    portal.close()


def test_tasks_that_another_thread_has_made_are_seen(portal):
    task = portal.facade.create_task(asyncio.sleep(600))
    assert task in portal.call(portal.loop.all_tasks)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        portal.facade.run_until_complete(task)
    assert task not in portal.call(portal.loop.all_tasks)


def test_tasks_in_the_background_are_known(portal):
    """And so are those that they make; those of others are not."""
    inner, ended = [], asyncio.Event()

    async def work():
        inner.append(asyncio.ensure_future(ended.wait()))
        await inner[0]

    task = portal.call(lambda: portal.loop.in_background(work()))
    other = portal.facade.create_task(asyncio.sleep(600))
    portal.run(asyncio.sleep(0))
    assert set(portal.loop.background) == {task, *inner}
    assert {task, other, *inner} <= portal.call(portal.loop.all_tasks)
    portal.call(ended.set)
    portal.facade.run_until_complete(task)
    other.cancel()


def test_leaving_cancels_what_runs_and_ends_the_thread():
    ended = threading.Event()

    async def endless():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    before = threading.active_count()
    with Portal() as portal:
        portal.facade.create_task(endless())
    assert ended.is_set()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "name", ["ensure_future", "isfuture", "Handle", "Task", "wait"]
)
def test_a_test_may_replace_what_asyncio_has(portal, name):
    """The portal waits for what it was given, and does not hang."""
    with unittest.mock.patch(f"asyncio.{name}"):
        assert portal.facade.run_until_complete(answer()) == 42
        portal.facade.call_soon(int)
        assert portal.run(answer(), timeout=300) == 42
