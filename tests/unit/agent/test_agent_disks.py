"""Whether a disk is there, as the host asks after it has plugged one in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from agent_wire import CLOCK, DISK, Wire, strings

if TYPE_CHECKING:
    from agent_process import AgentProcess


def test_disk_is_there_or_gone(wire: Wire, agent: AgentProcess) -> None:
    """Each answer is of that moment."""
    assert wire.control(DISK, strings("xvdi", "gone")) is None
    assert "not there" in (wire.control(DISK, strings("xvdi", "there")) or "")
    agent.file("dev/xvdi", "")
    assert wire.control(DISK, strings("xvdi", "there")) is None
    assert "still there" in (wire.control(DISK, strings("xvdi", "gone")) or "")
    assert "smaller" in (wire.control(DISK, strings("xvdi", "1")) or "")


@pytest.mark.parametrize(
    "question",
    [
        ("sda", "there"),
        ("xvd", "there"),
        ("xvd.", "there"),
        ("xvdi/", "there"),
        ("../x", "there"),
        ("xvdi", ""),
        ("xvdi", "12x"),
        ("xvdi",),
        (),
    ],
)
def test_other_questions_are_refused(wire: Wire, question: tuple[str, ...]) -> None:
    assert wire.control(DISK, strings(*question) or b"\0")


def test_process_of_the_host_does_not_set_its_clock(wire: Wire) -> None:
    assert "host" in (wire.control(CLOCK, bytes(8)) or "")
