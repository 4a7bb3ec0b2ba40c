"""The folder of a frozen test: its files, and ``manifest.json``, which tells of them.

It holds all that it needs, and chooses no path: files have names of ours, images and
memory become those of VMs of the same names.  It may come from anybody, as a CI's
artefact does: what is read is bounded, and checked before any of it is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from qubes_itests.core.volume_content import BLOCK
from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from io import BufferedReader
    from pathlib import Path

__all__ = [
    "MANIFEST",
    "MOST_BYTES",
    "NAME",
    "BlockFile",
    "Folder",
    "FrozenDisk",
    "FrozenError",
    "FrozenInterface",
    "FrozenVM",
    "Image",
    "Kernel",
    "Link",
    "Manifest",
    "write_manifest",
]

#: Of the folder among the artefacts of a test.
NAME: Final = "frozen"
_FORMAT, _VERSION = "qubes_itests.frozen", 1
MANIFEST: Final = "manifest.json"
_APP: Final = "app.xml"
_BLOCKS: Final = "blocks"

#: Bytes of all files together, and of what the images hold.
MOST_BYTES: Final = 16 << 30
_MOST_DATA: Final = 64 << 30
#: Bytes of files that are read as a whole.
_MOST_READ: Final = {MANIFEST: 1 << 20, _APP: 16 << 20}
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
_DISK: Final = re.compile(r"xvd[a-z]")
#: A block of an image, and the one of the file `blocks` that it is.
_ENTRY: Final = struct.Struct("<QI")

_T = TypeVar("_T")


class FrozenError(HarnessError):
    """A folder cannot be thawed, or nothing be frozen into it."""

    exit_code = ExitCode.USAGE_ERROR


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
class _File:
    size: int
    digest: str


@dataclass(slots=True)
class Folder:
    """A folder that was checked; get it from `read`.

    :param path: of the folder.
    :param manifest: what it has.
    """

    path: Path
    manifest: Manifest
    _files: dict[str, _File] = field(default_factory=dict)

    def __str__(self) -> str:
        vms, spread = self.manifest.vms, ""
        if len(vms) > 1:
            spread = f", stopped within {self.manifest.spread:.1f} ms"
        size = sum(file.size for file in self._files.values())
        number = {0: "disks alone", 1: "1 VM"}.get(len(vms), f"{len(vms)} VMs")
        return f"{number}{spread}, {size >> 20} MiB"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return what a folder says that it has; nothing of that is looked at yet.

        :raise FrozenError: it is no such folder, or one that cannot be trusted.
        """
        try:
            row = _Row(json.loads(_read(path, MANIFEST)))
        except (ValueError, RecursionError) as error:
            raise FrozenError(
                f"{path / MANIFEST}: this is not JSON: {error}"
            ) from error
        try:
            row.text("format", re.compile(re.escape(_FORMAT)))
            row.number("version", _VERSION, _VERSION)
            return cls(path, _manifest(row), _files(row))
        except ValueError as error:
            raise FrozenError(f"{path / MANIFEST}: {safe_text(str(error))}") from None

    def require_whole(self) -> None:
        """Check that all files are what they were when they were written; blocking.

        :raise FrozenError: one of them is not, or there is one more.
        """
        # what reads a file may look for others beside it
        for each in self.path.iterdir():
            if each.name not in (MANIFEST, *self._files):
                raise FrozenError(f"{self.path}: {each.name!r} does not belong there")
        for name, expected in self._files.items():
            with self._open(name) as file:
                digest = _digest(file)
            if digest != expected.digest:
                raise FrozenError(f"{self.path / name}: its contents have changed")
        for image in self._images():
            for _ in self._entries(image):
                pass

    @property
    def memory(self) -> int:
        """Bytes of what the VMs have in their memory, all together."""
        names = {vm.state for vm in self.manifest.vms}
        return sum(self._files[name].size for name in names & self._files.keys())

    def file(self, name: str) -> Path:
        """Return the path of a file of the folder.

        :raise FrozenError: it has no regular file of that name and its size.
        """
        self._open(name).close()
        return self.path / name

    def app(self) -> bytes:
        """Return the document of the app."""
        self._open(_APP).close()
        return _read(self.path, _APP)

    def blocks(self, image: Image) -> Iterator[tuple[int, bytes]]:
        """Yield where the data of an image are, in bytes, and the data; blocking."""
        with self._open(_BLOCKS) as file:
            for place, number in self._entries(image):
                yield place, os.pread(file.fileno(), BLOCK, number * BLOCK)

    def _images(self) -> Iterator[Image]:
        for vm in self.manifest.vms:
            yield from (disk.image for disk in vm.disks)
        yield from (link.image for link in self.manifest.volumes)

    def _entries(self, image: Image) -> Iterator[tuple[int, int]]:
        there = self._files[_BLOCKS].size // BLOCK
        with self._open(image.file) as file:
            while data := file.read(_ENTRY.size):
                place, number = _ENTRY.unpack(data)
                if not (place * BLOCK < image.size and number < there):
                    raise FrozenError(
                        f"{self.path / image.file}: block {place} cannot be"
                    )
                yield place * BLOCK, number

    def _open(self, name: str) -> BufferedReader:
        expected = self._files.get(name)
        if expected is None:
            raise FrozenError(f"{self.path}: the manifest lists no file {name}")
        file = _opened(self.path, name)
        if os.fstat(file.fileno()).st_size != expected.size:
            file.close()
            raise FrozenError(f"{self.path / name}: expected {expected.size} bytes")
        return file


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Make a folder with all other files in it a frozen one; blocking.

    :raise OSError: as the operating system says.
    """
    files = {}
    for each in sorted(path.iterdir()):
        with each.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            files[each.name] = {"size": size, "digest": _digest(file)}
    head = {"format": _FORMAT, "version": _VERSION}
    text = json.dumps(head | dataclasses.asdict(manifest) | {"files": files}, indent=1)
    (path / MANIFEST).write_text(text, encoding="utf-8")


class BlockFile:
    """The contents of images, in which what several have is written once.

    :param path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = (path / _BLOCKS).open("xb")
        self._known: dict[bytes, int] = {}
        self._images = 0
        self._data = 0

    def add(self, size: int, blocks: Iterator[tuple[int, bytes]]) -> Image:
        """Add an image; blocking.

        :param size: bytes.
        :param blocks: where in it data are, in bytes, and the data.
        :raise FrozenError: there is too much in all of them.
        :raise OSError: as the operating system says.
        """
        self._images += 1
        name = f"image-{self._images}"
        with (self._path / name).open("xb") as file:
            for place, some in blocks:
                self._data += BLOCK
                if self._data > _MOST_DATA or self._file.tell() > MOST_BYTES:
                    most = f"{MOST_BYTES >> 30} GiB, {_MOST_DATA >> 30} GiB unpacked"
                    raise FrozenError(f"the disks are more than {most}")
                data = some.ljust(BLOCK, b"\0")
                key = hashlib.blake2b(data, digest_size=20).digest()
                number = self._known.setdefault(key, len(self._known))
                if number * BLOCK == self._file.tell():
                    self._file.write(data)
                file.write(_ENTRY.pack(place // BLOCK, number))
        return Image(name, size)

    def close(self) -> None:
        """Write what is not written yet."""
        self._file.close()


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
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) > _MOST_ITEMS:
            raise ValueError(f"expected a list as {name}, got {value!r:.60}")
        return tuple(_Row({name: item}).text(name) for item in value)

    def number(self, name: str, least: int, most: int) -> int:
        value = self.values.get(name)
        if type(value) is not int or not least <= value <= most:
            expected = f"a number from {least} to {most}"
            raise ValueError(f"expected {expected} as {name}, got {value!r:.60}")
        return value

    def seconds(self, name: str) -> float:
        value = self.values.get(name)
        if type(value) not in (int, float) or not 0 <= float(str(value)) < 1 << 40:
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
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) > _MOST_ITEMS:
            raise ValueError(f"expected a list as {name}, got {value!r:.60}")
        return tuple(read(_Row(item)) for item in value)

    def names(self) -> list[str]:
        if len(self.values) > _MOST_ITEMS:
            raise ValueError(f"expected up to {_MOST_ITEMS} members of an object")
        return list(self.values)


