"""Run Qubes OS integration tests anywhere, against real VMs.

``pytest -p qubes_itests`` loads the fixtures; ``itests`` is the main job.
"""

from __future__ import annotations

__version__ = "0.1.0"

#: What ``pytest -p qubes_itests`` loads besides this module.
pytest_plugins = (
    "qubes_itests.pytest_plugin",
    "qubes_itests.conformance.options",
    "qubes_itests.fixtures.session",
    "qubes_itests.fixtures.filesystems",
    "qubes_itests.fixtures.pools",
    "qubes_itests.fixtures.faultdisk",
    "qubes_itests.fixtures.memory",
)
