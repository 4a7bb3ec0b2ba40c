"""Finding storage drivers: the entry points of the group ``qubes.storage``."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, cast

from qubes_storage.exc import DriverNotFoundError

if TYPE_CHECKING:
    from qubes_storage.pool import Pool

__all__ = ["GROUP", "driver_names", "pool_class"]

#: The entry point group; each entry is a subclass of `Pool` under its driver's name.
GROUP = "qubes.storage"


def driver_names() -> tuple[str, ...]:
    """Return the names of the installed drivers."""
    return tuple(sorted(entry_points(group=GROUP).names))


def pool_class(driver: str) -> type[Pool]:
    """Return the pool class of a driver.

    :raise DriverNotFoundError: when no such driver is installed.
    """
    for entry in entry_points(group=GROUP, name=driver):
        return cast("type[Pool]", entry.load())
    raise DriverNotFoundError(driver, driver_names())
