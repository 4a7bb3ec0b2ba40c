"""Saves that are asked for at once are few, and each asker's change is in one."""

import asyncio

import pytest

from qubes_itests.core.store.saving import save


class App:
    """Has a state, and takes its time to save it."""

    def __init__(self):
        self.state = 0
        self.saved = []
        self.go_on = asyncio.Event()
        self.fails = False

    async def save_async(self):
        state = self.state
        await self.go_on.wait()
        if self.fails:
            raise OSError("no space")
        self.saved.append(state)


@pytest.mark.asyncio
async def test_who_asks_meanwhile_shares_the_next():
    app = App()
    asking = []
    for number in range(1, 6):
        app.state = number
        asking.append(asyncio.create_task(save(app)))
        # the first begins before the others ask
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not any(task.done() for task in asking)
    app.go_on.set()
    await asyncio.gather(*asking)
    assert app.saved == [1, 5]


@pytest.mark.asyncio
async def test_a_failure_is_told_to_all_and_the_next_one_is_tried():
    app = App()
    app.fails = True
    app.go_on.set()
    outcomes = await asyncio.gather(save(app), save(app), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [OSError] * 2
    app.fails = False
    await save(app)
    assert app.saved == [0]


@pytest.mark.asyncio
async def test_an_asker_that_goes_does_not_take_the_save_along():
    app = App()
    first, second = (asyncio.create_task(save(app)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    app.go_on.set()
    await second
    assert first.cancelled() or first.done()
    assert app.saved == [0]
