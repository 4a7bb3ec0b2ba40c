"""A libvirt connection for coroutines.

Blocking calls run in threads, libvirt's own printing of errors is off, and what
libvirt raises becomes an error of :mod:`qubes_itests.hypervisor.exc` that carries
libvirt's words and its error code.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import libvirt

from qubes_itests.hypervisor.event_loop import register_event_loop
from qubes_itests.hypervisor.exc import (
    HypervisorError,
    NotAttachedError,
    NotSupportedError,
    StateError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Connection", "translate_error"]

P = ParamSpec("P")
R = TypeVar("R")

#: Enough for every domain of a big run to have one call under way.
_THREADS = 16

#: Native connections that last as long as the process, by URI.
_kept: dict[str, Any] = {}

_ERRORS: dict[int, type[HypervisorError]] = {
    libvirt.VIR_ERR_NO_SUPPORT: NotSupportedError,
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED: NotSupportedError,
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED: NotSupportedError,
    libvirt.VIR_ERR_NO_DOMAIN: StateError,
    libvirt.VIR_ERR_OPERATION_INVALID: StateError,
    libvirt.VIR_ERR_DEVICE_MISSING: NotAttachedError,
}


def translate_error(
    error: libvirt.libvirtError, domain: str, action: str
) -> HypervisorError:
    """Return our error for one of libvirt's, with its words and its code."""
    code = error.get_error_code()
    kind = _ERRORS.get(code, HypervisorError)
    words = error.get_error_message() or str(error)
    return kind(domain, action, f"{words} (libvirt error {code})")


class Connection:
    """One libvirt connection; make it with :meth:`open`."""

    def __init__(self, native: Any, *, kept: bool) -> None:
        self.native = native
        self._kept = kept
        self._threads = ThreadPoolExecutor(_THREADS, "libvirt")

    @classmethod
    async def open(cls, uri: str, *, keep: bool = False) -> Connection:
        """Connect to `uri` on the running event loop.

        :param keep: use one native connection per URI for the life of the process.
            An embedded driver needs that: libvirt registers the driver anew at each
            opening, and after twenty it has no room for more.
        :raise HypervisorError: when libvirt refuses.
        """
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        register_event_loop()
        if uri not in _kept:
            native = await cls._open_native(uri)
            if not keep:
                return cls(native, kept=False)
            _kept[uri] = native
        return cls(_kept[uri], kept=True)

    @staticmethod
    async def _open_native(uri: str) -> Any:
        try:
            return await asyncio.to_thread(libvirt.open, uri)
        except libvirt.libvirtError as error:
            raise translate_error(error, "", "connect to") from error

    async def call(
        self,
        domain: str,
        action: str,
        function: Callable[P, R],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Run a blocking libvirt function in a thread.

        :param domain: name of the domain that is concerned, for the error.
        :param action: what is tried, for the error: "start".
        :raise HypervisorError: what `translate_error` makes of libvirt's.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._threads, lambda: function(*args, **kwargs)
            )
        except libvirt.libvirtError as error:
            raise translate_error(error, domain, action) from error

    async def close(self) -> None:
        """Disconnect; calls under way end first."""
        await asyncio.to_thread(self._threads.shutdown)
        if self._kept:
            return
        try:
            await asyncio.to_thread(self.native.close)
        except libvirt.libvirtError as error:
            raise translate_error(error, "", "disconnect from") from error
