"""Content of volumes that comes as a stream, of any size."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Final

from qubes_itests.admin.dispatch import EXPECTED_ERRORS, error_name, save
from qubes_itests.admin.protocol import encode_exception, encode_reply
from qubes_itests.core.exc import ProtocolError, QubesVMNotFoundError
from qubes_itests.core.vm.qubesvm import QubesVM

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.storage import Storage, Volume

__all__ = ["METHODS", "import_volume"]

log = logging.getLogger("qubes_itests.serve")

_WITH_SIZE: Final = "admin.vm.volume.ImportWithSize"
#: The methods that are done here.
METHODS: Final = ("admin.vm.volume.Import", _WITH_SIZE)

_LONGEST_SIZE: Final = 19


async def import_volume(
    app: Qubes, vm: str, volume: str, method: str, stream: AsyncIterator[bytes]
) -> bytes:
    """Replace the content of a volume, and return the reply of the Admin API.

    :param app: where the VM is.
    :param vm: its name.
    :param volume: the volume's.
    :param method: one of `METHODS`.
    :param stream: the payload.
    """
    try:
        storage, target = _target(app, vm, volume, method)
        payload = _Payload(stream)
        size = await payload.size() if method == _WITH_SIZE else target.size
        await storage.import_content(target, size, payload.rest(size))
        await save(app)
    except EXPECTED_ERRORS as error:
        return encode_exception(error_name(error), str(error))
    except ConnectionError:
        # who sent it is gone
        raise
    except Exception as error:  # noqa: BLE001 - logged, and the client told
        log.error("%s failed:\n%s", method, traceback.format_exc())  # noqa: TRY400
        kind = type(error).__name__
        return encode_exception(
            "QubesException",
            f"{method} failed unexpectedly ({kind}); the server's log says more",
        )
    return encode_reply("")


def _target(app: Qubes, name: str, volume: str, method: str) -> tuple[Storage, Volume]:
    vm = app.domains.get(name)
    if vm is None:
        raise QubesVMNotFoundError(name)
    if not isinstance(vm, QubesVM) or method not in METHODS or volume not in vm.volumes:
        raise ProtocolError(f"{method} has no volume {volume!r} of {name} to fill")
    app.domains["dom0"].fire_event(
        f"admin-permission:{method}", pre_event=True, dest=vm, arg=volume
    )
    return vm.storage, vm.volumes[volume]


class _Payload:
    """A stream of bytes, with its first line to be read before."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self._held = b""

    async def size(self) -> int:
        """Take the first line, a number of bytes; ProtocolError if it is none."""
        while b"\n" not in self._held and len(self._held) <= _LONGEST_SIZE:
            data = await anext(self._stream, b"")
            self._held += data
            if not data:
                break
        line, _, self._held = self._held.partition(b"\n")
        text = line.decode("ascii", "replace")
        if not text.isdecimal() or len(text) > _LONGEST_SIZE or text != str(int(text)):
            got = text[:_LONGEST_SIZE]
            raise ProtocolError(f"expected a number of bytes and LF, got {got!r}")
        return int(text)

    async def rest(self, size: int) -> AsyncIterator[bytes]:
        """Yield what follows; ProtocolError unless it is that many bytes."""
        data: bytes | None = self._held
        length = 0
        while data is not None:
            length += len(data)
            if length > size:
                break
            yield data
            data = await anext(self._stream, None)
        if length != size:
            word = "more" if length > size else f"{length}"
            raise ProtocolError(
                f"the data has {word} bytes, the volume is to have {size}"
            )
