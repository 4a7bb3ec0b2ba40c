"""The names of a volume's files, and the volume ids they come from.

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
"""

from __future__ import annotations

import datetime as dt
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qubes_storage import files
from qubes_storage.exc import InvalidVidError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ParsedName", "Revision", "VolumeFiles", "check_vid", "parse_name"]

_SUFFIXES = ("-dirty", "-precache", "-import", "-origin", "-cow")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\Z", re.ASCII)
_MAX_PART = 128  # leaves room for what is appended, within the 255 bytes of a name
_PARTS = 3
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
_REVISION = re.compile(rf"\.(?P<number>[1-9]\d{{0,17}})@(?P<time>{_TIME})\Z", re.ASCII)
_OLD_REVISION = re.compile(rf"@(?P<time>{_TIME})\Z", re.ASCII)
_NAME = re.compile(
    rf"(?P<volume>[A-Za-z0-9_][A-Za-z0-9_.+-]*?)(?P<kind>{'|'.join(_SUFFIXES)})?\.img"
    rf"(?P<former>(?:\.[1-9]\d{{0,17}})?@{_TIME}|(?<=-cow\.img)\.old)?"
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

    :raise InvalidVidError: with the reason, for anything else.
    """
    if not isinstance(vid, str):
        raise InvalidVidError(repr(vid), "its id must be a string")
    parts = vid.split("/")
    if len(parts) != _PARTS:
        raise InvalidVidError(vid, "its id must be of the form prefix/vm/volume")
    for part in parts:
        _check_part(vid, part)
    if parts[-1].endswith(_SUFFIXES):
        reason = f"its name must not end in {' or '.join(_SUFFIXES)}"
        raise InvalidVidError(vid, reason)
    return vid


def _check_part(vid: str, part: str) -> None:
    if len(part) > _MAX_PART:
        reason = f"a part of its id is longer than {_MAX_PART} characters"
        raise InvalidVidError(vid, reason)
    if not _PART.match(part):
        reason = (
            f"{part!r} in its id must be letters, digits and _.+- only,"
            " and start with one of the first three"
        )
        raise InvalidVidError(vid, reason)


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


@dataclass(frozen=True, slots=True)
class VolumeFiles:
    """Where the files of one volume are.

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

    @property
    def clean(self) -> Path:
        """The committed image."""
        return self._named("")

    @property
    def dirty(self) -> Path:
        """The image of a running VM."""
        return self._named("-dirty")

    @property
    def precache(self) -> Path:
        """The clone that the next start may take."""
        return self._named("-precache")

    @property
    def imported(self) -> Path:
        """The import that is under way."""
        return self._named("-import")

    @property
    def origin(self) -> Path:
        """A second name of the image that a volume with both flags started from."""
        return self._named("-origin")

    def revision(self, revision: Revision) -> Path:
        """Return the file of a revision."""
        return self.directory / f"{self.clean.name}{revision.suffix}"

    def revisions(self) -> list[Revision]:
        """Return the revisions there are, oldest first.

        :raise OSError: when the directory cannot be read.
        """
        prefix = self.clean.name
        found = (
            _parse_revision(name[len(prefix) :])
            for name in self._names()
            if name.startswith(prefix)
        )
        return sorted(revision for revision in found if revision)

    def next_revision(self) -> Revision:
        """Return the revision that the present committed image would become."""
        numbers = [revision.number for revision in self.revisions()]
        written = self.clean.stat().st_mtime
        time = dt.datetime.fromtimestamp(int(written), dt.UTC)
        return Revision(max(numbers, default=0) + 1, time.strftime("%Y-%m-%dT%H:%M:%S"))

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


def _parse_revision(suffix: str) -> Revision | None:
    if match := _REVISION.match(suffix):
        return Revision(int(match["number"]), match["time"][:-1])
    if match := _OLD_REVISION.match(suffix):
        return Revision(0, match["time"][:-1])
    return None
