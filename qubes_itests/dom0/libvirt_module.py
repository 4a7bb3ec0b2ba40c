"""What a core imports as ``libvirt`` and ``libvirtaio``.

The names, the numbers and the errors are those of libvirt for what a core asks of it;
anything else is an error that names it. A handle refers to a domain by its UUID, and
nothing here keeps one: the tests of core-admin fail when a handle outlives them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import uuid
import weakref
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from qubes_itests.dom0 import modules
from qubes_itests.dom0.xen_xml import read_domain
from qubes_itests.exc import HarnessError
from qubes_itests.hypervisor.exc import StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from qubes_itests.dom0.machine import Event, Guest, Machine

T = TypeVar("T")

VIR_DOMAIN_NOSTATE = 0
VIR_DOMAIN_RUNNING = 1
VIR_DOMAIN_BLOCKED = 2
VIR_DOMAIN_PAUSED = 3
VIR_DOMAIN_SHUTDOWN = 4
VIR_DOMAIN_SHUTOFF = 5
VIR_DOMAIN_CRASHED = 6
VIR_DOMAIN_PMSUSPENDED = 7

VIR_DOMAIN_START_PAUSED = 1
VIR_NODE_SUSPEND_TARGET_MEM = 0
VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE = 1

VIR_DOMAIN_EVENT_ID_LIFECYCLE = 0
VIR_DOMAIN_EVENT_STARTED = 2
VIR_DOMAIN_EVENT_SUSPENDED = 3
VIR_DOMAIN_EVENT_RESUMED = 4
VIR_DOMAIN_EVENT_STOPPED = 5

VIR_ERR_INTERNAL_ERROR = 1
VIR_ERR_NO_SUPPORT = 3
VIR_ERR_INVALID_CONN = 6
VIR_ERR_OS_TYPE = 11
VIR_ERR_XML_ERROR = 27
VIR_ERR_NO_DOMAIN = 42
VIR_ERR_NO_NODE_DEVICE = 63
VIR_ERR_OPERATION_INVALID = 55
VIR_ERR_OPERATION_UNSUPPORTED = 84

_URI: Final = "xen:///"
_numbers = itertools.count(1)


class libvirtError(Exception):
    """An error with a code, by which a core tells what to do.

    :param defmsg: what went wrong.
    :param code: one of VIR_ERR_….
    """

    def __init__(self, defmsg: str = "", code: int = VIR_ERR_INTERNAL_ERROR) -> None:
        super().__init__(defmsg)
        self._code = code

    def get_error_code(self) -> int:
        """Return the code."""
        return self._code

    def get_error_message(self) -> str:
        """Return what went wrong."""
        return str(self)

    def get_str2(self) -> str:
        """Return nothing: there is no more to say."""
        return ""


def _wait(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run something on the machine for the caller, with errors as libvirt has them."""
    try:
        return modules.machine().run(coroutine)
    except StateError as error:
        raise libvirtError(str(error), VIR_ERR_OPERATION_INVALID) from None
    except ValueError as error:
        raise libvirtError(str(error), VIR_ERR_XML_ERROR) from None
    except HarnessError as error:
        raise libvirtError(str(error)) from None


