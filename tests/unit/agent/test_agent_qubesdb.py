"""The VM's database: the host writes it, the guest's programs read it."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

import pytest
from agent_wire import DB_REMOVE, DB_WRITE, Wire, strings

if TYPE_CHECKING:
    from agent_process import AgentProcess


def query(agent: AgentProcess, name: str, *arguments: str) -> tuple[int, str]:
    with agent.client(name, *arguments) as client:
        return_output = client.communicate(timeout=300)[0].decode()
        return client.returncode, return_output


def test_written_entries_can_be_read(wire: Wire, agent: AgentProcess) -> None:
    entries = {"/name": "work", "/qubes-vm-type": "AppVM", "/qubes-empty": ""}
    for path, value in entries.items():
        assert wire.control(DB_WRITE, strings(path, value)) is None
    assert query(agent, "qubesdb-read", "/name") == (0, "work\n")
    assert query(agent, "qubesdb-read", "-r", "/name") == (0, "work")
    assert query(agent, "qubesdb-read", "/qubes-empty") == (0, "\n")
    assert query(agent, "qubesdb-list", "/qubes-") == (0, "empty\nvm-type\n")
    assert query(agent, "qubesdb-list", "-f", "/qubes-") == (
        0,
        "/qubes-empty\n/qubes-vm-type\n",
    )
    assert query(agent, "qubesdb-multiread", "/qubes-") == (
        0,
        "empty = \nvm-type = AppVM\n",
    )


def test_entry_can_be_changed_and_removed(wire: Wire, agent: AgentProcess) -> None:
    wire.control(DB_WRITE, strings("/a", "1"))
    wire.control(DB_WRITE, strings("/b", "2"))
    wire.control(DB_WRITE, strings("/a", "3"))
    assert query(agent, "qubesdb-read", "/a") == (0, "3\n")
    assert wire.control(DB_REMOVE, strings("/a")) is None
    assert query(agent, "qubesdb-read", "/a") == (1, "")
    assert query(agent, "qubesdb-list", "/") == (0, "b\n")


@pytest.mark.parametrize(
    "request_strings", [["name", "x"], ["", "x"], ["/" + "x" * 300, "x"], []]
)
def test_bad_entries_are_refused(wire: Wire, request_strings: list[str]) -> None:
    assert wire.control(DB_WRITE, strings(*request_strings))


def test_wrong_usage_is_told(agent: AgentProcess) -> None:
    assert query(agent, "qubesdb-read")[0] == 2
    assert query(agent, "qubesdb-read", "/name")[0] == 1
    assert query(agent, "qubesdb-nonsense", "/name")[0] == 2


def test_guest_changes_entries_of_its_own(wire: Wire, agent: AgentProcess) -> None:
    wire.control(DB_WRITE, strings("/a/x", "host"))
    assert query(agent, "qubesdb-write", "/a/x", "1", "/a/y", "2", "/b", "") == (0, "")
    assert query(agent, "qubesdb-multiread", "/") == (0, "a/x = 1\na/y = 2\nb = \n")
    wire.control(DB_WRITE, strings("/b", "host again"))
    assert query(agent, "qubesdb-read", "/b") == (0, "host again\n")
    assert query(agent, "qubesdb-rm", "/b") == (0, "")
    assert query(agent, "qubesdb-rm", "/b") == (1, "")
    assert query(agent, "qubesdb-rm", "/a/") == (0, "")
    assert query(agent, "qubesdb-list", "/") == (0, "")


def test_what_is_in_the_way_of_an_entry_is_not_followed(
    wire: Wire, agent: AgentProcess
) -> None:
    """Users may write to the database: the agent, which is root, follows no link."""
    wire.control(DB_WRITE, strings("/a", "1"))
    victim = agent.root / "victim"
    victim.write_text("as it was")
    place = agent.root / "run/qubes/db"
    assert place.stat().st_mode & 0o777 == 0o777
    (place / f".new-{agent.process.pid}").symlink_to(victim)
    (place / "!b").symlink_to(victim)
    for path in ("/a", "/b"):
        assert wire.control(DB_WRITE, strings(path, "2")) is None
        assert query(agent, "qubesdb-read", path) == (0, "2\n")
    assert victim.read_text() == "as it was"


def test_changes_are_told_to_who_watches(wire: Wire, agent: AgentProcess) -> None:
    wire.control(DB_WRITE, strings("/seen", "0"))
    with agent.client("qubesdb-watch", "-n", "4", "/seen", "/below/") as client:
        assert client.stdout
        # It watches from some moment on, and is to hear of few changes before it tells
        # the first: these are among the four.
        pause = 0.05
        while not select.select([client.stdout], [], [], pause)[0]:
            wire.control(DB_WRITE, strings("/seen", "1"))
            pause *= 2
        assert client.stdout.readline() == b"/seen\n"
        wire.control(DB_WRITE, strings("/other", "1"))
        wire.control(DB_WRITE, strings("/below/x", "1"))
        wire.control(DB_REMOVE, strings("/below/x"))
        wire.control(DB_REMOVE, strings("/seen"))
        told = client.communicate(timeout=300)[0].replace(b"/seen\n", b"").split()
        assert (told, client.returncode) == ([b"/below/x"] * 2, 0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("qubesdb-write", []),
        ("qubesdb-write", ["/a"]),
        ("qubesdb-rm", []),
        ("qubesdb-watch", []),
        ("qubesdb-read", ["-n", "1", "/a"]),
    ],
)
def test_wrong_changes_are_told(
    agent: AgentProcess, name: str, arguments: list[str]
) -> None:
    assert query(agent, name, *arguments)[0] == 2
