"""Methods on storage pools."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Final

from qubes_itests.admin.dispatch import Call, Destination, method
from qubes_itests.admin.validation import (
    boolean,
    lines,
    pairs,
    pool,
    printable,
    revisions_to_keep,
)
from qubes_itests.core.exc import ProtocolError, QubesException, QubesValueError
from qubes_itests.core.pools import driver_names, driver_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qubes_itests.core.pools import Pool

__all__: list[str] = []

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_ON_DOM0: Final = functools.partial(method, destination=Destination.DOM0)


def _lines(values: Mapping[str, object]) -> str:
    return "".join(f"{key}={value}\n" for key, value in values.items())


@_ON_DOM0("admin.pool.List")
def list_pools(call: Call) -> str:
    """Return the names, one a line."""
    return "".join(f"{each}\n" for each in call.permitted(call.app.pools))


@_ON_DOM0("admin.pool.ListDrivers")
def list_drivers(call: Call) -> str:
    """Return the drivers and their options, one driver a line."""
    drivers = call.permitted(driver_names())
    return "".join(f"{' '.join((name, *driver_options(name)))}\n" for name in drivers)


@_ON_DOM0("admin.pool.Info", argument=pool)
def info(call: Call) -> str:
    """Return its configuration, size and usage, as KEY=VALUE lines."""
    found: Pool = call.argument
    call.permit(pool=found)
    values: dict[str, object] = dict(sorted(found.config.items()))
    outer = found.included_in(call.app.pools.values())
    more = {"size": found.size, "usage": found.usage, "included_in": outer}
    values |= {key: value for key, value in more.items() if value is not None}
    return _lines(values)


@_ON_DOM0("admin.pool.UsageDetails", argument=pool)
def usage_details(call: Call) -> str:
    """Return what size and usage are made of, as KEY=VALUE lines."""
    call.permit(pool=call.argument)
    return _lines(dict(sorted(call.argument.usage_details.items())))


def _driver(call: Call) -> str:
    if call.raw_argument not in driver_names():
        raise QubesException(
            f"there is no storage driver {call.raw_argument!r}:"
            f" there are {', '.join(driver_names())}"
        )
    return call.raw_argument


def _configuration(call: Call, data: bytes) -> dict[str, str]:
    options = pairs(lines(call, data))
    if not _NAME.fullmatch(options.get("name", "")):
        raise ProtocolError("expected name= with letters, digits and _.-")
    if options["name"] in call.app.pools:
        raise QubesValueError(f"there is a pool {options['name']!r} already")
    known = ("name", *driver_options(call.argument))
    if unknown := sorted(set(options) - set(known)):
        raise QubesValueError(
            f"driver {call.argument} takes no {', '.join(unknown)}:"
            f" it takes {', '.join(known)}"
        )
    return options


@_ON_DOM0("admin.pool.Add", argument=_driver, payload=_configuration, saves=True)
async def add(call: Call) -> None:
    """Make a pool; the payload is its options, as KEY=VALUE lines."""
    options = dict(call.payload)
    call.permit(
        name=options["name"],
        pool_config={key: value for key, value in options.items() if key != "name"},
    )
    await call.app.add_pool(driver=call.argument, **options)


@_ON_DOM0("admin.pool.Remove", argument=pool, saves=True)
async def remove(call: Call) -> None:
    """Forget a pool that nobody uses; what is in it stays."""
    call.permit(pool=call.argument)
    await call.app.remove_pool(call.argument.name)


@_ON_DOM0("admin.pool.volume.List", argument=pool)
def list_volumes(call: Call) -> str:
    """Return the ids of its volumes, one a line."""
    vids = [volume.vid for volume in call.argument.list_volumes()]
    return "".join(f"{vid}\n" for vid in call.permitted(vids))


@_ON_DOM0("admin.pool.volume.ListOrphans", argument=pool)
async def list_orphans(call: Call) -> str:
    """Return the ids of its volumes that no VM has, one a line; not of Qubes OS."""
    vids = await call.app.find_orphans(call.argument)
    return "".join(f"{vid}\n" for vid in call.permitted(vids))


@_ON_DOM0("admin.pool.volume.RemoveOrphan", argument=pool, payload=printable)
async def remove_orphan(call: Call) -> None:
    """Remove the volume of an id, with its revisions, if no VM has it."""
    call.permit(vid=call.payload)
    await call.app.remove_orphan(call.argument, call.payload)


@_ON_DOM0(
    "admin.pool.Set.revisions_to_keep",
    argument=pool,
    payload=revisions_to_keep,
    saves=True,
)
def set_revisions_to_keep(call: Call) -> None:
    """Set how many revisions its new volumes keep."""
    call.permit(newvalue=call.payload)
    call.argument.revisions_to_keep = call.payload


@_ON_DOM0(
    "admin.pool.Set.ephemeral_volatile", argument=pool, payload=boolean, saves=True
)
def set_ephemeral_volatile(call: Call) -> None:
    """Set whether its volatile volumes must not outlive their stop."""
    call.permit(newvalue=call.payload)
    call.argument.ephemeral_volatile = call.payload
