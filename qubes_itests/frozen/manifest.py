"""The manifest of a frozen test: what it says, and how it is read.

It may come from anybody: nothing in it is a path, numbers and texts are bounded, and
what is not as it should be is refused as a whole.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qubes_itests.core.network.addresses import DOWNLINK_MAC

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "BLOCKS",
    "MOST_BYTES",
    "File",
    "FrozenDisk",
    "FrozenInterface",
    "FrozenVM",
    "Image",
    "Kernel",
    "Link",
    "Manifest",
    "dump",
    "load",
]

_FORMAT, _VERSION = "qubes_itests.frozen", 1
#: The file with the contents of all images.
BLOCKS: Final = "blocks"
#: Bytes of all files together.
MOST_BYTES: Final = 16 << 30
#: Of VMs, of images, and of other things in a list.
_MOST_ITEMS: Final = 1000
#: Bytes that a disk may have, and MiB that a VM may.
_LARGEST_DISK: Final = 1 << 50
_MOST_MEMORY: Final = 1 << 24
_MOST_CPUS: Final = 64
_LONGEST: Final = 4096

_FILE: Final = re.compile(
    r"(?:memory|image|kernel|initramfs)-[0-9]{1,5}|blocks|app\.xml"
)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_MAC: Final = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
#: The one of an interface towards clients.
_DOWN: Final = re.compile(DOWNLINK_MAC)
_LINK: Final = re.compile("up|down|")
_DISK: Final = re.compile(r"xvd[a-z]")
#: Seconds since the epoch, which are in the year 6325: dates end with 9999.
_LATEST: Final = 1 << 37

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Image:
    """A disk's contents.

    :param file: says which blocks they are.
    :param size: bytes.
    """

    file: str
    size: int


@dataclass(frozen=True, slots=True)
class FrozenDisk:
    """A disk of a domain.

    :param name: ``xvda`` …
    :param volume: of the VM; empty for a disk that is none.
    :param image: its contents at the moment.
    :param read_only: for the guest.
    """

    name: str
    volume: str
    image: Image
    read_only: bool


@dataclass(frozen=True, slots=True)
class FrozenInterface:
    """An interface of a domain.

    :param mac: its address.
    :param place: in the machine, from 1 on.
    :param link: what it connects: ``up`` to the net VM, ``down`` to clients, or
        nothing.
    """

    mac: str
    place: int
    link: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """What VMs can boot.

    :param name: as the property `kernel` has it.
    :param kernel: the file.
    :param initramfs: the file.
    :param options: of its command line.
    :param init: as of a template.
    """

    name: str
    kernel: str
    initramfs: str
    options: str
    init: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenVM:
    """A VM that was started.

    :param name: of the VM.
    :param running: whether its virtual CPUs ran, until all were paused.
    :param state: the file with its memory.
    :param memory: MiB at its start; `max_memory`, `vcpus` and `balanced` are as its
        domain has them, too.
    :param kernel: the name of what it booted; empty for its own disk.
    :param options: of the kernel's command line.
    """

    name: str
    running: bool
    state: str
    memory: int
    max_memory: int
    vcpus: int
    balanced: bool
    kernel: str
    options: str
    disks: tuple[FrozenDisk, ...]
    interfaces: tuple[FrozenInterface, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """A committed image of a volume, of a VM that runs or not.

    :param vm: its name.
    :param volume: its name.
    :param image: the contents.
    """

    vm: str
    volume: str
    image: Image


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a folder has.

    :param test: the id of the test.
    :param time: seconds since the epoch, of the moment.
    :param spread: milliseconds that lie at most between the stops of two of the VMs.
    :param machine: what must be the same where it is thawed, by words for it.
    :param kernels: of the app.
    :param vms: those that were started.
    :param volumes: what the volumes of all VMs begin with.
    :param policy: the rules, one a line.
    """

    test: str
    time: float
    spread: float
    machine: Mapping[str, str]
    kernels: tuple[Kernel, ...]
    vms: tuple[FrozenVM, ...]
    volumes: tuple[Link, ...]
    policy: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class File:
    """A file of the folder.

    :param size: bytes.
    :param digest: SHA-256 of its contents, in hexadecimal digits.
    """

    size: int
    digest: str


def dump(manifest: Manifest, files: Mapping[str, File]) -> str:
    """Return a manifest as text.

    :param files: of the folder, by name.
    """
    head = {"format": _FORMAT, "version": _VERSION}
    listed = {name: dataclasses.asdict(file) for name, file in files.items()}
    return json.dumps(head | dataclasses.asdict(manifest) | {"files": listed}, indent=1)


