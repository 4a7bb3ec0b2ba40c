"""``orphans``: volumes that no VM has, listed, taken over, removed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.admin.protocol import Request
from qubes_itests.exc import UsageError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.program import NAME
from qubes_itests.serve.admin_client import call
from qubes_itests.serve.place import find

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.cli.arguments import Command
    from qubes_itests.run.settings import Settings
    from qubes_itests.serve.place import Place

__all__ = ["execute"]

_USAGE = (
    "expected nothing, `remove POOL:VOLUME…`, or `adopt NAME CLASS [TEMPLATE]`, got"
)


def execute(command: Command, _settings: Settings) -> int:
    """List them, one ``POOL:VOLUME`` a line, or do to them what the words say."""
    socket = Path(command.socket) if command.socket else None
    place = find(Cache(), socket)
    match command.words:
        case ():
            for pool, vid in _orphans(place):
                sys.stdout.write(f"{pool}:{vid}\n")
        case ("remove", _, *_):
            for volume in command.words[1:]:
                _remove(place, volume)
        case ("adopt", name, cls):
            _adopt(place, name, cls, "")
        case ("adopt", name, cls, template):
            _adopt(place, name, cls, template)
        case _:
            sys.stderr.write(f"{NAME} orphans: {_USAGE} {command.words}\n")
            return ExitCode.USAGE_ERROR
    return ExitCode.OK


def _orphans(place: Place) -> Iterator[tuple[str, str]]:
    for pool in call(place, Request("admin.pool.List")).split():
        request = Request("admin.pool.volume.ListOrphans", pool)
        for vid in call(place, request).split():
            yield pool, vid


def _remove(place: Place, volume: str) -> None:
    pool, colon, vid = volume.partition(":")
    if not colon:
        raise UsageError(f"expected POOL:VOLUME, got {volume!r}")
    payload = vid.encode(errors="replace")
    call(place, Request("admin.pool.volume.RemoveOrphan", pool, payload=payload))


def _adopt(place: Place, name: str, cls: str, template: str) -> None:
    pools: dict[str, str] = {}
    for pool, vid in _orphans(place):
        _prefix, vm, volume = vid.split("/")
        if vm == name and pools.setdefault(volume, pool) != pool:
            raise UsageError(
                f"volume {vid} is in the pools {pools[volume]} and {pool}: remove one"
            )
    if not pools:
        raise UsageError(f"there is no orphan of a VM {name!r}")
    where = "".join(f" pool:{volume}={pool}" for volume, pool in pools.items())
    payload = f"name={name} label=red{where}".encode(errors="replace")
    call(place, Request(f"admin.vm.Adopt.{cls}", template, payload=payload))
