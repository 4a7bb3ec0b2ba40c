"""Installed storage drivers: the entry points of the group ``qubes.storage``."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from qubes_storage.exc import DriverNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qubes_storage.pool import Pool

__all__ = ["GROUP", "driver_names", "driver_parameters", "pool_class"]

#: The entry point group; each entry is a subclass of `Pool` under its driver's name.
GROUP = "qubes.storage"


@functools.lru_cache(maxsize=1)
def _found_by(
    entry_points: Callable[..., importlib.metadata.EntryPoints],
) -> importlib.metadata.EntryPoints:
    """Return those of drivers: to look through all distributions takes 6 ms each time.

    :param entry_points: that of `importlib.metadata`, where tests may have put another.
    """
    return entry_points(group=GROUP)


def driver_names() -> tuple[str, ...]:
    """Return the names of the drivers that were installed at the first call."""
    return tuple(sorted(_found_by(importlib.metadata.entry_points).names))


def pool_class(driver: str) -> type[Pool]:
    """Return the pool class of a driver.

    :raise DriverNotFoundError: when no such driver is installed.
    """
    for entry in _found_by(importlib.metadata.entry_points).select(name=driver):
        return cast("type[Pool]", entry.load())
    raise DriverNotFoundError(driver, driver_names())


@functools.cache
def driver_parameters(name: str) -> Mapping[str, bool]:
    """Return the options of a driver, and whether each has to be given.

    Those of its base classes are among them; that of its name, which all have, is not.

    :param name: the driver's.
    :raise DriverNotFoundError: when no such driver is installed.
    """
    found: dict[str, bool] = {}
    for cls in pool_class(name).__mro__:
        if cls is object or "__init__" not in vars(cls):
            continue
        for parameter in inspect.signature(cls).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                required = parameter.default is inspect.Parameter.empty
                found.setdefault(parameter.name, required)
    found.pop("name", None)
    return MappingProxyType(found)
