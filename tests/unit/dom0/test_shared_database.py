"""What the agent of a guest says of block devices by itself, in dom0's database."""

import asyncio

import pytest
import pytest_asyncio

from qubes_itests.dom0.shared_database import SharedDatabase
from qubes_itests.dom0.stores import QubesDB

pytestmark = pytest.mark.asyncio

NAME = "/qubes-block-devices"


class Agent:
    """The part of an agent that says it."""

    def on_db_change(self, note):
        self.say = note


@pytest_asyncio.fixture
async def shared():
    database, agent = QubesDB(), Agent()
    SharedDatabase(database, agent, {})
    return database, agent.say


async def test_it_is_in_dom0_at_once_and_not_told_back(shared):
    database, say = shared
    passed = []
    database.pass_on = lambda path, value: passed.append((path, value))
    say(f"{NAME}/loop0/desc", "/tmp/a b")  # noqa: S108
    say(NAME, "")
    assert database.read(f"{NAME}/loop0/desc") == b"/tmp/a b"
    assert database.list(NAME) == [NAME, f"{NAME}/loop0/desc"]
    say(f"{NAME}/loop0/desc", None)
    say(f"{NAME}/loop1/desc", None)
    assert (database.list(NAME), passed) == ([NAME], [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/name", "other"),
        (f"{NAME}/loop0", ""),
        (f"{NAME}/../desc", ""),
        (f"{NAME}/loop0/desc/x", ""),
        (f"{NAME}/loop0/other", ""),
        (f"{NAME}/{'l' * 64}/desc", ""),
        (f"{NAME}/loop0/desc", "x" * 256),
    ],
)
async def test_nothing_else_is_taken(shared, path, value):
    database, say = shared
    say(path, value)
    assert database.list("/") == []


async def test_a_guest_does_not_fill_the_host(shared):
    database, say = shared
    for number in range(3000):
        say(f"{NAME}/d{number}/desc", "x")
    assert len(database.list("/")) == 1000
    say(f"{NAME}/d1/desc", "y")
    assert database.read(f"{NAME}/d1/desc") == b"y"
    await asyncio.sleep(0)
