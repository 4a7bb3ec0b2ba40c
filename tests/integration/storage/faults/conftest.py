"""What the tests of disks that fail have in common."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qubes_itests.pytest_plugin import CONTEXT


@pytest.fixture
def expected_failure(pytestconfig, monkeypatch, tmp_path):
    """Keep the bad states that a test looks for apart from those of real failures."""
    context = pytestconfig.stash[CONTEXT]
    settings = replace(context.settings, artifacts=tmp_path)
    monkeypatch.setattr(context, "settings", settings)
