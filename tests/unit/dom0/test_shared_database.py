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

    async def spawn(self, _command, *, user):
        assert user == "root"
        return self.process


class Process:
    """A program of the guest, and what happens before it ends."""

    vm = "work"

    def __init__(self, said, meanwhile):
        self.said, self.meanwhile = said, meanwhile

    async def communicate(self, _input, *, limit):
        self.meanwhile()
        assert len(self.said) < limit
        return self.said.encode(), b""

    async def wait(self):
        return 0

    def hang_up(self):
        pass

    kill = hang_up


@pytest_asyncio.fixture
async def shared():
    database, agent = QubesDB(), Agent()
    SharedDatabase(database, agent, {}, follow=print)
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


async def test_what_the_agent_says_counts_while_its_guest_says_what_it_had():
    database, agent = QubesDB(), Agent()
    shared = SharedDatabase(database, agent, {}, follow=print)
    a, b, c = (f"{NAME}/loop{number}/desc" for number in range(3))
    agent.say(a, "old")
    agent.say(b, "old")

    def meanwhile():
        agent.say(a, None)
        agent.say(c, "new")

    agent.process = Process(f"/x = 1\n{a} = old\n{b} = old\n", meanwhile)
    await shared.take_over()
    assert database.list("/") == [b, c, "/x"]
    agent.process = Process(f"{b} = old\n", lambda: None)
    await shared.take_over()
    assert database.list("/") == [b]


async def test_a_guest_does_not_fill_the_host(shared):
    database, say = shared
    for number in range(3000):
        say(f"{NAME}/d{number}/desc", "x")
    assert len(database.list("/")) == 1000
    say(f"{NAME}/d1/desc", "y")
    assert database.read(f"{NAME}/d1/desc") == b"y"
    await asyncio.sleep(0)
