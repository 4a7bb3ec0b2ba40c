"""Common part of the hypervisors over libvirt's drivers."""

# ruff: noqa: D102 - the contract documents its methods
from __future__ import annotations

import abc
import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any
from uuid import UUID

import libvirt

from qubes_itests.host import memory
from qubes_itests.hypervisor.contract import (
    Domain,
    DomainSpec,
    Hypervisor,
    LifecycleEvent,
    LifecycleHandler,
)
from qubes_itests.hypervisor.domain import is_panic, lifecycle_event
from qubes_itests.hypervisor.exc import HypervisorError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qubes_itests.hypervisor.connection import Connection
    from qubes_itests.hypervisor.domain import LibvirtDomain

__all__ = ["LibvirtHypervisor"]

_LOG = logging.getLogger(__name__)

#: How many of those that hold memory an error names.
_HOLDERS = 6

#: For what part of the memory that VMs may yet write to there is room, one of so many:
#: as many times more of them run than if each had all of its own.
_GROW = 4

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")


class LibvirtHypervisor(Hypervisor):
    """Book-keeping of domains and of who wants to know about them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._domains: dict[UUID, LibvirtDomain] = {}
        self._handlers: dict[object, LifecycleHandler] = {}
        self._registration: int | None = None
        self._closed = False

    @property
    def native(self) -> object | None:
        native: object = self._connection.native
        return native

    async def _listen(self) -> None:
        native = self._connection.native
        self._registration = await self._connection.call(
            "",
            "listen to",
            native.domainEventRegisterAny,
            None,
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            self._dispatch,
            None,
        )

    def _dispatch(
        self, _connection: Any, native: Any, event: int, detail: int, _opaque: Any
    ) -> None:
        # On the event loop: our implementation of libvirt's calls back from there only.
        if (domain := self._find(native)) is None:
            return
        # Before the event itself, which ends the domain's run: those who learn that it
        # has stopped must find why.
        if is_panic(event, detail):
            domain.panicked = True
        if (happened := lifecycle_event(event, detail)) is not None:
            domain.handle_event(happened)

    def _find(self, native: Any) -> LibvirtDomain | None:
        uuid = UUID(bytes=native.UUID())
        known = (d for d in self._domains.values() if d.libvirt_uuid == uuid)
        return next(known, None)

    def _publish(self, domain: LibvirtDomain, event: LifecycleEvent) -> None:
        crashed = event is LifecycleEvent.CRASHED and not domain.panicked
        if crashed and memory.kills() > domain.kills:
            running = [d for d in self._domains.values() if d.native is not None]
            _LOG.error(
                "domain %s has ended while this machine was out of memory, for which"
                " the kernel kills processes; %s",
                domain.spec.name,
                self._holders((d.memory_held(), d.spec.name) for d in running),
            )
        # a copy: a handler may unsubscribe itself, or others
        for handler in list(self._handlers.values()):
            try:
                handler(domain, event)
            except Exception:  # noqa: BLE001 - libvirt calls: nobody above could catch it
                _LOG.exception("a handler of %s of %s failed", event, domain.spec.name)

    def _forget(self, domain: Domain) -> None:
        self._domains.pop(domain.spec.uuid, None)

    def subscribe(self, handler: LifecycleHandler) -> Callable[[], None]:
        token = object()
        self._handlers[token] = handler

        def unsubscribe() -> None:
            self._handlers.pop(token, None)

        return unsubscribe

    def domains(self, *, spare: bool = False) -> tuple[Domain, ...]:
        return tuple(d for d in self._domains.values() if d.spec.spare is spare)

    async def define(self, spec: DomainSpec) -> Domain:
        for domain in () if spec.spare else self.domains(spare=True):
            if self._shortage(spec.memory):
                await domain.undefine()
        self._check(spec)
        domain = self._make(spec)
        self._domains[spec.uuid] = domain
        return domain

    @abc.abstractmethod
    def _make(self, spec: DomainSpec) -> LibvirtDomain:
        """Return a new domain's handle."""

    def _check(self, spec: DomainSpec) -> None:
        problem = "the connection is closed" if self._closed else self._problem(spec)
        if problem:
            raise HypervisorError(spec.name, "define", problem)

    def _problem(self, spec: DomainSpec) -> str:
        """Return what is wrong with a spec, in words; empty if nothing is."""
        if not _NAME.fullmatch(spec.name):
            return (
                "expected a letter, then letters, digits, '_', '.' or '-' as its name"
            )
        for other in (domain.spec for domain in self._domains.values()):
            if spec.name == other.name or spec.uuid == other.uuid:
                return f"there is domain {other.name!r} of UUID {other.uuid} already"
        if not 0 < spec.memory <= spec.max_memory:
            return f"expected 1 to {spec.max_memory} MiB of memory, got {spec.memory}"
        if spec.vcpus < 1:
            return f"expected 1 or more virtual CPUs, got {spec.vcpus}"
        return self._shortage(spec.memory)

    def _shortage(self, needed: int) -> str:
        """Return why there is not enough memory, in words; empty if there is.

        :param needed: MiB.
        """
        domains = self._domains.values()
        if self.memory_limit is not None:
            if sum(d.spec.memory for d in domains) + needed <= self.memory_limit:
                return ""
            holders = self._holders((d.spec.memory, d.spec.name) for d in domains)
            return (
                f"it needs {needed} MiB; of the {self.memory_limit} MiB that VMs"
                f" may take of this machine's memory here {holders}"
                " (--host-memory, shared out among workers: fewer of them have more)"
            )
        if not self.takes_memory:
            return ""
        # What is about to start has touched nothing of its memory. What runs has most
        # of it in common with others, and may yet write to all of it, though hardly all
        # of them will.
        starting = [(d.spec.memory, d.spec.name) for d in domains if d.native is None]
        running = [d for d in domains if d.native is not None]
        kept = sum(size for size, _ in starting)
        kept += sum(d.spec.memory for d in running) // _GROW
        left = memory.available()
        if kept + needed <= left:
            return ""
        held = [(d.memory_held(), d.spec.name) for d in running]
        return (
            f"it needs {needed} MiB; of this machine's memory {left} MiB are left, of"
            f" which {kept} MiB are kept for VMs that start or grow;"
            f" {self._holders(starting + held)}"
        )

    @staticmethod
    def _holders(held: Iterable[tuple[int, str]]) -> str:
        """Return who holds how much memory, those that hold most first.

        :param held: MiB and name of each.
        """
        held = sorted(held, reverse=True)
        shown = [f"{name} holds {size} MiB" for size, name in held[:_HOLDERS]]
        if others := held[_HOLDERS:]:
            total = sum(size for size, _ in others)
            shown.append(f"{len(others)} others hold {total} MiB")
        return ", ".join(shown) or "nobody holds any"

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            # all of them, though one may fail: what is left would outlive the run
            results = await asyncio.gather(
                *(domain.undefine() for domain in list(self._domains.values())),
                return_exceptions=True,
            )
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        finally:
            await self._disconnect()

    async def _disconnect(self) -> None:
        if self._registration is not None:
            deregister = self._connection.native.domainEventDeregisterAny
            await self._connection.call("", "leave", deregister, self._registration)
        await self._connection.close()
