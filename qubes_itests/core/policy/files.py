"""The files of a policy: what an app begins with, and reading it as it changes.

`default` beside this module is equivalent in effect to what Qubes OS ships in
/etc/qubes/policy.d, where all services of the Admin API are denied.  Files are in the
current format, or in that of Qubes OS 4.0.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os.path
import re
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesValueError
from qubes_itests.core.policy.rule import (
    Origin,
    PolicyError,
    PolicyFileError,
    PolicySyntaxError,
    Rule,
    check_service,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["DEFAULT_POLICY", "PolicyFile", "PolicyFiles", "fill", "find_error"]

log = logging.getLogger("qubes.policy")

#: Where Qubes OS has them, below /etc/qubes and /etc/qubes-rpc.
_CURRENT: Final = "policy.d"
_LEGACY: Final = "policy"

#: What changed so shortly before it was read may change again without a trace in its
#: times: the clock of file systems ticks in up to 10 ms.
_CLOCK_TICK_NS: Final = 20_000_000

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
class PolicyFile:
    """A file that becomes part of a policy, or a directory whose files do.

    :param source: the file or directory.
    :param service: ``SERVICE`` or ``SERVICE+ARGUMENT`` that a file in the format of
        Qubes OS 4.0 is for; empty for the current format.
    """

    source: Path
    service: str = ""

    def parts(self) -> Iterator[tuple[str, Path]]:
        """Yield the files, with their names in the directory of an app.

        :raise PolicyFileError: there is nothing, or nothing to be read.
        """
        if self.source.is_file():
            name = self.service or self.source.name
            yield f"{_LEGACY if self.service else _CURRENT}/{name}", self.source
            return
        try:
            found = sorted(self.source.rglob("*"))
        except OSError as error:
            raise PolicyFileError(self.source, str(error)) from error
        if not self.source.is_dir():
            raise PolicyFileError(self.source, "there is no such file or directory")
        for path in found:
            if path.is_file():
                yield f"{_CURRENT}/{path.relative_to(self.source)}", path


DEFAULT_POLICY: Final = PolicyFile(Path(__file__).parent / "default")


@dataclass(frozen=True, slots=True)
class _Stamp:
    """By what one sees that a file or a directory is another one, or has changed.

    :param inode: its number.
    :param size: in bytes.
    :param changed: time of the last change of its data or attributes, in ns.
    """

    inode: int
    size: int
    changed: int


def _stamp_of(path: Path) -> _Stamp | None:
    """Return the stamp of what is there, None if nothing is."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _Stamp(found.st_ino, found.st_size, found.st_ctime_ns)


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
    :param argument: of each of them.
    :param base: what paths in the file are relative to.
    """

    service: str
    argument: str
    base: Path


class _Reader:
    """Reads a directory once.

    :param directory: of files ``*.policy``; paths in them are relative to it.
    :param legacy: what ``!compat-4.0`` reads.
    """

    def __init__(self, directory: Path, legacy: Path) -> None:
        self.rules: list[Rule] = []
        #: Of all that was looked at, None for what was not there.
        self.stamps: dict[Path, _Stamp | None] = {}
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
        # Before it is read: a change in between makes the stamp differ from the file's.
        self.stamps.setdefault(path, _stamp_of(path))

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
                    service, argument, name = words
                    try:
                        check_service(service, argument)
                    except QubesValueError as error:
                        raise line.wrong(str(error)) from None
                    base = self._directory
                    self._read_service_file(base / name, _For(service, argument, base))
                case _:
                    self._read_legacy()

    @contextlib.contextmanager
    def _including(self, line: _Line) -> Iterator[None]:
        try:
            yield
        except PolicyFileError as error:
            # where it is asked for is what needs mending
            raise line.wrong(str(error)) from error

    def _read_service_file(self, path: Path, of: _For) -> None:
        for line in self._lines(path):
            included = _LEGACY_INCLUDE.fullmatch(line.text)
            if included is not None:
                with self._including(line):
                    self._read_service_file(of.base / included[1], of)
            elif line.text.startswith("!"):
                raise line.wrong("the only directive here is !include")
            else:
                words = line.text.replace("$", "@").replace(",", " ")
                try:
                    self._add(f"{of.service} {of.argument} {words}", line.origin)
                except PolicySyntaxError as error:
                    # it is to show the line as it is in the file
                    raise line.wrong(error.reason) from None

    def _read_legacy(self) -> None:
        self._stamp(self._legacy)
        files = []
        for path in _listed(self._legacy):
            name = _LEGACY_NAME.fullmatch(path.name)
            hidden = path.name.startswith(".") or path.suffix in _LEGACY_IGNORED
            if name is None or hidden:
                log.info("%s is ignored: it is not named after a service", path)
            else:
                # of one service, the file for all arguments comes last
                argument = name[2] or "*"
                files.append((name[1], argument == "*", argument, path))
        for service, _, argument, path in sorted(files):
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


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the files said when they were read.

    :param rules: theirs, in order; none if there is an error.
    :param error: what is wrong with them, None if nothing is.
    :param stamps: by which a change of what was read is seen.
    :param settled: whether every later change will be seen so.
    """

    rules: tuple[Rule, ...] = ()
    error: PolicyError | None = None
    stamps: Mapping[Path, _Stamp | None] = field(default_factory=dict)
    settled: bool = False

    def is_current(self) -> bool:
        """Tell whether nothing has changed."""
        return self.settled and all(
            _stamp_of(path) == stamp for path, stamp in self.stamps.items()
        )


