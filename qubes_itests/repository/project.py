"""Where in an app's repository its test plugin is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests.host.tree import files_of
from qubes_itests.repository.exc import InstallError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Project", "find_projects"]

_FILES: Final = ("setup.py", "setup.cfg", "pyproject.toml")
_MARK: Final = b"qubes.tests.extra"
#: Directories below the app's own: tests/, tests/integration/.
_DEPTH: Final = 2


@dataclass(frozen=True, slots=True)
class Project:
    """What pip installs.

    :param directory: of the project.
    :param script: name of the file that stands in for its setup.py; empty for none.
    """

    directory: Path
    script: str = ""


def find_projects(directory: Path, named: Sequence[str] = ()) -> list[Project]:
    """Return what pip installs of an app's test plugins, the app's own first.

    A project is one whose setup.py, setup.cfg or pyproject.toml names an entry point
    group of test plugins. Below a project no other is looked for.

    :param directory: the app's.
    :param named: projects in it that the app names itself, if it does: folders, or
        files in place of setup.py. Then no others are looked for.
    :raise InstallError: when there is nothing of such a name.
    """
    if named:
        return [_named(directory, name) for name in dict.fromkeys(named)]
    return [Project(found) for found in _found(directory)]


def _named(directory: Path, name: str) -> Project:
    path = directory / name
    inside = path.resolve().is_relative_to(directory.resolve())
    if not inside or not (path.is_file() or path.is_dir()):
        raise InstallError(
            str(directory), f"plugin: there is no file or folder {name!r} in it"
        )
    if path.is_dir():
        return Project(path)
    return Project(path.parent, "" if path.name == "setup.py" else path.name)


def _found(directory: Path) -> list[Path]:
    found: dict[Path, None] = {}
    for name in sorted(files_of(directory), key=lambda path: (len(path.parts), path)):
        below = name.parent
        if name.name not in _FILES or len(below.parts) > _DEPTH:
            continue
        if any(directory / parent in found for parent in below.parents):
            continue
        file = directory / name
        # others may have a folder of that name, or a link that leads nowhere
        if file.is_file() and _MARK in file.read_bytes():
            found[directory / below] = None
    return list(found)
