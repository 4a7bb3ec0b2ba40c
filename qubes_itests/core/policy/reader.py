"""Reading the files of a policy, in the current format and in that of Qubes OS 4.0."""

from __future__ import annotations

import contextlib
import errno
import logging
import os.path
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.policy.policy_errors import PolicyFileError, PolicySyntaxError
from qubes_itests.core.policy.rule import Origin, Rule, check_service

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["Reader", "Stamp", "stamp_of"]

log = logging.getLogger("qubes.policy")

_FILE_NAME: Final = re.compile(r"[0-9a-z_.-]+")
_LEGACY_NAME: Final = re.compile(r"([A-Za-z0-9_.-]+)(\+[A-Za-z0-9_.+-]*)?")
_LEGACY_INCLUDE: Final = re.compile(r"(?:!include\s+|\$include:\s*)(\S+)")
#: What packages and editors leave beside a file.
_LEGACY_IGNORED: Final = (".rpmsave", ".rpmnew", ".swp")
#: Files that include each other twice over would be read without end.
_MOST_FILES: Final = 1000
#: Errors of a path that leads to nothing.
_NO_FILE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
#: Directives, and how many words they take.
_DIRECTIVES: Final = {
    "!include": 1,
    "!include-dir": 1,
    "!include-service": 3,
    "!compat-4.0": 0,
}


@dataclass(frozen=True, slots=True)
class Stamp:
    """By what one sees that a file or a directory is another one, or has changed.

    :param inode: its number.
    :param size: in bytes.
    :param changed: time of the last change of its data or attributes, in ns.
    """

    inode: int
    size: int
    changed: int


