"""What several folders share: the agent's sanitized build, compiled once; a profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from agent_process import build
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from pathlib import Path

# An example may take as long as its test, and so may its making: how long they do, the
# machine's load says.
settings.register_profile(
    "unit", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have one worker run what needs the agent, which each would compile for itself."""
    for item in items:
        if isinstance(item, pytest.Function) and "agent_program" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("agent"))


@pytest.fixture(scope="session")
def agent_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sanitized build of the agent."""
    directory = tmp_path_factory.mktemp("agent")
    build("sanitized", directory)
    return directory / "agent-sanitized"
