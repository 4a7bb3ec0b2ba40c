"""Tokens that stand for a volume to be cloned: given out once, good for once."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import ProtocolError

if TYPE_CHECKING:
    import uuid

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.storage import Volume

__all__ = ["CloneTokens"]

_LENGTH: Final = 32
_LETTERS: Final = string.ascii_letters + string.digits
#: Beyond that many, the oldest is good no more.
_MOST: Final = 1024


@dataclass(frozen=True, slots=True)
class _Source:
    vm: uuid.UUID
    volume: Volume


class CloneTokens:
    """The tokens of an app that are not yet used."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}

    def give(self, vm: uuid.UUID, volume: Volume) -> str:
        """Return a token for a volume of a VM."""
        token = "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))
        self._sources[token] = _Source(vm, volume)
        if len(self._sources) > _MOST:
            del self._sources[next(iter(self._sources))]
        return token

    def check(self, token: str) -> str:
        """Return the token; ProtocolError when it is none that may be taken."""
        if token not in self._sources:
            raise ProtocolError("the token is unknown, or was used already")
        return token

    def take(self, app: Qubes, token: str) -> Volume:
        """Return the volume of a token, which is good no more from now on.

        :raise ProtocolError: when the token is unknown, or the volume or its pool gone.
        """
        self.check(token)
        # at once: two clones at a time must not both have it, nor one that fails again
        source = self._sources.pop(token)
        vm, volume = app.domains.get(source.vm), source.volume
        if vm is None or vm.volumes.get(volume.name) is not volume:
            raise ProtocolError("the volume that the token stands for is gone")
        if app.pools.get(volume.pool.name) is not volume.pool:
            raise ProtocolError("the pool of the token's volume is gone")
        return source.volume