def load(data: bytes) -> tuple[Manifest, dict[str, File]]:
    """Return a manifest, and the files of its folder by name.

    :raise ValueError: it is none, or cannot be trusted; RecursionError likewise.
    """
    row = _Row(json.loads(data))
    row.text("format", re.compile(re.escape(_FORMAT)))
    row.number("version", _VERSION, _VERSION)
    machine = row.row("machine")
    manifest = Manifest(
        test=row.text("test"),
        time=row.seconds("time"),
        spread=row.seconds("spread"),
        machine={name: machine.text(name) for name in machine.names()},
        kernels=row.all("kernels", _kernel),
        vms=row.all("vms", _vm),
        volumes=row.all("volumes", _link),
        policy=row.texts("policy"),
    )
    return manifest, _files(row)


class _Row:
    """An object of JSON, of which nothing is taken for granted.

    Its methods raise ValueError for what is not as it should be.
    """

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {value!r:.60}")  # noqa: TRY004
        self.values: dict[str, Any] = value

    def text(self, name: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.values.get(name)
        fits = isinstance(value, str) and len(value) <= _LONGEST and value.isprintable()
        if not fits or (pattern is not None and not pattern.fullmatch(str(value))):
            raise ValueError(f"expected a fitting text as {name}, got {value!r:.60}")
        return str(value)

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(_Row({name: item}).text(name) for item in self._items(name))

    def number(self, name: str, least: int, most: int) -> int:
        value = self.values.get(name)
        if type(value) is not int or not least <= value <= most:
            expected = f"a number from {least} to {most}"
            raise ValueError(f"expected {expected} as {name}, got {value!r:.60}")
        return value

    def seconds(self, name: str) -> float:
        value = self.values.get(name)
        if type(value) not in (int, float) or not 0 <= float(str(value)) < _LATEST:
            raise ValueError(f"expected a number as {name}, got {value!r:.60}")
        return float(str(value))

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise ValueError(f"expected yes or no as {name}, got {value!r:.60}")  # noqa: TRY004
        return value

    def row(self, name: str) -> _Row:
        return _Row(self.values.get(name))

    def all(self, name: str, read: Callable[[_Row], _T]) -> tuple[_T, ...]:
        return tuple(read(_Row(item)) for item in self._items(name))

    def _items(self, name: str) -> list[object]:
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) > _MOST_ITEMS:
            raise ValueError(f"expected a list as {name}, got {value!r:.60}")
        return value

    def names(self) -> list[str]:
        if len(self.values) > _MOST_ITEMS:
            raise ValueError(f"expected up to {_MOST_ITEMS} members of an object")
        return [_Row({"a name": name}).text("a name") for name in self.values]


def _kernel(row: _Row) -> Kernel:
    return Kernel(
        name=row.text("name"),
        kernel=row.text("kernel", _FILE),
        initramfs=row.text("initramfs", _FILE),
        options=row.text("options"),
        init=row.text("init"),
    )


def _vm(row: _Row) -> FrozenVM:
    most = row.number("max_memory", 1, _MOST_MEMORY)
    return FrozenVM(
        name=row.text("name"),
        running=row.flag("running"),
        state=row.text("state", _FILE),
        memory=row.number("memory", 1, most),
        max_memory=most,
        vcpus=row.number("vcpus", 1, _MOST_CPUS),
        balanced=row.flag("balanced"),
        kernel=row.text("kernel"),
        options=row.text("options"),
        disks=row.all("disks", _disk),
        interfaces=row.all("interfaces", _interface),
    )


def _disk(row: _Row) -> FrozenDisk:
    return FrozenDisk(
        name=row.text("name", _DISK),
        volume=row.text("volume"),
        image=_image(row.row("image")),
        read_only=row.flag("read_only"),
    )


def _interface(row: _Row) -> FrozenInterface:
    link = row.text("link", _LINK)
    return FrozenInterface(
        mac=row.text("mac", _DOWN if link == "down" else _MAC),
        place=row.number("place", 1, 100),
        link=link,
    )


def _link(row: _Row) -> Link:
    return Link(row.text("vm"), row.text("volume"), _image(row.row("image")))


def _image(row: _Row) -> Image:
    return Image(row.text("file", _FILE), row.number("size", 0, _LARGEST_DISK))


def _files(row: _Row) -> dict[str, File]:
    files, total = row.row("files"), 0
    found = {}
    for name in files.names():
        if not _FILE.fullmatch(name):
            raise ValueError(f"expected a file of a frozen test, got {name!r:.60}")
        entry = files.row(name)
        found[name] = File(
            entry.number("size", 0, MOST_BYTES), entry.text("digest", _DIGEST)
        )
        total += found[name].size
    if total > MOST_BYTES:
        raise ValueError(f"its files have more than {MOST_BYTES >> 30} GiB")
    if BLOCKS not in found:
        raise ValueError("it has no images")
    return found