class virDomain:
    """A handle of a domain.

    :param connection: that it comes from.
    :param identifier: of the domain.
    """

    def __init__(self, connection: virConnect, identifier: uuid.UUID) -> None:
        self._connection = connection
        self._uuid = identifier

    def __getattr__(self, name: str) -> NoReturn:
        modules.missing(f"libvirt.virDomain.{name}", name)

    def _guest(self) -> Guest:
        guest = self._connection.machine().guests.get(self._uuid)
        if guest is None:
            raise libvirtError(f"there is no domain {self._uuid}", VIR_ERR_NO_DOMAIN)
        return guest

    def connect(self) -> virConnect:
        return self._connection

    def name(self) -> str:
        return self._guest().name

    def UUID(self) -> bytes:
        return self._uuid.bytes

    def UUIDString(self) -> str:
        return str(self._uuid)

    def ID(self) -> int:
        return self._guest().xid

    def isActive(self) -> int:
        return int(self._guest().is_active)

    def state(self, flags: int = 0) -> list[int]:
        return [int(self._guest().state), 0]

    def info(self) -> list[int]:
        """Return state, memory at most and now in KiB, CPUs, their time in ns."""
        guest = self._guest()
        domain, config = guest.domain, guest.config
        used = 0 if domain is None else int(_wait(domain.cpu_time()) * 1e9)
        sizes = config.max_memory << 10, config.memory << 10
        return [int(guest.state), *sizes, config.vcpus, used]

    def maxMemory(self) -> int:
        return self._guest().config.max_memory << 10

    def memoryStats(self) -> dict[str, int]:
        """Return what it holds, KiB."""
        domain = self._guest().domain
        if domain is None:
            return {"actual": self._guest().config.memory << 10}
        return {"actual": _wait(domain.memory_statistics()).actual >> 10}

    def createWithFlags(self, flags: int) -> int:
        guest = self._guest()
        _wait(guest.create())
        if not flags & VIR_DOMAIN_START_PAUSED:
            _wait(guest.resume())
        return 0

    def resume(self) -> int:
        _wait(self._guest().resume())
        return 0

    def suspend(self) -> int:
        _wait(self._guest().suspend())
        return 0

    def pMSuspendForDuration(self, *_arguments: int) -> NoReturn:
        """Refuse, as libvirt does for a guest that cannot; a core pauses it then."""
        raise libvirtError("no guest here suspends", VIR_ERR_OPERATION_UNSUPPORTED)

    def destroy(self) -> int:
        _wait(self._guest().destroy())
        return 0

    def undefine(self) -> int:
        guest = self._guest()
        if not guest.is_active:
            del self._connection.machine().guests[self._uuid]
        return 0

    def XMLDesc(self, flags: int = 0) -> str:
        return self._guest().definition()

    def attachDevice(self, xml: str) -> int:
        _wait(self._guest().attach_device(xml))
        return 0

    def detachDevice(self, xml: str) -> int:
        _wait(self._guest().detach_device(xml))
        return 0


