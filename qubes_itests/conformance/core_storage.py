"""The conformance suite for the storage drivers of a core under test.

``./itests --core DIR core::conformance`` runs it.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

from qubes_itests.conformance.core_drivers import CorePool
from qubes_itests.conformance.storage import StorageConformance
from qubes_storage.drivers import GROUP
from qubes_storage.exc import DriverNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qubes_storage import Pool

__all__ = ["TestFile", "TestReflink"]

#: What no driver of core-admin promises: there, its callers see to most of it.
_UNPROMISED = frozenset(
    {
        "config_checks",
        "import_creates",
        "read_only",
        "second_process",
        "size_checks",
        "strict_states",
    }
)


class CoreConformance(StorageConformance):
    """The suite for a driver of core-admin."""

    def pool_class(self, driver: str) -> Callable[..., Pool]:
        """Return what makes a pool of the driver, found as core-admin finds it."""
        entries = importlib.metadata.entry_points(group=GROUP)
        for entry in entries.select(name=driver):
            made: Any = entry.load()
            return lambda **config: CorePool(made(**config))
        raise DriverNotFoundError(driver, tuple(sorted(entries.names)))


class TestReflink(CoreConformance):
    """The driver file-reflink."""

    lacks = _UNPROMISED

    def make_pool(self, name: str, directory: Path | None) -> Pool:
        """Return a pool of it."""
        path = f"{directory}/pool"
        made = self.pool_class("file-reflink")
        return made(name=name, dir_path=path, setup_check=False)


class TestFile(CoreConformance):
    """The driver file, without device mapper: its volumes keep no snapshots."""

    lacks = _UNPROMISED | {
        "crash_recovery",
        "dirty",
        "export",
        "full_disk",
        "many_revisions",
        "no_snapshot_power_cuts",
        "outdated",
        "power_cuts",
        "revisions",
        "shared_extents",
        "snapshot_running_source",
        "snapshot_saved",
        "snapshots",
    }

    def make_pool(self, name: str, directory: Path | None) -> Pool:
        """Return a pool of it."""
        made = self.pool_class("file")
        return made(name=name, dir_path=f"{directory}/pool", revisions_to_keep=-1)
