"""Layout of a pool's directory: the names of files, revisions, commits.

The files of the volume ``appvms/foo/private`` are, in ``appvms/foo`` of its pool::

    private.img                             the committed image; never written again
    private-dirty.img                       what a running VM writes
    private-precache.img                    a clone of private.img for the next start
    private-import.img                      an import that is under way
    private-origin.img                      the source's image it was started from
    private.img.7@2018-01-02T03:04:05Z      revision 7, as we write it
    private.img@2018-01-02T03:04:05Z        a revision, as older releases wrote it
    private…~0123abcd                       in the making, or left of a crash
    private…~0123abcd.removed               only waits for its removal
    private-cow.img, private-cow.img.old    left of a driver that had the tree before

A committed image is never written again, under any of its names.  So a revision is made
by a hard link and a commit by a rename, in this order.  There is a committed image at
any time (rename(2) replaces atomically), and what a crash leaves in between can be
told: the latest revision *is* the committed image then.  The other way round, a crash
in between would lose the former image.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qubes_storage import files
from qubes_storage.exc import InvalidVolumeConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "FoundVolume",
    "ParsedName",
    "Revision",
    "VolumeFiles",
    "check_vid",
    "find_volumes",
    "parse_name",
]

_SUFFIXES = ("-dirty", "-precache", "-import", "-origin", "-cow")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\Z", re.ASCII)
_MAX_PART = 128  # leaves room for what is appended, within the 255 bytes of a name
_PARTS = 3
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"
_FORMER = rf"(?:\.(?P<number>[1-9]\d{{0,17}}))?@(?P<time>{_TIME})Z"
_REVISION = re.compile(rf"{_FORMER}\Z", re.ASCII)
_NAME = re.compile(
    rf"(?P<volume>[A-Za-z0-9_][A-Za-z0-9_.+-]*?)(?P<kind>{'|'.join(_SUFFIXES)})?\.img"
    rf"(?P<former>{_FORMER}|(?<=-cow\.img)\.old)?"
    r"(?P<left>~[0-9a-f]{8}(?:\.removed)?)?\Z",
    re.ASCII,
)
_LEFT = frozenset({"-import", "-cow"})


@dataclass(frozen=True, slots=True)
class ParsedName:
    """What the name of a file tells.

    :param volume: name of the volume that it belongs to.
    :param is_image: whether it shows that the volume exists.
    :param is_left: whether an operation, or another driver, may have left it.
    """

    volume: str
    is_image: bool
    is_left: bool


def parse_name(name: str) -> ParsedName | None:
    """Return what a file's name tells, None when it is not a volume's file."""
    match = _NAME.match(name)
    if match is None or len(match["volume"]) > _MAX_PART:
        return None
    is_left = bool(match["left"]) or match["kind"] in _LEFT
    is_image = match["kind"] in {None, "-dirty"} and not (is_left or match["former"])
    return ParsedName(match["volume"], is_image, is_left)


def check_vid(vid: object) -> str:
    """Return a volume id that has the form ``prefix/vm/volume``.

    :raise InvalidVolumeConfigError: with the reason, for anything else.
    """
    if not isinstance(vid, str):
        raise InvalidVolumeConfigError(repr(vid), "expected a string as its id")
    parts = vid.split("/")
    if len(parts) != _PARTS:
        raise InvalidVolumeConfigError(
            vid, "expected an id of the form prefix/vm/volume"
        )
    for part in parts:
        if len(part) > _MAX_PART:
            reason = f"a part of its id is longer than {_MAX_PART} characters"
            raise InvalidVolumeConfigError(vid, reason)
        if not _PART.match(part):
            reason = (
                f"{part!r} in its id must be letters, digits and _.+- only,"
                " and start with one of the first three"
            )
            raise InvalidVolumeConfigError(vid, reason)
    if parts[-1].endswith(_SUFFIXES):
        reason = f"its name must not end in {' or '.join(_SUFFIXES)}"
        raise InvalidVolumeConfigError(vid, reason)
    return vid


@dataclass(frozen=True, order=True, slots=True)
class Revision:
    """A former committed image; revisions compare in chronological order.

    :param number: counts up with every commit; 0 for those of older releases, which
        are older than all others.
    :param time: when its content was last written, UTC, as ISO 8601 without zone.
    """

    number: int
    time: str

    @property
    def id(self) -> str:
        """What people and the Admin API call it."""
        return f"{self.number}@{self.time}Z" if self.number else f"{self.time}Z"

    @property
    def suffix(self) -> str:
        """What its file's name has after the name of the committed image."""
        return f".{self.id}" if self.number else f"@{self.id}"


