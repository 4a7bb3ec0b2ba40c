"""Errors of storage.

::

    QubesException, the base of what may be shown to users
     +-- StoragePoolException               has no more to say than its text
          +-- DriverNotFoundError           no driver of that name is installed
          +-- InvalidVolumeConfigError      of a volume: it makes no sense
          +-- VolumeError                   one volume; has pool, vid, action, reason
               +-- VolumeNotFoundError        no such volume, image or revision
               +-- VolumeExistsError          there is one already
               +-- VolumeStateError           it is started, dirty, importing, or not so
               +-- InvalidSizeError           a size it cannot have, or did not get

When an operation on a volume raises, the volume is as it was before, and the
operation can be repeated once its cause is gone.  What the operating system refused is
a `VolumeError` whose ``__cause__`` is the OSError.
"""

from __future__ import annotations

__all__ = [
    "DriverNotFoundError",
    "InvalidSizeError",
    "InvalidVolumeConfigError",
    "QubesException",
    "StoragePoolException",
    "VolumeError",
    "VolumeExistsError",
    "VolumeNotFoundError",
    "VolumeStateError",
    "system_reason",
]


class QubesException(Exception):  # noqa: N818 - the name Qubes gives it
    """The base of all errors of Qubes OS that may be shown to users.

    Those of storage are some of them, and what handles the others handles these.  Who
    has more of them derives them from this class.
    """


class StoragePoolException(QubesException):
    """The base of everything that storage raises on purpose."""


class DriverNotFoundError(StoragePoolException):
    """No storage driver of that name is installed.

    :param driver: the name that was asked for.
    :param known: names of the drivers that are installed.
    """

    def __init__(self, driver: str, known: tuple[str, ...]) -> None:
        super().__init__(
            f"no storage driver {driver!r}; installed: {', '.join(known) or 'none'}"
        )
        self.driver = driver
        self.known = known


class InvalidVolumeConfigError(StoragePoolException, ValueError):
    """The configuration of a volume makes no sense.

    :param subject: the volume id, or as much of it as is known.
    :param reason: what is wrong with it.
    """

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"volume {subject!r}: {reason}")
        self.subject = subject
        self.reason = reason


class VolumeError(StoragePoolException):
    """An operation on a volume failed and left the volume as it was.

    :param pool: name of its pool.
    :param vid: id of the volume.
    :param action: the operation, as in "start".
    :param reason: why it failed.
    """

    def __init__(self, pool: str, vid: str, action: str, reason: str) -> None:
        super().__init__(f"cannot {action} volume {vid!r} of pool {pool!r}: {reason}")
        self.pool = pool
        self.vid = vid
        self.action = action
        self.reason = reason


class VolumeNotFoundError(VolumeError, LookupError):
    """There is no such volume, it has no image yet, or no such revision."""


class VolumeExistsError(VolumeError):
    """There is a volume of that id already."""


class VolumeStateError(VolumeError):
    """The volume is in another state than the operation needs."""


class InvalidSizeError(VolumeError, ValueError):
    """The volume cannot have that size, or an import has another than declared."""


def system_reason(error: OSError) -> str:
    """Return what the operating system says of a call, and about which file."""
    reason = error.strerror or str(error)
    names = [
        str(each) for each in (error.filename, error.filename2) if each is not None
    ]
    return f"{reason}: {' and '.join(names)}" if names else reason