def _manifest(row: _Row) -> Manifest:
    machine = row.row("machine")
    return Manifest(
        test=row.text("test"),
        time=row.seconds("time"),
        spread=row.seconds("spread"),
        machine={name: machine.text(name) for name in machine.names()},
        kernels=row.all("kernels", _kernel),
        vms=row.all("vms", _vm),
        volumes=row.all("volumes", _link),
        policy=row.texts("policy"),
    )


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
    return FrozenInterface(
        mac=row.text("mac", _MAC),
        place=row.number("place", 1, 100),
        link=row.text("link"),
    )


def _link(row: _Row) -> Link:
    return Link(row.text("vm"), row.text("volume"), _image(row.row("image")))


def _image(row: _Row) -> Image:
    return Image(row.text("file", _FILE), row.number("size", 0, _LARGEST_DISK))


def _files(row: _Row) -> dict[str, _File]:
    files, total = row.row("files"), 0
    found = {}
    for name in files.names():
        if not _FILE.fullmatch(name):
            raise ValueError(f"expected a file of a frozen test, got {name!r:.60}")
        entry = files.row(name)
        found[name] = _File(
            entry.number("size", 0, MOST_BYTES), entry.text("digest", _DIGEST)
        )
        total += found[name].size
    if total > MOST_BYTES:
        raise ValueError(f"its files have more than {MOST_BYTES >> 30} GiB")
    if _BLOCKS not in found:
        raise ValueError("it has no images")
    return found


def _digest(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(folder: Path, name: str) -> BufferedReader:
    try:
        fd = os.open(
            folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        )
    except OSError as error:
        raise FrozenError(f"{folder / name}: {error.strerror}") from error
    file = os.fdopen(fd, "rb")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise FrozenError(f"{folder / name}: it is no regular file")
    return file


def _read(folder: Path, name: str) -> bytes:
    most = _MOST_READ[name]
    with _opened(folder, name) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise FrozenError(f"{folder / name}: it has more than {most} bytes")
    return data
