"""libvirt connection for coroutines.

Blocking calls run in threads, a few for each domain: a QEMU that hangs holds up calls
of one domain alone, and those have a deadline. libvirt's own printing of errors is
off, and what libvirt raises becomes an error of :mod:`qubes_itests.hypervisor.exc` that
carries libvirt's words and its error code.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import libvirt

from qubes_itests.hypervisor.event_loop import register_event_loop
from qubes_itests.hypervisor.exc import (
    HypervisorError,
    StateError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Connection", "translate_error"]

P = ParamSpec("P")
R = TypeVar("R")

#: Calls of one domain that are under way at once; libvirt lets one at a time ask QEMU.
_THREADS = 4
#: Seconds in which libvirt must answer. It waits as long for a call of the same domain
#: that is under way, and without end for QEMU.
_DEADLINE = 30.0

#: Native connections that last as long as the process, by URI.
_kept: dict[str, Any] = {}

#: What libvirt says of a domain that is in another state than the call needs.
_OF_STATE = (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID)
#: And of one that ends during the call, for which it has no code: what happens to its
#: connection to QEMU.
_OF_ITS_END = (
    "End of file from qemu monitor",
    "Unable to read from monitor",
    "Unable to write to monitor",
    "domain is no longer running",
)


def translate_error(
    error: libvirt.libvirtError, domain: str, action: str
) -> HypervisorError:
    """Return our error for one of libvirt's, with its words and its code."""
    code = error.get_error_code()
    words = error.get_error_message() or str(error)
    of_state = code in _OF_STATE or any(end in words for end in _OF_ITS_END)
    kind = StateError if of_state else HypervisorError
    return kind(domain, action, f"{words} (libvirt error {code})")


class Connection:
    """One libvirt connection; make it with :meth:`open`."""

    def __init__(self, native: Any, *, kept: bool) -> None:
        self.native = native
        self._kept = kept
        #: By domain; with an empty name those of none.
        self._threads: dict[str, ThreadPoolExecutor] = {}

    @classmethod
    async def open(cls, uri: str, *, keep: bool = False) -> Connection:
        """Connect to `uri` on the running event loop.

        :param keep: use one native connection per URI for the life of the process.
            An embedded driver needs that: libvirt registers the driver anew at each
            opening, and after twenty it has no room for more.
        :raise HypervisorError: when libvirt refuses.
        """
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        # before the connection: libvirt gives one that was opened without an event loop
        # no events, ever
        register_event_loop()
        if uri not in _kept:
            try:
                native = await asyncio.to_thread(libvirt.open, uri)
            except libvirt.libvirtError as error:
                raise translate_error(error, "", "connect to") from error
            if not keep:
                return cls(native, kept=False)
            _kept[uri] = native
        return cls(_kept[uri], kept=True)

    async def call(
        self,
        domain: str,
        action: str,
        function: Callable[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run a blocking libvirt function in one of the domain's threads.

        :param domain: name of the domain that is concerned; empty for none.
        :param action: what is tried, for the error: "start".
        :raise HypervisorError: what `translate_error` makes of libvirt's; or there is
            no answer, and what was asked for may still happen.
        """
        calling = asyncio.ensure_future(
            self.call_to_end(domain, action, function, *args, **kwargs)
        )
        try:
            # `wait` and not `wait_for`: a thread inside libvirt cannot be stopped, and
            # `wait_for` would wait for the end of what it has cancelled
            await asyncio.wait([calling], timeout=_DEADLINE)
            if calling.done():
                return calling.result()
        finally:
            # A call that waits for a thread is not made any more.
            calling.cancel()
        raise HypervisorError(domain, action, f"no answer within {_DEADLINE:g} s")

    async def call_to_end(
        self,
        domain: str,
        action: str,
        function: Callable[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Do what `call` does, however long it takes: for what must not be given up."""
        # Separate threads for each domain. In a pool for all, the calls of one QEMU
        # that hangs would take every thread, and all other domains hang with it.
        threads = self._threads.get(domain)
        if threads is None:
            threads = ThreadPoolExecutor(_THREADS, f"libvirt-{domain}")
            self._threads[domain] = threads
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                threads, lambda: function(*args, **kwargs)
            )
        except libvirt.libvirtError as error:
            raise translate_error(error, domain, action) from error

    def forget(self, domain: str) -> None:
        """Let a domain's threads end as soon as their calls have."""
        if (threads := self._threads.pop(domain, None)) is not None:
            # a thread that hangs in libvirt must not keep the caller, nor the others
            threads.shutdown(wait=False)

    async def close(self) -> None:
        """Disconnect; calls under way end first."""
        for threads in self._threads.values():
            await asyncio.to_thread(threads.shutdown)
        if self._kept:
            return
        try:
            await asyncio.to_thread(self.native.close)
        except libvirt.libvirtError as error:
            raise translate_error(error, "", "disconnect from") from error
