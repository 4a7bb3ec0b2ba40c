"""libvirt's timers on asyncio: no tasks, which would look like those of a test."""

import asyncio

from qubes_itests.hypervisor.event_loop import EventLoop


def test_a_timer_goes_off_until_it_is_stopped_and_is_no_task():
    async def scenario():
        events = EventLoop(asyncio.get_running_loop())
        gone_off, third = [], asyncio.Event()

        def go_off(timer, word):
            gone_off.append((timer, word, len(asyncio.all_tasks())))
            if len(gone_off) == 3:
                events._update_timeout(timer, -1)
                third.set()

        timer = events._add_timeout(-1, go_off, "opaque")
        events._update_timeout(timer, 0)
        async with asyncio.timeout(300):
            await third.wait()
        # turns enough for one that was not stopped
        for _ in range(10):
            await asyncio.sleep(0)
        assert gone_off == [(timer, "opaque", 1)] * 3

    asyncio.run(scenario())


def test_timers_go_on_on_another_loop():
    former = asyncio.new_event_loop()
    events = EventLoop(former)
    gone_off = asyncio.Event()
    timer = events._add_timeout(60_000, lambda *_: gone_off.set(), None)
    former.run_until_complete(asyncio.sleep(0))
    former.close()

    async def scenario():
        events.move(asyncio.get_running_loop())
        events._update_timeout(timer, 0)
        async with asyncio.timeout(300):
            await gone_off.wait()
        events._update_timeout(timer, -1)

    asyncio.run(scenario())
