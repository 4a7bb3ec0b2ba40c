"""Requirements of an app's tests, and files that an app names in any repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from packaging.requirements import InvalidRequirement, Requirement

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Repositories", "Requirements", "check_requirement"]

_DEBIAN: Final = "debian:"
#: Debian policy 5.6.1.
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_TIMEOUT: Final = 30.0
_OTHER: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*):(.+)")


@dataclass(frozen=True, slots=True)
class Repositories:
    """Finds files by the words in a section.

    :param own: the directory of the file with the section.
    :param named: other directories, by their names.
    """

    own: Path
    named: Mapping[str, Path] = field(default_factory=dict)

    def find(self, word: str) -> Path:
        """Return the file or directory that a word names.

        :param word: a path in the own directory, or ``NAME:PATH`` in that of another
            repository: a named one, or one that lies beside the own or a named one.
        :raise ValueError: there is none, or it is outside of the repository.
        """
        other = _OTHER.fullmatch(word)
        base, path = (self._other(other[1]), other[2]) if other else (self.own, word)
        found = Path(os.path.normpath(base / path))
        real = found.resolve()
        if Path(path).is_absolute() or not real.is_relative_to(base.resolve()):
            raise ValueError(f"{word!r} is not in {base}")
        if not (found.is_file() or found.is_dir()):
            raise ValueError(f"there is no file or directory {word!r}")
        return real

    def _other(self, name: str) -> Path:
        parents = (place.parent for place in (self.own, *self.named.values()))
        beside = list(dict.fromkeys(parent / name for parent in parents))
        for found in [self.named[name]] if name in self.named else beside:
            if found.is_dir():
                return found
        places = ", ".join(map(str, beside))
        raise ValueError(
            f"there is no repository {name!r}: neither --repository nor --app names a"
            f" directory that is called so, and there is no {places}"
        )


def check_requirement(word: str) -> str:
    """Return a word if it can name a requirement.

    :param word: ``NAME``, with or without versions, of the index of Python packages;
        ``debian:NAME``; or ``REPOSITORY:PATH`` of a project in another repository.
    :raise ValueError: says what is wrong with it.
    """
    if word.startswith(_DEBIAN):
        if not _PACKAGE.fullmatch(word.removeprefix(_DEBIAN)):
            raise ValueError(f"{word!r} does not name a package of Debian")
        return word
    try:
        is_package = Requirement(word).url is None
    except InvalidRequirement:
        is_package = False
    if not _is_project(word) and not is_package:
        raise ValueError(
            f"{word!r} is neither a package of Python, as in pillow or pillow>=9, nor"
            f" one of Debian, as in {_DEBIAN}hwdata, nor a project of another"
            " repository, as in core-admin-client:."
        )
    return word


def _is_project(word: str) -> bool:
    name, colon, path = word.partition(":")
    return bool(colon and path) and re.fullmatch(r"[\w.-]+", name) is not None


@dataclass(frozen=True, slots=True)
class Requirements:
    """Requirements, told apart by who can meet them.

    :param packages: those that pip fetches.
    :param projects: directories of those that pip installs from where they are.
    :param debian: names of packages of Debian, which the user has to install.
    """

    packages: tuple[str, ...] = ()
    projects: tuple[Path, ...] = ()
    debian: tuple[str, ...] = ()

    @classmethod
    def sort(cls, words: Iterable[str], repositories: Repositories) -> Self:
        """Tell words apart.

        :param words: as `check_requirement` takes them.
        :param repositories: finds projects.
        :raise ValueError: for an invalid requirement, or a project that does not exist.
        """
        words = [check_requirement(word) for word in dict.fromkeys(words)]
        debian = [word for word in words if word.startswith(_DEBIAN)]
        projects = [w for w in words if w not in debian and _is_project(w)]
        return cls(
            tuple(word for word in words if word not in (*debian, *projects)),
            tuple(repositories.find(word) for word in projects),
            tuple(word.removeprefix(_DEBIAN) for word in debian),
        )

    def missing_packages(self) -> list[str]:
        """Return those packages of Debian that are not installed here; blocking."""
        # without dpkg there is no way to tell whether their contents are there
        tool = shutil.which("dpkg-query")
        return [n for n in self.debian if tool is None or not _is_installed(tool, n)]


def _is_installed(tool: str, name: str) -> bool:
    command = [tool, "--show", "--showformat=${db:Status-Status} ", "--", name]
    done = subprocess.run(command, capture_output=True, check=False, timeout=_TIMEOUT)
    return b"installed" in done.stdout.split()
