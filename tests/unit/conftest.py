"""Fixtures that several folders share: the agent's sanitized build, compiled once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from agent_process import build

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def agent_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sanitized build of the agent."""
    directory = tmp_path_factory.mktemp("agent")
    build("sanitized", directory)
    return directory / "agent-sanitized"
