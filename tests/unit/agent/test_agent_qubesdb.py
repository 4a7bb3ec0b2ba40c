"""The VM's database: the host writes it, the guest's programs read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from agent_wire import DB_REMOVE, DB_WRITE, Wire, strings

if TYPE_CHECKING:
    from agent_process import AgentProcess


def query(agent: AgentProcess, name: str, *arguments: str) -> tuple[int, str]:
    with agent.client(name, *arguments) as client:
        return_output = client.communicate(timeout=10)[0].decode()
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