class PolicyFiles:
    """The files of one directory, and what they include.

    :param directory: of files ``*.policy``; None, or one that is not there: no rules.
    :param legacy: what ``!compat-4.0`` reads; by default ``policy`` beside `directory`.
    """

    def __init__(self, directory: Path | None, legacy: Path | None = None) -> None:
        self._directory = directory
        self._legacy = legacy
        self.loaded = _Loaded()

    def refresh(self) -> None:
        """Read them again if one of them has changed."""
        if self._directory is None or self.loaded.is_current():
            return
        before, self.loaded = self.loaded, self._load(self._directory)
        now = self.loaded
        if now.error is not None:
            if str(now.error) != str(before.error):
                log.error("the policy denies all calls: %s", str(now.error))
        elif before.error is not None or before.rules != now.rules:
            log.info("the policy's files have %d rules", len(now.rules))

    def _load(self, directory: Path) -> _Loaded:
        began = time.time_ns()
        reader = _Reader(directory, self._legacy or directory.with_name("policy"))
        error: PolicyError | None = None
        try:
            reader.read()
        except PolicyError as caught:
            error = caught
        # As in Qubes OS: the line that is wrong may have been one that denies.
        rules = () if error is not None else tuple(reader.rules)
        newest = max((s.changed for s in reader.stamps.values() if s), default=0)
        return _Loaded(rules, error, reader.stamps, newest < began - _CLOCK_TICK_NS)


def fill(directory: Path, files: Iterable[PolicyFile]) -> None:
    """Make the directories of an app's policy: the default, and these files.

    Of files with one name the last counts, so the default can be replaced.

    :param directory: the app's.
    :raise PolicyFileError: when a file cannot be read.
    """
    for name, source in _parts(files).items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            reason = error.strerror or str(error)
            raise PolicyFileError(source, reason) from error
    # `!compat-4.0` of the default reads it
    (directory / _LEGACY).mkdir(exist_ok=True)


def _parts(files: Iterable[PolicyFile]) -> dict[str, Path]:
    return {name: path for f in (DEFAULT_POLICY, *files) for name, path in f.parts()}


def find_error(files: Iterable[PolicyFile]) -> str:
    """Return what is wrong with a policy of these files, empty if nothing is.

    :return: the file, the line, and what is wrong with it.
    """
    files = tuple(files)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            fill(directory, files)
        except PolicyFileError as error:
            return str(error)
        read = PolicyFiles(directory / _CURRENT, directory / _LEGACY)
        read.refresh()
        text = str(read.loaded.error or "")
    for part, source in _parts(files).items():
        # the user knows the file by its own name
        text = text.replace(str(directory / part), str(source))
    return text
