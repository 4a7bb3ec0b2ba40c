"""What the code of an app's tests needs on the machine that runs them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from packaging.requirements import InvalidRequirement, Requirement

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from qubes_itests.repository.neighbours import Repositories

__all__ = ["Requirements", "check_requirement"]

_DEBIAN: Final = "debian:"
#: Debian policy 5.6.1.
_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_TIMEOUT: Final = 30.0


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
    if not _is_project(word) and not _is_package(word):
        raise ValueError(
            f"{word!r} is neither a package of Python, as in pillow or pillow>=9, nor"
            f" one of Debian, as in {_DEBIAN}hwdata, nor a project of another"
            " repository, as in core-admin-client:."
        )
    return word


def _is_project(word: str) -> bool:
    name, colon, path = word.partition(":")
    return bool(colon and path) and re.fullmatch(r"[\w.-]+", name) is not None


def _is_package(word: str) -> bool:
    try:
        return Requirement(word).url is None
    except InvalidRequirement:
        return False


@dataclass(frozen=True, slots=True)
class Requirements:
    """Requirements, told apart by who can meet them.

    :param packages: those that pip fetches.
    :param projects: directories of those that pip installs from where they are.
    :param debian: names of packages of Debian, which nobody installs unasked.
    """

    packages: tuple[str, ...] = ()
    projects: tuple[Path, ...] = ()
    debian: tuple[str, ...] = ()

    @classmethod
    def sort(cls, words: Iterable[str], repositories: Repositories) -> Self:
        """Tell words apart.

        :param words: as `check_requirement` takes them.
        :param repositories: finds projects.
        :raise ValueError: for what is no requirement, or a project that is not there.
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
        # elsewhere what is in them may be there, but nobody can tell
        tool = shutil.which("dpkg-query")
        return [n for n in self.debian if tool is None or not _is_installed(tool, n)]


def _is_installed(tool: str, name: str) -> bool:
    command = [tool, "--show", "--showformat=${db:Status-Status} ", "--", name]
    done = subprocess.run(command, capture_output=True, check=False, timeout=_TIMEOUT)
    return b"installed" in done.stdout.split()
