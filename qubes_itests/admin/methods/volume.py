"""Methods on the volumes of VMs."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Final

from qubes_itests.admin.dispatch import Call, Destination, method, save
from qubes_itests.admin.validation import (
    ascii_text,
    boolean,
    revisions_to_keep,
    size,
    volume,
)
from qubes_itests.core.exc import (
    ProtocolError,
    QubesNotImplementedError,
    QubesValueError,
    QubesVMNotHaltedError,
)
from qubes_itests.core.vm.qubesvm import QubesVM

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qubes_itests.core.storage import Storage, Volume
    from qubes_itests.core.vm.base import BaseVM

__all__: list[str] = []

_PREFIX: Final = "admin.vm.volume."
_OF_VM: Final = functools.partial(method, destination=Destination.VM, argument=volume)
_SIZED: Final = re.compile(rb"(0|[1-9][0-9]{0,18})\n(.*)", re.DOTALL)


def _storage(call: Call) -> Storage:
    vm = call.destination
    assert isinstance(vm, QubesVM)  # noqa: S101 - `volume` has found one of its volumes
    return vm.storage


@method(f"{_PREFIX}List", destination=Destination.ANY)
def list_volumes(call: Call) -> str:
    """Return the names, one a line; dom0 has none."""
    names = call.permitted(call.destination.volumes)
    return "".join(f"{name}\n" for name in names)


@_OF_VM(f"{_PREFIX}Info")
def info(call: Call) -> str:
    """Return what it is, as KEY=VALUE lines."""
    call.permit()
    found: Volume = call.argument
    values = {
        "pool": found.pool.name,
        "vid": found.vid,
        "size": found.size,
        "usage": found.usage,
        "rw": found.rw,
        "source": found.source.vid if found.source is not None else "",
        "path": found.path,
        "save_on_stop": found.save_on_stop,
        "snap_on_start": found.snap_on_start,
        "revisions_to_keep": found.revisions_to_keep,
        "ephemeral": _is_ephemeral(found),
        "is_outdated": found.is_outdated(),
    }
    return "".join(f"{key}={value}\n" for key, value in values.items())


def _is_ephemeral(of: Volume) -> bool:
    return of.is_volatile and of.pool.ephemeral_volatile


@_OF_VM(f"{_PREFIX}ListSnapshots")
def list_snapshots(call: Call) -> str:
    """Return the ids of its revisions, the oldest first, one a line."""
    revisions = call.argument.revisions
    # ids of one second are told apart by their place, which is chronological too
    permitted = call.permitted(sorted(revisions, key=revisions.__getitem__))
    return "".join(f"{revision}\n" for revision in permitted)


def _revision(call: Call, data: bytes) -> str:
    revision = ascii_text(data)
    if revision not in call.argument.revisions:
        raise ProtocolError(f"volume {call.argument} has no revision {revision!r}")
    return revision


@_OF_VM(f"{_PREFIX}Revert", payload=_revision, saves=True)
async def revert(call: Call) -> None:
    """Go back to a revision."""
    call.permit(volume=call.argument, revision=call.payload)
    await call.argument.revert(call.payload)


@_OF_VM(f"{_PREFIX}Resize", payload=size)
async def resize(call: Call) -> None:
    """Enlarge it to a number of bytes; if its VM runs, that has the new size then."""
    call.permit(size=call.payload)
    before = call.argument.size
    try:
        await _storage(call).resize(call.argument, call.payload)
    finally:
        # it may be larger although the guest could not enlarge its filesystem
        if call.argument.size != before:
            await save(call.app)


@_OF_VM(f"{_PREFIX}CloneFrom")
def clone_from(call: Call) -> str:
    """Return a token for `clone_to`."""
    call.permit(volume=call.argument)
    return call.tokens.give(call.destination.uuid, call.argument)


@_OF_VM(
    f"{_PREFIX}CloneTo",
    payload=lambda call, data: call.tokens.check(ascii_text(data)),
    saves=True,
)
async def clone_to(call: Call) -> None:
    """Replace its content by that of the volume that a token stands for."""
    source = call.tokens.take(call.app, call.payload)
    call.permit(src_volume=source, dst_volume=call.argument)
    if not call.destination.is_halted():
        raise QubesVMNotHaltedError(call.destination)
    with _storage(call).changing():
        await _storage(call).import_volume(call.argument, source)


@_OF_VM(f"{_PREFIX}Clear", saves=True)
async def clear(call: Call) -> None:
    """Empty it; its size stays."""
    call.permit()
    await _replace(call, call.argument.size, b"")


def _content(call: Call, data: bytes) -> tuple[int, bytes]:
    if call.method == f"{_PREFIX}Import":
        length, content = call.argument.size, data
    else:
        match = _SIZED.fullmatch(data)
        if match is None:
            raise ProtocolError("expected SIZE, a line break and the data")
        length, content = int(match[1]), match[2]
    if len(content) != length:
        raise ProtocolError(
            f"the data has {len(content)} bytes, and the volume is to have {length}"
        )
    return length, content


@_OF_VM(f"{_PREFIX}Import", f"{_PREFIX}ImportWithSize", payload=_content, saves=True)
async def import_content(call: Call) -> None:
    """Replace its content by the payload, as far as one request can hold it."""
    call.permit()
    await _replace(call, *call.payload)


async def _replace(call: Call, length: int, content: bytes) -> None:
    async def whole() -> AsyncIterator[bytes]:
        yield content

    await _storage(call).import_content(call.argument, length, whole())


@_OF_VM(f"{_PREFIX}Set.revisions_to_keep", payload=revisions_to_keep, saves=True)
def set_revisions_to_keep(call: Call) -> None:
    """Set how many former images it keeps."""
    call.permit(newvalue=call.payload)
    _storage(call).set_revisions_to_keep(call.argument.name, call.payload)


def _refuse_unless_halted(vm: BaseVM) -> None:
    if not vm.is_halted():
        raise QubesVMNotHaltedError(vm)


@_OF_VM(f"{_PREFIX}Set.rw", payload=boolean, saves=True)
def set_rw(call: Call) -> None:
    """Set whether the VM may write."""
    call.permit(newvalue=call.payload)
    _refuse_unless_halted(call.destination)
    if call.argument.is_volatile and not call.payload:
        raise QubesValueError(f"volume {call.argument} is empty at every start")
    call.argument.rw = call.payload


@_OF_VM(f"{_PREFIX}Set.ephemeral", payload=boolean)
def set_ephemeral(call: Call) -> None:
    """Refuse what is not so already: it is the pool's property here."""
    call.permit(newvalue=call.payload)
    _refuse_unless_halted(call.destination)
    if call.payload != _is_ephemeral(call.argument):
        raise QubesNotImplementedError(
            "single volumes cannot be made ephemeral: set ephemeral_volatile of pool"
            f" {call.argument.pool}, which holds for its volatile volumes"
        )