class virConnect:
    """A connection."""

    def __init__(self) -> None:
        self._open = True
        self._lost = False
        self._callbacks: dict[int, Callable[[Guest, Event], None]] = {}
        _connections.add(self)

    def __getattr__(self, name: str) -> NoReturn:
        modules.missing(f"libvirt.virConnect.{name}", name)

    def machine(self) -> Machine:
        """Return the machine; not of libvirt."""
        if not self._open:
            raise libvirtError("the connection is closed", VIR_ERR_INVALID_CONN)
        if self._lost:
            raise libvirtError("internal error: client socket is closed")
        return modules.machine()

    def lose(self) -> None:
        """Have no daemon at the other end any more; not of libvirt."""
        for number in tuple(self._callbacks):
            self.domainEventDeregisterAny(number)
        self._lost = True

    def _handle(self, guest: Guest | None, what: object) -> virDomain:
        if guest is None:
            raise libvirtError(f"there is no domain {what}", VIR_ERR_NO_DOMAIN)
        return virDomain(self, guest.config.uuid)

    def getType(self) -> str:
        return "Xen"

    def getURI(self) -> str:
        return _URI

    def getHostname(self) -> str:
        self.machine()
        return "dom0"

    def isAlive(self) -> int:
        return int(self._open and not self._lost)

    def getInfo(self) -> list[str | int]:
        """Return architecture, MiB of memory, CPUs, MHz, nodes and what a node has."""
        size = self.machine().memory.budget.total >> 20
        cpus = os.cpu_count() or 1
        return ["x86_64", size, cpus, 0, 1, 1, cpus, 1]

    def defineXML(self, xml: str) -> virDomain:
        try:
            config = read_domain(xml)
        except ValueError as error:
            raise libvirtError(str(error), VIR_ERR_XML_ERROR) from None
        return self._handle(_wait(self.machine().define(config)), config.name)

    def lookupByUUID(self, data: bytes) -> virDomain:
        identifier = uuid.UUID(bytes=data)
        return self._handle(self.machine().guests.get(identifier), identifier)

    def lookupByName(self, name: str) -> virDomain:
        return self._handle(self.machine().find(name), name)

    def lookupByID(self, number: int) -> virDomain:
        running = {g.xid: g for g in self.machine().guests.values() if g.is_active}
        return self._handle(running.get(number), number)

    def listAllDomains(self, flags: int = 0) -> list[virDomain]:
        guests = tuple(self.machine().guests.values())
        return [
            virDomain(self, g.config.uuid) for g in guests if g.is_active or not flags
        ]

    def listAllDevices(self, flags: int = 0) -> list[NoReturn]:
        """Return no device: no PCI device of this machine is a guest's to have."""
        return []

    def nodeDeviceLookupByName(self, name: str) -> NoReturn:
        raise libvirtError(f"there is no device {name}", VIR_ERR_NO_NODE_DEVICE)

    def domainEventRegisterAny(
        self,
        dom: virDomain | None,
        eventID: int,
        cb: Callable[..., None],
        opaque: object,
    ) -> int:
        """Call a function for each event of a kind, on the loop of libvirtaio."""
        if dom is not None or eventID != VIR_DOMAIN_EVENT_ID_LIFECYCLE:
            raise libvirtError(
                f"expected life-cycle events of all domains, got kind {eventID}",
                VIR_ERR_NO_SUPPORT,
            )
        number = next(_numbers)

        def call(guest: Guest, event: Event) -> None:
            # between the event and its turn on the loop it may have been deregistered
            if number in self._callbacks:
                handle = virDomain(self, guest.config.uuid)
                cb(self, handle, int(event), 0, opaque)

        def listen(guest: Guest, event: Event) -> None:
            # A loop that is closed meanwhile hears of nothing any more.
            with contextlib.suppress(RuntimeError):
                if _loop is not None:
                    _loop.call_soon_threadsafe(call, guest, event)

        self._callbacks[number] = listen
        self.machine().listeners.append(listen)
        return number

    def domainEventDeregisterAny(self, callbackID: int) -> None:
        listen = self._callbacks.pop(callbackID, None)
        if listen is not None:
            modules.machine().listeners.remove(listen)

    def close(self) -> int:
        for number in tuple(self._callbacks):
            self.domainEventDeregisterAny(number)
        self._open = False
        return 0


#: Those that are open; a core drops some without closing them.
_connections: weakref.WeakSet[virConnect] = weakref.WeakSet()


def restart() -> None:
    """Have all connections lost, as when the daemon is restarted; not of libvirt."""
    for connection in tuple(_connections):
        connection.lose()


#: Of the tests, on which events are told.
_loop: asyncio.AbstractEventLoop | None = None


class virEventAsyncIOImpl:
    """What `libvirtaio.virEventRegisterAsyncIOImpl` returns."""

    async def drain(self) -> None:
        """Return: nothing is held back."""


def virEventRegisterAsyncIOImpl(
    loop: asyncio.AbstractEventLoop | None = None,
) -> virEventAsyncIOImpl:
    """Tell events on a loop from now on."""
    global _loop  # noqa: PLW0603 - as libvirt has one for each process
    _loop = loop or asyncio.get_event_loop()
    return virEventAsyncIOImpl()


def open(uri: str | None = None) -> virConnect:
    """Connect; there is one hypervisor, whatever the URI."""
    return virConnect()


def openReadOnly(uri: str | None = None) -> virConnect:
    return virConnect()


def registerErrorHandler(f: object, ctx: object) -> None:
    """Do nothing: nothing is printed that a handler could keep away."""


def __getattr__(name: str) -> NoReturn:
    modules.missing(f"libvirt.{name}", name)
