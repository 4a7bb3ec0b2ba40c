"""The main job in a worker, to which only arguments come. PYTEST_DONT_REWRITE."""

from __future__ import annotations

import importlib

import pytest

import qubes_itests
from qubes_itests.host.cache import Cache
from qubes_itests.pytest_plugin import worker
from qubes_itests.pytest_plugin.job import Job, JobParts

__all__: list[str] = []


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Load what the main job loads; it has done so where it began."""
    for name in qubes_itests.pytest_plugins:
        if not pluginmanager.has_plugin(name):
            pluginmanager.register(importlib.import_module(name), name)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Be the main job, as the controller is."""
    if worker.is_worker(config):
        job = Job(worker.settings(config), Cache().root)
        config.pluginmanager.register(job)
        config.pluginmanager.register(JobParts())