@dataclass(frozen=True)
class VolumeFiles:
    """Where the files of one volume are.

    Their paths are kept: a save of the app looks at those of all volumes.

    :param directory: directory of the VM.
    :param name: the last part of the volume id.
    """

    directory: Path
    name: str

    @classmethod
    def of(cls, pool_directory: Path, vid: str) -> VolumeFiles:
        """Return the files of the volume `vid` of a pool."""
        path = pool_directory / vid
        return cls(path.parent, path.name)

    @functools.cached_property
    def clean(self) -> Path:
        """The committed image."""
        return self._named("")

    @functools.cached_property
    def dirty(self) -> Path:
        """The image of a running VM."""
        return self._named("-dirty")

    @functools.cached_property
    def precache(self) -> Path:
        """The clone that the next start may take."""
        return self._named("-precache")

    @functools.cached_property
    def imported(self) -> Path:
        """The import that is under way."""
        return self._named("-import")

    @functools.cached_property
    def origin(self) -> Path:
        """A second name of the image that a volume with both flags started from."""
        return self._named("-origin")

    def revision(self, revision: Revision) -> Path:
        """Return the file of a revision."""
        return self.directory / f"{self.clean.name}{revision.suffix}"

    def revisions(self) -> list[Revision]:
        """Return the revisions, oldest first.

        :raise OSError: when the directory cannot be read.
        """
        if not self.has_image():
            return []  # what is there was left of an interrupted removal
        linked = self.linked_revisions()
        return linked[:-1] if self._is_committed(linked) else linked

    def has_image(self) -> bool:
        """Tell whether the volume exists: it has a committed image, or is running."""
        images = (self.clean, self.dirty)
        return any(files.stat_image(path) is not None for path in images)

    def linked_revisions(self) -> list[Revision]:
        """Return all that have a revision's name, that of an interrupted commit too.

        :raise OSError: when the directory cannot be read.
        """
        found = []
        for name in self._names():
            if name.startswith(self.clean.name):
                suffix = name.removeprefix(self.clean.name)
                if match := _REVISION.match(suffix):
                    found.append(Revision(int(match["number"] or 0), match["time"]))
        return sorted(found)

    def commit(self, image: Path, keep: int) -> None:
        """Make `image`, which is on the disk under another name, the committed one.

        Blocking, and to be called under the volume's lock.  The image's contents come
        first, by an fsync of its caller: a rename orders nothing, and a name that gets
        to the disk before them would make an empty file the committed image.

        :param keep: how many revisions are left afterwards, the present one included.
        :raise OSError: the present image is still the committed one then.
        """
        self._keep_present(keep)
        files.rename(image, self.clean)
        self._prune(keep)

    def revert(self, revision: Revision, keep: int) -> None:
        """Make a revision the committed image; as `commit`.

        :param keep: as for `commit`.
        :raise OSError: the present image is still the committed one then.
        """
        image = self.revision(revision)
        if files.same_image(image, self.clean):
            return
        self._keep_present(keep)
        files.replace_with_link(image, self.clean)
        self._prune(keep)

    def _keep_present(self, keep: int) -> None:
        # A clone of the present image must not survive it as that of the next one: it
        # is recognised by size and time, and those of the next may be the same.
        files.give_up(self.precache)
        if files.stat_image(self.clean) is None:
            return
        if keep < 1:
            # The rename over its last name would free it there and then, which takes
            # as long as to clone it.
            files.link(self.clean, files.given_up_name(self.clean))
            return
        linked = self.linked_revisions()
        if not self._is_committed(linked):
            written = self.clean.stat().st_mtime
            time = dt.datetime.fromtimestamp(int(written), dt.UTC)
            number = max((revision.number for revision in linked), default=0) + 1
            new = Revision(number, time.strftime("%Y-%m-%dT%H:%M:%S"))
            # No fsync of its own: the filesystems log what happens to a directory in
            # order, so a power cut leaves neither, the link (as a crash does), or both.
            files.link(self.clean, self.revision(new))

    def _is_committed(self, revisions: list[Revision]) -> bool:
        # The latest revision is the committed image itself only if a crash came
        # between the link and the rename.
        return bool(revisions) and files.same_image(
            self.revision(revisions[-1]), self.clean
        )

    def _prune(self, keep: int) -> None:
        # All is committed: a surplus revision is no reason to say it failed.
        with contextlib.suppress(OSError):
            revisions = self.revisions()
            surplus = len(revisions) - max(0, keep)
            for revision in revisions[: max(0, surplus)]:
                files.give_up(self.revision(revision))

    def leftovers(self) -> list[Path]:
        """Return the files that interrupted operations, or another driver, left."""
        return [path for path in self._left() if not files.GIVEN_UP.search(path.name)]

    def given_up(self) -> list[Path]:
        """Return the files that only wait for their removal."""
        return [path for path in self._left() if files.GIVEN_UP.search(path.name)]

    def _left(self) -> list[Path]:
        parsed = ((name, parse_name(name)) for name in self._names())
        return [
            self.directory / name
            for name, found in parsed
            if found and found.volume == self.name and found.is_left
        ]

    def _named(self, suffix: str) -> Path:
        return self.directory / f"{self.name}{suffix}.img"

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.directory)  # noqa: PTH208 - names are all it takes
        except FileNotFoundError:
            return []


@dataclass(frozen=True, slots=True)
class FoundVolume:
    """A volume that has files.

    :param vid: its id.
    :param has_image: whether it has an image, and not only leftovers.
    :param has_leftovers: whether something of it is left to be removed.
    """

    vid: str
    has_image: bool
    has_leftovers: bool


def find_volumes(directory: Path) -> Iterator[FoundVolume]:
    """Yield the volumes that have files in a pool's directory.

    :raise OSError: when a directory cannot be read.
    """
    for prefix in _directories(directory):
        for vm in _directories(prefix.path):
            yield from _volumes(f"{prefix.name}/{vm.name}", vm.path)


def _directories(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return [entry for entry in entries if entry.is_dir()]


def _volumes(vm: str, path: str) -> Iterator[FoundVolume]:
    images: set[str] = set()
    left: set[str] = set()
    for name in os.listdir(path):  # noqa: PTH208 - 10,000 of them, for their names
        if parsed := parse_name(name):
            if parsed.is_image:
                images.add(parsed.volume)
            if parsed.is_left:
                left.add(parsed.volume)
    for volume in sorted(images | left):
        with contextlib.suppress(InvalidVolumeConfigError):
            vid = check_vid(f"{vm}/{volume}")
            yield FoundVolume(vid, volume in images, volume in left)