def stamp_of(path: Path) -> Stamp | None:
    """Return the stamp of what is there, None if nothing is."""
    try:
        found = path.stat()
    except OSError:
        return None
    return Stamp(found.st_ino, found.st_size, found.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class _Line:
    """One line that is neither empty nor a comment."""

    text: str
    origin: Origin

    def wrong(self, reason: str) -> PolicySyntaxError:
        return PolicySyntaxError(self.text, reason, self.origin)


@dataclass(frozen=True, slots=True)
class _For:
    """What the rules of a file in the older format are for.

    :param service: of each of them.
    :param argument: likewise.
    :param base: what paths in the file are relative to.
    """

    service: str
    argument: str
    base: Path


class Reader:
    """Reads a directory once.

    :param directory: of files ``*.policy``; paths in them are relative to it.
    :param legacy: what ``!compat-4.0`` reads.
    """

    def __init__(self, directory: Path, legacy: Path) -> None:
        self.rules: list[Rule] = []
        #: Of all that was looked at, None for what was not there.
        self.stamps: dict[Path, Stamp | None] = {}
        self._directory = directory
        self._legacy = legacy
        self._open: list[str] = []
        self._read = 0

    def read(self) -> None:
        """Read all; PolicyError says what is wrong, and where."""
        self._stamp(self._directory)
        if self._directory.is_dir():
            self._read_directory(self._directory)

    def _stamp(self, path: Path) -> None:
        # before it is read: a change in between is seen then
        self.stamps.setdefault(path, stamp_of(path))

    def _read_directory(self, directory: Path) -> None:
        self._stamp(directory)
        found = [
            path
            for path in _listed(directory)
            if path.suffix == ".policy" and not path.name.startswith(".")
        ]
        if not found and directory != self._directory:
            log.warning("%s has no files of a policy", directory)
        for path in found:
            if not _FILE_NAME.fullmatch(path.name):
                raise PolicyFileError(
                    path, "its name may have digits, lower-case letters, _ . and -"
                )
        for path in found:
            self._read_file(path)

    def _read_file(self, path: Path) -> None:
        for line in self._lines(path):
            if line.text.startswith("!"):
                self._follow(line)
            else:
                self._add(line.text, line.origin)

    def _follow(self, line: _Line) -> None:
        directive, *words = line.text.split()
        if directive not in _DIRECTIVES:
            known = ", ".join(_DIRECTIVES)
            raise line.wrong(f"the directives are {known}, not {directive!r}")
        if len(words) != _DIRECTIVES[directive]:
            raise line.wrong(f"{directive} takes {_DIRECTIVES[directive]} words")
        with self._including(line):
            match directive:
                case "!include":
                    self._read_file(self._directory / words[0])
                case "!include-dir":
                    self._read_directory(self._directory / words[0])
                case "!include-service":
                    self._include_service(line, *words)
                case _:
                    self._read_legacy()

    @contextlib.contextmanager
    def _including(self, line: _Line) -> Iterator[None]:
        try:
            yield
        except PolicyFileError as error:
            # where it is asked for is what needs mending
            raise line.wrong(str(error)) from error

    def _include_service(
        self, line: _Line, service: str, argument: str, path: str
    ) -> None:
        try:
            check_service(service, argument)
        except QubesValueError as error:
            raise line.wrong(str(error)) from None
        base = self._directory
        self._read_service_file(base / path, _For(service, argument, base))

    def _read_service_file(self, path: Path, of: _For) -> None:
        for line in self._lines(path):
            included = _LEGACY_INCLUDE.fullmatch(line.text)
            if included is not None:
                with self._including(line):
                    self._read_service_file(of.base / included[1], of)
            elif line.text.startswith("!"):
                raise line.wrong("the only directive here is !include")
            else:
                self._add_legacy(line, of)

    def _add_legacy(self, line: _Line, of: _For) -> None:
        words = line.text.replace("$", "@").replace(",", " ")
        text = f"{of.service} {of.argument} {words}"
        try:
            self._add(text, line.origin)
        except PolicySyntaxError as error:
            raise line.wrong(error.reason) from None

    def _read_legacy(self) -> None:
        self._stamp(self._legacy)
        for service, argument, path in _legacy_files(_listed(self._legacy)):
            self._read_service_file(path, _For(service, argument, self._legacy))
            if argument == "*":
                continue
            # a file for one argument used to deny whatever it did not speak of
            for target in ("@anyvm", "@adminvm"):
                text = f"{service} {argument} @anyvm {target} deny"
                self._add(text, Origin(str(path), 0))

    def _add(self, text: str, origin: Origin) -> None:
        rule = Rule.parse(text, origin, strict=False)
        if doubt := rule.doubt:
            log.warning("%s: %s: it matches nothing", rule.shown, doubt)
        self.rules.append(rule)

    def _lines(self, path: Path) -> Iterator[_Line]:
        """Yield what a file has to say; it counts as open until that is over."""
        self._stamp(path)
        resolved = os.path.realpath(path)
        if resolved in self._open:
            raise PolicyFileError(path, "it includes itself")
        self._read += 1
        if self._read > _MOST_FILES:
            raise PolicyFileError(path, f"more than {_MOST_FILES} files are included")
        self._open.append(resolved)
        try:
            for number, text in enumerate(_text(path).split("\n"), 1):
                line = _Line(text.strip(), Origin(str(path), number))
                if "\0" in text:
                    raise line.wrong("it has a null character")
                if line.text and not line.text.startswith("#"):
                    yield line
        finally:
            self._open.pop()


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_file())
    except OSError as error:
        raise PolicyFileError(directory, error.strerror or str(error)) from error


def _data(path: Path) -> bytes:
    try:
        # Path.is_file() of Python 3.14 never says why it cannot look at a path.
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise PolicyFileError(path, error.strerror or str(error)) from error
    raise PolicyFileError(path, "it is no file")


def _text(path: Path) -> str:
    data = _data(path)
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise PolicyFileError(path, f"line {number} is not UTF-8") from error


def _legacy_files(paths: Iterable[Path]) -> list[tuple[str, str, Path]]:
    """Return service, argument and file, the file for all arguments last."""
    found = []
    for path in paths:
        name = _LEGACY_NAME.fullmatch(path.name)
        hidden = path.name.startswith(".") or path.suffix in _LEGACY_IGNORED
        if name is None or hidden:
            log.info("%s is ignored: it is not named after a service", path)
            continue
        found.append((name[1], name[2] or "*", path))
    return sorted(found, key=lambda item: (item[0], item[1] == "*", item[1]))
