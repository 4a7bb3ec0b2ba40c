"""Contract of a pool: a place where volumes live."""

from __future__ import annotations

import abc
import re
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qubes_storage.exc import (
    InvalidVolumeConfigError,
    StoragePoolException,
    VolumeNotFoundError,
)
from qubes_storage.layout import check_vid
from qubes_storage.volume import Volume, check_revisions_to_keep

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Pool", "VolumeOwner", "parse_bool"]

_VOLUME_KEYS = frozenset(
    {
        "name",
        "pool",
        "vid",
        "size",
        "rw",
        "save_on_stop",
        "snap_on_start",
        "source",
        "revisions_to_keep",
    }
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}\Z", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,9}\Z", re.ASCII)


class VolumeOwner(Protocol):
    """All that storage knows of a VM."""

    @property
    def name(self) -> str:
        """Name of the VM."""

    @property
    def dir_path_prefix(self) -> str:
        """Name of the directory for VMs of its kind, as in "appvms"."""


class Pool(abc.ABC):
    """A place where volumes live.

    :param name: name of the pool.
    :param revisions_to_keep: what its volumes have unless configured otherwise.
    :param ephemeral_volatile: whether volatile volumes must not outlive their stop.
    :raise StoragePoolException: for a value that makes no sense.
    """

    #: Name of the driver: its entry point in the group ``qubes.storage``.
    driver: ClassVar[str]
    #: Features, by the conformance suite's names, that the driver does not have.
    lacks: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        *,
        name: str,
        revisions_to_keep: int | str = 1,
        ephemeral_volatile: bool | str = False,
    ) -> None:
        if not isinstance(name, str) or not _NAME.match(name):
            raise StoragePoolException(
                f"pool {str(name)!r}: expected a name of 1 to 128 letters, digits and"
                " _.+-, not starting with .+-"
            )
        self.name = name
        keep: object = revisions_to_keep
        if isinstance(keep, str) and _NUMBER.match(keep):
            keep = int(keep)
        try:
            self.revisions_to_keep = check_revisions_to_keep(name, keep)
        except InvalidVolumeConfigError as error:
            raise StoragePoolException(f"pool {name!r}: {error.reason}") from None
        self.ephemeral_volatile = parse_bool(
            name, "ephemeral_volatile", ephemeral_volatile
        )
        self._volumes: dict[str, Volume] = {}
        #: The ids of volumes that were found to be there, and not removed since.
        self._found: set[str] = set()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        """Tell whether it is the other one, or has that name."""
        return self.name == other if isinstance(other, str) else self is other

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def config(self) -> dict[str, object]:
        """The keyword arguments that make this pool, and its driver's name."""
        return {
            "name": self.name,
            "driver": self.driver,
            "revisions_to_keep": self.revisions_to_keep,
            "ephemeral_volatile": self.ephemeral_volatile,
        }

    @property
    @abc.abstractmethod
    def size(self) -> int | None:
        """Bytes that it could hold; None where that has no meaning."""

    @property
    @abc.abstractmethod
    def usage(self) -> int | None:
        """Bytes in use; None where that has no meaning."""

    @property
    def usage_details(self) -> Mapping[str, int]:
        """What `size` and `usage` are made of, by the Admin API's names."""
        details = {"data_size": self.size, "data_usage": self.usage}
        return {name: value for name, value in details.items() if value is not None}

    @abc.abstractmethod
    async def setup(self) -> None:
        """Make the pool ready for use; no error when it is.

        :raise StoragePoolException: when it cannot be.
        """

    async def claim(self) -> None:  # noqa: B027 - a driver need not have it
        """Keep other owners out until `unclaim`, `destroy`, or the end of this process.

        An owner, as a server, makes and removes volumes by what it knows, and cannot
        share its pools with another.  Using volumes needs no claim.  A driver
        that cannot tell who uses its storage does nothing here.

        :raise StoragePoolException: when another owner has it.
        """

    def unclaim(self) -> None:  # noqa: B027 - as above
        """Undo `claim`; no error when there was none."""

    async def find_volumes(self) -> list[str]:
        """Return the ids of the volumes that have an image, no matter who made them.

        A driver that `setup` does not find volumes with knows those of `init_volume`.

        :raise StoragePoolException: when the pool cannot be read.
        """
        return list(self._volumes)

    @abc.abstractmethod
    async def destroy(self) -> None:
        """Forget the pool.  What its volumes hold stays."""

    @abc.abstractmethod
    def included_in(self, pools: Iterable[Pool]) -> Pool | None:
        """Return the pool among `pools` that this one takes its space from."""

    @abc.abstractmethod
    def _make_volume(self, **config: Any) -> Volume:
        """Make a volume object of the driver's class."""

    def init_volume(
        self, vm: VolumeOwner | None, volume_config: Mapping[str, Any]
    ) -> Volume:
        """Make the object of a volume; its images are made by `Volume.create`.

        :param vm: whose volume it is; may be None if the configuration has a ``vid``.
        :param volume_config: ``name`` and the flags that `Volume` explains; ``vid``
            is made of the VM's prefix and name unless given; ``source`` is a volume
            or the id of one of this pool.
        :raise InvalidVolumeConfigError: for what cannot be.
        :raise VolumeNotFoundError: for a source that this pool does not know.
        """
        config = dict(volume_config)
        vid = config.get("vid")
        if not vid:
            name = config.get("name")
            if vm is None:
                reason = "neither a VM nor a vid is given"
                raise InvalidVolumeConfigError(str(name), reason)
            vid = f"{vm.dir_path_prefix}/{vm.name}/{name}"
        config["vid"] = check_vid(vid)
        if unknown := sorted(set(config) - _VOLUME_KEYS):
            reason = f"unknown keys in its configuration: {', '.join(unknown)}"
            raise InvalidVolumeConfigError(vid, reason)
        if not isinstance(config.get("name"), str):
            raise InvalidVolumeConfigError(vid, "its configuration lacks a name")
        if config.pop("pool", self) not in (self, self.name):
            reason = f"it is configured for another pool, {volume_config['pool']}"
            raise InvalidVolumeConfigError(vid, reason)
        if isinstance(config.get("source"), str):
            config["source"] = self.get_volume(config["source"])
        volume = self._make_volume(**config)
        self._volumes[volume.vid] = volume
        return volume

    def get_volume(self, vid: str) -> Volume:
        """Return the volume of that id.

        One that only `setup` found is read-only until `init_volume` says what it is.

        :raise VolumeNotFoundError: when neither knows it.
        """
        try:
            return self._volumes[vid]
        except KeyError:
            reason = "there is none of that id"
            raise VolumeNotFoundError(self.name, vid, "find", reason) from None

    def list_volumes(self) -> list[Volume]:
        """Return the volumes that `setup` found, and those of `init_volume`."""
        return list(self._volumes.values())

    def unbind(self, volume: Volume) -> None:
        """Undo `init_volume`; nothing happens on disk.

        What was found under that id is known again as what was found.
        """
        if self._volumes.get(volume.vid) is not volume:
            return
        del self._volumes[volume.vid]
        if volume.vid in self._found:
            self._make_found(volume.vid)

    def _make_found(self, vid: str) -> None:
        self._found.add(vid)
        # Nothing that is done to a read-only volume, but its removal, can lose data.
        self._volumes[vid] = self._make_volume(vid=vid, name=vid.rpartition("/")[2])


def parse_bool(pool: str, option: str, value: bool | str) -> bool:
    """Return the value of a pool's option that is yes or no.

    :raise StoragePoolException: for anything else.
    """
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    if word in ("yes", "true", "1"):
        return True
    if word in ("no", "false", "0"):
        return False
    raise StoragePoolException(
        f"pool {pool!r}: expected yes or no for {option}, got {value!r}"
    )
