"""Fixtures: a fresh process of the agent's sanitized build."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from agent_process import AgentProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent_wire import Wire


@pytest.fixture
def agent(agent_program: Path, tmp_path: Path) -> AgentProcess:
    """Return an agent that has not been started, on a root of its own."""
    return AgentProcess(agent_program, tmp_path / "root")


@pytest.fixture
def wire(agent: AgentProcess) -> Iterator[Wire]:
    """Return a connection to a running agent; it must end without a complaint."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(agent.start())
        connection.hello()
        yield connection
        stack.close()
        assert agent.stderr == ""
        assert agent.process.returncode == 0
