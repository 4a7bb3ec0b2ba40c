"""Who a VM is: what stage two of its start tells it."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.link.frames import pack_strings

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Identity"]

_SEED_BYTES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a VM is.

    :param name: the VM's name and host name.
    :param root: the disk that becomes ``/``, as in "xvda".
    :param private: the disk that becomes ``/rw``, an ext4 filesystem; None for none.
    :param volatile: the disk that becomes swap; None for none.
    :param root_mode: ``rw`` or ``ro``.
    :param default_user: who runs commands that name nobody.
    :param db: entries of its qubesdb by path.
    :param services: names of the enabled services, /run/qubes-service/NAME.
    :param init: who is process 1 when commands run: ``agent``, or ``systemd``, if the
        root has that.
    """

    name: str
    root: str
    private: str | None = None
    volatile: str | None = None
    root_mode: str = "rw"
    default_user: str = "user"
    db: Mapping[str, str] = field(default_factory=dict)
    services: tuple[str, ...] = ()
    init: str = "agent"

    @property
    def disks(self) -> tuple[str, ...]:
        """Names of the disks it needs."""
        return tuple(d for d in (self.root, self.private, self.volatile) if d)

    def payload(self, deadline: float) -> bytes:
        """Return the payload of ENTER, with the time of now and a fresh random seed.

        :param deadline: seconds that the disks may take to appear.
        :raise ValueError: when a value cannot be sent.
        """
        pairs = {
            "name": self.name,
            "root": self.root,
            "private": self.private,
            "volatile": self.volatile,
            "root-mode": self.root_mode,
            "default-user": self.default_user,
            "init": self.init,
            "deadline": str(max(1, int(deadline))),
            **{f"db:{path}": value for path, value in self.db.items()},
            **{f"service:{name}": "1" for name in self.services},
            "seed": secrets.token_hex(_SEED_BYTES),
            "time": str(time.time_ns()),
        }
        return pack_strings(f"{k}={v}" for k, v in pairs.items() if v is not None)
